from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from treemem.evaluation import metrics as m


def right(documents: list[int], spans: list[tuple[int, int]], relevant: set[int], evidence: object) -> list[bool]:
    own = m.right_chunks(np.array(documents, int), np.array(spans, int).reshape(-1, 2), relevant, evidence)  # type: ignore[arg-type]
    return own.tolist()


def test_a_chunk_is_right_where_it_overlaps_evidence() -> None:
    spans = [(0, 10), (10, 20), (20, 30), (10, 20), (0, 40)]
    documents = [1, 1, 1, 2, 1]
    # Half-open: (10, 20) neither begins before 10 nor reaches 20.
    assert right(documents, spans, {1, 2}, {1: [(10, 20)]}) == [False, True, False, False, True]
    assert right(documents, spans, {1, 2}, {1: [(9, 10), (29, 30)]}) == [True, False, True, False, True]
    assert right(documents, spans, {2}, None) == [False, False, False, True, False]
    # Evidence in documents that are not there does not fall back to whole documents.
    assert right(documents, spans, {1, 2}, {}) == [False] * 5
    assert right([], [], {1}, None) == []
    assert right([], [], {1}, {1: [(0, 1)]}) == []


def test_hit_at_k() -> None:
    found = np.array([False, False, True])
    assert [m.hit_at_k(found, k) for k in (1, 2, 3, 10)] == [0, 0, 1, 1]
    assert m.hit_at_k(np.zeros(0, bool), 10) == 0


def test_a_documents_rank_is_that_of_its_best_chunk() -> None:
    assert m.document_ranking(np.array([7, 3, 7, 9, 3, 1])).tolist() == [7, 3, 9, 1]
    assert m.document_ranking(np.array([], int)).tolist() == []


def test_recall_counts_what_the_memory_does_not_hold() -> None:
    ranking = np.array([7, 3, 9, 1])
    assert m.recall_at_k(ranking, {3, 1}, 2, 2) == 0.5
    assert m.recall_at_k(ranking, {3, 1}, 2, 4) == 1
    assert m.recall_at_k(ranking, {3, 1}, 4, 4) == 0.5


def test_ndcg_by_hand() -> None:
    ranking = np.array([5, 6, 7, 8])
    # DCG = 1/log2(2) + 3/log2(4) = 2.5; ideal = 3 + 2/log2(3) + 1/2
    expected = 2.5 / (3 + 2 / math.log2(3) + 0.5)
    assert m.ndcg_at_k(ranking, {5: 1, 7: 3, 99: 2}, [1, 3, 2], 10) == pytest.approx(expected)
    assert m.ndcg_at_k(ranking, {5: 1}, [1], 10) == 1
    assert m.ndcg_at_k(ranking, {8: 1}, [1], 3) == 0
    assert m.ndcg_at_k(np.array([], int), {8: 1}, [1], 10) == 0


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_ndcg_agrees_with_scikit_learn(documents: int, k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    grades = random.integers(0, 5, documents + 1)
    grades[0] = 3  # one is relevant, and there are two: scikit-learn refuses a single one
    ranking = random.permutation(documents + 1)
    scores = np.empty(documents + 1)
    scores[ranking] = np.arange(documents + 1, 0, -1)
    relevant = {i: int(grade) for i, grade in enumerate(grades) if grade}
    own = m.ndcg_at_k(ranking, relevant, relevant.values(), k)
    assert own == pytest.approx(ndcg_score([grades], [scores], k=k))


def test_squad_normalisation() -> None:
    assert m.normalise("  The  Cat, an animal; a 'Theory' of (the) A-team.") == "cat animal theory of ateam"
    assert m.normalise("The.") == ""


def test_exact_match() -> None:
    assert m.exact_match("The Nile.", ["Amazon", "nile"]) == 1
    assert m.exact_match("the river Nile", ["nile"]) == 0
    assert m.exact_match("x", []) == 0


def test_token_f1_by_hand() -> None:
    # 2 common of 3 and of 4 tokens: 2 * 2/3 * 2/4 / (2/3 + 2/4) = 4/7
    assert m.token_f1("the big brown cat", ["brown cat of mine"]) == pytest.approx(4 / 7)
    assert m.token_f1("cat cat cat", ["cat dog"]) == pytest.approx(2 / 5)  # a token counts as often as both have it
    assert m.token_f1("cat", ["dog", "the cat"]) == 1
    assert m.token_f1("", ["the"]) == 1
    assert m.token_f1("", ["cat"]) == 0
    assert m.token_f1("dog", ["cat"]) == 0


def test_contained_takes_whole_words() -> None:
    assert m.contained("It is the Rio Grande, I think.", ["Rio Grande"]) == 1
    assert m.contained("It is not known.", ["no"]) == 0
    assert m.contained("Rio and Grande", ["Rio Grande"]) == 0
    assert m.contained("anything", ["the", "?"]) == 0


TEXTS = st.text(alphabet="ab the.,-", max_size=30)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_figures_of_replies_are_ordered(reply: str, golds: list[str]) -> None:
    f1 = m.token_f1(reply, golds)
    assert 0 <= f1 <= 1
    if m.exact_match(reply, golds):
        assert f1 == 1
        assert m.contained(reply, golds) == 1 or not m.normalise(reply)
    if m.contained(reply, golds):
        assert f1 > 0


def test_percentile() -> None:
    assert m.percentile([1, 2, 3, 4, 5], 50) == 3
    assert m.percentile([0, 10], 95) == pytest.approx(9.5)
    assert m.percentile([], 50) == 0
