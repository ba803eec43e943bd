"""What the packaged decoder is worth to a walk and to hybrid, and what it costs a query."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import arguments, hits, percentiles, save

from treemem import Memory
from treemem.config import Mode, SearchConfig
from treemem.evaluation import load_set
from treemem.hierarchy.walk import Searcher
from treemem.hierarchy.weights import load_hierarchy

# Development questions of sets whose train splits the decoder saw, then sets that it never saw.
SETS: tuple[tuple[str, str | None], ...] = (
    *((name, "dev") for name in ("medquad", "fairytaleqa", "wiki_multi", "wikiqa", "qmsum")),
    *((name, None) for name in ("locomo", "cranfield", "npl", "hotpotqa_200", "musique_100", "limit_small")),
)
MODES: tuple[Mode, ...] = ("walk", "hybrid")


def main() -> None:
    """Search for every question with and without the decoder, one right after the other."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--most", type=int, default=400, help="questions of a set")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name, split in SETS:
        place = options.memories / name
        if not place.exists() or (options.sets and name not in options.sets):
            continue
        memory = Memory.open(place)
        parts = (memory.image, memory.searcher.encoder, memory.config.chunk_tokens, memory.config.language)
        searcher = Searcher(*parts, load_hierarchy("default"))
        queries = load_set(options.data / name, split=split).sample(options.most, options.seed).queries
        embedded = searcher.embed([query.text for query in queries])
        own: dict[str, Any] = {"split": split, "questions": len(queries)}
        for mode in MODES:
            configs = [SearchConfig(mode, decoder=decoder) for decoder in (False, True)]
            ranked: list[list[np.ndarray]] = [[], []]
            seconds: list[list[float]] = [[], []]
            for query in embedded:
                for config, chunks, times in zip(configs, ranked, seconds, strict=True):
                    start = time.perf_counter()
                    chunks.append(searcher.rank(query, config).chunks[:10])
                    times.append(time.perf_counter() - start)
            without, decoded = (
                {**hits(memory, queries, r), **percentiles(s)} for r, s in zip(ranked, seconds, strict=True)
            )
            more = float(np.median(np.subtract(seconds[1], seconds[0]))) * 1e3
            own[mode] = {"without": without, "with": decoded, "ms_more_p50": round(more, 3)}
            print(
                f"{name:13} {mode:6} {without['hit@1']:.3f} / {without['hit@10']:.3f} -> "
                f"{decoded['hit@1']:.3f} / {decoded['hit@10']:.3f}, {more:.1f} ms more",
                flush=True,
            )
        found[name] = own
    save("decoder", {"sets": found}, options)


if __name__ == "__main__":
    main()
