"""Text into a vector and back, with a tiny model and a tokenizer of some hundred tokens."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.encoders import WORDS, tiny_encoder_folder
from tests.test_cli import Run, run
from tokenizers import Tokenizer

from treemem.config import TreeConfig
from treemem.errors import InputError, ModelError, OutOfSpace, UnknownModel
from treemem.hierarchy.embed import load_encoder
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.vector import VectorConfig
from treemem.training import autoencode
from treemem.training.autoencode import (
    CHECKPOINT,
    ENCODER_FOLDER,
    AutoEncodeConfig,
    AutoEncodeReport,
    Sample,
    load_autoencoder,
    rebuilt,
    train_autoencoder,
)
from treemem.training.prose import (
    Kept,
    aligned,
    kept,
    load_tokenizer,
    pieces_of,
    read_tokens,
    save_tokens,
    windows,
    words_of,
)
from treemem.training.rebuild import UNKNOWN, AutoEncoder, corrupted

__all__ = ["run"]  # a fixture of the command line's tests

SHAPE = {
    "width": 32, "tokens": 8, "code": 8, "encoder_width": 32, "encoder_layers": 1, "decoder_width": 32,
    "decoder_layers": 2, "head": 16,
}  # fmt: skip
SHORT = AutoEncodeConfig(steps=12, batch=8, rate=3e-3, held_out=20, scored=1.0)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    return tiny_encoder_folder(tmp_path_factory.mktemp("words")) / ".." / "plain"


@pytest.fixture(scope="module")
def tokenizer(words: Path) -> Tokenizer:
    return load_tokenizer(str(words))


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    draw = random.Random(0)
    lines = [{"id": str(i), "text": " ".join(draw.choices(WORDS.split(), k=60))} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return path


def tiny(**changes: Any) -> AutoEncoder:
    torch.manual_seed(0)
    return AutoEncoder(VectorConfig(vocabulary=50, **{**SHAPE, **changes}))


# ---- the model


@pytest.mark.parametrize("shape", [{}, {"vectors": 2}, {"width": 4}, {"encoder_layers": 0}, {"decoder_width": 16}])
def test_shapes(shape: dict[str, int]) -> None:
    model = tiny(**shape)
    ids = torch.randint(0, 50, (3, 8))
    vectors = model.encoder(ids)
    assert vectors.shape == (3, model.config.total)
    torch.testing.assert_close(vectors.norm(dim=1), torch.full((3,), model.config.total**0.5))
    assert model.rebuild(vectors, 3).shape == (3, 8)
    assert model.encoder(ids[:, :5]).shape == vectors.shape
    assert model.encoder(ids[:, :0]).shape == vectors.shape
    model.loss(ids, torch.full_like(ids, UNKNOWN)).backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert unreached <= {f"{part}.{i}.inwards.bias" for part in ("encoder.layers", "decoder.layers") for i in range(2)}


def test_padding_changes_nothing() -> None:
    model = tiny()
    ids = torch.randint(0, 50, (2, 8))
    present = torch.arange(8).repeat(2, 1) < 5
    torch.testing.assert_close(model.encoder(ids, present), model.encoder(ids[:, :5]), atol=1e-5, rtol=1e-5)


def test_bfloat16_is_near() -> None:
    model = tiny()
    ids = torch.randint(0, 50, (16, 8))
    given = torch.full_like(ids, UNKNOWN)
    exact = model.loss(ids, given)
    with torch.autocast("cpu", torch.bfloat16):
        near = model.loss(ids, given)
        assert model.encoder(ids).dtype == torch.float32
    torch.testing.assert_close(near.float(), exact, rtol=0.02, atol=0.02)


def learned(model: AutoEncoder, ids: torch.Tensor, steps: int = 150) -> None:
    """Train on the same few texts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = model.loss(ids, corrupted(ids, 0.5, 0.1, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_few_texts_are_learned_exactly_and_it_is_the_vector_that_holds_them() -> None:
    model = tiny()
    ids = torch.randint(0, 50, (12, 8))
    learned(model, ids)
    for rounds in (1, 2, 8):
        assert torch.equal(rebuilt(model, ids, rounds), ids)
    assert model.forced(ids).all()
    shuffled = model.rebuild(model.encoder(ids).roll(1, 0))
    assert (shuffled == ids).float().mean() < 0.5
    assert torch.equal(shuffled, ids.roll(1, 0))
    # A text is rebuilt alone as in a batch.
    assert torch.equal(torch.cat([rebuilt(model, one[None], 2) for one in ids]), rebuilt(model, ids, 2, batch=5))


def test_what_a_decoder_is_told() -> None:
    ids = torch.randint(0, 50, (200, 8))
    generator = torch.Generator().manual_seed(0)
    told = corrupted(ids, 1.0, 0.0, generator)
    assert (told == UNKNOWN).all()
    told = corrupted(ids, 0.0, 0.0, generator)
    assert torch.equal(told[told != UNKNOWN], ids[told != UNKNOWN])
    assert 0.4 < (told == UNKNOWN).float().mean() < 0.6
    told = corrupted(ids, 0.0, 1.0, generator)
    assert torch.equal(told[told != UNKNOWN], ids.roll(1, 0)[told != UNKNOWN])


# ---- what is measured


def test_longest_common_subsequence() -> None:
    draw = random.Random(0)
    for _ in range(200):
        a, b = (draw.choices("abc", k=draw.randrange(7)) for _ in range(2))
        pairs = aligned(a, b)
        assert all(a[i] == b[j] for i, j in pairs)
        assert pairs == sorted(pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        most = max(
            (len(sub) for n in range(1 << len(a)) if subsequence(sub := [x for i, x in enumerate(a) if n >> i & 1], b)),
        )
        assert len(pairs) == most


def subsequence(short: list[str], long: list[str]) -> bool:
    left = iter(long)
    return all(x in left for x in short)


def test_words_names_and_numbers() -> None:
    tokenizer = load_tokenizer()
    text = "Old Bees flew to Verona in 1984, with 1,200 others. Then Romeo, I think, left Padua! He left."
    whole = len(tokenizer.encode(text).ids)
    (window,) = windows([text], tokenizer, whole, 1)
    own = words_of(pieces_of(window.ids, tokenizer))
    assert [own[i] for i in sorted(window.names)] == ["bees", "verona", "romeo", "padua"]
    assert own[own.index("1984") :][:4] == ["1984", "with", "1", "200"]
    same = kept([window], [window.ids], tokenizer)
    assert same == Kept(len(own), len(own), 4, 4, 3, 3)
    other = np.array(tokenizer.encode(text.replace("Verona", "Rome").replace("1984", "1985")).ids, np.int64)
    assert kept([window], [other], tokenizer) == Kept(len(own), len(own) - 2, 4, 3, 3, 2)
    assert Kept(0, 0, 0, 0, 0, 0).shares() == dict.fromkeys(same.shares(), 0.0)


def test_windows_begin_with_a_word_and_lie_in_their_text(tokenizer: Tokenizer) -> None:
    texts = ["the bees dance " * 9, "a lamp", "uncommonword of honey " * 5]
    found = windows(texts, tokenizer, 8, 12)
    assert len(found) >= 6
    for window in found:
        assert window.ids.shape == (8,)
        assert not pieces_of(window.ids, tokenizer)[0].startswith("##")
        assert any(window.text in text for text in texts)
        assert tokenizer.encode(window.text).ids == window.ids.tolist()
    assert [w.text for w in windows(texts, tokenizer, 8, 12)] == [w.text for w in found]
    assert windows(["a lamp"], tokenizer, 8, 3) == []


# ---- a run


def trained(prose: Path, folder: Path, words: Path, **changes: Any) -> AutoEncodeReport:
    config = changes.pop("config", SHORT)
    return train_autoencoder(
        [str(prose)], folder, shape=SHAPE, config=config, tokenizer=str(words), device="cpu", **changes
    )


@pytest.fixture(scope="module")
def whole(prose: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> AutoEncodeReport:
    return trained(prose, tmp_path_factory.mktemp("whole") / "ae", words)


def test_a_run_and_its_files(whole: AutoEncodeReport) -> None:
    folder = Path(whole.folder)
    assert (whole.steps, whole.examples, whole.device) == (12, 96, "cpu")
    assert whole.curve[-1]["loss"] < whole.curve[0]["loss"]
    assert sum("token accuracy" in point for point in whole.curve) >= 5
    assert set(whole.figures) == {
        "token accuracy, free-running", "token accuracy, teacher-forced", "whole texts exact", "words aligned",
        "names exact", "numbers exact", "names and numbers exact",
    }  # fmt: skip
    assert len(whole.samples) == 5
    assert not (folder / CHECKPOINT).exists()
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "12 s" not in (folder / "README.md").read_text("utf-8")
    assert AutoEncodeReport.load(folder).to_json() == json.loads(json.dumps(whole.to_json()))
    model = load_autoencoder(folder)
    ids = torch.randint(0, model.config.vocabulary, (3, 8))
    assert rebuilt(model, ids).shape == (3, 8)
    with pytest.raises(ModelError, match="no autoencoder can be read there"):
        load_autoencoder(folder / "encoder" / "nothing")
    with pytest.raises(InputError, match="no finished autoencoder there"):
        AutoEncodeReport.load(folder / "encoder")


def test_the_saved_encoder_is_an_encoder_1(whole: AutoEncodeReport, tmp_path: Path) -> None:
    folder = Path(whole.folder)
    encoder = load_encoder(str(folder / ENCODER_FOLDER), device="cpu")
    model = load_autoencoder(folder)
    assert (encoder.dimension, encoder.longest) == (32, 8)
    texts = ["the bees dance in the day", "honey", "", "a queen of kites is a lamp text and some words of bread"]
    vectors = encoder.encode(texts, precise=True)
    tokenizer = load_tokenizer(str(folder / ENCODER_FOLDER))
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([tokenizer.encode(text).ids[:8]], dtype=torch.long)
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model.encoder(ids))[0].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    # What a memory stores is enough for the decoder: the vector's length is known.
    ids = torch.tensor([tokenizer.encode(texts[3]).ids[:8]])
    stored = torch.from_numpy(vectors[3:]) * 32**0.5
    assert torch.equal(model.rebuild(stored), rebuilt(model, ids))
    again = tmp_path / "again"
    encoder.model.save(str(again))
    np.testing.assert_array_equal(load_encoder(str(again), device="cpu").encode(texts, precise=True), vectors)
    documents = tmp_path / "a.txt"
    documents.write_text("the bees dance. a lamp of bread. some honey is in the day.")
    memory = Memory.build(
        [str(documents)], tmp_path / "m", encoder=str(folder / ENCODER_FOLDER), config=TreeConfig(chunk_tokens=8)
    )
    assert memory.search("honey", mode="exact").hits


def test_other_modules_are_not_trusted(whole: AutoEncodeReport, tmp_path: Path) -> None:
    for name in ("model.safetensors", "vector_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(whole.folder) / ENCODER_FOLDER / name).read_bytes())
    modules = [{"idx": 0, "name": "0", "path": "", "type": "elsewhere.Module"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "elsewhere.py").write_text("raise AssertionError('this was run')")
    with pytest.raises(UnknownModel, match="cannot be loaded"):
        load_encoder(str(tmp_path))


class Killed(KeyboardInterrupt):
    """Ctrl-C, as it comes."""


def test_an_interrupted_run_goes_on_to_the_same_curve(
    whole: AutoEncodeReport, prose: Path, words: Path, tmp_path: Path
) -> None:
    def progress(stage: str, done: float, total: float | None) -> None:
        if stage.startswith("training") and done == 5 * 8:
            raise Killed

    folder = tmp_path / "ae"
    with pytest.raises(KeyboardInterrupt):
        trained(prose, folder, words, progress=progress)
    assert (folder / CHECKPOINT).exists()
    with pytest.raises(InputError, match="--resume goes on with it"):
        trained(prose, folder, words)
    resumed = trained(prose, folder, words, resume=True)
    assert [(p["steps"], p["loss"]) for p in resumed.curve] == [(p["steps"], p["loss"]) for p in whole.curve]
    assert resumed.figures == whole.figures
    with pytest.raises(InputError, match="nothing to resume"):
        trained(prose, folder, words, resume=True)


def test_minutes_end_a_run(prose: Path, words: Path, tmp_path: Path) -> None:
    report = trained(prose, tmp_path / "ae", words, config=replace(SHORT, steps=None, minutes=0.05))
    assert 2.5 < report.seconds < 20
    assert report.steps > 3


def test_prepared_tokens(prose: Path, words: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = read_tokens([str(prose)], tokenizer)
    path = tmp_path / "a.tokens.xz"
    save_tokens(tokens, tokenizer, path)
    twice = read_tokens([str(path), str(path)], tokenizer)
    np.testing.assert_array_equal(twice.ids, np.concatenate([tokens.ids, tokens.ids]))
    np.testing.assert_array_equal(twice.starts, [*tokens.starts, *(tokens.starts + len(tokens.ids))])
    aside: list[str] = []
    rest = read_tokens([str(prose)], tokenizer, aside=aside)
    assert len(aside) == 1
    assert len(rest.starts) == len(tokens.starts) - 1
    with pytest.raises(InputError, match="no held-out texts: name some with --held-out"):
        train_autoencoder([str(path)], tmp_path / "ae", shape=SHAPE, config=SHORT, tokenizer=str(words), device="cpu")
    with pytest.raises(InputError, match="made with a tokenizer of"):
        read_tokens([str(path)], load_tokenizer())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        read_tokens([str(path)], tokenizer)


def test_what_cannot_be_used(prose: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a lamp")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for given, message in (
        ([], "no prose"),
        ([str(tmp_path / "no.txt")], "no.txt"),
        ([str(tmp_path / "no.tokens.xz")], "No such file"),
        ([str(empty)], "no text|empty"),
        ([str(short)], "tokens to train on: give more text"),
    ):
        with pytest.raises(InputError, match=message):
            train_autoencoder(
                given, tmp_path / "ae", shape=SHAPE, config=SHORT, held_out=[str(prose)], tokenizer=str(words),
                device="cpu",
            )  # fmt: skip
    with pytest.raises(InputError, match="no held-out text of 8 tokens"):
        trained(prose, tmp_path / "ae", words, held_out=[str(short)])
    with pytest.raises(InputError, match="that is a file"):
        trained(prose, short, words)
    with pytest.raises(InputError, match="device = 'tpu'"):
        train_autoencoder([str(prose)], tmp_path / "ae", device="tpu")
    with pytest.raises(UnknownModel, match=r"no usable tokenizer\.json"):
        trained(prose, tmp_path / "ae", tmp_path)
    with pytest.raises(InputError, match="multiple of head"):
        VectorConfig(vocabulary=9, encoder_width=65)
    with pytest.raises(InputError, match="width = 0"):
        VectorConfig(vocabulary=9, width=0)
    for wrong in ({"minutes": 0}, {"steps": 0}, {"whole": 2.0}):
        with pytest.raises(InputError, match="it must be"):
            AutoEncodeConfig(**wrong)
    with pytest.raises(ModelError, match="the loss is not finite"):
        trained(prose, tmp_path / "astray", words, config=replace(SHORT, rate=1e30))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(autoencode, "_write", full)
    with pytest.raises(OutOfSpace, match="no room for the weights"):
        trained(prose, tmp_path / "full", words)


def test_no_matplotlib(prose: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    report = trained(prose, tmp_path / "ae", words, config=replace(SHORT, steps=2))
    assert not report.drawn
    assert "curve.png" not in (tmp_path / "ae" / "README.md").read_text("utf-8")


# ---- the command


def test_the_command(run: Run, prose: Path, whole: AutoEncodeReport, tmp_path: Path) -> None:
    prepared = tmp_path / "p.tokens.xz"
    done = run("autoencode", str(prose), "--prepare", str(prepared))
    assert "tokens of 60 documents" in done.out
    done = run("autoencode", "--out", whole.folder, "--samples")
    assert done.out.count("original") == done.out.count("rebuilt") == 5
    assert "[" in done.out
    done = run("autoencode", "--out", whole.folder, "--samples", "--json")
    assert json.loads(done.out)["steps"] == 12
    assert "--out" in run("autoencode", str(prose)).error
    assert "no such" in run("autoencode", "nothing.txt", "--out", str(tmp_path / "o")).error.lower()
    assert ".tokens.xz" in run("autoencode", str(prose), "--prepare", str(tmp_path / "p")).error


def test_what_differs_is_marked() -> None:
    original, rebuilt = Sample("", ["a", "b", "c"], ["a", "x", "c"]).marked()
    assert original == [("a", True), ("b", False), ("c", True)]
    assert rebuilt == [("a", True), ("x", False), ("c", True)]
