"""Draws docs/walk.png: a walk through a memory of some standard-library modules."""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from treemem import Memory
from treemem.config import TreeConfig
from treemem.draw import draw_walk
from treemem.hierarchy.readers import standard_library

MODULES = (
    "bisect",
    "collections",
    "csv",
    "decimal",
    "functools",
    "heapq",
    "json",
    "pathlib",
    "random",
    "statistics",
    "zipfile",
)


def main() -> None:
    """Build, search, draw."""
    sources = [p for p in standard_library() if p.stem in MODULES or p.parent.name in MODULES]
    with tempfile.TemporaryDirectory() as folder:
        memory = Memory.build(sources, Path(folder) / "memory", config=TreeConfig(fanout=8))
        axes = draw_walk(memory, memory.search("merge several sorted inputs", k=3, mode="walk", beam=8))
        axes.figure.savefig(Path(__file__).parent / "walk.png", dpi=110, bbox_inches="tight")
        plt.close()


if __name__ == "__main__":
    main()
