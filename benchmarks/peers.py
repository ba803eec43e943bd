"""The walk beside faiss, hnswlib and usearch: equal vectors, equal threads, one query at a time and in batches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import hnswlib
import numpy as np
from common import arguments, hits, percentiles, save
from usearch.index import Index

from treemem import Memory
from treemem.evaluation import load_set
from treemem.hierarchy.build import contextual_file
from treemem.kernels import cpu
from treemem.storage.levels import as_float32

M, CONSTRUCTION = 32, 200
EFS = (16, 32, 64, 128)
AS_IT_COMES = 40  # faiss's efConstruction where none is named
BEAMS = (16, 24, 32, 40, 48, 52, 56, 60, 64, 72, 80, 88, 96, 112, 128)
BLOCK = 50  # queries that one method answers before the next one's turn
BATCH = 256
REFERENCE = 64  # the ef whose hit@10 is to be reached

Search = Callable[[np.ndarray], np.ndarray]
"""float32 [B, d] to the best ten of each, int [B, 10]."""


@dataclass
class Method:
    """One index at one setting."""

    name: str
    search: Search
    prepare: Callable[[int], None]
    """Set the number of threads, and what else the setting is."""
    found: np.ndarray = field(default_factory=lambda: np.empty(0))
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"one": [], "batch": []})


def graphs(vectors: np.ndarray, scratch: Path) -> tuple[list[Method], dict[str, Any]]:
    """The three graphs, built with all cores or read where they were built before."""
    scratch.mkdir(exist_ok=True)
    count, dimension = vectors.shape
    built: dict[str, Any] = {}

    def made(
        name: str, build: Callable[[], None], store: Callable[[str], object], construction: int = CONSTRUCTION
    ) -> Path:
        path = scratch / f"{name}-{count}-{M}-{construction}"
        note = path.with_suffix(".seconds")
        if not path.exists():
            begin = time.perf_counter()
            build()
            note.write_text(str(round(time.perf_counter() - begin, 1)))
            store(str(path))
        built[name] = {"build_seconds": float(note.read_text()), "bytes": path.stat().st_size}
        print(name, built[name], flush=True)
        return path

    def by_faiss(name: str, construction: int) -> Any:
        flat = faiss.IndexHNSWFlat(dimension, M, faiss.METRIC_INNER_PRODUCT)
        flat.hnsw.efConstruction = construction
        path = made(name, lambda: flat.add(vectors), lambda path: faiss.write_index(flat, path), construction)
        return faiss.read_index(str(path))

    of_faiss = by_faiss("faiss HNSW", CONSTRUCTION)
    plain = by_faiss("plain faiss HNSW", AS_IT_COMES)
    new = hnswlib.Index("ip", dimension)
    new.init_index(count, CONSTRUCTION, M)
    path = made("hnswlib", lambda: new.add_items(vectors), new.save_index)
    of_hnswlib = hnswlib.Index("ip", dimension)
    of_hnswlib.load_index(str(path))
    of_usearch = Index(ndim=dimension, metric="ip", dtype="f32", connectivity=M, expansion_add=CONSTRUCTION)
    keys = np.arange(count)
    path = made("usearch", lambda: of_usearch.add(keys, vectors, threads=os.cpu_count() or 1), of_usearch.save)
    of_usearch.load(str(path))
    methods = []
    for ef in EFS:

        def prepare_faiss(threads: int, ef: int = ef) -> None:
            faiss.omp_set_num_threads(threads)
            of_faiss.hnsw.efSearch = ef

        def prepare_plain(threads: int, ef: int = ef) -> None:
            faiss.omp_set_num_threads(threads)
            plain.hnsw.efSearch = ef

        def prepare_hnswlib(threads: int, ef: int = ef) -> None:
            of_hnswlib.set_num_threads(threads)
            of_hnswlib.set_ef(ef)

        used = {"threads": 1}

        def prepare_usearch(threads: int, ef: int = ef, used: dict[str, int] = used) -> None:
            used["threads"] = threads
            of_usearch.expansion_search = ef

        def search_usearch(queries: np.ndarray, used: dict[str, int] = used) -> np.ndarray:
            found: Any = of_usearch.search(queries if len(queries) > 1 else queries[0], 10, threads=used["threads"])
            return np.atleast_2d(found.keys.astype(np.int64))

        methods += [
            Method(f"faiss HNSW ef {ef}", lambda queries: of_faiss.search(queries, 10)[1], prepare_faiss),
            Method(f"plain faiss HNSW ef {ef}", lambda queries: plain.search(queries, 10)[1], prepare_plain),
            Method(f"hnswlib ef {ef}", lambda queries: of_hnswlib.knn_query(queries, 10)[0], prepare_hnswlib),
            Method(f"usearch ef {ef}", search_usearch, prepare_usearch),
        ]
    return methods, built


def walks(memory: Memory) -> list[Method]:
    """The walk with several beams, its mapping of queries included."""

    def prepare(threads: int) -> None:
        os.environ[cpu.THREADS] = str(threads)

    return [
        Method(
            f"walk beam {beam}", lambda queries, beam=beam: memory.searcher.nearest(queries, 10, beam).chunks, prepare
        )
        for beam in BEAMS
    ]


def measure(methods: list[Method], queries: np.ndarray, rounds: int) -> None:
    """Time all methods in turn, so that what else the machine does meets all of them."""
    for start in range(0, len(queries), BLOCK):
        for method in methods:
            method.prepare(1)
            for query in queries[start - 5 if start else 0 :][:5]:
                method.search(query[None])
            for query in queries[start : start + BLOCK]:
                begin = time.perf_counter()
                method.search(query[None])
                method.seconds["one"].append(time.perf_counter() - begin)
    threads = len(os.sched_getaffinity(0))
    for _ in range(rounds):
        for start in range(0, len(queries) - BATCH + 1, BATCH):
            for method in methods:
                method.prepare(threads)
                begin = time.perf_counter()
                method.search(queries[start : start + BATCH])
                method.seconds["batch"].append((time.perf_counter() - begin) / BATCH)
    for method in methods:
        method.prepare(threads)
        method.found = method.search(queries)


def main() -> None:
    """Measure and save."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--set", default="wiki_multi")
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="how often the batches are searched")
    parser.add_argument("--scratch", type=Path, default=Path("peers"), help="where the graphs are kept")
    parser.add_argument("--name", default="peers", help="of the result")
    options = parser.parse_args()
    memory = Memory.open(options.memories / options.set)
    asked = load_set(options.data / options.set, split="dev,train").sample(options.queries, options.seed).queries
    queries = np.stack([one.vectors[0] for one in memory.searcher.embed([query.text for query in asked])])
    options.scratch.mkdir(exist_ok=True)
    file = options.scratch / "vectors"
    vectors = as_float32(contextual_file(memory.store, memory.info().config.alpha, file))
    file.unlink()
    peers, built = graphs(vectors, options.scratch)
    flat: Any = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    truth = flat.search(queries, 10)[1]
    del flat, vectors
    own = walks(memory)
    measure([*own, *peers], queries, options.rounds)
    rows: dict[str, Any] = {}
    for method in (*own, *peers):
        agreement = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(method.found, truth, strict=True)])
        rows[method.name] = {
            "agreement@10": round(float(agreement), 4),
            **hits(memory, asked, method.found),
            **percentiles(method.seconds["one"]),
            "batch_ms_p50": percentiles(method.seconds["batch"])["ms_p50"],
        }
        print(method.name, rows[method.name], flush=True)
    reached: dict[str, Any] = {}
    for peer in (method for method in peers if method.name.endswith(f"ef {REFERENCE}")):
        equal = next((walk for walk in own if rows[walk.name]["hit@10"] >= rows[peer.name]["hit@10"]), None)
        if equal is None:
            reached[peer.name] = "no walk measured reaches its hit@10"
            continue
        ratios = {kind: np.divide(peer.seconds[kind], equal.seconds[kind]) for kind in ("one", "batch")}
        reached[peer.name] = {
            "walk": equal.name,
            "queries_per_second_ratio": round(float(np.median(ratios["one"])), 3),
            "batch_ratio": round(float(np.median(ratios["batch"])), 3),
        }
        print(peer.name, reached[peer.name], flush=True)
    figures = {"set": options.set, "chunks": memory.image.chunks, "graphs": built, "rows": rows}
    save(options.name, {**figures, "equal hit@10": reached}, options)


if __name__ == "__main__":
    main()
