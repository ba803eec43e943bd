"""Settings of a memory and of a search, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from treemem.errors import InputError

FORMAT_VERSION = 1
"""Version of the stored layout; a memory of a higher one is refused."""

Mode = Literal["deep", "hybrid", "walk", "exact", "bm25", "exact+bm25"]
MODES: tuple[Mode, ...] = get_args(Mode)

MAX_QUERY_EMBEDDINGS = 32
"""A long query is cut into at most this many embeddings, spread evenly over it."""


def _require(ok: bool, field: str, value: object, accepted: str) -> None:
    if not ok:
        raise InputError(f"{field} = {value!r}: it must be {accepted}")


@dataclass(frozen=True)
class TreeConfig:
    """How a memory is built. Stored with it."""

    chunk_tokens: int = 126
    """Most encoder tokens in a chunk, special tokens not counted."""
    fanout: int = 32
    """Most children of a node."""
    spill: int = 2
    """In how many level-2 nodes a chunk stands."""
    alpha: float = 0.25
    """How much of its document's vector is added to a chunk's."""
    seed: int = 0
    """Seed of the clustering."""
    language: str = "en"
    """ISO 639-1 code of the documents' language: where sentences end, how words are stemmed."""

    def __post_init__(self) -> None:
        _require(8 <= self.chunk_tokens <= 510, "chunk_tokens", self.chunk_tokens, "from 8 to 510")
        _require(2 <= self.fanout <= 1024, "fanout", self.fanout, "from 2 to 1024")
        _require(1 <= self.spill <= 8, "spill", self.spill, "from 1 to 8")
        _require(0 <= self.alpha <= 10, "alpha", self.alpha, "from 0 to 10")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "a non-negative integer")
        _require(len(self.language) == 2 and self.language.isalpha(), "language", self.language, "an ISO 639-1 code")


@dataclass(frozen=True)
class SearchConfig:
    """How a memory is searched."""

    mode: Mode = "hybrid"
    """`hybrid`: the walk's chunks and BM25's best; `deep`: hybrid, then token states; `walk`, `exact`: vectors."""
    k: int = 10
    """How many hits to return."""
    beam: int = 32
    """How many nodes a walk keeps per level."""
    bm25_weight: float = 0.4
    """lambda: what the best BM25 score of a query is worth beside a cosine."""
    bm25_candidates: int = 256
    """How many of BM25's best chunks are candidates."""
    token_weight: float = 2.0
    """mu: what the late interaction is worth beside the sum of the other two."""
    deep_candidates: int = 32
    """How many candidates have their tokens compared in mode `deep`."""

    def __post_init__(self) -> None:
        _require(self.mode in MODES, "mode", self.mode, "one of " + ", ".join(MODES))
        _require(self.k >= 1, "k", self.k, "at least 1")
        _require(1 <= self.beam <= 4096, "beam", self.beam, "from 1 to 4096")
        _require(self.bm25_weight >= 0, "bm25_weight", self.bm25_weight, "0 or more")
        _require(self.bm25_candidates >= 1, "bm25_candidates", self.bm25_candidates, "at least 1")
        _require(self.token_weight >= 0, "token_weight", self.token_weight, "0 or more")
        _require(self.deep_candidates >= 1, "deep_candidates", self.deep_candidates, "at least 1")
