"""Which nodes stand above a chunk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from treemem.kernels import ServingTree


class Ancestors:
    """The parents of every element of a tree, where a chunk may have several."""

    def __init__(self, tree: ServingTree) -> None:
        """Invert the tree's children."""
        self.depth = tree.depth
        self._sizes = tree.sizes
        # Bottom up, of each level but the top: elements' parents, and where each element's own begin.
        self._parents: list[tuple[np.ndarray, np.ndarray]] = []
        for elements, above, size in zip(tree.live[:0:-1], tree.owners[:0:-1], tree.sizes[:0:-1], strict=True):
            begins = np.concatenate([[0], np.cumsum(np.bincount(elements, minlength=size))])
            self._parents.append((above[np.argsort(elements, kind="stable")], begins))

    def of(self, chunk: int) -> list[np.ndarray]:
        """What stands above a chunk, top level first, and the chunk itself last."""
        out = [np.array([chunk])]
        for parents, begins in self._parents:
            above = [parents[begins[element] : begins[element + 1]] for element in out[-1]]
            out.append(np.unique(np.concatenate(above)))
        return out[::-1]

    def held(
        self, best: Int32[np.ndarray, " k"], kept: Sequence[Int32[np.ndarray, " _"]]
    ) -> list[tuple[float, float, float]]:
        """How much of the best chunks a walk holds at every level.

        Args:
            best: exact search's chunks, best first, at least one.
            kept: what the walk kept, top level first, the chunks that it scored last.

        Returns:
            Per level, top first: how many elements were kept, whether they lead to the first chunk, and the share of
            the chunks that they lead to.
        """
        ways = [self.of(int(chunk)) for chunk in best]
        out = []
        for level, elements in enumerate(kept):
            held = [bool(np.isin(way[level], elements).any()) for way in ways]
            out.append((float(len(elements)), float(held[0]), float(np.mean(held))))
        return out
