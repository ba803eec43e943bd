"""Draws docs/autoencode.png from benchmarks/results/autoencode.json: loss and held-out accuracy against steps."""

from __future__ import annotations

import json
from pathlib import Path

from treemem.training.autoencode import draw_curves

HERE = Path(__file__).parent


def main() -> None:
    """Read, draw, save."""
    path = HERE.parent / "benchmarks" / "results" / "autoencode.json"
    runs = json.loads(path.read_text("utf-8"))["runs"]
    draw_curves({name.replace("x", " x "): run["curve"] for name, run in runs.items()}, HERE / "autoencode.png")


if __name__ == "__main__":
    main()
