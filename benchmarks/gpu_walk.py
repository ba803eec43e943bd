"""Walks on a GPU: the fused kernel beside torch's gather, product and top-k, and the bytes that it moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, save

from treemem.kernels import ServingTree, gpu, reference
from treemem.storage.image import read_tree

BEAM, K = 32, 10
BATCHES = (1, 256, 8192)
ROUNDS = 20


def timed(call: Callable[[], Any], cupy: Any) -> float:
    """Median seconds of a call on the GPU, by its own clock."""
    for _ in range(3):
        call()
    seconds = []
    for _ in range(ROUNDS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return float(np.median(seconds))


def by_torch(tree: ServingTree, queries: Any, torch: Any) -> Callable[[], Any]:
    """The same walk by torch's own operations, half precision, blocks padded to the largest; one look."""
    levels = []
    for blocks in tree.levels:
        counts = np.diff(blocks.offsets)
        places = blocks.offsets[:-1, None] + np.arange(counts.max())
        there = np.arange(counts.max()) < counts[:, None]
        ids = np.where(there, blocks.ids[np.where(there, places, 0)], -1)
        rows = blocks.rows.astype(np.float16) * blocks.scales[:, None].astype(np.float16)
        levels.append((torch.from_numpy(ids).cuda(), torch.from_numpy(rows).cuda()))
    asked = torch.from_dlpack(queries).half()

    def walk() -> Any:
        frontier = torch.zeros((asked.shape[1], 1), dtype=torch.int64, device="cuda")
        for number, (ids, rows) in enumerate(levels):
            below = ids[frontier].flatten(1)
            scores = torch.einsum("bnd,bd->bn", rows[below.clamp(min=0)], asked[number, :, 0])
            scores = scores.masked_fill(below < 0, -1e4)
            kept = K if number == len(levels) - 1 else BEAM
            best = scores.topk(min(kept, scores.shape[1]), dim=1).indices
            frontier = below.gather(1, best).clamp(min=0).long()
        return frontier

    return walk


def main() -> None:
    """Measure on the GPU that is there."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tree", type=Path, required=True, help="a folder that benchmarks/scaling.py has left")
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="the tree's levels, top first")
    options = parser.parse_args()
    reason = gpu.why_not()
    if reason is not None:
        parser.error(reason)
    import cupy
    import torch

    tree = read_tree(options.tree, tuple(options.sizes))
    begin = time.perf_counter()
    pinned = gpu.place(tree)
    placed = time.perf_counter() - begin
    rng = np.random.default_rng(options.seed)
    source, target = (cupy.empty(1 << 31, np.int8) for _ in range(2))
    copied = 2 * source.nbytes / timed(lambda: cupy.copyto(target, source), cupy)
    del source, target
    width = tree.levels[-1].upper.shape[1] + 8
    whole = tree.dimension + 4
    rows: dict[str, Any] = {}
    for batch in BATCHES:
        given = rng.choice(tree.sizes[-1], batch)
        blocks = tree.levels[-1]
        near = blocks.rows[given] * blocks.scales[given, None] + rng.normal(0, 0.02, (batch, tree.dimension))
        queries = cupy.asarray(np.stack([near.astype(np.float32)[:, None]] * tree.depth))
        found = gpu.search(tree, queries, BEAM, K)
        expected = reference.search(tree, cupy.asnumpy(queries[:, :64]), BEAM, K)
        assert np.array_equal(cupy.asnumpy(found.chunks[:64]), expected.chunks), "the GPU finds something else"
        seconds = timed(lambda q=queries: gpu.search(tree, q, BEAM, K), cupy)
        looked_at = float(cupy.asnumpy(found.scored).mean())
        twice = (tree.depth - 1) * reference.refined(BEAM) + reference.refined(K)
        moved = batch * (looked_at * width + twice * whole)
        own = {
            "ms": round(seconds * 1e3, 4),
            "queries_per_second": round(batch / seconds),
            "scored": round(looked_at, 1),
            "gb_per_second": round(moved / seconds / 1e9, 1),
            "share of a copy": round(moved / seconds / copied, 3),
        }
        if batch <= 256:  # what torch gathers for more does not fit
            other = timed(by_torch(tree, queries, torch), cupy)
            own |= {"torch_ms": round(other * 1e3, 4), "times torch": round(other / seconds, 2)}
        rows[str(batch)] = own
        print(batch, own, flush=True)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    figures = {
        "gpu": name,
        "levels": list(tree.sizes),
        "pinned_bytes": pinned,
        "placing_seconds": round(placed, 2),
        "copy_gb_per_second": round(copied / 1e9, 1),
        "batches": rows,
    }
    save("gpu_walk", figures, options)


if __name__ == "__main__":
    main()
