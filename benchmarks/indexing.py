"""Making an index of many vectors: the tree, with its files, beside faiss HNSW; seconds, and memory to serve from."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from common import arguments, save

from treemem.hierarchy.grow import grow
from treemem.storage.image import write_tree
from treemem.storage.levels import as_float32, unit

M, CONSTRUCTION = 32, 200
BLOCK = 20_000
QUERIES, BEAM, EF, K = 1000, 32, 64, 10


def resident() -> int:
    """Bytes of this process that are in memory, those of files it maps included."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


def serve(kind: str, place: str, sizes: list[int], queries: np.ndarray, queue: Any) -> None:
    """Answer queries one by one from what was made; tell by how much the process has grown."""
    from treemem.kernels import cpu
    from treemem.storage.image import read_tree

    few = np.zeros((1, 1, queries.shape[1]), np.float32)
    faiss.IndexFlatIP(queries.shape[1]).search(few[0], 1)
    before = resident()
    if kind == "tree":
        tree = read_tree(Path(place), tuple(sizes))
        for query in queries:
            cpu.search(tree, np.stack([query[None, None]] * tree.depth), BEAM, K)
    else:
        index = faiss.read_index(place)
        index.hnsw.efSearch = EF
        for query in queries:
            index.search(query[None], K)
    queue.put(resident() - before)


def grown(kind: str, place: Path, sizes: list[int], queries: np.ndarray) -> int:
    """`serve` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=serve, args=(kind, str(place), sizes, queries, queue))
    process.start()
    bytes_more: int = queue.get()
    process.join()
    return bytes_more


def main() -> None:
    """Make both with all cores, one after the other; what is measured is written at once."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--vectors", type=Path, required=True, help="a .npy file: benchmarks/scaling.py leaves one")
    options = parser.parse_args()
    vectors = np.load(options.vectors, mmap_mode="r")
    figures: dict[str, Any] = {"vectors": len(vectors), "threads": len(os.sched_getaffinity(0)), "queries": QUERIES}
    rng = np.random.default_rng(options.seed)
    near = as_float32(vectors[np.sort(rng.choice(len(vectors), QUERIES, replace=False))])
    queries = unit(near + rng.normal(0, 0.02, near.shape)).astype(np.float32)
    begin = time.perf_counter()
    levels = grow(vectors, 32, 2, options.seed)
    with tempfile.TemporaryDirectory(dir=options.vectors.parent) as folder:
        write_tree(Path(folder), vectors, levels)
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        sizes = [*(len(level.vectors) for level in levels[::-1]), len(vectors)]
        more = grown("tree", Path(folder), sizes, queries)
    figures["tree"] = {"seconds": round(seconds, 1), "bytes": size, "resident_bytes": more}
    print(figures, flush=True)
    del levels
    index = faiss.IndexHNSWFlat(vectors.shape[1], M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = CONSTRUCTION
    begin = time.perf_counter()
    for start in range(0, len(vectors), BLOCK):
        index.add(as_float32(vectors[start : start + BLOCK]))
        if start % (10 * BLOCK) == 0:
            print(f"{start:,} in {time.perf_counter() - begin:.0f} s", flush=True)
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory(dir=options.vectors.parent) as folder:
        place = Path(folder) / "index"
        faiss.write_index(index, str(place))
        del index
        size = place.stat().st_size
        more = grown("faiss HNSW", place, [], queries)
    figures["faiss HNSW"] = {"seconds": round(seconds, 1), "bytes": size, "resident_bytes": more}
    figures["ratio"] = {
        key: round(figures["tree"][key] / figures["faiss HNSW"][key], 3)
        for key in ("seconds", "bytes", "resident_bytes")
    }
    print(figures)
    save("indexing", figures, options)


if __name__ == "__main__":
    main()
