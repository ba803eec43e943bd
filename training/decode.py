"""Training the decoder: which of a question's last candidates is right, on questions of several sets together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from treemem.config import SearchConfig
from treemem.errors import InputError
from treemem.hierarchy.decoder import CANDIDATES, Decoder, DecoderInputs, stack
from treemem.hierarchy.walk import Searcher
from treemem.training.corpus import Corpus
from treemem.training.fit import FitConfig, fit
from treemem.training.questions import EMBED_BATCH, Pool
from treemem.types import Progress, no_progress


@dataclass(frozen=True, kw_only=True)
class DecoderTraining(FitConfig):
    """How a decoder is trained."""

    batch: int = 96
    weight_decay: float = 0.3
    bm25_weight: float = 0.4
    """lambda of the convex sum that is added to."""


@dataclass(frozen=True)
class DecoderSet:
    """Questions of one set with their candidates."""

    name: str
    inputs: DecoderInputs
    """Of all questions, float16 to save memory; 90 KB a question of 384 dimensions."""
    right: Bool[Tensor, "n k"]
    """Which candidates are right."""

    @classmethod
    def of(cls, name: str, inputs: Sequence[DecoderInputs], right: Sequence[Bool[np.ndarray, " _"]]) -> DecoderSet:
        """From `decoder_inputs` of each question and which of its candidates are right.

        Raises InputError where there are no questions.
        """
        if len(inputs) == 0:
            raise InputError(f"{name}: no questions to train the decoder on")
        packed = stack([_as(one, torch.float16) for one in inputs])
        masks = torch.zeros(packed.has_candidate.shape, dtype=torch.bool)
        for mask, own in zip(masks, right, strict=True):
            mask[: len(own)] = torch.from_numpy(own)
        return cls(name, packed, masks & packed.has_candidate)

    def __len__(self) -> int:
        return len(self.right)

    def rows(self, rows: Tensor | slice) -> DecoderInputs:
        """Inputs of some questions, float32."""
        return _as(self.inputs, torch.float32, rows)


def _as(inputs: DecoderInputs, kind: torch.dtype, rows: Tensor | slice = slice(None)) -> DecoderInputs:
    chosen = {f.name: getattr(inputs, f.name)[rows] for f in fields(DecoderInputs)}
    return DecoderInputs(**{name: a.to(kind) if a.is_floating_point() else a for name, a in chosen.items()})


def decoder_loss(
    decoder: Decoder, inputs: DecoderInputs, right: Bool[Tensor, "b k"], bm25_weight: float
) -> Float[Tensor, ""]:
    """Minus log of the probability, by a softmax over a question's candidates, that a right one is drawn."""
    sums = inputs.cosines + bm25_weight * inputs.bm25 + decoder(inputs, bm25_weight)
    logits = (sums * decoder.log_scale.exp()).masked_fill(~inputs.has_candidate, -torch.inf)
    found = torch.logsumexp(logits.masked_fill(~right, -torch.inf), 1)
    return (torch.logsumexp(logits, 1) - found).mean()


def train_decoder(
    decoder: Decoder,
    sets: Sequence[DecoderSet],
    config: DecoderTraining | None = None,
    progress: Progress = no_progress,
) -> list[float]:
    """Train a decoder in place on the questions that have both right and wrong candidates.

    Returns:
        The loss of each step.

    Raises:
        InputError: there are no such questions.
    """
    config = config or DecoderTraining()
    groups = [
        {"params": [p for p in decoder.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in decoder.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]

    def loss(number: int, rows: Tensor) -> Tensor:
        return decoder_loss(decoder, sets[number].rows(rows), sets[number].right[rows], config.bm25_weight)

    present = [(one.right, one.inputs.has_candidate) for one in sets]
    return fit(decoder, groups, present, loss, config, "the decoder", progress)


def decoder_set(
    corpus: Corpus, searcher: Searcher, pool: Pool, rows: Int64[np.ndarray, " rows"], progress: Progress = no_progress
) -> DecoderSet:
    """Some of a memory's questions with the best candidates of both signals, as a searcher without decoder ranks them.

    Args:
        corpus: the memory, which knows what is right.
        searcher: of it, under the weights that the decoder will stand behind.
        pool: its questions to train on, or the held-out ones.
        rows: which of them.
        progress: told about questions.

    Raises InputError where no question has a word that stands in the memory.
    """
    config = SearchConfig(k=CANDIDATES, decoder=False)
    inputs, right = [], []
    for start in range(0, len(rows), EMBED_BATCH):
        part = rows[start : start + EMBED_BATCH]
        queries = corpus.searcher.embed([pool.texts[row] for row in part], fast=True)
        for done, (row, query) in enumerate(zip(part, queries, strict=True), start):
            if done % 64 == 0:
                progress("gathering candidates", done, len(rows))
            ranked = searcher.rank(query, config)
            given = searcher.decoder_inputs(query, searcher.asked(query.vectors), ranked, config)
            if given is not None:
                inputs.append(given)
                right.append(corpus.is_right(pool, 1, np.array(row), ranked.chunks[:CANDIDATES]))
    return DecoderSet.of(corpus.name, inputs, right)


@torch.inference_mode()
def ranked_by_decoder(
    decoder: Decoder | None, questions: DecoderSet, bm25_weight: float = 0.4
) -> Iterator[tuple[Float[Tensor, "b k"], Bool[Tensor, "b k"]]]:
    """Scores of the candidates by the decoder, or by the convex sum alone, and which of them are right."""
    for start in range(0, len(questions), 256):
        rows = slice(start, start + 256)
        inputs = questions.rows(rows)
        if decoder is None:
            scores = (inputs.cosines + bm25_weight * inputs.bm25).masked_fill(~inputs.has_candidate, -torch.inf)
        else:
            scores = torch.from_numpy(decoder.scores(inputs, bm25_weight))
        yield scores, questions.right[rows]
