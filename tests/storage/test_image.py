"""The serving image: all of the store, in files; any damage to them is mended from the store."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tests.fakes import FakeEncoder, documents

from treemem.config import TreeConfig
from treemem.errors import DamagedMemory, OutOfSpace
from treemem.hierarchy.build import build, write_image
from treemem.hierarchy.memory import Memory
from treemem.kernels import back_end, upper_halves
from treemem.storage import image as imaging
from treemem.storage import lexical
from treemem.storage.image import Image, available_memory, build_image, description_sum, image_folder, read_tree
from treemem.storage.levels import contextual
from treemem.storage.store import Store
from treemem.types import Document

CONFIG = TreeConfig(chunk_tokens=40, fanout=8)
AWKWARD = [
    Document("empty", ""),
    Document("spaces", "  \n\t "),
    Document("NUL", "before\0after. And more words here."),
    Document("ünï/cödé 😀", "Straße, naïve café, 日本語のテキスト。 Emoji 😀😀 and combining e\u0301.", "Tïtle"),
    Document("meta", "Some words.", "", {"a": [1, 2.5, None, {"b": "é"}]}),
]


@pytest.fixture(scope="module")
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, encoder: FakeEncoder) -> Path:
    path = tmp_path_factory.mktemp("image") / "m"
    build(path, [*documents(60, 12), *AWKWARD], encoder, CONFIG)
    return path


@pytest.fixture
def memory_path(tmp_path: Path, whole: Path) -> Path:
    shutil.copytree(whole, tmp_path / "m")
    return tmp_path / "m"


def folder_of(path: Path) -> Path:
    store = Store.open(path)
    return image_folder(store, store.info().snapshot)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of an image, without those that tantivy names anew each time."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and f.name != "image.json" and f.parent.name != "bm25"
    }


def answers(path: Path, encoder: FakeEncoder) -> list[object]:
    memory = Memory.open(path, encoder=encoder)
    results = memory.search_many(["violin number 11", "café 日本語", "harbour item100 measures glacier"])
    return [[(hit.chunk, hit.score, hit.text, hit.path, hit.document) for hit in result.hits] for result in results]


def test_the_image_holds_the_documents(whole: Path) -> None:
    image = Image(folder_of(whole))
    given = [*documents(60, 12), *AWKWARD]
    assert image.documents == len(given)
    for number, document in enumerate(given):
        assert image.document(number) == document
        assert image.number_of(document.id) == number
        assert image.reference(number).title == document.title
        for chunk in image.chunks_of(number):
            start, end = image.span(chunk)
            assert image.chunk_text(chunk) == document.text[start:end]
            assert int(image.document_of(np.array(chunk))) == number
    assert image.chunks == sum(len(image.chunks_of(number)) for number in range(len(given)))
    assert list(image.chunks_of(image.number_of("empty") or 0)) == []
    for absent in ("", "doc-", "doc-600", "\ud800"):
        assert image.number_of(absent) is None


def test_runs_of_chunks(whole: Path) -> None:
    image = Image(folder_of(whole))
    chunks = image.chunks_of(3)
    first, last = chunks[0], chunks[-1]
    assert image.run_text(first, last) == image.text(3)[image.span(first)[0] : image.span(last)[1]]


def test_rows_are_the_vectors_of_the_store(whole: Path) -> None:
    store, image = Store.open(whole), Image(folder_of(whole))
    ends, encodings = store.read("documents/chunk_ends"), store.read("chunks/encodings")
    below = [contextual(encodings, ends, CONFIG.alpha), *(level.vectors for level in store.levels())]
    assert image.tree.sizes == tuple(len(level) for level in below[::-1]) == store.info().levels[::-1]
    for blocks, vectors in zip(image.tree.levels, below[::-1], strict=True):
        rows = blocks.rows * blocks.scales[:, None]
        np.testing.assert_allclose(rows, vectors.astype(np.float32), atol=0.005)
        np.testing.assert_array_equal(blocks.upper, upper_halves(blocks.rows[blocks.ids]))


def test_a_tree_larger_than_memory_is_walked_alike(whole: Path) -> None:
    folder, sizes = folder_of(whole), Image(folder_of(whole)).tree.sizes
    plain, paged = read_tree(folder, sizes), read_tree(folder, sizes, available=0)
    assert (plain.paged, paged.paged) == (False, True)
    queries = np.random.default_rng(0).standard_normal((plain.depth, 20, 1, plain.dimension)).astype(np.float32)
    kernels = back_end("cpu")
    for beam in (1, 3):
        one, two = (kernels.search(tree, queries, beam, 5) for tree in (plain, paged))
        np.testing.assert_array_equal(one.chunks, two.chunks)
        np.testing.assert_array_equal(one.scores, two.scores)


def test_available_memory() -> None:
    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_hashes_that_collide_are_told_apart(
    tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imaging, "id_hash", lambda document_id: len(document_id))
    build(tmp_path / "m", [Document(name, f"text {name}") for name in ("aa", "bb", "c", "dd")], encoder, CONFIG)
    image = Image(folder_of(tmp_path / "m"))
    assert [image.number_of(name) for name in ("aa", "bb", "c", "dd", "ee", "f", "ggg")] == [
        0,
        1,
        2,
        3,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "longer"])
def test_every_damaged_file_is_mended(memory_path: Path, encoder: FakeEncoder, how: str) -> None:
    """One image in which each file in turn is damaged: it must be refused; then the last is mended by opening."""
    folder = folder_of(memory_path)
    expected, kept = answers(memory_path, encoder), files_of(folder)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    description = (folder / "image.json").read_text()
    assert len(files) > 25
    for file in files:
        data = file.read_bytes()
        if not data and how in ("cut", "empty"):
            continue  # tantivy's locks
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "longer": data + b"\0"}[how])
        if how == "longer" and file.stem in json.loads(description)["rows"]:
            Image(folder)  # what an edit that was killed has left
        elif file.name == "image.json" and how == "longer":
            with pytest.raises(DamagedMemory):
                Image(folder)
        else:
            with pytest.raises(DamagedMemory, match="the serving image is damaged"):
                Image(folder)
        file.write_bytes(data)
    Image(folder)
    spoilt = next(f for f in files if f.name == "level-1-rows.npy")
    spoilt.unlink()
    assert answers(memory_path, encoder) == expected
    assert files_of(folder_of(memory_path)) == kept
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(("name", "what"), [("records", "record"), ("text", "document"), ("text", "chunk_text")])
def test_damage_inside_is_told_when_it_is_read(memory_path: Path, name: str, what: str) -> None:
    """Values are not looked at when an image is opened; what is no text or no JSON is no answer either."""
    folder = next(path for path in (memory_path / "cache").iterdir() if path.is_dir())
    path = folder / f"{name}.npy"
    data = bytearray(path.read_bytes())
    data[130:134] = b"\xff\x01\xfe\x00"
    path.write_bytes(data)
    with pytest.raises(DamagedMemory, match="the serving image is damaged"):
        getattr(Image(folder), what)(0)


def test_a_panic_over_the_words_is_damage(
    memory_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a damaged file of the inverted index can end: in what is no ordinary exception."""

    class PanicException(BaseException):
        pass

    def panics(*_: object, **__: object) -> None:
        raise PanicException("assertion failed")

    with monkeypatch.context() as patch:
        patch.setattr(lexical.tantivy, "Index", panics)
        with pytest.raises(DamagedMemory, match="the index of words is damaged"):
            Image(folder_of(memory_path))
    image = Image(folder_of(memory_path))
    broken = type("Broken", (), {"search": panics})()
    monkeypatch.setattr(image.lexical, "_searcher", broken)
    with pytest.raises(DamagedMemory, match="the index of words is damaged"):
        image.lexical.best(image.lexical.query("violin number"), 3)
    monkeypatch.setattr(lexical.tantivy, "Index", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Image(folder_of(memory_path))


@pytest.mark.parametrize("number", [-1, 1 << 20, 1 << 63])
def test_words_that_lead_to_no_chunk_are_damage(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    image = Image(folder_of(memory_path))
    given = image.lexical._searcher

    class Damaged:
        search = staticmethod(given.search)

        def fast_field_values(self, name: str, addresses: list[object]) -> list[int]:
            return [number, *given.fast_field_values(name, addresses)[1:]]

    monkeypatch.setattr(image.lexical, "_searcher", Damaged())
    with pytest.raises(DamagedMemory, match="the index of words is damaged"):
        image.lexical.best(image.lexical.query("violin number"), 3)


def test_missing_parts_are_made_again(memory_path: Path, encoder: FakeEncoder) -> None:
    folder = folder_of(memory_path)
    expected = answers(memory_path, encoder)
    for gone in (folder.parent, folder, folder / "bm25"):
        shutil.rmtree(gone)
        assert answers(memory_path, encoder) == expected
    (folder / "image.json").write_text("garbage")
    assert answers(memory_path, encoder) == expected


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "7", "{}", "\0\0", "{", '{"image": 1}', "[" * 100_000, '"text"'],
    ids=["empty", "null", "list", "number", "object", "zeros", "half", "part", "deep", "string"],
)
def test_garbage_in_the_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "image.json").write_text(text)
    with pytest.raises(DamagedMemory, match="the serving image is damaged"):
        Image(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", 99),
        ("image", "1"),
        ("sizes", []),
        ("sizes", [1]),
        ("sizes", ["a"]),
        ("sizes", [3, -1]),
        ("files", []),
        ("files", {"text.npy": "long"}),
        ("files", {"nowhere.npy": [3, 0]}),
        ("files", {"text.npy": 3}),
        ("files", {"text.npy": [3]}),
        ("snapshot", 5),
        ("language", None),
    ],
)
def test_wrong_fields_in_the_description(memory_path: Path, field: str, value: object) -> None:
    folder = folder_of(memory_path)
    description = {**json.loads((folder / "image.json").read_text()), field: value}
    description["sum"] = description_sum(description)
    (folder / "image.json").write_text(json.dumps(description))
    with pytest.raises(DamagedMemory, match="the serving image is damaged"):
        Image(folder)


@pytest.mark.parametrize("name", ["level-1-ids.npy", "level-2-offsets.npy", "text_ends.npy"])
def test_a_wrong_header_is_noticed(memory_path: Path, name: str, unchecked_types: None) -> None:
    folder = folder_of(memory_path)
    data = (folder / name).read_bytes()
    for spoilt in (b"\0" * 8 + data[8:], data[:12] + b"(" + data[13:], data.replace(b"<i", b"<f", 1)):
        (folder / name).write_bytes(spoilt)
        if name == "text_ends.npy" and spoilt[:8] == data[:8] and b"<f8" in spoilt:
            continue  # the same number of bytes per value, and nothing that kernels depend on
        with pytest.raises(DamagedMemory):
            Image(folder)
    (folder / name).write_bytes(data)
    Image(folder)


def test_opening_changes_nothing(memory_path: Path, encoder: FakeEncoder) -> None:
    before = {f: f.stat().st_mtime_ns for f in memory_path.rglob("*") if f.is_file()}
    for _ in range(3):
        answers(memory_path, encoder)
    assert {f: f.stat().st_mtime_ns for f in memory_path.rglob("*") if f.is_file()} == before


def test_an_image_is_there_whole_or_not_at_all(
    memory_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(memory_path / "cache")
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(imaging, "build_lexical", fail)
        with pytest.raises(OutOfSpace, match="the disk is full"):
            Memory.open(memory_path)
    assert list((memory_path / "cache").iterdir()) == []
    assert sorted(p.name for p in memory_path.iterdir()) == ["build.lock", "cache", "store"]
    assert len(answers(memory_path, encoder)) == 3


def test_leftovers_of_killed_processes_go_when_a_memory_is_opened(memory_path: Path, encoder: FakeEncoder) -> None:
    stale = [memory_path / "growing-a", memory_path / "imaging-b", memory_path / "cache" / "making-c"]
    fresh = memory_path / "imaging-fresh"
    for folder in [*stale, fresh]:
        folder.mkdir()
        (folder / "level-1").write_bytes(b"x" * 100)
    for folder in stale:
        os.utime(folder, (time.time() - 3600, time.time() - 3600))
    answers(memory_path, encoder)
    assert not any(folder.exists() for folder in stale[:2])
    assert fresh.exists()
    shutil.rmtree(folder_of(memory_path))  # the cache is swept when an image is made
    answers(memory_path, encoder)
    assert not stale[2].exists()


def test_damage_in_the_store_is_not_copied_into_an_image(memory_path: Path, encoder: FakeEncoder) -> None:
    store = Store.open(memory_path)
    vectors = np.zeros((store.info().chunks, 32), np.float16)
    with store.transaction("tampered") as writer:
        writer.root["documents/text"][0] = 0
    with pytest.raises(DamagedMemory, match="documents/text is not what was written"):
        build_image(store, vectors)
    with pytest.raises(DamagedMemory):
        Memory.open(memory_path)


def test_two_that_make_the_image_at_once(memory_path: Path, encoder: FakeEncoder) -> None:
    expected = answers(memory_path, encoder)
    shutil.rmtree(memory_path / "cache")
    failures: list[BaseException] = []

    def make() -> None:
        try:
            store = Store.open(memory_path)
            Image(write_image(store, store.info().config))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert answers(memory_path, encoder) == expected
    assert len(list((memory_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("given", [[], [Document("only spaces", " \n ")], [Document("one", "A single chunk.")]])
def test_tiny_memories(tmp_path: Path, encoder: FakeEncoder, given: list[Document]) -> None:
    build(tmp_path / "m", given, encoder, CONFIG)
    memory = Memory.open(tmp_path / "m", encoder=encoder)
    hits = memory.search("A single chunk.").hits
    assert [hit.document.id for hit in hits] == [d.id for d in given if d.text.strip()]
    assert memory.info().documents == len(given)
    shutil.rmtree(tmp_path / "m" / "cache")
    assert len(Memory.open(tmp_path / "m", encoder=encoder).search("chunk").hits) == len(hits)
