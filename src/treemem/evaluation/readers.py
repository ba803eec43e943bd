"""What a reader is worth: the gates that say whether a model should read a memory as text, as vectors or as both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich.table import Table

from treemem.config import SearchConfig
from treemem.errors import InputError
from treemem.evaluation.dataset import EvalQuery, EvalSet
from treemem.evaluation.metrics import contained, exact_match, token_f1
from treemem.evaluation.questions import HELD_OUT_SPLITS
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.reader import How, ReadingModel
from treemem.training.examples import AnsweredQuestion, Examples, gather_examples
from treemem.training.reader import CONDITIONS, replies
from treemem.types import Progress, no_progress

TEXT_TOKENS = 900
"""Most tokens of passages in a prompt."""


@dataclass(frozen=True)
class ReaderFigures:
    """Replies under one condition, means over questions; shares from 0 to 1."""

    exact_match: float
    f1: float
    contained: float


@dataclass(frozen=True)
class Gates:
    """What came of every condition, and what follows."""

    questions: int
    vectors: float
    """Mean number of embeddings that a prompt holds."""
    text_tokens: float
    """Mean number of tokens that its passages take."""
    figures: dict[str, ReaderFigures]

    @property
    def verdicts(self) -> dict[str, bool]:
        """The gates: what must hold for a way of reading to be of use."""
        f1 = {name: own.f1 for name, own in self.figures.items()}
        rules = {
            "vectors beat no context": ("vectors", "no context"),
            "vectors beat shuffled vectors": ("vectors", "shuffled"),
            "both do not lose to text": ("both", "text"),
            "text beats vectors": ("text", "vectors"),
        }
        return {
            name: f1[one] >= f1[two] if name.startswith("both") else f1[one] > f1[two]
            for name, (one, two) in rules.items()
            if one in f1 and two in f1
        }

    @property
    def best(self) -> How:
        """The way of reading that a reader is asked for where none is named: the best of those that pass the gates."""
        passed = self.verdicts
        ways: list[How] = ["text"]  # first: it wins where others are as good
        if passed.get("vectors beat no context") and passed.get("vectors beat shuffled vectors"):
            ways.append("vectors")
        if passed.get("both do not lose to text"):
            ways.append("both")
        return max(ways, key=lambda way: self.figures[way].f1 if way in self.figures else 0.0)

    def to_json(self) -> dict[str, object]:
        """For programs."""
        figures = {name: asdict(own) for name, own in self.figures.items()}
        shape = {"questions": self.questions, "vectors": self.vectors, "text_tokens": self.text_tokens}
        return {**shape, "conditions": figures, "gates": self.verdicts, "best": self.best}


def answered(queries: Sequence[EvalQuery]) -> list[AnsweredQuestion]:
    """The queries that have answers, as readers are trained on them."""
    return [AnsweredQuestion(query.text, query.answers, query.spans) for query in queries if any(query.answers)]


def answered_questions(whole: EvalSet) -> tuple[list[AnsweredQuestion], EvalSet | None]:
    """A set's questions with answers to train on, and those of its held-out split, None where it has none.

    Where there is no split `train`, the questions of all splits but the held-out and the test one are trained on.

    Raises InputError where no question has answers, or none is left to train on.
    """
    queries = whole.with_answers().queries
    splits = {query.split for query in queries}
    held_out = next((split for split in HELD_OUT_SPLITS if split in splits), None)
    kept = {"train"} if "train" in splits else splits - {held_out, "test"}
    train = answered([query for query in queries if query.split in kept])
    if not train:
        raise InputError(f"{whole.folder}: its questions are all held out ({', '.join(sorted(map(str, splits)))})")
    judges = None if held_out is None else replace(whole, queries=tuple(q for q in queries if q.split == held_out))
    return train, judges


def judge(
    reading: ReadingModel,
    examples: Examples,
    conditions: Sequence[str] = CONDITIONS,
    *,
    batch_tokens: int = 16384,
    progress: Progress = no_progress,
    said: dict[str, list[str]] | None = None,
) -> Gates:
    """Ask every question under every condition.

    Args:
        reading: a model with a reader.
        examples: whose reader vectors are made.
        conditions: of `treemem.training.reader.CONDITIONS`; `gold` is left out where it is not known, and what
            the reader has not learned to read.
        batch_tokens: most tokens of the prompts of a batch.
        progress: told how many replies there are.
        said: is given the replies, by condition.
    """
    own = reading.reader.config
    shape = (own.nodes, own.chunks, own.more)
    rows = examples.rows
    figures = {}
    for condition in conditions:
        if condition == "gold" and not all(row.gold for row in rows):
            continue
        if {"shuffled": "vectors", "vectors": "vectors", "both": "both"}.get(condition, "text") not in own.reads:
            continue
        given = replies(
            reading, examples, condition, text_tokens=TEXT_TOKENS, batch_tokens=batch_tokens, progress=progress
        )
        if said is not None:
            said[condition] = given
        judged = [
            (exact_match(reply, row.answers), token_f1(reply, row.answers), contained(reply, row.answers))
            for reply, row in zip(given, rows, strict=True)
        ]
        figures[condition] = ReaderFigures(*(round(float(mean), 4) for mean in np.mean(judged, 0)))
    tokens = [
        min(TEXT_TOKENS, sum(len(reading.model.encode(passage.text)) for passage in row.passages[: own.chunks]))
        for row in rows
    ]
    vectors = [len(examples.given(row, shape)) for row in rows]
    return Gates(len(rows), round(float(np.mean(vectors)), 1), round(float(np.mean(tokens)), 1), figures)


def evaluate_readers(
    memory: Memory,
    eval_set: EvalSet,
    reading: ReadingModel,
    *,
    beam: int = 32,
    max_queries: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Gates:
    """The gates on a data set, by searches as `ask` makes them.

    Raises InputError where no query has answers.
    """
    queries = eval_set.with_answers().sample(max_queries, seed).queries
    search = SearchConfig(mode="deep", beam=beam)
    examples = gather_examples(memory, answered(queries), search, progress)
    examples.read(memory.encoder, progress)
    return judge(reading, examples, progress=progress)


def gate_table(gates: Gates, title: str = "") -> Table:
    """The gates for people."""
    table = Table(title=title or f"what the model is given, {gates.questions:,} questions", title_justify="left")
    table.add_column("given")
    for name in ("exact", "F1", "contained"):
        table.add_column(name, justify="right")
    for name, own in gates.figures.items():
        table.add_row(name, *(f"{100 * value:.1f}" for value in (own.exact_match, own.f1, own.contained)))
    return table
