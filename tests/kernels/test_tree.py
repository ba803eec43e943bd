from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.kernels.trees import laid_out, random_index, random_tree

from treemem.errors import DamagedMemory
from treemem.kernels import LexicalIndex, ServingTree


def tree_of_three_levels() -> ServingTree:
    tree = random_tree(np.random.default_rng(0), 40)
    assert tree.depth == 3
    return tree


def with_level(tree: ServingTree, index: int, **changes: Any) -> ServingTree:
    levels = list(tree.levels)
    levels[index] = replace(levels[index], **changes)
    return replace(tree, levels=tuple(levels))


def with_field(value: Any, name: str, array: np.ndarray) -> Any:
    """A copy with an array of a type that the constructor refuses where types are checked, as they are in tests."""
    copied = copy(value)
    object.__setattr__(copied, name, array)
    return copied


def changed(array: np.ndarray, place: int, value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize("chunks", [0, 1, 8, 9, 40, 300])
def test_random_trees_pass(chunks: int) -> None:
    tree = random_tree(np.random.default_rng(chunks), chunks)
    tree.check()
    assert (tree.depth == 1) == (chunks <= 8)
    assert tree.dimension == 16
    assert len(tree.levels[-1].ids) == chunks * (1 if tree.depth == 1 else 2)


DAMAGES: dict[str, tuple[Callable[[ServingTree], ServingTree], str]] = {
    "size missing": (lambda t: replace(t, sizes=t.sizes[1:]), "3 levels, 2 sizes"),
    "no level": (lambda t: replace(t, levels=(), sizes=()), "0 levels"),
    "id too large": (
        lambda t: with_level(t, 2, ids=changed(t.levels[2].ids, 3, 40)),
        "level 1: an id is outside 0 to 39",
    ),
    "id negative": (lambda t: with_level(t, 2, ids=changed(t.levels[2].ids, 3, -1)), "outside"),
    "node twice": (
        lambda t: with_level(t, 1, ids=changed(t.levels[1].ids, 0, int(t.levels[1].ids[1]))),
        "level 2: a node stands under more than one parent",
    ),
    "offsets fall": (lambda t: with_level(t, 2, offsets=changed(t.levels[2].offsets, 1, 70)), "do not rise"),
    "offsets too far": (lambda t: with_level(t, 2, offsets=changed(t.levels[2].offsets, -1, 81)), "do not rise"),
    "offsets too few": (lambda t: with_level(t, 2, offsets=t.levels[2].offsets[1:]), "parents"),
    "rows too few": (lambda t: with_level(t, 1, rows=t.levels[1].rows[1:]), "19 rows, 20 scales, 20 elements"),
    "rows of another type": (
        lambda t: replace(
            t, levels=(with_field(t.levels[0], "rows", t.levels[0].rows.astype(np.int16)), *t.levels[1:])
        ),
        "int8 of 2 axes",
    ),
    "rows not contiguous": (lambda t: with_level(t, 1, rows=np.asfortranarray(t.levels[1].rows)), "contiguous"),
    "other dimension": (lambda t: with_level(t, 0, rows=t.levels[0].rows[:, :8].copy()), "dimension 8"),
    "upper halves too few": (lambda t: with_level(t, 2, upper=t.levels[2].upper[1:]), "upper halves"),
    "other scales": (
        lambda t: with_level(t, 2, upper_scales=changed(t.levels[2].upper_scales, 7, 0.5)),
        "scales of rows and of their upper halves differ",
    ),
    "scale NaN": (lambda t: with_level(t, 1, scales=changed(t.levels[1].scales, 0, np.nan)), "a scale"),
    "scale negative": (lambda t: with_level(t, 1, scales=changed(t.levels[1].scales, 0, -0.1)), "a scale"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name: str) -> None:
    damage, message = DAMAGES[name]
    with pytest.raises(DamagedMemory, match=message):
        damage(tree_of_three_levels()).check()


def test_too_high_a_dimension() -> None:
    ids, scales = np.zeros(1, np.int32), np.zeros(1, np.float32)
    blocks = laid_out(np.zeros((1, 2049), np.int8), scales, ids, np.array([0, 1]))
    with pytest.raises(DamagedMemory, match="dimension 2049"):
        ServingTree((blocks,), (1,)).check()


def test_every_element_stands_below_its_parent() -> None:
    tree = tree_of_three_levels()
    assert (tree.parents[0] == -1).all()
    for level, (blocks, parents) in enumerate(zip(tree.levels, tree.parents, strict=True)):
        assert np.array_equal(np.unique(tree.live[level]), np.arange(tree.sizes[level]))
        for element, parent in enumerate(parents if level else []):
            assert element in blocks.ids[blocks.offsets[parent] : blocks.offsets[parent + 1]]


def test_what_nothing_leads_to_is_not_live() -> None:
    """A top whose first entries are those of an edit ago."""
    tree = tree_of_three_levels()
    top = tree.levels[0]
    later = with_level(tree, 0, offsets=np.array([2, len(top.ids)], np.int64))
    later.check()
    gone = np.isin(np.arange(tree.sizes[1]), tree.live[1][np.isin(tree.owners[1], top.ids[:2])])
    assert np.array_equal(np.sort(later.live[0]), np.sort(top.ids[2:]))
    assert np.array_equal(np.sort(later.live[1]), np.flatnonzero(~gone))
    assert (later.parents[1][gone] == -1).all()


LEXICAL_DAMAGES: dict[str, tuple[Callable[[LexicalIndex], LexicalIndex], str]] = {
    "norm": (lambda i: replace(i, norms=changed(i.norms, 0, np.nan)), "norm"),
    "counts": (lambda i: replace(i, counts=i.counts[1:]), "counts"),
    "offsets": (lambda i: replace(i, offsets=changed(i.offsets, -1, 10**6)), "do not rise"),
    "chunks": (lambda i: replace(i, norms=i.norms[1:]), "21 offsets for 19 parents"),
    "terms": (lambda i: with_field(i, "terms", i.terms.astype(np.int64)), "int32"),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", LEXICAL_DAMAGES)
def test_damage_of_a_lexical_index_is_found(name: str) -> None:
    index = random_index(np.random.default_rng(0), 20)
    index.check()
    damage, message = LEXICAL_DAMAGES[name]
    with pytest.raises(DamagedMemory, match=message):
        damage(index).check()


def test_only_large_levels_of_a_tree_larger_than_memory_are_asked_for() -> None:
    tree = random_tree(np.random.default_rng(0), 400)
    assert tree.paged_levels == (False,) * tree.depth
    assert replace(tree, paged=True).paged_levels == (*(False,) * (tree.depth - 2), True, True)
