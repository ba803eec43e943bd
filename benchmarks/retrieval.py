"""Every mode of search on the public sets, beside exact search, BM25, rank fusion and faiss HNSW; untrained tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, arguments, hits, save

from treemem import Memory
from treemem.evaluation import EvalSet, evaluate, load_set
from treemem.storage.levels import as_float32

# Set, splits, whether searched inside the document that a question is about.
RUNS: tuple[tuple[str, str | None, bool], ...] = (
    ("medquad", "test", False),
    ("fairytaleqa", "test", False),
    ("scifact", "test", False),
    ("locomo", None, False),
    ("qmsum", "test", False),
    ("qmsum", "test", True),
    ("wiki_multi", "dev,test", False),
)
DEVELOPMENT: tuple[tuple[str, str | None, bool], ...] = (
    ("medquad", "dev", False),
    ("fairytaleqa", "dev", False),
    ("scifact", "train", False),
)
"""For choosing; the test splits are for the end."""
MODES = ("walk", "exact", "bm25", "rrf", "hybrid", "exact+bm25")
DEEP_QUERIES = 400


def plain_peers(memory: Memory, questions: EvalSet) -> dict[str, dict[str, float]]:
    """Exact search and HNSW (M = 32, efSearch = 64) over plain chunk vectors, without the document's part."""
    import faiss

    vectors = as_float32(memory.store.read("chunks/encodings"))
    queries = np.stack([embedded.vectors[0] for embedded in memory.searcher.embed([q.text for q in questions.queries])])
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    hnsw = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.add(vectors)
    hnsw.hnsw.efSearch = 64
    out = {}
    for name, index in {"exact, plain vectors": flat, "HNSW M=32 ef 64, plain vectors": hnsw}.items():
        faiss.cvar.hnsw_stats.reset()
        found = index.search(queries, 10)[1]
        out[name] = hits(memory, questions.queries, found)
        if index is hnsw:
            out[name]["scored"] = faiss.cvar.hnsw_stats.ndis / len(queries)
    return out


def summary(document: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    columns = (*MODES, "hybrid, some queries", "deep, the same")
    lines = ["| set | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, run in document["runs"].items():
        rows = [*(run["modes"][mode] for mode in MODES), *(run["deep"]["modes"][mode] for mode in ("hybrid", "deep"))]
        cells = [f"{row['hit@1']:.3f} / {row['hit@10']:.3f}" for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the sets whose memories are there, and put the figures beside those measured before."""
    parser = arguments(__doc__)
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--development", action="store_true", help="the development splits, for choosing")
    parser.add_argument("--max-queries", type=int)
    parser.add_argument("--no-peers", action="store_true", help="keep the figures of other libraries as they are")
    options = parser.parse_args()
    result = "retrieval-development" if options.development else "retrieval"
    path = RESULTS / f"{result}.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for name, split, inside in DEVELOPMENT if options.development else RUNS:
        place = Path(options.memories) / name
        if not place.exists() or (options.sets and name not in options.sets):
            continue
        key = f"{name} {split or 'all'}" + (", within the document" if inside else "")
        memory = Memory.open(place)
        questions = load_set(options.data / name, split=split)
        peers = runs.get(key, {}).get("peers")
        most = options.max_queries
        report = evaluate(memory, questions, MODES, within_document=inside, max_queries=most, seed=options.seed)
        runs[key] = report.to_json()
        runs[key]["memory"] = runs[key]["settings"]["memory"] = name  # not its place on this machine
        # Level 0 encodes 32 chunks a query, so it is measured on fewer, beside hybrid on the same.
        most = min(most or DEEP_QUERIES, DEEP_QUERIES)
        deep = evaluate(
            memory, questions, ("hybrid", "deep"), within_document=inside, max_queries=most, seed=options.seed
        )
        runs[key]["deep"] = {"queries": deep.to_json()["queries"], "modes": deep.to_json()["modes"]}
        if name == "medquad" and not options.no_peers:
            peers = plain_peers(memory, questions)
        if peers is not None:
            runs[key]["peers"] = peers
        save(result, {"runs": runs}, options)
        print(summary({"runs": {key: runs[key]}}), flush=True)


if __name__ == "__main__":
    main()
