"""The JSON that programs may rely on: documented keys and types, one document on standard output, nothing else."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.sets import write_set
from tests.hierarchy.test_ask import GROUNDED
from tests.small import QUESTIONS, SUBJECTS
from tests.test_cli import Run, folder, model, run

from treemem.config import MODES
from treemem.hierarchy.embed import Encoder

__all__ = ["folder", "model", "run"]  # fixtures of the command line's tests

NUMBER = (int, float)
STEP = {"level": int, "node": int, "score": float}
DOCUMENT = {"id": str, "title": str}
HIT = {"score": float, "document": DOCUMENT, "span": [int], "text": str, "path": [STEP]}
MATCH = {"query": [int], "text": [int], "similarity": float}
SEARCH = {"hits": [HIT], "scored": int, "ms": float}
CITATION = {"number": int, "document": DOCUMENT, "span": [int], "text": str, "score": float}
CONTEXT = {
    "levels": [{"level": int, "size": int, "nodes": [{"node": int, "score": float, "label": str}]}],
    "passages": [CITATION],  # the same keys
}
ASK = {
    "text": str,
    "grounded": bool,
    "extractive": bool,
    "found": bool,
    "citations": [CITATION],
    "context": CONTEXT,
    "timings": dict,
}
INFO = {
    "path": str,
    "documents": int,
    "masked": int,
    "chunks": int,
    "levels": [int],
    "encoder": str,
    "dimension": int,
    "snapshot": str,
    "branch": str | None,
    "edited": float,
    "format": int,
    "config": {"chunk_tokens": int, "fanout": int, "spill": int, "alpha": NUMBER, "seed": int, "language": str},
    "trained": str | None,
    "reader_vectors": bool,
    "store_bytes": int,
    "image_bytes": int,
}
READ = {"documents": int, "unreadable": [dict], "unlisted": int, "skipped": dict, "empty": int}
BUILD = {"memory": INFO, "read": READ}


def check(value: Any, shape: Any, place: str = "$") -> None:
    """Compare a value with a shape: a type, a list of one shape, or a dictionary with exactly these keys."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), place
        assert set(value) == set(shape), place
        for key, inner in shape.items():
            check(value[key], inner, f"{place}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), place
        for number, inner in enumerate(value):
            check(inner, shape[0], f"{place}[{number}]")
    else:
        assert isinstance(value, shape), f"{place}: {value!r}"
        assert isinstance(value, bool) == (shape is bool), f"{place}: {value!r}"


def one_document(text: str) -> Any:
    """The only thing on standard output: one line of JSON as the standard defines it."""
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_checker_can_fail() -> None:
    check({"a": [1, 2]}, {"a": [int]})
    for value, shape in [({}, {"a": int}), ({"a": 1, "b": 2}, {"a": int}), ([1, "x"], [int]), (True, int), (1, bool)]:
        with pytest.raises(AssertionError):
            check(value, shape)


@pytest.mark.parametrize("mode", MODES)
def test_search(run: Run, small_memory_path: Path, mode: str) -> None:
    done = run("search", small_memory_path, QUESTIONS[1], "--mode", mode, "-k", "4", "--json")
    assert (done.code, done.err) == (0, "")
    value = one_document(done.out)
    assert len(value["hits"]) == 4
    for hit in value["hits"]:
        assert ("matches" in hit) == (mode == "deep")
        check(hit.pop("matches", []), [MATCH])
        assert len(hit["span"]) == 2
    check(value, SEARCH)


@pytest.mark.usefixtures("model")
def test_control_characters_are_escaped(run: Run, tmp_path: Path) -> None:
    text = "Bees\x7f dance\x9b31m\x1b[2J all day."
    (tmp_path / "lines.jsonl").write_text(json.dumps({"id": "bees", "text": text}))
    assert run("build", tmp_path / "m", tmp_path / "lines.jsonl", "--json").code == 0
    done = run("search", tmp_path / "m", "bees", "--json")
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.out) is None
    assert one_document(done.out)["hits"][0]["text"] == text


def test_search_without_hits(run: Run, small_memory_path: Path) -> None:
    value = one_document(run("search", small_memory_path, "", "--json").out)
    check(value, SEARCH)
    assert value["hits"] == []


def test_text_is_not_escaped(run: Run, small_memory_path: Path) -> None:
    done = run("search", small_memory_path, "日本茶", "-k", "1", "--mode", "bm25", "--json")
    assert "Café Zürich 😀 serves 日本茶" in done.out
    assert one_document(done.out)["hits"][0]["document"] == {"id": "awkward/unicode", "title": "Ünïcode"}


def test_ask_without_a_model(run: Run, small_memory_path: Path) -> None:
    done = run("ask", small_memory_path, QUESTIONS[1], "--llm", "none", "--json")
    assert (done.code, done.err) == (0, "")
    value = one_document(done.out)
    check(value, ASK)
    assert set(value["timings"]) == {"search", "context", "quote"}
    check(list(value["timings"].values()), [float])
    assert value["citations"]
    assert value["context"]["passages"]
    assert [level["level"] for level in value["context"]["levels"]] == [4, 3, 2, 1]


@pytest.mark.usefixtures("model")
def test_ask_with_a_model(run: Run, small_memory_path: Path) -> None:
    done = run("ask", small_memory_path, QUESTIONS[1], "--json")
    assert (done.code, done.err) == (0, "")  # nothing is streamed
    value = one_document(done.out)
    check(value, ASK)
    assert value["text"] == GROUNDED
    assert set(value["timings"]) == {"search", "context", "first_token", "generate", "cite"}


def test_ask_where_nothing_is_found(run: Run, small_memory_path: Path) -> None:
    value = one_document(run("ask", small_memory_path, "", "--llm", "none", "--json").out)
    check(value, ASK)
    assert (value["found"], value["citations"]) == (False, [])


def test_info(run: Run, small_memory_path: Path) -> None:
    done = run("info", small_memory_path, "--json")
    assert (done.code, done.err) == (0, "")
    check(one_document(done.out), {**INFO, "advice": str | None})


def test_build(run: Run, tmp_path: Path, folder: Path) -> None:
    done = run("build", tmp_path / "m", folder, "--json")
    assert (done.code, done.err) == (0, "")
    value = one_document(done.out)
    check(value, BUILD)
    assert value["read"]["skipped"] == {".png": 1}
    assert [set(failure) for failure in value["read"]["unreadable"]] == [{"path", "reason", "line"}] * 2


@pytest.mark.parametrize("command", ["search", "ask", "info", "build", "eval"])
def test_errors_leave_standard_output_empty(run: Run, tmp_path: Path, command: str) -> None:
    more = {"search": ["q"], "ask": ["q", "--llm", "none"], "info": [], "build": [tmp_path / "nope"], "eval": []}
    done = run(command, tmp_path / "missing", *more[command], "--json")
    assert done.code == 1
    assert done.out == ""
    assert re.match(r"\S", done.error)


def test_eval(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm: Encoder) -> None:
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module("treemem.evaluation.run")  # the package has a function of that name
    monkeypatch.setattr(module, "load_encoder", lambda name: minilm)
    data = write_set(tmp_path / "set")
    done = run("eval", data, "--modes", "walk,hybrid", "--max-queries", "12", "--json")
    assert (done.code, done.err) == (0, "")
    value = one_document(done.out)
    documented = {"set", "documents", "chunks", "queries", "modes", "per_level_recall", "answers"}
    assert documented <= set(value)
    assert set(value["modes"]) == {"walk", "hybrid"}
    for figures in value["modes"].values():
        assert {"hit@1", "hit@10", "ndcg@10", "scored", "ms_p50", "ms_p95"} <= set(figures)
        assert 0 <= figures["hit@1"] <= figures["hit@10"] <= 1
    assert isinstance(value["per_level_recall"], list)


TRAIN = {
    "memory": str, "questions": dict, "held_out": int, "left_out": int, "before": dict, "after": dict, "adopted": dict,
    "improved": bool, "complete": bool, "snapshot": str, "seconds": float, "logs": str,
}  # fmt: skip


def test_train(run: Run, small_memory_path: Path, tmp_path: Path) -> None:
    own = shutil.copytree(small_memory_path, tmp_path / "own.memory")
    questions = [
        {"query": f"{words} {subject}", "document": f"{subject.lower()}/{n}"}
        for words in ("the", "about", "what of", "where is", "who saw", "my") for subject in SUBJECTS for n in (0, 1)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, questions)))
    done = run("train", own, "--queries", tmp_path / "pairs.jsonl", "--levels", "2", "--minutes", "0.1", "--json")
    assert (done.code, done.err) == (0, "")
    value = one_document(done.out)
    check(value, TRAIN)
    assert sum(value["questions"].values()) + value["held_out"] <= len(questions)
    for figures in (value["before"], value["after"]):
        assert {"walk hit@1", "walk hit@10", "hybrid MRR@10", "level 2 recall@32"} <= set(figures)
        check(list(figures.values()), [NUMBER])
