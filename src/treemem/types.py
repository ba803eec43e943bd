"""The values that treemem takes and returns. They hold plain data and depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Span = tuple[int, int]
"""Half-open range of characters, (start, end)."""


@dataclass(frozen=True)
class Document:
    """What the user adds: the unit of adding, removing, masking and citing."""

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DocumentRef:
    """A stored document, named but not read."""

    id: str
    title: str


@dataclass(frozen=True)
class PathStep:
    """One node on the way from the top of the tree to a chunk."""

    level: int
    node: int
    score: float


@dataclass(frozen=True)
class TokenMatch:
    """A token of the query and the token of the text that answered it best."""

    query: Span
    text: Span
    """Characters of the document's text."""
    similarity: float


@dataclass(frozen=True)
class Hit:
    """A chunk that was found."""

    score: float
    document: DocumentRef
    span: Span
    """Characters of the document's text: `document.text[span[0]:span[1]] == text`."""
    text: str
    path: tuple[PathStep, ...]
    """From the top of the tree down to the chunk itself (level 1); in mode `bm25` only the chunk."""
    chunk: int
    matches: tuple[TokenMatch, ...] = ()
    """Which tokens answered which, in mode `deep` for the candidates whose tokens were compared."""

    def to_json(self) -> dict[str, Any]:
        """The documented JSON of `treemem search --json`."""
        out: dict[str, Any] = {
            "score": self.score,
            "document": asdict(self.document),
            "span": list(self.span),
            "text": self.text,
            "path": [asdict(step) for step in self.path],
        }
        if self.matches:
            out["matches"] = [asdict(match) for match in self.matches]
        return out


@dataclass(frozen=True)
class GatheredNode:
    """An element that a walk kept at one level."""

    node: int
    score: float
    label: str = ""
    """The most telling words of what lies below, where labels were asked for."""


@dataclass(frozen=True)
class GatheredLevel:
    """What a walk kept of one level, best first."""

    level: int
    size: int
    """How many elements the level has."""
    nodes: tuple[GatheredNode, ...]


@dataclass(frozen=True)
class SearchResult:
    """What one query found; iterating gives the hits, best first."""

    query: str
    hits: tuple[Hit, ...]
    gathered: tuple[GatheredLevel, ...]
    """Top-ranked nodes of all levels, coarse to fine; empty where no walk was made."""
    scored: int
    """How many vectors were scored."""
    ms: float
    """Milliseconds of searching, the encoding of the query left out."""

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON of `treemem search --json`."""
        return {"hits": [hit.to_json() for hit in self.hits], "scored": self.scored, "ms": self.ms}


@dataclass(frozen=True)
class Passage:
    """A run of one document's text that is put before the language model."""

    number: int
    document: DocumentRef
    span: Span
    text: str
    score: float


@dataclass(frozen=True)
class Context:
    """What an answer was made from."""

    levels: tuple[GatheredLevel, ...]
    """What the walk gathered, coarse to fine, with labels on the best nodes. A model is shown some of these labels."""
    passages: tuple[Passage, ...]
    """What the language model was shown, or what the quotes were taken from."""


@dataclass(frozen=True)
class Citation:
    """Where a part of an answer stands in the memory."""

    number: int
    document: DocumentRef
    span: Span
    text: str
    """The quoted characters: the document's text at `span`."""
    score: float


@dataclass(frozen=True)
class Answer:
    """A reply, what it cites and what it was made from."""

    text: str
    citations: tuple[Citation, ...]
    context: Context
    grounded: bool
    """Whether the content words of the reply stand in the passages."""
    extractive: bool
    """Whether the reply is quoted from the passages instead of generated."""
    found: bool
    """Whether the memory held anything relevant enough to answer from."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds, by step."""

    def to_json(self) -> dict[str, Any]:
        """The documented JSON of `treemem ask --json`."""
        return {
            "text": self.text,
            "grounded": self.grounded,
            "extractive": self.extractive,
            "found": self.found,
            "citations": [asdict(citation) for citation in self.citations],
            "context": asdict(self.context),
            "timings": dict(self.timings),
        }


Progress = Callable[[str, float, float | None], None]
"""Is told how far long work has come: a stage's name, what is done and, where known, of how much."""


def no_progress(stage: str, done: float, total: float | None) -> None:
    """Ignore progress."""
