"""The specification against plain floating-point arithmetic, written without its helpers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.trees import laid_out, random_index, random_queries, random_tree

from treemem.errors import InputError, ModelError
from treemem.kernels import ServingTree, quantise, reference, top_k


def element_vectors(tree: ServingTree, level: int) -> dict[int, np.ndarray]:
    blocks = tree.levels[level]
    return {int(element): blocks.rows[element].astype(float) * float(blocks.scales[element]) for element in blocks.ids}


def float_score(query: np.ndarray, vector: np.ndarray) -> float:
    return max(float(embedding.astype(float) @ vector) for embedding in query)


@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(1, 50))
def test_quantised_rows_are_within_half_a_step(seed: int, n: int, d: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    rows, scales = quantise(vectors)
    assert rows.dtype == np.int8
    assert scales.dtype == np.float32
    assert (np.abs(rows * scales[:, None] - vectors) <= 0.5001 * scales[:, None]).all()
    if n:
        assert (np.abs(rows).max(axis=1) == 127).all()


def test_halves_round_to_even_and_zeros_stay() -> None:
    rows, scales = quantise(np.array([[127, 0.5, 1.5, -0.5, -1.5], [0, 0, 0, 0, 0], [1e-40, 0, 0, 0, 0]], np.float32))
    assert rows.tolist() == [[127, 0, 2, 0, -2], [0] * 5, [0] * 5]
    assert scales.tolist() == [1, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_named(value: float) -> None:
    vectors = np.ones((4, 3), np.float32)
    vectors[2, 1] = value
    with pytest.raises(ModelError, match=r"row 2, component 1"):
        quantise(vectors)


def test_highest_dimension_does_not_overflow() -> None:
    rows, scales = quantise(np.ones((1, 2048), np.float32))
    blocks = random_tree(np.random.default_rng(0), 1, dimension=2048).levels[0]
    tree = ServingTree((laid_out(rows, scales, blocks.ids, blocks.offsets),), (1,))
    assert reference.score_chunks(tree, np.ones((1, 1, 2048), np.float32), np.zeros((1, 1), np.int32))[0, 0] == 2048
    with pytest.raises(ModelError, match="2049"):
        quantise(np.ones((1, 2049), np.float32))


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 3), st.integers(1, 80))
@settings(max_examples=40)
def test_exact_is_brute_force(seed: int, chunks: int, embeddings: int, k: int) -> None:
    generator = np.random.default_rng(seed)
    tree = random_tree(generator, chunks)
    query = random_queries(generator, tree, 1, embeddings)[0]
    expected = {chunk: float_score(query[0], vector) for chunk, vector in element_vectors(tree, -1).items()}
    ids, scores = reference.exact(tree, query, k)
    best = sorted(expected.values(), reverse=True)[:k]
    assert scores[0] == pytest.approx(best, abs=2e-3)
    assert [expected[int(chunk)] for chunk in ids[0]] == pytest.approx(best, abs=2e-3)
    assert len(set(ids[0].tolist())) == min(k, chunks)


@given(st.integers(0, 10**6), st.integers(9, 120), st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=40)
def test_walk_is_a_beam_search(seed: int, chunks: int, beam: int, embeddings: int) -> None:
    generator = np.random.default_rng(seed)
    tree = random_tree(generator, chunks)
    queries = random_queries(generator, tree, 1, embeddings)
    # The integers that the query is rounded to, so that near ties fall alike.
    peaks = np.abs(queries).max(axis=-1, keepdims=True)
    queries = (np.round(queries / peaks * 8191) / 8191 * peaks).astype(np.float32)
    walked = reference.search(tree, queries, beam, chunks)

    frontier, scored = [0], 0
    reached: dict[int, tuple[float, int]] = {}
    for level, blocks in enumerate(tree.levels):
        vectors = element_vectors(tree, level)
        reached = {}
        for parent in frontier:
            for element in blocks.ids[blocks.offsets[parent] : blocks.offsets[parent + 1]].tolist():
                reached.setdefault(element, (float_score(queries[level, 0], vectors[element]), parent))
        scored += sum(len(blocks.ids[blocks.offsets[parent] : blocks.offsets[parent + 1]]) for parent in frontier)
        ranked = sorted(reached, key=lambda element: (-reached[element][0], element))
        if level < tree.depth - 1:
            frontier = ranked[:beam]
            padded = frontier + [-1] * (beam - len(frontier))
            assert walked.nodes[level, 0].tolist() == padded
    assert walked.scored[0] == scored
    assert walked.chunks[0, : len(ranked)].tolist() == ranked
    assert walked.parents[0, : len(ranked)].tolist() == [reached[chunk][1] for chunk in ranked]
    assert walked.scores[0, : len(ranked)] == pytest.approx([reached[chunk][0] for chunk in ranked], abs=1e-4)


@given(st.integers(0, 10**6), st.integers(0, 30))
@settings(max_examples=40)
def test_bm25_is_its_formula(seed: int, chunks: int) -> None:
    generator = np.random.default_rng(seed)
    index = random_index(generator, chunks)
    terms = generator.integers(-1, 45, 6).astype(np.int32)
    weights = generator.random(6).astype(np.float32)
    scores = reference.bm25_all(index, terms, weights)
    for chunk in range(chunks):
        span = slice(index.offsets[chunk], index.offsets[chunk + 1])
        counts = dict(zip(index.terms[span].tolist(), index.counts[span].tolist(), strict=True))
        norm = float(index.norms[chunk])
        parts = [
            float(weight) * counts[term] / (counts[term] + norm)
            for term, weight in zip(terms.tolist(), weights.tolist(), strict=True)
            if term in counts
        ]
        assert math.isclose(scores[chunk], sum(parts), rel_tol=1e-5, abs_tol=1e-7)


@given(st.lists(st.tuples(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0]), st.integers(-1, 9))), st.integers(1, 30))
def test_top_k_is_a_sort(pairs: list[tuple[float, int]], k: int) -> None:
    pairs = list({(score, i if i >= 0 else -1) for score, i in pairs})
    scores, ids = np.array([s for s, _ in pairs], np.float32), np.array([i for _, i in pairs], np.int32)
    got_ids, got_scores = top_k(scores, ids, k)
    expected = sorted((-score, i) for score, i in pairs if i >= 0)[:k]
    assert list(zip((-got_scores).tolist(), got_ids.tolist(), strict=True)) == expected


def test_top_k_refuses_what_it_cannot_rank() -> None:
    with pytest.raises(InputError, match="k = 0"):
        top_k(np.zeros(1, np.float32), np.zeros(1, np.int32), 0)
    with pytest.raises(InputError, match="expected one axis"):
        top_k(np.zeros(2, np.float32), np.zeros(1, np.int32), 1)
