"""Where a model looked: rows, gradients, sources, and the same reply with and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.encoders import tiny_encoder_folder
from tests.hierarchy.test_reader import PASSAGES, given, made_reader
from tests.models import KINDS, tiny_model

from treemem import Document, Memory
from treemem.config import TreeConfig
from treemem.draw import draw_attribution
from treemem.errors import InputError, ModelError
from treemem.hierarchy.attribute import attention, attribute, gradient_times_input
from treemem.hierarchy.embed import EncoderInfo, load_encoder
from treemem.hierarchy.generate import LocalModel
from treemem.hierarchy.reader import ReadingModel, reader_prompt, save_reader
from treemem.types import Attribution, Source

INFO = EncoderInfo("tiny", 32, "weights")
IDS = [40, 7, 99, 12]


def reading_of(kind: str = "llama", **options: Any) -> ReadingModel:
    model = tiny_model(kind, **options)
    return ReadingModel(model, made_reader(model, INFO))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_of_one_pass_over_everything(kind: str) -> None:
    """Which is made without a cache, with all rows, by the model's own plain attention."""
    reading = reading_of(kind)
    model: LocalModel = reading.model
    vectors = given(6)
    prompt = reader_prompt(model, "How long is the Vell?", PASSAGES, len(vectors))
    embeds = reading.embedded("both", prompt, vectors).detach()
    own = model.model
    before = own.config._attn_implementation
    found = attention(model, embeds, IDS)
    assert own.config._attn_implementation == before
    own.set_attn_implementation("eager")
    with torch.no_grad():
        everything = torch.cat([embeds, own.get_input_embeddings()(torch.tensor([IDS[:-1]]))], 1)
        layers = own(inputs_embeds=everything, output_attentions=True, use_cache=False).attentions
    own.set_attn_implementation(before)
    expected = torch.stack([layer[0].mean(0) for layer in layers]).mean(0)[len(prompt.ids) - 1 :]
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-4)
    for row in range(len(IDS)):
        assert (found[row, len(prompt.ids) + row :] == 0).all(), "a token looks at what comes after it"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_gradients_are_those_of_small_steps(kind: str) -> None:
    model = tiny_model.__wrapped__(kind)
    model.model.double()
    embeds = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gradient_times_input(model, embeds, IDS[:2])
    told = model.model.get_input_embeddings()(torch.tensor([IDS[:1]]))
    step = 1e-2  # norms are computed in float32, whatever the weights are
    for place in range(6):
        logs = []
        for sign in (1, -1):
            whole = torch.cat([embeds, told], 1).detach().clone()
            whole[0, place] *= 1 + sign * step
            with torch.no_grad():
                own = model.model(inputs_embeds=whole).logits[0].log_softmax(-1)
            logs.append([float(own[4 + t, IDS[t]]) for t in range(2)])
        slopes = np.abs(np.subtract(*logs)) / (2 * step)
        np.testing.assert_allclose(found[:, place], slopes, rtol=2e-2, atol=1e-3)


def test_sources_are_what_the_prompt_is_made_of() -> None:
    reading = reading_of()
    vectors = given(6)
    prompt = reader_prompt(reading.model, "How long is the Vell?", PASSAGES, len(vectors))
    found = attribute(reading, "both", prompt, vectors, [*IDS, 2], gradients=True)
    assert len(found.tokens) == len(IDS), "the end mark is no token of the reply"
    assert [s.kind for s in found.sources] == ["template", *["vectors"] * 6, *["passage"] * 2, "question", "reply"]
    assert [(s.level, s.element, s.place) for s in found.sources[1:7]] == [(i % 3, i, i) for i in range(6)]
    assert [s.number for s in found.sources if s.kind == "passage"] == [1, 2]
    embeds = reading.embedded("both", prompt, vectors).detach()
    places = attention(reading.model, embeds, IDS)
    first = next(s for s in prompt.segments if s.kind == "passage")
    column = found.sources.index(Source("passage", number=1))
    expected = places[:, first.begin : first.end].sum(1)
    np.testing.assert_allclose([row[column] for row in found.attention], expected, rtol=1e-4)
    for shares in (found.attention, found.gradients or ()):
        np.testing.assert_allclose(np.sum(shares, 1), 1.0, rtol=1e-5)
        assert np.array(shares).shape == (4, 11)
    assert found.attention[0][-1] == 0.0, "before the first token there is no reply"
    grouped = found.grouped()
    assert list(grouped) == ["L0", "L1", "L2", "[1]", "[2]", "question", "rest"]
    np.testing.assert_allclose(np.sum(list(grouped.values()), 0), 1.0, rtol=1e-5)
    each = found.grouped(each=True)
    assert list(each)[:3] == ["L0 0.0", "L1 1", "L2 2"]
    assert len(each) == 6 + 2 + 2
    np.testing.assert_allclose(each["L2 2"], [row[3] for row in found.attention])
    np.testing.assert_allclose(np.add(each["L2 2"], each["L2 5"]), grouped["L2"], rtol=1e-6)


def test_a_model_that_tells_nothing_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = reading_of()
    prompt = reader_prompt(reading.model, "x", PASSAGES)
    own = reading.model.model
    forward = own.forward

    def silent(*arguments: Any, **options: Any) -> Any:
        given = forward(*arguments, **options)
        given.attentions = None
        return given

    monkeypatch.setattr(own, "forward", silent)
    with pytest.raises(ModelError, match="does not tell its attention"):
        attribute(reading, "text", prompt, None, IDS)

    def failing(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(own, "forward", failing)
    with pytest.raises(ModelError, match=r"where it looked cannot be told \(out of memory\)"):
        attribute(reading, "text", prompt, None, IDS)


def test_nothing_was_written() -> None:
    reading = reading_of()
    prompt = reader_prompt(reading.model, "x", PASSAGES)
    found = attribute(reading, "text", prompt, None, [2])
    assert (found.reply, found.tokens, found.attention, found.gradients) == ("", (), (), None)


# ---- asking


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Memory, LocalModel, str]:
    """A memory with a masked document, a model, and a reader that the model was not taught with."""
    place = tmp_path_factory.mktemp("asked")
    encoder = load_encoder(str(tiny_encoder_folder(place / "encoder")))
    documents = [Document(f"d{i}", f"River number {i} is {i * 7} km long. Its mill stood still.") for i in range(40)]
    memory = Memory.build(
        documents, place / "m", encoder=encoder, hierarchy=None, config=TreeConfig(chunk_tokens=32, fanout=4)
    )
    memory.mask(["d3"])
    model = tiny_model(texts=tuple(own.text for own in documents), vocabulary=400)
    save_reader(made_reader(model, encoder.info), place / "reader")
    return memory, model, str(place / "reader")


@pytest.mark.parametrize("how", ["text", "vectors", "both"])
def test_asking_with_attribution_gives_the_same_reply(asked: tuple[Memory, LocalModel, str], how: str) -> None:
    memory, model, folder = asked
    pieces: dict[bool, list[str]] = {True: [], False: []}
    answers = {}
    for attributed, own in pieces.items():
        answers[attributed] = memory.ask(
            "How long is river number 3?", llm=model, reader=f"{how}@{folder}", max_tokens=8, threshold=0.0,
            on_text=own.append, attribute="attention" if attributed else None,
        )  # fmt: skip
    assert pieces[True] == pieces[False]
    assert answers[False].attribution is None
    assert "attribution" not in answers[False].to_json()
    found = answers[True].attribution
    assert isinstance(found, Attribution)
    assert found.reply == "".join(pieces[True]).strip()
    kinds = {source.kind for source in found.sources}
    assert ("passage" in kinds) == (how != "vectors")
    assert ("vectors" in kinds) == (how != "text")
    hidden = set(memory.image.chunks_of(memory.image.number_of("d3") or 0))
    assert hidden.isdisjoint({s.element for s in found.sources if s.kind == "vectors" and (s.level or 0) < 2})
    assert set(answers[True].to_json()["attribution"]) == {"reply", "tokens", "sources", "attention", "gradients"}


@pytest.mark.usefixtures("unchecked_types")
def test_attribution_without_a_reader_is_refused(asked: tuple[Memory, LocalModel, str]) -> None:
    memory, model, folder = asked
    with pytest.raises(InputError, match="and a reader for it, which makes the prompt"):
        memory.ask("x", llm=model, reader="none", attribute="attention")
    with pytest.raises(InputError, match="it must be attention or gradients"):
        memory.ask("x", llm=model, reader=folder, attribute="heads")  # type: ignore[arg-type]


def test_a_fine_tuned_encoder_is_read_by_no_reader_of_vectors(
    asked: tuple[Memory, LocalModel, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, model, folder = asked

    class Tuned:
        adapter = "any"

    monkeypatch.setattr(type(memory), "hierarchy", property(lambda self: Tuned()))
    for how in ("vectors", "both"):
        with pytest.raises(InputError, match="was fine-tuned"):
            memory.ask("x", llm=model, reader=f"{how}@{folder}")


def test_attribution_is_drawn(asked: tuple[Memory, LocalModel, str], tmp_path: Path) -> None:
    memory, model, folder = asked
    options: dict[str, Any] = {"llm": model, "max_tokens": 6, "threshold": 0.0, "reader": f"both@{folder}"}
    answer = memory.ask("How long is river number 3?", **options, attribute="gradients")
    assert answer.attribution is not None
    axes = draw_attribution(answer, gradients=True)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [name for name in answer.attribution.grouped() if name != "rest"]
    assert len(axes.get_xticks()) == len(answer.attribution.tokens)
    lines = draw_attribution(answer, gradients=True, each=True).get_yticklabels()
    vectors = [source for source in answer.attribution.sources if source.kind == "vectors"]
    assert sum(line.get_text().startswith("L") for line in lines) == len(vectors) > 0
    image = axes.get_images()[0].get_array()
    np.testing.assert_allclose(image[-1], answer.attribution.grouped(gradients=True)["question"])
    with pytest.raises(InputError, match="nothing of that kind to draw"):
        draw_attribution(memory.ask("x", **options))
