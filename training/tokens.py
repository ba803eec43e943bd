"""Training level 0: which of a question's best candidates is right, by their token states; encoder 1 stays frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64
from torch import Tensor

from treemem.config import SearchConfig
from treemem.errors import InputError
from treemem.hierarchy.embed import Encoder, TokenStates
from treemem.hierarchy.tokens import TokenHead, token_features, token_idf
from treemem.hierarchy.walk import Searcher
from treemem.training.corpus import Corpus
from treemem.training.fit import FitConfig, fit
from treemem.training.questions import EMBED_BATCH, Pool
from treemem.types import Progress, no_progress

CANDIDATES = 16
"""How many of a question's best candidates are compared: as many as mode `deep` reads."""
QUERY_TOKENS = 64
"""How many of a question's first tokens are looked at in training."""
RANK = 128
"""Coordinates of a state that are kept for training, in the basis of largest variance."""
BASIS_CHUNKS = 512
READ_BATCH = 128
"""Chunks whose tokens are encoded together."""


@dataclass(frozen=True, kw_only=True)
class TokenTraining(FitConfig):
    """How a token head is trained."""

    batch: int = 16
    weight_decay: float = 0.1
    projection_rate: float = 1e-3
    """Highest learning rate of the projection."""


@dataclass(frozen=True)
class TokenBatch:
    """Some questions with their candidates' tokens, padded, as a head reads them."""

    states: Float[Tensor, "b q d"]
    features: Float[Tensor, "b q f"]
    present: Bool[Tensor, "b q"]
    tokens: Float[Tensor, "b k c d"]
    has_token: Bool[Tensor, "b k c"]
    sums: Float[Tensor, "b k"]
    """What level 0 is added to, -inf where there is no candidate."""
    right: Bool[Tensor, "b k"]


@dataclass(frozen=True)
class TokenSet:
    """Questions of one set with their candidates; each chunk's tokens are held once."""

    name: str
    chunk_states: Float16[Tensor, "tokens rank"]
    chunk_offsets: Int64[Tensor, " _"]
    query_states: Float32[Tensor, "words rank"]
    query_features: Float32[Tensor, "words f"]
    query_offsets: Int64[Tensor, " _"]
    candidates: Int64[Tensor, "n k"]
    """Rows of `chunk_offsets`, -1 where there are fewer."""
    sums: Float32[Tensor, "n k"]
    right: Bool[Tensor, "n k"]

    def __len__(self) -> int:
        return len(self.candidates)

    def batch(self, rows: Int64[Tensor, " b"]) -> TokenBatch:
        """Some of the questions."""
        words, present = _places(self.query_offsets, rows)
        candidates = self.candidates[rows]
        there = candidates >= 0
        tokens, has_token = _places(self.chunk_offsets, candidates.clamp_min(0))
        has_token &= there[:, :, None]
        return TokenBatch(
            self.query_states[words] * present[:, :, None],
            self.query_features[words] * present[:, :, None],
            present,
            self.chunk_states[tokens].float(),
            has_token,
            self.sums[rows].masked_fill(~there, -torch.inf),
            self.right[rows],
        )


def _places(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the elements of ragged rows, padded with 0 behind a last dimension, and which are there."""
    begins, counts = offsets[rows], offsets[rows + 1] - offsets[rows]
    present = torch.arange(int(counts.max())) < counts[..., None]
    return torch.where(present, begins[..., None] + torch.arange(present.shape[-1]), 0), present


def token_loss(head: TokenHead, batch: TokenBatch) -> Float[Tensor, ""]:
    """Minus log of the probability, by a softmax over a question's candidates, that a right one is drawn."""
    logits = token_scores(head, batch) * head.log_scale.exp()
    found = torch.logsumexp(logits.masked_fill(~batch.right, -torch.inf), 1)
    return (torch.logsumexp(logits, 1) - found).mean()


def token_scores(head: TokenHead, batch: TokenBatch) -> Float[Tensor, "b k"]:
    """Scores of the candidates with level 0, -inf where there is none."""
    return batch.sums + head(batch.states, batch.features, batch.present, batch.tokens, batch.has_token)


def train_tokens(
    head: TokenHead,
    sets: Sequence[TokenSet],
    config: TokenTraining | None = None,
    progress: Progress = no_progress,
) -> list[float]:
    """Train a head in place on the questions that have both right and wrong candidates.

    Returns:
        The loss of each step.

    Raises:
        InputError: there are no such questions.
    """
    config = config or TokenTraining()
    matrices = [head.states.weight, head.inwards.weight, head.outwards.weight]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [head.inwards.bias], "weight_decay": 0.0},
        {"params": [head.projection], "weight_decay": 0.0, "lr": config.projection_rate},
        {"params": [head.log_mu, head.log_scale], "weight_decay": 0.0, "lr": 5 * config.rate},
    ]

    def loss(number: int, rows: Tensor) -> Tensor:
        return token_loss(head, sets[number].batch(rows))

    present = [(one.right, one.candidates >= 0) for one in sets]
    return fit(head, groups, present, loss, config, "level 0", progress)


def token_basis(
    corpora: Sequence[Corpus], rank: int = RANK, seed: int = 0, progress: Progress = no_progress
) -> Float32[np.ndarray, "rank d"]:
    """Orthonormal directions of largest second moment of the token states of some memories, each counting the same."""
    moments: list[np.ndarray] = []
    draw = np.random.default_rng(seed)
    for number, corpus in enumerate(corpora):
        progress("reading token states", number, len(corpora))
        image = corpus.searcher.image
        chunks = np.sort(draw.permutation(image.chunks)[:BASIS_CHUNKS])
        read = _chunk_states(corpus.searcher, chunks, titles=True)
        states = np.concatenate([own.states for own in read]).astype(np.float64)
        moments.append(states.T @ states / max(len(states), 1))
    _, vectors = np.linalg.eigh(np.mean(moments, axis=0))
    return np.ascontiguousarray(vectors[:, ::-1].T[:rank], np.float32)


def token_set(
    corpus: Corpus,
    searcher: Searcher,
    pool: Pool,
    rows: Int64[np.ndarray, " rows"],
    basis: Float32[np.ndarray, "rank d"],
    *,
    titles: bool = True,
    progress: Progress = no_progress,
) -> TokenSet:
    """Some of a memory's questions with the token states of their best candidates.

    Only questions with both right and wrong candidates have their chunks read; the others keep their candidates and
    have no tokens, since level 0 decides nothing there.

    Args:
        corpus: the memory, which knows what is right.
        searcher: of it, under the weights that level 0 will stand behind; with a decoder where it has one.
        pool: its questions to train on, or the held-out ones.
        rows: which of them.
        basis: see `token_basis`.
        titles: whether chunks are read after their documents' titles, as a search reads them. Where having a title
            tells whether a document is right, no.
        progress: told about questions and chunks.

    Raises InputError where no question has a candidate.
    """
    config = SearchConfig(k=CANDIDATES)
    found, right, states, features = [], [], [], []
    for start in range(0, len(rows), EMBED_BATCH):
        part = rows[start : start + EMBED_BATCH]
        queries = corpus.searcher.embed([pool.texts[row] for row in part], fast=True)
        for done, (row, query) in enumerate(zip(part, queries, strict=True), start):
            if done % 64 == 0:
                progress("gathering candidates", done, len(rows))
            ranked = searcher.rank(query, config)
            chunks = ranked.chunks[:CANDIDATES]
            tokens = _states(query.states)
            if len(chunks) == 0 or len(tokens) == 0:
                continue
            spans = [
                (a + s, a + e) for (a, _), own in zip(query.spans, query.states, strict=True) for s, e in own.spans
            ]
            idf = token_idf(searcher.image.lexical, query.text, spans)
            found.append((chunks.astype(np.int64), ranked.scores[:CANDIDATES]))
            right.append(corpus.is_right(pool, 1, np.array(row), chunks))
            states.append((tokens[:QUERY_TOKENS].astype(np.float32) @ basis.T).astype(np.float32))
            features.append(token_features(idf)[:QUERY_TOKENS])
    if not found:
        raise InputError(f"{corpus.name}: no questions to train level 0 on")
    decided = [chunks for (chunks, _), own in zip(found, right, strict=True) if own.any() and not own.all()]
    needed = np.unique(np.concatenate([*decided, np.empty(0, np.int64)]))
    read = []
    for start in range(0, len(needed), READ_BATCH):
        progress("reading token states", start, len(needed))
        for own in _chunk_states(corpus.searcher, needed[start : start + READ_BATCH], titles=titles):
            read.append((own.states.astype(np.float32) @ basis.T).astype(np.float16))
    # One more chunk, without tokens, stands for all those that were not read.
    candidates = np.full((len(found), CANDIDATES), -1, np.int64)
    sums = np.zeros((len(found), CANDIDATES), np.float32)
    masks = np.zeros((len(found), CANDIDATES), bool)
    for i, ((chunks, scores), mask) in enumerate(zip(found, right, strict=True)):
        was_read = mask.any() and not mask.all()
        candidates[i, : len(chunks)] = np.searchsorted(needed, chunks) if was_read else len(needed)
        sums[i, : len(chunks)], masks[i, : len(chunks)] = scores, mask
    rank = len(basis)
    return TokenSet(
        corpus.name,
        torch.from_numpy(np.concatenate([*read, np.empty((0, rank), np.float16)])),
        _offsets([*(len(own) for own in read), 0]),
        torch.from_numpy(np.concatenate(states)),
        torch.from_numpy(np.concatenate(features)),
        _offsets([len(own) for own in states]),
        torch.from_numpy(candidates),
        torch.from_numpy(sums),
        torch.from_numpy(masks),
    )


def _offsets(counts: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _states(parts: Sequence[TokenStates]) -> np.ndarray:
    return np.concatenate([part.states for part in parts]) if parts else np.empty((0, 0), np.float32)


def _chunk_states(searcher: Searcher, chunks: np.ndarray, *, titles: bool) -> list[TokenStates]:
    encoder = searcher.encoder
    if not isinstance(encoder, Encoder):
        raise InputError("the memory has no encoder, and level 0 is trained on what one gives")
    if titles:
        return searcher.token_states(chunks, encoder)
    return encoder.token_states([searcher.image.chunk_text(int(chunk)) for chunk in chunks])


# ---- judging


@torch.inference_mode()
def ranked_by_tokens(
    head: TokenHead | None, questions: TokenSet
) -> Iterator[tuple[Float[Tensor, "b k"], Bool[Tensor, "b k"]]]:
    """Scores of the candidates with a head's, or as they came, and which of them are right."""
    for rows in torch.arange(len(questions)).split(32):
        batch = questions.batch(rows)
        yield (batch.sums if head is None else token_scores(head, batch)), batch.right
