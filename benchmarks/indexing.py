"""Making an index of many vectors: the tree, with its files, beside faiss HNSW; seconds, and bytes to serve from."""

from __future__ import annotations

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
from treemem.storage.levels import as_float32

M, CONSTRUCTION = 32, 200
BLOCK = 20_000


def main() -> None:
    """Make both with all cores, one after the other; what is measured is written at once."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--vectors", type=Path, required=True, help="a .npy file: benchmarks/scaling.py leaves one")
    options = parser.parse_args()
    vectors = np.load(options.vectors, mmap_mode="r")
    figures: dict[str, Any] = {"vectors": len(vectors), "threads": len(os.sched_getaffinity(0))}
    begin = time.perf_counter()
    levels = grow(vectors, 32, 2, options.seed)
    with tempfile.TemporaryDirectory(dir=options.vectors.parent) as folder:
        write_tree(Path(folder), vectors, levels)
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    figures["tree"] = {"seconds": round(seconds, 1), "bytes": size}
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
    size = faiss.serialize_index(index).nbytes
    figures["faiss HNSW"] = {"seconds": round(seconds, 1), "bytes": size}
    figures["ratio"] = {
        key: round(figures["tree"][key] / figures["faiss HNSW"][key], 3) for key in ("seconds", "bytes")
    }
    print(figures)
    save("indexing", figures, options)


if __name__ == "__main__":
    main()
