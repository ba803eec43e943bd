"""Questions to train on: where they come from, and which chunks of a memory are right for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64

from treemem.errors import InputError
from treemem.hierarchy.walk import Searcher
from treemem.types import Progress, Span, no_progress

BM25_KEPT = 32
"""How many of BM25's best chunks are kept for each question."""
EMBED_BATCH = 1024


@dataclass(frozen=True)
class Question:
    """A text and where in the memory its answer stands."""

    text: str
    targets: Mapping[str, tuple[Span, ...] | None]
    """By document id: spans of characters that answer, None where the whole document does."""
    source: str = "labelled"


@dataclass(frozen=True)
class Pool:
    """Questions resolved against one memory: n of them, each with at least one right chunk."""

    texts: tuple[str, ...]
    sources: tuple[str, ...]
    vectors: Float32[np.ndarray, "n d"]
    """What encoder 1 gave; of a question longer than a chunk, for its first piece."""
    right_ends: Int64[np.ndarray, " n"]
    right: Int32[np.ndarray, " _"]
    """Question i's right chunks are `right[right_ends[i - 1]:right_ends[i]]`, sorted."""
    right_documents: tuple[frozenset[int], ...]
    bm25_chunks: Int32[np.ndarray, "n kept"]
    """BM25's best chunks, -1 where there are fewer."""
    bm25_scores: Float32[np.ndarray, "n kept"]
    """Their scores as shares of the best one's."""
    bm25_best: Float32[np.ndarray, " n"]
    """The best one's score, 0 where no chunk has a word of the question."""

    def __len__(self) -> int:
        return len(self.texts)

    def right_of(self, question: int) -> Int32[np.ndarray, " right"]:
        """The right chunks of a question."""
        return self.right[(self.right_ends[question - 1] if question else 0) : self.right_ends[question]]

    def take(self, rows: Int64[np.ndarray, " m"]) -> Pool:
        """Some of the questions, in this order."""
        right = [self.right_of(int(row)) for row in rows]
        return Pool(
            tuple(self.texts[row] for row in rows),
            tuple(self.sources[row] for row in rows),
            self.vectors[rows],
            np.cumsum([len(own) for own in right], dtype=np.int64),
            np.concatenate([*right, np.empty(0, np.int32)]),
            tuple(self.right_documents[row] for row in rows),
            self.bm25_chunks[rows],
            self.bm25_scores[rows],
            self.bm25_best[rows],
        )


def read_pairs(path: str | Path) -> list[Question]:
    """Read questions from a file of JSON lines.

    A line is `{"query": TEXT, "document": ID}`, with `"start"` and `"end"` (characters of the document's text) where
    the answer's place is known, or `{"query": TEXT, "evidence": [{"doc": ID, "start": 0, "end": 9}, …]}` for several.

    Raises InputError for a line that is neither, naming it.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: it cannot be read ({error}); give a file of JSON lines in UTF-8") from error
    questions = [_question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise InputError(f'{path}: no questions in it; a line is {{"query": "…", "document": "ID"}}')
    return questions


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("query"), str):
        raise InputError(f'{where}: no "query"; a line is {{"query": "…", "document": "ID"}}')
    places = record.get("evidence")
    if places is None:
        places = [{**record, "doc": record.get("document")}]
    if not isinstance(places, list) or not places:
        raise InputError(f'{where}: "evidence" is not a list of places; leave it out and give "document"')
    targets: dict[str, tuple[Span, ...] | None] = {}
    for place in places:
        document, span = _place(place, where)
        known = targets.get(document, ())
        targets[document] = None if span is None or known is None else (*known, span)
    return Question(record["query"], targets)


def _place(place: Any, where: str) -> tuple[str, Span | None]:
    if not isinstance(place, dict) or not isinstance(place.get("doc"), str):
        raise InputError(f'{where}: no "document" id')
    if "start" not in place and "end" not in place:
        return place["doc"], None
    start, end = place.get("start"), place.get("end")
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise InputError(f"{where}: start {start!r} and end {end!r} are no span of characters")
    return place["doc"], (start, end)


def resolve(searcher: Searcher, questions: Iterable[Question], progress: Progress = no_progress) -> Pool:
    """Find each question's right chunks, encode it and ask BM25; questions without a right chunk are left out.

    Args:
        searcher: of the memory, with its encoder.
        questions: from any sources.
        progress: told about questions encoded.

    Raises InputError where no question is left.
    """
    image = searcher.image
    kept: list[Question] = []
    right: list[np.ndarray] = []
    documents: list[frozenset[int]] = []
    numbers: dict[str, int | None] = {}
    given = 0
    for question in questions:
        given += 1
        for document in question.targets:
            if document not in numbers:
                numbers[document] = image.number_of(document)
        targets = {n: spans for d, spans in question.targets.items() if (n := numbers[d]) is not None}
        own = [_right(searcher, number, spans) for number, spans in targets.items()]
        chunks = np.unique(np.concatenate(own)) if own else np.empty(0, np.int32)
        if len(chunks) and question.text.strip():
            kept.append(question)
            right.append(chunks.astype(np.int32))
            documents.append(frozenset(targets))
    if not kept:
        raise InputError(
            f"none of {given:,} questions has a right chunk in {image.folder.parent.parent}; "
            "are these questions about other documents?"
        )
    vectors = np.empty((len(kept), image.tree.dimension), np.float32)
    chunks = np.full((len(kept), BM25_KEPT), -1, np.int32)
    scores = np.zeros((len(kept), BM25_KEPT), np.float32)
    best = np.zeros(len(kept), np.float32)
    for start in range(0, len(kept), EMBED_BATCH):
        part = kept[start : start + EMBED_BATCH]
        progress("encoding questions", start, len(kept))
        for row, embedded in enumerate(searcher.embed([question.text for question in part], fast=True), start):
            vectors[row] = embedded.vectors[0]
        for row, question in enumerate(part, start):
            found, values = image.lexical.best(image.lexical.query(question.text), min(BM25_KEPT, image.chunks))
            if len(found):
                best[row] = values[0]
                chunks[row, : len(found)], scores[row, : len(found)] = found, values / values[0]
    progress("encoding questions", len(kept), len(kept))
    return Pool(
        tuple(question.text for question in kept),
        tuple(question.source for question in kept),
        vectors,
        np.cumsum([len(own) for own in right], dtype=np.int64),
        np.concatenate(right),
        tuple(documents),
        chunks,
        scores,
        best,
    )


def _right(searcher: Searcher, document: int, spans: Sequence[Span] | None) -> np.ndarray:
    """The chunks of a document that overlap one of the spans, or all."""
    image = searcher.image
    own = image.chunks_of(document)
    chunks = np.arange(own.start, own.stop)
    if spans is None:
        return chunks
    places = np.asarray(image.spans[own.start : own.stop, :2])
    return chunks[[any(start < last and first < end for first, last in spans) for start, end in places]]


def split_by_document(pool: Pool, share: float, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide questions into those to train on and those held out, so that they have no document in common.

    Args:
        pool: the questions.
        share: of the questions that are held out, about.
        most: at most so many are held out, about.
        seed: of the drawing.

    Returns:
        Rows to train on, and rows held out: the questions of documents drawn at random. A question about documents of
        both kinds is in neither. Distilled ones, each about many documents, are drawn by themselves.
    """
    about = [
        frozenset([-1 - row]) if source == "distilled" else documents
        for row, (source, documents) in enumerate(zip(pool.sources, pool.right_documents, strict=True))
    ]
    of_document: dict[int, list[int]] = {}
    for row, documents in enumerate(about):
        for document in documents:
            of_document.setdefault(document, []).append(row)
    wanted = min(most, round(share * len(pool)))
    held_documents: set[int] = set()
    held: set[int] = set()
    for start in np.random.default_rng(seed).permutation(len(pool)):
        if len(held) >= wanted:
            break
        for document in about[start] - held_documents:
            held_documents.add(document)
            held |= {row for row in of_document[document] if about[row] <= held_documents}
    inside = np.array([documents <= held_documents for documents in about])
    apart = np.array([not documents & held_documents for documents in about])
    return np.flatnonzero(apart), np.flatnonzero(inside)
