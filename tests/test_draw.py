"""Pictures of a walk."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from treemem.draw import draw_walk
from treemem.hierarchy.memory import Memory

pyplot = pytest.importorskip("matplotlib.pyplot")


def test_a_title_with_signs_of_mathematics(small_memory: Memory) -> None:
    result = replace(small_memory.search("bees", 3), query=r"what does $\frac$ mean?")
    axes = draw_walk(small_memory, result, pyplot.figure().subplots())
    axes.figure.savefig(io.BytesIO())
    assert result.query in axes.get_title()
