"""Figures of retrieval against the same figures worked out from the hits of `Memory.search`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.evaluation.sets import write_jsonl, write_set, write_table

from treemem import Memory
from treemem.config import SearchConfig, TreeConfig
from treemem.errors import InputError
from treemem.evaluation import MODE_NAMES, EvalSet, evaluate, load_set, run
from treemem.evaluation.ancestors import Ancestors
from treemem.evaluation.retrieval import rank_fusion
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.walk import subtree
from treemem.types import Document, Hit

pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = {"hit@1", "hit@10", "ndcg@10", "recall@10", "recall@100", "scored", "ms_p50", "ms_p95"}


@pytest.fixture(scope="module")
def countries(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    return load_set(write_set(tmp_path_factory.mktemp("sets") / "countries", ".zst"))


@pytest.fixture(scope="module")
def few(countries: EvalSet) -> EvalSet:
    """The queries about ten of the thirty countries."""
    return replace(countries, queries=countries.queries[:30])


@pytest.fixture(scope="module")
def memory(countries: EvalSet, minilm: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """A sentence a chunk, so that chunks of one document are told apart; a narrow tree, so that walks can miss."""
    config = TreeConfig(chunk_tokens=24, fanout=6, spill=2)
    path = tmp_path_factory.mktemp("memories") / "countries.memory"
    return Memory.build(countries.read_documents(), path, encoder=minilm, config=config)


def hits(memory: Memory, eval_set: EvalSet, mode: str, k: int, *, decoder: bool = True) -> list[list[Hit]]:
    config = SearchConfig(mode=mode, k=k, decoder=decoder)  # type: ignore[arg-type]
    return [list(found.hits) for found in memory.search_many([query.text for query in eval_set.queries], config)]


def is_right(hit: Hit, query: Any) -> bool:
    """By the words that the set's generator put there, not by spans."""
    country, kind = query.id.split("-")
    words = {"capital": "seat of government", "river": "longest river", "dish": ""}
    return hit.document.id == country and words[kind] in hit.text


@pytest.mark.parametrize("mode", ["bm25", "exact", "hybrid", "deep"])
def test_figures_are_those_of_the_hits(memory: Memory, few: EvalSet, mode: str) -> None:
    figures = evaluate(memory, few, [mode]).modes[mode]
    found = hits(memory, few, mode, 90)
    pairs = list(zip(few.queries, found, strict=True))
    assert figures.hit_1 == pytest.approx(np.mean([is_right(own[0], query) for query, own in pairs]))
    assert figures.hit_10 == pytest.approx(np.mean([any(is_right(h, query) for h in own[:10]) for query, own in pairs]))
    gains = []
    for query, own in pairs:
        ranking = list(dict.fromkeys(hit.document.id for hit in own))  # 90 chunks rank all 30 documents
        rank = ranking.index(query.id.split("-")[0]) + 1 if query.id.split("-")[0] in ranking else math.inf
        gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0.0)
    assert figures.ndcg_10 == pytest.approx(np.mean(gains))
    assert figures.recall_10 == pytest.approx(np.mean([gain > 0 for gain in gains]))
    assert 0.3 < figures.hit_1 < figures.hit_10 or figures.hit_1 == 1  # a set of real questions, not one that all pass
    assert 0 < figures.ms_p50 <= figures.ms_p95


def test_all_modes_and_the_documented_json(memory: Memory, few: EvalSet) -> None:
    report = evaluate(memory, few, MODE_NAMES, beam=90)
    out = json.loads(json.dumps(report.to_json()))
    assert {"set", "documents", "chunks", "queries", "modes", "per_level_recall", "answers"} <= set(out)
    assert (out["set"], out["documents"], out["chunks"], out["queries"]) == ("countries", 30, 90, 30)
    assert out["left_out"] == {"without_qrels": 1, "nothing_to_find": 0}
    assert out["judged_by"] == {"evidence": 10, "sections": 10, "documents": 10}
    assert list(out["modes"]) == list(MODE_NAMES)
    assert all(set(figures) == KEYS for figures in out["modes"].values())
    assert out["answers"] == {}
    # Such a beam keeps every node, so the walk is exact search.
    walk, exact = out["modes"]["walk"], out["modes"]["exact"]
    assert {key: walk[key] for key in KEYS if "ms" not in key and key != "scored"} == {
        key: exact[key] for key in KEYS if "ms" not in key and key != "scored"
    }
    assert out["modes"]["bm25"]["scored"] == 0
    assert exact["scored"] == 90
    assert walk["scored"] == sum(len(level.ids) for level in memory.image.tree.levels)  # chunks stand twice
    assert out["encode_ms"] > 0
    assert set(out["by_source"]) == {"capitals", "dishes", "rivers"}
    for key in ("hit@1", "ndcg@10", "recall@10"):  # 10 queries a source: their mean is the whole's
        parts = [own["modes"]["hybrid"][key] for own in out["by_source"].values()]
        assert np.mean(parts) == pytest.approx(out["modes"]["hybrid"][key])


def test_wrong_judgements_are_no_hits(memory: Memory, countries: EvalSet) -> None:
    elsewhere = {query.id: countries.queries[i - 30] for i, query in enumerate(countries.queries)}
    swapped = [
        replace(query, relevant=elsewhere[query.id].relevant, spans=elsewhere[query.id].spans)
        for query in countries.queries
    ]
    figures = evaluate(memory, replace(countries, queries=tuple(swapped)), ["bm25"]).modes["bm25"]
    assert figures.hit_1 == 0
    missing = [replace(query, relevant={**query.relevant, "atlantis": 2}) for query in countries.queries]
    lacking = evaluate(memory, replace(countries, queries=tuple(missing)), ["bm25"])
    assert lacking.modes["bm25"].recall_100 == 0.5
    assert lacking.modes["bm25"].ndcg_10 < 0.5
    assert any("1 relevant documents are not in the corpus" in note for note in lacking.notes)


def test_recall_per_level(memory: Memory, few: EvalSet) -> None:
    """Against the nodes that a search says it gathered and what lies below them."""
    beam = 2
    report = evaluate(memory, few, ["walk"], beam=beam)
    levels = report.per_level_recall
    assert [level.level for level in levels] == list(range(len(levels), 0, -1))
    assert tuple(level.nodes for level in levels) == memory.info().levels
    first: dict[int, list[bool]] = {}
    shares: dict[int, list[float]] = {}
    walks = memory.search_many([query.text for query in few.queries], SearchConfig(mode="walk", k=90, beam=beam))
    for exact, walked in zip(hits(memory, few, "exact", 10, decoder=False), walks, strict=True):
        best = [hit.chunk for hit in exact]
        held = {1: {hit.chunk for hit in walked.hits}}
        for gathered in walked.gathered[:-1]:
            below = [subtree(memory.image, gathered.level, node.node).tolist() for node in gathered.nodes]
            held[gathered.level] = set().union(*below)
        for level, chunks in held.items():
            first.setdefault(level, []).append(best[0] in chunks)
            shares.setdefault(level, []).append(len(set(best) & chunks) / 10)
    for level in levels:
        assert level.recall_1 == pytest.approx(np.mean(first[level.level]))
        assert level.recall_10 == pytest.approx(np.mean(shares[level.level]))
    assert [level.kept for level in levels[:-1]] == [beam] * (len(levels) - 1)
    assert levels[-1].recall_10 <= levels[0].recall_10
    assert levels[-1].recall_10 < 1  # so narrow a beam loses something
    # The same where exact search is evaluated anyway.
    assert evaluate(memory, few, ["exact", "walk"], beam=beam).per_level_recall == levels


def test_ancestors(memory: Memory) -> None:
    tree = memory.image.tree
    ancestors = Ancestors(tree)
    for chunk in range(0, memory.image.chunks, 7):
        way = ancestors.of(chunk)
        assert len(way) == tree.depth
        for level, nodes in zip(range(tree.depth, 1, -1), way, strict=False):
            above = [n for n in range(tree.sizes[tree.depth - level]) if chunk in subtree(memory.image, level, n)]
            assert nodes.tolist() == above
    assert max(len(ancestors.of(chunk)[-2]) for chunk in range(memory.image.chunks)) == 2  # spill


def test_within_document(memory: Memory, few: EvalSet) -> None:
    report = evaluate(memory, few, ["exact", "hybrid", "bm25", "deep", "rrf"], within_document=True)
    assert report.queries == 20
    assert report.left_out == {"without_qrels": 1, "nothing_to_find": 10}
    assert all(figures.hit_10 == 1 for figures in report.modes.values())  # three chunks each
    exact = report.modes["exact"]
    assert (exact.ndcg_10, exact.recall_10, exact.recall_100) == (None, None, None)
    right = []
    for query in few.queries:
        if query.judged_by != "documents":
            found = memory.search(query.text, 1, mode="exact", within=list(query.relevant))
            right.append(is_right(found.hits[0], query))
    assert exact.hit_1 == pytest.approx(np.mean(right))
    only = replace(few, queries=tuple(q for q in few.queries if q.judged_by == "documents"))
    with pytest.raises(InputError, match="no query has evidence or sections"):
        evaluate(memory, only, ["exact"], within_document=True)


def test_deep_encodes_each_chunk_once(
    memory: Memory, countries: EvalSet, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    states = minilm.token_states

    def counting(texts: Any, **options: Any) -> Any:
        if not options:  # queries are encoded with `precise`
            encoded.extend(texts)
        return states(texts, **options)

    memory.searcher._states.clear()
    monkeypatch.setattr(minilm, "token_states", counting)
    evaluate(memory, countries.sample(8, 0), ["deep"])
    assert encoded
    assert len(encoded) == len(set(encoded))


def test_bm25_alone_needs_no_encoder(memory: Memory, countries: EvalSet) -> None:
    opened = Memory.open(memory.store.path, encoder="no such encoder")
    report = evaluate(opened, countries, ["bm25"])
    assert report.modes["bm25"].hit_10 > 0.9
    assert report.encode_ms == 0
    assert report.per_level_recall == ()


def test_rank_fusion_by_hand() -> None:
    chunks, sums = rank_fusion([np.array([4, 9, 1], np.int32), np.array([9, 7], np.int32)])
    assert chunks.tolist() == [9, 4, 7, 1]
    assert sums == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])
    chunks, _ = rank_fusion([np.array([5], np.int32), np.array([2], np.int32)])
    assert chunks.tolist() == [2, 5]  # ties by the smaller chunk
    assert rank_fusion([np.array([], np.int32)] * 2)[0].tolist() == []


def test_another_memory_is_refused(countries: EvalSet, minilm: Encoder, memory: Memory, tmp_path: Path) -> None:
    other = Memory.build([Document("norway", "Other words.")], tmp_path / "other", encoder=minilm)
    with pytest.raises(InputError, match="does not hold document 'australia'"):
        evaluate(other, countries, ["bm25"])
    only = replace(countries, queries=countries.queries[:1])
    with pytest.raises(InputError, match="document 'norway' has another text"):
        evaluate(other, only, ["bm25"])
    with pytest.raises(InputError, match="mode = 'best': it must be one of deep"):
        evaluate(memory, countries, ["best"])
    with pytest.raises(InputError, match="beam = 0"):
        evaluate(memory, countries, ["walk"], beam=0)


def test_queries_that_find_nothing(memory: Memory, countries: EvalSet) -> None:
    empty = replace(countries, queries=tuple(replace(query, text=" ") for query in countries.queries[:3]))
    report = evaluate(memory, empty, MODE_NAMES)
    assert all((own.hit_10, own.ndcg_10) == (0, 0) for own in report.modes.values())
    assert report.per_level_recall == ()


# ---- from a folder


def test_run_builds_once_and_keeps_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "cache"))
    folder = write_set(tmp_path / "set")
    stages: list[str] = []

    def progress(stage: str, done: float, total: float | None) -> None:
        stages.append(stage)

    first = run(folder, split="dev", modes=["bm25", "walk"], max_queries=10, seed=3, progress=progress)
    assert first.queries == 10
    assert first.settings["seed"] == 3
    place = str(tmp_path / "cache" / "eval")
    assert any(stage.startswith(f"building {place}") for stage in stages)
    assert "searching: walk" in stages
    stages.clear()
    again = run(folder, split="dev", modes=["bm25", "walk"], max_queries=10, seed=3, progress=progress)
    assert not any(stage.startswith("building") for stage in stages)
    assert any(stage.startswith(f"using {place}") for stage in stages)
    assert again.settings == first.settings
    assert again.modes["walk"].hit_10 == first.modes["walk"].hit_10
    # A named memory is used as it is.
    named = run(folder, memory_path=first.settings["memory"], modes=["bm25"])
    assert (named.queries, named.split) == (90, None)
    # Another corpus is another memory.
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"id": "atlantis", "text": "The capital of Atlantis is wet."}\n')
    assert run(folder, modes=["bm25"]).documents == 31
    assert len(list((tmp_path / "cache" / "eval").iterdir())) == 2


def test_run_refuses_before_it_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "cache"))
    folder = write_set(tmp_path / "set", beir=True)
    for options, message in [
        ({"modes": ["best"]}, "mode = 'best'"),
        ({"max_queries": 0}, "max_queries = 0"),
        ({"beam": 0}, "beam = 0"),
        ({"split": "train", "modes": ["walk"], "answers": True}, 'no query has "answers"'),
        ({"split": "none"}, "no split none"),
    ]:
        with pytest.raises(InputError, match=message):
            run(folder, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()


def test_answers_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder to figures, with replies quoted from the memory."""
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "cache"))
    folder = write_set(tmp_path / "set")
    report = run(folder, modes=[], answers=True, llm="none", max_queries=6)
    assert report.modes == {}
    assert report.answers is not None
    assert report.answers.queries == 6
    assert report.answers.extractive == 1
    assert report.answers.contained > 0.5
    assert report.to_json()["answers"]["contained"] == report.answers.contained
    assert report.settings["llm"] == "none"


def test_graded_document_figures_on_a_real_set(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LIMIT-small: two documents right per query, none told by spans; words find what single vectors cannot."""
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path))
    report = run(data_dir / "limit_small", modes=["bm25", "exact"], decoder=False, max_queries=100)
    assert (report.documents, report.queries) == (46, 100)
    assert report.judged_by == {"documents": 100}
    bm25, exact = report.modes["bm25"], report.modes["exact"]
    assert exact.recall_100 == 1  # 46 documents
    assert bm25.ndcg_10 is not None
    assert exact.ndcg_10 is not None
    assert bm25.ndcg_10 > 0.9 > exact.ndcg_10 > 0.2
    assert bm25.hit_1 > 0.9


def test_graded_gains(memory: Memory, countries: EvalSet, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "graded")
    write_jsonl(folder, "queries", [{"id": "q", "text": "rye bread in Finland"}], "")
    write_table(folder / "qrels.tsv", [("q", "finland", 1), ("q", "norway", 3), ("q", "peru", 0)])
    figures = evaluate(memory, load_set(folder), ["exact"]).modes["exact"]
    ranking = list(dict.fromkeys(h.document.id for h in memory.search("rye bread in Finland", 90, mode="exact").hits))
    gain = {"finland": 1, "norway": 3}
    dcg = sum(gain.get(document, 0) / math.log2(rank + 1) for rank, document in enumerate(ranking[:10], 1))
    assert figures.ndcg_10 == pytest.approx(dcg / (3 + 1 / math.log2(3)))
