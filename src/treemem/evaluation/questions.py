"""Questions to train on from a data set in BEIR layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from treemem.errors import InputError
from treemem.evaluation.dataset import NO_SPLIT, EvalQuery, load_set
from treemem.training.questions import Question
from treemem.types import Progress, no_progress

HELD_OUT_SPLITS = ("dev", "validation", "val")


def training_questions(
    folder: str | Path, progress: Progress = no_progress
) -> tuple[list[Question], list[Question] | None]:
    """A set's questions to train on and, where it has a split for that, those that decide.

    Of a set with a split `train` only this one is trained on; a test split is never looked at. A set without splits is
    taken whole.

    Raises InputError as `load_set` does, and for a set that has splits but none to train on.
    """
    whole = load_set(folder, None, progress)
    splits = {query.split for query in whole.queries}
    if splits == {NO_SPLIT}:
        return questions_of(whole.queries), None
    if "train" not in splits:
        raise InputError(
            f"{folder}: its splits are {', '.join(sorted(splits))}; without train there is none to train on"
        )
    held_out = next((split for split in HELD_OUT_SPLITS if split in splits), None)
    train, judges = ([query for query in whole.queries if query.split == split] for split in ("train", held_out))
    return questions_of(train), questions_of(judges) or None


def questions_of(queries: Sequence[EvalQuery]) -> list[Question]:
    """Queries with their evidence, sections or documents as the answers' places."""
    return [
        Question(
            query.text,
            {
                document: None if query.judged_by == "documents" else query.spans[document]
                for document in (query.relevant if query.judged_by == "documents" else query.spans)
            },
        )
        for query in queries
    ]
