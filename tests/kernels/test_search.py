"""Searches by both signals: every back end against the reference, and the reference against what it promises."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.trees import (
    random_ends,
    random_index,
    random_masks,
    random_queries,
    random_tree,
    random_words,
    signatures_of,
)

from treemem.errors import DamagedMemory, InputError, ModelError
from treemem.kernels import BackEnd, Found, Signatures, Words, back_end, reference


def assert_same(got: object, expected: Found | Signatures) -> None:
    assert type(got) is type(expected)
    names = Found._fields if isinstance(expected, Found) else [field.name for field in fields(expected)]
    for name in names:
        one, other = getattr(got, name), getattr(expected, name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        assert one.tobytes() == other.tobytes(), name


def part(words: Words, b: int) -> Words:
    """The words of one query."""
    own = slice(*words.offsets[b : b + 2].tolist())
    terms, weights = words.terms[own], words.weights[own]
    return replace(words, offsets=np.array([0, len(terms)]), terms=terms, weights=weights)


@given(
    seed=st.integers(0, 10**6),
    chunks=st.one_of(st.integers(0, 12), st.integers(13, 300)),
    dimension=st.sampled_from([1, 8, 63, 65, 130, 384, 1040]),
    fanout=st.one_of(st.integers(2, 9), st.integers(30, 70)),
    spill=st.integers(1, 3),
    twins=st.sampled_from([0.0, 0.5, 1.0]),
    batch=st.integers(0, 5),
    embeddings=st.integers(1, 3),
    beam=st.sampled_from([1, 2, 5, 400]),
    k=st.sampled_from([1, 3, 50, 1000]),
    beside=st.sampled_from([0, 1, 4]),
    with_words=st.booleans(),
    kept=st.sampled_from([None, 0.0, 0.1, 0.7, 1.0]),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_search_agrees(
    kernels: BackEnd,
    seed: int,
    chunks: int,
    dimension: int,
    fanout: int,
    spill: int,
    twins: float,
    batch: int,
    embeddings: int,
    beam: int,
    k: int,
    beside: int,
    with_words: bool,
    kept: float | None,
) -> None:
    generator = np.random.default_rng(seed)
    tree = random_tree(generator, chunks, dimension=dimension, fanout=max(fanout, spill + 1), spill=spill, twins=twins)
    queries = random_queries(generator, tree, batch, embeddings)
    masks = None if kept is None else random_masks(generator, tree, kept)
    words = random_words(generator, tree, batch) if with_words else None
    ends = random_ends(generator, chunks)
    given_ = {"words": words, "beside": beside, "ends": ends, "allowed": masks}
    found = kernels.search(tree, queries, beam, k, **given_)  # type: ignore[arg-type]
    assert_same(found, reference.search(tree, queries, beam, k, **given_))  # type: ignore[arg-type]
    for row in found.chunks:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
        assert masks is None or masks[-1][row[row >= 0]].all()


@given(seed=st.integers(0, 10**6), chunks=st.integers(0, 200), fanout=st.sampled_from([3, 8, 300]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_signatures_agree(kernels: BackEnd, seed: int, chunks: int, fanout: int) -> None:
    generator = np.random.default_rng(seed)
    blocks = random_tree(generator, chunks, fanout=fanout).levels[-1]
    index = random_index(generator, chunks)
    shares, values = generator.integers(1, 256, (2, len(index.terms))).astype(np.uint8)
    given_ = (blocks.offsets, blocks.ids, index.offsets, index.terms, shares, values)
    (made, largest), (expected, expected_largest) = kernels.signatures(*given_), reference.signatures(*given_)
    assert_same(made, expected)
    np.testing.assert_array_equal(largest, expected_largest)
    made.check(blocks.offsets)
    for parent in range(len(blocks.offsets) - 1):
        children = blocks.ids[blocks.offsets[parent] : blocks.offsets[parent + 1]]
        known: dict[int, dict[int, int]] = {}
        best: dict[int, int] = {}
        for slot, child in enumerate(children):
            for place in range(index.offsets[child], index.offsets[child + 1]):
                term = int(index.terms[place])
                known.setdefault(term, {})[slot] = int(values[place])
                best[term] = max(best.get(term, 0), int(shares[place]))
        own = slice(*made.offsets[parent : parent + 2].tolist())
        assert made.terms[own].tolist() == sorted(known)
        assert largest[own].tolist() == [best[term] for term in sorted(known)]
        ends = [*made.starts[own].tolist(), int(made.bases[parent + 1] - made.bases[parent])][1:]
        for term, start, end in zip(made.terms[own], made.starts[own], ends, strict=True):
            entries = slice(made.bases[parent] + start, made.bases[parent] + end)
            slots, held = made.slots[entries].tolist(), made.values[entries].tolist()
            assert dict(zip(slots, held, strict=True)) == known[int(term)]


def test_wide_slots(kernels: BackEnd) -> None:
    """More than 256 children: their numbers take two bytes."""
    generator = np.random.default_rng(2)
    tree = random_tree(generator, 1300, fanout=600, spill=1)
    wide = replace(tree.levels[0], offsets=np.array([0, len(tree.levels[0].ids)]))
    tree = replace(tree, levels=(wide, *tree.levels[1:]))
    words = random_words(generator, tree, 4)
    blocks, index = tree.levels[-1], words.index
    ones = np.ones(len(index.terms), np.uint8)
    made, _ = kernels.signatures(blocks.offsets, blocks.ids, index.offsets, index.terms, ones, ones)
    assert made.slots.dtype == np.uint16
    assert made.slots.max() > 256
    queries = random_queries(generator, tree, 4)
    assert_same(kernels.search(tree, queries, 2, 9, words=words), reference.search(tree, queries, 2, 9, words=words))


def test_without_words_scores_are_cosines(kernels: BackEnd) -> None:
    generator = np.random.default_rng(4)
    tree = random_tree(generator, 400, twins=0.2)
    found = kernels.search(tree, random_queries(generator, tree, 6, 2), 5, 400)
    np.testing.assert_array_equal(found.cosines, found.scores)
    assert not found.sums.any()
    assert not found.best.any()


def test_a_beam_over_everything_is_the_convex_sum(kernels: BackEnd) -> None:
    generator = np.random.default_rng(5)
    tree = random_tree(generator, 120)
    query = random_queries(generator, tree, 3)
    words = replace(random_words(generator, tree, 3), weight=0.4)
    found = kernels.search(tree, query, 1000, 120, words=words)
    everything = np.arange(120, dtype=np.int32)
    for b in range(3):
        own = part(words, b)
        capped = replace(words.index, counts=words.index.counts.clip(1, 255))
        sums = reference.bm25_scores(capped, own.terms, own.weights, everything)
        cosines = reference.score_chunks(tree, query[-1, b : b + 1], everything[None])[0]
        expected = cosines + np.float32(0.4) * sums / sums.max() if sums.any() else cosines
        order = np.lexsort((everything, -expected))
        np.testing.assert_array_equal(found.chunks[b], order)
        np.testing.assert_array_equal(found.scores[b], expected[order])
        np.testing.assert_array_equal(found.sums[b], sums[order])
        assert found.best[b] == sums.max()


def test_words_lead_where_vectors_do_not(kernels: BackEnd) -> None:
    """A chunk whose vector is far from the query's and that alone holds its word is found by a beam of 1."""
    generator = np.random.default_rng(6)
    tree = random_tree(generator, 300, dimension=64)
    index = random_index(generator, 300)
    for chunk in (3, 150, 299):
        rare = index.terms.copy()
        place = np.flatnonzero(np.diff(index.offsets))[chunk % 200]
        rare[index.offsets[place + 1] - 1] = 1000
        own = replace(index, terms=rare)
        words = Words(
            own, signatures_of(tree, own), np.array([0, 1]), np.array([1000], np.int32), np.ones(1, np.float32), 3
        )
        found = kernels.search(tree, random_queries(generator, tree, 1), 1, 1, words=words)
        assert found.chunks.tolist() == [[place]]


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_answers_do_not_depend_on_batch_or_threads(
    kernels: BackEnd, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREEMEM_THREADS", threads)
    generator = np.random.default_rng(7)
    tree = random_tree(generator, 900, fanout=8, twins=0.2)
    queries, words, ends = (
        random_queries(generator, tree, 60, 2),
        random_words(generator, tree, 60),
        random_ends(generator, 900),
    )
    whole = kernels.search(tree, queries, 4, 20, words=words, beside=2, ends=ends)
    for b in (0, 17, 59):
        alone = kernels.search(tree, queries[:, b : b + 1], 4, 20, words=part(words, b), beside=2, ends=ends)
        for name in Found._fields:
            one = getattr(whole, name)
            one = one[:, b : b + 1] if name.startswith("node") else one[b : b + 1]
            np.testing.assert_array_equal(one, getattr(alone, name))


def test_neighbours(kernels: BackEnd) -> None:
    generator = np.random.default_rng(8)
    tree = random_tree(generator, 300)
    queries, ends = random_queries(generator, tree, 5), np.array([0, 100, 100, 250, 300])
    plain = kernels.search(tree, queries, 3, 300)
    found = kernels.search(tree, queries, 3, 300, beside=2, ends=ends)
    gained = 0
    for before, after, parents in zip(plain.chunks, found.chunks, found.parents, strict=True):
        known, now = set(before[before >= 0].tolist()), set(after[after >= 0].tolist())
        document = {c: int(np.searchsorted(ends, c, side="right")) for c in range(300)}
        near = {c + s for c in before[:3].tolist() for s in range(-2, 3) if document.get(c + s) == document[c]}
        assert now == known | near
        assert {int(c) for c, p in zip(after, parents, strict=True) if c >= 0 and p < 0} == near - known
        gained += len(now - known)
    assert gained > 0
    assert (found.scored - plain.scored).sum() == gained


def test_bad_input(kernels: BackEnd) -> None:
    generator = np.random.default_rng(9)
    tree = random_tree(generator, 50)
    queries, words = random_queries(generator, tree, 2), random_words(generator, tree, 2)
    bad = queries.copy()
    bad[0, 1, 0, 3] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        kernels.search(tree, bad, 2, 2)
    for message, given_ in (
        ("k = 0", {"k": 0}),
        ("beam = 0", {"beam": 0}),
        ("beside = -1", {"beside": -1}),
        ("without ends", {"beside": 1}),
        ("the last must be 50", {"beside": 1, "ends": np.array([49])}),
        ("word offsets", {"words": part(words, 0)}),
        ("another tree", {"words": replace(words, signatures=())}),
        ("weight of words", {"words": replace(words, weight=-1.0)}),
        ("not finite", {"words": replace(words, weights=np.full(len(words.terms), np.nan, np.float32))}),
    ):
        with pytest.raises(InputError, match=message):
            kernels.search(tree, queries, **{"beam": 2, "k": 2, **given_})  # type: ignore[arg-type]


def test_damaged_signatures() -> None:
    generator = np.random.default_rng(10)
    tree = random_tree(generator, 80)
    words = random_words(generator, tree, 1)
    own = words.signatures[0]
    for broken in (
        replace(own, terms=own.terms[:-1]),
        replace(own, starts=own.starts[:-1]),
        replace(own, values=own.values[:-1]),
        replace(own, offsets=own.offsets + 1),
        replace(own, bases=own.bases[:-1]),
    ):
        with pytest.raises(DamagedMemory):
            broken.check(tree.levels[0].offsets)
        with pytest.raises(DamagedMemory):
            back_end("cpu").search(
                tree,
                random_queries(generator, tree, 1),
                2,
                2,
                words=replace(words, signatures=(broken, *words.signatures[1:])),
            )


def test_wrong_starts_and_slots_stay_inside() -> None:
    """What a check at opening would have to read whole is caught where it is used: nothing outside is touched."""
    generator = np.random.default_rng(11)
    tree = random_tree(generator, 80)
    queries, words = random_queries(generator, tree, 8), random_words(generator, tree, 8)
    own = words.signatures[0]
    for broken in (
        replace(own, starts=own.starts.astype(np.int32) - 1000),
        replace(own, starts=own.starts + 1000),
        replace(own, slots=np.full_like(own.slots, 255)),
    ):
        found = back_end("cpu").search(
            tree, queries, 2, 2, words=replace(words, signatures=(broken, *words.signatures[1:]))
        )
        assert np.isfinite(found.scores[found.chunks >= 0]).all()
