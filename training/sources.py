"""Questions from a memory itself, for those who have none: headings, a language model's, and exact search's answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from treemem.config import SearchConfig
from treemem.errors import InputError
from treemem.hierarchy.generate import LanguageModel
from treemem.hierarchy.prompt import Message
from treemem.hierarchy.walk import Searcher
from treemem.storage.image import Image
from treemem.training.questions import Question
from treemem.types import Progress, Span, no_progress

SOURCES = ("labelled", "headings", "written", "distilled")
_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_GENERAL = 3
"""A heading that stands in at least so many documents says nothing without its document's title."""
_DISTILLED = 10
"""How many of exact search's best chunks count as right."""
_WRITE = "Write a question that this passage answers."
# Small models write "What is the passage about?" unless they are shown what is wanted.
_SHOWN = (
    (
        "The harbour of Genoa was deepened in 1606, after two grain ships had run aground at its mouth.",
        "Why was the harbour of Genoa deepened?",
    ),
    (
        "Aspirin keeps platelets from sticking together. Small doses are given to people who have had a heart attack.",
        "How does aspirin act on platelets?",
    ),
    (
        "Mira took the lamp from the shelf and hid it under the bridge, so that her uncle could not sell it.",
        "Where did Mira hide the lamp?",
    ),
)
_ROUND_TRIP = 10
"""A written question is kept if its chunk is among so many hits."""
_BATCH = 64


def headings(image: Image, most: int | None = None, seed: int = 0) -> list[Question]:
    """The documents' titles, and their headings with the section below each as the answer.

    Args:
        image: of the memory.
        most: at most so many, drawn at random.
        seed: of the drawing.

    Returns:
        One question for each title that is not just the document's id, one for each heading; Markdown's `#` marks them.
    """
    found: list[tuple[str, str, str, Span]] = []
    out: list[Question] = []
    documents_with: dict[str, set[str]] = {}
    for number in range(image.documents):
        reference = image.reference(number)
        title = reference.title.strip()
        if title and title != reference.id:
            out.append(Question(title, {reference.id: None}, "headings"))
        for heading, span in _sections(image.text(number)):
            found.append((reference.id, title, heading, span))
            documents_with.setdefault(heading.lower(), set()).add(reference.id)
    for document, title, heading, span in found:
        general = len(documents_with[heading.lower()]) >= _GENERAL
        text = f"{title}: {heading}" if general and title else heading
        out.append(Question(text, {document: (span,)}, "headings"))
    return _drawn(out, most, seed)


def _sections(text: str) -> Iterator[tuple[str, Span]]:
    """Headings with the characters from behind each to the next one that is not below it."""
    marks = [(len(mark[1]), mark[2], mark.start(), mark.end()) for mark in _HEADING.finditer(text)]
    for number, (depth, heading, _, end) in enumerate(marks):
        stop = next((start for other, _, start, _ in marks[number + 1 :] if other <= depth), len(text))
        if text[end:stop].strip():
            yield heading, (end, stop)


def written(
    searcher: Searcher, model: LanguageModel, most: int, seed: int = 0, progress: Progress = no_progress
) -> list[Question]:
    """Questions that a language model writes about chunks, kept if hybrid search finds the chunk again.

    Args:
        searcher: of the memory.
        model: writes.
        most: about how many chunks questions are written.
        seed: of the choice of chunks.
        progress: told about questions written.

    Raises ModelError where the model fails.
    """
    image = searcher.image
    chunks = np.sort(np.random.default_rng(seed).permutation(image.chunks)[:most])
    drafts: list[tuple[int, str]] = []
    for done, chunk in enumerate(chunks):
        progress("writing questions", done, len(chunks))
        title = image.reference(int(image.document_of(np.array([chunk]))[0])).title
        passage = f"{title}\n{image.chunk_text(int(chunk))}".strip()
        text = "".join(model.stream(_asked_for(passage), 40)).strip().split("\n")[0].strip(' "')
        if text.endswith("?") and 3 <= len(text.split()) <= 30:
            drafts.append((int(chunk), text))
    out = []
    config = SearchConfig(k=_ROUND_TRIP)
    for start in range(0, len(drafts), _BATCH):
        part = drafts[start : start + _BATCH]
        progress("checking questions", start, len(drafts))
        for (chunk, text), query in zip(part, searcher.embed([text for _, text in part]), strict=True):
            if chunk in searcher.rank(query, config).chunks[:_ROUND_TRIP]:
                out.append(_about(image, [chunk], text, "written"))
    return out


def _asked_for(passage: str) -> list[Message]:
    """A prompt for a question, after some that were written."""
    turns = []
    for text, question in _SHOWN:
        turns += [Message("user", f"{text}\n\n{_WRITE}"), Message("assistant", question)]
    return [*turns, Message("user", f"{passage}\n\n{_WRITE}")]


def distilled(searcher: Searcher, texts: list[str], progress: Progress = no_progress) -> list[Question]:
    """Texts with what exact search finds for them as right: they teach the levels above the chunks the way there.

    They say nothing about level 1, whose own ranking they repeat.
    """
    out = []
    config = SearchConfig(mode="exact", k=_DISTILLED, decoder=False)
    for start in range(0, len(texts), _BATCH):
        progress("searching exactly", start, len(texts))
        part = [text for text in texts[start : start + _BATCH] if text.strip()]
        for query in searcher.embed(part):
            chunks = searcher.rank(query, config).chunks[:_DISTILLED]
            out.append(_about(searcher.image, [int(chunk) for chunk in chunks], query.text, "distilled"))
    return out


def sentences(image: Image, most: int, seed: int = 0) -> list[str]:
    """First sentences of chunks drawn at random: texts to distil exact search with where there are no headings."""
    if image.chunks == 0:
        raise InputError(f"{image.folder.parent.parent}: the memory is empty; add documents before training")
    chunks = np.random.default_rng(seed).permutation(image.chunks)[:most]
    texts = (" ".join(image.chunk_text(int(chunk)).split()) for chunk in chunks)
    return [re.split(r"(?<=[.!?]) ", text)[0][:200] for text in texts]


def _about(image: Image, chunks: list[int], text: str, source: str) -> Question:
    targets: dict[str, tuple[Span, ...]] = {}
    for chunk in chunks:
        document = image.reference(int(image.document_of(np.array([chunk]))[0])).id
        targets[document] = (*targets.get(document, ()), image.span(chunk))
    return Question(text, targets, source)


def _drawn(questions: list[Question], most: int | None, seed: int) -> list[Question]:
    if most is None or most >= len(questions):
        return questions
    kept = np.sort(np.random.default_rng(seed).permutation(len(questions))[:most])
    return [questions[i] for i in kept]
