"""What is written of a tree's words, in slices, is what the specification makes of them at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tests.kernels.trees import random_index, random_tree, signatures_of

from treemem.errors import DamagedMemory
from treemem.kernels import Signatures
from treemem.storage import signatures
from treemem.storage.signatures import read_signatures, write_signatures


@pytest.mark.parametrize(("chunks", "step"), [(0, 100), (5, 1), (300, 1), (300, 50), (300, 1 << 22)])
def test_written_is_what_is_specified(tmp_path: Path, chunks: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "_STEP", step)
    generator = np.random.default_rng(chunks + step)
    tree, index = random_tree(generator, chunks), random_index(generator, chunks)
    told: list[str] = []
    write_signatures(tmp_path, tree, index, lambda stage, done, total: told.append(stage))
    read = read_signatures(tmp_path, tree)
    expected = signatures_of(tree, index)
    assert len(read) == len(expected) == tree.depth
    for level, one, other in zip(range(tree.depth, 0, -1), read, expected, strict=True):
        for field in fields(Signatures):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
            if field.name != "starts" or level == 1:  # those of nodes have room for what edits append
                assert getattr(one, field.name).dtype == getattr(other, field.name).dtype
    assert told[-1] == f"words of level {tree.depth + 1}"
    assert {file.suffix for file in tmp_path.iterdir()} == {".npy"}, "scratch files stayed"


def test_a_wrong_file_is_damage(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    tree, index = random_tree(generator, 100), random_index(generator, 100)
    write_signatures(tmp_path, tree, index)
    file = tmp_path / "level-2-words-slots.npy"
    np.save(file, np.load(file)[:-1])
    with pytest.raises(DamagedMemory, match="delete it"):
        read_signatures(tmp_path, tree)
