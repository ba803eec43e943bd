"""Level 0's head: neutral before training, learned on a known answer, the same over arrays and from int8."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fakes import FakeEncoder, documents

from treemem.config import TreeConfig
from treemem.errors import InputError
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.tokens import (
    TOKEN_FEATURES,
    UNKNOWN_IDF,
    ProjectedTokens,
    TokenHead,
    TokenHeadConfig,
    TokenScorer,
    token_features,
    token_idf,
)
from treemem.training import Question
from treemem.training.corpus import Corpus
from treemem.training.fit import hit_rates, reciprocal_rank
from treemem.training.questions import resolve
from treemem.training.tokens import (
    TokenSet,
    TokenTraining,
    ranked_by_tokens,
    token_basis,
    token_loss,
    token_scores,
    token_set,
    train_tokens,
)

D = 16


def unit(rng, *shape):
    vectors = rng.standard_normal((*shape, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def shaken(config, seed=0, by=0.3):
    """A head whose every weight is somewhere."""
    torch.manual_seed(seed)
    head = TokenHead(config)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if not name.startswith("log"):
                parameter += by * torch.randn_like(parameter)
    return head.eval()


def made(rng, count=8, candidates=6, answers=True):
    """A query has five tokens, and only that which points along the first axis tells the right chunk: it holds it.

    Three wrong chunks hold the four others.
    """
    chunks, queries, features, right = [], [], [], np.zeros((count, candidates), bool)
    for i in range(count):
        words = unit(rng, 5)
        words[:, 0] = -0.1
        key = int(rng.integers(5))
        words[key, 0] = 1.0
        words /= np.linalg.norm(words, axis=1, keepdims=True)
        answer = int(rng.integers(candidates))
        right[i, answer] = True
        for k in range(candidates):
            own = unit(rng, int(rng.integers(6, 12)))
            if answers and k == answer:
                own[2] = words[key]
            elif answers and (k - answer) % candidates < 4:
                own[:4] = np.delete(words, key, 0)
            chunks.append(own)
        queries.append(words)
        features.append(token_features(rng.uniform(1, 9, 5)))
    return TokenSet(
        "made",
        torch.from_numpy(np.concatenate(chunks)).half(),
        torch.tensor([0, *np.cumsum([len(own) for own in chunks]).tolist()]),
        torch.from_numpy(np.concatenate(queries)),
        torch.from_numpy(np.concatenate(features)),
        torch.arange(0, 5 * count + 1, 5),
        torch.arange(count * candidates).reshape(count, candidates),
        torch.from_numpy(rng.random((count, candidates), np.float32)) * 0.1,
        torch.from_numpy(right),
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_an_untrained_head_as_wide_as_the_states_is_the_untrained_late_interaction(rng):
    questions = made(rng)
    batch = questions.batch(torch.arange(8))
    scores = token_scores(TokenHead(TokenHeadConfig(D, D)).eval(), batch)
    for i in range(8):
        words = questions.query_states[5 * i : 5 * i + 5]
        for k in range(6):
            begin, end = questions.chunk_offsets[6 * i + k], questions.chunk_offsets[6 * i + k + 1]
            cosines = words @ torch.nn.functional.normalize(questions.chunk_states[begin:end].float(), dim=1).T
            wanted = questions.sums[i, k] + 2 * cosines.amax(1).mean()
            torch.testing.assert_close(scores[i, k], wanted, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter(rng):
    head = shaken(TokenHeadConfig(D, 8, dropout=0.0)).train()
    token_loss(head, made(rng).batch(torch.arange(8))).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_what_is_masked_makes_no_difference(rng):
    head = shaken(TokenHeadConfig(D, 8))
    batch = made(rng).batch(torch.arange(8))
    assert not batch.has_token.all()
    tokens = torch.where(batch.has_token[..., None], batch.tokens, 7 * torch.rand_like(batch.tokens))
    more = torch.nn.functional.pad
    noisy = replace(
        batch,
        tokens=tokens,
        states=more(batch.states, (0, 0, 0, 2), value=3.0),
        features=more(batch.features, (0, 0, 0, 2), value=3.0),
        present=more(batch.present, (0, 2)),
    )
    torch.testing.assert_close(token_scores(head, noisy), token_scores(head, batch))


def test_a_chunk_without_tokens_gains_nothing(rng):
    head = shaken(TokenHeadConfig(D, 8))
    batch = made(rng).batch(torch.arange(8))
    batch.has_token[:, 2] = False
    torch.testing.assert_close(token_scores(head, batch)[:, 2], batch.sums[:, 2])


def test_a_head_over_arrays_scores_the_same(rng):
    head = shaken(TokenHeadConfig(D, 8))
    scorer = TokenScorer(head)
    states, idf = unit(rng, 7), rng.uniform(0, 9, 7)
    chunks = [unit(rng, n) for n in (3, 12, 1)]
    query = scorer.weigh(states, idf)
    assert query.weights.sum() == pytest.approx(2, rel=1e-5)
    given = scorer.score(query, [*(scorer.project(own) for own in chunks), np.empty((0, 8), np.float32)])
    padded = np.zeros((1, 4, 12, D), np.float32)
    for i, own in enumerate(chunks):
        padded[0, i, : len(own)] = own
    has = torch.arange(12) < torch.tensor([3, 12, 1, 0])[:, None]
    with torch.no_grad():
        wanted = head(
            torch.from_numpy(states)[None],
            torch.from_numpy(token_features(idf))[None],
            torch.ones(1, 7, dtype=torch.bool),
            torch.from_numpy(padded),
            has[None],
        )
    np.testing.assert_allclose(given, wanted[0].numpy(), rtol=1e-4, atol=1e-5)
    nothing = scorer.weigh(states[:0], idf[:0])
    assert not scorer.score(nothing, [scorer.project(own) for own in chunks]).any()


def test_a_scorer_keeps_its_weights_while_the_head_is_trained_on(rng):
    head = shaken(TokenHeadConfig(D, 8))
    scorer = TokenScorer(head)
    states = unit(rng, 4)
    before = scorer.project(states), scorer.weigh(states, np.ones(4)).weights
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 1
    np.testing.assert_array_equal(scorer.project(states), before[0])
    np.testing.assert_array_equal(scorer.weigh(states, np.ones(4)).weights, before[1])


def test_int8_tokens_are_close_to_float(rng):
    scorer = TokenScorer(shaken(TokenHeadConfig(D, 8)))
    projected = scorer.project(unit(rng, 200))
    stored = ProjectedTokens.of(projected)
    assert stored.rows.dtype == np.int8
    assert np.abs(stored.vectors() - projected).max() <= 0.5 / 127 + 1e-6
    query = scorer.weigh(unit(rng, 6), np.ones(6))
    np.testing.assert_allclose(scorer.score(query, [stored]), scorer.score(query, [projected]), atol=0.02)
    assert np.isfinite(ProjectedTokens.of(np.zeros((2, 8), np.float32)).vectors()).all()
    assert ProjectedTokens.of(projected[:0]).vectors().shape == (0, 8)


def test_a_head_in_a_basis_unfolds(rng):
    basis = np.ascontiguousarray(np.linalg.qr(rng.standard_normal((D, D)))[0][:10], np.float32)
    head = shaken(TokenHeadConfig(10, 4))
    whole = head.unfolded(basis)
    assert whole.config == TokenHeadConfig(D, 4)
    states = torch.from_numpy(unit(rng, 2, 5))
    features, present = torch.rand(2, 5, TOKEN_FEATURES), torch.ones(2, 5, dtype=torch.bool)
    inside = states @ torch.from_numpy(basis).T
    torch.testing.assert_close(whole.project(states), head.project(inside))
    torch.testing.assert_close(whole.weights(states, features, present), head.weights(inside, features, present))


def test_strength(rng):
    batch = made(rng).batch(torch.arange(8))
    head = shaken(TokenHeadConfig(D, 8))
    with torch.no_grad():
        head.log_mu += 0.5
        start = token_scores(TokenHead(head.config).eval(), batch)
        torch.testing.assert_close(token_scores(head.strengthened(0), batch), start)
        torch.testing.assert_close(token_scores(head.strengthened(1), batch), token_scores(head, batch))
        half = head.strengthened(0.5)
    assert half.log_mu.exp().item() == pytest.approx(2 * np.exp(0.25))


def test_a_known_answer_is_learned(rng):
    seen, unseen = made(rng, 200), made(rng, 100)
    head = TokenHead(TokenHeadConfig(D, 12, dropout=0.1))
    before = hit_rates(ranked_by_tokens(head.eval(), unseen), (1,))[0]
    losses = train_tokens(head, [seen], TokenTraining(steps=80, rate=1e-2))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert before < 0.5
    assert hit_rates(ranked_by_tokens(head, unseen), (1,))[0] > 0.9
    assert reciprocal_rank(ranked_by_tokens(head, unseen)) > 0.9
    assert hit_rates(ranked_by_tokens(None, unseen), (1,))[0] < 0.5


def test_training_is_deterministic_for_a_seed(rng):
    seen = made(rng, 40)

    def trained(seed):
        head = shaken(TokenHeadConfig(D, 8))
        torch.rand(seed + 1)  # what was drawn before makes no difference
        return train_tokens(head, [seen], TokenTraining(steps=5, seed=seed))

    assert trained(1) == trained(1)
    assert trained(1) != trained(2)


def test_training_needs_questions_with_right_and_wrong_candidates(rng):
    questions = made(rng, 4)
    with pytest.raises(InputError, match="nothing to train"):
        train_tokens(TokenHead(TokenHeadConfig(D)), [replace(questions, right=torch.zeros_like(questions.right))])


# ---- from a memory


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "m"
    Memory.build(documents(12), path, encoder=FakeEncoder(), config=TreeConfig(chunk_tokens=14, fanout=6, seed=1))
    return path


@pytest.fixture
def corpus(built: Path, tmp_path: Path) -> Corpus:
    shutil.copytree(built, tmp_path / "m")
    memory = Memory.open(tmp_path / "m", encoder=FakeEncoder())
    asked = []
    for chunk in range(memory.image.chunks):
        document = memory.image.reference(int(memory.image.document_of(np.array([chunk]))[0])).id
        asked.append(Question(memory.image.chunk_text(chunk), {document: (memory.image.span(chunk),)}))
    pool = resolve(memory.searcher, asked)
    return Corpus("small", memory, pool, pool.take(np.arange(1)), tmp_path)


def test_idf_of_tokens(corpus):
    lexical = corpus.memory.image.lexical
    word = lexical.analyze(corpus.memory.image.chunk_text(0))[0]
    text = f"{word}, zzyzx"
    spans = [(0, 1), (1, len(word)), (len(word), len(word) + 1), (len(word) + 2, len(text))]
    found = token_idf(lexical, text, spans)
    known = lexical.idf(lexical.numbers([word]))[0]
    np.testing.assert_allclose(found, [known, known, 0, UNKNOWN_IDF], rtol=1e-5)
    assert token_idf(lexical, "", []).shape == (0,)
    assert token_features(found).shape == (4, TOKEN_FEATURES)
    assert token_features(found[:0]).shape == (0, TOKEN_FEATURES)
    assert np.isfinite(token_features(np.zeros(1))).all()


@pytest.mark.parametrize("titles", [True, False])
def test_a_set_of_a_memory_is_what_a_search_compares(corpus, titles):
    searcher = corpus.memory.searcher
    basis = token_basis([corpus], rank=10_000)
    assert basis.shape == (searcher.encoder.dimension,) * 2
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-4)
    rows = np.arange(0, len(corpus.train), 5)
    questions = token_set(corpus, searcher, corpus.train, rows, basis, titles=titles)
    assert len(questions) == len(rows)
    scores = token_scores(TokenHead(TokenHeadConfig(len(basis), len(basis))).eval(), questions.batch(torch.arange(2)))
    if not titles:
        return
    for row, found in zip(rows[:2], scores, strict=True):
        ends = questions.right[int(np.flatnonzero(rows == row)[0])]
        assert ends.any()
        hits = corpus.memory.search(corpus.train.texts[row], mode="deep", k=16).hits
        best = sorted((hit.score for hit in hits), reverse=True)
        given = sorted(found[torch.isfinite(found)].tolist(), reverse=True)
        np.testing.assert_allclose(given[: len(best)], best[: len(given)], atol=0.02)
