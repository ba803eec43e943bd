"""The kernels in plain NumPy: the specification with which every other back end agrees bit for bit.

Arithmetic. A stored vector is int8 times one float32 scale, a query embedding int16 times one float32 scale; their dot
product is an exact integer, so that no order of summation can change it. A score is

    float32(query scale) * float32(row scale) * float32(dot), multiplied from left to right, the maximum over the
    query's embeddings, plus 0 (so that no score is a negative zero).

Order. Higher scores first, equal scores by the smaller id: a strict order, so that every selection has one answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from treemem.errors import InputError, ModelError
from treemem.kernels.tree import MAX_DIMENSION, LevelBlocks, LexicalIndex, ServingTree, Walked

Masks = tuple[NDArray[np.uint8], ...]
"""One mask per level, top first, with one value per element: 0 = neither scored nor returned."""

ROW_STEPS = 127
QUERY_STEPS = 8191
TINY = 1e-12
"""A vector whose largest component is not above this counts as zero: keeps all arithmetic clear of subnormals."""

_BLOCK = 8192  # rows converted at a time


def quantise(vectors: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Turn vectors into int8 rows with one scale each, symmetric, halves rounded to even.

    `vectors`: float [n, d], d <= 2048. Returns int8 [n, d] and float32 [n], where a scale is its row's largest
    magnitude / 127.
    Raises ModelError where a value is not finite or d is too large.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2:
        raise InputError(f"vectors of shape {vectors.shape}: expected [n, d]")
    if not 1 <= vectors.shape[1] <= MAX_DIMENSION:
        raise ModelError(f"vectors of dimension {vectors.shape[1]}: use an encoder of 1 to {MAX_DIMENSION}")
    _require_finite(vectors, ("row", "component"))
    rows, scales = _steps(vectors, ROW_STEPS)
    return rows.astype(np.int8), scales


def quantise_queries(queries: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Turn query embeddings into int16 with one scale each: int16 [..., d] and float32 [...]."""
    steps, scales = _steps(queries, QUERY_STEPS)
    return steps.astype(np.int16), scales


def walk(tree: ServingTree, queries: NDArray[np.float32], beam: int, allowed: Masks | None = None) -> Walked:
    """Search the tree from the top, keeping the best `beam` nodes of every level above the chunks.

    `queries`: float32 [depth, B, M, d], one set of embeddings per level, top first; the score is the maximum over M.
    `allowed`: uint8 masks per level, top first. All chunks that were scored are returned, each once, by its occurrence
    under the best-ranked parent.
    Raises InputError for wrong shapes or a beam below 1, ModelError where a query is not finite.
    """
    queries = checked_queries(tree, queries, levels=True)
    masks = checked_masks(tree, allowed)
    check_at_least_1("beam", beam)
    depth, batch = queries.shape[:2]
    q16, q_scales = quantise_queries(queries)
    nodes = np.full((depth - 1, batch, beam), -1, np.int32)
    node_scores = np.full(nodes.shape, -np.inf, np.float32)
    scored = np.zeros(batch, np.int64)
    last = []
    for b in range(batch):
        frontier = np.zeros(1, np.int32)  # the pseudo-parent
        for level, blocks in enumerate(tree.levels):
            rows, parents = _children(blocks, frontier, None if masks is None else masks[level])
            scores, ids = _scores(blocks, rows, q16[level, b], q_scales[level, b]), blocks.ids[rows]
            order = np.lexsort((ids, -scores))
            scored[b] += len(rows)
            if level < depth - 1:
                order = order[:beam]
                frontier = ids[order]
                nodes[level, b, : len(order)] = frontier
                node_scores[level, b, : len(order)] = scores[order]
        last.append((ids[order], scores[order], parents[order]))
    width = max((len(ids) for ids, _, _ in last), default=0)
    chunks = np.full((batch, width), -1, np.int32)
    chunk_scores = np.full((batch, width), -np.inf, np.float32)
    chunk_parents = np.full((batch, width), -1, np.int32)
    for b, (ids, scores, parents) in enumerate(last):
        chunks[b, : len(ids)], chunk_scores[b, : len(ids)] = ids, scores
        if depth > 1:
            chunk_parents[b, : len(ids)] = parents
    return Walked(nodes, node_scores, chunks, chunk_scores, chunk_parents, scored)


def exact(
    tree: ServingTree, queries: NDArray[np.float32], k: int, allowed: Masks | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Score every chunk and return the best k: the oracle of `walk`.

    `queries`: float32 [B, M, d]. `allowed`: as for `walk`; only the chunks' own mask counts. Returns int32 and float32
    [B, min(k, chunks)], best first, padded with -1 and -inf.
    Raises InputError for wrong shapes or k below 1, ModelError where a query is not finite.
    """
    queries = checked_queries(tree, queries, levels=False)
    masks = checked_masks(tree, allowed)
    check_at_least_1("k", k)
    q16, q_scales = quantise_queries(queries)
    candidates = np.arange(tree.sizes[-1], dtype=np.int32)
    if masks is not None:
        candidates = candidates[masks[-1] != 0]
    best = np.full((len(queries), min(k, tree.sizes[-1])), -1, np.int32)
    best_scores = np.full(best.shape, -np.inf, np.float32)
    for b in range(len(queries)):
        scores = _scores(tree.levels[-1], tree.first_row[candidates], q16[b], q_scales[b])
        ids, scores = top_k(scores, candidates, k)
        best[b, : len(ids)], best_scores[b, : len(ids)] = ids, scores
    return best, best_scores


def score_chunks(tree: ServingTree, queries: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Score given chunks.

    `queries`: float32 [B, M, d]. `ids`: int32 [B, K], -1 = padding. Returns float32 [B, K], -inf for padding.
    Raises InputError for wrong shapes or an id that is no chunk's, ModelError where a query is not finite.
    """
    queries = checked_queries(tree, queries, levels=False)
    ids = checked_chunks(ids, tree.sizes[-1], (len(queries), -1))
    q16, q_scales = quantise_queries(queries)
    scores = np.full(ids.shape, -np.inf, np.float32)
    for b, real in enumerate(ids >= 0):
        scores[b, real] = _scores(tree.levels[-1], tree.first_row[ids[b, real]], q16[b], q_scales[b])
    return scores


def bm25_all(index: LexicalIndex, terms: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Score all chunks by BM25 (Robertson and Zaragoza 2009, section 3.4).

    `terms`: int32 [T]; `weights`: float32 [T], each idf * (k1 + 1) * count in the query. Returns float32 [chunks], the
    sum over terms of weight * (count / (count + norm)), added in the order of the terms; 0 for a chunk without any.
    Raises InputError for wrong shapes or weights that are not finite.
    """
    terms, weights = checked_terms(terms, weights)
    scores = np.zeros(index.size, np.float32)
    for term, weight in zip(terms, weights, strict=True):
        entries = np.flatnonzero(index.terms == term)
        chunks = np.searchsorted(index.offsets, entries, side="right") - 1
        counts = index.counts[entries].astype(np.float32)
        scores[chunks] += weight * (counts / (counts + index.norms[chunks]))
    return scores


def bm25_scores(
    index: LexicalIndex, terms: NDArray[np.int32], weights: NDArray[np.float32], chunks: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Score given chunks by BM25: `bm25_all` at `chunks` (int32 [K], -1 = padding, which gets 0), float32 [K].

    Raises InputError for wrong shapes, weights that are not finite or an id that is no chunk's.
    """
    chunks = checked_chunks(chunks, index.size, (-1,))
    scores = np.append(bm25_all(index, terms, weights), np.float32(0))
    return scores[chunks]  # -1 takes the appended 0


def top_k(scores: NDArray[np.float32], ids: NDArray[np.int32], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The best k of scored elements: higher scores first, equal scores by the smaller id.

    `scores`: float32 [n], no NaN. `ids`: int32 [n]; entries below 0 are padding and left out. Returns ids and scores,
    at most k of each.
    Raises InputError for wrong shapes or k below 1.
    """
    check_at_least_1("k", k)
    if scores.ndim != 1 or scores.shape != ids.shape:
        raise InputError(f"scores of shape {scores.shape}, ids of shape {ids.shape}: expected one axis of one length")
    kept = np.flatnonzero(ids >= 0)
    if k < len(kept):  # sort only what can be among the best
        threshold = -np.partition(-scores[kept], k - 1)[k - 1]
        kept = kept[scores[kept] >= threshold]
    kept = kept[np.lexsort((ids[kept], -scores[kept]))][:k]
    return ids[kept], scores[kept]


def checked_queries(tree: ServingTree, queries: NDArray[np.float32], *, levels: bool) -> NDArray[np.float32]:
    """Queries as contiguous float32 [depth, B, M, d] (`levels`) or [B, M, d]; InputError or ModelError if unusable."""
    queries = np.ascontiguousarray(queries, np.float32)
    expected = f"[{tree.depth}, B, M, {tree.dimension}]" if levels else f"[B, M, {tree.dimension}]"
    wrong_depth = levels and queries.shape[0] != tree.depth
    if queries.ndim != 3 + levels or queries.shape[-1] != tree.dimension or queries.shape[-2] == 0 or wrong_depth:
        raise InputError(f"queries of shape {queries.shape}: this tree takes {expected}, M at least 1")
    _require_finite(queries, (("level", "query") if levels else ("query",)) + ("embedding", "component"))
    return queries


def checked_masks(tree: ServingTree, allowed: Masks | None) -> Masks | None:
    """Masks as contiguous uint8 arrays, InputError if they do not fit the tree."""
    if allowed is None:
        return None
    shapes = tuple(np.shape(mask) for mask in allowed)
    if shapes != tuple((size,) for size in tree.sizes):
        raise InputError(f"masks of shapes {shapes}: this tree takes one per level, of {tree.sizes}, top first")
    return tuple(np.ascontiguousarray(np.asarray(mask) != 0, np.uint8) for mask in allowed)


def checked_chunks(ids: NDArray[np.int32], size: int, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Chunk ids from -1 to size - 1 as contiguous int32 of `shape` (-1 = any length), InputError otherwise."""
    ids = np.ascontiguousarray(ids, np.int32)
    if ids.ndim != len(shape) or any(want not in (-1, has) for want, has in zip(shape, ids.shape, strict=True)):
        raise InputError(f"chunk ids of shape {ids.shape}: expected {shape}, -1 for any length")
    if ids.size and not (-1 <= ids.min() and ids.max() < size):
        raise InputError(
            f"chunk ids from {ids.min()} to {ids.max()}: they must be from 0 to {size - 1}, or -1 as padding"
        )
    return ids


def checked_terms(
    terms: NDArray[np.int32], weights: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Query terms and weights as contiguous arrays of one length, InputError otherwise."""
    terms, weights = np.ascontiguousarray(terms, np.int32), np.ascontiguousarray(weights, np.float32)
    if terms.ndim != 1 or terms.shape != weights.shape:
        raise InputError(
            f"terms of shape {terms.shape}, weights of shape {weights.shape}: expected one weight per term"
        )
    if not np.isfinite(weights).all():
        raise InputError("a query term's weight is not finite: weights are idf * (k1 + 1) * count")
    return terms, weights


def check_at_least_1(name: str, value: int) -> None:
    """Raise InputError where `value` is below 1."""
    if value < 1:
        raise InputError(f"{name} = {value}: it must be at least 1")


def _require_finite(values: NDArray[np.float32], axes: tuple[str, ...]) -> None:
    if not np.isfinite(values).all():
        place = zip(axes, np.argwhere(~np.isfinite(values))[0], strict=True)
        where = ", ".join(f"{axis} {index}" for axis, index in place)
        raise ModelError(f"a vector is not finite ({where}): the encoder or a ranker gave NaN or infinity")


def _steps(vectors: NDArray[np.float32], steps: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors in whole steps of their own scale, float32 [..., d], and the scales, float32 [...]."""
    peaks = np.abs(vectors).max(axis=-1)
    scales = np.where(peaks > np.float32(TINY), peaks / np.float32(steps), np.float32(0))
    divisors = np.where(scales > 0, scales, np.float32(np.inf))  # zero vectors become zeros
    return np.rint(vectors / divisors[..., None]), scales


def _children(
    blocks: LevelBlocks, frontier: NDArray[np.int32], mask: NDArray[np.uint8] | None
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The frontier's children in its order, each element once, masked ones left out: their rows and parents."""
    starts, ends = blocks.offsets[frontier], blocks.offsets[frontier + 1]
    rows = np.concatenate([np.arange(0), *map(np.arange, starts, ends)])
    parents = np.repeat(frontier, ends - starts)
    ids = blocks.ids[rows]
    kept = np.sort(np.unique(ids, return_index=True)[1])
    if mask is not None:
        kept = kept[mask[ids[kept]] != 0]
    return rows[kept], parents[kept]


def _scores(
    blocks: LevelBlocks, rows: NDArray[np.int64], q16: NDArray[np.int16], q_scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scores of some rows, float32 [rows], for the embeddings of one query, int16 [M, d] and float32 [M]."""
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        # float64 holds these integers exactly and is what NumPy multiplies fast.
        dots = blocks.rows[block].astype(np.float64) @ q16.astype(np.float64).T  # [block, M]
        values = q_scales * blocks.scales[block, None] * dots.astype(np.float32)
        scores[start : start + _BLOCK] = values.max(axis=1) + np.float32(0)
    return scores
