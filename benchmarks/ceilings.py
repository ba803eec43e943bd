"""How far the kernels are from what the machine can do: bytes a second beside a copy, products beside registers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from common import arguments, save
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from treemem import Memory
from treemem.kernels import cpu

ROUNDS = 15
SUMS = 12  # in registers: as many additions at once as no processor can start while one takes its time
LANES = 32  # products of one vpdpbusd on a 256-bit register
FEW, DIMENSION = 64, 384  # rows that stay in the innermost cache


def _multiplying(_: Any, times: Any) -> Any:
    """A compiled function that does nothing but `SUMS * times` x vpdpbusd, in registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        eight = ir.VectorType(ir.IntType(32), 8)
        kind = ir.FunctionType(eight, [eight, eight, eight])
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.256")
        sums = [cgutils.alloca_once_value(builder, ir.Constant(eight, [i] * 8)) for i in range(SUMS)]
        with cgutils.for_range(builder, arguments[0]) as loop:
            number = builder.trunc(loop.index, ir.IntType(32))
            factor = builder.insert_element(ir.Constant(eight, [3] * 8), number, ir.IntType(32)(0))
            for one in sums:
                builder.store(builder.call(add, [builder.load(one), factor, factor]), one)
        total = builder.load(sums[0])
        for one in sums[1:]:
            total = builder.add(total, builder.load(one))
        return builder.extract_element(total, ir.IntType(32)(0))

    return types.int32(types.int64), generate


def most_products() -> float | None:
    """Products of bytes that one core can do a nanosecond; None where there is no AVX-512 VNNI."""
    if not cpu._BYTE_PRODUCTS:
        return None
    multiplying = intrinsic(_multiplying)

    @numba.njit
    def multiply(times: int) -> int:
        return multiplying(times)  # type: ignore[no-any-return]

    times = 100_000
    multiply(times)
    return SUMS * LANES * times / min(timed(multiply, times) for _ in range(ROUNDS)) / 1e9


def products_of_halves(rng: np.random.Generator) -> float:
    """Products a nanosecond of the walk's hot loop where all rows are in the innermost cache."""
    rows = rng.integers(0, 256, (FEW, DIMENSION // 2), dtype=np.uint8)
    query, dots = rng.integers(-127, 128, DIMENSION, dtype=np.int8), np.empty(FEW, np.int32)
    of_block = cpu._dots_of_block

    @numba.njit
    def multiply(times: int, rows: int, query: int, dots: int) -> None:
        for _ in range(times):
            of_block(rows, FEW, query, DIMENSION // 64, dots)

    given = [array.ctypes.data for array in (rows, query, dots)]
    multiply(1, *given)
    return 1000 * rows.size * 2 / min(timed(lambda times: multiply(times, *given), 1000) for _ in range(ROUNDS)) / 1e9


def main() -> None:
    """Measure on one core, the two sides of every ratio in turn."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--set", default="wiki_multi")
    options = parser.parse_args()
    os.environ[cpu.THREADS] = "1"
    tree = Memory.open(options.memories / options.set).image.tree
    rows = np.asarray(tree.levels[-1].rows)
    rng = np.random.default_rng(options.seed)
    queries = rng.standard_normal((ROUNDS, 1, 1, tree.dimension)).astype(np.float32)
    target = np.empty_like(rows)

    def scan(number: int) -> None:
        cpu.exact(tree, queries[number], 10)

    def copy(_: int) -> None:
        np.copyto(target, rows)

    scanned, copied = in_turn(scan, copy)
    few = np.tile(np.arange(FEW, dtype=np.int32), (8, 128))  # 24 KB side by side: they stay in the cache
    again = np.repeat(queries[:1], len(few), axis=0)[:, 0]
    hot = min(timed(lambda _: cpu.score_chunks(tree, again, few), 0) for _ in range(50)) / few.size
    walked = np.broadcast_to(queries[None, :, 0], (tree.depth, ROUNDS, 1, tree.dimension)).copy()
    found = cpu.search(tree, walked, 32, 10)
    width = tree.levels[-1].upper.shape[1] + 8
    walk = min(timed(lambda n: cpu.search(tree, walked[:, n : n + 1], 32, 10), 0) for _ in range(200))
    figures: dict[str, Any] = {
        "set": options.set,
        "chunks": len(rows),
        "copy_gb_per_second": round(rows.nbytes / float(np.median(copied)) / 1e9, 2),
        "scan_gb_per_second": round(rows.nbytes / float(np.median(scanned)) / 1e9, 2),
        "scan to copy": round(float(np.median(np.array(copied) / np.array(scanned))), 3),
        "a row in the cache, ns": round(hot * 1e9, 1),
        "products of whole rows in the cache, 10^9 per second": round(tree.dimension / hot / 1e9, 1),
        "products of upper halves in the cache, 10^9 per second": round(products_of_halves(rng), 1),
        "products of bytes in registers, 10^9 per second": (most := most_products()) and round(most, 1),
        "a walk in the cache, ms": round(walk * 1e3, 4),
        "a walk's upper halves, bytes": int(found.scored[0]) * width,
    }
    print(figures)
    save("ceilings", figures, options)


def timed(call: Callable[[int], Any], number: int) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call(number)
    return time.perf_counter() - begin


def in_turn(one: Callable[[int], None], two: Callable[[int], None]) -> tuple[list[float], list[float]]:
    """Seconds of two calls, one after the other, `ROUNDS` times after a first."""
    one(0), two(0)
    pairs = [(timed(one, number), timed(two, number)) for number in range(ROUNDS)]
    return [a for a, _ in pairs], [b for _, b in pairs]


if __name__ == "__main__":
    main()
