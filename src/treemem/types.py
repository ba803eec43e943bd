"""The values that treemem takes and returns. They hold plain data and depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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
class Source:
    """A part of what a language model was given, or its own reply so far."""

    kind: Literal["vectors", "passage", "question", "template", "reply"]
    level: int | None = None
    """Of a vector: 0 for a window of a chunk's tokens, 1 for a chunk, from 2 on for a node."""
    element: int | None = None
    """Of a vector: the number of the node or chunk."""
    place: int | None = None
    """Of a window: which of its chunk."""
    number: int | None = None
    """Of a passage, from 1."""


def _name(source: Source, each: bool) -> str:
    if source.kind == "vectors":
        window = "" if source.level or source.place is None else f".{source.place}"
        return f"L{source.level} {source.element}{window}" if each else f"L{source.level}"
    if source.kind == "passage":
        return f"[{source.number}]"
    return "question" if source.kind == "question" else "rest"


@dataclass(frozen=True)
class Attribution:
    """Where a language model looked while it wrote a reply: shares of each token, which sum to 1.

    Attention says where a model looked, not why it said what it said (Jain and Wallace 2019).
    """

    reply: str
    """What the model wrote, also where quotes were given in its place."""
    tokens: tuple[str, ...]
    """Of the reply."""
    sources: tuple[Source, ...]
    attention: tuple[tuple[float, ...], ...]
    """[tokens, sources] Attention of the state that predicts a token, mean over heads and layers."""
    gradients: tuple[tuple[float, ...], ...] | None = None
    """[tokens, sources] Gradient times input: how far a token's logarithm of probability hangs on each source."""

    def grouped(self, *, gradients: bool = False, each: bool = False) -> dict[str, tuple[float, ...]]:
        """Shares of each token by groups of sources.

        They are `L3` and so on for the vectors of a level, `L0` for windows of chunks; `[1]` and so on for passages;
        `question`; `rest` for the template and the reply so far.

        Args:
            gradients: gradient times input in place of attention.
            each: every vector for itself: `L3 17` for node 17 of level 3, `L0 842.5` for window 5 of chunk 842.
        """
        columns: dict[str, list[int]] = {}
        for column, source in enumerate(self.sources):
            columns.setdefault(_name(source, each), []).append(column)
        last = ("question", "rest")
        columns = {name: columns[name] for name in (*(n for n in columns if n not in last), *last) if name in columns}
        rows = (self.gradients or ()) if gradients else self.attention
        return {name: tuple(sum(row[i] for i in own) for row in rows) for name, own in columns.items()}


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
    attribution: Attribution | None = None
    """Where the model looked, where that was asked for and a model was asked."""

    def to_json(self) -> dict[str, Any]:
        """The documented JSON of `treemem ask --json`; with an attribution that of `treemem attribute --json`."""
        found = {
            "text": self.text,
            "grounded": self.grounded,
            "extractive": self.extractive,
            "found": self.found,
            "citations": [asdict(citation) for citation in self.citations],
            "context": asdict(self.context),
            "timings": dict(self.timings),
        }
        return found if self.attribution is None else {**found, "attribution": asdict(self.attribution)}


Progress = Callable[[str, float, float | None], None]
"""Is told how far long work has come: a stage's name, what is done and, where known, of how much."""


def no_progress(stage: str, done: float, total: float | None) -> None:
    """Ignore progress."""
