"""Pictures of a walk and of where a model looked; needs matplotlib, which the extra `notebooks` brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from treemem.errors import InputError, MissingPackage
from treemem.kernels import ServingTree
from treemem.types import Answer, SearchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from treemem.hierarchy.memory import Memory


def positions(tree: ServingTree) -> list[np.ndarray]:
    """Where each element stands from left (0) to right (1), so that children stand below their parents; top first.

    NaN for what is not in the tree any more.
    """
    order: np.ndarray = np.arange(1)
    out = []
    for blocks, size in zip(tree.levels, tree.sizes, strict=True):
        children = [blocks.ids[blocks.offsets[node] : blocks.offsets[node + 1]] for node in order]
        met = np.concatenate(children) if children else np.empty(0, np.int32)
        first = np.sort(np.unique(met, return_index=True)[1])  # a chunk under two nodes stands below the first
        order = met[first]
        places = np.full(size, np.nan)
        places[order] = (np.arange(len(order)) + 0.5) / max(1, len(order))
        out.append(places)
    return out


def draw_walk(memory: Memory, result: SearchResult, axes: Axes | None = None) -> Axes:
    """Draw which nodes of each level a walk kept, and the ways to its best hits.

    Args:
        memory: what was searched.
        result: of a search in mode `walk`, `hybrid` or `deep`.
        axes: where to draw; a new figure if none are given.

    Raises:
        InputError: no walk was made for this result.
        MissingPackage: matplotlib is not installed.
    """
    if not result.gathered:
        raise InputError("this result has no walk to draw; search in mode walk, hybrid or deep")
    plt = _pyplot()
    axes = axes or plt.subplots(figsize=(10, 1 + 1.1 * memory.image.tree.depth))[1]
    depth = memory.image.tree.depth
    # By the numbers that results name nodes by.
    places = [
        own if row == depth - 1 else own[memory.image.places(depth - row)]
        for row, own in enumerate(positions(memory.image.tree))
    ]
    for row, level in enumerate(result.gathered):
        height = depth - row
        axes.scatter(places[row], np.full(len(places[row]), height), s=6, color="0.85", zorder=1)
        kept = [node.node for node in level.nodes]
        # The best is drawn last, on top of the others.
        ranks = np.linspace(1, 0.25, len(kept))
        at = places[row][kept][::-1]
        dots = axes.scatter(at, np.full(len(at), height), s=28, c=ranks[::-1], cmap="viridis", vmin=0, vmax=1, zorder=3)
        dots.set_edgecolor("white")
        axes.text(1.01, height, f"level {level.level}: kept {len(kept)} of {level.size:,}", va="center", fontsize=9)
    for number, hit in enumerate(result.hits[:5]):
        way = [(places[depth - step.level][step.node], step.level) for step in hit.path]
        axes.plot(*zip(*way, strict=True), color="tab:red", alpha=1 - 0.17 * number, linewidth=1.2, zorder=2)
    title = f"“{result.query}”  ({result.scored:,} of {memory.image.chunks:,} vectors scored)"
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.set_xlim(-0.01, 1.26)
    axes.axis("off")
    return axes


def draw_attribution(answer: Answer, axes: Axes | None = None, *, gradients: bool = False, each: bool = False) -> Axes:
    """Draw where a model looked while it wrote: tokens of the reply from left to right, what it was given downwards.

    Args:
        answer: of `Memory.ask` with `attribute`.
        axes: where to draw; a new figure if none are given.
        gradients: gradient times input in place of attention.
        each: a line for every vector, not for every level.

    Raises:
        InputError: the answer has no attribution, or none by gradients.
        MissingPackage: matplotlib is not installed.
    """
    found = answer.attribution
    if found is None or (gradients and found.gradients is None):
        raise InputError('this answer has nothing of that kind to draw; ask with attribute="gradients" or "attention"')
    groups = {name: own for name, own in found.grouped(gradients=gradients, each=each).items() if name != "rest"}
    shares = np.array(list(groups.values())).reshape(len(groups), len(found.tokens))
    if axes is None:
        axes = _pyplot().subplots(
            figsize=(2 + 0.45 * max(4, len(found.tokens)), 1 + (0.16 if each else 0.32) * len(groups))
        )[1]
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=7 if each else None)
    tokens = [token.strip() or repr(token) for token in found.tokens]
    axes.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right", parse_math=False)
    axes.figure.colorbar(image, ax=axes, label="share", fraction=0.03, pad=0.02)
    axes.set_title("gradient x input" if gradients else "attention", fontsize=11)
    return axes


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingPackage("drawing needs matplotlib; run: pip install matplotlib") from error
    return plt
