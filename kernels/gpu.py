"""The kernels for NVIDIA GPUs: `walk.cu`, compiled when it is first used; `reference.py` says what they compute.

A tree is put on the GPU once and stays there as long as it lives here. What does not fit lies in the host's pinned
memory, where the GPU reads it over the bus: the upper levels, which every query meets, come first. Queries that are
NumPy arrays give NumPy arrays; queries on the GPU (CuPy's, or what speaks DLPack, as torch's tensors do) give CuPy
arrays, which `torch.from_dlpack` takes, without a copy through the host.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from treemem.errors import InputError, ModelError
from treemem.kernels.cpu import bm25_all, bm25_scores, project, signatures
from treemem.kernels.dispatch import lives_on_gpu
from treemem.kernels.reference import (
    Masks,
    check_at_least_1,
    checked_chunks,
    checked_ends,
    checked_masks,
    checked_queries,
    checked_words,
    refined,
)
from treemem.kernels.tree import MAX_DIMENSION, Found, LexicalIndex, ServingTree, Words

__all__ = [
    "bm25_all",
    "bm25_scores",
    "exact",
    "place",
    "project",
    "quantise",
    "score_chunks",
    "search",
    "signatures",
    "why_not",
]
# What is done once, or for one query on a handful of numbers, stays on the CPU: signatures, BM25, the projection.

MEMORY = "TREEMEM_GPU_MEMORY"
"""Environment variable: how many bytes of GPU memory a tree may take; nine tenths of what is free by default."""

SOURCE = Path(__file__).with_name("walk.cu")
THREADS = 256
_COLUMNS = 15  # of the table of levels; walk.cu names them
_SLICE = 16_384  # rows that one block of exact search compares with one query
_KEPT = 1 << 28  # most bytes of what the blocks of one launch of exact search keep
_raising = threading.Lock()


def why_not() -> str | None:
    """Why this back end cannot be used here; None where it can."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed: pip install cupy-cuda13x, or cupy-cuda12x for CUDA 12"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no NVIDIA GPU ({error}): use the kernels for the CPU, TREEMEM_KERNELS=cpu"
    return None if count else "there is no NVIDIA GPU: use the kernels for the CPU, TREEMEM_KERNELS=cpu"


@cache
def _cupy() -> Any:
    reason = why_not()
    if reason is not None:
        raise InputError(reason)
    import cupy

    return cupy


@cache
def _kernel(name: str) -> Any:
    module = _cupy().RawModule(code=SOURCE.read_text("utf-8"), options=("--std=c++14",))
    return module.get_function(name)


def _launch(name: str, grid: tuple[int, int], shared: int, arguments: tuple[Any, ...]) -> None:
    kernel = _kernel(name)
    if shared > 48 << 10:  # more has to be asked for
        most = _cupy().cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
        if shared > most:
            needs = f"beam, k and fanout need {shared} bytes of the {most} that a GPU block has"
            raise InputError(f"{needs}: use smaller ones, or the kernels for the CPU")
        with _raising:  # another thread's launch may need more than this one's
            kernel.max_dynamic_shared_size_bytes = max(kernel.max_dynamic_shared_size_bytes, shared)
    kernel(grid, (THREADS,), arguments, shared_mem=shared)


def _shared_bytes(embeddings: int, pieces: int, keys: int = 0, room: int = 0, slots: int = 0, beam: int = 0) -> int:
    """What `lay_out` in walk.cu lays out."""
    walked = 64 * pieces * embeddings + 4 * keys + 8 * beam if beam else 0
    return walked + embeddings * (128 * pieces + 12) + 8 * keys + 16 * room + 4 * slots + 4 * (2 * beam + 1) + 4 * 9


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _held(array: Any) -> Any:
    """What lives on the GPU as CuPy's, without a copy."""
    cupy = _cupy()
    return cupy.asarray(array) if hasattr(array, "__cuda_array_interface__") else cupy.from_dlpack(array)


def _given(tree: ServingTree, queries: Any, *, levels: bool) -> tuple[Any, bool]:
    """Queries as contiguous float32 on the GPU, checked, and whether they came from there."""
    cupy = _cupy()
    if not lives_on_gpu(queries):
        return cupy.asarray(checked_queries(tree, queries, levels=levels)), False
    held = cupy.ascontiguousarray(_held(queries), np.float32)
    checked_queries(tree, np.broadcast_to(np.float32(0), held.shape), levels=levels)  # the shape alone
    if not bool(cupy.isfinite(held).all()):
        raise ModelError("a query is not finite: the encoder or a ranker gave NaN or infinity")
    return held, True


def _returned(arrays: list[Any], on_gpu: bool) -> list[Any]:
    return arrays if on_gpu else [_cupy().asnumpy(array) for array in arrays]


@dataclass(frozen=True, eq=False)
class _Placed:
    """A checked tree on the GPU: addresses as walk.cu reads them, and what they point to."""

    table: NDArray[np.int64]
    most: NDArray[np.int64]
    """[depth, 3] of each level how many parents, the largest number of children, how many entries."""
    arrays: list[Any]
    pinned: int
    """How many bytes lie in the host's memory."""

    def capacity(self, beam: int) -> int:
        """How many entries a walk can meet at any level."""
        parents, children, entries = self.most.T
        return int(np.minimum(np.minimum(beam, parents) * children, entries).max())


_trees: WeakKeyDictionary[ServingTree, _Placed] = WeakKeyDictionary()
_words: WeakKeyDictionary[LexicalIndex, tuple[Any, ...]] = WeakKeyDictionary()


class _Budget:
    """Puts arrays on the GPU as long as they fit, the rest into pinned memory."""

    def __init__(self, bytes_: int) -> None:
        self.left, self.pinned, self.arrays = bytes_, 0, list[Any]()

    def put(self, array: NDArray[Any]) -> int:
        """The array's address as the GPU sees it."""
        cupy = _cupy()
        if array.nbytes <= self.left:
            held = cupy.asarray(np.ascontiguousarray(array))
            self.left -= array.nbytes
            self.arrays.append(held)
            return int(held.data.ptr)
        memory = cupy.cuda.alloc_pinned_memory(max(array.nbytes, 1))
        np.frombuffer(memory, np.uint8, array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.pinned += array.nbytes
        self.arrays.append(memory)
        return int(memory.ptr)  # one address space: the GPU reads it over the bus


def _budget() -> int:
    value = os.environ.get(MEMORY)
    if value is None:
        return int(0.9 * _cupy().cuda.runtime.memGetInfo()[0])
    if not value.isdecimal():
        raise InputError(f"{MEMORY} = {value!r}: it must be a number of bytes")
    return int(value)


def place(tree: ServingTree, memory: int | None = None) -> int:
    """Put a tree on the GPU, unless it is there.

    `memory`: how many bytes it may take there, see `MEMORY`. Returns how many bytes stayed in the host's pinned memory.
    Raises DamagedMemory where the tree is damaged, InputError where there is no GPU.
    """
    return _placed(tree, memory).pinned


def _placed(tree: ServingTree, memory: int | None = None) -> _Placed:
    placed = _trees.get(tree)
    if placed is None:
        _cupy()
        tree.check()  # kernels do not look at bounds
        budget = _Budget(_budget() if memory is None else memory)
        table = np.zeros((tree.depth, _COLUMNS), np.int64)
        # What every query reads comes first: a level's upper halves before its rows, upper levels before lower ones.
        for line, blocks in zip(table, tree.levels, strict=True):
            line[2:6] = [budget.put(a) for a in (blocks.upper, blocks.upper_scales, blocks.ids, blocks.offsets)]
            line[:2] = [budget.put(a) for a in (blocks.rows, blocks.scales)]
        most = [[len(b.offsets) - 1, np.diff(b.offsets).max(initial=0), len(b.ids)] for b in tree.levels]
        placed = _trees[tree] = _Placed(table, np.array(most, np.int64), budget.arrays, budget.pinned)
    return placed


def _table(placed: _Placed, masks: Masks | None, signatures_: NDArray[np.int64] | None) -> tuple[Any, list[Any]]:
    """The table of levels with masks and signatures, on the GPU, and what must live as long."""
    cupy = _cupy()
    table = placed.table.copy()
    held: list[Any] = []
    if masks is not None:
        held = [cupy.asarray(mask) for mask in masks]
        table[:, 6] = [mask.data.ptr for mask in held]
    if signatures_ is not None:
        table[:, 7:] = signatures_
    return cupy.asarray(table), held


def _placed_words(tree: ServingTree, words: Words) -> tuple[Any, ...]:
    """What a memory knows of words, on the GPU: the table's columns, and the forward index."""
    known = _words.get(words.index)
    if known is None or known[0] is not tree or known[1] is not words.signatures:
        words.index.check()
        budget = _Budget(_budget())
        columns = np.zeros((tree.depth, 8), np.int64)
        for line, own, blocks in zip(columns, words.signatures, tree.levels, strict=True):
            own.check(blocks.offsets)
            arrays = (own.offsets, own.terms, own.bases, own.starts, own.slots, own.values)
            line[:6] = [budget.put(array) for array in arrays]
            line[6:] = own.starts.itemsize, own.slots.itemsize
        index = words.index
        addresses = [budget.put(array) for array in (index.offsets, index.terms, index.counts, index.norms)]
        known = _words[index] = (tree, words.signatures, columns, addresses, index.counts.itemsize, budget.arrays)
    return known


def search(
    tree: ServingTree,
    queries: Any,
    beam: int,
    k: int,
    *,
    words: Words | None = None,
    beside: int = 0,
    ends: NDArray[np.int64] | None = None,
    allowed: Masks | None = None,
) -> Found:
    """`reference.search` on the GPU. Raises InputError where beam, k and fanout are too large for a block, too."""
    cupy, placed = _cupy(), _placed(tree)
    queries, on_gpu = _given(tree, queries, levels=True)
    masks = checked_masks(tree, allowed)
    check_at_least_1("beam", beam)
    check_at_least_1("k", k)
    depth, batch, embeddings, dimension = queries.shape
    ends = checked_ends(tree, beside, ends)
    checked_words(tree, words, batch)
    chunks = tree.sizes[-1]
    k = min(k, chunks)
    twice = (refined(beam), refined(max(k, beam if beside else 1)))
    pieces, capacity = -(-dimension // 64), placed.capacity(beam)
    # Neighbours, each once, and places that threads have taken and not used.
    near = min(2 * beside * min(beam, capacity), chunks + THREADS)
    room = capacity + near
    keys = _power_of_two(max(min(twice[0], capacity), min(twice[1], capacity) + near))
    slots = _power_of_two(room + room // 4 + 1)
    null = np.uint64(0)
    columns, asked, held_words = None, (null, null, null, np.float32(0), null, null, null, np.int32(1), null), None
    if words is not None:
        held_words = _placed_words(tree, words)
        _, _, columns, (of_chunks, terms, counts, norms), width, _ = held_words
        given = [cupy.asarray(a) for a in (words.offsets, words.terms, words.weights)]
        weight = np.float32(words.weight)
        asked = (*given, weight, *map(np.uint64, (of_chunks, terms, counts)), np.int32(width), np.uint64(norms))
    table, held_masks = _table(placed, masks, columns)
    documents = null if ends is None else cupy.asarray(ends)
    nodes = cupy.empty((depth - 1, batch, beam), np.int32)
    node_scores = cupy.empty(nodes.shape, np.float32)
    ids, parents = (cupy.empty((batch, k), np.int32) for _ in range(2))
    scores, cosines, sums = (cupy.empty((batch, k), np.float32) for _ in range(3))
    best, scored = cupy.empty(batch, np.float32), cupy.empty(batch, np.int64)
    if batch:
        numbers = (batch, embeddings, beam, k, *twice, keys, room, slots, beside)
        arguments = (
            *(table, np.int32(depth), np.int32(pieces), np.int32(dimension), queries),
            *map(np.int32, numbers),
            *(documents, np.int32(0 if ends is None else len(ends)), np.int64(chunks)),
            *asked,
            *(nodes, node_scores, ids, scores, cosines, sums, parents, best, scored),
        )
        _launch("walk", (batch, 1), _shared_bytes(embeddings, pieces, keys, room, slots, beam), arguments)
    del held_masks, held_words  # CuPy frees in the order of the stream
    found = [nodes, node_scores, ids, scores, cosines, sums, parents, best, scored]
    return Found(*_returned(found, on_gpu))


def exact(tree: ServingTree, queries: Any, k: int, allowed: Masks | None = None) -> tuple[Any, Any]:
    """`reference.exact` on the GPU. Raises InputError where k is too large for a block, too."""
    cupy, placed = _cupy(), _placed(tree)
    queries, on_gpu = _given(tree, queries, levels=False)
    masks = checked_masks(tree, allowed)
    check_at_least_1("k", k)
    batch, embeddings, dimension = queries.shape
    size = tree.sizes[-1]
    k = min(k, size)
    ids, scores = cupy.full((batch, k), -1, np.int32), cupy.full((batch, k), -np.inf, np.float32)
    if batch and k:
        table, held = _table(placed, masks, None)
        pieces, sorted_, slices = -(-dimension // 64), _power_of_two(max(2 * k, 1024)), -(-size // _SLICE)
        for start, end in _parts(batch, slices * k * 8):
            kept = cupy.empty((end - start, slices, k), np.uint64)
            numbers = (np.int32(pieces), np.int32(dimension), np.int64(size), np.int64(_SLICE))
            asked = (queries[start:end], np.int32(embeddings), np.int32(k), np.int32(sorted_), kept)
            shared = _shared_bytes(embeddings, pieces, sorted_)
            _launch("scan", (end - start, slices), shared, (table[-1], *numbers, *asked))
            keys = cupy.sort(kept.reshape(end - start, -1), axis=1)[:, :k]
            there = keys != np.uint64(2**64 - 1)
            ids[start:end] = cupy.where(there, (keys & np.uint64(2**32 - 1)).astype(np.uint32).view(np.int32), -1)
            ordered = ~((keys >> np.uint64(32)).astype(np.uint32) ^ np.uint32(1 << 31)).view(np.int32)
            bits = ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))
            scores[start:end] = cupy.where(there, bits.view(np.float32), np.float32(-np.inf))
        del held
    one, other = _returned([ids, scores], on_gpu)
    return one, other


def _parts(count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Slices of range(count) whose results take at most `_KEPT` bytes."""
    step = max(1, _KEPT // max(1, bytes_each))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def score_chunks(tree: ServingTree, queries: Any, ids: Any) -> Any:
    """`reference.score_chunks` on the GPU."""
    cupy, placed = _cupy(), _placed(tree)
    queries, on_gpu = _given(tree, queries, levels=False)
    batch, embeddings, dimension = queries.shape
    given = cupy.asnumpy(_held(ids)) if lives_on_gpu(ids) else ids
    chunks = cupy.asarray(checked_chunks(given, tree.sizes[-1], (batch, -1)))
    scores = cupy.empty(chunks.shape, np.float32)
    if scores.size:
        table, _ = _table(placed, None, None)
        pieces, count = -(-dimension // 64), chunks.shape[1]
        numbers = (np.int32(pieces), np.int32(dimension))
        asked = (queries, np.int32(embeddings), chunks, np.int32(count), scores)
        _launch("score", (batch, 1), _shared_bytes(embeddings, pieces), (table[-1], *numbers, *asked))
    return _returned([scores], on_gpu)[0]


def quantise(vectors: Any) -> tuple[Any, Any]:
    """`reference.quantise` on the GPU; vectors on the GPU give rows and scales there."""
    cupy = _cupy()
    on_gpu = lives_on_gpu(vectors)
    held = cupy.ascontiguousarray(_held(vectors) if on_gpu else cupy.asarray(vectors), np.float32)
    if held.ndim != 2:
        raise InputError(f"vectors of shape {held.shape}: expected [n, d]")
    count, dimension = held.shape
    if not 1 <= dimension <= MAX_DIMENSION:
        raise ModelError(f"vectors of dimension {dimension}: use an encoder of 1 to {MAX_DIMENSION}")
    if not bool(cupy.isfinite(held).all()):
        row, component = (int(i) for i in cupy.asnumpy(cupy.argwhere(~cupy.isfinite(held))[0]))
        raise ModelError(f"a vector is not finite (row {row}, component {component})")
    rows, scales = cupy.empty(held.shape, np.int8), cupy.empty(count, np.float32)
    if count:
        blocks = -(-count // (THREADS // 32))
        _launch("quantise", (blocks, 1), 0, (held, np.int64(count), np.int32(dimension), rows, scales))
    one, other = _returned([rows, scales], on_gpu)
    return one, other
