from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from treemem.evaluation import EvalReport, print_report
from treemem.evaluation.report import AnswerFigures, LevelRecall, ModeFigures, SourceFigures

WALK = ModeFigures(0.5, 0.75, 0.61, 0.7, 0.9, 1234.4, 0.25, 0.5)
EXACT = ModeFigures(0.6, 0.7504, 0.6, 0.8, 1.0, 50000.0, 30.0, 45.125)
REPORT = EvalReport(
    set="a [red]set",
    split="dev",
    documents=10,
    chunks=50_000,
    queries=1000,
    left_out={"without_qrels": 2},
    judged_by={"evidence": 1000},
    modes={"walk": WALK, "exact": EXACT},
    per_level_recall=(LevelRecall(2, 40, 32.0, 0.9, 0.95), LevelRecall(1, 50_000, 1200.5, 0.9, 0.93)),
    by_source={},
    encode_ms=9.5,
    settings={},
    notes=("2 queries without [relevant] documents left out",),
)


def printed(report: EvalReport) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.split()[:1] == [name])
    return line.split()


def test_the_best_of_each_column_is_marked() -> None:
    text = printed(REPORT)
    assert row(text, "walk") == ["walk", "50.0", "75.0", "*61.0", "70.0", "90.0", "1,234", "*0.25", "*0.50"]
    assert row(text, "exact") == ["exact", "*60.0", "75.0", "60.0", "*80.0", "*100.0", "50,000", "30.00", "45.12"]


def test_a_column_of_equals_has_no_best() -> None:
    text = printed(replace(REPORT, modes={"walk": WALK, "exact": WALK}))
    assert "*" not in text


def test_points_stand_below_each_other() -> None:
    lines = [line for line in printed(REPORT).splitlines() if line.split()[:1] in (["walk"], ["exact"])]
    points = [[i for i, letter in enumerate(line) if letter == "."] for line in lines]
    assert len(points[0]) == 7
    assert points[0] == points[1]


def test_everything_is_told_and_nothing_is_taken_for_markup() -> None:
    text = printed(replace(REPORT, modes={"walk": WALK, "exact+bm25": EXACT}))
    assert "a [red]set, split dev: 1,000 queries, 10 documents, 50,000 chunks" in text
    assert "without [relevant] documents" in text
    assert "1,200.5" in text
    assert "judged by evidence 1,000; a query is encoded in 9.5 ms" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "asked" not in text


def test_what_was_not_measured_has_no_column() -> None:
    inside = replace(WALK, ndcg_10=None, recall_10=None, recall_100=None)
    text = printed(replace(REPORT, modes={"walk": inside}))
    assert "nDCG" not in text
    assert row(text, "walk") == ["walk", "50.0", "75.0", "1,234", "0.25", "0.50"]
    assert replace(REPORT, modes={"walk": inside}).to_json()["modes"]["walk"]["ndcg@10"] is None


def test_sources_and_answers() -> None:
    answers = AnswerFigures(70, 0.1, 0.25, 0.4, 0.5, 0.9, 0.3, 0.05, 1.5)
    report = replace(REPORT, by_source={"nq": SourceFigures(12, {"walk": WALK})}, answers=answers)
    text = printed(report)
    assert "nq: 12 queries" in text
    assert "answers to 70 questions" in text
    assert "25.0" in text
    out = report.to_json()
    assert out["by_source"]["nq"] == {"queries": 12, "modes": {"walk": WALK.to_json()}}
    assert out["answers"]["f1"] == 0.25
