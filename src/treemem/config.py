"""Settings of a memory and of a search, checked when they are made."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, SupportsIndex, get_args

from treemem.errors import InputError

FORMAT_VERSION = 2
"""Version of the stored layout; a memory of a higher one is refused."""

Mode = Literal["deep", "hybrid", "walk", "exact", "bm25", "exact+bm25", "auto"]
MODES: tuple[Mode, ...] = get_args(Mode)
Lexical = Literal["signatures", "index"]
LEXICAL: tuple[Lexical, ...] = get_args(Lexical)

MAX_QUERY_EMBEDDINGS = 32
"""A long query is cut into at most this many embeddings, spread evenly over it."""


def _require(ok: bool, field: str, value: object, accepted: str) -> None:
    if not ok:
        raise InputError(f"{field} = {value!r}: it must be {accepted}")


def _require_whole(field: str, value: object, low: int, high: float, accepted: str) -> None:
    _require(isinstance(value, SupportsIndex) and low <= value.__index__() <= high, field, value, accepted)


def cache_folder() -> Path:
    """Where treemem keeps what it can make again: $TREEMEM_CACHE, else the system's folder for a user's caches."""
    import platformdirs

    chosen = os.environ.get("TREEMEM_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("treemem")


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
        _require_whole("chunk_tokens", self.chunk_tokens, 8, 510, "a whole number from 8 to 510")
        _require_whole("fanout", self.fanout, 2, 1024, "a whole number from 2 to 1024")
        _require_whole("spill", self.spill, 1, 8, "a whole number from 1 to 8")
        _require(0 <= self.alpha <= 10, "alpha", self.alpha, "from 0 to 10")
        _require_whole("seed", self.seed, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1")
        _require(len(self.language) == 2 and self.language.isalpha(), "language", self.language, "an ISO 639-1 code")


@dataclass(frozen=True)
class SearchConfig:
    """How a memory is searched."""

    mode: Mode = "hybrid"
    """`walk`: a walk by vectors; `hybrid`: by vectors and words; `deep`: hybrid, then token states; `exact` and
    `exact+bm25`: every chunk, by vectors or by both; `bm25`: words alone; `auto`: `exact+bm25` where that takes
    hardly longer than `hybrid` (up to 1,024 chunks), `hybrid` elsewhere."""
    k: int = 10
    """How many hits to return, of the candidates: all chunks for `exact` and `exact+bm25`, all with a word of the query
    for `bm25`, those that the walk scored for `walk`, these and the best of the index for `hybrid` and `deep`."""
    beam: int = 32
    """How many nodes a walk keeps per level."""
    beside: int = 4
    """How many chunks before and after each of the walk's best `beam` chunks, in the same document, are scored too."""
    bm25_weight: float | None = None
    """lambda: what the best BM25 score of a query is worth beside a cosine; None: what was learned, 0.4 untrained."""
    lexical: Lexical = "index"
    """Where `hybrid` and `deep` look for words. `index`: the walk goes by vectors, and the best chunks of an inverted
    index of all chunks are added; `signatures`: on the way down, among the words below each node, in a quarter of the
    time or less. What stands first is the same; a decoder, which ranks the best 64 anew, gains more from the first."""
    bm25_candidates: int = 256
    """How many chunks of the inverted index are candidates, where it is asked."""
    decoder: bool = True
    """Whether a trained decoder ranks the best 64 candidates anew, by both signals, where the memory has one. Without
    it `walk` and `exact` rank by cosines alone."""
    token_weight: float | None = None
    """mu: what the late interaction is worth beside the sum of the other two; None: what was learned, 2 untrained."""
    deep_candidates: int = 16
    """How many candidates have their tokens compared in mode `deep`."""

    def __post_init__(self) -> None:
        _require(self.mode in MODES, "mode", self.mode, "one of " + ", ".join(MODES))
        _require(self.lexical in LEXICAL, "lexical", self.lexical, "one of " + ", ".join(LEXICAL))
        _require_whole("beam", self.beam, 1, 4096, "a whole number from 1 to 4096")
        _require_whole("beside", self.beside, 0, 64, "a whole number from 0 to 64")
        for field in ("k", "bm25_candidates", "deep_candidates"):
            _require_whole(field, getattr(self, field), 1, math.inf, "a whole number, at least 1")
        for field in ("bm25_weight", "token_weight"):
            value = getattr(self, field)
            if value is None:
                continue
            _require(0 <= value < math.inf, field, value, "a finite number, 0 or more")
