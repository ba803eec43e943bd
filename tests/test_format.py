"""docs/format.md says how a memory is read without treemem: its lines run, and the arrays are those that it names."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import zarr
from tests.fakes import FakeEncoder, documents

from treemem.config import FORMAT_VERSION, TreeConfig
from treemem.hierarchy.memory import Memory

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "format.md").read_text("utf-8")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    path = tmp_path_factory.mktemp("format") / "my.memory"
    built = Memory.build(documents(30, 8), path, encoder=FakeEncoder(), config=TreeConfig(chunk_tokens=40, fanout=4))
    built.remove(["doc-3"])
    return built


def test_the_lines_of_the_page_read_a_memory(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(memory.store.path.parent)
    noted: list[Any] = []
    exec(code + "    noted.append((record, text, pieces))\n", {"noted": noted})
    expected = [own for own in documents(30, 8) if own.id != "doc-3"]
    assert [(record["id"], record["title"], text) for record, text, _ in noted] == [
        (own.id, own.title, own.text) for own in expected
    ]
    for record, _, pieces in noted:
        number = memory.image.number_of(record["id"])
        assert number is not None
        assert pieces == [memory.image.chunk_text(chunk) for chunk in memory.image.chunks_of(number)]


def test_the_page_names_all_arrays_and_no_others(memory: Memory) -> None:
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(memory.store.path / "store")))
    root: Any = zarr.open_group(repository.readonly_session("main").store, mode="r")
    stored = {
        re.sub(r"levels/\d+", "levels/K", name) for name, own in root.members(None) if isinstance(own, zarr.Array)
    }
    named = set()
    for cell in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE):
        first, *others = re.findall(r"`(.*?)`", cell)
        named |= {first, *(f"{first.rsplit('/', 1)[0]}/{other}" for other in others)}
    assert named - {"hierarchy/config", "hierarchy/weights", "chunks/reader"} == stored
    assert f"version {FORMAT_VERSION}" in PAGE
    assert root.attrs["format"] == FORMAT_VERSION
    assert set(root.attrs) == {"format", "state", "config", "encoder", "digests"}


def test_the_digest_of_the_page_is_the_one_that_is_stored(memory: Memory) -> None:
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(memory.store.path / "store")))
    root: Any = zarr.open_group(repository.readonly_session("main").store, mode="r")
    for name in ("levels/2/children", "documents/text_ends", "chunks/encodings"):
        array, total = root[name], 0
        for place, start in enumerate(range(0, array.shape[0], array.chunks[0])):
            rows = np.ascontiguousarray(array[start : start + array.chunks[0]])
            told = hashlib.sha256(f"{place} {rows.dtype} {rows.shape}".encode() + rows.tobytes())
            total += int.from_bytes(told.digest(), "little")
        assert root.attrs["digests"]["arrays"][name] == f"{total % 2**256:064x}"
