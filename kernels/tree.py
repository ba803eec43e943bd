"""What the kernels read and return: NumPy arrays, which may be memory maps, under names.

Element `i` of a level is a node or, at level 1, a chunk. Levels stand top first here, as a walk meets them; in messages
they are numbered as everywhere else in treemem: level 1 = chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from treemem.errors import DamagedMemory

MAX_DIMENSION = 2048
"""Highest dimension: 2048 products of 127 * 8191 still fit an int32."""


# Compared by identity: equality of arrays is no single truth, and a back end keeps what it derives per tree.
@dataclass(frozen=True, eq=False)
class LevelBlocks:
    """One level's elements: their rows, and the rows' upper halves laid out by parent, children side by side."""

    rows: NDArray[np.int8]
    """[elements, d] quantised unit vectors."""
    scales: NDArray[np.float32]
    """[elements] what one step of a row is worth; 0 for a row of zeros."""
    upper: NDArray[np.uint8]
    """[entries, 32 * ceil(d / 64)] the upper four bits of the rows of `ids`; see `reference.upper_halves`."""
    upper_scales: NDArray[np.float32]
    """[entries] the scales of `ids`."""
    ids: NDArray[np.int32]
    """[entries] which element stands in this place; a chunk may stand under several parents."""
    offsets: NDArray[np.int64]
    """[parents + 1] the children of parent p are at offsets[p]:offsets[p + 1]; the top has one pseudo-parent, whose
    children may begin behind those that it had before an edit."""


@dataclass(frozen=True, eq=False)
class ServingTree:
    """A whole tree as walks read it.

    An edit changes nothing that is there: it appends elements in place of those that have changed, up to the top, and
    so leaves some behind that nothing leads to. `live` has those that stand in the tree.
    """

    levels: tuple[LevelBlocks, ...]
    """Top first; the last holds the chunks. A memory of few chunks has only that one."""
    sizes: tuple[int, ...]
    """How many elements each level has."""
    paged: bool = False
    """Whether it is larger than memory."""

    @property
    def depth(self) -> int:
        """How many levels there are, the chunks included."""
        return len(self.levels)

    @property
    def dimension(self) -> int:
        """How many components a vector has."""
        return int(self.levels[-1].rows.shape[1])

    @property
    def paged_levels(self) -> tuple[bool, ...]:
        """Of each level whether walks ask the system at once for all that they will read there.

        They do at the large levels of a paged tree; one that takes a tenth of it or less is likely to be in memory.
        """
        own = [sum(array.nbytes for array in vars(blocks).values()) for blocks in self.levels]
        return tuple(self.paged and 10 * size > sum(own) for size in own)

    @cached_property
    def live(self) -> tuple[NDArray[np.int32], ...]:
        """The elements of each level that stand in the tree, top first; a chunk under several parents so often."""
        return tuple(ids for ids, _ in self._live)

    @cached_property
    def live_nodes(self) -> tuple[NDArray[np.int32], ...]:
        """`live` of the levels above the chunks, which is found much sooner."""
        return tuple(ids for ids, _ in self._live_nodes)

    @cached_property
    def owners(self) -> tuple[NDArray[np.int32], ...]:
        """The parent through which each of `live` stands in the tree."""
        return tuple(above for _, above in self._live)

    @cached_property
    def parents(self) -> tuple[NDArray[np.int32], ...]:
        """Of each level's elements the parent, the first of several; -1 at the top and where there is none."""
        return (*self.node_parents, _parents(self._live[-1], self.sizes[-1], top=self.depth == 1))

    @cached_property
    def node_parents(self) -> tuple[NDArray[np.int32], ...]:
        """`parents` of the levels above the chunks."""
        live = zip(self._live_nodes, self.sizes, strict=False)
        return tuple(_parents(own, size, top=level == 0) for level, (own, size) in enumerate(live))

    @cached_property
    def _live(self) -> tuple[tuple[NDArray[np.int32], NDArray[np.int32]], ...]:
        """Of each level the elements that stand in the tree, and the parent of each."""
        above = self._live_nodes[-1][0] if self._live_nodes else np.zeros(1, np.int32)
        return (*self._live_nodes, _below(self.levels[-1], above))

    @cached_property
    def _live_nodes(self) -> tuple[tuple[NDArray[np.int32], NDArray[np.int32]], ...]:
        out: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        for blocks in self.levels[:-1]:
            out.append(_below(blocks, out[-1][0] if out else np.zeros(1, np.int32)))
        return tuple(out)

    def check(self) -> None:
        """Check everything that keeps a kernel inside the arrays, once; the rows themselves are not read.

        Raises DamagedMemory.
        """
        _ = self._sound

    @cached_property
    def _sound(self) -> bool:
        if not self.levels or len(self.levels) != len(self.sizes):
            raise _damaged(f"{len(self.levels)} levels, {len(self.sizes)} sizes")
        above, live = 1, np.zeros(1, np.int32)
        for index, (blocks, size) in enumerate(zip(self.levels, self.sizes, strict=True)):
            where = f"level {self.depth - index}"
            _check_arrays(blocks, size, self.levels[-1].rows.shape[-1], where)
            _check_children(blocks, above, size, where, from_zero=index > 0)
            if index < self.depth - 1:
                live, _ = _below(blocks, live)
                if np.bincount(live, minlength=1).max() > 1:
                    raise _damaged(f"{where}: a node stands under more than one parent")
            if not np.array_equal(blocks.upper_scales, blocks.scales[blocks.ids]):
                raise _damaged(f"{where}: the scales of rows and of their upper halves differ")
            above = size
        return True


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
class Signatures:
    """Which terms stand below the children of each parent of one level: a small inverted index of every block.

    A node's signature is, of each term, the largest share `count / (count + norm)` of any chunk below it, from level 3
    up of the terms that can bring much to a sum (`treemem.storage.signatures`); a chunk's is how often the term
    stands in it.
    """

    offsets: NDArray[np.int64]
    """[parents + 1] the terms below parent p are offsets[p]:offsets[p + 1]."""
    terms: NDArray[np.int32]
    """[terms] term numbers, rising within a parent."""
    bases: NDArray[np.int64]
    """[parents + 1] the entries of parent p are bases[p]:bases[p + 1]."""
    starts: NDArray[np.uint16] | NDArray[np.int32]
    """[terms] where a term's entries begin, counted from its parent's base; they end where the next term's begin."""
    slots: NDArray[np.uint8] | NDArray[np.uint16]
    """[entries] which child it is, counted from the parent's first row; rising within a term."""
    values: NDArray[np.uint8]
    """[entries] a node's share in 255ths, rounded up; a chunk's count, at most 255."""

    def check(self, children: NDArray[np.int64]) -> None:
        """Check types, lengths and offsets; compiled code takes nothing for granted about starts and slots.

        Args:
            children: the level's offsets, [parents + 1].

        Raises DamagedMemory.
        """
        where = "signatures"
        parents = len(children) - 1
        _check_type(self.terms, (np.int32,), 1, f"{where}: terms")
        _check_type(self.starts, (np.uint16, np.int32), 1, f"{where}: starts")
        _check_type(self.slots, (np.uint8, np.uint16), 1, f"{where}: slots")
        _check_type(self.values, (np.uint8,), 1, f"{where}: values")
        from_zero = bool(children[0] == 0)
        _check_offsets(self.offsets, parents, len(self.terms), f"{where}: terms", from_zero=from_zero)
        _check_offsets(self.bases, parents, len(self.slots), f"{where}: entries", from_zero=from_zero)
        if len(self.starts) != len(self.terms) or len(self.values) != len(self.slots):
            raise _damaged(f"{where}: arrays of different lengths")


@dataclass(frozen=True, eq=False)
class Words:
    """The lexical half of a search: what the tree knows of words, and those of B queries."""

    index: LexicalIndex
    signatures: tuple[Signatures, ...]
    """Of each level, top first."""
    offsets: NDArray[np.int64]
    """[B + 1] the terms of query b are offsets[b]:offsets[b + 1]."""
    terms: NDArray[np.int32]
    """[terms] term numbers, in the order in which they are summed."""
    weights: NDArray[np.float32]
    """[terms] idf * (k1 + 1) * count in the query."""
    weight: float
    """What the best sum of a query's terms at a level is worth beside a cosine."""


class Found(NamedTuple):
    """What a search gives for each of B queries; best first, padded with -1 and -inf."""

    nodes: NDArray[np.int32]
    """[depth - 1, B, beam] the nodes that each level above the chunks kept."""
    node_scores: NDArray[np.float32]
    """[depth - 1, B, beam]"""
    chunks: NDArray[np.int32]
    """[B, k] the best of the chunks that were scored."""
    scores: NDArray[np.float32]
    """[B, k] cosine + weight * sum / the best sum of this query's chunks; the cosine alone without words."""
    cosines: NDArray[np.float32]
    """[B, k]"""
    sums: NDArray[np.float32]
    """[B, k] BM25; 0 without words, and as padding."""
    parents: NDArray[np.int32]
    """[B, k] the level-2 node through which the chunk was reached; -1 for a neighbour, or in a tree without nodes."""
    best: NDArray[np.float32]
    """[B] the best sum of any chunk that was scored; 0 without words."""
    scored: NDArray[np.int64]
    """[B] how many vectors were looked at, all levels together; a chunk under several of the kept nodes so often."""


def upper_bytes(dimension: int) -> int:
    """How many bytes the upper halves of a row take: two components a byte, in pieces of 64."""
    return 32 * -(-dimension // 64)


def _below(blocks: LevelBlocks, above: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The children of some parents, in their order, and the parent of each."""
    starts = blocks.offsets[above]
    counts = blocks.offsets[above + 1] - starts
    shifts = np.repeat(starts - np.cumsum(counts) + counts, counts)
    return np.asarray(blocks.ids[shifts + np.arange(len(shifts))]), np.repeat(above, counts)


def _parents(live: tuple[NDArray[np.int32], NDArray[np.int32]], size: int, *, top: bool) -> NDArray[np.int32]:
    """The parent of each of `size` elements, from those that stand in the tree and the parent of each."""
    out = np.full(size, -1, np.int32)
    if not top:
        ids, owners = live
        # Of several values for one place NumPy keeps the last, so they are written backwards.
        out[ids[::-1]] = owners[::-1]
    return out


def _damaged(what: str) -> DamagedMemory:
    return DamagedMemory(f"the serving image is damaged ({what}): delete it, it is made again from the memory")


def _check_type(array: NDArray[np.generic], accepted: tuple[type, ...], ndim: int, where: str) -> None:
    if array.dtype not in accepted or array.ndim != ndim or not (array.flags.c_contiguous and array.flags.aligned):
        names = " or ".join(np.dtype(kind).name for kind in accepted)
        raise _damaged(
            f"{where}: {array.dtype} of shape {array.shape}, expected contiguous, aligned {names} of {ndim} axes"
        )


def _check_arrays(blocks: LevelBlocks, size: int, dimension: int, where: str) -> None:
    _check_type(blocks.rows, (np.int8,), 2, f"{where}, rows")
    _check_type(blocks.scales, (np.float32,), 1, f"{where}, scales")
    _check_type(blocks.upper, (np.uint8,), 2, f"{where}, upper halves")
    _check_type(blocks.upper_scales, (np.float32,), 1, f"{where}, scales of upper halves")
    _check_type(blocks.ids, (np.int32,), 1, f"{where}, ids")
    rows, width = blocks.rows.shape
    if not 1 <= width <= MAX_DIMENSION or width != dimension:
        raise _damaged(f"{where}: dimension {width}, expected that of level 1, at most {MAX_DIMENSION}")
    if not rows == len(blocks.scales) == size:
        raise _damaged(f"{where}: {rows} rows, {len(blocks.scales)} scales, {size} elements")
    entries = len(blocks.ids)
    if blocks.upper.shape != (entries, upper_bytes(width)) or len(blocks.upper_scales) != entries:
        shapes = f"{blocks.upper.shape} and {blocks.upper_scales.shape}"
        raise _damaged(f"{where}: upper halves and their scales of shapes {shapes} for {entries} entries")
    if not ((blocks.scales >= 0) & (blocks.scales <= 1)).all():
        raise _damaged(f"{where}: a scale is not between 0 and 1")


def _check_children(blocks: LevelBlocks, parents: int, size: int, where: str, *, from_zero: bool) -> None:
    _check_offsets(blocks.offsets, parents, len(blocks.ids), where, from_zero=from_zero)
    if len(blocks.ids) and not (0 <= blocks.ids.min() and blocks.ids.max() < size):
        raise _damaged(f"{where}: an id is outside 0 to {size - 1}")


def _check_offsets(
    offsets: NDArray[np.int64], parents: int, entries: int, where: str, *, from_zero: bool = True
) -> None:
    _check_type(offsets, (np.int64,), 1, f"{where}, offsets")
    if len(offsets) != parents + 1:
        raise _damaged(f"{where}: {len(offsets)} offsets for {parents} parents")
    if offsets[0] < 0 or (from_zero and offsets[0] != 0) or offsets[-1] != entries or (np.diff(offsets) < 0).any():
        raise _damaged(f"{where}: the offsets do not rise from 0 to {entries}")
