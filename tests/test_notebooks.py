"""Every notebook runs from top to bottom, and the pictures of a walk show what it kept."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from tests.models import saved_model

from treemem import Memory
from treemem.draw import draw_walk, positions
from treemem.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if "TREEMEM_LLM" in path.read_text("utf-8"):  # a tiny model is quicker than the packaged one
        monkeypatch.setenv("TREEMEM_LLM", str(saved_model(tmp_path / "llm")))
    # The kernel is another process: it must find treemem where this one does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    stored = [kinds(cell) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    fresh = [kinds(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert fresh == stored, "the stored outputs are not those of the code; run: make notebooks"


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """What kinds of output a cell has; their contents may differ from machine to machine."""
    return sorted(
        {
            "image" if "image/png" in out.get("data", {}) else "text"
            for out in cell.outputs
            if out.get("name") != "stderr"
        }
    )


def test_children_are_drawn_below_their_parents(small_memory: Memory) -> None:
    tree = small_memory.image.tree
    places = positions(tree)
    assert [len(level) for level in places] == list(tree.sizes)
    for above, below, blocks in zip(places, places[1:-1], tree.levels[1:-1], strict=False):
        owners = np.repeat(np.arange(len(above)), np.diff(blocks.offsets))
        order = blocks.ids[np.argsort(above[owners], kind="stable")]
        assert (np.diff(below[np.sort(order)]) != 0).all()
        means = np.array(
            [below[blocks.ids[blocks.offsets[n] : blocks.offsets[n + 1]]].mean() for n in range(len(above))]
        )
        assert (np.argsort(means) == np.argsort(above)).all(), "siblings stand among another node's children"


def test_a_walk_is_drawn_and_nothing_else(small_memory: Memory) -> None:
    axes = draw_walk(small_memory, small_memory.search("where does the river begin?", mode="walk", beam=2))
    assert len(axes.lines) == 5, "one line for each of the best hits"
    assert "vectors scored" in axes.get_title()
    with pytest.raises(InputError, match="no walk"):
        draw_walk(small_memory, small_memory.search("river", mode="bm25"))
