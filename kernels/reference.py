"""The kernels in plain NumPy: the specification with which every other back end agrees bit for bit.

Arithmetic. A stored vector is int8 times one float32 scale, a query embedding int16 times one float32 scale; their dot
product is an exact integer, so that no order of summation can change it. A score is

    float32(query scale) * float32(row scale) * float32(dot), multiplied from left to right, the maximum over the
    query's embeddings, plus 0 (so that no score is a negative zero).

Two looks. A walk meets many rows and keeps few. Rows are first scored by their upper four bits, `16 * half - 120`, with
the query in int8; only the best of them, half as many again as are kept and at least 32 more, are scored by the whole
row. Everything that is returned is ranked by whole rows.

Order. Higher scores first, equal scores by the smaller id: a strict order, so that every selection has one answer.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treemem.errors import InputError, ModelError
from treemem.kernels.tree import (
    MAX_DIMENSION,
    Found,
    LevelBlocks,
    LexicalIndex,
    ServingTree,
    Signatures,
    Words,
    upper_bytes,
)

Masks = tuple[NDArray[np.uint8], ...]
"""One mask per level, top first, with one value per element: 0 = neither scored nor returned."""

ROW_STEPS = 127
QUERY_STEPS = 8191
COARSE_STEPS = 127
"""Steps of a query that is compared with upper halves."""
TINY = 1e-12
"""A vector whose largest component is not above this counts as zero: keeps all arithmetic clear of subnormals."""

STEP = np.float32(1 / 255)
"""What one step of a share is worth."""

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


def quantise_queries(
    queries: NDArray[np.float32], steps: int = QUERY_STEPS
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Turn query embeddings into int16 with one scale each: int16 [..., d] and float32 [...]."""
    values, scales = _steps(queries, steps)
    return values.astype(np.int16), scales


def upper_halves(rows: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The upper four bits of rows, int8 [n, d], in pieces of 64 components: uint8 [n, 32 * ceil(d / 64)].

    A half is `(value + 128) >> 4`; byte j of a piece holds component j in its lower bits and j + 32 in its upper ones.
    What lies behind the last component is 8.
    """
    width = upper_bytes(rows.shape[1])
    halves = np.full((len(rows), 2 * width), 8, np.uint8)
    halves[:, : rows.shape[1]] = (rows.astype(np.int16) + 128) >> 4
    pieces = halves.reshape(len(rows), width // 32, 2, 32)
    return (pieces[:, :, 0] | pieces[:, :, 1] << 4).astype(np.uint8).reshape(len(rows), width)


def refined(kept: int) -> int:
    """How many rows are looked at twice where so many are kept."""
    return kept + max(kept // 2, 16)


def search(
    tree: ServingTree,
    queries: NDArray[np.float32],
    beam: int,
    k: int,
    *,
    words: Words | None = None,
    beside: int = 0,
    ends: NDArray[np.int64] | None = None,
    allowed: Masks | None = None,
) -> Found:
    """Walk the tree by cosines, or by cosines and words, score the best chunks' neighbours too, and return the best k.

    A chunk that stands under several of the kept nodes is scored once, under the best of them. Of each level the best
    `beam` nodes are kept, of the chunks the best k, or `beam` where that is more and neighbours are asked for; where
    more than `refined` of that number are met, they are chosen by their upper halves first.
    With words, the score of a child is `cosine + weight * sum / best sum`, the best sum being that of all children that
    are scored at this level. A node's sum takes each term's share from the signatures, a chunk's is its BM25, but that
    of one term no more than 255 count.

    Args:
        tree: what is searched.
        queries: float32 [depth, B, M, d], one set of embeddings per level, top first; a score is the maximum over M.
        beam: how many nodes of every level above the chunks are kept.
        k: how many chunks are returned at most.
        words: both signals; None for vectors alone.
        beside: of each of the best `beam` chunks so many before and after it in its document are scored too.
        ends: int64 [documents], where each document's chunks end, rising; needed for `beside`.
        allowed: uint8 masks per level, top first.

    Raises:
        InputError: wrong shapes, beam or k below 1, weights that are not finite.
        ModelError: a query is not finite.
    """
    queries = checked_queries(tree, queries, levels=True)
    masks = checked_masks(tree, allowed)
    check_at_least_1("beam", beam)
    check_at_least_1("k", k)
    depth, batch = queries.shape[:2]
    ends = checked_ends(tree, beside, ends)
    checked_words(tree, words, batch)
    q16, q_scales = quantise_queries(queries)
    q8, q8_scales = quantise_queries(queries, COARSE_STEPS)
    k = min(k, tree.sizes[-1])
    nodes = np.full((depth - 1, batch, beam), -1, np.int32)
    node_scores = np.full(nodes.shape, -np.inf, np.float32)
    chunks, parents = np.full((batch, k), -1, np.int32), np.full((batch, k), -1, np.int32)
    scores, cosines = np.full((batch, k), -np.inf, np.float32), np.full((batch, k), -np.inf, np.float32)
    sums, best, scored = np.zeros((batch, k), np.float32), np.zeros(batch, np.float32), np.zeros(batch, np.int64)
    weight = 0.0 if words is None else words.weight
    for b in range(batch):
        asked = None if words is None else slice(*words.offsets[b : b + 2].tolist())
        frontier = np.zeros(1, np.int32)
        for level, blocks in enumerate(tree.levels):
            at_chunks = level == depth - 1
            mask = None if masks is None else masks[level]
            entries, owners, met = _children(blocks, frontier, mask)
            ids = blocks.ids[entries]
            own_sums = np.zeros(len(entries), np.float32)
            if words is not None:
                own_sums = _word_sums(words, level, blocks, entries, owners, words.terms[asked], words.weights[asked])
            best[b] = own_sums.max(initial=0)
            scored[b] += met
            twice = refined(max(k, beam if beside else 1) if at_chunks else beam)
            if len(entries) > twice:
                coarse = _coarse_scores(blocks, entries, q8[level, b], q8_scales[level, b])
                order = np.lexsort((ids, -combined(coarse, own_sums, best[b], weight)))[:twice]
                ids, owners, own_sums = ids[order], owners[order], own_sums[order]
            own = _scores(blocks, ids, q16[level, b], q_scales[level, b])
            values = combined(own, own_sums, best[b], weight)
            if at_chunks:
                break
            order = np.lexsort((ids, -values))[:beam]
            frontier = ids[order]
            nodes[level, b, : len(order)] = frontier
            node_scores[level, b, : len(order)] = values[order]
        if beside and ends is not None:
            near = _beside(ids[np.lexsort((ids, -values))[:beam]], ids, beside, ends, mask)
            scored[b] += len(near)
            own = np.concatenate([own, _scores(blocks, near, q16[-1, b], q_scales[-1, b])])
            near_sums = np.zeros(len(near), np.float32)
            if words is not None:
                near_sums = bm25_scores(words.index, words.terms[asked], words.weights[asked], near)
            own_sums = np.concatenate([own_sums, near_sums])
            ids = np.concatenate([ids, near])
            owners = np.concatenate([owners, np.full(len(near), -1, np.int32)])
            best[b] = own_sums.max(initial=best[b])
            values = combined(own, own_sums, best[b], weight)
        order = np.lexsort((ids, -values))[:k]
        kept = slice(0, len(order))
        chunks[b, kept], scores[b, kept], cosines[b, kept] = ids[order], values[order], own[order]
        sums[b, kept] = own_sums[order]
        if depth > 1:
            parents[b, kept] = owners[order]
    return Found(nodes, node_scores, chunks, scores, cosines, sums, parents, best, scored)


def combined(
    cosines: NDArray[np.float32], sums: NDArray[np.float32], best: np.float32, weight: float
) -> NDArray[np.float32]:
    """`cosine + weight * sum / best`, float32; the cosines where the best sum is 0 (no word is known)."""
    if weight == 0 or not best > 0:
        return cosines
    return cosines + np.float32(weight) * sums / np.float32(best)


def signatures(
    offsets: NDArray[np.int64],
    ids: NDArray[np.int32],
    child_offsets: NDArray[np.int64],
    child_terms: NDArray[np.int32],
    child_shares: NDArray[np.uint8],
    child_values: NDArray[np.uint8],
) -> tuple[Signatures, NDArray[np.uint8]]:
    """The signatures of one level's blocks, from what is known of each child.

    Args:
        offsets: int64 [parents + 1], the children of parent p are `ids[offsets[p]:offsets[p + 1]]`; at most 65,536.
        ids: int32 [entries].
        child_offsets: int64 [children + 1], the terms of child c are at child_offsets[c]:child_offsets[c + 1].
        child_terms: int32, rising within a child.
        child_shares: uint8, their shares in 255ths, rounded up.
        child_values: uint8, what is kept: the shares, or at the chunks the counts.

    Returns:
        The signatures, and of each of their terms the largest share, uint8 [terms]: with their `offsets` and `terms`
        the children of the next level.
    """
    parts: list[tuple[NDArray[Any], ...]] = []
    term_counts, entry_counts = [0], [0]
    for first, last in pairwise(offsets):
        spans = [np.arange(child_offsets[c], child_offsets[c + 1]) for c in ids[first:last]]
        places = np.concatenate([np.arange(0), *spans])
        slots = np.repeat(np.arange(last - first), np.array([len(span) for span in spans], np.int64))
        order = np.lexsort((slots, child_terms[places]))
        places, slots = places[order], slots[order]
        terms, starts = np.unique(child_terms[places], return_index=True)
        shares = child_shares[places]
        largest = np.maximum.reduceat(shares, starts) if len(starts) else shares
        parts.append((terms, starts, slots, child_values[places], largest))
        term_counts.append(len(terms))
        entry_counts.append(len(slots))
    start_kind, slot_kind = signature_kinds(offsets, ids, child_offsets)
    kinds = (np.int32, start_kind, slot_kind, np.uint8, np.uint8)
    arrays: list[Any] = [
        np.concatenate([np.zeros(0, own), *(part[i].astype(own) for part in parts)]) for i, own in enumerate(kinds)
    ]
    terms, starts, slots, values, largest = arrays
    own, bases = np.cumsum(term_counts, dtype=np.int64), np.cumsum(entry_counts, dtype=np.int64)
    return Signatures(own, terms, bases, starts, slots, values), largest


def signature_kinds(offsets: NDArray[np.int64], ids: NDArray[np.int32], child_offsets: NDArray[np.int64]) -> Any:
    """The narrowest types of starts and slots for these blocks; see `signatures`."""
    entries = np.concatenate([[0], np.cumsum(np.diff(child_offsets)[ids])])[offsets]
    return (
        np.uint16 if np.diff(entries).max(initial=0) <= 1 << 16 else np.int32,
        np.uint8 if np.diff(offsets).max(initial=0) <= 1 << 8 else np.uint16,
    )


def exact(
    tree: ServingTree, queries: NDArray[np.float32], k: int, allowed: Masks | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Score every chunk and return the best k: the oracle of `search`.

    `queries`: float32 [B, M, d]. `allowed`: as for `search`; only the chunks' own mask counts. Returns int32 and
    float32 [B, min(k, chunks)], best first, padded with -1 and -inf.
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
        scores = _scores(tree.levels[-1], candidates, q16[b], q_scales[b])
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
        scores[b, real] = _scores(tree.levels[-1], ids[b, real], q16[b], q_scales[b])
    return scores


def project(
    diagonal: NDArray[np.float32], rows: NDArray[np.int8], scales: NDArray[np.float32], queries: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Queries times a square matrix, as unit vectors; the matrix is given as its diagonal and, quantised, the rest.

    So it is read in a quarter of the time, and every query by itself: no answer depends on the batch.

    Args:
        diagonal: float32 [d].
        rows: int8 [d, d], what the matrix has beside its diagonal, as `quantise` gives it.
        scales: float32 [d].
        queries: float32 [B, d].

    Returns:
        float32 [B, d]; zeros where the product is zero.

    Raises:
        InputError: wrong shapes.
        ModelError: a query is not finite.
    """
    queries = checked_factors(diagonal, rows, scales, queries)
    q16, q_scales = quantise_queries(queries)
    dots = q16.astype(np.float64) @ rows.astype(np.float64).T
    values = queries * diagonal + q_scales[:, None] * scales * dots.astype(np.float32)
    squares = np.cumsum(np.square(values, dtype=np.float64), axis=1)[:, -1:]  # one after the other
    return (values / np.maximum(np.sqrt(squares), TINY)).astype(np.float32)


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
    wrong_depth = levels and queries.shape[0] != tree.depth
    if queries.ndim != 3 + levels or queries.shape[-1] != tree.dimension or queries.shape[-2] == 0 or wrong_depth:
        expected = f"[{tree.depth}, B, M, {tree.dimension}]" if levels else f"[B, M, {tree.dimension}]"
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


def checked_factors(
    diagonal: NDArray[np.float32], rows: NDArray[np.int8], scales: NDArray[np.float32], queries: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Queries as contiguous float32 [B, d]; InputError or ModelError if unusable."""
    queries = np.ascontiguousarray(queries, np.float32)
    size = len(diagonal)
    if rows.shape != (size, size) or scales.shape != (size,) or queries.ndim != 2 or queries.shape[1] != size:
        shapes = f"{diagonal.shape}, {rows.shape}, {scales.shape}, {queries.shape}"
        raise InputError(f"factors and queries of shapes {shapes}: expected [d], [d, d], [d] and [B, d]")
    _require_finite(queries, ("query", "component"))
    return queries


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


def checked_ends(tree: ServingTree, beside: int, ends: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    """The documents' ends, None where no neighbours are asked for; InputError where they do not fit."""
    if beside < 0:
        raise InputError(f"beside = {beside}: it must be at least 0")
    if beside == 0:
        return None
    if ends is None:
        raise InputError("beside is given without ends: give int64 [documents], where each document's chunks end")
    ends = np.ascontiguousarray(ends, np.int64)
    if ends.ndim != 1 or (ends[-1] if len(ends) else 0) != tree.sizes[-1]:
        raise InputError(f"ends of shape {ends.shape}: the last must be {tree.sizes[-1]}, the chunks of this tree")
    return ends


def checked_words(tree: ServingTree, words: Words | None, batch: int) -> None:
    """Raise InputError where words do not fit the tree and the queries; the arrays of the index are checked apart."""
    if words is None:
        return
    checked_terms(words.terms, words.weights)
    offsets = words.offsets
    if len(offsets) != batch + 1 or offsets[0] != 0 or offsets[-1] != len(words.terms) or (np.diff(offsets) < 0).any():
        raise InputError(f"word offsets of shape {offsets.shape} for {batch} queries and {len(words.terms)} terms")
    if len(words.signatures) != tree.depth or words.index.size != tree.sizes[-1]:
        raise InputError("signatures and words' index are of another tree")
    if not (np.isfinite(words.weight) and words.weight >= 0):
        raise InputError(f"weight of words = {words.weight}: it must be a finite number, 0 or more")


def check_at_least_1(name: str, value: int) -> None:
    """Raise InputError where `value` is below 1."""
    if value < 1:
        raise InputError(f"{name} = {value}: it must be at least 1")


def _require_finite(values: NDArray[np.float32], axes: tuple[str, ...]) -> None:
    # One product tells of almost all vectors; where it overflows they are looked at one by one.
    if not math.isfinite(np.vdot(values, values)) and not np.isfinite(values).all():
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
) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """The frontier's children in its order, each element once, masked ones left out: their entries and parents.

    And how many there are if those that are met more than once are counted so often.
    """
    starts, ends = blocks.offsets[frontier], blocks.offsets[frontier + 1]
    rows = np.concatenate([np.arange(0), *map(np.arange, starts, ends)])
    parents = np.repeat(frontier, ends - starts)
    if mask is not None:
        kept = mask[blocks.ids[rows]] != 0
        rows, parents = rows[kept], parents[kept]
    once = np.sort(np.unique(blocks.ids[rows], return_index=True)[1])
    return rows[once], parents[once], len(rows)


def _word_sums(
    words: Words,
    level: int,
    blocks: LevelBlocks,
    rows: NDArray[np.int64],
    owners: NDArray[np.int32],
    terms: NDArray[np.int32],
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The sums of weight * share of some rows, float32 [rows], added in the order of the terms."""
    signatures = words.signatures[level]
    sums = np.zeros(len(rows), np.float32)
    for parent in np.unique(owners):
        first, last = signatures.offsets[parent : parent + 2]
        known = signatures.terms[first:last]
        bounds = np.append(signatures.starts[first:last], signatures.bases[parent + 1] - signatures.bases[parent])
        children = slice(*blocks.offsets[parent : parent + 2].tolist())
        found = np.zeros(children.stop - children.start, np.float32)
        own = np.flatnonzero(owners == parent)
        for term, weight in zip(terms, weights, strict=True):
            place = int(np.searchsorted(known, term))
            if place == len(known) or known[place] != term:
                continue
            entries = slice(*(signatures.bases[parent] + bounds[place : place + 2]).tolist())
            slots, values = signatures.slots[entries], signatures.values[entries].astype(np.float32)
            if level == len(words.signatures) - 1:
                shares = values / (values + words.index.norms[blocks.ids[children][slots]])
            else:
                shares = values * STEP
            found[slots] += weight * shares
        sums[own] = found[rows[own] - children.start]
    return sums


def _beside(
    best: NDArray[np.int32],
    known: NDArray[np.int32],
    beside: int,
    ends: NDArray[np.int64],
    mask: NDArray[np.uint8] | None,
) -> NDArray[np.int32]:
    """The neighbours of the best chunks that are not known yet, in rising order."""
    documents = np.searchsorted(ends, best, side="right")
    first = np.where(documents > 0, ends[documents - 1], 0)
    near = best[:, None] + np.arange(-beside, beside + 1)
    near = np.unique(near[(near >= first[:, None]) & (near < ends[documents][:, None])]).astype(np.int32)
    near = near[~np.isin(near, known)]
    return near if mask is None else near[mask[near] != 0]


def _coarse_scores(
    blocks: LevelBlocks, entries: NDArray[np.int64], q8: NDArray[np.int16], q_scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scores of some entries by their upper halves, float32 [entries], for the embeddings of one query."""
    packed = blocks.upper[entries].reshape(len(entries), -1, 1, 32)  # there are more than 0
    halves = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(entries), -1)[:, : q8.shape[1]]
    dots = (16.0 * halves - 120.0) @ q8.astype(np.float64).T
    values = q_scales * blocks.upper_scales[entries, None] * dots.astype(np.float32)
    return values.max(axis=1) + np.float32(0)


def _scores(
    blocks: LevelBlocks, elements: NDArray[np.int32], q16: NDArray[np.int16], q_scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scores of some elements, float32 [elements], for the embeddings of one query, int16 [M, d] and float32 [M]."""
    scores = np.empty(len(elements), np.float32)
    for start in range(0, len(elements), _BLOCK):
        block = elements[start : start + _BLOCK]
        # float64 holds these integers exactly and is what NumPy multiplies fast.
        dots = blocks.rows[block].astype(np.float64) @ q16.astype(np.float64).T  # [block, M]
        values = q_scales * blocks.scales[block, None] * dots.astype(np.float32)
        scores[start : start + _BLOCK] = values.max(axis=1) + np.float32(0)
    return scores
