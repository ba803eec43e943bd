"""Words on the way down (signatures) beside an inverted index of all chunks: what is found, how fast, how large."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from common import RESULTS, arguments, asked, hits, measured, percentiles, save

from treemem.config import Lexical, SearchConfig

# Development questions, of sets from small to large; those of scifact's train split, which has no other.
SETS = (("fairytaleqa", "dev"), ("scifact", "train"), ("qmsum", "dev"), ("medquad", "dev"), ("wiki_multi", "dev,train"))
WAYS: tuple[tuple[str, Lexical, int], ...] = (
    ("index", "index", 32),
    ("signatures", "signatures", 32),
    ("signatures, beam 64", "signatures", 64),
)


def main() -> None:
    """Search for every question both ways, one right after the other."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--most", type=int, default=1000, help="questions of a set")
    parser.add_argument("--packaged", action="store_true", help="with the weights of new memories, not untrained")
    options = parser.parse_args()
    result = "words-packaged" if options.packaged else "words"
    path = RESULTS / f"{result}.json"
    found: dict[str, Any] = json.loads(path.read_text())["sets"] if path.exists() else {}
    for own_set in asked(options, SETS, packaged=options.packaged):
        name, split, memory = own_set.name, own_set.split, own_set.memory
        searcher, queries, embedded = own_set.searcher, own_set.queries, own_set.embedded
        oracle = [searcher.rank(query, SearchConfig("exact+bm25")).chunks[:10] for query in embedded]
        configs = [SearchConfig("walk"), *(SearchConfig(lexical=way, beam=beam) for _, way, beam in WAYS)]
        ranked: list[list[np.ndarray]] = [[] for _ in configs]
        seconds: list[list[float]] = [[] for _ in configs]
        scored = np.zeros(len(configs))
        for query in embedded:
            for i, config in enumerate(configs):
                start = time.perf_counter()
                got = searcher.rank(query, config)
                seconds[i].append(time.perf_counter() - start)
                ranked[i].append(got.chunks[:10])
                scored[i] += got.scored / len(embedded)
        files = {file: file.stat().st_size for file in memory.image.folder.rglob("*") if file.is_file()}
        own: dict[str, Any] = {
            "measured": measured(),
            "split": split,
            "questions": len(queries),
            "chunks": memory.image.chunks,
            "exact+bm25": hits(memory, queries, oracle),
            "bytes": {
                "vectors": sum(size for file, size in files.items() if "-rows" in file.name or "-upper" in file.name),
                "index": sum(size for file, size in files.items() if file.parent.name == "bm25"),
                "forward index": sum(size for file, size in files.items() if file.name.startswith("words-")),
                "signatures": sum(size for file, size in files.items() if "-words-" in file.name),
            },
        }
        titles = [title for title, _, _ in WAYS]
        for i, title in enumerate(("walk", *titles)):
            own[title] = {**hits(memory, queries, ranked[i]), **percentiles(seconds[i]), "scored": round(scored[i], 1)}
        own["time ratio"] = round(float(np.median(np.divide(seconds[2], seconds[1]))), 3)
        own["time ratio, beam 64"] = round(float(np.median(np.divide(seconds[3], seconds[1]))), 3)
        found[name] = own
        save(result, {"sets": found}, options)
        told = [f"{title} {own[title]['hit@1']:.3f} / {own[title]['hit@10']:.3f}" for title in ("exact+bm25", *titles)]
        print(f"{name}, {memory.image.chunks} chunks:", *told, f"time ratio {own['time ratio']}", flush=True)


if __name__ == "__main__":
    main()
