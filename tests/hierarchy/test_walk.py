"""Searching: every mode against plain formulas over the stored vectors, paths, restrictions, odd queries, threads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import FakeEncoder
from tests.small import AWKWARD, CONFIG, QUESTIONS, documents

from treemem.config import MAX_QUERY_EMBEDDINGS, MODES, Mode, SearchConfig, TreeConfig
from treemem.errors import InputError
from treemem.hierarchy import walk as walking
from treemem.hierarchy.embed import Encoder, TokenStates
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.walk import CACHED_CHUNKS, TITLE_TOKENS, Searcher, subtree
from treemem.storage.image import Image
from treemem.storage.levels import contextual
from treemem.types import Document, SearchResult

STEP = 0.006
"""How far int8 rows and queries of 14 bits may put a cosine of 384 components off."""


def config(mode: Mode, **settings: int | float) -> SearchConfig:
    return SearchConfig(mode=mode, **settings)  # type: ignore[arg-type]


def chunks_of(result: SearchResult) -> list[int]:
    return [hit.chunk for hit in result.hits]


def number(image: Image, chunk: int) -> int:
    return int(image.document_of(np.array([chunk]))[0])


def cosines(memory: Memory, query: str) -> np.ndarray:
    """The query with every contextual chunk vector, by the design's formula from what the encoder gives."""
    encodings = memory.store.read("chunks/encodings").astype(np.float32)
    encodings /= np.linalg.norm(encodings, axis=1, keepdims=True)
    alpha = memory.info().config.alpha
    out = np.empty_like(encodings)
    begin = 0
    for end in memory.store.read("documents/chunk_ends"):
        own = encodings[begin:end]
        whole = own.sum(0)
        out[begin:end] = own + alpha * whole / np.linalg.norm(whole)
        begin = int(end)
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    embedded = memory.searcher.embed([query])[0]
    return (out @ embedded.vectors.T).max(1)


def for_nodes(memory: Memory, query: str) -> np.ndarray:
    """The query as nodes meet it: times the chunks' covariance to the power of -0.35, shrunk as the docstring says."""
    alpha, chunk_ends = memory.info().config.alpha, memory.store.read("documents/chunk_ends")
    vectors = contextual(memory.store.read("chunks/encodings"), chunk_ends, alpha).astype(np.float64)
    n, d = vectors.shape
    values, directions = np.linalg.eigh(np.cov(vectors.T, bias=True))
    values = n / (n + d) * np.maximum(values, 0) / values.mean() + d / (n + d)
    out = directions @ (values**-0.35 * (directions.T @ memory.searcher.embed([query])[0].vectors[0]))
    return np.asarray(out / np.linalg.norm(out))


def bm25(memory: Memory, query: str) -> np.ndarray:
    """BM25 of every chunk as tantivy counts it, from the chunks' texts: k1 = 1.2, b = 0.75."""
    lexical = memory.image.lexical
    texts = [lexical.analyze(memory.image.chunk_text(c)) for c in range(memory.image.chunks)]
    lengths = np.array([len(text) for text in texts], float)
    stored = np.where(lengths <= 40, lengths, np.nan)
    assert not np.isnan(stored).any(), "longer chunks have rounded lengths, which this formula leaves out"
    scores = np.zeros(len(texts))
    for term in lexical.analyze(query):
        counts = np.array([text.count(term) for text in texts], float)
        found = (counts > 0).sum()
        idf = np.log(1 + (len(texts) - found + 0.5) / (found + 0.5))
        scores += idf * 2.2 * counts / (counts + 1.2 * (0.25 + 0.75 * lengths / lengths.mean()))
    return scores


@pytest.fixture(scope="module")
def searcher(small_memory: Memory) -> Searcher:
    return small_memory.searcher


@pytest.fixture(scope="module")
def flat(minilm: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """A memory of a few chunks: a tree without nodes."""
    return Memory.build(documents()[:12], tmp_path_factory.mktemp("flat") / "m", encoder=minilm)


@pytest.fixture(scope="module")
def single(minilm: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """A memory of one document, which is one chunk."""
    return Memory.build([Document("only", "The only words.")], tmp_path_factory.mktemp("single") / "m", encoder=minilm)


@pytest.fixture(scope="module")
def empty(minilm: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """A memory of nothing."""
    return Memory.build([], tmp_path_factory.mktemp("empty") / "m", encoder=minilm)


def test_the_small_memory_has_several_levels(small_memory: Memory) -> None:
    levels = small_memory.info().levels
    assert len(levels) == 4
    assert levels[0] <= 2 * CONFIG.fanout
    assert levels[-1] > 100


# ---- the modes against their formulas


@pytest.mark.parametrize("query", QUESTIONS)
def test_exact_is_the_order_of_the_cosines(small_memory: Memory, query: str) -> None:
    expected = cosines(small_memory, query)
    result = small_memory.search(query, config=config("exact", k=20, decoder=False))
    assert result.scored == small_memory.image.chunks
    for rank, hit in enumerate(result.hits):
        assert hit.score == pytest.approx(expected[hit.chunk], abs=STEP)
        assert hit.score >= np.sort(expected)[::-1][rank] - STEP  # nothing much better was passed over


@pytest.mark.parametrize("query", QUESTIONS)
def test_a_walk_scores_as_exact_search_does(small_memory: Memory, query: str) -> None:
    exact = small_memory.search(query, config=config("exact", k=1000, decoder=False))
    scores = {hit.chunk: hit.score for hit in exact.hits}
    walked = small_memory.search(query, config=config("walk", beam=8, decoder=False))
    assert all(hit.score == scores[hit.chunk] for hit in walked.hits)
    assert walked.scored < sum(small_memory.info().levels)
    everything = small_memory.search(query, config=config("walk", k=1000, beam=4096, decoder=False))
    assert everything.hits[0].chunk == exact.hits[0].chunk
    assert [(hit.chunk, hit.score) for hit in everything.hits] == [(hit.chunk, hit.score) for hit in exact.hits]


def test_walks_agree_with_exact_search(small_memory: Memory) -> None:
    shared = 0
    for query in QUESTIONS:
        exact, walked = (small_memory.search(query, 5, mode=mode, beam=8) for mode in ("exact", "walk"))
        shared += len(set(chunks_of(exact)) & set(chunks_of(walked)))
    assert shared >= 0.9 * 5 * len(QUESTIONS)


@pytest.mark.parametrize("query", QUESTIONS)
def test_bm25_is_its_formula(small_memory: Memory, query: str) -> None:
    expected = bm25(small_memory, query)
    result = small_memory.search(query, 1000, mode="bm25")
    assert sorted(chunks_of(result)) == np.flatnonzero(expected).tolist()
    assert result.scored == 0
    for hit in result.hits:
        assert hit.score == pytest.approx(expected[hit.chunk], rel=1e-4)


@pytest.mark.parametrize("query", QUESTIONS)
def test_the_oracle_is_the_convex_sum_over_every_chunk(small_memory: Memory, query: str) -> None:
    words = bm25(small_memory, query)
    expected = cosines(small_memory, query) + 0.4 * words / words.max()
    result = small_memory.search(query, config=config("exact+bm25", k=1000, decoder=False))
    assert sorted(chunks_of(result)) == list(range(small_memory.image.chunks))
    assert result.scored == small_memory.image.chunks
    for hit in result.hits:
        assert hit.score == pytest.approx(expected[hit.chunk], abs=STEP)


@pytest.mark.parametrize("query", QUESTIONS)
def test_hybrid_by_the_index_is_the_walk_and_the_best_of_bm25(small_memory: Memory, query: str) -> None:
    embedded = small_memory.searcher.embed([query])[0]
    few = config("hybrid", k=5, beam=4, lexical="index", bm25_candidates=7, bm25_weight=0.3, decoder=False)
    ranked = small_memory.searcher.rank(embedded, few)
    walked = small_memory.searcher.rank(embedded, config("walk", k=1000, beam=4))
    best = chunks_of(small_memory.search(query, config=config("bm25", k=7)))
    assert set(ranked.chunks.tolist()) == set(walked.chunks.tolist()) | set(best)
    assert ranked.scored == walked.scored + len(set(best) - set(walked.chunks.tolist()))
    words = bm25(small_memory, query)
    expected = cosines(small_memory, query) + 0.3 * words / words.max()
    np.testing.assert_allclose(ranked.scores, expected[ranked.chunks], atol=STEP)


@pytest.mark.parametrize("mode", ["bm25", "hybrid"])
def test_bm25_gives_as_many_as_are_asked_for(small_memory: Memory, mode: Mode) -> None:
    query = "the a of in bees and lamps"
    holding = int((bm25(small_memory, query) > 0).sum())
    assert holding > 40
    few = config(mode, k=1000, beam=1, beside=0, lexical="index", bm25_candidates=2)
    result = small_memory.search(query, config=few)
    assert len(result.hits) >= holding


def test_hybrid_equals_its_oracle_where_all_are_candidates(small_memory: Memory) -> None:
    for query in QUESTIONS:
        modes: tuple[Mode, Mode] = ("hybrid", "exact+bm25")
        both = (small_memory.search(query, config=config(mode, beam=4096, decoder=False)) for mode in modes)
        hybrid, oracle = ([(hit.chunk, hit.score) for hit in result.hits] for result in both)
        assert hybrid == oracle


def test_hybrid_by_signatures_agrees_with_its_oracle(small_memory: Memory) -> None:
    shared = 0
    for query in QUESTIONS:
        oracle = small_memory.search(query, config=config("exact+bm25", k=1000, decoder=False))
        scores = {hit.chunk: hit.score for hit in oracle.hits}
        found = small_memory.search(query, config=config("hybrid", k=5, beam=8, lexical="signatures", decoder=False))
        assert found.scored < sum(small_memory.info().levels)
        shared += len(set(chunks_of(found)) & set(chunks_of(oracle)[:5]))
        everything = small_memory.search(
            query, config=config("hybrid", k=1000, beam=4096, lexical="signatures", decoder=False)
        )
        assert {hit.chunk: hit.score for hit in everything.hits} == scores
    assert shared >= 0.9 * 5 * len(QUESTIONS)


def test_hybrid_without_known_words_is_the_walk(small_memory: Memory) -> None:
    query = "qwertzuiop asdfghjkl"
    hybrid, walked = (small_memory.search(query, mode=mode) for mode in ("hybrid", "walk"))
    assert [(hit.chunk, hit.score) for hit in hybrid.hits] == [(hit.chunk, hit.score) for hit in walked.hits]
    assert hybrid.hits
    assert small_memory.search(query, mode="bm25").hits == ()


@pytest.mark.parametrize("query", QUESTIONS[:3])
def test_deep_adds_the_late_interaction(small_memory: Memory, minilm: Encoder, query: str) -> None:
    asked = config("deep", k=30, deep_candidates=5, token_weight=1.5)
    result = small_memory.search(query, config=asked)
    hybrid = small_memory.search(query, config=config("hybrid", k=30))
    before = {hit.chunk: hit.score for hit in hybrid.hits}
    assert set(chunks_of(result)[:5]) == set(chunks_of(hybrid)[:5])
    assert chunks_of(result)[5:] == chunks_of(hybrid)[5:]
    (own,) = minilm.token_states([query], precise=True)
    for hit in result.hits[:5]:
        (text,) = minilm.token_states([f"{hit.document.title}: {hit.text}"], precise=True)
        similarities = own.states @ text.states.T
        expected = before[hit.chunk] + 1.5 * similarities.max(1).mean()
        assert hit.score == pytest.approx(expected, abs=0.02)  # token states of texts are computed in bfloat16
        assert len(hit.matches) == len(own.spans)
    assert all(hit.matches == () for hit in result.hits[5:])


def test_matches_name_tokens_of_the_query_and_the_document(small_memory: Memory) -> None:
    query = "Why does smoke calm bees?"
    result = small_memory.search(query, 3, mode="deep")
    words = [query[slice(*match.query)] for match in result.hits[0].matches]
    assert words == ["Why", "does", "smoke", "calm", "bees", "?"]
    text = small_memory.document(result.hits[0].document.id).text
    answered = {query[slice(*m.query)]: text[slice(*m.text)] for m in result.hits[0].matches}
    assert answered["smoke"].lower() == "smoke"
    assert answered["bees"] == "bees"
    for hit in result.hits:
        for match in hit.matches:
            assert hit.span[0] <= match.text[0] < match.text[1] <= hit.span[1]
            assert -1.001 <= match.similarity <= 1.001


def test_the_title_answers_too_but_is_no_match_in_the_text(tmp_path: Path) -> None:
    """Two documents that differ in their titles alone."""
    text = "The harbour was built in stone by hand."
    titles = {"b": "Lisbon", "a": "Oslo"}
    sources = [Document(name, text, title) for name, title in titles.items()]
    memory = Memory.build(sources, tmp_path / "m", encoder=FakeEncoder())
    for name, title in titles.items():
        result = memory.search(f"harbour {title}", 2, mode="deep")
        first, second = result.hits
        assert first.document.id == name
        assert first.score > second.score + 0.2
        for hit in result.hits:
            harbour, city = hit.matches
            assert text[slice(*harbour.text)] == "harbour"
            assert city.similarity < 0.9  # the text itself does not hold the title
            assert all(0 <= match.text[0] < match.text[1] <= len(text) for match in hit.matches)


@pytest.mark.parametrize(
    ("longest", "kept"), [(510, TITLE_TOKENS), (40 + 2 + 5, 5), (40 + 2, 0)], ids=["whole", "some", "none"]
)
def test_a_title_takes_only_the_room_that_the_encoder_has(tmp_path: Path, longest: int, kept: int) -> None:
    title = " ".join(f"word{i}" for i in range(100))
    text = " ".join(f"text{i}" for i in range(40))
    encoder = FakeEncoder(longest=longest)
    memory = Memory.build(
        [Document("a", text, title)], tmp_path / "m", encoder=encoder, config=TreeConfig(chunk_tokens=40)
    )
    (tokens,) = memory.searcher.token_states(np.array([0]), encoder)
    before = [span for span in tokens.spans if span[1] <= 0]
    assert len(before) == (kept + 1 if kept else 0)  # and the colon
    assert [text[slice(*span)] for span in tokens.spans[len(before) :]] == text.split()
    assert len(tokens.states) == len(tokens.spans) <= longest


def test_deep_scores_the_same_from_the_cache(small_memory_path: Path, minilm: Encoder) -> None:
    memory = Memory.open(small_memory_path, encoder=minilm)
    first, second = (memory.search(QUESTIONS[0], mode="deep") for _ in range(2))
    assert first.hits == second.hits


def test_the_cache_of_token_states_is_bounded(small_memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def token_states(texts: list[str]) -> list[TokenStates]:
        asked.append(len(texts))
        return [TokenStates(np.ones((1, 384), np.float32), [(0, 1)]) for _ in texts]

    searcher = Searcher(small_memory.image, small_memory.encoder, 40, "en")
    monkeypatch.setattr(searcher.encoder, "token_states", token_states)
    monkeypatch.setattr("treemem.hierarchy.walk.CACHED_CHUNKS", 10)
    assert CACHED_CHUNKS > 10
    searcher.token_states(np.arange(8), small_memory.encoder)
    searcher.token_states(np.arange(4, 14), small_memory.encoder)
    searcher.token_states(np.arange(4, 14), small_memory.encoder)
    assert asked == [8, 6, 0]
    assert len(searcher._states) == 10
    searcher.token_states(np.arange(12), small_memory.encoder)  # more than are kept: all the same answered
    assert asked[-1] == 4


# ---- what every hit holds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("query", QUESTIONS[:4])
def test_every_hit_is_a_run_of_its_document(small_memory: Memory, mode: Mode, query: str) -> None:
    result = small_memory.search(query, 40, mode=mode)
    assert result.hits
    assert result.ms > 0
    scores = [hit.score for hit in result.hits]
    assert scores == sorted(scores, reverse=True)
    assert len(set(chunks_of(result))) == len(result.hits)
    for hit in result.hits:
        document = small_memory.document(hit.document.id)
        assert document.text[slice(*hit.span)] == hit.text
        assert document.title == hit.document.title
        assert hit.path[-1].node == hit.chunk
        assert hit.path[-1].score == hit.score
        assert all(type(step.score) is float and type(step.node) is int for step in hit.path)


@pytest.mark.parametrize("mode", ["walk", "hybrid", "deep", "exact", "exact+bm25"])
def test_paths_run_from_the_top_through_parents(small_memory: Memory, mode: Mode) -> None:
    levels = small_memory.store.levels()  # level 2 first
    top = len(levels) + 1
    query = QUESTIONS[1]
    embedded = for_nodes(small_memory, query)
    for hit in small_memory.search(query, config=config(mode, k=200, lexical="index")).hits:
        assert [step.level for step in hit.path] == list(range(top, 0, -1))
        for parent, child in zip(hit.path, hit.path[1:], strict=False):
            level = levels[parent.level - 2]
            assert child.node in level.children[level.offsets[parent.node] : level.offsets[parent.node + 1]]
            vector = level.vectors[parent.node].astype(np.float32)
            assert parent.score == pytest.approx(float(vector @ embedded) / np.linalg.norm(vector), abs=STEP)


@pytest.mark.parametrize("lexical", ["index", "signatures"])
def test_a_node_has_one_score(small_memory: Memory, lexical: str) -> None:
    for query in QUESTIONS:
        result = small_memory.search(query, config=config("hybrid", k=20, beam=6, lexical=lexical))
        gathered = {(level.level, node.node): node.score for level in result.gathered[:-1] for node in level.nodes}
        steps = [step for hit in result.hits for step in hit.path[:-1]]
        met = [step for step in steps if (step.level, step.node) in gathered]
        assert len(met) > len(steps) / 2
        assert all(step.score == gathered[step.level, step.node] for step in met)


def test_bm25_alone_has_no_path_but_the_chunk(small_memory: Memory) -> None:
    for hit in small_memory.search("smoke bees", mode="bm25").hits:
        assert [(step.level, step.node) for step in hit.path] == [(1, hit.chunk)]


def test_a_chunk_under_two_nodes_is_returned_once(small_memory: Memory) -> None:
    level = small_memory.store.levels()[0]
    parents = np.bincount(level.children)
    assert (parents == 2).any(), "no chunk was spilled: this test says nothing"
    result = small_memory.search(QUESTIONS[0], 1000, mode="walk", beam=4096)
    assert sorted(chunks_of(result)) == list(range(small_memory.image.chunks))


@pytest.mark.parametrize("mode", ["walk", "hybrid"])
def test_chunks_beside_the_best_are_scored(small_memory: Memory, mode: Mode) -> None:
    image = small_memory.image
    gained = 0
    for query in QUESTIONS:
        few = config(mode, k=1000, beam=2, beside=0, lexical="index", decoder=False)
        without = small_memory.searcher.search([query], few)[0]
        result = small_memory.searcher.search([query], replace(few, beside=1))[0]
        walked = small_memory.searcher.search([query], replace(few, mode="walk", k=2))[0]
        near = {
            c + step for c in chunks_of(walked) for step in (-1, 1) if c + step in image.chunks_of(number(image, c))
        }
        new = set(chunks_of(result)) - set(chunks_of(without))
        assert set(chunks_of(without)) | near == set(chunks_of(result))
        assert result.scored == without.scored + len(new) if mode == "walk" else result.scored >= without.scored
        scores = cosines(small_memory, query)
        if mode == "walk":
            assert all(hit.score == pytest.approx(scores[hit.chunk], abs=STEP) for hit in result.hits)
        gained += len(new)
    assert gained > 0, "nothing stands beside: this test says nothing"


def test_the_gathered_context_holds_every_level(small_memory: Memory) -> None:
    levels = small_memory.info().levels
    for mode in ("walk", "hybrid", "deep"):
        result = small_memory.search(QUESTIONS[2], 3, mode=mode, beam=5)
        assert [level.level for level in result.gathered] == [4, 3, 2, 1]
        assert [level.size for level in result.gathered] == list(levels)
        for level, size in zip(result.gathered, levels, strict=True):
            assert len(level.nodes) == min(5, size)
            scores = [node.score for node in level.nodes]
            assert scores == sorted(scores, reverse=True)
        assert [node.node for node in result.gathered[-1].nodes][:3] == chunks_of(result)
    for mode in ("exact", "bm25", "exact+bm25"):
        assert small_memory.search(QUESTIONS[2], mode=mode).gathered == ()


def test_subtrees_are_what_the_children_say(small_memory: Memory) -> None:
    image = small_memory.image
    levels = small_memory.store.levels()
    for node in range(len(levels[0].offsets) - 1):
        own = levels[0].children[levels[0].offsets[node] : levels[0].offsets[node + 1]]
        assert subtree(image, 2, node).tolist() == sorted(own.tolist())
    whole = np.concatenate([subtree(image, 4, node) for node in range(image.tree.sizes[0])])
    assert np.unique(whole).tolist() == list(range(image.chunks))


# ---- ties


def test_twins_stand_in_the_order_of_the_memory(small_memory: Memory) -> None:
    for mode in MODES:
        first, second = small_memory.search(AWKWARD[2].text, 2, mode=mode).hits
        assert [first.document.id, second.document.id] == ["awkward/twin-1", "awkward/twin-2"]
        assert first.score == second.score


# ---- how many


def test_auto_scores_everything_while_that_is_as_quick(small_memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher, chunks = small_memory.searcher, small_memory.image.chunks
    query = searcher.embed([small_memory.image.chunk_text(5)])[0]
    first = small_memory.image.reference(0).id
    one = searcher.scope(first)
    for most, mode in ((chunks, "exact+bm25"), (chunks - 1, "hybrid")):
        monkeypatch.setattr(walking, "AUTO_CHUNKS", most)
        assert searcher.decided(config("auto")).mode == mode
        assert searcher.decided(config("auto"), one).mode == "exact+bm25"
        expected = searcher.search_one(query, config(mode))  # type: ignore[arg-type]
        got = searcher.search_one(query, config("auto"))
        assert [hit.chunk for hit in got.hits] == [hit.chunk for hit in expected.hits]
        assert got.scored == expected.scored


@pytest.mark.parametrize("mode", MODES)
def test_k(small_memory: Memory, mode: Mode) -> None:
    one = small_memory.search(QUESTIONS[0], 1, mode=mode)
    ten = small_memory.search(QUESTIONS[0], 10, mode=mode)
    every = small_memory.search(QUESTIONS[0], 100_000, mode=mode, beam=4096)
    assert len(one.hits) == 1
    assert one.hits[0] == ten.hits[0]
    assert chunks_of(ten) == chunks_of(every)[:10]
    expected = small_memory.image.chunks if mode != "bm25" else (bm25(small_memory, QUESTIONS[0]) > 0).sum()
    assert len(every.hits) == expected


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_memory_answers_with_nothing(empty: Memory, mode: Mode) -> None:
    result = empty.search("anything", mode=mode)
    assert (result.hits, result.gathered, result.scored) == ((), (), 0)
    assert empty.info().levels == (0,)
    with pytest.raises(InputError, match="not in this memory"):
        empty.search("anything", mode=mode, within=["a"])
    assert empty.search("anything", mode=mode, within=[]).hits == ()


@pytest.mark.parametrize("mode", MODES)
def test_a_memory_of_one_document(single: Memory, mode: Mode) -> None:
    (hit,) = single.search("words", 5, mode=mode).hits
    assert (hit.document.id, hit.span, hit.text) == ("only", (0, 15), "The only words.")
    assert [(step.level, step.node) for step in hit.path] == [(1, 0)]


@pytest.mark.parametrize("mode", MODES)
def test_a_memory_without_nodes(flat: Memory, mode: Mode) -> None:
    assert len(flat.info().levels) == 1
    result = flat.search("Why does smoke calm bees?", 2, mode=mode)
    assert len(result.hits) == 2
    assert all(len(hit.path) == 1 for hit in result.hits)
    if mode in ("walk", "hybrid", "deep"):
        assert [level.level for level in result.gathered] == [1]
    if mode == "walk":
        exact = flat.search("Why does smoke calm bees?", 2, mode="exact")
        assert result.hits == exact.hits
        assert result.scored == flat.image.chunks


# ---- odd queries


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("query", ["", " ", "\n\t ", "\u2003"])
def test_an_empty_query_finds_nothing(small_memory: Memory, mode: Mode, query: str) -> None:
    result = small_memory.search(query, mode=mode)
    assert (result.hits, result.gathered, result.scored) == ((), (), 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "query", ["?!…", "\0", "bees\0\0smoke", "bees \udcff smoke \ud800", "😀", "\u200b", "[CLS] [SEP]"]
)
def test_odd_queries_have_an_answer(small_memory: Memory, mode: Mode, query: str) -> None:
    result = small_memory.search(query, 3, mode=mode)
    if mode != "bm25":
        assert len(result.hits) == 3
    if "bees" in query:
        assert "bees" in result.hits[0].text
    for hit in result.hits:
        assert np.isfinite(hit.score)
        for match in hit.matches:
            assert 0 <= match.query[0] <= match.query[1] <= len(query)


@given(st.text(st.characters(), max_size=60), st.sampled_from(MODES))
@settings(max_examples=60)
def test_any_text_can_be_asked(small_memory: Memory, query: str, mode: Mode) -> None:
    result = small_memory.search(query, 2, mode=mode)
    assert len(result.hits) <= 2
    assert all(np.isfinite(hit.score) for hit in result.hits)


@pytest.mark.parametrize("mode", ["hybrid", "deep", "bm25"])
def test_a_query_of_100_000_words(small_memory: Memory, mode: Mode) -> None:
    words = "The lighthouse keeper keeps bees and bakes bread. "
    query = words * (100_000 // 8)
    began = time.perf_counter()
    result = small_memory.search(query, 5, mode=mode)
    assert len(result.hits) == 5
    assert time.perf_counter() - began < 30  # a few seconds where nothing else runs


def test_a_long_query_is_cut_into_spread_embeddings(searcher: Searcher) -> None:
    query = " ".join(f"Sentence number {i} speaks of bees." for i in range(400))
    (embedded,) = searcher.embed([query])
    assert len(embedded.spans) == len(embedded.vectors) == MAX_QUERY_EMBEDDINGS
    assert embedded.spans[0][0] == 0
    assert embedded.spans[-1][1] == len(query)
    short, nothing = searcher.embed(["Bees. And smoke.", ""])
    assert (len(short.vectors), short.spans) == (1, ((0, 16),))
    assert nothing.vectors.shape == (0, 384)


def test_a_long_query_finds_what_any_part_asks_for(small_memory: Memory) -> None:
    padding = "The chronicle goes on and on without saying anything of interest to anyone at all. " * 8
    query = f"{padding} What does zugzwang mean in chess? {padding} Why does smoke calm bees?"
    found = {hit.document.id.split("/")[0] for hit in small_memory.search(query, 20, mode="walk").hits}
    assert {"chess", "beekeeping"} <= found


# ---- settings


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "k = 0: it must be a whole number, at least 1"),
        ({"k": -3}, "k = -3: it must be a whole number, at least 1"),
        ({"beam": 0}, "beam = 0: it must be a whole number from 1 to 4096"),
        ({"beam": 5000}, "beam = 5000: it must be a whole number from 1 to 4096"),
        ({"mode": "nope"}, "mode = 'nope': it must be one of deep, hybrid, walk, exact, bm25, exact+bm25, auto"),
    ],
)
def test_settings_out_of_range(small_memory: Memory, given: dict[str, int], message: str) -> None:
    with pytest.raises(InputError) as caught:
        small_memory.search("bees", **given)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_searcher_without_an_encoder_knows_only_bm25(small_memory: Memory) -> None:
    searcher = Searcher(small_memory.image, None, 40, "en")
    assert searcher.search(["bees"], config("bm25"))[0].hits
    with pytest.raises(InputError, match="no encoder"):
        searcher.search(["bees"], config("walk"))


# ---- restricting


@pytest.mark.parametrize("mode", MODES)
def test_within_documents(small_memory: Memory, mode: Mode) -> None:
    wanted = ["chess/1", "gardens/3"]
    result = small_memory.search("the king of roses", 1000, mode=mode, within=wanted)
    assert result.hits
    assert {hit.document.id for hit in result.hits} <= set(wanted)
    if mode != "bm25":  # all of their chunks, since there are few
        expected = {c for w in wanted for c in small_memory.image.chunks_of(_number(small_memory, w))}
        assert set(chunks_of(result)) == expected
    if mode == "exact":
        assert result.scored == len(result.hits)
        exact = config("exact", k=1000, decoder=False)
        every, same = (small_memory.search("the king", config=exact, within=within) for within in (None, wanted))
        assert {hit.chunk: hit.score for hit in same.hits}.items() <= {
            hit.chunk: hit.score for hit in every.hits
        }.items()


def _number(memory: Memory, document_id: str) -> int:
    number = memory.image.number_of(document_id)
    assert number is not None
    return number


def test_within_scores_words_by_the_best_that_is_allowed(small_memory: Memory) -> None:
    result = small_memory.search("zugzwang king", config=config("hybrid", k=5, decoder=False), within=["chess/1"])
    words = bm25(small_memory, "zugzwang king")
    own = list(small_memory.image.chunks_of(_number(small_memory, "chess/1")))
    expected = cosines(small_memory, "zugzwang king") + 0.4 * words / words[own].max()
    for hit in result.hits:
        assert hit.score == pytest.approx(expected[hit.chunk], abs=STEP)


def test_within_many_documents_walks(small_memory: Memory) -> None:
    ids = [document.id for document in documents() if not document.id.startswith("bee")]
    result = small_memory.search("Why does smoke calm bees?", 1000, mode="walk", beam=4, within=ids)
    assert result.hits
    assert not any(hit.document.id.startswith("bee") for hit in result.hits)
    assert len(result.hits) < small_memory.image.chunks - 20  # fewer than all that is allowed: a walk, not a scan
    assert len({hit.chunk for hit in result.hits}) == len(result.hits)


@pytest.mark.parametrize("mode", MODES)
def test_within_nothing_and_unknown(small_memory: Memory, mode: Mode) -> None:
    assert small_memory.search("bees", mode=mode, within=[]).hits == ()
    with pytest.raises(InputError) as caught:
        small_memory.search("bees", mode=mode, within=["chess/1", "no/such"])
    assert "'no/such'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_within_takes_one_id_and_an_iterator(small_memory: Memory) -> None:
    def ids() -> Iterator[str]:
        yield "chess/1"

    expected = chunks_of(small_memory.search("king", within=["chess/1"]))
    assert chunks_of(small_memory.search("king", within="chess/1")) == expected
    assert chunks_of(small_memory.search("king", within=ids())) == expected


def test_an_id_with_half_a_surrogate_is_unknown(small_memory: Memory) -> None:
    with pytest.raises(InputError, match="not in this memory"):
        small_memory.search("king", within=["chess/\udcff"])


# ---- many at once


@pytest.mark.parametrize("mode", MODES)
def test_many_queries_as_one_by_one(small_memory: Memory, mode: Mode) -> None:
    queries = [*QUESTIONS, "", "smoke " * 300, QUESTIONS[0]]
    many = small_memory.search_many(queries, config(mode, k=5))
    assert [result.query for result in many] == queries
    for query, result in zip(queries, many, strict=True):
        alone = small_memory.search(query, 5, mode=mode)
        assert len(alone.hits) == len(result.hits)
        # Vectors differ in the last bits with what is encoded beside them, so equal scores may change places.
        for one, other in zip(alone.hits, result.hits, strict=True):
            assert one.score == pytest.approx(other.score, abs=0.02 if mode == "deep" else 1e-4)
    assert small_memory.search_many([], config(mode)) == []


def test_threads_get_the_same_answers(small_memory_path: Path, minilm: Encoder) -> None:
    alone = Memory.open(small_memory_path, encoder=minilm)
    modes: list[Mode] = ["hybrid", "walk", "bm25", "exact"]
    jobs = [(query, mode) for query in QUESTIONS for mode in modes] + [(query, "deep") for query in QUESTIONS[:3]]
    expected = {job: alone.search(job[0], 5, mode=job[1]) for job in jobs}
    shared = Memory.open(small_memory_path, encoder=minilm)  # nothing is loaded or cached yet
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda job: (job, shared.search(job[0], 5, mode=job[1])), jobs * 2)
        for job, result in results:
            scores = [hit.score for hit in result.hits]
            # Which texts are encoded together depends on what another thread has put into the cache.
            tolerance = 0.02 if job[1] == "deep" else 1e-5
            assert scores == pytest.approx([hit.score for hit in expected[job].hits], abs=tolerance)


def test_threads_share_one_small_cache(small_memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are thrown out by one thread while others use them."""
    monkeypatch.setattr("treemem.hierarchy.walk.CACHED_CHUNKS", 3)
    searcher = Searcher(small_memory.image, small_memory.encoder, 40, "en")

    def token_states(texts: list[str]) -> list[TokenStates]:
        time.sleep(0.0005)
        return [TokenStates(np.full((1, 384), len(text), np.float32), [(0, 1)]) for text in texts]

    monkeypatch.setattr(searcher.encoder, "token_states", token_states)
    draws = np.random.default_rng(0).integers(0, 12, (200, 6))

    def look(chunks: np.ndarray) -> bool:
        states = searcher.token_states(chunks, small_memory.encoder)
        titles = searcher._titles([int(chunk) for chunk in chunks], small_memory.encoder)
        texts = [small_memory.image.chunk_text(int(chunk)) for chunk in chunks]
        lengths = [len(title + text) for title, text in zip(titles, texts, strict=True)]
        return [float(state.states[0, 0]) for state in states] == lengths

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, draws))
    assert len(searcher._states) == 3
