"""A memory with a decoder: what it is told, and how it ranks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fakes import FakeEncoder, documents

from treemem.config import SearchConfig, TreeConfig
from treemem.hierarchy.decoder import CANDIDATES, PARTS, Decoder, DecoderConfig
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.tokens import TokenHead, TokenHeadConfig
from treemem.hierarchy.weights import Hierarchy, HierarchyConfig
from treemem.types import Document

QUERIES = (
    "the harbour number 20 measures the coral item3",
    "railway counts counts glacier",
    "violin",
    "no such word anywhere zzz",
    "About harbour 20",
    "day 3. THE Harbour, remembers?",
)


def hierarchy(shaken: float) -> Hierarchy:
    torch.manual_seed(0)
    encoder = FakeEncoder().info
    made = Hierarchy(HierarchyConfig(encoder, gate_width=8, ranker_width=8, encoder_width=8))
    decoder = Decoder(DecoderConfig(encoder.dimension))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if not parameter.any():
                parameter.normal_(0, shaken) if shaken else None
    return made.with_decoder(decoder)


def memory(path: Path, shaken: float) -> Memory:
    config = TreeConfig(chunk_tokens=14, fanout=8)
    made = [*documents(50), Document("untitled", "A harbour without a title follows the violin.")]
    return Memory.build(made, path, encoder=FakeEncoder(), config=config, hierarchy=hierarchy(shaken))


def ranked(opened: Memory, query: str, mode: str = "hybrid", *, decoder: bool = True) -> list[tuple[int, float]]:
    found = opened.search(query, config=SearchConfig(mode=mode, k=1000, decoder=decoder))  # type: ignore[arg-type]
    return [(hit.chunk, hit.score) for hit in found.hits]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("mode", ["hybrid", "exact+bm25", "deep"])
def test_an_untrained_decoder_changes_nothing(tmp_path: Path, mode: str, query: str) -> None:
    opened = memory(tmp_path / "m", 0.0)
    assert opened.hierarchy is not None
    assert opened.hierarchy.decoder is not None
    with_decoder, without = ranked(opened, query, mode), ranked(opened, query, mode, decoder=False)
    np.testing.assert_allclose([score for _, score in with_decoder], [score for _, score in without], atol=1e-6)
    assert len({chunk for chunk, _ in with_decoder}) == len(with_decoder)


def test_a_trained_decoder_ranks_the_first_anew(tmp_path: Path) -> None:
    opened = memory(tmp_path / "m", 0.3)
    for query in QUERIES[:2]:
        after, before = ranked(opened, query), ranked(opened, query, decoder=False)
        assert after != before
        assert {chunk for chunk, _ in after[:CANDIDATES]} == {chunk for chunk, _ in before[:CANDIDATES]}
        assert after[CANDIDATES:] == before[CANDIDATES:]
        assert all(a >= b for (_, a), (_, b) in pairwise(after[:CANDIDATES]))
    assert ranked(opened, QUERIES[3])  # no word that the memory has: the cosines' order
    assert ranked(opened, "") == []
    assert ranked(opened, QUERIES[0], "bm25") == ranked(opened, QUERIES[0], "bm25", decoder=False)


@pytest.mark.parametrize("mode", ["walk", "exact"])
def test_the_decoder_brings_both_signals_to_the_candidates_of_vectors(tmp_path: Path, mode: str) -> None:
    opened = memory(tmp_path / "m", 0.0)
    cosines, sums = (dict(ranked(opened, QUERIES[0], own, decoder=False)) for own in (mode, "exact+bm25"))
    decoded = ranked(opened, QUERIES[0], mode)
    assert {chunk for chunk, _ in decoded} == set(cosines)
    for place, (chunk, score) in enumerate(decoded):  # an untrained decoder: the convex sum
        assert score == pytest.approx(sums[chunk] if place < CANDIDATES else cosines[chunk], abs=1e-5)
    assert [score for _, score in decoded[:10]] != sorted(cosines.values(), reverse=True)[:10]
    shaken = memory(tmp_path / "shaken", 0.3)
    after, before = ranked(shaken, QUERIES[0], mode), ranked(shaken, QUERIES[0], mode, decoder=False)
    assert [chunk for chunk, _ in after] != [chunk for chunk, _ in before]


def test_what_the_decoder_is_told(tmp_path: Path) -> None:
    opened = memory(tmp_path / "m", 0.0)
    searcher, image = opened.searcher, opened.image
    text = "number 20 harbour without"
    (query,) = searcher.embed([text])
    config = SearchConfig(decoder=False)
    found = searcher.rank(query, config)
    told = searcher.decoder_inputs(query, searcher.asked(query.vectors), found, config)
    assert told is not None
    count = min(CANDIDATES, len(found.chunks))
    assert told.has_candidate[0].sum() == count
    sums = (told.cosines + 0.4 * told.bm25)[0, :count].numpy()
    np.testing.assert_allclose(sums, found.scores[:count], atol=1e-5)
    words = image.lexical.analyze(text)
    assert told.has_term[0].sum() == len(words)
    parts = told.parts[0, :count, : len(words)]
    np.testing.assert_allclose(parts[:, :, 0].sum(1).numpy(), told.bm25[0, :count].numpy(), atol=1e-5)
    for place, chunk in enumerate(found.chunks[:count]):
        held = image.lexical.analyze(image.chunk_text(int(chunk)))
        title = image.lexical.analyze(image.reference(int(image.document_of(np.array([chunk]))[0])).title)
        for term, word in enumerate(words):
            assert (parts[place, term, PARTS.index("holds")] > 0) == (word in held)
            if title:
                assert (parts[place, term, PARTS.index("title")] > 0) == (word in title)
            following = words[term + 1] if term + 1 < len(words) else None
            follows = any(a == word and b == following for a, b in pairwise(held))
            if place < 32:
                assert (parts[place, term, PARTS.index("pair")] > 0) == follows
    states = searcher.encoder.token_states([text])[0].states  # type: ignore[union-attr]
    np.testing.assert_allclose(told.states[0, : len(words)].numpy(), states, atol=1e-6)


@pytest.mark.parametrize("query", [QUERIES[0], QUERIES[2], QUERIES[3]])
def test_an_untrained_head_of_level_0_changes_nothing(tmp_path: Path, query: str) -> None:
    config = TreeConfig(chunk_tokens=14, fanout=8)
    dimension = FakeEncoder().dimension
    made = {}
    for name, weights in {
        "without": None,
        "neutral": hierarchy(0.0).with_decoder(None).with_tokens(TokenHead(TokenHeadConfig(dimension, dimension))),
    }.items():
        made[name] = Memory.build(
            documents(30), tmp_path / name, encoder=FakeEncoder(), config=config, hierarchy=weights
        )
    assert made["neutral"].hierarchy is not None
    assert made["neutral"].hierarchy.tokens is not None
    without, neutral = (ranked(opened, query, "deep") for opened in made.values())
    assert [chunk for chunk, _ in without] == [chunk for chunk, _ in neutral]
    np.testing.assert_allclose([score for _, score in without], [score for _, score in neutral], atol=1e-3)
    # A weight that is asked for counts for both.
    light = SearchConfig(mode="deep", k=5, token_weight=0.5)
    scores = [[hit.score for hit in opened.search(query, config=light).hits] for opened in made.values()]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


def test_queries_are_encoded_once_for_both(minilm: Encoder) -> None:
    texts = ["How do I merge sorted files?", "bees", "", "naïve café 日本 3.14"]
    vectors, states = minilm.encode_queries(texts)
    np.testing.assert_allclose(vectors, minilm.encode(texts, precise=True), atol=1e-6)
    for own, expected in zip(states, minilm.token_states(texts, precise=True), strict=True):
        assert own.spans == expected.spans
        np.testing.assert_allclose(own.states, expected.states, atol=1e-5)
    fast, _ = minilm.encode_queries(texts[:2], fast=True)
    assert ((fast * vectors[:2]).sum(1) > 0.999).all()
