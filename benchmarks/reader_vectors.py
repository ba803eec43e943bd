"""What keeping reader vectors costs and saves: bytes, time of building, time of gathering them for a question."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, save

from treemem import Memory
from treemem.evaluation import load_set
from treemem.hierarchy.context import gather_vectors
from treemem.hierarchy.embed import load_encoder

SHAPE = (2, 8, 2)


def main() -> None:
    """Build with and without, ask both the same questions in turn."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--set", default="locomo")
    parser.add_argument("--most", type=int, default=100, help="questions")
    options = parser.parse_args()
    encoder = load_encoder()
    encoder.encode(["warm up"] * 8)
    scratch = Path(tempfile.mkdtemp())
    corpus = options.data / options.set / "corpus.jsonl.zst"
    memories, out = {}, {}
    for title, kept in (("without", False), ("with", True)):
        begin = time.perf_counter()
        memory = Memory.build(corpus, scratch / title, encoder=encoder, store_reader_vectors=kept)
        memories[title] = memory
        text = sum(len(memory.image.chunk_text(chunk).encode()) for chunk in range(memory.image.chunks))
        out[title] = {
            "build_seconds": round(time.perf_counter() - begin, 1),
            "store_bytes": memory.info().store_bytes,
            "text_bytes": text,
        }
    queries = load_set(options.data / options.set).sample(options.most, options.seed).queries
    found = memories["with"].search_many([query.text for query in queries])
    times: dict[str, list[float]] = {"from text": [], "stored": []}
    for result in found:
        for title, stored in (("from text", None), ("stored", memories["with"].stored_reader_vectors)):
            begin = time.perf_counter()
            gather_vectors(memories["with"].image, encoder, result.gathered, result.hits, SHAPE, stored)
            times[title].append(1e3 * (time.perf_counter() - begin))
    chunks = memories["with"].image.chunks
    figures: dict[str, Any] = {
        "set": options.set,
        "chunks": chunks,
        **out,
        "bytes a chunk": round((out["with"]["store_bytes"] - out["without"]["store_bytes"]) / chunks),
        "times the text's bytes": round(
            (out["with"]["store_bytes"] - out["without"]["store_bytes"]) / out["with"]["text_bytes"], 2
        ),
        "gathering, ms, medians": {title: round(float(np.median(own)), 2) for title, own in times.items()},
    }
    print(figures)
    save("reader_vectors", figures, options)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
