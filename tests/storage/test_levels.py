"""What vectors are made of: compared with the formulas, and the same bits however the work is split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treemem.storage import levels as storage_levels
from treemem.storage.levels import Spread, contextual, document_runs, node_vectors, unit


def encodings_of(generator: np.random.Generator, chunks: int, dimension: int) -> np.ndarray:
    vectors = generator.standard_normal((chunks, dimension))
    return unit(vectors).astype(np.float16)


def plain_contextual(encodings: np.ndarray, chunk_ends: np.ndarray, alpha: float) -> np.ndarray:
    """The formula, document by document, in the plainest NumPy."""
    out = np.zeros(encodings.shape)
    begin = 0
    for end in chunk_ends:
        own = encodings[begin:end].astype(np.float64)
        total = own.sum(0)
        document = total / np.linalg.norm(total) if total.any() else total
        for row in range(begin, end):
            vector = encodings[row].astype(np.float64) + alpha * document
            out[row] = vector / np.linalg.norm(vector) if vector.any() else vector
        begin = int(end)
    return out


counts_of_documents = st.lists(st.integers(0, 9), min_size=0, max_size=25)


@given(counts=counts_of_documents, dimension=st.sampled_from([1, 5, 8, 33]), alpha=st.sampled_from([0.0, 0.25, 3.0]))
@settings(max_examples=60)
def test_contextual_is_the_formula(counts: list[int], dimension: int, alpha: float) -> None:
    ends = np.cumsum(np.array(counts, np.int64)).astype(np.int64)
    encodings = encodings_of(np.random.default_rng(sum(counts)), sum(counts), dimension)
    got = contextual(encodings, ends, alpha)
    assert got.dtype == np.float16
    assert got.shape == encodings.shape
    np.testing.assert_allclose(got.astype(np.float64), plain_contextual(encodings, ends, alpha), atol=6e-4)


@given(counts=counts_of_documents, rows=st.integers(1, 40), dimension=st.sampled_from([3, 7, 32, 384]))
@settings(max_examples=60)
def test_the_same_bits_however_documents_are_split_into_runs(counts: list[int], rows: int, dimension: int) -> None:
    ends = np.cumsum(np.array(counts, np.int64)).astype(np.int64)
    encodings = encodings_of(np.random.default_rng(len(counts)), sum(counts), dimension)
    whole = contextual(encodings, ends, 0.25)
    pieces = []
    for first, last in document_runs(ends, rows):
        begin = int(ends[first - 1]) if first else 0
        pieces.append(contextual(encodings[begin : int(ends[last - 1])], ends[first:last] - begin, 0.25))
    joined = np.concatenate(pieces) if pieces else encodings
    assert joined.tobytes() == whole.tobytes()
    some = np.arange(len(whole))[:: 1 + rows % 4]
    assert contextual(encodings, ends, 0.25, rows=some).tobytes() == whole[some].tobytes()


@given(counts=st.lists(st.integers(0, 60), max_size=30), rows=st.integers(1, 50))
def test_runs_cover_all_documents_and_are_no_longer_than_asked(counts: list[int], rows: int) -> None:
    ends = np.cumsum(np.array(counts, np.int64)).astype(np.int64)
    runs = list(document_runs(ends, rows))
    assert [first for first, _ in runs] == [0, *(last for _, last in runs)][: len(runs)]
    assert (runs[-1][1] if runs else 0) == len(counts)
    for first, last in runs:
        assert last > first
        assert last == first + 1 or sum(counts[first:last]) <= rows


def test_zero_vectors_stay_zero_and_break_nothing() -> None:
    zeros = np.zeros((4, 6), np.float16)
    assert not contextual(zeros, np.array([1, 4], np.int64), 0.25).any()
    # A zero chunk among others gets the direction of its document.
    mixed = zeros.copy()
    mixed[0, 0] = 1
    got = contextual(mixed, np.array([4], np.int64), 0.25)
    assert np.array_equal(got, np.tile(np.eye(1, 6, dtype=np.float16), (4, 1)))
    # Two opposite chunks: their document has no direction, so they stay as they are.
    opposite = np.array([[1, 0], [-1, 0]], np.float16)
    assert np.array_equal(contextual(opposite, np.array([2], np.int64), 0.25), opposite)


def test_documents_without_chunks() -> None:
    encodings = encodings_of(np.random.default_rng(0), 3, 4)
    ends = np.array([0, 0, 2, 2, 3, 3], np.int64)
    np.testing.assert_array_equal(contextual(encodings, ends, 0.5), contextual(encodings, np.array([2, 3]), 0.5))
    nothing = np.empty((0, 4), np.float16)
    assert contextual(nothing, np.array([0, 0], np.int64), 0.5).shape == (0, 4)
    assert contextual(nothing, np.array([], np.int64), 0.5).shape == (0, 4)


@pytest.mark.parametrize("nodes", [1, 7, 100, 2049])
@pytest.mark.parametrize("block", [1, 16, 1 << 15])
def test_node_vectors_are_unit_means(nodes: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_levels, "BLOCK", block)
    generator = np.random.default_rng(nodes)
    below = encodings_of(generator, 500, 12)
    counts = generator.integers(1, 9, nodes)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    children = generator.integers(0, 500, offsets[-1]).astype(np.int32)
    got = node_vectors(below, offsets, children)
    for node in range(0, nodes, max(1, nodes // 50)):
        mean = below[children[offsets[node] : offsets[node + 1]]].astype(np.float64).mean(0)
        np.testing.assert_allclose(got[node].astype(np.float64), mean / np.linalg.norm(mean), atol=6e-4)


def test_a_node_depends_on_its_own_children_alone() -> None:
    """Bit for bit, so that a removal can be recomputed on the way up and give what a fresh build gives."""
    generator = np.random.default_rng(3)
    below = encodings_of(generator, 300, 19)
    counts = generator.integers(1, 9, 100)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    children = generator.integers(0, 300, offsets[-1]).astype(np.int32)
    together = node_vectors(below, offsets, children)
    for node in range(100):
        own = children[offsets[node] : offsets[node + 1]]
        alone = node_vectors(below, np.array([0, len(own)], np.int64), own)
        assert alone.tobytes() == together[node].tobytes()


def test_node_of_zero_vectors_is_zero() -> None:
    got = node_vectors(np.zeros((3, 4), np.float16), np.array([0, 2, 3], np.int64), np.array([0, 1, 2], np.int32))
    assert not got.any()


def spreading(n: int, d: int = 24) -> np.ndarray:
    """Rows with a mean and with directions of very different importance."""
    generator = np.random.default_rng(n)
    return unit(generator.normal(size=(n, d)) * np.geomspace(2, 0.05, d) + np.eye(d)[3]).astype(np.float16)


def test_spread_is_mean_and_covariance() -> None:
    vectors = spreading(30_000)
    spread = Spread.of(vectors)
    np.testing.assert_allclose(spread.mean, vectors.astype(np.float64).mean(0), atol=1e-6)
    covariance = np.cov(vectors.astype(np.float64).T, bias=True)
    restored = (spread.directions * spread.values) @ spread.directions.T
    np.testing.assert_allclose(restored, covariance / np.trace(covariance) * 24, atol=0.01)
    half = spread.scaling(0.5)
    np.testing.assert_allclose(half @ restored @ half, np.eye(24), atol=1e-4)
    np.testing.assert_allclose(spread.scaling(0), np.eye(24), atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_few_vectors_have_almost_no_spread(n: int) -> None:
    spread = Spread.of(spreading(n))
    assert np.isfinite(spread.scaling(0.5)).all()
    if n < 2:
        np.testing.assert_allclose(spread.scaling(0.5), np.eye(24) * spread.scaling(0.5)[0, 0], atol=1e-5)


def test_spread_of_equal_vectors_is_finite() -> None:
    assert np.isfinite(Spread.of(np.tile(spreading(1), (500, 1))).scaling(0.5)).all()


def test_spread_looks_at_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = spreading(9000)
    monkeypatch.setattr(storage_levels, "SPREAD_ROWS", 4500)
    sampled = Spread.of(vectors)
    assert not np.array_equal(sampled.mean, vectors.astype(np.float64).mean(0).astype(np.float32))
    np.testing.assert_allclose(sampled.mean, vectors.astype(np.float64).mean(0), atol=0.02)
