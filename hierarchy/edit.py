"""Edits of a tree: chunks take seats in it or leave it, and what stands above them is computed anew.

An edit works on what changes alone: the nodes that get or lose children, those that a full node is split into, and
their ancestors. A node splits as in a B-tree (Bayer and McCreight 1972), by the clustering that trees are grown with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32, Int, Int32

from treemem.config import TreeConfig
from treemem.hierarchy.grow import SLACK, complements, grow, kmeans, seats, seats_of_an_element
from treemem.kernels import back_end
from treemem.storage.change import LevelChange, TreeChange
from treemem.storage.image import Image
from treemem.storage.levels import Level, Residual, as_float32, node_vectors, unit
from treemem.storage.schema import REMOVED

SEAT_BEAM = 32
"""How many nodes of each level a walk keeps that looks for a chunk's seats."""
OFFERED = 2
"""How many nodes a chunk asks for each of its seats; the best is split where none has room."""
WALKS_AT_ONCE = 1024
SPLIT_AT_ONCE = 256
"""Nodes whose children are scaled in one go."""
_NOTHING = np.empty(0, np.int32)


class _Nodes:
    """One level of nodes while it is edited, by their numbers: what the image has, and what has changed."""

    def __init__(self, image: Image, level: int) -> None:
        self._names = image.names(level)
        self._places = image.places(level)
        self._below = image.names(level - 1) if level > 2 else None
        self._above = image.names(level + 1) if level < image.tree.depth else None
        self._blocks = image.tree.levels[image.tree.depth - level + 1]
        self._parents = image.tree.node_parents[image.tree.depth - level]
        self._vectors = image.node_vectors(level)
        self.size = self.before = len(self._places)
        self._children: dict[int, np.ndarray] = {}
        self._parent: dict[int, int] = {}
        self._changed, self._new = _NOTHING, np.empty((0, self._vectors.shape[1]), np.float16)

    @property
    def changed(self) -> list[int]:
        """Nodes whose children have changed, or what these are made of."""
        return sorted(self._children)

    def holders(self, gone: np.ndarray) -> np.ndarray:
        """The nodes that stand above any of some elements, given as one truth value for each place below."""
        entries = np.flatnonzero(gone[self._blocks.ids])
        places = np.unique(np.searchsorted(self._blocks.offsets, entries, side="right") - 1)
        named = self._names[places]
        known = named < len(self._places)  # others have gone, and left their places behind
        named, places = named[known], places[known]
        return np.asarray(named[self._places[named] == places])

    def named(self, places: np.ndarray) -> np.ndarray:
        """The numbers of nodes by their places in the image."""
        return np.asarray(self._names[places])

    def children(self, node: int) -> np.ndarray:
        """The children of a node, rising."""
        own = self._children.get(node)
        if own is None:
            place = self._places[node]
            ids = self._blocks.ids[self._blocks.offsets[place] : self._blocks.offsets[place + 1]]
            own = np.sort(ids if self._below is None else self._below[ids])
        return own

    def set_children(self, node: int, children: np.ndarray) -> None:
        self._children[node] = np.sort(children).astype(np.int32)

    def touch(self, node: int) -> None:
        """What a node is made of has changed."""
        self._children.setdefault(node, self.children(node).astype(np.int32))

    def parent(self, node: int) -> int:
        """The parent of a node that is not at the top."""
        if node not in self._parent:
            assert self._above is not None
            return int(self._above[self._parents[self._places[node]]])
        return self._parent[node]

    def set_parent(self, node: int, parent: int) -> None:
        self._parent[node] = parent

    def add(self, children: np.ndarray) -> int:
        """A new node."""
        self.size += 1
        self.set_children(self.size - 1, children)
        return self.size - 1

    def drop(self, node: int) -> int | None:
        """Remove a node; the last one takes its number. Returns the number that that one had."""
        last = self.size - 1
        moved = None
        if node != last:
            self._children[node] = self.children(last).astype(np.int32)
            if self._above is not None or last in self._parent:
                self._parent[node] = self.parent(last)
            moved = last
        self._children.pop(last, None)
        self.size = last
        return moved

    def settle(self, below: Callable[[np.ndarray], np.ndarray], residual: Residual | None) -> LevelChange:
        """Compute the vectors of all that have changed.

        Args:
            below: gives the vectors of children by their numbers.
            residual: the level's trained encoder.
        """
        changed = np.array(self.changed, np.int32)
        children = tuple(self._children[node] for node in changed.tolist())
        ends = np.cumsum([0, *map(len, children)]).astype(np.int64)
        flat = np.concatenate([_NOTHING, *children])
        vectors = node_vectors(_Fetched(below, self._vectors.shape[1]), ends, flat, residual)
        self._changed, self._new = changed, vectors
        return LevelChange(self.size, changed, children, vectors)

    def vectors(self, nodes: np.ndarray) -> np.ndarray:
        """Vectors of nodes, float16; those that have changed only after `settle`."""
        known = nodes < self.before
        out = np.zeros((len(nodes), self._vectors.shape[1]), np.float16)
        out[known] = self._vectors[self._places[nodes[known]]]
        if len(self._changed):
            at = np.minimum(np.searchsorted(self._changed, nodes), len(self._changed) - 1)
            found = self._changed[at] == nodes
            out[found] = self._new[at[found]]
        return out


class _Fetched:
    """Rows that are made when they are asked for."""

    def __init__(self, fetch: Callable[[np.ndarray], np.ndarray], dimension: int) -> None:
        self._fetch = fetch
        self.shape = (0, dimension)

    def __len__(self) -> int:
        return 0

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._fetch(rows)


class Editor:
    """Edits one tree, once: `remove`, then `add`, then `finish`."""

    def __init__(
        self,
        image: Image,
        chunk_vectors: np.ndarray,
        config: TreeConfig,
        residuals: Mapping[int, Residual] | None = None,
    ) -> None:
        """Begin an edit.

        Args:
            image: of the snapshot that is edited.
            chunk_vectors: level 1 of it, float16 [chunks, d], may be memory-mapped.
            config: how the tree is built.
            residuals: trained level encoders by level.
        """
        self.image = image
        self.config = config
        self._chunks = chunk_vectors
        self._added = np.empty((0, chunk_vectors.shape[1]), np.float16)
        self._residuals = residuals or {}
        self._rng = np.random.default_rng(config.seed)
        self._levels = [_Nodes(image, level) for level in range(2, image.tree.depth + 1)]
        self._alive = np.repeat(image.status != REMOVED, np.diff(image.chunk_ends, prepend=0))

    def remove(self, chunks: Int[np.ndarray, " n"]) -> None:
        """Take chunks out of their nodes."""
        gone = np.zeros(len(self._alive), bool)
        gone[chunks] = True
        self._alive[chunks] = False
        if not self._levels:
            return
        for node in self._levels[0].holders(gone).tolist():
            children = self._levels[0].children(node)
            self._levels[0].set_children(node, children[~gone[children]])

    def add(self, vectors: Float16[np.ndarray, "n d"]) -> None:
        """Give chunks their seats; their numbers follow those of all that are there."""
        first = len(self._alive)
        self._added = vectors
        before = int(self._alive.sum())
        self._alive = np.concatenate([self._alive, np.ones(len(vectors), bool)])
        if not self._levels or len(vectors) == 0 or len(vectors) > before:
            return
        taken: dict[int, list[int]] = {}
        for start in range(0, len(vectors), WALKS_AT_ONCE):
            offers = self._offers(vectors[start : start + WALKS_AT_ONCE]).tolist()
            for chunk, offered in enumerate(offers, first + start):
                own: list[int] = []
                for nodes in offered:
                    open_to = [node for node in nodes if node >= 0 and node not in own]
                    with_room = [node for node in open_to if self._room(node) > len(taken.get(node, ()))]
                    own += (with_room or open_to)[:1]
                for node in own:
                    taken.setdefault(node, []).append(chunk)
        for node, chunks in taken.items():
            self._levels[0].set_children(node, np.concatenate([self._levels[0].children(node), chunks]))

    def _room(self, node: int) -> int:
        """How many more children a node of level 2 takes before it has to be split."""
        return self.config.fanout - len(self._levels[0].children(node))

    def finish(self) -> TreeChange:
        """What has become of the tree."""
        alive = int(self._alive.sum())
        grown = self.config.fanout * 2
        if len(self._added) > alive - len(self._added) or (not self._levels and alive > grown):
            return TreeChange(regrown=self._regrown())
        if alive == 0 or not self._levels:
            return TreeChange(regrown=() if self._levels else None)
        changes = []
        below: Callable[[np.ndarray], np.ndarray] = self._chunk_vectors
        for number, nodes in enumerate(self._levels, 2):
            above = self._levels[number - 1] if number - 1 < len(self._levels) else None
            self._split(nodes, above, below)
            _drop_empty(nodes, above)
            changes.append(nodes.settle(below, self._residuals.get(number)))
            if above is not None:
                for node in nodes.changed:
                    above.touch(nodes.parent(node))
            below = nodes.vectors
        if changes[-1].size > grown:
            return TreeChange(regrown=self._raised(changes))
        return TreeChange(tuple(changes))

    # ---- inside

    def _chunk_vectors(self, chunks: np.ndarray) -> np.ndarray:
        known = chunks < len(self._chunks)
        out = np.empty((len(chunks), self._chunks.shape[1]), np.float16)
        out[known] = self._chunks[chunks[known]]
        out[~known] = self._added[chunks[~known] - len(self._chunks)]
        return out

    def _scaled(self, vectors: np.ndarray) -> Float32[np.ndarray, "n d"]:
        """Vectors as they are clustered."""
        return unit((as_float32(vectors) - self.image.cluster_mean) @ self.image.cluster_map)

    def _offers(self, vectors: Float16[np.ndarray, "n d"]) -> Int32[np.ndarray, "n copies offered"]:
        """For each seat of each chunk the nodes of level 2 that it may take, best first, -1 = none.

        They are the nearest that a walk finds, and for a further seat the complements of the first.
        """
        tree, kernels = self.image.tree, back_end()
        asked = self.image.asked(as_float32(vectors))[:, :, None]
        found = kernels.search(tree, asked, SEAT_BEAM, 1).nodes[-1]
        met, inverse = np.unique(found, return_inverse=True)
        candidates = (inverse.reshape(found.shape) - int(met[0] < 0)).astype(np.int32)  # -1 where there are fewer
        nodes = self._levels[0].named(met[met >= 0])
        centres = self._scaled(self._levels[0].vectors(nodes))
        rows = self._scaled(vectors)
        similarities = np.einsum("ncd,nd->nc", centres[candidates], rows)
        similarities[candidates < 0] = -np.inf
        order = np.argsort(-similarities, axis=1, kind="stable")
        nearest = np.take_along_axis(candidates, order, 1)
        out = [nearest[:, :OFFERED]]
        copies = seats_of_an_element(self.config.fanout, self.config.spill)
        if copies > 1:
            others, _ = complements(rows, centres, candidates, nearest[:, 0])
            others = np.pad(others, ((0, 0), (0, copies + OFFERED)), constant_values=-1)
            out += [others[:, seat : seat + OFFERED] for seat in range(copies - 1)]
        picked = np.stack(out, axis=1)
        return np.where(picked < 0, -1, nodes[picked]).astype(np.int32)

    def _split(self, nodes: _Nodes, above: _Nodes | None, below: Callable[[np.ndarray], np.ndarray]) -> None:
        """Split every node that has too many children; the first part keeps its number."""
        full = [node for node in nodes.changed if len(nodes.children(node)) > self.config.fanout]
        for start in range(0, len(full), SPLIT_AT_ONCE):
            own = full[start : start + SPLIT_AT_ONCE]
            children = [nodes.children(node) for node in own]
            rows = self._scaled(below(np.concatenate(children)))
            ends = np.cumsum([len(some) for some in children])
            for node, some, vectors in zip(own, children, np.split(rows, ends[:-1]), strict=True):
                parts = [some[seats] for seats in self._parts(vectors)]
                nodes.set_children(node, parts[0])
                new = [nodes.add(part) for part in parts[1:]]
                if above is not None:
                    parent = nodes.parent(node)
                    for other in new:
                        nodes.set_parent(other, parent)
                    above.set_children(parent, np.concatenate([above.children(parent), new]))

    def _parts(self, rows: Float32[np.ndarray, "children d"]) -> list[np.ndarray]:
        """Which children go together, by their places among `rows`."""
        fanout = self.config.fanout
        count = math.ceil(SLACK * len(rows) / fanout)
        room = min(fanout, math.ceil(SLACK * len(rows) / count))
        taken = seats(rows, kmeans(rows, count, self._rng), room)
        return [own[own >= 0] for own in taken if (own >= 0).any()]

    def _regrown(self) -> tuple[Level, ...]:
        """A tree over all chunks that are there."""
        alive = np.flatnonzero(self._alive).astype(np.int32)
        config = self.config
        levels = grow(self._chunk_vectors(alive), config.fanout, config.spill, config.seed, residuals=self._residuals)
        return tuple(
            Level(level.offsets, alive[level.children] if number == 0 else level.children, level.vectors)
            for number, level in enumerate(levels)
        )

    def _raised(self, changes: list[LevelChange]) -> tuple[Level, ...]:
        """All levels, with as many more above the top as that has outgrown."""
        levels = []
        for nodes, change in zip(self._levels, changes, strict=True):
            children = [nodes.children(node) for node in range(change.size)]
            offsets = np.cumsum([0, *map(len, children)]).astype(np.int64)
            levels.append(
                Level(offsets, np.concatenate(children).astype(np.int32), nodes.vectors(np.arange(change.size)))
            )
        while len(levels[-1].vectors) > 2 * self.config.fanout:
            top, number = levels[-1].vectors, len(levels) + 2
            rows = self._scaled(top)
            count = max(2, round(SLACK * len(top) / self.config.fanout))
            taken = seats(rows, kmeans(rows, count, self._rng), self.config.fanout)
            children = [np.sort(own[own >= 0]) for own in taken if (own >= 0).any()]
            offsets = np.cumsum([0, *map(len, children)]).astype(np.int64)
            flat = np.concatenate(children).astype(np.int32)
            levels.append(Level(offsets, flat, node_vectors(top, offsets, flat, self._residuals.get(number))))
        return tuple(levels)


def _drop_empty(nodes: _Nodes, above: _Nodes | None) -> None:
    """Remove the nodes without children, and number the others without gaps."""
    empty = [node for node in nodes.changed if len(nodes.children(node)) == 0]
    if above is not None:
        for node in empty:
            parent = nodes.parent(node)
            children = above.children(parent)
            above.set_children(parent, children[children != node])
    for node in reversed(empty):  # the last first, so that what takes a number is not empty itself
        moved = nodes.drop(node)
        if moved is not None and above is not None:
            parent = nodes.parent(node)
            children = above.children(parent)
            above.set_children(parent, np.where(children == moved, node, children))
