"""Every mode of search on the public sets, beside exact search, BM25, rank fusion and faiss HNSW; untrained tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from common import RESULTS, arguments, save

from treemem import Memory
from treemem.evaluation import EvalSet, evaluate, load_set
from treemem.evaluation.metrics import hit_at_k, right_chunks
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
MODES = ("walk", "exact", "bm25", "rrf", "hybrid", "exact+bm25", "deep")


def plain_peers(memory: Memory, questions: EvalSet) -> dict[str, dict[str, float]]:
    """Exact search and HNSW (M = 32, efSearch = 64) over plain chunk vectors, without the document's part."""
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
        hits = []
        for query, chunks in zip(questions.queries, found, strict=True):
            numbers = {d: memory.image.number_of(d) for d in (*query.relevant, *query.spans)}
            spans = {numbers[d]: own for d, own in query.spans.items()} if query.judged_by != "documents" else None
            relevant = [numbers[d] for d in query.relevant]
            right = right_chunks(memory.image.document_of(chunks), memory.image.spans[chunks, :2], relevant, spans)
            hits.append((hit_at_k(right, 1), hit_at_k(right, 10)))
        means = np.mean(hits, axis=0)
        out[name] = {"hit@1": float(means[0]), "hit@10": float(means[1])}
        if index is hnsw:
            out[name]["scored"] = faiss.cvar.hnsw_stats.ndis / len(queries)
    return out


def summary(document: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = ["| set | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for name, run in document["runs"].items():
        cells = [f"{run['modes'][m]['hit@1']:.3f} / {run['modes'][m]['hit@10']:.3f}" for m in MODES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the sets whose memories are there, and put the figures beside those measured before."""
    parser = arguments(__doc__)
    parser.add_argument("--sets", nargs="*", help="only these sets")
    options = parser.parse_args()
    path = RESULTS / "retrieval.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for name, split, inside in RUNS:
        place = Path(options.memories) / name
        if not place.exists() or (options.sets and name not in options.sets):
            continue
        key = f"{name} {split or 'all'}" + (", within the document" if inside else "")
        memory = Memory.open(place)
        questions = load_set(options.data / name, split=split)
        report = evaluate(memory, questions, MODES, within_document=inside, seed=options.seed)
        runs[key] = report.to_json()
        runs[key].get("settings", {}).pop("memory", None)
        if name == "medquad":
            runs[key]["peers"] = plain_peers(memory, questions)
        save("retrieval", {"runs": runs}, options)
        print(summary({"runs": {key: runs[key]}}), flush=True)


if __name__ == "__main__":
    main()
