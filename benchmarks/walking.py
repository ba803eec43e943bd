"""One query on one core over a large memory: the walk beside faiss exact search and faiss HNSW, equal vectors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import faiss
import numpy as np
from common import arguments, hits, percentiles, save

from treemem import Memory
from treemem.config import SearchConfig
from treemem.evaluation import load_set
from treemem.hierarchy.build import contextual_file
from treemem.hierarchy.walk import EmbeddedQuery
from treemem.kernels import back_end
from treemem.storage.levels import as_float32, unit


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
    chosen = rng.choice(len(questions.queries), min(len(questions.queries), options.queries), replace=False)
    asked = [questions.queries[i] for i in sorted(chosen)]
    embedded = memory.searcher.embed([query.text for query in asked])
    queries = np.stack([one.vectors[0] for one in embedded])
    scratch = memory.store.path / "benchmark-vectors"
    vectors = as_float32(contextual_file(memory.store, memory.info().config.alpha, scratch))
    scratch.unlink()
    kernels, tree = back_end("cpu"), memory.image.tree
    rows: dict[str, dict[str, float]] = {}
    truth: np.ndarray | None = None

    def record(name: str, search: Callable[[np.ndarray], np.ndarray]) -> None:
        nonlocal truth
        seconds, found = timed(search, queries)
        if truth is None:
            truth = found
        agreement = float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=False)]))
        rows[name] = {"agreement@10": round(agreement, 4), **hits(memory, asked, found), **percentiles(seconds)}
        print(name, rows[name], flush=True)

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    record("faiss exact float32", lambda q: flat.search(q[None], 10)[1][0])
    record("treemem exact int8", lambda q: kernels.exact(tree, q[None, None], 10)[0][0])
    for beam in (8, 16, 24, 32, 48, 64, 96):
        scored: list[int] = []

        def walk(query: np.ndarray, config: SearchConfig = SearchConfig("walk", 10, beam, decoder=False)) -> np.ndarray:  # noqa: B008
            ranked = memory.searcher.rank(EmbeddedQuery("-", query[None], ((0, 1),)), config)
            scored.append(ranked.scored)  # noqa: B023 - used in this turn of the loop alone
            return ranked.chunks[:10]

        record(f"walk beam {beam}", walk)
        rows[f"walk beam {beam}"]["scored"] = round(float(np.mean(scored)), 1)
    mapped = unit(queries @ memory.image.query_map)

    def compiled(number: np.ndarray) -> np.ndarray:
        levels = np.stack([*[mapped[number[0]]] * (tree.depth - 1), queries[number[0]]])
        return kernels.walk(tree, levels[:, None, None], 32).chunks[0, :10]

    numbers = np.arange(len(queries))[:, None]
    rows["the compiled walk alone, beam 32"] = percentiles(timed(compiled, numbers)[0])
    print(rows["the compiled walk alone, beam 32"])
    begin = time.perf_counter()
    hnsw = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = 40
    hnsw.add(vectors)
    built = time.perf_counter() - begin
    for ef in (16, 32, 64, 128, 256):
        hnsw.hnsw.efSearch = ef
        faiss.cvar.hnsw_stats.reset()
        record(f"faiss HNSW M=32 ef {ef}", lambda q: hnsw.search(q[None], 10)[1][0])
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
