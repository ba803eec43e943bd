"""What is written of a tree's words, in slices, is what the specification makes of them at once."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.kernels.trees import random_index, random_tree, signatures_of

from treemem.errors import DamagedMemory
from treemem.kernels import Signatures
from treemem.storage import signatures
from treemem.storage.signatures import kept_terms, read_signatures, write_signatures


@pytest.mark.parametrize(("chunks", "step"), [(0, 100), (5, 1), (300, 1), (300, 50), (300, 1 << 22)])
@pytest.mark.parametrize("least", [0.0, 0.5])
def test_written_is_what_is_specified(
    tmp_path: Path, chunks: int, step: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signatures, "_STEP", step)
    monkeypatch.setattr(signatures, "NODE_SHARE", least)
    generator = np.random.default_rng(chunks + step)
    tree, index, idf = random_tree(generator, chunks), random_index(generator, chunks), generator.random(40)
    told: list[str] = []
    write_signatures(tmp_path, tree, index, idf, lambda stage, done, total: told.append(stage))
    read = read_signatures(tmp_path, tree)
    expected = signatures_of(tree, index, lambda term, share: idf[term] * share >= 255 * least * idf.max())
    if least and chunks == 300:
        assert len(read[0].slots) < len(signatures_of(tree, index)[0].slots), "nothing was left out"
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
    write_signatures(tmp_path, tree, index, np.ones(40))
    file = tmp_path / "level-2-words-slots.npy"
    np.save(file, np.load(file)[:-1])
    with pytest.raises(DamagedMemory, match="delete it"):
        read_signatures(tmp_path, tree)


def test_what_a_node_keeps_is_found_among_what_its_children_keep() -> None:
    generator = np.random.default_rng(0)
    shares, idf = generator.integers(0, 256, (8, 60)).astype(np.uint8), 5 * generator.random(60)
    terms = np.arange(60, dtype=np.int32)
    ends, some, some_shares = kept_terms(np.arange(9) * 60, np.tile(terms, 8), shares.ravel(), idf, 0.3)
    assert 0 < len(some) < 480
    for child, (first, last) in enumerate(pairwise(ends)):
        assert (some_shares[first:last] == shares[child, some[first:last]]).all()
    largest = np.zeros(60, np.uint8)
    np.maximum.at(largest, some, some_shares)
    known = np.flatnonzero(largest).astype(np.int32)
    whole = kept_terms(np.array([0, 60]), terms, shares.max(0), idf, 0.3)
    found = kept_terms(np.array([0, len(known)]), known, largest[known], idf, 0.3)
    for one, other in zip(whole, found, strict=True):
        assert np.array_equal(one, other)


def test_all_terms_are_kept_where_nothing_is_asked_of_them() -> None:
    given = np.array([0, 2, 2, 3]), np.array([1, 5, 0], np.int32), np.array([9, 8, 7], np.uint8)
    for one, other in zip(given, kept_terms(*given, np.ones(6), 0), strict=True):
        assert np.array_equal(one, other)
    nothing = kept_terms(np.zeros(3, int), np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0), 0.5)
    assert nothing[0].tolist() == [0, 0, 0]
