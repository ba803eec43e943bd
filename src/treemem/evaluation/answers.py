"""What the replies of a language model over a memory are worth."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import numpy as np

from treemem.evaluation.dataset import EvalQuery, EvalSet
from treemem.evaluation.metrics import contained, exact_match, token_f1
from treemem.evaluation.report import AnswerFigures
from treemem.types import Answer, Progress, no_progress

_MARK = re.compile(r"\[(\d+(?:\s*,\s*\d+)*)\]")


def evaluate_answers(
    eval_set: EvalSet,
    ask: Callable[[EvalQuery], Answer],
    *,
    max_queries: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> AnswerFigures:
    """Ask the questions that have gold answers and compare.

    Args:
        eval_set: the queries.
        ask: gives a memory's reply to a query.
        max_queries: at most so many, drawn at random from those with answers.
        seed: of the drawing.
        progress: told how many were asked.

    Raises InputError where no query has answers.
    """
    queries = eval_set.with_answers().sample(max_queries, seed).queries
    rows = []
    for done, query in enumerate(queries):
        progress("asking", done, len(queries))
        start = time.perf_counter()
        answer = ask(query)
        rows.append((*_judge(query, answer), time.perf_counter() - start))
    progress("asking", len(queries), len(queries))
    return AnswerFigures(len(queries), *(float(mean) for mean in np.mean(rows, 0)))


def _judge(query: EvalQuery, answer: Answer) -> tuple[float, ...]:
    """Exact match, F1, contained, cited, grounded, extractive, refused: in the order of `AnswerFigures`."""
    reply = without_marks(answer)
    return (
        exact_match(reply, query.answers),
        token_f1(reply, query.answers),
        contained(reply, query.answers),
        float(_cites_right(query, answer)),
        float(answer.grounded),
        float(answer.extractive),
        float(not answer.found),
    )


def without_marks(answer: Answer) -> str:
    """The reply without its citation marks, which are no words of it; other numbers in brackets stay."""
    known = {passage.number for passage in answer.context.passages} | {own.number for own in answer.citations}

    def strip(match: re.Match[str]) -> str:
        return " " if {int(number) for number in match[1].split(",")} <= known else match[0]

    return _MARK.sub(strip, answer.text)


def _cites_right(query: EvalQuery, answer: Answer) -> bool:
    for citation in answer.citations:
        start, end = citation.span
        if query.judged_by == "documents":
            if citation.document.id in query.relevant:
                return True
        elif any(start < last and first < end for first, last in query.spans.get(citation.document.id, ())):
            return True
    return False
