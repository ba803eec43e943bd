"""The face of the library: building from paths and from documents, opening, asking for what is there."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from tests.small import AWKWARD, CONFIG, documents

import treemem
from treemem.config import FORMAT_VERSION, SearchConfig, TreeConfig
from treemem.errors import InputError, NotAMemory, StoreError, UnknownModel, UnreadableInput
from treemem.hierarchy import memory as module
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.readers import ReadReport
from treemem.types import Document

Told = list[tuple[str, float, float | None]]


def listener(told: Told) -> Any:
    return lambda stage, done, total: told.append((stage, done, total))


# ---- building


def test_the_face() -> None:
    assert treemem.Memory is Memory
    assert "Memory" in dir(treemem)
    with pytest.raises(AttributeError, match="Nothing"):
        treemem.Nothing  # noqa: B018


def test_build_from_a_path_a_list_and_a_glob(tmp_path: Path, minilm: Encoder) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("Bees dance.")
    (tmp_path / "docs" / "b.md").write_text("# Bread\n\nSteam makes it crackle.")
    for number, sources in enumerate([tmp_path / "docs", [str(tmp_path / "docs")], str(tmp_path / "docs" / "*")]):
        built = Memory.build(sources, tmp_path / f"m{number}", encoder=minilm)
        assert built.info().documents == 2
        assert built.document("a.txt").text == "Bees dance."
        assert built.search("bees", 1).hits[0].document.id == "a.txt"


def test_build_from_an_iterator_of_documents(tmp_path: Path, minilm: Encoder) -> None:
    def stream() -> Iterator[Document]:
        yield Document("a", "Bees dance.", "Bees", {"year": 1999, "tags": ["x", None]})
        yield Document("b", "")  # holds no chunk, but is a document

    built = Memory.build(stream(), tmp_path / "m", encoder=minilm)
    assert (built.info().documents, built.info().chunks) == (2, 1)
    assert built.document("a") == Document("a", "Bees dance.", "Bees", {"year": 1999, "tags": ["x", None]})
    assert built.document("b") == Document("b", "")


def test_documents_come_back_as_they_were(small_memory: Memory) -> None:
    for document in documents():
        assert small_memory.document(document.id) == document
    with pytest.raises(InputError, match="'nope' is not in"):
        small_memory.document("nope")


def test_no_documents_make_an_empty_memory(tmp_path: Path, minilm: Encoder) -> None:
    built = Memory.build(iter(()), tmp_path / "m", encoder=minilm)
    assert (built.info().documents, built.info().chunks, built.info().levels) == (0, 0, (0,))
    again = Memory.open(tmp_path / "m", encoder=minilm)
    assert again.search("anything").hits == ()
    answer = again.ask("Anything?", llm=None)
    assert (answer.found, answer.citations) == (False, ())


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (lambda: [Document("a", "x"), "folder"], "document 2: it is of type str, not treemem.Document"),
        (lambda: ["folder", Document("a", "x")], "document 1: it is of type str, not treemem.Document"),
        (lambda: [{"id": "a", "text": "x"}], "document 1: it is of type dict, not treemem.Document"),
        (lambda: [Document("a", None)], "document 1 ('a'): its id, title and text must be strings"),  # type: ignore
        (lambda: [Document("a", "x"), Document("a", "y")], "document 'a': given twice; ids must differ"),
        (lambda: [Document("a", "x \ud800")], "document 'a': its text has half a character (a lone surrogate)"),
    ],
)
def test_what_is_no_document(tmp_path: Path, minilm: Encoder, sources: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Memory.build(sources(), tmp_path / "m", encoder=minilm)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_metadata_that_json_does_not_hold(tmp_path: Path, minilm: Encoder) -> None:
    with pytest.raises(InputError, match="document 'a': its metadata cannot be stored as JSON"):
        Memory.build([Document("a", "x", metadata={"when": object()})], tmp_path / "m", encoder=minilm)


@pytest.mark.parametrize("name", ["missing", "void", "odd.bin"])
def test_nothing_to_read_leaves_no_trace(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is told at once, before an encoder is loaded."""
    monkeypatch.setattr(module, "load_encoder", lambda name: pytest.fail("loaded an encoder"))
    (tmp_path / "void").mkdir()
    (tmp_path / "odd.bin").write_bytes(b"\0\1")
    with pytest.raises(InputError) as caught:
        Memory.build(tmp_path / name, tmp_path / "m")
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_an_unknown_encoder_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel):
        Memory.build([Document("a", "x")], tmp_path / "m", encoder="no-such-model")
    assert not (tmp_path / "m").exists()


def test_strict(tmp_path: Path, minilm: Encoder) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("Bees dance.")
    (tmp_path / "docs" / "b.txt").write_bytes(b"")
    report = ReadReport()
    with pytest.raises(UnreadableInput, match=r"1 inputs could not be read, first .*b\.txt: no text"):
        Memory.build(tmp_path / "docs", tmp_path / "m", encoder=minilm, report=report, strict=True)
    assert report.failures == 1
    # As the message says: what could be read is kept, and the same without `strict` goes on from there.
    assert Memory.build(tmp_path / "docs", tmp_path / "m", encoder=minilm).info().documents == 1


def test_a_memory_that_is_there_is_not_built_over(
    small_memory_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is told at once, before an encoder is loaded."""
    monkeypatch.setattr(module, "load_encoder", lambda name: pytest.fail("loaded an encoder"))
    with pytest.raises(StoreError, match="a memory is there already"):
        Memory.build([Document("a", "x")], small_memory_path)
    (tmp_path / "file").write_text("something")
    for other in (tmp_path, tmp_path / "file"):
        with pytest.raises(StoreError, match="something else at this path"):
            Memory.build([Document("a", "x")], other)


def test_a_memory_without_its_image_is_not_built_over(small_memory_path: Path, minilm: Encoder, tmp_path: Path) -> None:
    shutil.copytree(small_memory_path, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "cache")
    with pytest.raises(StoreError, match="a memory is there already"):
        Memory.build([Document("a", "x")], tmp_path / "m", encoder=minilm, config=CONFIG)
    assert Memory.build(documents(), tmp_path / "m", encoder=minilm, config=CONFIG).search("bees").hits


# ---- opening


def test_opening_loads_no_encoder(small_memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_encoder", lambda name: pytest.fail("loaded an encoder"))
    opened = Memory.open(small_memory_path)
    assert opened.info().documents == len(documents())
    assert opened.search("bees", mode="bm25").hits
    assert opened.document("chess/1").title.startswith("Chess")


def test_threads_that_come_first_load_one_encoder(
    small_memory_path: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str) -> Encoder:
        loaded.append(name)
        return minilm

    monkeypatch.setattr(module, "load_encoder", load)
    opened = Memory.open(small_memory_path)
    with ThreadPoolExecutor(4) as pool:
        assert all(result.hits for result in pool.map(opened.search, ["bees"] * 8))
    assert loaded == ["minilm"]


def test_threads_that_come_first_load_one_language_model(
    small_memory_path: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str, **_: Any) -> None:
        loaded.append(name)
        time.sleep(0.05)

    monkeypatch.setattr(module, "load_language_model", load)
    opened = Memory.open(small_memory_path, encoder=minilm)
    with ThreadPoolExecutor(4) as pool:
        assert all(
            answer.extractive for answer in pool.map(lambda q: opened.ask(q, llm="some"), ["Do bees dance?"] * 4)
        )
        assert len({id(searcher) for searcher in pool.map(lambda _: opened.searcher, range(4))}) == 1
    assert loaded == ["some"]


@pytest.mark.parametrize("name", ["missing", "void"])
def test_what_is_no_memory(tmp_path: Path, name: str) -> None:
    (tmp_path / "void").mkdir()
    with pytest.raises(NotAMemory) as caught:
        Memory.open(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "treemem build" in str(caught.value)


def test_info(small_memory: Memory, small_memory_path: Path) -> None:
    info = small_memory.info()
    assert info.path == str(small_memory_path)
    assert info.documents == len(documents())
    assert info.chunks == info.levels[-1] == small_memory.image.chunks
    assert (info.encoder, info.dimension, info.config, info.format) == ("minilm", 384, CONFIG, FORMAT_VERSION)
    assert info.store_bytes > 0
    assert info.image_bytes > info.chunks * 384


def test_a_missing_or_damaged_image_is_made_again(small_memory_path: Path, tmp_path: Path, minilm: Encoder) -> None:
    shutil.copytree(small_memory_path, tmp_path / "m")
    expected = Memory.open(tmp_path / "m", encoder=minilm).search("Why does smoke calm bees?")
    image = Memory.open(tmp_path / "m").image.folder
    (image / "spans.npy").write_bytes(b"short")
    assert Memory.open(tmp_path / "m", encoder=minilm).search(expected.query).hits == expected.hits
    shutil.rmtree(tmp_path / "m" / "cache")
    assert Memory.open(tmp_path / "m", encoder=minilm).search(expected.query).hits == expected.hits


# ---- progress


def write_lines(path: Path, count: int) -> None:
    lines = "".join(json.dumps({"id": f"{i}", "text": f"Bees dance in hive {i}. " * 3}) + "\n" for i in range(count))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines.encode()))
    else:
        path.write_text(lines)


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz", "all.jsonl.zst", "folder"])
def test_the_total_is_expected_from_what_was_read(
    tmp_path: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    count = 400
    if name == "folder":
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i:03}.txt").write_text(f"Bees dance in hive {i:03}. " * 3)
    else:
        write_lines(tmp_path / name, count)
    monkeypatch.setattr("treemem.hierarchy.build.COMMIT_CHUNKS", 100)
    monkeypatch.setattr("treemem.hierarchy.build.ENCODE_CHUNKS", 50)
    monkeypatch.setattr(minilm, "encode", lambda texts, **_: _ones(len(texts)))
    told: Told = []
    report = ReadReport()
    Memory.build(tmp_path / name, tmp_path / "m", encoder=minilm, report=report, progress=listener(told))
    encoding = [(done, total) for stage, done, total in told if stage == "encoding"]
    assert [done for done, _ in encoding] == [0, *range(50, count + 1, 50)]
    assert encoding[0][1] is None
    assert encoding[-1] == (count, count)
    if name in ("folder", "all.jsonl"):  # of compressed files, the place is known to a buffer only
        assert all(total is not None and abs(total - count) < 0.1 * count for _, total in encoding[1:])
    assert report.bytes_done == report.bytes_total > 0
    assert report.fraction == 1


def _ones(count: int) -> Any:
    import numpy as np

    return np.full((count, 384), 384**-0.5, np.float32)


def test_documents_of_a_program_have_a_total_where_they_have_a_length(
    tmp_path: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treemem.hierarchy.build.COMMIT_CHUNKS", 2)
    given = [Document(f"d{n}", "Bees dance.") for n in range(4)]
    for name, sources, totals in (("m", given, [4, 4]), ("n", iter(given), [None, None])):
        told: Told = []
        Memory.build(sources, tmp_path / name, encoder=minilm, progress=listener(told))
        encoding = [(done, total) for stage, done, total in told if stage == "encoding"]
        assert encoding == [(0, None), *zip([2, 4], totals, strict=True)]


def test_one_document_is_enough(tmp_path: Path, minilm: Encoder) -> None:
    assert Memory.build(Document("a", "Bees dance."), tmp_path / "m", encoder=minilm).info().documents == 1


@pytest.mark.usefixtures("unchecked_types")
def test_sources_that_are_none(tmp_path: Path, minilm: Encoder) -> None:
    with pytest.raises(InputError, match=r"sources of type int: they must be paths or treemem\.Document"):
        Memory.build(7, tmp_path / "m", encoder=minilm)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "setting",
    [{"k": 2.5}, {"k": 0}, {"beam": 1.5}, {"bm25_candidates": 2.0}, {"bm25_weight": float("inf")},
     {"bm25_weight": float("nan")}, {"token_weight": float("inf")}, {"token_weight": -1.0}],
)  # fmt: skip
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    ((field, value),) = setting.items()
    with pytest.raises(InputError, match=rf"^{field} = {value}: it must be "):
        SearchConfig(**setting)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("setting", [{"fanout": 2.5}, {"chunk_tokens": 60.0}, {"spill": 0}, {"alpha": float("nan")}])
def test_tree_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(setting))} = "):
        TreeConfig(**setting)


def test_the_fraction_counts_what_could_not_be_read(tmp_path: Path) -> None:
    from treemem.hierarchy.readers import read

    assert ReadReport().fraction is None
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b.pdf").write_bytes(b"no PDF at all! " * 4 + b"." * 40)
    (tmp_path / "c.txt").write_text("y" * 200)
    (tmp_path / "d.png").write_bytes(b"skipped" * 100)
    report = ReadReport()
    fractions = []
    for _ in read(tmp_path, report):
        fractions.append(report.fraction)
    assert fractions == [0.25, 1.0]
    assert (report.bytes_done, report.bytes_total, report.failures) == (400, 400, 1)


def test_awkward_documents_are_stored(small_memory: Memory) -> None:
    for document in AWKWARD:
        assert small_memory.search(document.text[:60], 1, within=[document.id]).hits
