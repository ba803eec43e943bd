"""What a language model reads of chunks, kept in the store: always what would be computed from their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from tests.encoders import tiny_encoder_folder
from tests.test_cli import Run, folder, run

from treemem import Document, Memory
from treemem.config import TreeConfig
from treemem.errors import InputError, ModelError
from treemem.hierarchy import build as building
from treemem.hierarchy.context import gather_vectors
from treemem.hierarchy.embed import Encoder, load_encoder
from treemem.hierarchy.memory import verify_memory
from treemem.storage.schema import READER, READER_VECTORS
from treemem.storage.store import Store

__all__ = ["folder", "run"]  # fixtures of the command line's tests

CONFIG = TreeConfig(chunk_tokens=40, fanout=4)
NEAR = 2e-3
"""Half precision, and batches of other shapes."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(str(tiny_encoder_folder(tmp_path_factory.mktemp("encoder"))))


def documents(count: int, first: int = 0) -> list[Document]:
    return [
        Document(f"d{i}", f"Mill {i} stood by the river. " * (1 + i % 7) + f"Its wheel had {i * 3} blades.")
        for i in range(first, first + count)
    ]


def built(path: Path, encoder: Encoder, **options: Any) -> Memory:
    options = {"store_reader_vectors": True, **options}
    return Memory.build(documents(30), path, encoder=encoder, hierarchy=None, config=CONFIG, **options)


def check(memory: Memory) -> None:
    """Every chunk's stored vectors are those of its text; verify agrees."""
    image = memory.image
    chunks = [c for n in range(image.documents) if image.status[n] != 2 for c in image.chunks_of(n)]
    stored = memory.stored_reader_vectors(chunks)
    assert stored is not None
    computed = memory.encoder.reader_vectors([image.chunk_text(chunk) for chunk in chunks])
    assert [len(own) for own in stored] == [len(own) for own in computed]
    for one, other in zip(stored, computed, strict=True):
        np.testing.assert_allclose(one, other, atol=NEAR)
    found = memory.verify()
    assert found.sound, found.faults


def test_one_pass_gives_what_two_give(encoder: Encoder) -> None:
    texts = [own.text for own in documents(9)] + [""]
    vectors, windows = encoder.encode_chunks(texts)
    np.testing.assert_allclose(vectors, encoder.encode(texts), atol=1e-6)
    assert windows.shape == (10, READER_VECTORS, encoder.dimension)
    for own, expected in zip(windows, encoder.reader_vectors(texts), strict=True):
        np.testing.assert_allclose(own[: len(expected)], expected, atol=NEAR)
        assert not own[len(expected) :].any()


def test_they_follow_every_edit(tmp_path: Path, encoder: Encoder) -> None:
    memory = built(tmp_path / "m", encoder)
    assert memory.info().reader_vectors
    check(memory)
    memory.tag("before")
    memory.add([*documents(5, 30), Document("d2", "Another text about mills and nothing else.")])
    check(memory)
    number = memory.image.number_of("d4")
    assert number is not None
    gone = list(memory.image.chunks_of(number))
    memory.remove(["d4", "d31"])
    assert all(len(own) == 0 for own in memory.stored_reader_vectors(gone) or [])
    check(memory)
    memory.mask(["d7"])
    memory.compact()
    check(memory)
    memory.rollback("before")
    check(memory)
    check(Memory.open(memory.store.path, encoder=encoder))


def test_gathering_encodes_no_text_where_they_are_kept(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = built(tmp_path / "m", encoder)
    found = memory.search_many(["mill by the river"])[0]
    computed = gather_vectors(memory.image, encoder, found.gathered, found.hits, (2, 4, 2))

    def refuse(texts: Sequence[str]) -> Any:
        raise AssertionError("a text was encoded")

    monkeypatch.setattr(encoder, "reader_vectors", refuse)
    stored = gather_vectors(
        memory.image, encoder, found.gathered, found.hits, (2, 4, 2), memory.stored_reader_vectors
    )  # fmt: skip
    np.testing.assert_allclose(stored.vectors, computed.vectors, atol=NEAR)
    for field in ("levels", "elements", "places", "ranks", "scores"):
        np.testing.assert_array_equal(getattr(stored, field), getattr(computed, field))


def test_without_them_there_is_no_array(tmp_path: Path, encoder: Encoder) -> None:
    memory = built(tmp_path / "m", encoder, store_reader_vectors=False)
    assert memory.stored_reader_vectors([0]) is None
    assert not memory.info().reader_vectors
    with pytest.raises(Exception, match="reader is missing"):
        memory.store.array(READER)


def test_a_tuned_encoder_makes_them_void(tmp_path: Path, encoder: Encoder) -> None:
    memory = built(tmp_path / "m", encoder)
    vectors = [own.vectors for own in memory.store.levels()]
    encodings = memory.store.read("chunks/encodings")
    memory.store.retrain(vectors, memory.store.spread(), (b"{}", b""), "another head", None)
    assert memory.store.keeps_reader_vectors
    memory.store.retrain(vectors, memory.store.spread(), (b"{}", b""), "tuned", encodings)
    assert not memory.store.keeps_reader_vectors


def test_a_search_reads_its_own_snapshot(tmp_path: Path, encoder: Encoder) -> None:
    """Compacting gives chunks other numbers; who has begun before goes on with the old ones."""
    memory = built(tmp_path / "m", encoder)
    before = memory._as_it_is(encoder=True)
    chunks = list(memory.image.chunks_of(memory.image.number_of("d20") or 0))
    expected = memory.stored_reader_vectors(chunks)
    memory.remove(["d3"])
    memory.compact()
    assert memory.image.chunks < before.image.chunks
    found = before.stored_reader_vectors(chunks)
    assert found is not None
    assert expected is not None
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_states_of_another_dimension_are_refused(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = encoder._forward

    def wider(features: Any, precise: bool) -> dict[str, Any]:
        given = forward(features, precise)
        wide = tuple(states.repeat(1, 1, 2) for states in given["all_layer_embeddings"])
        return {**given, "all_layer_embeddings": wide}

    monkeypatch.setattr(encoder, "_forward", wider)
    for encode in (encoder.encode_chunks, encoder.reader_vectors):
        with pytest.raises(ModelError, match="its token states have 64 dimensions"):
            encode(["A mill."])


def test_a_model_that_tells_its_last_layer_alone_is_read_by_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(str(tiny_encoder_folder(tmp_path, layers=3)))
    forward = encoder._forward
    texts = ["a word of honey"]
    first = encoder.reader_vectors(texts)[0]

    def last(features: Any, precise: bool) -> dict[str, Any]:
        return {name: own for name, own in forward(features, precise).items() if name != "all_layer_embeddings"}

    monkeypatch.setattr(encoder, "_forward", last)
    (vectors,) = encoder.reader_vectors(texts)
    np.testing.assert_allclose(vectors[0], encoder.token_states(texts)[0].states.mean(0), atol=1e-5)
    assert not np.allclose(vectors, first, atol=1e-4)


def test_damage_is_found(tmp_path: Path, encoder: Encoder) -> None:
    memory = built(tmp_path / "m", encoder)
    session = memory.store.repository.writable_session("main")
    array = zarr.open_group(session.store)[READER]
    assert isinstance(array, zarr.Array)
    array[0, 0, 0] = 1.0
    session.commit("by somebody else")
    assert any(READER in fault for fault in verify_memory(memory.store.path).faults)


def test_an_interrupted_build_goes_on_with_them(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "COMMIT_CHUNKS", 16)
    append = Store.append
    calls = 0

    def killed(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        append(*arguments)

    monkeypatch.setattr(Store, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "m", encoder)
    monkeypatch.setattr(Store, "append", append)
    with pytest.raises(InputError, match="its interrupted build is with reader vectors"):
        built(tmp_path / "m", encoder, store_reader_vectors=False)
    check(built(tmp_path / "m", encoder))


def test_from_the_command_line(run: Run, tmp_path: Path, folder: Path) -> None:
    assert run("build", tmp_path / "m", folder, "--store-reader-vectors").code == 0
    assert "kept in the store" in run("info", tmp_path / "m").out
