"""What the vectors of the tree are made of: chunks from encodings, nodes from children. Exact and repeatable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float16, Float32, Float64, Int, Int32, Int64

CLUSTERING_POWER = 0.25
"""Elements are grouped after multiplication by the covariance of the chunks to the power of minus this."""
QUERY_POWER = 0.35
"""Nodes are scored with queries multiplied by the covariance to the power of minus this."""
SPREAD_ROWS = 1 << 17
"""From how many chunks, evenly spaced, the covariance is estimated."""

BLOCK = 1 << 15

Gate = Callable[
    [
        Float64[np.ndarray, "n d"],
        Float64[np.ndarray, "n d"],
        Float64[np.ndarray, "n d"],
        Float64[np.ndarray, "n d"],
    ],
    tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, "n d"]],
]
"""A trained context gate: chunks, their documents, the chunks before and after them (zeros where there are none) give
how much of its document each chunk takes, and what else is added to it."""
Residual = Callable[
    [Float64[np.ndarray, "nodes fanout d"], Bool[np.ndarray, "nodes fanout"]], Float64[np.ndarray, "nodes d"]
]
"""A trained level encoder: children, and which of them are there, give what is added to their mean."""


@runtime_checkable
class Rows(Protocol):
    """Vectors that are read by slices and by arrays of numbers: an array, a memory map, or rows made on the way."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, d)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Spread:
    """How a memory's chunk vectors spread: mean, and covariance as eigenvalues (mean 1) and eigenvectors.

    What many chunks have in common (a template's phrases, say) makes them alike without telling them apart. Scaling
    those directions down before clustering, and in the query that is compared with nodes, is whitening (Su et al. 2021,
    "Whitening Sentence Representations for Better Semantics and Faster Retrieval"), here half way.
    """

    mean: Float32[np.ndarray, " d"]
    values: Float64[np.ndarray, " d"]
    directions: Float64[np.ndarray, "d d"]

    @classmethod
    def of(cls, vectors: np.ndarray) -> Spread:
        """Estimate from chunk vectors, shape (n, d), shrunk towards the sphere where n is not much larger than d."""
        n, d = vectors.shape
        if n == 0:
            return cls(np.zeros(d, np.float32), np.ones(d), np.eye(d))
        rows = np.linspace(0, n - 1, min(n, SPREAD_ROWS)).round().astype(np.int64)
        total, squares = np.zeros(d), np.zeros((d, d))
        for start in range(0, len(rows), 4096):
            part = vectors[rows[start : start + 4096]].astype(np.float64)
            total += part.sum(0)
            squares += part.T @ part
        mean = total / len(rows)
        values, directions = np.linalg.eigh(squares / len(rows) - np.outer(mean, mean))
        share = d / (len(rows) + d)
        size = max(float(values.mean()), 1e-12)
        values = (1 - share) * np.maximum(values, 0) / size + share
        return cls(mean.astype(np.float32), values, directions)

    def scaling(self, power: float) -> Float32[np.ndarray, "d d"]:
        """The covariance to the power of minus `power`, symmetric."""
        return ((self.directions * self.values**-power) @ self.directions.T).astype(np.float32)

    def map_queries(self) -> Float32[np.ndarray, "d d"]:
        """What query vectors are multiplied by before they are compared with nodes."""
        return self.scaling(QUERY_POWER)


@dataclass(frozen=True)
class Level:
    """One level of nodes: whose parents they are, and their vectors."""

    offsets: Int64[np.ndarray, " nodes_and_one"]
    """Node p's children are `children[offsets[p]:offsets[p + 1]]`."""
    children: Int32[np.ndarray, " edges"]
    """Elements of the level below; a chunk may stand under several nodes."""
    vectors: Float16[np.ndarray, "nodes d"]

    @classmethod
    def of_slots(cls, slots: Int32[np.ndarray, "nodes fanout"], vectors: Float16[np.ndarray, "nodes d"]) -> Level:
        """From the children as they are stored, -1 = free, behind the others."""
        taken = slots >= 0
        offsets = np.concatenate([[0], np.cumsum(taken.sum(1))]).astype(np.int64)
        return cls(offsets, slots[taken], vectors)

    def slots(self, fanout: int) -> Int32[np.ndarray, "nodes fanout"]:
        """The children as they are stored."""
        counts = np.diff(self.offsets)
        slots = np.full((len(counts), fanout), -1, np.int32)
        slots[np.arange(fanout) < counts[:, None]] = self.children
        return slots


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zero rows stay zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return vectors / np.maximum(norms, 1e-12)[:, None]


def _sums(vectors: np.ndarray, starts: Int[np.ndarray, " groups"]) -> np.ndarray:
    """Sums of runs of rows, in float64 and in order, so that the same rows always give the same bits."""
    return np.add.reduceat(vectors.astype(np.float64), starts, axis=0)


def contextual(
    encodings: Float16[np.ndarray, "chunks d"],
    chunk_ends: Int64[np.ndarray, " documents"],
    alpha: float,
    gate: Gate | None = None,
    rows: Int64[np.ndarray, " wanted"] | None = None,
) -> Float16[np.ndarray, "wanted d"]:
    """Level-1 vectors of whole documents: `unit(encoding + alpha * unit(sum of the document's encodings))`.

    Args:
        encodings: what encoder 1 gave for the chunks of these documents, in order.
        chunk_ends: where each document's chunks end, counted from the first row of `encodings`.
        alpha: weight of the document.
        gate: what has been trained takes alpha's place.
        rows: the chunks whose vectors are wanted, as rows of `encodings`; by default all of them.
    """
    rows = np.arange(len(encodings)) if rows is None else rows
    if len(rows) == 0:
        return np.empty((0, encodings.shape[1]), np.float16)
    counts = np.diff(chunk_ends, prepend=0)
    ends = chunk_ends[counts > 0]
    starts = ends - counts[counts > 0]
    of_row = np.searchsorted(ends, rows, side="right")
    documents = unit(_sums(encodings, starts))[of_row]
    vectors = encodings[rows].astype(np.float64)
    if gate is None:
        return unit(vectors + alpha * documents).astype(np.float16)
    first, last = rows == starts[of_row], rows == ends[of_row] - 1
    before = np.where(first[:, None], np.float64(0), encodings[rows - 1])
    after = np.where(last[:, None], np.float64(0), encodings[np.where(last, rows, rows + 1)])
    gates, residuals = gate(vectors, documents, before, after)
    return unit(vectors + gates[:, None] * documents + residuals).astype(np.float16)


def document_runs(chunk_ends: Int64[np.ndarray, " documents"], rows: int) -> Iterator[tuple[int, int]]:
    """Runs of whole documents, (first, last), with at most `rows` chunks each or a single document."""
    first = 0
    while first < len(chunk_ends):
        begin = int(chunk_ends[first - 1]) if first else 0
        last = int(np.searchsorted(chunk_ends, begin + rows, side="right"))
        last = max(last, first + 1)
        yield first, last
        first = last


def node_vectors(
    vectors: Rows,
    offsets: Int64[np.ndarray, " nodes_and_one"],
    children: Int32[np.ndarray, " edges"],
    residual: Residual | None = None,
) -> Float16[np.ndarray, "nodes d"]:
    """Vectors of nodes: `unit(mean(children) + residual(children))`.

    At most `BLOCK` children, or those of one node, are held in float64.
    """
    nodes = len(offsets) - 1
    out = np.empty((nodes, vectors.shape[1]), np.float16)
    first = 0
    while first < nodes:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1)
        begin, end = int(offsets[first]), int(offsets[last])
        rows = vectors[children[begin:end]]
        counts = np.diff(offsets[first : last + 1])
        means = _sums(rows, offsets[first:last] - begin)
        means /= counts[:, None]
        if residual is not None:
            means += residual(*padded(rows.astype(np.float64), counts))
        out[first:last] = unit(means)
        first = last
    return out


def padded(
    rows: Float64[np.ndarray, "edges d"], counts: Int64[np.ndarray, " nodes"]
) -> tuple[Float64[np.ndarray, "nodes fanout d"], Bool[np.ndarray, "nodes fanout"]]:
    """Runs of rows side by side, zeros behind the shorter ones, and which places are filled."""
    present = np.arange(counts.max()) < counts[:, None]
    out = np.zeros((*present.shape, rows.shape[1]))
    out[present] = rows
    return out, present


def as_float32(vectors: np.ndarray) -> Float32[np.ndarray, "rows d"]:
    """A float32 copy of stored vectors."""
    return np.ascontiguousarray(vectors, np.float32)
