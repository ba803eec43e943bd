"""What readers are trained and judged on: questions with answers, what a memory's own search gave for each, texts.

Examples are plain data: they can be gathered where the memory is and be trained on where the GPU is.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from jaxtyping import Float16, Int64

from treemem.config import SearchConfig
from treemem.errors import InputError
from treemem.hierarchy.context import GatheredVectors, PassageText, joined, passages
from treemem.hierarchy.embed import Encoder, EncoderInfo
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.segment import cut
from treemem.types import Document, GatheredLevel, Progress, Span, no_progress

HITS = 10
"""How many of the best chunks are kept of a search."""
PASSAGE_CHARACTERS = 8000
"""Most characters of an example's passages."""
GOLD_CHARACTERS = 2500
"""Most characters of the text that holds the answer."""
NODES = 4
"""How many nodes of each upper level are kept."""
EXAMPLES_FILE = "examples.json.zst"
ARRAYS_FILE = "vectors.npz"
ENCODE_BATCH = 2048


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question, answers that count as right, and where they stand."""

    text: str
    answers: tuple[str, ...]
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    """By document: characters that hold the answer; empty where that is not known."""


@dataclass(frozen=True)
class Example:
    """A question and what a search of one memory gave for it; numbers are rows of `Examples`."""

    question: str
    answers: tuple[str, ...]
    passages: tuple[PassageText, ...]
    """Best first."""
    gold: tuple[PassageText, ...]
    """What holds the answer, empty where that is not known."""
    hits: tuple[tuple[int, float], ...]
    """Rows of the best chunks and their scores, best first."""
    nodes: tuple[tuple[int, int, int, float], ...]
    """Level, row, rank and score of nodes, coarse to fine."""


@dataclass
class Examples:
    """Examples of one encoder with the chunks and nodes that they name."""

    encoder: EncoderInfo
    rows: list[Example]
    texts: list[str]
    """Of chunks; a document's chunks that follow each other stand one after the other."""
    follows: list[bool]
    """Whether a chunk goes on where the one before it ended."""
    chunks: Float16[np.ndarray, "chunks d"]
    """Their search vectors; none where there are no questions."""
    nodes: Float16[np.ndarray, "nodes d"]
    windows: Float16[np.ndarray, "windows d"] | None = None
    """Reader vectors of all chunks, those of chunk i are `windows[ends[i - 1]:ends[i]]`; None until `read`."""
    ends: Int64[np.ndarray, " chunks"] | None = None
    pieces: list[list[Span]] = field(default_factory=list)
    """Characters of each chunk's windows; none until `read`."""

    def read(self, encoder: Encoder, progress: Progress = no_progress) -> None:
        """Make the reader vectors of all chunks.

        Raises InputError where the encoder is another one.
        """
        if encoder.info.weights != self.encoder.weights:
            raise InputError(
                f"examples: they are of encoder {self.encoder.name!r} ({self.encoder.weights[:8]}), not of "
                f"{encoder.name!r} ({encoder.info.weights[:8]})"
            )
        parts: list[np.ndarray] = []
        pieces: list[list[Span]] = []
        for start in range(0, len(self.texts), ENCODE_BATCH):
            progress("encoding", start, len(self.texts))
            for vectors, spans in encoder.reader_windows(self.texts[start : start + ENCODE_BATCH]):
                parts.append(vectors.astype(np.float16))
                pieces.append(spans)
        self.pieces = pieces
        self.ends = np.cumsum([len(own) for own in parts], dtype=np.int64)
        self.windows = np.concatenate([*parts, np.empty((0, encoder.dimension), np.float16)])

    def windows_of(self, chunk: int) -> Float16[np.ndarray, "windows d"]:
        """Reader vectors of a chunk."""
        if self.windows is None or self.ends is None:
            raise InputError("examples: their reader vectors are not made yet; call read first")
        return self.windows[(self.ends[chunk - 1] if chunk else 0) : self.ends[chunk]]

    def given(self, example: Example, shape: tuple[int, int, int]) -> GatheredVectors:
        """What a model is given of an example: as `treemem.hierarchy.context.gather_vectors`."""
        nodes, chunks, more = shape
        parts = [
            (self.nodes[row], level, row, 0, rank, score) for level, row, rank, score in example.nodes if rank < nodes
        ]
        parts += [
            (self.chunks[row], 1, row, 0, rank, score)
            for rank, (row, score) in enumerate(example.hits)
            if chunks <= rank < chunks + more
        ]
        parts += [part for rank, hit in enumerate(example.hits[:chunks]) for part in self.parts(*hit, rank)]
        return joined(parts, self.chunks.shape[1])

    def parts(self, chunk: int, score: float, rank: int) -> list[tuple[np.ndarray, int, int, int, int, float]]:
        """The windows of a chunk, for `joined`."""
        return [(vector, 0, chunk, place, rank, score) for place, vector in enumerate(self.windows_of(chunk))]

    def take(self, rows: Iterable[int]) -> Examples:
        """The same with some of the examples."""
        return replace(self, rows=[self.rows[row] for row in rows])

    @property
    def digest(self) -> str:
        """By which an interrupted training knows its examples again."""
        hashed = hashlib.blake2b(self.encoder.weights.encode(), digest_size=16)
        for row in self.rows:
            hashed.update(repr((row.question, row.answers, row.hits)).encode())
        for text in self.texts:
            hashed.update(repr(text).encode())
        return hashed.hexdigest()

    # ---- files

    def save(self, folder: str | Path) -> None:
        """Write everything but the reader vectors, which are made anew.

        Raises InputError where the folder cannot be written.
        """
        folder = Path(folder)
        document = {
            "encoder": vars(self.encoder),
            "rows": [
                {
                    "question": row.question,
                    "answers": row.answers,
                    "passages": [[own.title, own.text] for own in row.passages],
                    "gold": [[own.title, own.text] for own in row.gold],
                    "hits": row.hits,
                    "nodes": row.nodes,
                }
                for row in self.rows
            ],
            "texts": self.texts,
            "follows": self.follows,
        }
        arrays = io.BytesIO()
        np.savez(arrays, chunks=self.chunks, nodes=self.nodes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            packed = zstandard.ZstdCompressor(level=10).compress(json.dumps(document).encode())
            (folder / EXAMPLES_FILE).write_bytes(packed)
            (folder / ARRAYS_FILE).write_bytes(arrays.getvalue())
        except OSError as error:
            raise InputError(f"{folder}: examples cannot be written there ({error})") from error

    @classmethod
    def load(cls, folder: str | Path) -> Examples:
        """Read what `save` wrote.

        Raises InputError where there is nothing of that kind.
        """
        folder = Path(folder)
        try:
            packed = (folder / EXAMPLES_FILE).read_bytes()
            document = json.loads(zstandard.ZstdDecompressor().decompress(packed))
            arrays = np.load(folder / ARRAYS_FILE)
            rows = [
                Example(
                    row["question"],
                    tuple(row["answers"]),
                    tuple(PassageText(*own) for own in row["passages"]),
                    tuple(PassageText(*own) for own in row["gold"]),
                    tuple((int(chunk), float(score)) for chunk, score in row["hits"]),
                    tuple((int(a), int(b), int(c), float(d)) for a, b, c, d in row["nodes"]),
                )
                for row in document["rows"]
            ]
            encoder = EncoderInfo(**document["encoder"])
            return cls(encoder, rows, document["texts"], document["follows"], arrays["chunks"], arrays["nodes"])
        except (OSError, ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
            raise InputError(f"{folder}: no examples that can be read ({error})") from error


def gather_examples(
    memory: Memory,
    questions: Sequence[AnsweredQuestion],
    search: SearchConfig | None = None,
    progress: Progress = no_progress,
) -> Examples:
    """Search a memory for every question and keep what a reader is given.

    Args:
        memory: whose search, mistakes included, the reader is to live with.
        questions: with answers.
        search: how; mode `hybrid` where nothing is said.
        progress: told how many were searched.
    """
    image = memory.image
    search = replace(search or SearchConfig(), k=HITS)
    used: dict[int, int] = {}
    places: dict[tuple[int, int], int] = {}
    found: list[tuple[AnsweredQuestion, tuple[GatheredLevel, ...], list[tuple[int, float]], Any]] = []
    for start in range(0, len(questions), 64):
        progress("searching", start, len(questions))
        some = questions[start : start + 64]
        for question, result in zip(some, memory.search_many([own.text for own in some], search), strict=True):
            shown = passages(image, result.hits, lambda text: len(text), PASSAGE_CHARACTERS, 0)
            texts = tuple(PassageText(own.document.title, own.text) for own in shown)
            hits = [(hit.chunk, hit.score) for hit in result.hits]
            used.update((chunk, 0) for chunk, _ in hits)
            for level in result.gathered:
                if level.level > 1:
                    places.update({(level.level, own.node): 0 for own in level.nodes[:NODES]})
            found.append((question, result.gathered, hits, texts))
    progress("searching", len(questions), len(questions))
    order = sorted(used)
    used = {chunk: row for row, chunk in enumerate(order)}
    places = {key: row for row, key in enumerate(sorted(places))}
    rows = []
    for question, gathered, hits, texts in found:
        nodes = tuple(
            (level.level, places[level.level, own.node], rank, own.score)
            for level in gathered
            if level.level > 1
            for rank, own in enumerate(level.nodes[:NODES])
        )
        own_hits = tuple((used[chunk], score) for chunk, score in hits)
        rows.append(Example(question.text, question.answers, texts, _gold(memory, question), own_hits, nodes))
    blocks, width = image.tree.levels[-1], image.tree.dimension
    chunks = (blocks.rows[order] * blocks.scales[order, None]).astype(np.float16).reshape(len(order), width)
    levels = {level: image.node_vectors(level) for level in {level for level, _ in places}}
    vectors = [levels[level][image.places(level)[node]] for level, node in places]
    ends = set(image.chunk_ends.tolist())
    follows = [i > 0 and order[i - 1] == chunk - 1 and chunk not in ends for i, chunk in enumerate(order)]
    return Examples(
        EncoderInfo(**memory.store.info().encoder),
        rows,
        [image.chunk_text(chunk) for chunk in order],
        follows,
        chunks,
        np.array(vectors, np.float16).reshape(len(vectors), width),
    )


def _gold(memory: Memory, question: AnsweredQuestion) -> tuple[PassageText, ...]:
    """The text that holds the answer."""
    out, room = [], GOLD_CHARACTERS
    for document, spans in question.spans.items():
        number = memory.image.number_of(document)
        if number is None:
            continue
        text, title = memory.image.text(number), memory.image.reference(number).title
        for begin, end in spans:
            own = text[begin : min(end, begin + room)]
            if own.strip():
                out.append(PassageText(title, own))
                room -= len(own)
            if room <= 0:
                return tuple(out)
    return tuple(out)


def text_examples(
    documents: Iterable[Document], encoder: Encoder, limit: int = 126, language: str = "en", most: int | None = None
) -> Examples:
    """Chunks of documents without questions, for learning to read vectors back.

    Args:
        documents: in order.
        encoder: whose tokenizer cuts them.
        limit: most tokens of a chunk.
        language: ISO 639-1 code.
        most: stop after so many chunks.
    """
    texts: list[str] = []
    follows: list[bool] = []
    for document in documents:
        own = [document.text[begin:end] for begin, end in cut(document.text, encoder.token_spans, limit, language)]
        texts += own
        follows += [i > 0 for i in range(len(own))]
        if most is not None and len(texts) >= most:
            break
    nothing = np.empty((0, encoder.dimension), np.float16)
    return Examples(encoder.info, [], texts, follows, nothing, nothing)
