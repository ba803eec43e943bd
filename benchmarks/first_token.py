"""Time to the first token of a reply to ten passages as text, as vectors, and as both; one question after the other.

The reader is untrained: what it says means nothing, and takes as long.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
from common import arguments, save

from treemem import Memory
from treemem.config import SearchConfig
from treemem.evaluation import load_set
from treemem.hierarchy.context import PassageText, gather_vectors
from treemem.hierarchy.generate import LocalModel, load_language_model
from treemem.hierarchy.reader import (
    HOW,
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


def untrained(memory: Memory, model: LocalModel) -> ReadingModel:
    """A reader of ten chunks for this encoder and this model."""
    width = model.model.get_input_embeddings().weight.shape[1]
    config = ReaderConfig(memory.encoder.info, model_id(model), model.name, width, chunks=PASSAGES)
    return ReadingModel(model, Reader(config, embedding_scale(model.model)).eval())


def first_token(memory: Memory, reading: ReadingModel, found: SearchResult, how: How) -> dict[str, float]:
    """Milliseconds from the search's end to the first piece of the reply, and tokens of the prompt."""
    own = reading.reader.config
    begin = time.perf_counter()
    given = None
    if how != "text":
        given = gather_vectors(memory.image, memory.encoder, found.gathered, found.hits, (own.nodes, own.chunks, 0))
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
    memory = Memory.open(options.memories / options.set)
    model = load_language_model("smollm2")
    assert isinstance(model, LocalModel)
    reading = untrained(memory, model)
    queries = load_set(options.data / options.set).sample(options.most + 1, options.seed).queries
    rows: dict[How, list[dict[str, float]]] = {how: [] for how in HOW}
    for number, query in enumerate(queries):
        found = memory.search_many([query.text], SearchConfig("hybrid", k=PASSAGES))[0]
        for how, own in rows.items():
            measured = first_token(memory, reading, found, how)
            if number:  # the first pays for what is made once
                own.append(measured)
    medians = {
        how: {key: round(float(np.median([row[key] for row in own])), 1) for key in own[0]} for how, own in rows.items()
    }
    pairs = zip(rows["vectors"], rows["text"], strict=True)
    ratio = float(np.median([a["first_token"] / b["first_token"] for a, b in pairs]))
    out: dict[str, Any] = {
        "unit": "ms, medians",
        "passages": PASSAGES,
        "questions": len(rows["text"]),
        **medians,
        "vectors / text, median of pairs": round(ratio, 3),
        "reader": {key: value for key, value in asdict(reading.reader.config).items() if isinstance(value, int)},
    }
    print(out)
    save("first_token", out, options)


if __name__ == "__main__":
    main()
