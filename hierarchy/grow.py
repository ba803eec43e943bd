"""Grows the tree: spherical k-means under a hard capacity, level by level, until the top is small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float32, Int32, Int64
from numba import njit

from treemem.storage.levels import (
    CLUSTERING_POWER,
    Level,
    Residual,
    Rows,
    Spread,
    as_float32,
    node_vectors,
    unit,
)
from treemem.types import Progress, no_progress

SLACK = 1.25
"""Nodes over the smallest number that could hold all children."""
CANDIDATES = 32
"""Nearest nodes that an element asks for a place, nearest first."""
TWO_STAGE_NODES = 4096
"""From this many nodes on, k-means first splits the elements into about sqrt(nodes) cells."""
LARGE_CELL = 4
"""A cell of more than this many times the mean size is split: equal vectors all fall into one."""
CELL_NEIGHBOURS = 32
"""From how many of the nearest cells an element's candidate nodes come."""
SOAR_WEIGHT = 3.0
"""How much more a further node costs an element whose residual there is parallel to that in its first node."""
COMPLEMENTS = 12
"""How many of the candidates an element asks for a further place."""
COMPLEMENT_BLOCK = 32
"""Elements whose candidate centres are gathered at once: so few that they stay in the cache."""
ITERATIONS = 10
BLOCK = 4096
"""Rows that are held in float32 at once."""
LEAST_BLOCK, SCORES = 512, 1 << 22
"""Rows are compared in blocks of as many as make so many scores with all centres, but of at least so many."""
FEW = 1 << 16
"""So many rows are clustered in memory, more are read block by block in every iteration."""
REST_BLOCK = 256
"""Rows that no candidate node took and that are compared with all nodes at once."""


@dataclass(frozen=True)
class Cells:
    """A first, coarse split of the elements, and which nodes lie in which cell."""

    order: Int32[np.ndarray, " n"]
    """The elements cell by cell."""
    row_ends: Int64[np.ndarray, " cells"]
    """Those of cell c are `order[row_ends[c - 1]:row_ends[c]]`."""
    vectors: Float32[np.ndarray, "cells d"]
    node_ends: Int64[np.ndarray, " cells"]
    """The nodes of cell c are `node_ends[c - 1]:node_ends[c]`."""

    def rows(self, cell: int) -> Int32[np.ndarray, " rows"]:
        """Elements of a cell, in order."""
        return self.order[self.row_ends[cell - 1] if cell else 0 : self.row_ends[cell]]

    def nodes(self, cell: int) -> Int32[np.ndarray, " nodes"]:
        """Nodes of a cell."""
        return np.arange(self.node_ends[cell - 1] if cell else 0, self.node_ends[cell], dtype=np.int32)


class _Scaled:
    """Rows as they are clustered: centred, scaled by the spread, of length 1; computed when they are asked for."""

    def __init__(self, vectors: np.ndarray, spread: Spread) -> None:
        self.vectors = vectors
        self.shape = vectors.shape
        self._mean = spread.mean
        self._scaling = spread.scaling(CLUSTERING_POWER)

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice | np.ndarray) -> Float32[np.ndarray, "rows d"]:
        return unit((as_float32(self.vectors[rows]) - self._mean) @ self._scaling)


Done = Callable[[float, float | None], object]
"""Told how much of how much is done."""


def grow(
    vectors: np.ndarray,
    fanout: int,
    spill: int,
    seed: int,
    progress: Progress = no_progress,
    residuals: Mapping[int, Residual] | None = None,
    spread: Spread | None = None,
) -> list[Level]:
    """Grow all levels of nodes over chunk vectors.

    Args:
        vectors: unit vectors of the chunks, shape (n, d), float16 or float32, may be memory-mapped.
        fanout: most children of a node.
        spill: in how many level-2 nodes a chunk stands, where there is room; at most fanout / 2.5.
        seed: the same seed gives the same tree on the same machine.
        progress: told how many elements are clustered and seated, level by level.
        residuals: trained level encoders by level; where there is none, nodes are means.
        spread: of the vectors, where it is known.

    Returns:
        Level 2 first; none where the chunks themselves are few enough for a top level (2 * fanout).
    """
    rng = np.random.default_rng(seed)
    levels: list[Level] = []
    below: np.ndarray = vectors
    spread = Spread.of(vectors) if spread is None else spread
    while len(below) > 2 * fanout:
        copies = 1 if levels else seats_of_an_element(fanout, spill)
        nodes = max(2, round(SLACK * len(below) * copies / fanout))
        rows = _Scaled(below, spread)
        level = len(levels) + 2
        centres, cells = _centres(rows, nodes, rng, partial(progress, f"clustering level {level}"))
        seats = _seats(rows, centres, cells, fanout, copies, partial(progress, f"seating level {level}"))
        levels.append(_level(seats, below, (residuals or {}).get(level)))
        below = levels[-1].vectors
    return _in_order(levels)


def _in_order(levels: list[Level]) -> list[Level]:
    """The same tree with its nodes numbered parent by parent: siblings lie side by side in a file, cousins not far."""
    out = levels[-1:]
    for level in levels[-2::-1]:
        order = out[0].children  # each node has one parent
        counts = np.diff(level.offsets)[order]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        places = np.repeat(level.offsets[order] - offsets[:-1], counts) + np.arange(offsets[-1])
        out[0] = replace(out[0], children=np.arange(len(order), dtype=np.int32))
        out.insert(0, replace(level, offsets=offsets, children=level.children[places], vectors=level.vectors[order]))
    return out


def seats_of_an_element(fanout: int, spill: int) -> int:
    """In how many nodes a chunk stands.

    Spill gives way to a small fanout: with more copies a level would not be much smaller than the one below.
    """
    return min(spill, max(1, int(fanout / (2 * SLACK))))


# ---- clustering


def _nearest(rows: Rows, centres: np.ndarray, best: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row its `best` most similar centres, nearest first, and the similarities."""
    ids = np.empty((len(rows), best), np.int32)
    similarities = np.empty((len(rows), best), np.float32)
    block = min(BLOCK, max(LEAST_BLOCK, SCORES // len(centres)))
    # Kept from block to block: for new memory the system would clear pages, which takes a fifth of the time.
    room = np.empty((min(block, len(rows)), len(centres)), np.float32)
    for start in range(0, len(rows), block):
        part = as_float32(rows[start : start + block])
        scores = np.matmul(part, centres.T, out=room[: len(part)])
        stop = start + len(scores)
        if best == 1:
            ids[start:stop, 0] = scores.argmax(1)
        elif best == len(centres):
            ids[start:stop] = np.argsort(-scores, axis=1, kind="stable")
        else:
            _best(scores, ids[start:stop])
        similarities[start:stop] = np.take_along_axis(scores, ids[start:stop], 1)
    return ids, similarities


@njit(cache=True)
def _best(scores: np.ndarray, ids: np.ndarray) -> None:  # pragma: no cover - compiled
    """Of each row the columns with the highest scores, best first, equal ones by number; as many as `ids` takes."""
    wanted = ids.shape[1]
    for row in range(len(scores)):
        own, kept = scores[row], ids[row]
        for column in range(len(own)):
            count = min(column, wanted)
            if count == wanted and own[column] <= own[kept[-1]]:
                continue
            place = min(count, wanted - 1)
            while place > 0 and own[kept[place - 1]] < own[column]:
                kept[place] = kept[place - 1]
                place -= 1
            kept[place] = column


@njit(cache=True)
def _add(rows: np.ndarray, owners: np.ndarray, sums: np.ndarray) -> None:  # pragma: no cover - compiled
    """Add each row to its owner's sum: in order, so that the same rows always give the same bits."""
    for row in range(len(rows)):
        for i in range(rows.shape[1]):
            sums[owners[row], i] += rows[row, i]


def kmeans(rows: Rows, k: int, rng: np.random.Generator, done: Done = lambda *_: None) -> Float32[np.ndarray, "k d"]:
    """Spherical k-means; a cluster that runs empty starts again at a random row."""
    if len(rows) <= FEW:
        rows = as_float32(rows[:])
    centres = as_float32(rows[np.sort(rng.choice(len(rows), k, replace=False))])
    for iteration in range(ITERATIONS):
        done(iteration, ITERATIONS)
        owners = _nearest(rows, centres, 1)[0][:, 0]
        counts, sums = np.bincount(owners, minlength=k), np.zeros(centres.shape)
        for start in range(0, len(rows), BLOCK):
            _add(as_float32(rows[start : start + BLOCK]), owners[start : start + BLOCK], sums)
        full = counts > 0
        centres[full] = unit(sums[full] / counts[full, None]).astype(np.float16)
        empty = int((~full).sum())
        if empty:
            centres[~full] = as_float32(rows[np.sort(rng.choice(len(rows), empty, replace=False))])
    return centres


def _centres(below: Rows, nodes: int, rng: np.random.Generator, done: Done) -> tuple[np.ndarray, Cells | None]:
    """Centres of the nodes; for many nodes in two stages, which costs n * sqrt(nodes) instead of n * nodes."""
    if nodes < TWO_STAGE_NODES:
        return kmeans(below, nodes, rng, done), None
    cells = _cells(below, nodes, rng)
    centres = np.empty((nodes, below.shape[1]), np.float32)
    clustered = 0
    for cell in range(len(cells.vectors)):
        rows, own = cells.rows(cell), cells.nodes(cell)
        if len(own):
            centres[own] = kmeans(below[rows], len(own), rng)
        clustered += len(rows)
        done(clustered, len(below))
    return centres, cells


def _cells(below: Rows, nodes: int, rng: np.random.Generator) -> Cells:
    """About sqrt(nodes) cells, and how many nodes each gets: in proportion to its size, never more than elements."""
    count = round(nodes**0.5)
    sample = np.sort(rng.choice(len(below), min(len(below), 256 * count), replace=False))
    coarse = kmeans(below[sample], count, rng)
    of_row = _nearest(below, coarse, 1)[0][:, 0]
    most = LARGE_CELL * -(-len(below) // count)
    vectors = [coarse]
    for cell in np.flatnonzero(np.bincount(of_row, minlength=count) > most):
        rows = np.flatnonzero(of_row == cell)
        pieces = -(-len(rows) // most)
        number = sum(map(len, vectors)) - 1  # the first piece keeps the cell's number
        piece = np.arange(len(rows)) * pieces // len(rows)
        of_row[rows] = np.where(piece == 0, cell, number + piece)
        vectors.append(np.repeat(coarse[cell : cell + 1], pieces - 1, axis=0))
    coarse = np.concatenate(vectors)
    row_ends = np.cumsum(np.bincount(of_row, minlength=len(coarse)))
    node_ends = np.round(row_ends * (nodes / len(below))).astype(np.int64)
    return Cells(np.argsort(of_row, kind="stable").astype(np.int32), row_ends, coarse, node_ends)


def _candidates(
    below: Rows, centres: np.ndarray, cells: Cells | None, done: Done
) -> tuple[Int32[np.ndarray, "n c"], Float32[np.ndarray, "n c"]]:
    best = min(CANDIDATES, len(centres))
    if cells is None:
        return _nearest(below, centres, best)
    ids = np.full((len(below), best), -1, np.int32)
    similarities = np.full((len(below), best), -np.inf, np.float32)
    neighbours, _ = _nearest(cells.vectors, cells.vectors, min(CELL_NEIGHBOURS, len(cells.vectors)))
    compared = 0
    for cell, near in enumerate(neighbours):
        rows = cells.rows(cell)
        nodes = np.concatenate([cells.nodes(int(c)) for c in near])
        if len(rows) == 0 or len(nodes) == 0:
            continue
        width = min(best, len(nodes))
        found, similarities[rows, :width] = _nearest(below[rows], centres[nodes], width)
        ids[rows, :width] = nodes[found]
        compared += len(rows)
        done(compared, len(below))
    return ids, similarities


# ---- seating under the capacity


def seats(
    rows: Float32[np.ndarray, "n d"], centres: Float32[np.ndarray, "k d"], room: int
) -> Int32[np.ndarray, "k room"]:
    """Give each of some elements one of the places near some centres, `room` at each; -1 = free."""
    return _seats(rows, centres, None, room, 1, lambda *_: None)


def _seats(
    below: Rows, centres: np.ndarray, cells: Cells | None, fanout: int, copies: int, done: Done
) -> Int32[np.ndarray, "nodes fanout"]:
    """Seat every element in a near node, then in further nodes that complement the first; -1 = free."""
    candidates, preferences = _candidates(below, centres, cells, done)
    seats = np.full((len(centres), fanout), -1, np.int32)
    seats = _with(seats, _seat(candidates, preferences, (seats < 0).sum(1)))
    _seat_the_rest(seats, below, centres)
    if copies == 1:
        return seats
    first = np.empty(len(below), np.int32)
    nodes, places = np.nonzero(seats >= 0)
    first[seats[nodes, places]] = nodes
    del preferences
    candidates, preferences = complements(below, centres, candidates, first)
    added = np.empty(0)
    for copy in range(1, copies):
        if copy > 1:  # nobody asks again for the place that it has just got
            nodes, places = np.nonzero(added >= 0)
            taken = np.full(len(below), -1, np.int32)
            taken[added[nodes, places]] = nodes
            candidates[candidates == taken[:, None]] = -1
        added = _seat(candidates, preferences, (seats < 0).sum(1))
        seats = _with(seats, added)
    return seats


def _with(seats: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Both tables' elements, node by node, those present first."""
    return -np.sort(-np.concatenate([seats, added], axis=1), axis=1)[:, : seats.shape[1]]


def complements(
    below: Rows, centres: np.ndarray, candidates: Int32[np.ndarray, "n c"], first: Int32[np.ndarray, " n"]
) -> tuple[Int32[np.ndarray, "n c"], Float32[np.ndarray, "n c"]]:
    """Candidates for a further seat, best first: near, and wrong in another direction than the first node.

    SOAR (Sun et al. 2023, "SOAR: Improved Indexing for Approximate Nearest Neighbor Search"): a query that the first
    node hides from an element is one along the element's residual there, so a residual parallel to it costs more.
    """
    width = min(COMPLEMENTS, candidates.shape[1])
    out = np.empty((len(below), width), np.int32)
    preferences = np.empty((len(below), width), np.float32)
    for start in range(0, len(below), BLOCK):
        rows = as_float32(below[start : start + BLOCK])
        for first_row in range(0, len(rows), COMPLEMENT_BLOCK):
            part = rows[first_row : first_row + COMPLEMENT_BLOCK]
            place = slice(start + first_row, start + first_row + len(part))
            own, offered = first[place], candidates[place]
            residual = part - centres[own]
            residual /= np.maximum(np.sqrt((residual**2).sum(1)), 1e-9)[:, None]
            others = part[:, None] - centres[offered]  # (rows, candidates, d)
            cost = (others**2).sum(2) + SOAR_WEIGHT * np.einsum("ncd,nd->nc", others, residual) ** 2
            cost[(offered < 0) | (offered == own[:, None])] = np.inf
            order = np.argsort(cost, axis=1, kind="stable")[:, :width]
            cost = np.take_along_axis(cost, order, 1)
            out[place] = np.where(np.isinf(cost), -1, np.take_along_axis(offered, order, 1))
            preferences[place] = -cost
    return out, preferences


@njit(cache=True)
def _seat(
    candidates: np.ndarray, preferences: np.ndarray, room: np.ndarray
) -> np.ndarray:  # pragma: no cover - compiled
    """Stable matching (Gale and Shapley 1962): elements ask nodes in turn, a full node keeps those it is dearest to.

    The result does not depend on the order in which elements ask. `candidates` are each element's nodes, best first,
    -1 = none; `preferences` count for both sides; `room` is how many each node takes. Returns (nodes, largest room)
    elements, -1 = free.
    """
    n, width = candidates.shape
    seats = np.full((len(room), max(1, room.max())), -1, np.int32)
    held = np.full(seats.shape, -np.inf, np.float32)
    asked = np.zeros(n, np.int32)
    stack = np.arange(n - 1, -1, -1).astype(np.int32)
    top = n
    while top > 0:
        top -= 1
        row = stack[top]
        while asked[row] < width:
            node = candidates[row, asked[row]]
            preference = preferences[row, asked[row]]
            asked[row] += 1
            if node < 0 or room[node] == 0:
                continue
            worst = 0
            for seat in range(room[node]):
                if seats[node, seat] < 0:
                    worst = seat
                    break
                if held[node, seat] < held[node, worst] or (
                    held[node, seat] == held[node, worst] and seats[node, seat] > seats[node, worst]
                ):
                    worst = seat
            other = seats[node, worst]
            if other >= 0 and not (preference > held[node, worst] or (preference == held[node, worst] and row < other)):
                continue
            seats[node, worst] = row
            held[node, worst] = preference
            if other >= 0:
                stack[top] = other
                top += 1
            break
    return seats


def _seat_the_rest(seats: np.ndarray, below: Rows, centres: np.ndarray) -> None:
    """Give every element that no candidate node took a place in the nearest node with room."""
    seated = np.zeros(len(below), bool)
    seated[seats[seats >= 0]] = True
    rest = np.flatnonzero(~seated)
    free = (seats < 0).sum(1)
    for start in range(0, len(rest), REST_BLOCK):
        rows = rest[start : start + REST_BLOCK]
        scores = as_float32(below[rows]) @ centres.T
        for row, own in zip(rows, scores, strict=True):
            node = int(np.where(free > 0, own, -np.inf).argmax())
            seats[node, int(np.argmax(seats[node] < 0))] = row
            free[node] -= 1


def _level(seats: np.ndarray, below: np.ndarray, residual: Residual | None) -> Level:
    """Nodes in order, children sorted, empty nodes left out, vectors from the children."""
    counts = (seats >= 0).sum(1)
    ordered = np.sort(np.where(seats < 0, np.iinfo(np.int32).max, seats), axis=1)[counts > 0]
    counts = counts[counts > 0]
    children = ordered[np.arange(ordered.shape[1]) < counts[:, None]].astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Level(offsets, children, node_vectors(below, offsets, children, residual))
