"""From how many chunks on walking is quicker than scoring every chunk: what mode `auto` goes by."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from common import arguments, save

from treemem import Memory
from treemem.config import Mode, SearchConfig
from treemem.evaluation import load_set
from treemem.kernels import cpu

SETS = ("limit_small", "locomo", "musique_100", "cranfield", "pubmedqa", "fairytaleqa", "npl")
PAIRS: tuple[tuple[Mode, Mode], ...] = (("exact", "walk"), ("exact+bm25", "hybrid"))


def main() -> None:
    """Search small memories both ways, one right after the other, on one core."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--most", type=int, default=300, help="questions of a set")
    options = parser.parse_args()
    os.environ[cpu.THREADS] = "1"
    rows: dict[str, Any] = {}
    for name in SETS:
        if not (options.memories / name).exists():
            continue
        memory = Memory.open(options.memories / name)
        queries = load_set(options.data / name).sample(options.most, options.seed).queries
        embedded = memory.searcher.embed([query.text for query in queries])
        own: dict[str, Any] = {"chunks": memory.image.chunks, "questions": len(queries)}
        for pair in PAIRS:
            configs = [SearchConfig(mode, decoder=False) for mode in pair]
            seconds: list[list[float]] = [[], []]
            for query in [*embedded[:20], *embedded]:
                for config, times in zip(configs, seconds, strict=True):
                    begin = time.perf_counter()
                    memory.searcher.rank(query, config)
                    times.append(time.perf_counter() - begin)
            one, two = (np.array(times[20:]) for times in seconds)
            own[" to ".join(pair)] = round(float(np.median(one / two)), 3)
            for mode, times in zip(pair, (one, two), strict=True):
                own[f"ms_p50 {mode}"] = round(float(np.median(times)) * 1e3, 3)
        rows[name] = own
        print(name, own, flush=True)
    save("crossover", {"sets": rows}, options)


if __name__ == "__main__":
    main()
