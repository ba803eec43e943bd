"""Every back end against the reference, bit for bit, and against what the specification promises at the edges."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.trees import laid_out, random_index, random_masks, random_queries, random_tree

from treemem.errors import DamagedMemory, InputError, ModelError
from treemem.kernels import BackEnd, Found, Masks, ServingTree, back_end, quantise, reference

# The fixture is a module without state: one for all examples is meant.
property_test = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

seeds = st.integers(0, 10**6)
chunk_numbers = st.one_of(st.integers(0, 12), st.integers(13, 300))
# 63 to 97: below, at and past the width of the vector instructions, with and without a rest; a lane of a GPU reads 528
# components in more than one go.
dimensions = st.sampled_from([1, 3, 8, 63, 64, 65, 97, 144, 528])
kept_shares = st.sampled_from([None, 0.0, 0.1, 0.7, 1.0])


def assert_same(got: object, expected: object) -> None:
    if isinstance(expected, tuple):
        assert isinstance(got, tuple)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    else:
        assert isinstance(got, np.ndarray)
        assert isinstance(expected, np.ndarray)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.tobytes() == expected.tobytes()


def part(found: Found, b: int) -> Found:
    """What a search would have returned for query b alone."""
    return Found(*(array[:, b : b + 1] for array in found[:2]), *(array[b : b + 1] for array in found[2:]))


def walk(kernels: Any, tree: ServingTree, queries: np.ndarray, beam: int, allowed: Masks | None = None) -> Found:
    """A search by vectors alone that returns every chunk that was scored."""
    found: Found = kernels.search(tree, queries, beam, max(1, tree.sizes[-1]), allowed=allowed)
    return found


def masks_or_none(generator: np.random.Generator, tree: ServingTree, kept: float | None) -> Masks | None:
    return None if kept is None else random_masks(generator, tree, kept)


@given(
    seed=seeds,
    chunks=chunk_numbers,
    dimension=dimensions,
    twins=st.sampled_from([0.0, 0.5, 1.0]),
    batch=st.integers(0, 5),
    embeddings=st.integers(1, 3),
    k=st.sampled_from([1, 2, 10, 1000]),
    kept=kept_shares,
)
@property_test
def test_exact_and_score_chunks_agree(
    kernels: BackEnd,
    seed: int,
    chunks: int,
    dimension: int,
    twins: float,
    batch: int,
    embeddings: int,
    k: int,
    kept: float | None,
) -> None:
    generator = np.random.default_rng(seed)
    tree = random_tree(generator, chunks, dimension=dimension, twins=twins)
    queries = random_queries(generator, tree, batch, embeddings)[0]
    masks = masks_or_none(generator, tree, kept)
    ids, scores = kernels.exact(tree, queries, k, masks)
    assert_same((ids, scores), reference.exact(tree, queries, k, masks))
    assert_same(kernels.score_chunks(tree, queries, ids), scores)
    some = generator.integers(-1, max(chunks, 1), (batch, 7)).astype(np.int32) if chunks else ids
    assert_same(kernels.score_chunks(tree, queries, some), reference.score_chunks(tree, queries, some))


@given(seed=seeds, chunks=st.integers(0, 80), terms=st.integers(0, 9))
@property_test
def test_bm25_agrees(kernels: BackEnd, seed: int, chunks: int, terms: int) -> None:
    generator = np.random.default_rng(seed)
    index = random_index(generator, chunks)
    query = generator.integers(-1, 45, terms).astype(np.int32)
    weights = (10 * generator.random(terms)).astype(np.float32)
    some = generator.integers(-1, max(chunks, 1), 20).astype(np.int32) if chunks else np.full(3, -1, np.int32)
    everything = kernels.bm25_all(index, query, weights)
    assert_same(everything, reference.bm25_all(index, query, weights))
    scores = kernels.bm25_scores(index, query, weights, some)
    assert_same(scores, reference.bm25_scores(index, query, weights, some))
    assert (scores[some < 0] == 0).all()


@given(seed=seeds, dimension=dimensions, batch=st.integers(0, 70))
@property_test
def test_project_agrees(kernels: BackEnd, seed: int, dimension: int, batch: int) -> None:
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((dimension, dimension)).astype(np.float32) / 10
    diagonal = np.ones(dimension, np.float32)
    rows, scales = quantise(matrix)
    queries = generator.standard_normal((batch, dimension)).astype(np.float32)
    got = kernels.project(diagonal, rows, scales, queries)
    assert_same(got, reference.project(diagonal, rows, scales, queries))
    exact = queries @ (matrix + np.eye(dimension)).T
    np.testing.assert_allclose(got, exact / np.linalg.norm(exact, axis=1, keepdims=True), atol=0.02)
    with pytest.raises(InputError, match="shapes"):
        kernels.project(diagonal, rows, scales, queries[:, 1:])


def test_nothing_projects_to_nothing(kernels: BackEnd) -> None:
    zeros = np.zeros((3, 3), np.int8), np.zeros(3, np.float32)
    assert not kernels.project(np.ones(3, np.float32), *zeros, np.zeros((1, 3), np.float32)).any()


@pytest.mark.parametrize("chunks", [5, 9, 200])
def test_a_beam_over_everything_is_exact_search(kernels: BackEnd, chunks: int) -> None:
    generator = np.random.default_rng(chunks)
    tree = random_tree(generator, chunks, twins=0.3)
    query = random_queries(generator, tree, 4, 2)[0]
    walked = walk(kernels, tree, np.stack([query] * tree.depth), beam=1000)
    assert_same((walked.chunks, walked.scores), kernels.exact(tree, query, chunks))
    assert (walked.scored == sum(len(blocks.ids) for blocks in tree.levels)).all()
    assert ((walked.parents == -1) == (tree.depth == 1)).all()


def test_equal_chunks_come_by_id_through_the_better_parent(kernels: BackEnd) -> None:
    generator = np.random.default_rng(1)
    tree = random_tree(generator, 60, spill=2)
    blocks = tree.levels[-1]
    rows, scales = np.ones_like(blocks.rows), np.ones_like(blocks.scales)
    same = laid_out(rows, scales, blocks.ids, blocks.offsets)
    tree = replace(tree, levels=(*tree.levels[:-1], same))
    walked = walk(kernels, tree, random_queries(generator, tree, 1), beam=5)
    chunks = walked.chunks[0][walked.chunks[0] >= 0]
    assert (np.diff(chunks) > 0).all()
    blocks, ranks = tree.levels[-1], walked.nodes[-1, 0].tolist()
    for chunk, parent in zip(chunks, walked.parents[0], strict=False):
        homes = np.searchsorted(blocks.offsets, np.flatnonzero(blocks.ids == chunk), side="right") - 1
        assert ranks.index(parent) == min(ranks.index(home) for home in homes if home in ranks)


def test_a_repeated_chunk_is_returned_once_even_under_one_parent(kernels: BackEnd) -> None:
    ids = np.array([1, 0, 1, 1], np.int32)
    blocks = laid_out(np.ones((2, 8), np.int8), np.full(2, 0.5, np.float32), ids, np.array([0, 4]))
    walked = walk(kernels, ServingTree((blocks,), (2,)), np.ones((1, 1, 1, 8), np.float32), beam=1)
    assert walked.chunks.tolist() == [[0, 1]]
    assert walked.scores.tolist() == [[4, 4]]
    assert walked.scored.tolist() == [4]


def test_an_empty_memory(kernels: BackEnd) -> None:
    tree = random_tree(np.random.default_rng(0), 0)
    queries = np.ones((1, 3, 1, 16), np.float32)
    walked = walk(kernels, tree, queries, beam=4)
    assert walked.chunks.shape == (3, 0)
    assert walked.nodes.shape == (0, 3, 4)
    assert walked.scored.tolist() == [0, 0, 0]
    assert kernels.exact(tree, queries[0], 10)[0].shape == (3, 0)


def test_everything_masked(kernels: BackEnd) -> None:
    generator = np.random.default_rng(0)
    tree = random_tree(generator, 100)
    queries = random_queries(generator, tree, 2)
    masks = random_masks(generator, tree, 0.0)
    walked = walk(kernels, tree, queries, 4, masks)
    assert (walked.chunks == -1).all()
    assert (walked.nodes == -1).all()
    assert np.isneginf(walked.node_scores).all()
    assert not walked.scored.any()
    ids, scores = kernels.exact(tree, queries[0], 3, masks)
    assert ids.tolist() == [[-1] * 3] * 2
    assert np.isneginf(scores).all()


def test_masked_elements_are_never_returned(kernels: BackEnd) -> None:
    generator = np.random.default_rng(3)
    tree = random_tree(generator, 200)
    queries = random_queries(generator, tree, 20)
    masks = random_masks(generator, tree, 0.6)
    walked = walk(kernels, tree, queries, 4, masks)
    assert masks[-1][walked.chunks[walked.chunks >= 0]].all()
    for level, nodes in enumerate(walked.nodes):
        assert masks[level][nodes[nodes >= 0]].all()
    assert masks[-1][kernels.exact(tree, queries[0], 30, masks)[0]].all()


def test_repeating_an_embedding_changes_nothing(kernels: BackEnd) -> None:
    generator = np.random.default_rng(5)
    tree = random_tree(generator, 90)
    queries = random_queries(generator, tree, 3, 2)
    padded = np.concatenate([queries, queries[:, :, -1:], queries[:, :, -1:]], axis=2)
    assert_same(walk(kernels, tree, padded, 4), walk(kernels, tree, queries, 4))
    ids = kernels.exact(tree, queries[0], 90)[0]
    alone = [kernels.score_chunks(tree, queries[0, :, m : m + 1], ids) for m in range(2)]
    assert_same(kernels.score_chunks(tree, queries[0], ids), np.maximum(*alone))


def test_zero_queries_score_zero(kernels: BackEnd) -> None:
    tree = random_tree(np.random.default_rng(0), 50)
    walked = walk(kernels, tree, np.zeros((tree.depth, 1, 2, 16), np.float32), beam=3)
    assert walked.nodes[0, 0].tolist() == [0, 1, 2]
    scores = walked.scores[walked.chunks >= 0]
    assert len(scores)
    assert not scores.any()
    assert not np.signbit(scores).any()


def test_no_score_is_a_negative_zero(kernels: BackEnd) -> None:
    ids = np.array([1, 0], np.int32)
    blocks = laid_out(np.array([[1], [-1]], np.int8), np.zeros(2, np.float32), ids, np.array([0, 2]))
    tree = ServingTree((blocks,), (2,))
    queries = np.ones((1, 1, 1, 1), np.float32)
    walked = walk(kernels, tree, queries, beam=1)
    assert walked.chunks.tolist() == [[0, 1]]
    for scores in (walked.scores, kernels.exact(tree, queries[0], 2)[1]):
        assert not scores.any()
        assert not np.signbit(scores).any()


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_answers_do_not_depend_on_batch_or_threads(
    kernels: BackEnd, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREEMEM_THREADS", threads)
    generator = np.random.default_rng(7)
    tree = random_tree(generator, 2500, fanout=8, twins=0.2)
    queries = random_queries(generator, tree, 60, 2)
    masks = random_masks(generator, tree, 0.9)
    walked = walk(kernels, tree, queries, 6, masks)
    ids, scores = kernels.exact(tree, queries[0], 20, masks)
    chunk_scores = kernels.score_chunks(tree, queries[0], ids)
    for b in range(0, 60, 7):
        assert_same(part(walked, b), walk(reference, tree, queries[:, b : b + 1], 6, masks))
        alone = slice(b, b + 1)
        assert_same((ids[alone], scores[alone]), reference.exact(tree, queries[0, alone], 20, masks))
    assert_same(chunk_scores, scores)


def test_exact_search_in_several_slices(kernels: BackEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(8)
    tree = random_tree(generator, 9000, fanout=5000, spill=1, dimension=8, twins=0.5)  # 9,000 rows: past one slice
    queries = random_queries(generator, tree, 3)[0]
    index = random_index(generator, 40_000)
    query, weights = np.array([3, 17, 3], np.int32), np.array([1, 2, 0.5], np.float32)
    monkeypatch.setenv("TREEMEM_THREADS", "1")
    alone = (kernels.exact(tree, queries, 50), kernels.bm25_all(index, query, weights))
    monkeypatch.setenv("TREEMEM_THREADS", "2")
    together = (kernels.exact(tree, queries, 50), kernels.bm25_all(index, query, weights))
    assert_same(together, alone)
    assert_same(together, (reference.exact(tree, queries, 50), reference.bm25_all(index, query, weights)))


def test_several_callers_at_once(kernels: BackEnd) -> None:
    generator = np.random.default_rng(9)
    tree = random_tree(generator, 500)
    queries = random_queries(generator, tree, 40)
    expected = walk(reference, tree, queries, 4)
    with ThreadPoolExecutor(4) as pool:
        for walked in pool.map(lambda _: walk(kernels, tree, queries, 4), range(8)):
            assert_same(walked, expected)


def test_memory_maps_are_read_in_place(kernels: BackEnd, tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    tree = random_tree(generator, 120)
    index = random_index(generator, 120)

    def mapped(array: np.ndarray, name: str) -> np.ndarray:
        np.save(tmp_path / name, array)
        stored: np.ndarray = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        return stored

    levels = tuple(
        replace(
            blocks, **{field.name: mapped(getattr(blocks, field.name), f"{i}{field.name}") for field in fields(blocks)}
        )
        for i, blocks in enumerate(tree.levels)
    )
    stored = ServingTree(levels, tree.sizes)
    stored_index = replace(index, **{f.name: mapped(getattr(index, f.name), f"x{f.name}") for f in fields(index)})
    queries = random_queries(generator, tree, 3)
    assert_same(walk(kernels, stored, queries, 5), walk(reference, tree, queries, 5))
    assert_same(kernels.exact(stored, queries[0], 9), reference.exact(tree, queries[0], 9))
    terms, weights = np.arange(5, dtype=np.int32), np.ones(5, np.float32)
    assert_same(kernels.bm25_all(stored_index, terms, weights), reference.bm25_all(index, terms, weights))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_queries_that_are_not_finite_are_named(kernels: BackEnd, value: float) -> None:
    tree = random_tree(np.random.default_rng(0), 40)
    queries = np.ones((3, 2, 2, 16), np.float32)
    queries[2, 1, 0, 5] = value
    with pytest.raises(ModelError, match="level 2, query 1, embedding 0, component 5"):
        walk(kernels, tree, queries, 4)
    with pytest.raises(ModelError, match="query 1, embedding 0"):
        kernels.exact(tree, queries[2], 4)
    with pytest.raises(ModelError, match="query 1, embedding 0"):
        kernels.score_chunks(tree, queries[2], np.zeros((2, 1), np.int32))


def test_wrong_arguments_are_refused(kernels: BackEnd) -> None:
    generator = np.random.default_rng(0)
    tree = random_tree(generator, 40)
    queries = random_queries(generator, tree, 2)
    with pytest.raises(InputError, match="beam = 0"):
        walk(kernels, tree, queries, 0)
    with pytest.raises(InputError, match="k = 0"):
        kernels.exact(tree, queries[0], 0)
    for wrong in (queries[0], queries[1:], queries[..., :8], queries[:, :, :0]):
        with pytest.raises(InputError, match=r"takes \[3, B, M, 16\]"):
            walk(kernels, tree, wrong, 4)
    with pytest.raises(InputError, match="masks of shapes"):
        walk(kernels, tree, queries, 4, random_masks(generator, tree, 1.0)[1:])
    for ids in ([[40], [0]], [[-2], [0]], [[0]]):
        with pytest.raises(InputError, match="chunk ids"):
            kernels.score_chunks(tree, queries[0], np.array(ids, np.int32))
    index = random_index(generator, 5)
    with pytest.raises(InputError, match="one weight per term"):
        kernels.bm25_all(index, np.zeros(2, np.int32), np.ones(1, np.float32))
    with pytest.raises(InputError, match="not finite"):
        kernels.bm25_all(index, np.zeros(1, np.int32), np.full(1, np.nan, np.float32))
    with pytest.raises(InputError, match="chunk ids"):
        kernels.bm25_scores(index, np.zeros(1, np.int32), np.ones(1, np.float32), np.array([5], np.int32))


def test_compiled_kernels_never_read_a_damaged_tree() -> None:
    tree = random_tree(np.random.default_rng(0), 40)
    blocks = tree.levels[-1]
    ids = blocks.ids.copy()
    ids[0] = 10**6
    damaged = replace(tree, levels=(*tree.levels[:-1], replace(blocks, ids=ids)))
    with pytest.raises(DamagedMemory, match="outside 0 to 39"):
        walk(back_end("cpu"), damaged, np.ones((3, 1, 1, 16), np.float32), 4)


def test_wrong_thread_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = random_tree(np.random.default_rng(0), 40)
    monkeypatch.setenv("TREEMEM_THREADS", "many")
    with pytest.raises(InputError, match="TREEMEM_THREADS = 'many'"):
        walk(back_end("cpu"), tree, np.ones((3, 20, 1, 16), np.float32), 4)
