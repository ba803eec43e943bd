"""One query on one core over a large memory: the walk beside faiss exact search and faiss HNSW, equal vectors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import faiss
import numpy as np
from common import arguments, percentiles, save

from treemem import Memory
from treemem.evaluation import load_set
from treemem.hierarchy.build import contextual_file
from treemem.kernels import back_end
from treemem.storage.levels import as_float32


def timed(search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Seconds of every query by itself, and what it found."""
    for query in queries[:20]:
        search(query)
    seconds, found = [], []
    for query in queries:
        begin = time.perf_counter()
        found.append(search(query))
        seconds.append(time.perf_counter() - begin)
    return seconds, np.stack(found)


def main() -> None:
    """Measure and save."""
    parser = arguments(__doc__)
    parser.add_argument("--set", default="wiki_multi")
    parser.add_argument("--queries", type=int, default=1000)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    os.environ["TREEMEM_THREADS"] = "1"
    memory = Memory.open(options.memories / options.set)
    questions = load_set(options.data / options.set, split="dev,test")
    rng = np.random.default_rng(options.seed)
    texts = [query.text for query in questions.queries]
    texts = [texts[i] for i in sorted(rng.choice(len(texts), min(len(texts), options.queries), replace=False))]
    queries = np.stack([embedded.vectors[0] for embedded in memory.searcher.embed(texts)])
    scratch = memory.store.path / "benchmark-vectors"
    vectors = as_float32(contextual_file(memory.store, memory.info().config.alpha, scratch))
    scratch.unlink()
    kernels, tree = back_end("cpu"), memory.image.tree
    rows: dict[str, dict[str, float]] = {}
    truth: np.ndarray | None = None

    def record(name: str, search: Callable[[np.ndarray], np.ndarray], some: np.ndarray, **more: float) -> None:
        nonlocal truth
        seconds, found = timed(search, some)
        if truth is None:
            truth = found
        agreement = float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=False)]))
        rows[name] = {"agreement@10": round(agreement, 4), **percentiles(seconds), **more}
        print(name, rows[name], flush=True)

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    record("faiss exact float32", lambda q: flat.search(q[None], 10)[1][0], queries)
    record("treemem exact int8", lambda q: kernels.exact(tree, q[None, None], 10)[0][0], queries)
    for beam in (8, 16, 24, 32, 48, 64, 96):
        scored: list[int] = []

        def walk(query: np.ndarray, beam: int = beam, scored: list[int] = scored) -> np.ndarray:
            walked = kernels.walk(tree, np.broadcast_to(query, (tree.depth, 1, 1, len(query))), beam)
            scored.append(int(walked.scored[0]))
            return walked.chunks[0, :10]

        record(f"walk beam {beam}", walk, queries)
        rows[f"walk beam {beam}"]["scored"] = round(float(np.mean(scored)), 1)
    begin = time.perf_counter()
    hnsw = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = 40
    hnsw.add(vectors)
    built = time.perf_counter() - begin
    for ef in (16, 32, 64, 128, 256):
        hnsw.hnsw.efSearch = ef
        faiss.cvar.hnsw_stats.reset()
        record(f"faiss HNSW M=32 ef {ef}", lambda q: hnsw.search(q[None], 10)[1][0], queries)
        rows[f"faiss HNSW M=32 ef {ef}"]["scored"] = round(faiss.cvar.hnsw_stats.ndis / (len(queries) + 20), 1)
    save(
        "walking",
        {
            "set": options.set,
            "chunks": len(vectors),
            "levels": list(tree.sizes),
            "queries": len(queries),
            "hnsw_build_seconds": round(built, 1),
            "rows": rows,
        },
        options,
    )


if __name__ == "__main__":
    main()
