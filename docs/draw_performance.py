"""Draws docs/performance.png from benchmarks/results: what a walk costs as memories grow, and beside other indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """One result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return found


def draw_growth(scored: Axes, time: Axes, sizes: dict[str, Any]) -> None:
    """Vectors looked at, and milliseconds, by the number of chunks."""
    counts = np.array(sorted(map(int, sizes)))
    rows = [sizes[str(count)] for count in counts]
    looked_at = [row["scored"] for row in rows]
    slope, start = np.polyfit(np.log(counts) / np.log(32), looked_at, 1)
    scored.plot(counts, looked_at, "o-", color="C0", label="a walk, beam 32")
    fitted = start + slope * np.log(counts) / np.log(32)
    scored.plot(counts, fitted, "--", color="0.5", label=f"fitted: {slope:.0f} more for 32 times the chunks")
    scored.set(title="vectors looked at for a query", xlabel="chunks", xscale="log", ylim=(0, None))
    time.plot(counts, [row["ms_p50"] for row in rows], "o-", color="C0", label="walk by vectors")
    for name, title, colour in (
        ("signatures", "walk by vectors and words", "C2"),
        ("walk and inverted index", "walk, then an inverted index (tantivy)", "C3"),
    ):
        known = [
            (count, row["words"][name]["ms_p50"]) for count, row in zip(counts, rows, strict=True) if "words" in row
        ]
        time.plot(*np.array(known).T, "o-", color=colour, label=title)
    time.set(title="ms for a query, one core (median)", xlabel="chunks", xscale="log", yscale="log")
    for axes in (scored, time):
        axes.legend(frameon=False, fontsize=8)


def draw_peers(axes: Axes, rows: dict[str, Any], key: str, title: str) -> None:
    """hit@10 by time, each index a line over its settings."""
    for number, (start, label) in enumerate(
        (
            ("walk", "walk, beam"),
            ("faiss", "faiss HNSW, ef"),
            ("plain", "the same, efConstruction 40"),
            ("hnswlib", "hnswlib, ef"),
            ("usearch", "usearch, ef"),
        )
    ):
        own = [(row[key], row["hit@10"], name.split()[-1]) for name, row in rows.items() if name.startswith(start)]
        axes.plot([x for x, _, _ in own], [y for _, y, _ in own], "o-", color=f"C{number}", label=label)
        for x, y, setting in own:
            axes.annotate(setting, (x, y), xytext=(3, -9), textcoords="offset points", fontsize=7, color=f"C{number}")
    axes.set(title=title, xlabel="ms for a query (median)", ylabel="hit@10", xscale="log")
    axes.xaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.4, 0.8, 1.6]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    """Read, draw, save."""
    growth, peers = read("scaling"), read("peers-intel")
    figure, ((scored, time), (one, batch)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    draw_growth(scored, time, growth["sizes"])
    draw_peers(one, peers["rows"], "ms_p50", f"{peers['chunks']:,} chunks, one query, one thread")
    draw_peers(batch, peers["rows"], "batch_ms_p50", f"{peers['chunks']:,} chunks, 256 queries, two threads")
    for axes in (scored, time, one, batch):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(HERE / "performance.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
