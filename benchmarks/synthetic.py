"""Vectors like those of a real memory, as many as are wanted: a mixture fitted to chunks, documents and questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np

from treemem.storage.levels import document_runs, unit

TOPICS = 1024
BLOCK = 1 << 15


@dataclass(frozen=True)
class Mixture:
    """Documents that lie around the topic of a real one; chunks that lie around a document; questions near a chunk.

    What lies around something is normal with one covariance for all of its kind, and as far off as a real one, drawn
    from those that were measured: normal vectors alone would all be equally far off. A document has as many chunks as
    the real one that its topic is taken from, and may be given that one's words.
    """

    centres: np.ndarray
    """[real documents, d] each one's topic."""
    chunk_ends: np.ndarray
    """[real documents]"""
    documents: tuple[np.ndarray, np.ndarray]
    """Square root of the covariance of documents around their topic at distance 1, [d, d], and the distances."""
    chunks: tuple[np.ndarray, np.ndarray]
    """The same of chunks around their document."""
    questions: tuple[np.ndarray, np.ndarray]
    """The same of questions around their chunk."""

    def vectors(self, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`count` unit vectors by document, in blocks: float16 [rows, d], and each one's real chunk, [rows]."""
        rng = np.random.default_rng(seed)
        lengths = np.diff(self.chunk_ends, prepend=0)
        while count > 0:
            taken = rng.integers(0, len(lengths), BLOCK // int(lengths.mean()) + 1)
            own = lengths[taken]
            sources = np.arange(own.sum()) + np.repeat((self.chunk_ends - lengths)[taken] - np.cumsum(own) + own, own)
            documents = _around(self.centres[taken], self.documents, rng)
            rows = _around(np.repeat(documents, own, axis=0), self.chunks, rng)[:count]
            count -= len(rows)
            yield unit(rows).astype(np.float16), sources[: len(rows)]

    def asked(self, chunks: np.ndarray, seed: int) -> np.ndarray:
        """A question for each of these chunks, float32 [n, d]."""
        return unit(_around(chunks.astype(np.float32), self.questions, np.random.default_rng(seed)))


def fit(vectors: np.ndarray, chunk_ends: np.ndarray, questions: np.ndarray, answers: np.ndarray, seed: int) -> Mixture:
    """Fit to real ones.

    Args:
        vectors: of all chunks, float32 [n, d]; every document has some.
        chunk_ends: where each document's chunks end.
        questions: vectors of questions, float32 [q, d].
        answers: the chunk that answers each, [q].
        seed: of the clustering of documents into topics.
    """
    lengths = np.diff(chunk_ends, prepend=0)
    means = np.empty((len(lengths), vectors.shape[1]), np.float32)
    for first, last in document_runs(chunk_ends, BLOCK):
        begin, own = int(chunk_ends[first] - lengths[first]), slice(first, last)
        sums = np.add.reduceat(vectors[begin : chunk_ends[last - 1]], chunk_ends[own] - lengths[own] - begin)
        means[own] = sums / lengths[own, None]
    kmeans = faiss.Kmeans(vectors.shape[1], min(TOPICS, len(means) // 8), niter=20, seed=seed)
    kmeans.train(means)
    centres = kmeans.centroids[kmeans.index.search(means, 1)[1][:, 0]]
    return Mixture(
        centres,
        chunk_ends,
        _spread(means - centres),
        _spread(vectors - np.repeat(means, lengths, axis=0)),
        _spread(questions - vectors[answers]),
    )


def _spread(residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distances = np.linalg.norm(residuals, axis=1)
    rows = residuals[distances > 1e-6] / distances[distances > 1e-6, None]
    values, directions = np.linalg.eigh(rows.T @ rows / len(rows))
    return ((directions * np.sqrt(np.maximum(values, 0))) @ directions.T).astype(np.float32), distances


def _around(points: np.ndarray, spread: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    root, distances = spread
    normal = rng.standard_normal(points.shape, np.float32) @ root
    return np.asarray(points + unit(normal) * rng.choice(distances, len(points))[:, None].astype(np.float32))
