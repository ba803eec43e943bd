"""Walks on a GPU: the fused kernel beside torch's gather, product and top-k, and the bytes that it moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, save
from planted import planted

from treemem.kernels import ServingTree, gpu, reference
from treemem.storage.image import read_tree

BEAM, K = 32, 10
BATCHES = (1, 256, 8192)
ROUNDS = 20
TORCH_BATCH = 256
SCANNED = (1, 64)
"""Batches of exact search."""


def timed(call: Callable[[int], Any], cupy: Any) -> float:
    """Median seconds of a call on the GPU, by its own clock; each round is given its number."""
    for number in range(3):
        call(ROUNDS + number)
    seconds = []
    for number in range(ROUNDS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        call(number)
        end.record()
        end.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return float(np.median(seconds))


def by_torch(tree: ServingTree, torch: Any) -> Callable[[Any], Any]:
    """The same walk by torch's own operations, half precision, blocks padded to the largest; one look.

    What it gathers for more than `TORCH_BATCH` queries does not fit, so these are walked in parts.
    """
    levels = []
    for blocks in tree.levels:
        counts = np.diff(blocks.offsets)
        places = blocks.offsets[:-1, None] + np.arange(counts.max())
        there = np.arange(counts.max()) < counts[:, None]
        ids = np.where(there, blocks.ids[np.where(there, places, 0)], -1)
        rows = torch.empty(blocks.rows.shape, dtype=torch.float16, device="cuda")
        for start in range(0, len(rows), 1 << 20):
            part = torch.from_numpy(np.ascontiguousarray(blocks.rows[start : start + (1 << 20)])).cuda().half()
            scales = torch.from_numpy(np.ascontiguousarray(blocks.scales[start : start + (1 << 20)])).cuda()
            rows[start : start + (1 << 20)] = part * scales[:, None].half()
        levels.append((torch.from_numpy(ids).cuda(), rows))

    def walk(queries: Any) -> Any:
        asked = torch.from_dlpack(queries).half()
        for first in range(0, asked.shape[1], TORCH_BATCH):
            some = asked[:, first : first + TORCH_BATCH]
            frontier = torch.zeros((some.shape[1], 1), dtype=torch.int64, device="cuda")
            for number, (ids, rows) in enumerate(levels):
                below = ids[frontier].flatten(1)
                scores = torch.einsum("bnd,bd->bn", rows[below.clamp(min=0)], some[number, :, 0])
                scores = scores.masked_fill(below < 0, -1e4)
                kept = K if number == len(levels) - 1 else BEAM
                best = scores.topk(min(kept, scores.shape[1]), dim=1).indices
                frontier = below.gather(1, best).clamp(min=0).long()
        return frontier

    walk.rows = levels[-1][1]  # type: ignore[attr-defined]
    return walk


def main() -> None:
    """Measure on the GPU that is there."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tree", type=Path, help="a folder that benchmarks/scaling.py has left")
    parser.add_argument("--sizes", type=int, nargs="+", help="the tree's levels, top first")
    parser.add_argument("--planted", type=int, help="or draw a tree of so many chunks: see planted.py")
    parser.add_argument("--name", default="gpu_walk", help="of the result")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's own operations out")
    options = parser.parse_args()
    reason = gpu.why_not()
    if reason is not None:
        parser.error(reason)
    import cupy
    import torch

    begin = time.perf_counter()
    if options.planted:
        tree = planted(options.planted, 384, options.seed, torch, "cuda")
        torch.cuda.empty_cache()
    else:
        tree = read_tree(options.tree, tuple(options.sizes))
    made = time.perf_counter() - begin
    print(f"a tree of {tree.sizes} in {made:.1f} s", flush=True)
    begin = time.perf_counter()
    pinned = gpu.place(tree)
    placed = time.perf_counter() - begin
    rng = np.random.default_rng(options.seed)
    source, target = (cupy.empty(1 << 31, np.int8) for _ in range(2))
    copied = 2 * source.nbytes / timed(lambda _: cupy.copyto(target, source), cupy)
    del source, target
    width = tree.levels[-1].upper.shape[1] + 8
    whole = tree.dimension + 4
    walk = None if options.no_torch else by_torch(tree, torch)
    rows: dict[str, Any] = {}
    for batch in BATCHES:
        # Each round asks other questions, so that none finds its rows in a cache.
        given = rng.choice(tree.sizes[-1], batch * (ROUNDS + 3) if batch <= 256 else batch)
        blocks = tree.levels[-1]
        near = blocks.rows[given] * blocks.scales[given, None] + rng.normal(0, 0.02, (len(given), tree.dimension))
        queries = cupy.asarray(np.stack([near.astype(np.float32)[:, None]] * tree.depth))
        parts = [queries[:, i * batch : (i + 1) * batch] for i in range(len(given) // batch)]
        found = gpu.search(tree, queries, BEAM, K)
        expected = reference.search(tree, cupy.asnumpy(queries[:, :64]), BEAM, K)
        assert np.array_equal(cupy.asnumpy(found.chunks[:64]), expected.chunks), "the GPU finds something else"
        seconds = timed(lambda i, p=parts: gpu.search(tree, p[i % len(p)], BEAM, K), cupy)
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
        if walk is not None:
            other = timed(lambda i, p=parts: walk(p[i % len(p)]), cupy)
            own |= {"torch_ms": round(other * 1e3, 4), "times torch": round(other / seconds, 2)}
        rows[str(batch)] = own
        print(batch, own, flush=True)
    scans: dict[str, Any] = {}
    for batch in SCANNED if not pinned else ():
        queries = cupy.asarray(rng.normal(size=(batch, 1, tree.dimension)).astype(np.float32))
        seconds = timed(lambda _, q=queries: gpu.exact(tree, q, K), cupy)
        scans[str(batch)] = {
            "ms": round(seconds * 1e3, 4),
            "gb_per_second": round(batch * tree.sizes[-1] * whole / seconds / 1e9, 1),
        }
        if walk is not None:
            chunks = walk.rows  # type: ignore[attr-defined]
            asked = torch.from_dlpack(queries)[:, 0].half().T.contiguous()
            other = timed(lambda _, a=asked, c=chunks: (c @ a).topk(K, dim=0), cupy)
            scans[str(batch)] |= {"torch_ms": round(other * 1e3, 4), "times torch": round(other / seconds, 2)}
        print("scan", batch, scans[str(batch)], flush=True)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    figures = {
        "gpu": name,
        "levels": list(tree.sizes),
        "pinned_bytes": pinned,
        "placing_seconds": round(placed, 2),
        "copy_gb_per_second": round(copied / 1e9, 1),
        "tree": "planted" if options.planted else "grown",
        "batches": rows,
        "exact search": scans,
    }
    save(options.name, figures, options)


if __name__ == "__main__":
    main()
