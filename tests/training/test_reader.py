from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.encoders import tiny_encoder_folder
from tests.evaluation.sets import queries, write_jsonl, write_set
from tests.models import tiny_model

from treemem import Document, Memory
from treemem.config import TreeConfig
from treemem.errors import InputError
from treemem.evaluation.readers import answered, judge
from treemem.hierarchy.context import PassageText, gather_vectors
from treemem.hierarchy.embed import Encoder, load_encoder
from treemem.hierarchy.generate import LocalModel
from treemem.hierarchy.reader import ReadingModel, load_reader
from treemem.training.examples import AnsweredQuestion, Example, Examples, gather_examples, text_examples
from treemem.training.reader import (
    MIXTURES,
    ReaderData,
    ReaderModule,
    ReaderTrainer,
    ReaderTraining,
    collate,
    fit_maps,
)
from treemem.types import no_progress

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ("amber", "birch", "coral", "delta", "ember", "fjord", "grove", "heron")
NAMES = ("Arda", "Belen", "Corin", "Dagny", "Elric", "Fenna", "Garth", "Hilda", "Ivo", "Jorun", "Kaya", "Lorn")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(str(tiny_encoder_folder(tmp_path_factory.mktemp("encoder"))))


def fact(name: str, word: str) -> str:
    return f"The sign of {name} is {word}."


def questions() -> list[AnsweredQuestion]:
    rng = np.random.default_rng(0)
    signs = [str(rng.choice(WORDS)) for _ in NAMES]
    return [AnsweredQuestion(f"What is the sign of {n}?", (w,), {}) for n, w in zip(NAMES, signs, strict=True)]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Memory:
    told = [
        Document(f"d{i}", fact(own.text.split()[-1].rstrip("?"), own.answers[0])) for i, own in enumerate(questions())
    ]
    config = TreeConfig(chunk_tokens=32, fanout=4)
    return Memory.build(told, tmp_path_factory.mktemp("memory") / "m", encoder=encoder, hierarchy=None, config=config)


@pytest.fixture(scope="module")
def examples(memory: Memory) -> Examples:
    own = gather_examples(memory, questions())
    own.read(memory.encoder)
    return own


def fresh(**options: Any) -> LocalModel:
    texts = tuple(fact(name, word) for name in NAMES for word in WORDS)
    model: LocalModel = tiny_model.__wrapped__(texts=texts, vocabulary=400, spread=0.2, **options)
    return model


def quick(**fields: Any) -> ReaderTraining:
    return ReaderTraining(**{"steps": 3, "batch": 4, "batch_tokens": 2000, "text_tokens": 300, **fields})


# ---- examples


def test_examples_hold_what_searches_gave(memory: Memory, examples: Examples) -> None:
    result = memory.search_many([examples.rows[0].question])[0]
    own = examples.rows[0]
    assert [examples.texts[row] for row, _ in own.hits] == [hit.text for hit in result.hits]
    assert own.answers == questions()[0].answers
    shape = (2, 3, 2)
    given = examples.given(own, shape)
    live = gather_vectors(memory.image, memory.encoder, result.gathered, result.hits, shape)
    for field in ("levels", "places", "ranks"):
        np.testing.assert_array_equal(getattr(given, field), getattr(live, field))
    np.testing.assert_allclose(given.vectors, live.vectors, atol=2e-3)
    np.testing.assert_allclose(given.scores, live.scores, atol=1e-5)


def test_examples_are_saved_and_read(tmp_path: Path, examples: Examples) -> None:
    examples.save(tmp_path)
    again = Examples.load(tmp_path)
    assert (again.rows, again.texts, again.follows, again.encoder) == (
        examples.rows,
        examples.texts,
        examples.follows,
        examples.encoder,
    )
    np.testing.assert_array_equal(again.chunks, examples.chunks)
    with pytest.raises(InputError, match="call read first"):
        again.windows_of(0)


def test_what_are_no_examples_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no examples that can be read") as caught:
        Examples.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_examples_of_another_encoder_are_refused(examples: Examples, encoder: Encoder) -> None:
    with pytest.raises(InputError, match="they are of encoder"):
        replace(examples, encoder=replace(examples.encoder, weights="other")).read(encoder)


def test_texts_are_cut_and_know_what_follows(encoder: Encoder) -> None:
    documents = [Document("a", "One sentence is here. " * 9), Document("b", "Another one.")]
    own = text_examples(documents, encoder, limit=16)
    assert len(own.texts) > 3
    assert own.follows == [i not in (0, len(own.texts) - 1) for i in range(len(own.texts))]
    assert not own.rows


# ---- batches


def test_states_targets_and_teachers_stand_at_their_places(examples: Examples) -> None:
    model = fresh()
    trainer_config = quick()
    from treemem.hierarchy.reader import ReaderConfig, model_id

    data = ReaderData(model, [examples], trainer_config, ReaderConfig(examples.encoder, model_id(model), "t", 32))
    one, other = (data.question((0, row), "both") for row in (0, 1))
    one.teacher = (np.full((len(one.target), 4), 7), np.zeros((len(one.target), 4), np.float32))
    batch = collate([one, other], 4)
    taught = torch.zeros(len(batch.targets), dtype=torch.bool)
    taught[batch.taught] = True
    for row, own in enumerate((one, other)):
        rows = batch.wanted[:, 0] == row
        assert batch.targets[rows].tolist() == own.target
        places = batch.wanted[rows][:, 1]
        assert batch.ids[row, places + 1].tolist() == own.target  # a state predicts the token behind it
        assert batch.vector_places[batch.vector_places[:, 0] == row][:, 1].tolist() == list(own.prompt.vectors)
        assert taught[rows].tolist() == [row == 0] * len(own.target)
    assert batch.teacher_ids.shape == (len(one.target), 4)
    assert (batch.teacher_ids == 7).all()
    assert one.target[-1] == data.end


@pytest.mark.parametrize("task", sorted({task for mixture in MIXTURES.values() for task in mixture}))
def test_every_task_can_be_drawn(encoder: Encoder, examples: Examples, task: str) -> None:
    from treemem.hierarchy.reader import ReaderConfig, model_id

    model = fresh()
    text = "In 1874 the baker Anna Holm left Oslo. She walked to Bergen with 12 loaves. " * 8
    prose = text_examples([Document("a", text)], encoder, limit=32)
    prose.read(encoder)
    config = ReaderConfig(examples.encoder, model_id(model), "t", 32)
    data = ReaderData(model, [examples, prose], quick(), config)
    rng = np.random.default_rng(0)
    drawn = [own for own in (data.draw(task, rng) for _ in range(60)) if own is not None]  # type: ignore[arg-type]
    assert len(drawn) > 5
    said = {model.tokenizer.decode(own.target, skip_special_tokens=True) for own in drawn}
    if task == "fill":
        assert said & {"Anna Holm", "Oslo", "Bergen", "12", "1874"}
        asked = model.tokenizer.decode(drawn[0].prompt.ids)
        assert "___" in asked
    if task in ("text", "vectors", "both"):
        assert said <= set(WORDS)
        assert all((own.given is None) == (task == "text") for own in drawn)


# ---- training


def test_maps_begin_at_the_words_of_windows(encoder: Encoder, examples: Examples) -> None:
    model = fresh()
    trainer = ReaderTrainer(model, encoder, [examples], Path("unused"), config=quick(), device="cpu")
    cosine = fit_maps(trainer.reader, model, [examples], ridge=1e-3)
    assert cosine > 0.9
    first, second = (linear.get_parameter("weight") for linear in list(trainer.reader.projection.maps)[:2])
    assert torch.equal(first, second)


@pytest.mark.usefixtures("unchecked_types")  # which take as long as the training; other tests check them
def test_a_reader_answers_from_vectors_and_not_from_shuffled_ones(tmp_path: Path, encoder: Encoder) -> None:
    """Facts as pairs of a name and one of eight words, every fourth pair never seen in training."""
    pairs = [(name, word) for name in NAMES for word in WORDS]
    facts = [fact(*pair) for pair in pairs]
    own = text_examples([Document(f"d{i}", text) for i, text in enumerate(facts)], encoder, limit=32)
    assert own.texts == facts
    rows = [
        Example(f"What is the sign of {name}?", (word,), (PassageText("", text),), (), ((row, 1.0),), ())
        for row, ((name, word), text) in enumerate(zip(pairs, facts, strict=True))
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    seen, unseen = (replace(own, rows=[rows[i] for i in part]) for part in (order[24:], order[:24]))
    seen.read(encoder)
    unseen.read(encoder)
    options: dict[str, Any] = {"texts": tuple(facts), "vocabulary": 400, "width": 64, "spread": 0.12, "seed": 1}
    # The random model is frozen: adapters of a high rank do all of the learning.
    config = quick(steps=200, batch=16, rate=3e-3, projection_rate=5e-3, distil=0.0)
    shape = {"rank": 32, "hidden": 64, "chunks": 1, "more": 0, "nodes": 0}
    trainer = ReaderTrainer(tiny_model(**options), encoder, [seen], tmp_path, config=config, shape=shape, device="cpu")
    reading = ReadingModel(tiny_model.__wrapped__(**options), trainer.fit())
    gates = judge(reading, unseen, ("no context", "shuffled", "vectors", "text"))
    f1 = {name: figures.f1 for name, figures in gates.figures.items()}
    assert f1["vectors"] > 0.6, f1
    assert max(f1["shuffled"], f1["no context"]) < 0.35, f1
    assert f1["text"] > 0.8, f1
    assert gates.verdicts["vectors beat shuffled vectors"]


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    names = ("projection.safetensors", "text/adapter_model.safetensors", "vectors/adapter_model.safetensors")
    return {f"{name}/{key}": value for name in names for key, value in load_file(folder / name).items()}


def test_an_interrupted_run_goes_on(tmp_path: Path, encoder: Encoder, examples: Examples) -> None:
    told: list[str] = []

    def stop(stage: str, done: float, total: float | None) -> None:
        told.append(stage)
        if stage.startswith("stage answering") and done >= 1:
            raise KeyboardInterrupt

    def trainer(progress: Any) -> ReaderTrainer:
        return ReaderTrainer(fresh(), encoder, [examples], tmp_path, config=quick(), device="cpu", progress=progress)

    with pytest.raises(KeyboardInterrupt):
        trainer(stop).fit()
    state = json.loads((tmp_path / "checkpoints" / "state.json").read_text())
    assert state["done"] == ["text", "reading"]
    before = weights_of(tmp_path)
    seen: list[str] = []
    trainer(lambda stage, done, total: seen.append(stage)).fit()
    assert not any(stage.startswith(("stage text", "stage reading")) for stage in seen)
    after = weights_of(tmp_path)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all(name in same for name in before if name.startswith("text/"))
    assert any(name not in same for name in before if name.startswith("vectors/"))
    assert not (tmp_path / "checkpoints").exists()
    assert load_reader(tmp_path) is not None


def test_a_run_of_other_settings_is_not_continued(tmp_path: Path, encoder: Encoder, examples: Examples) -> None:
    def stop(stage: str, done: float, total: float | None) -> None:
        if stage.startswith("stage reading"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ReaderTrainer(fresh(), encoder, [examples], tmp_path, config=quick(), device="cpu", progress=stop).fit()
    fewer = examples.take(range(5))
    for sets, seed, name in (([examples], 1, "config"), ([fewer], 0, "examples"), ([fewer], 1, "config, examples")):
        other = ReaderTrainer(fresh(), encoder, sets, tmp_path, config=quick(seed=seed), device="cpu")
        with pytest.raises(InputError, match=rf"an interrupted run of other settings is there \({name}\)"):
            other.fit()


def test_a_run_that_was_interrupted_in_its_first_stage_is_known_again(
    tmp_path: Path, encoder: Encoder, examples: Examples
) -> None:
    def stop(stage: str, done: float, total: float | None) -> None:
        if stage.startswith("stage text"):
            raise KeyboardInterrupt

    def trainer(sets: list[Examples], progress: Any = no_progress) -> ReaderTrainer:
        return ReaderTrainer(fresh(), encoder, sets, tmp_path, config=quick(), device="cpu", progress=progress)

    with pytest.raises(KeyboardInterrupt):
        trainer([examples], stop).fit()
    with pytest.raises(InputError, match=r"of other settings is there \(examples\)"):
        trainer([examples.take(range(5))]).fit()
    going_on = trainer([examples])
    going_on.fit()
    assert set(going_on.steps) == {"text", "reading", "answering"}
    with pytest.raises(InputError, match="a reader is there already"):
        trainer([examples])
    made = load_reader(tmp_path)
    assert made is not None
    ReaderTrainer(fresh(), encoder, [examples], tmp_path, config=quick(), device="cpu", start=made)


def test_what_the_teacher_says_counts(tmp_path: Path, encoder: Encoder, examples: Examples) -> None:
    """The adapter for text is asked about every question, and whoever says what it says loses less."""
    for distil in (0.0, 0.5):
        config = quick(steps=1, distil=distil)
        folder = tmp_path / str(distil)
        trainer = ReaderTrainer(fresh(), encoder, [examples], folder, config=config, device="cpu")
        trainer.fit()
        assert trainer.data is not None
        assert set(trainer.data.teacher) == (set(trainer.data.questions) if distil else set())
    module = ReaderModule(trainer.peft_model, trainer.reader, "answering", replace(config, distil=1.0))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    drawn = trainer.data.question((0, 0), "vectors")
    with torch.no_grad():
        logits = module.logits(collate([drawn], 1))
        losses = {}
        for name, tokens in (("agrees", logits.argmax(1)), ("disagrees", logits.argmin(1))):
            drawn.teacher = (tokens.numpy()[:, None], np.zeros((len(tokens), 1), np.float32))
            losses[name] = float(module.training_step(collate([drawn], 1), 0))
        drawn.teacher = None
        alone = float(module.training_step(collate([drawn], 1), 0))
    assert alone < losses["agrees"] < losses["disagrees"]
    # The teacher's opinions are those of the adapter that has read the passages.
    asked = ReaderModule(trainer.peft_model, trainer.reader, "text", config)
    told = trainer.data.question((0, 0), "text")
    with torch.no_grad():
        best = asked.logits(collate([told], 1)).argmax(1)
    assert trainer.data.teacher[0, 0][0][:, 0].tolist() == best.tolist()


def test_a_reader_is_gone_on_with(tmp_path: Path, encoder: Encoder, examples: Examples) -> None:
    first = ReaderTrainer(fresh(), encoder, [examples], tmp_path / "first", config=quick(), device="cpu").fit()

    def weights(trainer: ReaderTrainer) -> dict[str, torch.Tensor]:
        adapters = {k: v for k, v in trainer.peft_model.named_parameters() if "lora_" in k}
        return {k: v.detach().clone() for k, v in [*adapters.items(), *trainer.reader.projection.named_parameters()]}

    class Stopped(Exception):
        pass

    def stop(stage: str, done: float, total: float | None) -> None:
        if stage.startswith("stage answering"):
            raise Stopped

    def trainer(start: Any, folder: str, progress: Any = stop) -> ReaderTrainer:
        options: dict[str, Any] = {"config": quick(rate=1e-9, projection_rate=1e-9), "device": "cpu"}
        return ReaderTrainer(fresh(), encoder, [examples], tmp_path / folder, start=start, progress=progress, **options)

    saved = weights_of(tmp_path / "first")
    going_on = trainer(load_reader(tmp_path / "first"), "second")
    before = weights(going_on)
    for name, key in (("text", "lora_A.text"), ("vectors", "lora_A.vectors")):
        held = {v.float().sum().item() for k, v in saved.items() if k.startswith(name) and "lora_A" in k}
        assert held == {v.sum().item() for k, v in before.items() if key in k}
    with pytest.raises(Stopped):
        going_on.fit()  # nothing of what was learned is made anew at the beginning of a stage
    after = weights(going_on)
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)

    text_alone = load_reader(tmp_path / "first")
    assert text_alone is not None
    text_alone.config = replace(text_alone.config, reads=("text",))
    text_alone.adapters.pop("vectors")
    fitted = trainer(text_alone, "third")
    with pytest.raises(Stopped):
        fitted.fit()
    assert fitted.fitted > 0 == going_on.fitted
    adapters = weights(fitted)
    for name in (name for name in adapters if ".text." in name):  # who has learned to answer from text goes on from it
        torch.testing.assert_close(adapters[name.replace(".text.", ".vectors.")], adapters[name], atol=1e-5, rtol=0)
    other = replace(first.config, encoder=replace(first.config.encoder, weights="other"))
    text_alone.config = other
    with pytest.raises(InputError, match="reads embeddings of encoder"):
        trainer(text_alone, "fourth")


def test_nothing_of_the_machine_stays_in_a_reader(tmp_path: Path, encoder: Encoder, examples: Examples) -> None:
    ReaderTrainer(fresh(), encoder, [examples], tmp_path, config=quick(steps=1), device="cpu").fit()
    described = json.loads((tmp_path / "text" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "tiny llama"
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "projection.safetensors", "README.md", "text", "vectors"
    }  # fmt: skip


def test_without_questions_only_reading_is_learned(tmp_path: Path, encoder: Encoder) -> None:
    prose = text_examples([Document("a", "The mill stood still in 1874. Nobody came. " * 9)], encoder, limit=32)
    trainer = ReaderTrainer(fresh(), encoder, [prose], tmp_path, config=quick(steps=1), device="cpu")
    trainer.fit()
    assert set(trainer.steps) == {"reading"}


def test_without_anything_there_is_nothing_to_learn(tmp_path: Path, encoder: Encoder) -> None:
    empty = text_examples([], encoder)
    trainer = ReaderTrainer(fresh(), encoder, [empty], tmp_path, config=quick(), device="cpu")
    with pytest.raises(InputError, match="nothing to train a reader on"):
        trainer.fit()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="minutes"):
        ReaderTraining(minutes=0)
    for shares in ((0, 0, 0), (1, -1, 0), (1, 0.5, 0)):
        with pytest.raises(InputError, match="shares"):
            ReaderTraining(shares=shares)


TEXT_ONLY = {"shares": (1.0, 0.0, 0.0)}


def test_text_alone_is_learned_and_saved_alone(tmp_path: Path, encoder: Encoder, memory: Memory) -> None:
    unread = gather_examples(memory, questions())
    trainer = ReaderTrainer(fresh(), encoder, [unread], tmp_path / "own", config=quick(**TEXT_ONLY), device="cpu")
    trainer.fit()
    assert set(trainer.steps) == {"text"}
    assert unread.windows is None  # no vector was made
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"config.json", "README.md", "text"}
    made = load_reader(tmp_path / "own")
    assert made is not None
    assert (made.config.reads, set(made.adapters)) == (("text",), {"text"})
    # Going on with a reader of vectors leaves what it knows of them as it was.
    unread.read(encoder)
    ReaderTrainer(fresh(), encoder, [unread], tmp_path / "all", config=quick(), device="cpu").fit()
    before = weights_of(tmp_path / "all")
    start = load_reader(tmp_path / "all")
    options: dict[str, Any] = {"config": quick(**TEXT_ONLY), "device": "cpu", "start": start}
    going_on = ReaderTrainer(fresh(), encoder, [unread], tmp_path / "more", **options).fit()
    after = weights_of(tmp_path / "more")
    assert going_on.config.reads == ("text", "vectors", "both")
    assert {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])} == {"text"}


def test_text_alone_that_was_interrupted_goes_on(tmp_path: Path, encoder: Encoder, examples: Examples) -> None:
    config = quick(**TEXT_ONLY, steps=4)

    def trainer(progress: Any = no_progress) -> ReaderTrainer:
        return ReaderTrainer(fresh(), encoder, [examples], tmp_path, config=config, device="cpu", progress=progress)

    def stop(stage: str, done: float, total: float | None) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(stop).fit()
    seen: list[float] = []
    going_on = trainer(lambda stage, done, total: seen.append(done))
    going_on.fit()
    assert seen[0] > 2  # not from the beginning
    (tmp_path / "checkpoints").mkdir()
    going_on._note(["text"])  # as if it had been interrupted while it cleared up
    again = trainer()
    again.fit()
    assert again.steps == {}


def test_text_alone_needs_questions(tmp_path: Path, encoder: Encoder) -> None:
    prose = text_examples([Document("a", "The mill stood still in 1874. " * 9)], encoder, limit=32)
    trainer = ReaderTrainer(fresh(), encoder, [prose], tmp_path, config=quick(**TEXT_ONLY), device="cpu")
    with pytest.raises(InputError, match="nothing to train a reader on"):
        trainer.fit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_computed_as_the_model_was_loaded(
    tmp_path: Path, encoder: Encoder, examples: Examples, dtype: torch.dtype
) -> None:
    model = fresh()
    model.model.to(dtype)
    trainer = ReaderTrainer(model, encoder, [examples], tmp_path, config=quick(steps=2), device="cpu")
    seen = set()
    layer = next(m for name, m in trainer.peft_model.named_modules() if name.endswith("q_proj.lora_A.text"))
    layer.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    trainer.fit()
    assert seen == {dtype}
    assert {v.dtype for k, v in trainer.peft_model.named_parameters() if "lora_" in k} == {torch.float32}


# ---- gates


def test_gates_say_what_beats_what(encoder: Encoder, examples: Examples, tmp_path: Path) -> None:
    from treemem.evaluation.readers import Gates, ReaderFigures

    def gates(**f1: float) -> dict[str, bool]:
        return Gates(1, 1, 1, {k.replace("_", " "): ReaderFigures(0, v, 0) for k, v in f1.items()}).verdicts

    found = gates(no_context=0.1, shuffled=0.3, vectors=0.2, text=0.5, both=0.5)
    assert found == {
        "vectors beat no context": True,
        "vectors beat shuffled vectors": False,
        "both do not lose to text": True,
        "text beats vectors": True,
    }
    assert gates(text=0.5) == {}


@pytest.mark.parametrize(
    ("f1", "best"),
    [
        ({"no context": 0.1, "shuffled": 0.3, "vectors": 0.6, "text": 0.5, "both": 0.4}, "vectors"),
        ({"no context": 0.1, "shuffled": 0.7, "vectors": 0.6, "text": 0.5, "both": 0.4}, "text"),
        ({"no context": 0.7, "shuffled": 0.1, "vectors": 0.6, "text": 0.5, "both": 0.4}, "text"),
        ({"no context": 0.1, "shuffled": 0.3, "vectors": 0.2, "text": 0.5, "both": 0.6}, "both"),
        ({"no context": 0.1, "shuffled": 0.3, "vectors": 0.2, "text": 0.5, "both": 0.5}, "text"),
        ({"no context": 0.1, "text": 0.5}, "text"),
    ],
)
def test_only_what_passes_the_gates_is_asked_for_by_default(f1: dict[str, float], best: str) -> None:
    from treemem.evaluation.readers import Gates, ReaderFigures

    assert Gates(1, 1, 1, {name: ReaderFigures(0, value, 0) for name, value in f1.items()}).best == best


def test_what_is_trained_on_and_what_is_held_out(tmp_path: Path) -> None:
    from treemem.evaluation.dataset import load_set
    from treemem.evaluation.readers import answered_questions

    def split(*names: str | None) -> tuple[int, int | None]:
        asked = [{**own, "split": names[i % len(names)]} for i, own in enumerate(queries())]
        write_jsonl(folder, "queries", [{k: v for k, v in own.items() if v is not None} for own in asked], "")
        train, judges = answered_questions(load_set(folder, None))
        return len(train), None if judges is None else len(judges.queries)

    folder = write_set(tmp_path / "set")
    count = sum(bool(own.get("answers")) for own in queries())
    assert split("train", "dev") == (count // 2, count - count // 2)
    assert split("train", "test") == (count - count // 2, None)
    assert split("test", "other") == (count // 2, None)
    assert split(None) == (count, None)
    with pytest.raises(InputError, match="all held out"):
        split("test")


def test_only_questions_with_answers_are_trained_on() -> None:
    from treemem.evaluation.dataset import EvalQuery

    query = EvalQuery("q", "Why?", {"d": 1}, "documents", {}, ("because",))
    assert answered([query, replace(query, answers=())]) == [AnsweredQuestion("Why?", ("because",), {})]
    assert PassageText("a", "b") == PassageText("a", "b")
