"""What int8 costs: exact search by quantised vectors beside the stored float16 ones, on every set."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import arguments, hits, save

from treemem import Memory
from treemem.evaluation import load_set
from treemem.hierarchy.build import contextual_file
from treemem.storage.levels import as_float32

BLOCK = 256


def main() -> None:
    """Search all sets for which there is a memory, by the same questions both ways."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--most", type=int, default=1500, help="questions of a set")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for place in sorted(path for path in options.memories.iterdir() if (options.data / path.name).is_dir()):
        try:
            queries = load_set(options.data / place.name).sample(options.most, options.seed).queries
        except Exception as error:
            print(f"{place.name}: left out ({error})")
            continue
        memory = Memory.open(place)
        embedded = memory.searcher.embed([query.text for query in queries])
        # A question that is cut has several embeddings; one is enough to compare arithmetic by.
        vectors = np.stack([one.vectors[0] for one in embedded])
        scratch = place / "benchmark-vectors"
        stored = contextual_file(memory.store, memory.info().config.alpha, scratch)
        full = np.concatenate([_best(vectors[i : i + BLOCK], stored) for i in range(0, len(vectors), BLOCK)])
        scratch.unlink()
        quantised = memory.searcher.kernels.exact(memory.image.tree, vectors[:, None], 10)[0]
        same = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(full, quantised, strict=True)])
        one, two = hits(memory, queries, full), hits(memory, queries, quantised)
        rows[place.name] = {
            "chunks": memory.image.chunks,
            "questions": len(queries),
            "float16": one,
            "int8": two,
            "loss hit@10": round(one["hit@10"] - two["hit@10"], 4),
            "agreement@10": round(float(same), 4),
        }
        print(place.name, rows[place.name], flush=True)
    save("precision", {"sets": rows}, options)


def _best(queries: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """The best ten of many, part by part."""
    ids, scores = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    for start in range(0, len(stored), 1 << 15):
        own = queries @ as_float32(stored[start : start + (1 << 15)]).T
        best = np.argpartition(-own, 9, axis=1)[:, :10] if own.shape[1] > 10 else np.argsort(-own, axis=1)
        ids = np.concatenate([ids, best + start], axis=1)
        scores = np.concatenate([scores, np.take_along_axis(own, best, 1)], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    return np.take_along_axis(ids, order, 1)


if __name__ == "__main__":
    main()
