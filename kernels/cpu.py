"""The kernels for CPUs, compiled by numba; `reference.py` says what they compute.

One walk of one query is one compiled call. Batches are cut into slices, each run by a thread without the interpreter
lock: a query's answer never depends on its neighbours, so neither batch size nor thread count can change it. Plain
threads instead of numba's `prange`, because that one's OpenMP layer kills forked children and its fallback aborts the
process when two threads call it at once; both happen in servers.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Thread
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
_MANY = 64  # walks after which a process is taken to go on walking
_POPULATE = 22  # MADV_POPULATE_READ, since Linux 5.14; refused before
_GAP = 16 << 10  # bytes between two places of a file below which both are read as one
_LINE = 64  # bytes that memory hands out at once
_SOME = 64  # rows that are scored for all embeddings of a query while they are in the innermost cache
_BLOCK = 512  # rows that exact search compares with every query while they are in the cache
_FEW = 192  # keys that are ranked by comparing each with each
_NO_KEY = np.iinfo(np.int64).max  # worse than any key
_MASKED = np.int32(np.iinfo(np.int32).max)  # worse than the order of any score

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
    prepared.walked(batch)
    k = min(k, tree.sizes[-1])
    nodes = np.empty((depth - 1, batch, beam), np.int32)
    node_scores = np.empty(nodes.shape, np.float32)
    ids, values = np.empty((2, batch, k), np.int32), np.empty((3, batch, k), np.float32)
    best, scored = np.empty(batch, np.float32), np.empty(batch, np.int64)
    near = min(2 * beside * beam, tree.sizes[-1])
    twice = refined(beam), refined(max(k, beam if beside else 1))
    asked = _NO_WORDS if words is None else _asked(tree, words)
    given = (prepared.table, _addresses(masks, depth), _readonly(queries), beam, k, *twice)
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
    rows = np.ascontiguousarray(rows, np.int8)
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
    to_come: list[int] = field(default_factory=lambda: [_MANY])  # walks before all pages are mapped

    def walked(self, queries: int) -> None:
        """Count walks; where there are many, have the pages of all files mapped at once.

        Else the first thousand walks of a process meet pages that are not, and wait for the system to map them.
        """
        if self.to_come[0] > 0:
            self.to_come[0] -= queries
            if self.to_come[0] <= 0 and not self.table[:, _PAGED].any():
                Thread(target=_map_pages, args=(self.arrays,), daemon=True).start()

    def capacity(self, beam: int) -> int:
        """How many rows a walk can meet at any level."""
        if beam not in self.capacities:
            most = np.minimum(beam, self.table[:, _PARENTS]) * self.table[:, _LARGEST]
            self.capacities[beam] = int(np.minimum(most, self.table[:, _ENTRIES]).max())
        return self.capacities[beam]


def _map_pages(arrays: tuple[NDArray[Any], ...]) -> None:
    """Have the system read what is not in memory yet, and enter all pages into its table; where it knows how to."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    for array in arrays:
        address = _address(array)
        begin = address - address % mmap.PAGESIZE
        library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + array.nbytes - begin), _POPULATE)


_trees: WeakKeyDictionary[ServingTree, _Prepared] = WeakKeyDictionary()
_checked: WeakKeyDictionary[LexicalIndex, bool] = WeakKeyDictionary()


def _prepare(tree: ServingTree) -> _Prepared:
    prepared = _trees.get(tree)
    if prepared is None:
        tree.check()  # compiled code does not look at bounds
        table = np.zeros((tree.depth, 11), np.int64)
        arrays: list[NDArray[Any]] = []
        for line, blocks, size in zip(table, tree.levels, tree.sizes, strict=True):
            own = (blocks.rows, blocks.scales, blocks.upper, blocks.upper_scales, blocks.ids, blocks.offsets)
            arrays += own
            line[_ROWS : _OFFSETS + 1] = [_address(array) for array in own]
            line[_ENTRIES], line[_PARENTS], line[_SIZE] = len(blocks.ids), len(blocks.offsets) - 1, size
            line[_LARGEST] = np.diff(blocks.offsets).max(initial=0)
        table[:, _PAGED] = tree.paged_levels
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
    if type(array) is np.ndarray and not array.flags.writeable:
        return array
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


def _copying(_: Any, to: Any, source: Any, size: Any) -> Any:
    """A compiled function that copies bytes from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, source, size = arguments
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, byte, size.type, ir.IntType(1)])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.memcpy.p0.p0.i64")
        places = builder.inttoptr(to, byte), builder.inttoptr(source, byte)
        builder.call(function, [*places, size, ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


_prefetch: Any = intrinsic(_prefetching)
_copy: Any = intrinsic(_copying)
_advise: Any = intrinsic(_advising)

_uint16_at, _int64_at, _float32_at = _pointer(types.uint16), _pointer(types.int64), _pointer(types.float32)
_int16_at = _pointer(types.int16)


@_compiled
def _advise_spans(address: int, width: int, begins: _Ints, ends: _Ints) -> None:
    """Ask the system to read rows `begins[i]` to `ends[i]` of an array, rising.

    What lies close together is asked for as one: a disk takes as long for one page as for a few.
    """
    first = 0
    for i in range(1, len(begins) + 1):
        if i == len(begins) or (begins[i] - ends[i - 1]) * width > _GAP:
            _advise(address + begins[first] * width, (ends[i - 1] - begins[first]) * width)
            first = i


def _byte_products() -> bool:
    """Whether what numba compiles for has AVX-512 VNNI: this machine, unless NUMBA_CPU_NAME or _FEATURES say other."""
    given = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    features = (get_host_cpu_features() if given is None else given).split(",")
    return "+avx512vnni" in features and "+avx512vl" in features


_BYTE_PRODUCTS = _byte_products()


def _load(builder: Any, kind: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _called(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A call of one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _fours_by_bytes(builder: Any, rows: Any, query: Any, size: Any, dots: Any, *, whole: bool) -> None:
    """The products of four rows with a query, by AVX-512 VNNI; see `_upper_products` and `_row_products`.

    Taken together, so that a piece of the query is loaded once for the four, and their sums are added up at once. A
    piece of a row is one load, vpand and vgf2p8affineqb (its two halves; vpsrlw and vpand where there is no GFNI) or,
    of a whole row, vpxor, and 2 x vpdpbusd (32 products with the query, added in fours to int32), on 256-bit registers.
    """
    counter, number = ir.IntType(64), ir.IntType(32)
    packed, eight = ir.VectorType(ir.IntType(8), 32), ir.VectorType(number, 8)

    def constant(kind: Any, value: int) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    def picked(one: Any, other: Any, *places: int) -> Any:
        return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(number, len(places)), list(places)))

    # Two sums a row: an addition waits some cycles for the one before it.
    totals = [[cgutils.alloca_once_value(builder, constant(eight, 0)) for _ in range(2)] for _ in rows]
    for total in (one for pair in totals for one in pair):
        builder.store(constant(eight, 0), total)

    def add_piece(piece: Any, load: Callable[[Any], Any]) -> None:
        start = builder.mul(piece, counter(32))
        at = builder.add(query, builder.mul(piece, counter(64)))
        asked = [_load(builder, eight, builder.add(at, counter(offset))) for offset in (0, 32)]
        for row, pair in zip(rows, totals, strict=True):
            values = load(builder.add(row, start))
            if whole:
                unsigned = builder.xor(values, constant(packed, 0x80))  # the value + 128
                factors = [unsigned, unsigned]
            else:
                factors = [builder.and_(values, constant(packed, 15)), builder.lshr(values, constant(packed, 4))]
            for total, factor, part in zip(pair, factors, asked, strict=True):
                given = builder.load(total), builder.bitcast(factor, eight), part
                builder.store(_called(builder, "llvm.x86.avx512.vpdpbusd.256", eight, *given), total)

    pieces = builder.udiv(size, counter(32)) if whole else size
    with cgutils.for_range(builder, pieces) as loop:
        add_piece(loop.index, lambda address: _load(builder, packed, address))
    if whole:
        left = builder.urem(size, counter(32))
        with builder.if_then(builder.icmp_unsigned("!=", left, counter(0))):
            # Nothing behind a row is read, which may be the last one.
            lanes = builder.insert_element(
                ir.Constant(packed, ir.Undefined), builder.trunc(left, ir.IntType(8)), number(0)
            )
            lanes = builder.shuffle_vector(lanes, lanes, constant(ir.VectorType(number, 32), 0))
            mask = builder.icmp_unsigned("<", ir.Constant(packed, list(range(32))), lanes)

            def masked(address: Any) -> Any:
                place = builder.inttoptr(address, packed.as_pointer())
                return _called(
                    builder, "llvm.masked.load.v32i8.p0", packed, place, number(1), mask, constant(packed, 0)
                )

            add_piece(pieces, masked)
    sums = []
    for pair in totals:
        first, second = map(builder.load, pair)
        sums.append(builder.add(builder.shl(first, constant(eight, 7)) if whole else first, second))
    low, high = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
    twos = [builder.add(picked(*two, *low), picked(*two, *high)) for two in (sums[:2], sums[2:])]
    low, high = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
    fours = builder.add(picked(*twos, *low), picked(*twos, *high))
    four = builder.add(picked(fours, fours, 0, 1, 2, 3), picked(fours, fours, 4, 5, 6, 7))
    builder.store(four, builder.inttoptr(dots, four.type.as_pointer()), align=4)


def _upper_by_words(builder: Any, row: Any, query: Any, pieces: Any) -> Any:
    """The product of a row's upper halves with a query where there is no AVX-512 VNNI.

    The halves and the query are widened to int16, multiplied and added (vpmullw and vpaddw on x86-64), 16 products of
    at most 15 * 127 in a lane before the lanes go over to int32.
    """
    lanes, most = 32, 8
    counter = ir.IntType(64)
    packed, short, wide = (ir.VectorType(ir.IntType(bits), lanes) for bits in (8, 16, 32))

    def constant(kind: Any, value: int) -> Any:
        return ir.Constant(kind, [value] * kind.count)

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
            both = _load(builder, packed, builder.add(row, builder.mul(piece, counter(lanes))))
            at = builder.add(query, builder.mul(piece, counter(2 * lanes)))
            halves = (builder.and_(both, constant(packed, 15)), builder.lshr(both, constant(packed, 4)))
            for half, offset in zip(halves, (0, lanes), strict=True):
                asked = builder.sext(_load(builder, packed, builder.add(at, counter(offset))), short)
                product = builder.mul(builder.zext(half, short), asked)
                builder.store(builder.add(builder.load(part), product), part)
        builder.store(builder.add(builder.load(total), builder.sext(builder.load(part), wide)), total)
    return _called(builder, f"llvm.vector.reduce.add.v{lanes}i32", ir.IntType(32), builder.load(total))


_FOURS = types.void(*[types.int64] * 7)


def _multiplying_upper(_: Any, one: Any, two: Any, three: Any, four: Any, query: Any, pieces: Any, dots: Any) -> Any:
    """A compiled function: the sums of `half * query` of four rows' upper halves, as int32 at `dots`.

    All by address. `query`: int8, in the order of the rows' components. `pieces`: of 64 components. It is built from
    LLVM's vectors since the loop written out in Python is not vectorised.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *rows, query, pieces, dots = arguments
        if _BYTE_PRODUCTS:
            _fours_by_bytes(builder, rows, query, pieces, dots, whole=False)
        else:
            for i, row in enumerate(rows):
                place = builder.inttoptr(builder.add(dots, ir.IntType(64)(4 * i)), ir.IntType(32).as_pointer())
                builder.store(_upper_by_words(builder, row, query, pieces), place, align=4)
        return context.get_dummy_value()

    return _FOURS, generate


def _multiplying_rows(_: Any, one: Any, two: Any, three: Any, four: Any, query: Any, dimension: Any, dots: Any) -> Any:
    """A compiled function: the sums of `(value + 128) * query` of four whole rows, as int32 at `dots`, by AVX-512 VNNI.

    All by address. `query`: as `_laid_out` writes it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *rows, query, dimension, dots = arguments
        _fours_by_bytes(builder, rows, query, dimension, dots, whole=True)
        return context.get_dummy_value()

    return _FOURS, generate


@_compiled
def _rows_by_words(one: int, two: int, three: int, four: int, query: int, dimension: int, dots: int) -> None:
    """`_multiplying_rows` where there is no AVX-512 VNNI: the sums of `value * query`, the query in int16.

    Every sum is cut back to int32 because numba computes in int64 otherwise, which LLVM can only vectorise with
    vpmuldq, three times slower. As it stands, LLVM gives, per 64 components, 4 x (vpmovsxbw: 16 int8 to int16;
    vpmaddwd: 16 products with the query, added in pairs) and vpaddd (seen on Zen 4).
    """
    asked = carray(_int16_at(query), dimension)
    sums = carray(_int32_at(dots), 4)
    for i in range(4):
        row = carray(_int8_at(one if i == 0 else two if i == 1 else three if i == 2 else four), dimension)
        dot = np.int32(0)
        for j in range(dimension):
            dot = np.int32(dot + np.int32(row[j]) * np.int32(asked[j]))
        sums[i] = dot


_upper_products: Any = intrinsic(_multiplying_upper)
_row_products: Any = intrinsic(_multiplying_rows) if _BYTE_PRODUCTS else _rows_by_words


@_compiled
def _peak(query: _Floats) -> np.float32:
    """The largest magnitude; by the bits, whose order is that of the magnitudes, since these LLVM vectorises."""
    most = np.int32(0)
    bits = query.view(np.int32)
    for i in range(len(bits)):
        most = max(most, np.int32(bits[i] & 0x7FFFFFFF))
    return np.int32(most).view(np.float32)


@_compiled
def _quantise_query(query: _Floats, out: _Int8s | _Int16s, steps: int) -> np.float32:
    """Write [d] float32 as integers and return the scale; what is left of `out` becomes 0."""
    out[len(query) :] = 0
    peak = _peak(query)
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
def _laid_out(q16: _Int16s, asked: _Int8s) -> np.int32:
    """Write a query in int16 as `_row_products` takes it; return what is to be added to each product.

    For products of bytes, q = 128 * upper + lower, in pieces of 32 components: the upper ones, then the lower ones.
    """
    if not _BYTE_PRODUCTS:
        asked.view(np.int16)[:] = q16
        return np.int32(0)
    total = np.int32(0)
    for i in range(len(q16)):
        total += np.int32(q16[i])
    for piece in range(len(asked) // 64):
        upper, lower = asked[64 * piece : 64 * piece + 32], asked[64 * piece + 32 : 64 * piece + 64]
        for j in range(32):
            value = q16[32 * piece + j]
            rest = np.int16(np.int16(np.int16(value + 64) & 127) - 64)
            upper[j], lower[j] = np.int16(value - rest) >> 7, rest
    return np.int32(-128 * total)


@_compiled
def _ask(queries: _Floats, q16: _Int16s, asked: _Int8s, q_scales: _Floats, shifts: _Ids) -> None:
    """Prepare the embeddings of one query, [M, d], for `_score_rows`."""
    for m in range(len(queries)):
        q_scales[m] = _quantise_query(queries[m], q16, QUERY_STEPS)
        shifts[m] = _laid_out(q16, asked[m])


@_compiled
def _score_rows(
    line: _Ints,
    rows: _Ints,
    dimension: int,
    asked: _Int8s,
    q_scales: _Floats,
    shifts: _Ids,
    dots: _Ids,
    scores: _Floats,
) -> None:
    """Score a list of rows for the embeddings of one query, as `_ask` prepares them; `dots` has room for `_SOME`."""
    start, last = line[_ROWS], len(rows) - 1
    scales = carray(_float32_at(line[_SCALES]), line[_SIZE])
    for i in range(min(_AHEAD, len(rows))):
        _prefetch_row(start, line[_SCALES], rows[i], dimension)
    for first in range(0, len(rows), _SOME):
        count = min(_SOME, len(rows) - first)
        for m in range(len(asked)):
            for i in range(first, first + count, 4):
                if m == 0:
                    for ahead in range(i + _AHEAD, min(i + _AHEAD + 4, len(rows))):
                        _prefetch_row(start, line[_SCALES], rows[ahead], dimension)
                _row_products(
                    start + rows[i] * dimension,
                    start + rows[min(i + 1, last)] * dimension,
                    start + rows[min(i + 2, last)] * dimension,
                    start + rows[min(i + 3, last)] * dimension,
                    asked.ctypes.data + m * asked.shape[1],
                    dimension,
                    dots.ctypes.data + 4 * (i - first),
                )
            for i in range(count):
                dot = np.float32(np.int32(dots[i] + shifts[m]))
                score = q_scales[m] * scales[rows[first + i]] * dot + np.float32(0)
                scores[first + i] = score if m == 0 else max(scores[first + i], score)


@_compiled
def _order(score: np.float32) -> np.int32:
    """A score as an int32 that falls where the score rises."""
    bits = np.float32(score).view(np.int32)
    return np.int32(~(bits ^ (np.int32(bits >> 31) & np.int32(0x7FFFFFFF))))


@_compiled
def _key(score: np.float32, element: np.int32) -> np.int64:
    """Score and id as one int64 whose rising order is the order of results: higher scores first, then smaller ids."""
    return (np.int64(_order(score)) << 32) | np.int64(element)


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
def _keep_best(keys: _Ints, count: int, best: _Ints) -> int:
    """Put the smallest of `count` keys, no two of which are equal, into `best` in rising order; return how many."""
    size = min(count, len(best))
    if size == 0:
        return 0
    if size <= _FEW and count <= 8 * size:
        # Compared with all others, a key finds its place without a branch that the processor could guess wrongly.
        bound = _bound_of_best(keys[:count], size, size)
        for i in range(count):
            if keys[i] <= bound:
                rank = np.int64(0)
                for j in range(count):
                    rank += keys[j] < keys[i]
                best[rank] = keys[i]
        return size
    best[:size] = keys[:size]
    for place in range(size // 2 - 1, -1, -1):
        _sink(best, place, size)
    for i in range(size, count):
        if keys[i] < best[0]:
            best[0] = keys[i]
            _sink(best, 0, size)
    for end in range(size - 1, 0, -1):
        best[0], best[end] = best[end], best[0]
        _sink(best, 0, end)
    return size


@_compiled
def _bound_of_best(keys: _Ints | _Ids, wanted: int, enough: int) -> np.int64 | np.int32:
    """A key that at least `wanted` are not above, and no more than `enough` where no two are equal; by bisection.

    Counting all keys several times, in vectors, is quicker than a heap's branches.
    """
    kind = keys.dtype.type
    low, high = keys[0], keys[0]
    for i in range(len(keys)):
        low, high = min(low, keys[i]), max(high, keys[i])
    while low < high:
        middle = kind((low >> 1) + (high >> 1) + (low & high & 1))
        count = np.int32(0)
        for i in range(len(keys)):
            count = np.int32(count + (keys[i] <= middle))
        if count >= wanted:
            high = middle
            if count <= enough:
                break
        else:
            low = kind(middle + 1)
    return high


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
def _emptied(table: _Ids, count: int) -> _Ids:
    """As much of a table as so many elements need, emptied."""
    slots = 1
    while slots < 2 * count:
        slots *= 2
    table[:slots] = -1
    return table[:slots]


@_compiled
def _prefetch_block(line: _Ints, parent: int, width: int) -> None:
    """Ask for a parent's block: its upper halves, of `width` bytes each, ids and scales."""
    offsets = carray(_int64_at(line[_OFFSETS]), line[_PARENTS] + 1)
    first, last = offsets[parent], offsets[parent + 1]
    for entry in range(first, last, _LINE // 4):
        _prefetch(line[_IDS] + 4 * entry)
        _prefetch(line[_UPPER_SCALES] + 4 * entry)
    for place in range(line[_UPPER] + first * width, line[_UPPER] + last * width, _LINE):
        _prefetch(place)


@_compiled
def _dots_of_block(start: int, count: int, query: int, pieces: int, dots: int) -> None:
    """The products of a block's rows with one embedding; `dots` has room for a multiple of four."""
    width, last = 32 * pieces, count - 1
    for i in range(0, count, 4):
        _upper_products(
            start + i * width,
            start + min(i + 1, last) * width,
            start + min(i + 2, last) * width,
            start + min(i + 3, last) * width,
            query,
            pieces,
            dots + 4 * i,
        )


@_compiled
def _best_places(orders: _Ids, met: int, most: int, ids: _Ids, table: _Ids, places: _Ints, keys: _Ints) -> int:
    """List where the smallest `most` of orders and ids stand, as they come, repeated elements once; return how many.

    `met`: how many orders are not `_MASKED`, which are left out. `table`: empty where every element stands once.
    `keys`: room for orders with ids.
    """
    # Where elements are repeated, more keys are needed for as many elements.
    wanted = most + most // 2 if len(table) > 0 else most
    count, listed = 0, 0
    while listed < met and count < most:
        bound = _bound_of_best(orders, min(wanted, met), wanted + wanted // 4)
        wanted *= 2
        listed = 0
        for i in range(len(orders)):  # without a branch
            places[listed] = i
            listed += orders[i] <= bound
        count = listed
        if len(table) > 0:
            known = _emptied(table, listed)
            count = 0
            for i in range(listed):
                places[count] = places[i]
                count += _is_new(known, ids[places[i]])
    if count <= most:
        return count
    for i in range(count):
        keys[i] = (np.int64(orders[places[i]]) << 32) | ids[places[i]]
    last = _bound_of_best(keys[:count], most, most)
    kept = 0
    for i in range(count):
        places[kept] = places[i]
        kept += keys[i] <= last
    return kept


@_compiled
def _meet(
    line: _Ints,
    mask_address: int,
    frontier: _Ids,
    query: _Floats,
    q8: _Int8s,
    most: int,
    block_sums: _Floats,
    best: np.float32,
    weight: np.float32,
    table: _Ids,
    ids: _Ids,
    owners: _Ids,
    sums: _Floats,
    orders: _Ids,
    places: _Ints,
    keys: _Ints,
    scales: _Floats,
    scores: _Floats,
    dots: _Ids,
) -> tuple[int, int]:
    """List the elements below the frontier that are to be scored by their rows; return how many, and how many were met.

    All, where there are no more than `most`; else the best so many by their upper halves: the hot loop. While one block
    is scored the next one is asked for, since some 30 rows are too few for the processor's own guesses.

    `block_sums`: the words' shares of the rows below the frontier, in its order; empty without words.
    `table`: for dropping repeated elements; empty where every element stands once.
    `ids` to `dots`: room for every row below the frontier, of `dots` for three more.
    """
    embeddings, padded = q8.shape
    pieces, width = padded // 64, padded // 2
    offsets = carray(_int64_at(line[_OFFSETS]), line[_PARENTS] + 1)
    mask = carray(_uint8_at(mask_address), line[_SIZE])
    total = 0
    for parent in frontier:
        total += offsets[parent + 1] - offsets[parent]
    coarse = total > most
    if line[_PAGED] and coarse:
        ends = keys[: len(frontier)]
        begins = places[: len(ends)]
        for f in range(len(ends)):
            ends[f] = frontier[f]
        ends.sort()
        for f in range(len(ends)):
            begins[f], ends[f] = offsets[ends[f]], offsets[ends[f] + 1]
        _advise_spans(line[_UPPER], width, begins, ends)
        _advise_spans(line[_UPPER_SCALES], 4, begins, ends)
        _advise_spans(line[_IDS], 4, begins, ends)
    if coarse:
        _prefetch_block(line, frontier[0], width)
    for m in range(embeddings if coarse else 1):
        q_scale, shift = np.float32(0), np.int32(0)
        if coarse:
            q_scale = _quantise_query(query[m], q8[m], COARSE_STEPS)
            for j in range(padded):
                shift -= np.int32(120) * np.int32(q8[m, j])
        place = 0
        for f in range(len(frontier)):
            parent = frontier[f]
            first, below = offsets[parent], offsets[parent + 1] - offsets[parent]
            if m == 0:
                if coarse and f + 1 < len(frontier):
                    _prefetch_block(line, frontier[f + 1], width)
                _copy(ids.ctypes.data + 4 * place, line[_IDS] + 4 * first, 4 * below)
                if coarse:
                    _copy(scales.ctypes.data + 4 * place, line[_UPPER_SCALES] + 4 * first, 4 * below)
            if coarse:
                to = dots.ctypes.data + 4 * place
                _dots_of_block(line[_UPPER] + first * width, below, q8[m].ctypes.data, pieces, to)
            place += below
        if coarse:
            for i in range(total):
                score = q_scale * scales[i] * np.float32(np.int32(16 * dots[i] + shift)) + np.float32(0)
                scores[i] = score if m == 0 else max(scores[i], score)
    with_words = len(block_sums) > 0
    if coarse and with_words and weight != 0 and best > 0:
        for i in range(total):
            scores[i] = _combined(scores[i], block_sums[i], best, weight)
    for i in range(total):
        orders[i] = _order(scores[i]) if coarse else 0
    met = total
    if mask_address != 0:
        for i in range(total):
            if mask[ids[i]] == 0:
                orders[i] = _MASKED
                met -= 1
    count = _best_places(orders[:total], met, most, ids, table, places, keys)
    f, end = -1, 0
    for i in range(count):
        place = places[i]
        while place >= end:
            f += 1
            end += offsets[frontier[f] + 1] - offsets[frontier[f]]
        ids[i], owners[i] = ids[place], frontier[f]
        sums[i] = block_sums[place] if with_words else np.float32(0)
    return count, met


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
def _first_above(values: _Ints, value: int) -> int:
    """How many of rising values are not above `value`; without branches."""
    low, length = 0, len(values)
    while length > 1:
        half = length >> 1
        low += half * (values[low + half - 1] <= value)
        length -= half
    return low + (length == 1 and values[low] <= value)


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
    nodes_twice: int,
    chunks_twice: int,
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
    q16, q_scales, shifts = (
        np.empty(32 * -(-dimension // 32), np.int16),
        np.empty(embeddings, np.float32),
        np.empty(embeddings, np.int32),
    )
    asked = np.empty((embeddings, 64 * -(-dimension // 32)), np.int8)
    q8 = np.empty((embeddings, 64 * -(-dimension // 64)), np.int8)
    room = capacity + near
    rows, keys, places = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    owners, ids, orders = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int32)
    dots = np.empty(max(room + 3, _SOME), np.int32)
    cosines, sums, block_sums = np.empty(room, np.float32), np.zeros(room, np.float32), np.empty(capacity, np.float32)
    scales = np.empty(capacity, np.float32)
    heap, frontier = np.empty(max(beam, k), np.int64), np.zeros(beam, np.int32)
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
                chunks_twice if at_chunks else nodes_twice,
                block_sums[:below],
                best,
                weight,
                used,
                ids,
                owners,
                sums,
                orders,
                places,
                keys,
                scales,
                cosines,
                dots,
            )
            scored[b] += met
            _ask(queries[level, b], q16, asked, q_scales, shifts)
            for i in range(count):
                rows[i] = ids[i]
            if line[_PAGED]:
                row_begins, row_ends = places[:count], keys[:count]
                row_begins[:] = rows[:count]
                row_begins.sort()
                row_ends[:] = row_begins
                row_ends += 1
                _advise_spans(line[_ROWS], dimension, row_begins, row_ends)
            _score_rows(line, rows[:count], dimension, asked, q_scales, shifts, dots, cosines)
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
            known = _emptied(table, walked + near)
            for i in range(walked):
                _is_new(known, ids[i])
            mask = carray(_uint8_at(masks[depth - 1]), line[_SIZE])
            bound = _bound_of_best(keys[:walked], min(beam, walked), beam) if walked > 0 else _NO_KEY
            for i in range(walked):
                if keys[i] > bound:
                    continue
                chunk = keys[i] & 0xFFFFFFFF
                document = _first_above(ends, chunk)
                if document == len(ends):
                    continue  # ends that do not rise
                start = max(chunk - beside, ends[document - 1] if document > 0 else 0, 0)
                for other in range(start, min(chunk + beside + 1, ends[document], line[_SIZE])):
                    if masks[depth - 1] != 0 and mask[other] == 0:
                        continue
                    if _is_new(known, np.int32(other)):
                        ids[count], rows[count], owners[count] = other, other, -1
                        count += 1
            _score_rows(line, rows[walked:count], dimension, asked, q_scales, shifts, dots, cosines[walked:])
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
    q16, dots = np.empty(32 * -(-dimension // 32), np.int16), np.empty(_SOME, np.int32)
    asked = np.empty((batch, embeddings, 64 * -(-dimension // 32)), np.int8)
    q_scales, shifts = np.empty((batch, embeddings), np.float32), np.empty((batch, embeddings), np.int32)
    for b in range(batch):
        _ask(queries[b], q16, asked[b], q_scales[b], shifts[b])
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
            _score_rows(line, rows[:count], dimension, asked[b], q_scales[b], shifts[b], dots, scores)
            for i in range(count):
                key = _key(scores[i], np.int32(rows[i]))
                if key < heap[0]:
                    heap[0] = key
                    _sink(heap, 0, len(heap))


@_compiled
def _score_slice(line: _Ints, queries: _Floats, ids: _Ids, first: int, last: int, scores: _Floats) -> None:
    """Score the given chunks of the queries `first` to `last`."""
    _, embeddings, dimension = queries.shape
    q16, dots = np.empty(32 * -(-dimension // 32), np.int16), np.empty(_SOME, np.int32)
    asked = np.empty((embeddings, 64 * -(-dimension // 32)), np.int8)
    q_scales, shifts = np.empty(embeddings, np.float32), np.empty(embeddings, np.int32)
    rows, places = np.empty(ids.shape[1], np.int64), np.empty(ids.shape[1], np.int64)
    dense = np.empty(ids.shape[1], np.float32)
    for b in range(first, last):
        _ask(queries[b], q16, asked, q_scales, shifts)
        count = 0
        for i in range(ids.shape[1]):
            if ids[b, i] >= 0:
                rows[count], places[count] = ids[b, i], i
                count += 1
        _score_rows(line, rows[:count], dimension, asked, q_scales, shifts, dots, dense)
        scores[b] = -np.inf
        for i in range(count):
            scores[b, places[i]] = dense[i]


@_compiled
def _project_slice(
    diagonal: _Floats, rows: _Int8s, scales: _Floats, queries: _Floats, first: int, end: int, out: _Floats
) -> None:
    """Project the queries `first` to `end`."""
    dimension, last, start = len(diagonal), len(diagonal) - 1, rows.ctypes.data
    q16, asked = np.empty(32 * -(-dimension // 32), np.int16), np.empty(64 * -(-dimension // 32), np.int8)
    dots = np.empty(dimension + 3, np.int32)
    for b in range(first, end):
        scale = _quantise_query(queries[b], q16, QUERY_STEPS)
        shift = _laid_out(q16, asked)
        for i in range(0, dimension, 4):
            _row_products(
                start + i * dimension,
                start + min(i + 1, last) * dimension,
                start + min(i + 2, last) * dimension,
                start + min(i + 3, last) * dimension,
                asked.ctypes.data,
                dimension,
                dots.ctypes.data + 4 * i,
            )
        squares = 0.0
        for i in range(dimension):
            out[b, i] = queries[b, i] * diagonal[i] + scale * scales[i] * np.float32(np.int32(dots[i] + shift))
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
