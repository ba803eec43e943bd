"""What the vectors of the tree are made of: chunks from encodings, nodes from children. Exact and repeatable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Float32, Int, Int32, Int64


@dataclass(frozen=True)
class Level:
    """One level of nodes: whose parents they are, and their vectors."""

    offsets: Int64[np.ndarray, " nodes_and_one"]
    """Node p's children are `children[offsets[p]:offsets[p + 1]]`."""
    children: Int32[np.ndarray, " edges"]
    """Elements of the level below; a chunk may stand under several nodes."""
    vectors: Float16[np.ndarray, "nodes d"]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zero rows stay zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return vectors / np.maximum(norms, 1e-12)[:, None]


def _sums(vectors: np.ndarray, starts: Int[np.ndarray, " groups"]) -> np.ndarray:
    """Sums of runs of rows, in float64 and in order, so that the same rows always give the same bits."""
    return np.add.reduceat(vectors.astype(np.float64), starts, axis=0)


def contextual(
    encodings: Float16[np.ndarray, "chunks d"], chunk_ends: Int64[np.ndarray, " documents"], alpha: float
) -> Float16[np.ndarray, "chunks d"]:
    """Level-1 vectors of whole documents: `unit(encoding + alpha * unit(sum of the document's encodings))`.

    Args:
        encodings: what encoder 1 gave for the chunks of these documents, in order.
        chunk_ends: where each document's chunks end, counted from the first row of `encodings`.
        alpha: weight of the document.
    """
    counts = np.diff(chunk_ends, prepend=0)
    full = counts > 0
    if not full.any():
        return np.empty(encodings.shape, np.float16)
    documents = unit(_sums(encodings, (chunk_ends - counts)[full]))
    vectors = encodings.astype(np.float64) + alpha * np.repeat(documents, counts[full], axis=0)
    return unit(vectors).astype(np.float16)


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
    vectors: np.ndarray, offsets: Int64[np.ndarray, " nodes_and_one"], children: Int32[np.ndarray, " edges"]
) -> Float16[np.ndarray, "nodes d"]:
    """Vectors of nodes: `unit(mean(children))`, computed in runs of nodes to bound memory."""
    nodes = len(offsets) - 1
    out = np.empty((nodes, vectors.shape[1]), np.float16)
    for first in range(0, nodes, 2048):
        last = min(first + 2048, nodes)
        begin, end = int(offsets[first]), int(offsets[last])
        means = _sums(vectors[children[begin:end]], offsets[first:last] - begin)
        means /= np.diff(offsets[first : last + 1])[:, None]
        out[first:last] = unit(means)
    return out


def parents(level: Level, below: int) -> Int32[np.ndarray, " below"]:
    """The first parent of every element of the level below, -1 where it has none."""
    out = np.full(below, -1, np.int32)
    owners = np.repeat(np.arange(len(level.offsets) - 1, dtype=np.int32), np.diff(level.offsets))
    out[level.children[::-1]] = owners[::-1]
    return out


def as_float32(vectors: np.ndarray) -> Float32[np.ndarray, "rows d"]:
    """A float32 copy of stored vectors."""
    return np.ascontiguousarray(vectors, np.float32)
