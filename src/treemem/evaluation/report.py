"""The figures of an evaluation: as values, as the documented JSON, and as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from treemem.evaluation.readers import Gates


@dataclass(frozen=True)
class ModeFigures:
    """What one mode of search is worth, means over queries. Shares are between 0 and 1."""

    hit_1: float
    hit_10: float
    ndcg_10: float | None
    """Over documents, like the recalls; None where the search stays inside the relevant documents."""
    recall_10: float | None
    recall_100: float | None
    scored: float
    """Vectors scored per query."""
    ms_p50: float
    """Milliseconds of one search for 10 hits, the encoding of the query left out."""
    ms_p95: float

    def to_json(self) -> dict[str, float | None]:
        """Keys as in the documented JSON."""
        return {
            "hit@1": self.hit_1,
            "hit@10": self.hit_10,
            "ndcg@10": self.ndcg_10,
            "recall@10": self.recall_10,
            "recall@100": self.recall_100,
            "scored": self.scored,
            "ms_p50": self.ms_p50,
            "ms_p95": self.ms_p95,
        }


@dataclass(frozen=True)
class LevelRecall:
    """How much of what exact search finds a walk still holds at one level."""

    level: int
    nodes: int
    """How many elements the level has."""
    kept: float
    """How many of them a walk keeps, on average; at level 1 how many chunks it scores."""
    recall_1: float
    """Share of queries for which what is kept leads to exact search's first chunk."""
    recall_10: float
    """Mean share of exact search's first ten chunks that what is kept leads to."""

    def to_json(self) -> dict[str, float]:
        """Keys as in the documented JSON."""
        return {
            "level": self.level,
            "nodes": self.nodes,
            "kept": self.kept,
            "recall@1": self.recall_1,
            "recall@10": self.recall_10,
        }


@dataclass(frozen=True)
class SourceFigures:
    """The figures of the queries from one source."""

    queries: int
    modes: Mapping[str, ModeFigures]


@dataclass(frozen=True)
class AnswerFigures:
    """What the replies are worth, means over queries. Shares are between 0 and 1."""

    queries: int
    exact_match: float
    f1: float
    contained: float
    cited: float
    """Share of replies that cite a right span; a relevant document, where the query is judged by documents."""
    grounded: float
    extractive: float
    refused: float
    """Share of replies that say that the memory does not hold the answer."""
    seconds: float
    """Mean, from question to whole reply."""


@dataclass(frozen=True)
class EvalReport:
    """Everything that one evaluation found."""

    set: str
    split: str | None
    documents: int
    chunks: int
    queries: int
    left_out: Mapping[str, int]
    """Queries not evaluated: `without_qrels`; `nothing_to_find`, where every chunk searched would be right."""
    judged_by: Mapping[str, int]
    """Queries by what makes a chunk right for them."""
    modes: Mapping[str, ModeFigures]
    per_level_recall: tuple[LevelRecall, ...]
    by_source: Mapping[str, SourceFigures]
    encode_ms: float
    """Median milliseconds of encoding one query; 0 where no mode needs it."""
    settings: Mapping[str, Any]
    """What to repeat it with: memory, snapshot, encoder, beam, seed, …"""
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know."""
    answers: AnswerFigures | None = field(default=None)
    gates: Gates | None = field(default=None)
    """What readers are worth, where that was asked for."""

    def to_json(self) -> dict[str, Any]:
        """The documented JSON of `treemem eval --json`; `answers` is empty where the model was not asked."""
        return {
            "set": self.set,
            "split": self.split,
            "documents": self.documents,
            "chunks": self.chunks,
            "queries": self.queries,
            "left_out": dict(self.left_out),
            "judged_by": dict(self.judged_by),
            "modes": {name: figures.to_json() for name, figures in self.modes.items()},
            "per_level_recall": [level.to_json() for level in self.per_level_recall],
            "by_source": {
                name: {
                    "queries": own.queries,
                    "modes": {mode: figures.to_json() for mode, figures in own.modes.items()},
                }
                for name, own in self.by_source.items()
            },
            "answers": {} if self.answers is None else asdict(self.answers),
            "readers": {} if self.gates is None else self.gates.to_json(),
            "encode_ms": self.encode_ms,
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }


# ---- tables


@dataclass(frozen=True)
class _Column:
    name: str
    value: Callable[[ModeFigures], float | None]
    show: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = max


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _ms(value: float) -> str:
    return f"{value:.2f}"


_COLUMNS = (
    _Column("hit@1", lambda mode: mode.hit_1, _percent),
    _Column("hit@10", lambda mode: mode.hit_10, _percent),
    _Column("nDCG@10", lambda mode: mode.ndcg_10, _percent),
    _Column("R@10", lambda mode: mode.recall_10, _percent),
    _Column("R@100", lambda mode: mode.recall_100, _percent),
    # No best: the fewest scored is worth nothing by itself.
    _Column("scored", lambda mode: mode.scored, lambda value: f"{value:,.0f}", None),
    _Column("p50 ms", lambda mode: mode.ms_p50, _ms, min),
    _Column("p95 ms", lambda mode: mode.ms_p95, _ms, min),
)


def _table(title: str) -> Table:
    # Narrow: eight columns and the longest mode fit a terminal of 80.
    return Table(
        title=title or None, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), title_justify="left", title_style="bold"
    )


def mode_table(modes: Mapping[str, ModeFigures], title: str = "") -> Table:
    """One row per mode; the best of each column is bold, with a star for terminals without bold."""
    table = _table(escape(title))
    table.add_column("mode")
    cells: list[list[str]] = []
    for column in _COLUMNS:
        values = [column.value(figures) for figures in modes.values()]
        known = [value for value in values if value is not None]
        if known:
            table.add_column(column.name, justify="right")
            cells.append(_cells(column, values, known))
    for row, name in enumerate(modes):
        table.add_row(escape(name), *(column[row] for column in cells))
    return table


def _cells(column: _Column, values: Sequence[float | None], known: Sequence[float]) -> list[str]:
    shown = ["" if value is None else column.show(value) for value in values]
    if column.best is None or len(set(shown)) < 2:
        return shown
    best = column.show(column.best(known))  # what looks equal is marked equal
    # In front, so that the points stay below each other.
    return [f"[bold]*{cell}[/]" if cell == best else cell for cell in shown]


def _level_table(levels: Sequence[LevelRecall]) -> Table:
    table = _table("the walk against exact search")
    for name in ("level", "elements", "kept", "recall@1", "recall@10"):
        table.add_column(name, justify="right")
    for level in levels:
        recalls = (_percent(level.recall_1), _percent(level.recall_10))
        table.add_row(str(level.level), f"{level.nodes:,}", f"{level.kept:,.1f}", *recalls)
    return table


def _answer_table(answers: AnswerFigures) -> Table:
    table = _table(f"answers to {answers.queries:,} questions")
    shares = {
        "exact": answers.exact_match,
        "F1": answers.f1,
        "contained": answers.contained,
        "cited": answers.cited,
        "grounded": answers.grounded,
        "extractive": answers.extractive,
        "refused": answers.refused,
    }
    for name in (*shares, "seconds"):
        table.add_column(name, justify="right")
    table.add_row(*map(_percent, shares.values()), f"{answers.seconds:.2f}")
    return table


def print_report(report: EvalReport, console: Console) -> None:
    """Print an evaluation for people."""
    split = "" if report.split is None else f", split {report.split}"
    title = f"{report.set}{split}: {report.queries:,} queries, {report.documents:,} documents, {report.chunks:,} chunks"
    if report.modes:
        console.print(mode_table(report.modes, title))
        for name, own in report.by_source.items():
            console.print(mode_table(own.modes, f"{name}: {own.queries:,} queries"))
    if report.per_level_recall:
        console.print(_level_table(report.per_level_recall))
    if report.answers is not None:
        console.print(_answer_table(report.answers))
    if report.gates is not None:
        from treemem.evaluation.readers import gate_table

        console.print(gate_table(report.gates))
        for gate, holds in report.gates.verdicts.items():
            console.print(f"  {gate}: {'yes' if holds else 'no'}")
    judged = ", ".join(f"{kind} {count:,}" for kind, count in report.judged_by.items())
    encoded = f"; a query is encoded in {report.encode_ms:.1f} ms" if report.encode_ms else ""
    for note in (f"shares in %; queries judged by {judged}{encoded}", *report.notes):
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
