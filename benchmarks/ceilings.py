"""How far the kernels are from what the machine can do: bytes a second beside a copy, products in the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import arguments, save

from treemem import Memory
from treemem.kernels import cpu

ROUNDS = 15


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
    few = rng.integers(0, len(rows), 64).astype(np.int32)[None].repeat(200, 0)  # 24 KB: they stay in the cache
    again = np.repeat(queries[:1], 200, axis=0)[:, 0]
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
        "products in the cache, 10^9 per second": round(tree.dimension / hot / 1e9, 1),
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
