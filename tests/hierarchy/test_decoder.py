from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from treemem.errors import InputError
from treemem.hierarchy.decoder import (
    CANDIDATES,
    PARTS,
    READ,
    TERMS,
    Decoder,
    DecoderConfig,
    DecoderInputs,
    decoder_inputs,
    proximity,
    stack,
    term_states,
)
from treemem.training.decode import DecoderSet, DecoderTraining, decoder_loss, ranked_by_decoder, train_decoder
from treemem.training.fit import hit_rates

D = 16


def unit(rng, *shape):
    vectors = rng.standard_normal((*shape, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def arrays(rng, candidates=20, terms=5):
    weights = rng.uniform(1, 16, terms)
    parts, near = (
        (weights * rng.random((candidates, terms)) * (rng.random((candidates, terms)) < 0.5)).astype(np.float32)
        for _ in range(2)
    )
    query, vectors = unit(rng), unit(rng, candidates)
    return {
        "query": query,
        "states": unit(rng, terms),
        "places": np.arange(terms),
        "counts": np.ones(terms, int),
        "idf": rng.uniform(0.5, 8, terms),
        "weights": weights,
        "best_bm25": float(parts.sum(1).max(initial=0)),
        "vectors": vectors,
        "cosines": vectors @ query,
        "bm25": parts.sum(1),
        "parts": parts,
        "near": near,
        "in_title": rng.random((candidates, terms)) < 0.3,
        "titled": np.ones(candidates, bool),
        "words": [rng.integers(-1, max(terms, 1), 30) if terms else np.full(30, -1) for _ in range(candidates)],
        "paths": rng.random((candidates, 2)).astype(np.float32),
    }


def batch(rng, count=4, **sizes):
    return stack([decoder_inputs(**arrays(rng, **sizes)) for _ in range(count)])


def shaken(config, seed=0, by=0.3):
    """A decoder whose last layers are not zero."""
    torch.manual_seed(seed)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if not parameter.any():
                parameter.normal_(0, by)
    return decoder


@pytest.fixture
def rng():
    return np.random.default_rng(0)


both = pytest.mark.parametrize("layers", [0, 1])


@both
@pytest.mark.parametrize("sizes", [{}, {"candidates": 1}, {"terms": 0}, {"candidates": CANDIDATES, "terms": TERMS}])
def test_an_untrained_decoder_gives_exactly_the_convex_sum(rng, layers, sizes):
    inputs = batch(rng, **sizes)
    decoder = Decoder(DecoderConfig(D, layers=layers))
    assert torch.equal(decoder.eval()(inputs), torch.zeros_like(inputs.cosines))
    sums = (inputs.cosines + 0.3 * inputs.bm25).masked_fill(~inputs.has_candidate, -torch.inf)
    np.testing.assert_array_equal(decoder.scores(inputs, 0.3), sums.numpy())


@both
def test_gradients_reach_every_parameter(rng, layers):
    decoder = shaken(DecoderConfig(D, layers=layers, dropout=0.0)).train()
    inputs = batch(rng)
    right = torch.zeros_like(inputs.has_candidate)
    right[:, 3] = True
    decoder_loss(decoder, inputs, right, 0.4).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@both
def test_permuting_candidates_permutes_the_output(rng, layers):
    decoder = shaken(DecoderConfig(D, layers=layers)).eval()
    inputs = batch(rng, candidates=CANDIDATES)
    order = torch.from_numpy(rng.permutation(CANDIDATES))
    names = {"vectors", "cosines", "bm25", "parts", "features", "has_candidate"}
    moved = replace(inputs, **{name: getattr(inputs, name)[:, order] for name in names})
    torch.testing.assert_close(decoder(moved), decoder(inputs)[:, order], rtol=1e-4, atol=1e-5)


@both
def test_what_is_masked_makes_no_difference(rng, layers):
    decoder = shaken(DecoderConfig(D, layers=layers)).eval()
    inputs = batch(rng, candidates=20, terms=5)
    full = {"query", "has_term", "has_candidate"}
    noisy = {f.name: getattr(inputs, f.name).clone() for f in fields(DecoderInputs)}
    for name in {f.name for f in fields(DecoderInputs)} - full:
        own = noisy[name]
        rows = 5 if name in {"states", "terms"} else 20
        own[:, rows:] = torch.rand_like(own[:, rows:])
    noisy["parts"][:, :, 5:] = torch.rand_like(noisy["parts"][:, :, 5:])
    torch.testing.assert_close(decoder(DecoderInputs(**noisy))[:, :20], decoder(inputs)[:, :20], rtol=1e-4, atol=1e-5)


def test_strength_scales_what_is_added(rng):
    inputs = batch(rng)
    whole = shaken(DecoderConfig(D)).eval()
    half = Decoder(DecoderConfig(D, strength=0.5)).eval()
    half.load_state_dict(whole.state_dict())
    torch.testing.assert_close(half(inputs), 0.5 * whole(inputs))


def test_lexical_scores_keep_their_best(rng):
    inputs = batch(rng)
    decoder = shaken(DecoderConfig(D, layers=0, repool=False), by=0.05).eval()
    lexical = inputs.bm25 + decoder(inputs) / 0.4
    torch.testing.assert_close(lexical.amax(1), inputs.bm25.amax(1), rtol=1e-4, atol=1e-5)


def test_inputs_of_one_query(rng):
    given = arrays(rng, candidates=3, terms=2)
    given["titled"][2] = False
    given["in_title"] = np.array([[True, False], [True, True], [False, False]])
    given["words"] = [np.array([-1, 0, 1, -1]), np.array([1, -1, 0]), np.full(4, -1)]
    made = decoder_inputs(**given)
    share = given["weights"] / given["best_bm25"]
    parts = dict(zip(PARTS, made.parts[0, :3, :2].permute(2, 0, 1).numpy(), strict=True))
    np.testing.assert_allclose(parts["bm25"], given["parts"] / given["best_bm25"], rtol=1e-5)
    np.testing.assert_allclose(parts["title"], [0.5 * share * [1, 0], 0.5 * share, 0.5 * share * [1, 0.5]], rtol=1e-5)
    np.testing.assert_allclose(parts["pair"][:, 0], [0.25 * share.sum(), 0, 0], rtol=1e-5)
    np.testing.assert_allclose(parts["window"][:, 0], [0.25 * share.sum(), 0.25 * share.sum(), 0], rtol=1e-5)
    assert made.has_candidate.sum() == 3
    assert made.has_term.sum() == 2


def test_only_the_first_candidates_are_read(rng):
    given = arrays(rng, candidates=READ + 8)
    given["words"] = [np.array([0, 1, 2])] * (READ + 8)
    pairs = decoder_inputs(**given).parts[0, :, 0, PARTS.index("pair")]
    assert (pairs[:READ] > 0).all()
    assert not pairs[READ:].any()
    given["words"] = given["words"][:READ]
    assert torch.equal(decoder_inputs(**given).parts[0, :, 0, PARTS.index("pair")], pairs)


def test_inputs_of_a_query_that_no_chunk_shares_a_word_with(rng):
    given = arrays(rng, terms=3)
    given.update(best_bm25=0.0, bm25=np.zeros(20), parts=np.zeros((20, 3)), near=np.zeros((20, 3)))
    given["words"] = [np.full(5, -1)] * 20
    scores = shaken(DecoderConfig(D, layers=1)).scores(decoder_inputs(**given))
    assert np.isfinite(scores[0, :20]).all()
    assert len(decoder_inputs(**arrays(rng, candidates=0))) == 1


def test_proximity():
    follows, near = proximity(np.array([0, 1, -1, 1, 0, -1, 2]), 3)
    assert follows.tolist() == [1, 0, 0]
    assert near.tolist() == [3, 1, 0]  # 0 1; 1 after 0; 0 after 1; 2 after 1
    assert proximity(np.array([0, *[-1] * 8, 1]), 2)[1].tolist() == [0, 0]
    assert proximity(np.array([0, *[-1] * 7, 1]), 2)[1].tolist() == [1, 0]
    assert proximity(np.empty(0, int), 0)[0].shape == (0,)


def test_term_states():
    states = np.arange(8, dtype=np.float32).reshape(4, 2)
    found = term_states([(0, 5), (6, 9), (10, 12)], states, [(0, 3), (3, 5), (6, 9), (9, 10)])
    np.testing.assert_array_equal(found, [[1, 2], [4, 5], [0, 0]])
    np.testing.assert_array_equal(term_states([(0, 5)], states[:0], []), [[0, 0]])


def synthetic(rng, count):
    """Right is the candidate that holds the one term whose state points along the first axis; BM25 misleads."""
    made, right = [], []
    for _ in range(count):
        given = arrays(rng, candidates=16, terms=4)
        key = int(rng.integers(4))
        given["states"][:, 0] = -0.5
        given["states"][key, 0] = 1.0
        answer = int(rng.integers(16))
        parts = (rng.random((16, 4)) < 0.5) * 0.3
        parts[:, key] = 0
        parts[answer] = 0
        parts[answer, key] = 0.3
        given.update(parts=parts.astype(np.float32), bm25=parts.sum(1), best_bm25=float(parts.sum(1).max()))
        given["near"] = np.zeros((16, 4), np.float32)
        given["in_title"] = np.zeros((16, 4), bool)
        given["words"] = [np.full(4, -1)] * 16
        made.append(decoder_inputs(**given))
        right.append(np.arange(16) == answer)
    return DecoderSet.of("synthetic", made, right)


@both
def test_a_known_answer_is_learned(rng, layers):
    seen, unseen = synthetic(rng, 256), synthetic(rng, 128)
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(D, layers=layers, dropout=0.1))
    before = hit_rates(ranked_by_decoder(None, unseen), (1, 10))
    assert hit_rates(ranked_by_decoder(decoder, unseen), (1, 10)) == before
    losses = train_decoder(decoder, [seen], DecoderTraining(steps=80, batch=32, rate=2e-2, weight_decay=0.01))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert hit_rates(ranked_by_decoder(decoder, unseen), (1,))[0] > before[0] + 0.4


def test_training_is_deterministic_for_a_seed(rng):
    seen = synthetic(rng, 64)

    def trained(seed):
        decoder = shaken(DecoderConfig(D, layers=1))
        torch.rand(seed + 1)  # what was drawn before makes no difference
        return train_decoder(decoder, [seen], DecoderTraining(steps=5, batch=16, seed=seed))

    assert trained(1) == trained(1)
    assert trained(1) != trained(2)


def test_training_needs_questions_with_right_and_wrong_candidates(rng):
    questions = synthetic(rng, 4)
    with pytest.raises(InputError, match="nothing to train"):
        train_decoder(Decoder(DecoderConfig(D)), [replace(questions, right=torch.zeros_like(questions.right))])
    with pytest.raises(InputError, match="no questions"):
        DecoderSet.of("empty", [], [])
