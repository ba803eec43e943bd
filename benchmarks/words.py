"""Words on the way down (signatures) beside an inverted index of all chunks: what is found, how fast, how large."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from common import RESULTS, arguments, asked, hits, percentiles, save

from treemem.config import Lexical, SearchConfig

# Development questions, of sets from small to large; those of scifact's train split, which has no other.
SETS = (("fairytaleqa", "dev"), ("scifact", "train"), ("qmsum", "dev"), ("medquad", "dev"), ("wiki_multi", "dev,train"))
WAYS: tuple[Lexical, ...] = ("index", "signatures")


def main() -> None:
    """Search for every question both ways, one right after the other, in an untrained tree."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--most", type=int, default=1000, help="questions of a set")
    options = parser.parse_args()
    path = RESULTS / "words.json"
    found: dict[str, Any] = json.loads(path.read_text())["sets"] if path.exists() else {}
    for own_set in asked(options, SETS):
        name, split, memory = own_set.name, own_set.split, own_set.memory
        searcher, queries, embedded = own_set.searcher, own_set.queries, own_set.embedded
        oracle = [searcher.rank(query, SearchConfig("exact+bm25")).chunks[:10] for query in embedded]
        configs = [SearchConfig("walk"), *(SearchConfig(lexical=way) for way in WAYS)]
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
        for i, title in enumerate(("walk", *WAYS)):
            own[title] = {**hits(memory, queries, ranked[i]), **percentiles(seconds[i]), "scored": round(scored[i], 1)}
        own["time ratio"] = round(float(np.median(np.divide(seconds[2], seconds[1]))), 3)
        found[name] = own
        save("words", {"sets": found}, options)
        told = [f"{title} {own[title]['hit@1']:.3f} / {own[title]['hit@10']:.3f}" for title in ("exact+bm25", *WAYS)]
        print(f"{name}, {memory.image.chunks} chunks:", *told, f"time ratio {own['time ratio']}", flush=True)


if __name__ == "__main__":
    main()
