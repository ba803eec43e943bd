"""How long the tree of a memory takes to grow from its chunk vectors, and how much memory that needs."""

from __future__ import annotations

import time

import numpy as np
from common import arguments, peak_gb, save

from treemem import Memory
from treemem.hierarchy.grow import grow
from treemem.storage.levels import contextual


def main() -> None:
    """Grow the tree anew, compare it with the stored one, and say how long it took."""
    parser = arguments(__doc__)
    parser.add_argument("--set", default="wiki_multi")
    options = parser.parse_args()
    memory = Memory.open(options.memories / options.set)
    config = memory.store.info().config
    encodings, chunk_ends = (memory.store.read(name) for name in ("chunks/encodings", "documents/chunk_ends"))
    begin = time.perf_counter()
    vectors = contextual(encodings, chunk_ends, config.alpha)
    contextualised = time.perf_counter()
    levels = grow(vectors, config.fanout, config.spill, config.seed)
    end = time.perf_counter()
    stored = memory.store.levels()
    figures = {
        "set": options.set,
        "chunks": len(vectors),
        "levels": [len(level.vectors) for level in levels],
        "vectors_seconds": round(contextualised - begin, 1),
        "grow_seconds": round(end - contextualised, 1),
        "peak_gb": peak_gb(),
        "as_stored": len(levels) == len(stored)
        and all(np.array_equal(a.children, b.children) for a, b in zip(levels, stored, strict=True)),
    }
    print(figures)
    save("growing", figures, options)


if __name__ == "__main__":
    main()
