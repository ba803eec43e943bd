"""Lexical signatures of a tree's nodes: which terms stand below each, and how much of a chunk they make up at most.

With them a walk weighs words at every level, so that it needs no inverted index of all chunks; its cost grows with the
logarithm of the memory, where posting lists grow with the memory. What is kept of a block of children is a small
inverted index of its own, so that a query's term is looked up once for all of them (compare the block maxima of Ding
and Suel 2011, "Faster top-k document retrieval using block-max indexes").

Of a node of level 3 or above only the terms are kept that can bring much to a query's sum: those with
`idf * share >= NODE_SHARE * largest idf`, on level 3 about a fifth of the thousands that a node has there. What counts
is that the bound is the same for all nodes: where each keeps a number of its best, a term is missing at one node and
not at the next, and the wrong one is taken. A share is the largest of the children's, so what a node keeps is found
among what its children keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from treemem.kernels import LexicalIndex, ServingTree, Signatures, back_end
from treemem.kernels.reference import signature_kinds
from treemem.storage.files import map_npy, write_npy
from treemem.types import Progress, no_progress

PARTS = ("offsets", "terms", "bases", "starts", "slots", "values")
NODE_SHARE = 0.4
"""How much of the largest idf a term's share must be worth to be kept from level 3 up; by `benchmarks/pruning.py`."""
_STEP = 1 << 22
"""About so many entries are worked on at once."""


def write_signatures(
    folder: Path, tree: ServingTree, index: LexicalIndex, idf: np.ndarray, progress: Progress = no_progress
) -> None:
    """Write the signatures of all levels, bottom up, in bounded memory.

    Args:
        folder: gets the files that `read_signatures` reads.
        tree: as it is served.
        index: the terms of its chunks.
        idf: inverse document frequency of every term, [terms].
        progress: told about rows.
    """
    scratch = [folder / "signature-shares", folder / "signature-counts"]
    offsets, terms = np.asarray(index.offsets), index.terms
    shares, values = _written(scratch[0], _shares(index)), _written(scratch[1], _counts(index))
    for number, blocks in enumerate(tree.levels[::-1], 1):
        start_kind, slot_kind = signature_kinds(blocks.offsets, blocks.ids, offsets)
        if number > 1:  # edits append to it, and a node's words are many
            start_kind = np.int32
        kinds = {"terms": np.int32, "starts": start_kind, "slots": slot_kind, "values": np.uint8}
        kinds |= {"node-terms": np.int32, "node-shares": np.uint8}
        files = {name: folder / f"signature-{name}-{number}" for name in kinds}
        scratch += files.values()
        ends = {name: [np.zeros(1, np.int64)] for name in ("offsets", "bases", "node-offsets")}
        with ExitStack() as stack:
            opened = {name: stack.enter_context(file.open("wb")) for name, file in files.items()}
            for first, last in _slices(blocks.offsets, blocks.ids, offsets):
                start, end = blocks.offsets[first], blocks.offsets[last]
                made, largest = back_end().signatures(
                    blocks.offsets[first : last + 1] - start, blocks.ids[start:end], offsets, terms, shares, values
                )
                node = (made.offsets, made.terms, largest)
                if number > 1:
                    node = kept_terms(*node, idf, NODE_SHARE)
                arrays = vars(made) | dict(zip(("node-offsets", "node-terms", "node-shares"), node, strict=True))
                for name, file in opened.items():
                    file.write(np.ascontiguousarray(arrays[name], kinds[name]).data)
                for name, parts in ends.items():
                    parts.append(parts[-1][-1] + arrays[name][1:])
                progress(f"words of level {number + 1}", float(end), float(len(blocks.ids)))
        arrays = {name: _mapped(file, kinds[name]) for name, file in files.items()}
        arrays |= {name: np.concatenate(parts) for name, parts in ends.items()}
        for name in PARTS:
            own = arrays[name]
            write_npy(_file(folder, number, name), own.dtype, own.shape, _blocks(own))
        offsets, terms, shares = arrays["node-offsets"], arrays["node-terms"], arrays["node-shares"]
        values = shares
    del terms, shares, values, arrays
    for path in scratch:
        path.unlink()


class Outgrown(Exception):
    """What is to be appended does not fit the types of the arrays that are there: the image is made anew."""


@runtime_checkable
class Appendable(Protocol):
    """The arrays of an image that is being made; see `treemem.storage.follow`."""

    def append(self, name: str, array: np.ndarray) -> None:
        """Append rows."""

    def read(self, name: str) -> np.ndarray:
        """All rows so far."""


def append_signatures(arrays: Appendable, number: int, blocks: int, index: LexicalIndex, idf: np.ndarray) -> None:
    """Append the signatures of the last blocks of a level.

    Args:
        arrays: of the image, in which the blocks, and all signatures below, are there already.
        number: whose elements stand in the blocks; level 1 = chunks.
        blocks: how many.
        index: the terms of the chunks.
        idf: inverse document frequency of every term.

    Raises Outgrown.
    """
    ends = arrays.read(f"level-{number}-offsets")[-blocks - 1 :]
    ids = arrays.read(f"level-{number}-ids")[ends[0] :]
    terms, shares, values, counts = (
        _chunk_words(index, ids) if number == 1 else _node_words(arrays, number - 1, ids, index)
    )
    own = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if number > 2:
        own, terms, shares = kept_terms(own, terms, shares, idf, NODE_SHARE)
        values = shares
    local = np.arange(len(ids), dtype=np.int32)
    made, _ = back_end().signatures(ends - ends[0], local, own, terms, shares, values)
    for name in ("terms", "starts", "slots", "values"):
        array, path = getattr(made, name), f"level-{number}-words-{name}"
        if len(array) and array.max() > np.iinfo(arrays.read(path).dtype).max:
            raise Outgrown
        arrays.append(path, array)
    for name in ("offsets", "bases"):
        path = f"level-{number}-words-{name}"
        arrays.append(path, arrays.read(path)[-1] + getattr(made, name)[1:])


_Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of some elements, one after the other: terms, shares and what is kept of them; and how many each has."""


def _chunk_words(index: LexicalIndex, chunks: np.ndarray) -> _Words:
    places, counts = _runs(index.offsets, chunks)
    own = index.counts[places].astype(np.float32)
    shares = _in_steps(own, np.repeat(index.norms[chunks], counts))
    return index.terms[places], shares, np.minimum(own, 255).astype(np.uint8), counts


def _node_words(arrays: Appendable, number: int, nodes: np.ndarray, index: LexicalIndex) -> _Words:
    """From the signatures of the blocks of some nodes, whose children are of level `number`."""
    offsets, terms, bases, starts, slots, values = (arrays.read(f"level-{number}-words-{name}") for name in PARTS)
    places, counts = _runs(offsets, nodes)
    entries, lengths = _runs(bases, nodes)
    shares = values[entries]
    if number == 1:
        firsts = arrays.read("level-1-offsets")[nodes]
        chunks = arrays.read("level-1-ids")[np.repeat(firsts, lengths) + slots[entries]]
        shares = _in_steps(shares.astype(np.float32), index.norms[chunks])
    begins = np.repeat(np.cumsum(lengths) - lengths, counts) + starts[places]
    largest = np.maximum.reduceat(shares, begins) if len(begins) else shares
    return terms[places], largest, largest, counts


def _runs(offsets: np.ndarray, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of what elements have, one after the other, and how much each has."""
    begins = offsets[elements]
    counts = offsets[elements + 1] - begins
    return np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()), counts


def _in_steps(counts: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Shares `count / (count + norm)` in 255ths, rounded up."""
    return np.ceil(255 * (counts / (counts + norms))).clip(1, 255).astype(np.uint8)


def kept_terms(
    offsets: np.ndarray, terms: np.ndarray, shares: np.ndarray, idf: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The terms of nodes with `idf * share` of at least `least * largest idf`.

    Args:
        offsets: int64 [nodes + 1], the terms of node p are `terms[offsets[p]:offsets[p + 1]]`.
        terms: int32.
        shares: uint8, the largest share of each below its node, in 255ths.
        idf: inverse document frequency of every term.
        least: 0 keeps all.

    Returns:
        offsets, terms and shares of what is kept, in the order that they had.
    """
    kept = idf[terms] * shares >= 255 * least * idf.max(initial=0)
    return np.concatenate([[0], np.cumsum(kept)])[offsets], terms[kept], shares[kept]


def read_signatures(folder: Path, tree: ServingTree, rows: Mapping[str, int] | None = None) -> tuple[Signatures, ...]:
    """What `write_signatures` wrote, memory-mapped, top first.

    Args:
        folder: where it lies.
        tree: as it is served.
        rows: how many rows of each array belong to it; by default all.

    Raises DamagedMemory where the arrays do not fit the tree.
    """
    out = []
    for blocks, number in zip(tree.levels, range(tree.depth, 0, -1), strict=True):
        files = {name: _file(folder, number, name) for name in PARTS}
        arrays = {name: map_npy(file, None if rows is None else rows[file.stem]) for name, file in files.items()}
        if number == tree.depth:  # the last of the tops that edits have made
            arrays |= {name: np.ascontiguousarray(arrays[name][-2:]) for name in ("offsets", "bases")}
        own = Signatures(*arrays.values())
        own.check(blocks.offsets)
        out.append(own)
    return tuple(out)


def _file(folder: Path, number: int, name: str) -> Path:
    return folder / f"level-{number}-words-{name}.npy"


def _shares(index: LexicalIndex) -> Iterator[np.ndarray]:
    """Of each entry of the index its share `count / (count + norm)` in 255ths, rounded up."""
    first = 0
    while first < index.size:
        last = int(np.searchsorted(index.offsets, index.offsets[first] + _STEP, side="right")) - 1
        last = min(max(last, first + 1), index.size)
        counts = index.counts[index.offsets[first] : index.offsets[last]].astype(np.float32)
        norms = np.repeat(index.norms[first:last], np.diff(index.offsets[first : last + 1]))
        yield _in_steps(counts, norms)
        first = last


def _counts(index: LexicalIndex) -> Iterator[np.ndarray]:
    for block in _blocks(index.counts):
        yield np.minimum(block, 255).astype(np.uint8)


def _slices(offsets: np.ndarray, ids: np.ndarray, child_offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of parents with about `_STEP` entries below."""
    entries = np.concatenate([[0], np.cumsum(np.diff(child_offsets)[ids])])[offsets]
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(entries, entries[first] + _STEP, side="right")) - 1
        last = min(max(last, first + 1), len(offsets) - 1)
        yield first, last
        first = last


def _written(path: Path, blocks: Iterator[np.ndarray]) -> np.ndarray:
    with path.open("wb") as file:
        for block in blocks:
            file.write(block.data)
    return _mapped(path, np.uint8)


def _mapped(path: Path, kind: Any) -> np.ndarray:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _STEP):
        yield array[start : start + _STEP]
