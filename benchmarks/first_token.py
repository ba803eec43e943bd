"""Time to the first token of a reply to ten passages as text, as vectors, and as both; one question after the other.

Vectors of the chunks' windows are encoded when asked, or kept in the store (`treemem build --store-reader-vectors`).
The reader is untrained: what it says means nothing, and takes as long.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, save

from treemem import Memory
from treemem.config import SearchConfig
from treemem.evaluation import load_set
from treemem.hierarchy.context import PassageText, gather_vectors
from treemem.hierarchy.generate import LocalModel, load_language_model
from treemem.hierarchy.reader import (
    How,
    Reader,
    ReaderConfig,
    ReadingModel,
    embedding_scale,
    model_id,
    reader_prompt,
)
from treemem.types import SearchResult

PASSAGES = 10
WAYS: tuple[tuple[How, bool], ...] = (("text", False), ("vectors", False), ("vectors", True), ("both", True))
"""How the reader reads, and whether from windows that are kept."""


def untrained(memory: Memory, model: LocalModel) -> ReadingModel:
    """A reader of ten chunks for this encoder and this model."""
    width = model.model.get_input_embeddings().weight.shape[1]
    config = ReaderConfig(memory.encoder.info, model_id(model), model.name, width, chunks=PASSAGES)
    return ReadingModel(model, Reader(config, embedding_scale(model.model)).eval())


def first_token(memory: Memory, reading: ReadingModel, found: SearchResult, how: How, kept: bool) -> dict[str, float]:
    """Milliseconds from the search's end to the first piece of the reply, and tokens of the prompt."""
    own = reading.reader.config
    stored = memory.stored_reader_vectors if kept else None
    begin = time.perf_counter()
    given = None
    if how != "text":
        shape = (own.nodes, own.chunks, 0)
        given = gather_vectors(memory.image, memory.encoder, found.gathered, found.hits, shape, stored)
    gathered = time.perf_counter() - begin
    texts = [PassageText(hit.document.title, hit.text) for hit in found.hits] if how != "vectors" else []
    prompt = reader_prompt(reading.model, found.query, texts, 0 if given is None else len(given))
    stream = reading.stream(how, prompt, given, 8)
    next(stream)
    first = time.perf_counter() - begin
    stream.close()
    return {"gathered": gathered * 1e3, "first_token": first * 1e3, "tokens": len(prompt.ids)}


def main() -> None:
    """Alternate the ways and report medians."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--set", default="locomo")
    parser.add_argument("--most", type=int, default=25, help="questions")
    options = parser.parse_args()
    model = load_language_model("smollm2")
    assert isinstance(model, LocalModel)
    queries = load_set(options.data / options.set).sample(options.most + 1, options.seed).queries
    rows: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        corpus = options.data / options.set / "corpus.jsonl.zst"
        memory = Memory.build(corpus, Path(scratch) / options.set, store_reader_vectors=True)
        reading = untrained(memory, model)
        for number, query in enumerate(queries):
            found = memory.search_many([query.text], SearchConfig("hybrid", k=PASSAGES))[0]
            for how, kept in WAYS:
                measured = first_token(memory, reading, found, how, kept)
                if number:  # the first pays for what is made once
                    rows.setdefault(f"{how}, kept" if kept else how, []).append(measured)
    medians = {
        how: {key: round(float(np.median([row[key] for row in own])), 1) for key in own[0]} for how, own in rows.items()
    }
    ratios = {
        f"{how} / text": round(
            float(np.median([a["first_token"] / b["first_token"] for a, b in zip(own, rows["text"], strict=True)])), 3
        )
        for how, own in rows.items()
        if how != "text"
    }
    out: dict[str, Any] = {
        "unit": "ms, medians",
        "passages": PASSAGES,
        "questions": len(rows["text"]),
        **medians,
        "median of pairs": ratios,
        "reader": {key: value for key, value in asdict(reading.reader.config).items() if isinstance(value, int)},
    }
    print(out)
    save("first_token", out, options)


if __name__ == "__main__":
    main()
