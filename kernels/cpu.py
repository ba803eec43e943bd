"""The kernels for CPUs, compiled by numba; `reference.py` says what they compute.

One walk of one query is one compiled call. Batches are cut into slices, each run by a thread without the interpreter
lock: a query's answer never depends on its neighbours, so neither batch size nor thread count can change it. Plain
threads instead of numba's `prange`, because that one's OpenMP layer kills forked children and its fallback aborts the
process when two threads call it at once; both happen in servers.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numba
import numpy as np
from llvmlite import ir
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numpy.typing import NDArray

from treemem.errors import InputError
from treemem.kernels.reference import (
    COARSE_STEPS,
    QUERY_STEPS,
    STEP,
    TINY,
    Masks,
    check_at_least_1,
    checked_chunks,
    checked_ends,
    checked_factors,
    checked_masks,
    checked_queries,
    checked_terms,
    checked_words,
    refined,
    signature_kinds,
)
from treemem.kernels.tree import Found, LexicalIndex, ServingTree, Signatures, Words

THREADS = "TREEMEM_THREADS"
"""Environment variable: how many threads share a batch; as many as there are cores by default."""

_AHEAD = 24  # rows asked for before they are scored
_LINE = 64  # bytes that memory hands out at once
_BLOCK = 512  # rows that exact search compares with every query while they are in the cache
_NO_KEY = np.iinfo(np.int64).max  # worse than any key

# Columns of the table that describes a tree to compiled code, one line per level.
_ROWS, _SCALES, _UPPER, _UPPER_SCALES, _IDS, _OFFSETS, _ENTRIES, _PARENTS, _SIZE, _LARGEST, _PAGED = range(11)

_Ints = NDArray[np.int64]
_Ids = NDArray[np.int32]
_Floats = NDArray[np.float32]
_Int8s = NDArray[np.int8]
_Int16s = NDArray[np.int16]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def search(
    tree: ServingTree,
    queries: NDArray[np.float32],
    beam: int,
    k: int,
    *,
    words: Words | None = None,
    beside: int = 0,
    ends: NDArray[np.int64] | None = None,
    allowed: Masks | None = None,
) -> Found:
    """`reference.search`, compiled."""
    prepared = _prepare(tree)
    queries = checked_queries(tree, queries, levels=True)
    masks = checked_masks(tree, allowed)
    check_at_least_1("beam", beam)
    check_at_least_1("k", k)
    depth, batch = queries.shape[:2]
    ends = checked_ends(tree, beside, ends)
    checked_words(tree, words, batch)
    k = min(k, tree.sizes[-1])
    nodes = np.empty((depth - 1, batch, beam), np.int32)
    node_scores = np.empty(nodes.shape, np.float32)
    ids, values = np.empty((2, batch, k), np.int32), np.empty((3, batch, k), np.float32)
    best, scored = np.empty(batch, np.float32), np.empty(batch, np.int64)
    near = min(2 * beside * beam, tree.sizes[-1])
    twice = np.array([refined(beam), refined(max(k, beam if beside else 1))])
    asked = _NO_WORDS if words is None else _asked(tree, words)
    given = (prepared.table, _addresses(masks, depth), _readonly(queries), beam, k, twice)
    rooms = (prepared.capacity(beam), near)
    documents = (_readonly(_NO_ENDS if ends is None else ends), beside)
    results: Any = (nodes, node_scores, ids, values, best, scored)

    def run(start: int, end: int) -> None:
        _search_slice(*given, *rooms, *documents, *asked, start, end, *results)

    _in_slices(run, batch, least=8)
    return Found(nodes, node_scores, ids[0], values[0], values[1], values[2], ids[1], best, scored)


def signatures(
    offsets: NDArray[np.int64],
    ids: NDArray[np.int32],
    child_offsets: NDArray[np.int64],
    child_terms: NDArray[np.int32],
    child_shares: NDArray[np.uint8],
    child_values: NDArray[np.uint8],
) -> tuple[Signatures, NDArray[np.uint8]]:
    """`reference.signatures`, compiled."""
    start_kind, slot_kind = signature_kinds(offsets, ids, child_offsets)
    entries = int(np.diff(child_offsets)[ids].sum())
    slots, starts = np.empty(entries, slot_kind), np.empty(entries, start_kind)
    terms, values, largest = np.empty(entries, np.int32), np.empty(entries, np.uint8), np.empty(entries, np.uint8)
    own, bases = np.zeros(len(offsets), np.int64), np.zeros(len(offsets), np.int64)
    below = (_readonly(offsets), _readonly(ids), _readonly(child_offsets), _readonly(child_terms))
    of_child = (_readonly(child_shares), _readonly(child_values))
    count = _signatures(*below, *of_child, own, terms, bases, starts, slots, values, largest)
    made = Signatures(own, terms[:count].copy(), bases, starts[:count].copy(), slots, values)
    return made, largest[:count].copy()


def exact(
    tree: ServingTree, queries: NDArray[np.float32], k: int, allowed: Masks | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """`reference.exact`, compiled."""
    prepared = _prepare(tree)
    queries = checked_queries(tree, queries, levels=False)
    masks = checked_masks(tree, allowed)
    check_at_least_1("k", k)
    k = min(k, tree.sizes[-1])
    line = prepared.table[-1]
    mask = _addresses(masks, tree.depth)[-1]
    kept: list[NDArray[np.int64]] = []  # the best keys of each slice of the rows

    def scan(start: int, end: int) -> None:
        keys = np.full((len(queries), k), _NO_KEY)
        _exact_slice(line, mask, _readonly(queries), start, end, keys)
        kept.append(keys)

    _in_slices(scan, int(line[_SIZE]), least=4096)
    keys = np.sort(np.concatenate(kept, axis=1), axis=1)[:, :k]
    ids = np.where(keys == _NO_KEY, -1, keys & 0xFFFFFFFF).astype(np.int32)
    ordered = ~(keys >> 32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).astype(np.int32).view(np.float32)
    return ids, np.where(ids < 0, np.float32(-np.inf), scores)


def score_chunks(tree: ServingTree, queries: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """`reference.score_chunks`, compiled."""
    prepared = _prepare(tree)
    queries = checked_queries(tree, queries, levels=False)
    ids = checked_chunks(ids, tree.sizes[-1], (len(queries), -1))
    scores = np.empty(ids.shape, np.float32)
    arguments = (prepared.table[-1], _readonly(queries), _readonly(ids))
    _in_slices(lambda start, end: _score_slice(*arguments, start, end, scores), len(queries), least=8)
    return scores


def project(
    diagonal: NDArray[np.float32], rows: NDArray[np.int8], scales: NDArray[np.float32], queries: NDArray[np.float32]
) -> NDArray[np.float32]:
    """`reference.project`, compiled."""
    queries = checked_factors(diagonal, rows, scales, queries)
    out = np.empty(queries.shape, np.float32)
    given = _readonly(diagonal), _readonly(rows), _readonly(scales), _readonly(queries)
    _in_slices(lambda start, end: _project_slice(*given, start, end, out), len(queries), least=32)
    return out


def bm25_all(index: LexicalIndex, terms: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """`reference.bm25_all`, compiled."""
    return bm25_scores(index, terms, weights, np.arange(index.size, dtype=np.int32))


def bm25_scores(
    index: LexicalIndex, terms: NDArray[np.int32], weights: NDArray[np.float32], chunks: NDArray[np.int32]
) -> NDArray[np.float32]:
    """`reference.bm25_scores`, compiled."""
    if index not in _checked:
        index.check()
        _checked[index] = True
    terms, weights = checked_terms(terms, weights)
    chunks = checked_chunks(chunks, index.size, (-1,))
    scores = np.empty(len(chunks), np.float32)
    stored = (_readonly(index.offsets), _readonly(index.terms), _readonly(index.counts), _readonly(index.norms))
    asked = (_readonly(terms), _readonly(weights), _readonly(chunks))
    _in_slices(lambda start, end: _bm25_slice(*stored, *asked, start, end, scores), len(chunks), least=16384)
    return scores


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A checked tree as compiled code takes it: by address, so that one compilation serves every depth."""

    table: NDArray[np.int64]
    arrays: tuple[NDArray[Any], ...]  # keeps what the addresses point to
    capacities: dict[int, int] = field(default_factory=dict)

    def capacity(self, beam: int) -> int:
        """How many rows a walk can meet at any level."""
        if beam not in self.capacities:
            most = np.minimum(beam, self.table[:, _PARENTS]) * self.table[:, _LARGEST]
            self.capacities[beam] = int(np.minimum(most, self.table[:, _ENTRIES]).max())
        return self.capacities[beam]


_trees: WeakKeyDictionary[ServingTree, _Prepared] = WeakKeyDictionary()
_checked: WeakKeyDictionary[LexicalIndex, bool] = WeakKeyDictionary()


def _prepare(tree: ServingTree) -> _Prepared:
    prepared = _trees.get(tree)
    if prepared is None:
        tree.check()  # compiled code does not look at bounds
        table = np.zeros((tree.depth, 11), np.int64)
        table[:, _PAGED] = tree.paged
        arrays: list[NDArray[Any]] = []
        for line, blocks, size in zip(table, tree.levels, tree.sizes, strict=True):
            own = (blocks.rows, blocks.scales, blocks.upper, blocks.upper_scales, blocks.ids, blocks.offsets)
            arrays += own
            line[_ROWS : _OFFSETS + 1] = [_address(array) for array in own]
            line[_ENTRIES], line[_PARENTS], line[_SIZE] = len(blocks.ids), len(blocks.offsets) - 1, size
            line[_LARGEST] = np.diff(blocks.offsets).max(initial=0)
        prepared = _trees[tree] = _Prepared(table, tuple(arrays))
    return prepared


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _addresses(masks: Masks | None, depth: int) -> NDArray[np.int64]:
    if masks is None:
        return np.zeros(depth, np.int64)
    return np.array([_address(mask) for mask in masks], np.int64)


def _readonly(array: NDArray[Any]) -> NDArray[Any]:
    """A view that cannot be written: memory maps and arrays then share one compilation."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


_NO_ENDS = np.empty(0, np.int64)
_Asked = tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any]
_NO_WORDS: _Asked = (
    np.empty((0, 9), np.int64),
    _readonly(np.empty(0, np.int64)),
    _readonly(np.empty(0, np.int32)),
    _readonly(np.empty(0, np.uint16)),
    _readonly(np.empty(0, np.float32)),
    _readonly(np.empty(0, np.int64)),
    _readonly(np.empty(0, np.int32)),
    _readonly(np.empty(0, np.float32)),
    np.float32(0),
)
"""What compiled code takes where a search is by vectors alone."""


@dataclass(frozen=True, eq=False)
class _Stored:
    """An index with its signatures, checked against a tree, as compiled code takes them."""

    tree: ServingTree
    signatures: tuple[Signatures, ...]
    table: NDArray[np.int64]
    arrays: tuple[Any, Any, Any, Any]


_stored: WeakKeyDictionary[LexicalIndex, _Stored] = WeakKeyDictionary()


def _asked(tree: ServingTree, words: Words) -> _Asked:
    """Words as compiled code takes them."""
    index = words.index
    stored = _stored.get(index)
    if stored is None or stored.tree is not tree or stored.signatures is not words.signatures:
        index.check()
        table = np.zeros((len(words.signatures), 9), np.int64)
        for line, own, blocks in zip(table, words.signatures, tree.levels, strict=True):
            own.check(blocks.offsets)
            arrays = (own.offsets, own.terms, own.bases, own.starts, own.slots, own.values)
            line[:6] = [_address(array) for array in arrays]
            line[6:] = own.starts.itemsize, own.slots.itemsize, len(own.terms)
        offsets, terms, counts, norms = map(_readonly, (index.offsets, index.terms, index.counts, index.norms))
        stored = _stored[index] = _Stored(tree, words.signatures, table, (offsets, terms, counts, norms))
    given = _readonly(words.offsets), _readonly(words.terms), _readonly(words.weights)
    return stored.table, *stored.arrays, *given, np.float32(words.weight)


def _threads() -> int:
    value = os.environ.get(THREADS)
    if value is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{THREADS} = {value!r}: it must be a whole number from 1")
    return int(value)


def _in_slices(work: Callable[[int, int], None], count: int, least: int) -> None:
    """Call `work(start, end)` for slices of range(count), by threads where each gets at least `least`."""
    pieces = min(_threads(), count // least) if count >= 2 * least else 1
    if pieces == 1:
        work(0, count)
        return
    bounds = [count * piece // pieces for piece in range(pieces + 1)]
    # Made anew each time, because threads do not survive a fork; 0.1 ms beside some milliseconds of work.
    with ThreadPoolExecutor(pieces) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def _compiled(function: _Function) -> _Function:
    # NumPy's error model: a division that cannot fail must not be guarded by a branch.
    return cast(_Function, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def _pointer(kind: Any) -> Any:
    """A compiled function that turns an address into a pointer to `kind`."""

    @intrinsic
    def pointer(_: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


_int8_at, _uint8_at, _int32_at = _pointer(types.int8), _pointer(types.uint8), _pointer(types.int32)


def _prefetching(_: Any, address: Any) -> Any:
    """A compiled function that asks for the cache line at an address without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # For reading, to be kept in all caches, of data.
        builder.call(function, [builder.inttoptr(arguments[0], byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _advising(_: Any, address: Any, size: Any) -> Any:
    """A compiled function that asks the system to read what of a file is mapped there, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, size = arguments
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(number, [byte, address.type, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "madvise")
        begin = builder.and_(address, address.type(-mmap.PAGESIZE))
        length = builder.sub(builder.add(address, size), begin)
        builder.call(function, [builder.inttoptr(begin, byte), length, number(mmap.MADV_WILLNEED)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


_prefetch: Any = intrinsic(_prefetching)
_advise: Any = intrinsic(_advising)
_uint16_at, _int64_at, _float32_at = _pointer(types.uint16), _pointer(types.int64), _pointer(types.float32)


def _byte_products() -> bool:
    """Whether what numba compiles for has AVX-512 VNNI: this machine, unless NUMBA_CPU_NAME or _FEATURES say other."""
    given = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    features = (get_host_cpu_features() if given is None else given).split(",")
    return "+avx512vnni" in features and "+avx512vl" in features


_BYTE_PRODUCTS = _byte_products()


def _dotting(_: Any, row: Any, query: Any, pieces: Any) -> Any:
    """A compiled function: the sum of `half * query` over pieces of 64 components, for a row's upper halves.

    It is built from LLVM's vectors since the loop written out in Python is not vectorised. With AVX-512 VNNI a piece is
    one load, vpand and vgf2p8affineqb (the two halves; vpsrlw and vpand where there is no GFNI), and 2 x vpdpbusd (32
    products with the query, added in fours to int32), on 256-bit registers, as seen on Zen 4 in the assembly of
    `_meet`. Elsewhere the halves and the query are widened to int16, multiplied and added
    (vpmullw and vpaddw on x86-64), 16 products of at most 15 * 127 in a lane before the lanes go over to int32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, query, pieces = arguments
        lanes, most = 32, 8
        counter = ir.IntType(64)
        packed, short, wide = (ir.VectorType(ir.IntType(bits), lanes) for bits in (8, 16, 32))
        eight = ir.VectorType(ir.IntType(32), 8)

        def constant(kind: Any, value: int) -> Any:
            return ir.Constant(kind, [value] * kind.count)

        def load(address: Any, offset: int) -> Any:
            place = builder.inttoptr(builder.add(address, counter(offset)), packed.as_pointer())
            return builder.load(place, align=1)

        def total_of(vector: Any) -> Any:
            kind = ir.FunctionType(ir.IntType(32), [vector.type])
            name = f"llvm.vector.reduce.add.v{vector.type.count}i32"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [vector])

        def by_bytes() -> Any:
            kind = ir.FunctionType(eight, [eight, eight, eight])
            add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.256")
            # Four sums side by side: an addition waits four cycles for the one before it.
            totals = [cgutils.alloca_once_value(builder, constant(eight, 0)) for _ in range(4)]
            for total in totals:
                builder.store(constant(eight, 0), total)

            def add_piece(piece: Any, pair: int) -> None:
                both = load(builder.add(row, builder.mul(piece, counter(lanes))), 0)
                at = builder.add(query, builder.mul(piece, counter(2 * lanes)))
                halves = (builder.and_(both, constant(packed, 15)), builder.lshr(both, constant(packed, 4)))
                for half, offset, total in zip(halves, (0, lanes), totals[2 * pair :], strict=False):
                    given = (builder.bitcast(half, eight), builder.bitcast(load(at, offset), eight))
                    builder.store(builder.call(add, [builder.load(total), *given]), total)

            with cgutils.for_range(builder, builder.lshr(pieces, counter(1))) as loop:
                first = builder.shl(loop.index, counter(1))
                add_piece(first, 0)
                add_piece(builder.add(first, counter(1)), 1)
            with builder.if_then(builder.trunc(pieces, ir.IntType(1))):
                add_piece(builder.sub(pieces, counter(1)), 0)
            left, right, third, last = (builder.load(total) for total in totals)
            return total_of(builder.add(builder.add(left, right), builder.add(third, last)))

        def by_words() -> Any:
            total = cgutils.alloca_once_value(builder, constant(wide, 0))
            builder.store(constant(wide, 0), total)
            part = cgutils.alloca_once_value(builder, constant(short, 0))
            groups = builder.udiv(builder.add(pieces, counter(most - 1)), counter(most))
            with cgutils.for_range(builder, groups) as group:
                first = builder.mul(group.index, counter(most))
                left = builder.sub(pieces, first)
                count = builder.select(builder.icmp_unsigned("<", left, counter(most)), left, counter(most))
                builder.store(constant(short, 0), part)
                with cgutils.for_range(builder, count) as loop:
                    piece = builder.add(first, loop.index)
                    both = load(builder.add(row, builder.mul(piece, counter(lanes))), 0)
                    at = builder.add(query, builder.mul(piece, counter(2 * lanes)))
                    halves = (builder.and_(both, constant(packed, 15)), builder.lshr(both, constant(packed, 4)))
                    for half, offset in zip(halves, (0, lanes), strict=True):
                        product = builder.mul(builder.zext(half, short), builder.sext(load(at, offset), short))
                        builder.store(builder.add(builder.load(part), product), part)
                builder.store(builder.add(builder.load(total), builder.sext(builder.load(part), wide)), total)
            return total_of(builder.load(total))

        return by_bytes() if _BYTE_PRODUCTS else by_words()

    return types.int32(types.int64, types.int64, types.int64), generate


_dot_of_upper: Any = intrinsic(_dotting)


@_compiled
def _quantise_query(query: _Floats, out: _Int8s | _Int16s, steps: int) -> np.float32:
    """Write [d] float32 as integers and return the scale; what is left of `out` becomes 0."""
    out[len(query) :] = 0
    peak = np.float32(0)
    for i in range(len(query)):
        peak = max(peak, abs(query[i]))
    if peak <= np.float32(TINY):
        out[:] = 0
        return np.float32(0)
    scale = peak / np.float32(steps)
    for i in range(len(query)):
        out[i] = np.int16(np.rint(query[i] / scale))
    return scale


@_compiled
def _prefetch_row(rows: int, scales: int, row: int, width: int) -> None:
    """Ask for a row of `width` bytes, and its scale."""
    start = rows + row * width
    for byte in range(0, width, _LINE):
        _prefetch(start + byte)
    _prefetch(scales + 4 * row)


@_compiled
def _score_rows(line: _Ints, rows: _Ints, q16: _Int16s, q_scales: _Floats, scores: _Floats) -> None:
    """Score a list of rows for the embeddings of one query.

    Every sum is cut back to int32 because numba computes in int64 otherwise, which LLVM can only vectorise with
    vpmuldq, three times slower. As it stands, LLVM gives, per 64 components, 4 x (vpmovsxbw: 16 int8 to int16;
    vpmaddwd: 16 products with the query, added in pairs) on 256-bit and vpaddd on 512-bit registers (seen on Zen 4 in
    the assembly of `_search_slice`): 22 ns for 384 components in the cache (`benchmarks/ceilings.py`).
    Two accumulators by hand made it slower. Called once per list of rows, since a call per row cost as much as the row.
    """
    embeddings, dimension = q16.shape
    matrix = carray(_int8_at(line[_ROWS]), (line[_SIZE], dimension))
    scales = carray(_float32_at(line[_SCALES]), line[_SIZE])
    for i in range(min(_AHEAD, len(rows))):
        _prefetch_row(line[_ROWS], line[_SCALES], rows[i], dimension)
    for i in range(len(rows)):
        row = rows[i]
        if i + _AHEAD < len(rows):
            _prefetch_row(line[_ROWS], line[_SCALES], rows[i + _AHEAD], dimension)
        best = np.float32(-np.inf)
        for m in range(embeddings):
            dot = np.int32(0)
            for j in range(dimension):
                dot = np.int32(dot + np.int32(matrix[row, j]) * np.int32(q16[m, j]))
            best = max(best, q_scales[m] * scales[row] * np.float32(dot))
        scores[i] = best + np.float32(0)


@_compiled
def _key(score: np.float32, element: np.int32) -> np.int64:
    """Score and id as one int64 whose rising order is the order of results: higher scores first, then smaller ids."""
    bits = np.int64(np.float32(score).view(np.int32))
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # rises with the score, as a signed number
    return (~ordered << 32) | np.int64(element)


@_compiled
def _score_of(key: np.int64) -> np.float32:
    ordered = ~(key >> 32)
    return np.int32(ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32)


@_compiled
def _sink(heap: _Ints, place: int, size: int) -> None:
    """Move a key of a heap, largest first, down to where it belongs."""
    key = heap[place]
    child = 2 * place + 1
    while child < size:
        if child + 1 < size and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= key:
            break
        heap[place] = heap[child]
        place, child = child, 2 * child + 1
    heap[place] = key


@_compiled
def _heap_of_best(keys: _Ints, count: int, heap: _Ints) -> int:
    """Put the smallest of `count` keys into `heap`, the largest of them first; return how many."""
    size = min(count, len(heap))
    heap[:size] = keys[:size]
    for place in range(size // 2 - 1, -1, -1):
        _sink(heap, place, size)
    for i in range(size, count):
        if keys[i] < heap[0]:
            heap[0] = keys[i]
            _sink(heap, 0, size)
    return size


@_compiled
def _keep_best(keys: _Ints, count: int, heap: _Ints) -> int:
    """Put the smallest of `count` keys into `heap` in rising order; return how many."""
    size = _heap_of_best(keys, count, heap)
    for end in range(size - 1, 0, -1):
        heap[0], heap[end] = heap[end], heap[0]
        _sink(heap, 0, end)
    return size


@_compiled
def _is_new(table: _Ids, element: np.int32) -> bool:
    """Enter an element into an open-addressing table (a power of two long, -1 = free); False if it stood there."""
    last = len(table) - 1
    slot = (np.int64(element) * 2654435761 >> 12) & last
    while table[slot] != -1:
        if table[slot] == element:
            return False
        slot = (slot + 1) & last
    table[slot] = element
    return True


@_compiled
def _meet(
    line: _Ints,
    mask_address: int,
    frontier: _Ids,
    query: _Floats,
    q8: _Int8s,
    q_scales: _Floats,
    shifts: _Ids,
    block_sums: _Floats,
    best: np.float32,
    weight: np.float32,
    table: _Ids,
    heap: _Ints,
    ids: _Ids,
    owners: _Ids,
    sums: _Floats,
    keys: _Ints,
) -> tuple[int, int]:
    """List the elements below the frontier that are to be scored by their rows; return how many, and how many were met.

    All, where there are no more than `heap` is long; else the best so many by their upper halves: the hot loop. It is
    memory that it waits for: what the next block holds is asked for while this one is scored, since a block of some 30
    is too short for the processor's own guesses.

    `shifts`: room for what -120 of every component adds to a product with each of the query's embeddings.
    `block_sums`: the words' shares of the rows below the frontier, in its order; empty without words.
    `table`: for dropping repeated elements; empty where every element stands once.
    """
    embeddings, padded = q8.shape
    pieces, width = padded // 64, padded // 2
    offsets = carray(_int64_at(line[_OFFSETS]), line[_PARENTS] + 1)
    elements = carray(_int32_at(line[_IDS]), line[_ENTRIES])
    scales = carray(_float32_at(line[_UPPER_SCALES]), line[_ENTRIES])
    mask = carray(_uint8_at(mask_address), line[_SIZE])
    table[:] = -1
    total = 0
    for parent in frontier:
        total += offsets[parent + 1] - offsets[parent]
    coarse = total > len(heap)
    if coarse:
        heap[:] = _NO_KEY
        for m in range(embeddings):
            q_scales[m] = _quantise_query(query[m], q8[m], COARSE_STEPS)
            shift = np.int32(0)
            for j in range(padded):
                shift -= np.int32(120) * np.int32(q8[m, j])
            shifts[m] = shift
    # Looked up once: the compiler cannot know that nothing written below is one of them.
    upper, upper_scales, words_given = line[_UPPER], line[_UPPER_SCALES], len(block_sums) > 0
    address, scale, shift = q8.ctypes.data, q_scales[0], shifts[0]
    threshold = _NO_KEY
    if line[_PAGED] and coarse:
        for parent in frontier:
            first, below = offsets[parent], offsets[parent + 1] - offsets[parent]
            _advise(upper + first * width, below * width)
            _advise(upper_scales + 4 * first, 4 * below)
            _advise(line[_IDS] + 4 * first, 4 * below)
    place, count, met = -1, 0, 0
    for f in range(len(frontier)):
        parent = frontier[f]
        ahead, last = 0, 0
        if f + 1 < len(frontier):
            ahead, last = offsets[frontier[f + 1]], offsets[frontier[f + 1] + 1]
        for entry in range(ahead, last, _LINE // 4):
            _prefetch(line[_IDS] + 4 * entry)
        for entry in range(offsets[parent], offsets[parent + 1]):
            place += 1
            if coarse and ahead < last:
                _prefetch_row(upper, upper_scales, ahead, width)
                ahead += 1
            element = elements[entry]
            if mask_address != 0 and mask[element] == 0:
                continue
            met += 1
            own = block_sums[place] if words_given else np.float32(0)
            if coarse:
                row = upper + entry * width
                dot = np.int32(16 * _dot_of_upper(row, address, pieces) + shift)
                score = scale * scales[entry] * np.float32(dot)
                for m in range(1, embeddings):
                    dot = np.int32(16 * _dot_of_upper(row, address + m * padded, pieces) + shifts[m])
                    score = max(score, q_scales[m] * scales[entry] * np.float32(dot))
                key = _key(_combined(score + np.float32(0), own, best, weight), element)
                if key >= threshold:
                    continue
                keys[count] = key
            if len(table) > 0 and not _is_new(table, element):
                continue
            if coarse:
                heap[0] = keys[count]
                _sink(heap, 0, len(heap))
                threshold = heap[0]
            ids[count], owners[count], sums[count] = element, parent, own
            count += 1
    if not coarse:
        return count, met
    kept = 0
    for i in range(count):
        if keys[i] <= threshold:
            ids[kept], owners[kept], sums[kept] = ids[i], owners[i], sums[i]
            kept += 1
    return kept, met


@_compiled
def _find(terms: _Ids, low: int, end: int, term: np.int32) -> int:
    """Where a term stands among rising ones, -1 where it does not; by bisection."""
    length = end - low
    while length > 1:
        half = length >> 1
        low += half * (terms[low + half - 1] < term)
        length -= half
    return low if length == 1 and terms[low] == term else -1


@_compiled
def _bm25(
    chunk: np.int32,
    offsets: _Ints,
    terms: _Ids,
    counts: NDArray[np.uint8] | NDArray[np.uint16],
    norms: _Floats,
    query: _Ids,
    weights: _Floats,
) -> np.float32:
    total = np.float32(0)
    for t in range(len(query)):
        place = _find(terms, offsets[chunk], offsets[chunk + 1], query[t])
        if place >= 0:
            count = np.float32(counts[place])
            total += weights[t] * (count / (count + norms[chunk]))
    return total


@_compiled
def _find_all(terms: _Ids, address: int, offsets: _Ints, frontier: _Ids, query: _Ids, low: _Ints, left: _Ints) -> None:
    """Find every term among those of every parent: `low` gets its place, -1 where it does not stand; [parents, terms].

    All searches take their steps together, and what a step will read is asked for one round before: one after the
    other they would wait for memory at almost every step. `left` is for what remains of each.
    """
    for parent in frontier:
        _prefetch(offsets.ctypes.data + 8 * parent)
    longest = np.int64(0)
    count = len(query)
    for f in range(len(frontier)):
        first, last = offsets[frontier[f]], offsets[frontier[f] + 1]
        longest = max(longest, last - first)
        for t in range(count):
            low[f * count + t], left[f * count + t] = first, last - first
        _prefetch(address + 4 * (first + ((last - first) >> 1)))
    searches = len(frontier) * count
    while longest > 1:
        for place in range(searches):
            half = left[place] >> 1
            if half == 0:
                continue
            low[place] += half * (terms[low[place] + half - 1] < query[place % count])
            left[place] -= half
            _prefetch(address + 4 * (low[place] + (left[place] >> 1)))
        longest -= longest >> 1
    for place in range(searches):
        if left[place] == 0 or terms[low[place]] != query[place % count]:
            low[place] = -1


@_compiled
def _word_sums(
    line: _Ints,
    own: _Ints,
    norms: _Floats,
    frontier: _Ids,
    query: _Ids,
    weights: _Floats,
    sums: _Floats,
    places: _Ints,
    ends: _Ints,
) -> int:
    """Sum the words' shares of all rows below the frontier, in its order, masked ones included; return how many.

    `own`: the level's signatures as `_asked` lists them. `norms`: of the chunks; empty at a level of nodes. `places`,
    `ends`: room for a number per parent and term. Whatever is read far from the last is asked for in the pass before.
    """
    children = carray(_int64_at(line[_OFFSETS]), line[_PARENTS] + 1)
    ids = carray(_int32_at(line[_IDS]), line[_ENTRIES])
    offsets, bases = carray(_int64_at(own[0]), line[_PARENTS] + 1), carray(_int64_at(own[2]), line[_PARENTS] + 1)
    terms, entries = carray(_int32_at(own[1]), own[8]), bases[line[_PARENTS]]
    short_starts, long_starts = carray(_uint16_at(own[3]), own[8]), carray(_int32_at(own[3]), own[8])
    short_slots, long_slots = carray(_uint8_at(own[4]), entries), carray(_uint16_at(own[4]), entries)
    values = carray(_uint8_at(own[5]), entries)
    count = len(query)
    for parent in frontier:
        _prefetch(own[2] + 8 * parent)
        _prefetch(line[_OFFSETS] + 8 * parent)
    _find_all(terms, own[1], offsets, frontier, query, places, ends)
    for place in range(len(frontier) * count):
        if places[place] >= 0:
            _prefetch(own[3] + own[6] * places[place])
            _prefetch(own[3] + own[6] * (places[place] + 1))
    for f in range(len(frontier)):
        parent = frontier[f]
        last, most = offsets[parent + 1], bases[parent + 1] - bases[parent]
        for t in range(count):
            place = places[f * count + t]
            if place < 0:
                continue
            start, end = np.int64(0), most
            if own[6] == 2:
                start = np.int64(short_starts[place])
                end = np.int64(short_starts[place + 1]) if place + 1 < last else end
            else:
                start = np.int64(long_starts[place])
                end = np.int64(long_starts[place + 1]) if place + 1 < last else end
            # From here on where the entries lie; a damaged file's stay within the block.
            places[f * count + t] = bases[parent] + min(max(start, 0), most)
            ends[f * count + t] = bases[parent] + min(max(end, 0), most)
            _prefetch(own[4] + own[7] * places[f * count + t])
            _prefetch(own[5] + places[f * count + t])
    if len(norms) > 0:
        for f in range(len(frontier)):
            first, below = children[frontier[f]], children[frontier[f] + 1] - children[frontier[f]]
            for t in range(count):
                place = f * count + t
                for entry in range(max(places[place], 0), ends[place] if places[place] >= 0 else 0):
                    slot = np.int64(short_slots[entry]) if own[7] == 1 else np.int64(long_slots[entry])
                    if slot < below:
                        _prefetch(norms.ctypes.data + 4 * np.int64(ids[first + slot]))
    base = 0
    for f in range(len(frontier)):
        first, below = children[frontier[f]], children[frontier[f] + 1] - children[frontier[f]]
        sums[base : base + below] = 0
        for t in range(count):
            place = f * count + t
            if places[place] < 0:
                continue
            for entry in range(places[place], ends[place]):
                slot = np.int64(short_slots[entry]) if own[7] == 1 else np.int64(long_slots[entry])
                if slot >= below:
                    continue  # a damaged file
                share = np.float32(values[entry])
                share = share / (share + norms[ids[first + slot]]) if len(norms) > 0 else share * STEP
                sums[base + slot] += weights[t] * share
        base += below
    return base


@_compiled
def _largest_below(line: _Ints, mask_address: int, frontier: _Ids, block_sums: _Floats) -> np.float32:
    """The largest sum of the rows below the frontier that are not masked."""
    offsets = carray(_int64_at(line[_OFFSETS]), line[_PARENTS] + 1)
    elements = carray(_int32_at(line[_IDS]), line[_ENTRIES])
    mask = carray(_uint8_at(mask_address), line[_SIZE])
    best, place = np.float32(0), 0
    for parent in frontier:
        for entry in range(offsets[parent], offsets[parent + 1]):
            if mask_address == 0 or mask[elements[entry]] != 0:
                best = max(best, block_sums[place])
            place += 1
    return best


@_compiled
def _largest(values: _Floats, count: int) -> np.float32:
    best = np.float32(0)
    for i in range(count):
        best = max(best, values[i])
    return best


@_compiled
def _combined(cosine: np.float32, own: np.float32, best: np.float32, weight: np.float32) -> np.float32:
    if weight == 0 or best <= 0:
        return cosine
    return cosine + weight * own / best


@_compiled
def _search_slice(
    levels: _Ints,
    masks: _Ints,
    queries: _Floats,
    beam: int,
    k: int,
    twice: _Ints,
    capacity: int,
    near: int,
    ends: _Ints,
    beside: int,
    signature_table: _Ints,
    word_offsets: _Ints,
    word_terms: _Ids,
    word_counts: NDArray[np.uint8] | NDArray[np.uint16],
    norms: _Floats,
    query_offsets: _Ints,
    query_terms: _Ids,
    query_weights: _Floats,
    weight: np.float32,
    first: int,
    last: int,
    nodes: _Ids,
    node_scores: _Floats,
    chunks: _Ids,
    values: _Floats,
    best_sums: _Floats,
    scored: _Ints,
) -> None:
    """Search for the queries `first` to `last`; all memory that they need is taken here, once."""
    depth, _, embeddings, dimension = queries.shape
    q16, q_scales = np.empty((embeddings, dimension), np.int16), np.empty(embeddings, np.float32)
    q8, shifts = np.empty((embeddings, 64 * -(-dimension // 64)), np.int8), np.empty(embeddings, np.int32)
    room = capacity + near
    rows, keys, places = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    owners, ids = np.empty(room, np.int32), np.empty(room, np.int32)
    cosines, sums, block_sums = np.empty(room, np.float32), np.zeros(room, np.float32), np.empty(capacity, np.float32)
    heap, frontier = np.empty(twice.max(), np.int64), np.zeros(beam, np.int32)
    slots = 1
    while slots < 2 * room:
        slots *= 2
    table = np.empty(slots, np.int32)
    with_words = len(query_offsets) > 0
    query, weights = query_terms[:0], query_weights[:0]
    longest = 0
    for b in range(first, last if with_words else first):
        longest = max(longest, query_offsets[b + 1] - query_offsets[b])
    found, found_ends = np.empty(beam * longest, np.int64), np.empty(beam * longest, np.int64)
    for b in range(first, last):
        if with_words:
            query = query_terms[query_offsets[b] : query_offsets[b + 1]]
            weights = query_weights[query_offsets[b] : query_offsets[b + 1]]
        frontier[0] = 0
        width = 1
        scored[b] = 0
        count = 0
        for level in range(depth):
            line = levels[level]
            at_chunks = level == depth - 1
            used = table if at_chunks else table[:0]
            below = 0
            best = np.float32(0)
            if with_words:
                own_norms = norms if at_chunks else norms[:0]
                own = signature_table[level]
                below = _word_sums(
                    line, own, own_norms, frontier[:width], query, weights, block_sums, found, found_ends
                )
                best = _largest_below(line, masks[level], frontier[:width], block_sums)
            count, met = _meet(
                line,
                masks[level],
                frontier[:width],
                queries[level, b],
                q8,
                q_scales,
                shifts,
                block_sums[:below],
                best,
                weight,
                used,
                heap[: twice[1] if at_chunks else twice[0]],
                ids,
                owners,
                sums,
                keys,
            )
            scored[b] += met
            for m in range(embeddings):
                q_scales[m] = _quantise_query(queries[level, b, m], q16[m], QUERY_STEPS)
            for i in range(count):
                rows[i] = ids[i]
                if line[_PAGED]:
                    _advise(line[_ROWS] + rows[i] * dimension, dimension)
            _score_rows(line, rows[:count], q16, q_scales, cosines)
            for i in range(count):
                keys[i] = _key(_combined(cosines[i], sums[i], best, weight), ids[i])
            best_sums[b] = best
            if at_chunks:
                break
            width = _keep_best(keys, count, heap[:beam])
            for i in range(width):
                frontier[i] = heap[i] & 0xFFFFFFFF
                nodes[level, b, i], node_scores[level, b, i] = frontier[i], _score_of(heap[i])
            nodes[level, b, width:] = -1
            node_scores[level, b, width:] = -np.inf
        line = levels[depth - 1]
        if beside > 0:
            walked = count
            table[:] = -1
            for i in range(walked):
                _is_new(table, ids[i])
            mask = carray(_uint8_at(masks[depth - 1]), line[_SIZE])
            for i in range(_keep_best(keys, walked, heap[:beam])):
                chunk = heap[i] & 0xFFFFFFFF
                document = np.searchsorted(ends, chunk, side="right")
                if document == len(ends):
                    continue  # ends that do not rise
                start = max(chunk - beside, ends[document - 1] if document > 0 else 0, 0)
                for other in range(start, min(chunk + beside + 1, ends[document], line[_SIZE])):
                    if masks[depth - 1] != 0 and mask[other] == 0:
                        continue
                    if _is_new(table, np.int32(other)):
                        ids[count], rows[count], owners[count] = other, other, -1
                        count += 1
            _score_rows(line, rows[walked:count], q16, q_scales, cosines[walked:])
            scored[b] += count - walked
            if with_words:
                for i in range(walked, count):
                    sums[i] = _bm25(ids[i], word_offsets, word_terms, word_counts, norms, query, weights)
                best_sums[b] = max(best_sums[b], _largest(sums[walked:], count - walked))
            for i in range(count):
                keys[i] = _key(_combined(cosines[i], sums[i], best_sums[b], weight), ids[i])
        places[:count] = keys[:count]
        width = _keep_best(keys, count, heap[:k])
        chunks[:, b] = -1
        values[:2, b] = -np.inf
        values[2, b] = 0
        if width == 0:
            continue
        worst = heap[width - 1]
        for i in range(count):
            if places[i] <= worst:
                place = np.searchsorted(heap[:width], places[i])
                chunks[0, b, place], chunks[1, b, place] = ids[i], owners[i] if depth > 1 else -1
                values[0, b, place], values[1, b, place] = _score_of(places[i]), cosines[i]
                values[2, b, place] = sums[i]


@_compiled
def _signatures(
    offsets: _Ints,
    ids: _Ids,
    child_offsets: _Ints,
    child_terms: _Ids,
    child_shares: NDArray[np.uint8],
    child_values: NDArray[np.uint8],
    own: _Ints,
    terms: _Ids,
    bases: _Ints,
    starts: NDArray[np.uint16] | _Ids,
    slots: NDArray[np.uint8] | NDArray[np.uint16],
    values: NDArray[np.uint8],
    largest: NDArray[np.uint8],
) -> int:
    """Fill the arrays of `reference.signatures`; return how many terms there are."""
    most = np.int64(0)
    for parent in range(len(offsets) - 1):
        count = np.int64(0)
        for row in range(offsets[parent], offsets[parent + 1]):
            count += child_offsets[ids[row] + 1] - child_offsets[ids[row]]
        most = max(most, count)
    keys = np.empty(most, np.int64)
    found = np.int64(0)
    written = np.int64(0)
    for parent in range(len(offsets) - 1):
        count = np.int64(0)
        for row in range(offsets[parent], offsets[parent + 1]):
            for place in range(child_offsets[ids[row]], child_offsets[ids[row] + 1]):
                # Term, slot, share and value in one number: 31, 16, 8 and 8 bits.
                keys[count] = (
                    (np.int64(child_terms[place]) << 32)
                    | ((row - offsets[parent]) << 16)
                    | (np.int64(child_shares[place]) << 8)
                    | child_values[place]
                )
                count += 1
        keys[:count].sort()
        term = np.int64(-1)
        for i in range(count):
            if keys[i] >> 32 != term:
                term = keys[i] >> 32
                terms[found], starts[found], largest[found] = term, written - bases[parent], 0
                found += 1
            slots[written], values[written] = (keys[i] >> 16) & 0xFFFF, keys[i] & 0xFF
            largest[found - 1] = max(largest[found - 1], (keys[i] >> 8) & 0xFF)
            written += 1
        own[parent + 1], bases[parent + 1] = found, written
    return int(found)


@_compiled
def _exact_slice(line: _Ints, mask_address: int, queries: _Floats, first: int, last: int, heaps: _Ints) -> None:
    """Compare the chunks `first` to `last` with all queries; keep each query's smallest keys.

    `heaps`: [B, k], full of worst keys.
    """
    batch, embeddings, dimension = queries.shape
    mask = carray(_uint8_at(mask_address), line[_SIZE])
    q16, q_scales = np.empty((batch, embeddings, dimension), np.int16), np.empty((batch, embeddings), np.float32)
    for b in range(batch):
        for m in range(embeddings):
            q_scales[b, m] = _quantise_query(queries[b, m], q16[b, m], QUERY_STEPS)
    if heaps.shape[1] == 0:
        return
    rows, scores = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.float32)
    start = first
    while start < last:
        count = 0
        while start < last and count < _BLOCK:
            if mask_address == 0 or mask[start] != 0:
                rows[count] = start
                count += 1
            start += 1
        for b in range(batch):
            heap = heaps[b]
            _score_rows(line, rows[:count], q16[b], q_scales[b], scores)
            for i in range(count):
                key = _key(scores[i], np.int32(rows[i]))
                if key < heap[0]:
                    heap[0] = key
                    _sink(heap, 0, len(heap))


@_compiled
def _score_slice(line: _Ints, queries: _Floats, ids: _Ids, first: int, last: int, scores: _Floats) -> None:
    """Score the given chunks of the queries `first` to `last`."""
    _, embeddings, dimension = queries.shape
    q16, q_scales = np.empty((embeddings, dimension), np.int16), np.empty(embeddings, np.float32)
    rows, places = np.empty(ids.shape[1], np.int64), np.empty(ids.shape[1], np.int64)
    dense = np.empty(ids.shape[1], np.float32)
    for b in range(first, last):
        for m in range(embeddings):
            q_scales[m] = _quantise_query(queries[b, m], q16[m], QUERY_STEPS)
        count = 0
        for i in range(ids.shape[1]):
            if ids[b, i] >= 0:
                rows[count], places[count] = ids[b, i], i
                count += 1
        _score_rows(line, rows[:count], q16, q_scales, dense)
        scores[b] = -np.inf
        for i in range(count):
            scores[b, places[i]] = dense[i]


@_compiled
def _project_slice(
    diagonal: _Floats, rows: _Int8s, scales: _Floats, queries: _Floats, first: int, last: int, out: _Floats
) -> None:
    """Project the queries `first` to `last`."""
    dimension = len(diagonal)
    q16 = np.empty(dimension, np.int16)
    for b in range(first, last):
        scale = _quantise_query(queries[b], q16, QUERY_STEPS)
        squares = 0.0
        for i in range(dimension):
            dot = np.int32(0)
            for j in range(dimension):
                dot = np.int32(dot + np.int32(rows[i, j]) * np.int32(q16[j]))
            out[b, i] = queries[b, i] * diagonal[i] + scale * scales[i] * np.float32(dot)
            squares += np.float64(out[b, i]) ** 2
        norm = max(np.sqrt(squares), TINY)
        for i in range(dimension):
            out[b, i] = out[b, i] / norm


@_compiled
def _bm25_slice(
    offsets: _Ints,
    terms: _Ids,
    counts: NDArray[np.uint8] | NDArray[np.uint16],
    norms: _Floats,
    query: _Ids,
    weights: _Floats,
    chunks: _Ids,
    first: int,
    last: int,
    scores: _Floats,
) -> None:
    """Score the chunks `chunks[first:last]`; each query term is looked up by bisection."""
    for i in range(first, last):
        scores[i] = np.float32(0)
        if chunks[i] >= 0:
            scores[i] = _bm25(chunks[i], offsets, terms, counts, norms, query, weights)
