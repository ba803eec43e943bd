"""Memories that older versions wrote are opened, and hold what they held."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.fakes import FakeEncoder, documents

from treemem.config import FORMAT_VERSION
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.migrations import _STEPS, migrate
from treemem.storage.store import Store

DATA = Path(__file__).resolve().parent.parent / "data"
FORMATS = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def test_every_format_has_a_memory_and_every_older_one_a_step() -> None:
    assert FORMATS == [f"format-{number}" for number in range(1, FORMAT_VERSION + 1)]
    assert sorted(_STEPS) == list(range(1, FORMAT_VERSION))


@pytest.mark.parametrize("name", FORMATS)
def test_an_old_memory_is_opened_and_edited(tmp_path: Path, name: str) -> None:
    shutil.copytree(DATA / name, tmp_path / "m")
    memory = Memory.open(tmp_path / "m", encoder=FakeEncoder())
    assert memory.info().format == FORMAT_VERSION
    removed = {"doc-3"} if name == "format-2" else set()
    expected = [own for own in documents(30, 8) if own.id not in removed]
    assert sorted(memory.ids()) == sorted(own.id for own in expected)
    assert [memory.document(own.id) for own in expected] == expected
    assert memory.verify().faults == []
    found = memory.search(expected[10].text[:70], k=1).hits[0]
    assert found.document.id == expected[10].id
    memory.add(documents(34, 8)[30:])
    assert memory.verify().faults == []


def test_vectors_and_tree_stay_what_they_were(tmp_path: Path) -> None:
    """Read with zarr alone, as format 1 has them."""
    import icechunk
    import zarr

    shutil.copytree(DATA / "format-1", tmp_path / "m")
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path / "m" / "store")))
    old = zarr.open_group(repository.readonly_session("main").store, mode="r")
    encodings = np.asarray(old["chunks/encodings"][:])  # type: ignore[index]
    before = [np.asarray(old[f"levels/2/{part}"][:]) for part in ("offsets", "children", "vectors")]  # type: ignore[index]
    store = Store.open(tmp_path / "m")
    migrate(store)
    assert np.array_equal(store.read("chunks/encodings"), encodings)
    level = store.levels()[0]
    for own, other in zip((level.offsets, level.children, level.vectors), before, strict=True):
        assert np.array_equal(own, other)
    snapshot = store.snapshot
    migrate(store)
    assert store.snapshot == snapshot
