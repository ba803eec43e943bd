"""Stand-ins that cost nothing, for tests of what surrounds the models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from treemem.hierarchy.embed import Encoder, EncoderInfo, TokenStates
from treemem.types import Document, Span

_TOKEN = re.compile(r"\w+|[^\w\s]")


@cache
def _word_vector(word: str, dimension: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(word.lower().encode(errors="replace"), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)


class FakeEncoder(Encoder):
    """Encoder 1 without a model: a text's vector is the sum of random vectors of its words, so like words are near.

    Vectors depend on the words alone, never on what is encoded beside them.
    """

    def __init__(self, name: str = "fake", dimension: int = 32, longest: int = 510) -> None:
        self.name = name
        self.dimension = dimension
        self._longest = longest
        self.encoded = 0
        """How many texts were encoded so far."""

    @property
    def info(self) -> EncoderInfo:  # type: ignore[override]
        return EncoderInfo(self.name, self.dimension, hashlib.sha256(self.name.encode()).hexdigest()[:32])

    @property
    def longest(self) -> int:
        return self._longest

    @property
    def precision(self) -> str:  # type: ignore[override]
        return "float32"

    @property
    def on_gpu(self) -> bool:
        return False

    def token_spans(self, texts: list[str]) -> list[list[Span]]:
        return [[match.span() for match in _TOKEN.finditer(text)] for text in texts]

    def encode(self, texts: Sequence[str], *, precise: bool = False, fast: bool = False) -> np.ndarray:
        out = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in _TOKEN.findall(text)[: self.longest]:
                out[row] += _word_vector(word, self.dimension)
        self.encoded += len(texts)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)

    def encode_queries(self, texts: Sequence[str], *, fast: bool = False) -> tuple[np.ndarray, list[TokenStates]]:
        return self.encode(texts, precise=True), self.token_states(texts, precise=True)

    def token_states(self, texts: Sequence[str], *, precise: bool = False) -> list[TokenStates]:
        out = []
        for text in texts:
            spans = self.token_spans([text])[0][: self.longest]
            states = np.zeros((len(spans), self.dimension), np.float32)
            for row, (start, end) in enumerate(spans):
                vector = _word_vector(text[start:end], self.dimension)
                states[row] = vector / np.linalg.norm(vector)
            out.append(TokenStates(states, spans))
        return out


_TOPICS = ("harbour", "violin", "glacier", "parliament", "orchard", "telescope", "bakery", "railway", "coral", "desert")
_VERBS = ("describes", "measures", "repairs", "remembers", "paints", "counts", "follows", "forgets")


def documents(count: int, sentences: int = 6, seed: int = 0) -> list[Document]:
    """Documents of plain sentences, each about a topic of its own with some words that no other has."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        topic = _TOPICS[number % len(_TOPICS)]
        lines = [
            f"The {topic} number {number} {_VERBS[generator.integers(len(_VERBS))]} "
            f"{_TOPICS[generator.integers(len(_TOPICS))]} item{generator.integers(10 * count + 10)} on day {line}."
            for line in range(sentences)
        ]
        made.append(Document(f"doc-{number}", " ".join(lines), f"About {topic} {number}", {"number": number}))
    return made


def stored_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of a memory's store, by name."""
    from treemem.storage.store import Store

    store = Store.open(path)
    names = ["documents/text", "documents/text_ends", "documents/records", "documents/record_ends", "documents/hashes"]
    names += ["documents/chunk_ends", "documents/status", "chunks/spans", "chunks/encodings"]
    for level in range(2, len(store.info().levels) + 1):
        names += [f"levels/{level}/{part}" for part in ("children", "vectors")]
    return {name: store.read(name) for name in names}
