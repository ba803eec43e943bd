"""What the kernels read and return: frozen dataclasses of NumPy arrays, which may be memory maps.

Element `i` of a level is a node or, at level 1, a chunk. Levels stand top first here, as a walk meets them; in messages
they are numbered as everywhere else in treemem: level 1 = chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treemem.errors import DamagedMemory

MAX_DIMENSION = 2048
"""Highest dimension: 2048 products of 127 * 8191 still fit an int32."""


# Compared by identity: equality of arrays is no single truth, and a back end keeps what it derives per tree.
@dataclass(frozen=True, eq=False)
class LevelBlocks:
    """One level's elements laid out by parent, the children of one parent side by side."""

    rows: NDArray[np.int8]
    """[entries, d] quantised unit vectors."""
    scales: NDArray[np.float32]
    """[entries] what one step of a row is worth; 0 for a row of zeros."""
    ids: NDArray[np.int32]
    """[entries] which element of the level stands in this row; a chunk may stand under several parents."""
    offsets: NDArray[np.int64]
    """[parents + 1] the children of parent p are the rows offsets[p]:offsets[p + 1]; the top has one pseudo-parent."""


@dataclass(frozen=True, eq=False)
class ServingTree:
    """A whole tree as walks read it."""

    levels: tuple[LevelBlocks, ...]
    """Top first; the last holds the chunks. A memory of few chunks has only that one."""
    sizes: tuple[int, ...]
    """How many elements each level has."""
    first_row: NDArray[np.int64]
    """[chunks] the first row of the last level in which a chunk stands."""

    @property
    def depth(self) -> int:
        """How many levels there are, the chunks included."""
        return len(self.levels)

    @property
    def dimension(self) -> int:
        """How many components a vector has."""
        return int(self.levels[-1].rows.shape[1])

    def check(self) -> None:
        """Check everything that keeps a kernel inside the arrays; the rows themselves are not read.

        Raises DamagedMemory.
        """
        if not self.levels or len(self.levels) != len(self.sizes):
            raise _damaged(f"{len(self.levels)} levels, {len(self.sizes)} sizes")
        above = 1
        for index, (blocks, size) in enumerate(zip(self.levels, self.sizes, strict=True)):
            where = f"level {self.depth - index}"
            _check_arrays(blocks, self.levels[-1].rows.shape[-1], where)
            _check_children(blocks, above, size, where)
            if index < self.depth - 1 and not (np.bincount(blocks.ids, minlength=size) == 1).all():
                raise _damaged(f"{where}: a node does not stand under exactly one parent")
            above = size
        if self.first_row.dtype != np.int64 or not np.array_equal(
            self.first_row, first_rows(self.levels[-1].ids, self.sizes[-1])
        ):
            raise _damaged("level 1: first_row does not name every chunk's first row")


@dataclass(frozen=True, eq=False)
class LexicalIndex:
    """A forward index: which terms stand in each chunk, and how often."""

    offsets: NDArray[np.int64]
    """[chunks + 1] chunk c's entries are offsets[c]:offsets[c + 1]."""
    terms: NDArray[np.int32]
    """[entries] term numbers, rising within a chunk."""
    counts: NDArray[np.uint8] | NDArray[np.uint16]
    """[entries] how often the term stands in the chunk, at least 1."""
    norms: NDArray[np.float32]
    """[chunks] k1 * (1 - b + b * length / mean length)."""

    @property
    def size(self) -> int:
        """How many chunks there are."""
        return len(self.norms)

    def check(self) -> None:
        """Check types, lengths and offsets; that terms rise within a chunk is the writer's duty.

        Raises DamagedMemory.
        """
        where = "lexical index"
        _check_type(self.terms, (np.int32,), 1, f"{where}: terms")
        _check_type(self.counts, (np.uint8, np.uint16), 1, f"{where}: counts")
        _check_type(self.norms, (np.float32,), 1, f"{where}: norms")
        _check_offsets(self.offsets, self.size, len(self.terms), where)
        if len(self.counts) != len(self.terms):
            raise _damaged(f"{where}: {len(self.terms)} terms, {len(self.counts)} counts")
        if not (np.isfinite(self.norms).all() and (self.norms >= 0).all()):
            raise _damaged(f"{where}: a norm is negative or not finite")


@dataclass(frozen=True, eq=False)
class Walked:
    """What a walk met for each of B queries; best first, padded with -1 and -inf."""

    nodes: NDArray[np.int32]
    """[depth - 1, B, beam] the nodes that each level above the chunks kept."""
    node_scores: NDArray[np.float32]
    """[depth - 1, B, beam]"""
    chunks: NDArray[np.int32]
    """[B, C] every chunk that was scored; C is the largest number among the queries."""
    chunk_scores: NDArray[np.float32]
    """[B, C]"""
    chunk_parents: NDArray[np.int32]
    """[B, C] the level-2 node through which the chunk was reached; -1 in a tree without nodes."""
    scored: NDArray[np.int64]
    """[B] how many vectors were scored, all levels together, each chunk once."""


def first_rows(ids: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    """Where each element stands first.

    `ids`: [entries], values from 0 to `size` - 1. Returns int64 [size], -1 for an element that stands nowhere.
    """
    first = np.full(size, -1, np.int64)
    # Of several values for one place NumPy keeps the last, so the entries are written backwards.
    first[ids[::-1]] = np.arange(len(ids) - 1, -1, -1)
    return first


def _damaged(what: str) -> DamagedMemory:
    return DamagedMemory(f"the serving image is damaged ({what}): delete it, it is made again from the memory")


def _check_type(array: NDArray[np.generic], accepted: tuple[type, ...], ndim: int, where: str) -> None:
    if array.dtype not in accepted or array.ndim != ndim or not (array.flags.c_contiguous and array.flags.aligned):
        names = " or ".join(np.dtype(kind).name for kind in accepted)
        raise _damaged(
            f"{where}: {array.dtype} of shape {array.shape}, expected contiguous, aligned {names} of {ndim} axes"
        )


def _check_arrays(blocks: LevelBlocks, dimension: int, where: str) -> None:
    _check_type(blocks.rows, (np.int8,), 2, f"{where}, rows")
    _check_type(blocks.scales, (np.float32,), 1, f"{where}, scales")
    _check_type(blocks.ids, (np.int32,), 1, f"{where}, ids")
    entries, width = blocks.rows.shape
    if not 1 <= width <= MAX_DIMENSION or width != dimension:
        raise _damaged(f"{where}: dimension {width}, expected that of level 1, at most {MAX_DIMENSION}")
    if len(blocks.scales) != entries or len(blocks.ids) != entries:
        raise _damaged(f"{where}: {entries} rows, {len(blocks.scales)} scales, {len(blocks.ids)} ids")
    if not ((blocks.scales >= 0) & (blocks.scales <= 1)).all():
        raise _damaged(f"{where}: a scale is not between 0 and 1")


def _check_children(blocks: LevelBlocks, parents: int, size: int, where: str) -> None:
    _check_offsets(blocks.offsets, parents, len(blocks.ids), where)
    if len(blocks.ids) and not (0 <= blocks.ids.min() and blocks.ids.max() < size):
        raise _damaged(f"{where}: an id is outside 0 to {size - 1}")


def _check_offsets(offsets: NDArray[np.int64], parents: int, entries: int, where: str) -> None:
    _check_type(offsets, (np.int64,), 1, f"{where}, offsets")
    if len(offsets) != parents + 1:
        raise _damaged(f"{where}: {len(offsets)} offsets for {parents} parents")
    if offsets[0] != 0 or offsets[-1] != entries or (np.diff(offsets) < 0).any():
        raise _damaged(f"{where}: the offsets do not rise from 0 to {entries}")
