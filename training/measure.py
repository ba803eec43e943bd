"""Figures of one state of the weights on held-out questions: what decides about adoption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from treemem.config import Mode, SearchConfig
from treemem.hierarchy.weights import BM25_WEIGHT, Hierarchy
from treemem.training.corpus import Corpus, Met, Served
from treemem.training.losses import calibration_error
from treemem.training.questions import EMBED_BATCH

KEPT = 64
"""How many of the best chunks are looked at, beside BM25's."""
BEAMS = (8, 16, 32)
"""Held at these widths, a level's right nodes are counted; narrow ones tell more where 32 hold nearly all."""


@dataclass(frozen=True)
class Measured:
    """Figures of single questions, so that two states can be compared question by question."""

    walk: Float64[np.ndarray, "questions 3"]
    """hit@1, hit@10 and reciprocal rank of the first right chunk among the first 10, by the walk's cosines."""
    hybrid: Float64[np.ndarray, "questions 3"]
    """The same with BM25."""
    nodes: dict[int, Float64[np.ndarray, "questions beams"]]
    """By level: whether the walk holds a node that leads to a right chunk, among its best 8, 16, 32."""
    calibration: dict[int, float]
    """Expected calibration error of the probability that a level's first choice is right."""

    def figures(self) -> dict[str, float]:
        """Means by name."""
        out = {f"walk hit@{k}": float(self.walk[:, i].mean()) for i, k in enumerate((1, 10))}
        out |= {f"hybrid hit@{k}": float(self.hybrid[:, i].mean()) for i, k in enumerate((1, 10))}
        out |= {"walk MRR@10": float(self.walk[:, 2].mean()), "hybrid MRR@10": float(self.hybrid[:, 2].mean())}
        out |= {f"level {level} recall@{BEAMS[-1]}": float(rows[:, -1].mean()) for level, rows in self.nodes.items()}
        return out | {f"level {level} calibration error": error for level, error in self.calibration.items()}


def measure(
    corpus: Corpus, served: Served, rows: Int64[np.ndarray, " rows"], *, beam: int = 32, exact: bool = False
) -> Measured:
    """Search for held-out questions.

    Args:
        corpus: the memory.
        served: it under the weights that are measured.
        rows: which of its held-out questions.
        beam: how many nodes a walk keeps.
        exact: score all chunks, so that level 1 is measured apart from the way there.
    """
    met = corpus.meet(served, corpus.held_out, rows, beam, KEPT, exact=exact)
    return figures_of(corpus, met, rows, served.searcher.hierarchy)


def searched(
    corpus: Corpus, served: Served, rows: Int64[np.ndarray, " rows"], modes: Sequence[Mode]
) -> list[Float64[np.ndarray, "questions 3"]]:
    """What searches as users make them, with the decoder where there is one, give for held-out questions.

    Returns:
        Of each mode as `Measured.walk`.
    """
    pool, configs = corpus.held_out, [SearchConfig(mode) for mode in modes]
    out = [np.zeros((len(rows), 3)) for _ in modes]
    for start in range(0, len(rows), EMBED_BATCH):
        part = rows[start : start + EMBED_BATCH]
        queries = corpus.searcher.embed([pool.texts[row] for row in part], fast=True)
        for i, (row, query) in enumerate(zip(part, queries, strict=True), start):
            for config, figures in zip(configs, out, strict=True):
                found = served.searcher.rank(query, config).chunks[: config.k]
                right = corpus.is_right(pool, 1, np.array(row), found)
                if right.any():
                    figures[i] = right[0], 1, 1 / (1 + right.argmax())
    return out


def figures_of(
    corpus: Corpus,
    met: Met,
    rows: Int64[np.ndarray, " rows"],
    hierarchy: Hierarchy | None,
    bm25_weight: float | None = None,
) -> Measured:
    """Figures of what was met for held-out questions.

    Args:
        corpus: the memory.
        met: for these questions, with `KEPT` chunks of the walk.
        rows: which they are.
        hierarchy: under which it was met.
        bm25_weight: in place of the hierarchy's.
    """
    if bm25_weight is None:
        bm25_weight = BM25_WEIGHT if hierarchy is None else hierarchy.bm25_weight.item()
    right = corpus.is_right(corpus.held_out, 1, rows[:, None], met.chunks)
    calibration = {}
    if hierarchy is not None:
        first = first_choices(met.cosines[:, :KEPT], right[:, :KEPT], hierarchy.scale(1).item())
        calibration[1] = calibration_error(*first)
    nodes = {}
    for level, (kept, scores) in enumerate(zip(met.nodes, met.node_scores, strict=True), 2):
        held = corpus.is_right(corpus.held_out, level, rows[:, None], kept)
        nodes[level] = np.stack([held[:, :width].any(1) for width in BEAMS], 1).astype(np.float64)
        if hierarchy is not None and level <= hierarchy.config.levels:
            calibration[level] = calibration_error(*first_choices(scores, held, hierarchy.scale(level).item()))
    dense = np.where(np.arange(met.chunks.shape[1]) < KEPT, met.cosines, -np.inf)
    return Measured(_hits(dense, right), _hits(met.cosines + bm25_weight * met.bm25, right), nodes, calibration)


def _hits(scores: np.ndarray, right: np.ndarray) -> Float64[np.ndarray, "questions 3"]:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    found = np.take_along_axis(right, order, 1)
    first = np.where(found.any(1), 1 / (1 + found.argmax(1)), 0.0)
    return np.stack([found[:, 0], found.any(1), first], 1).astype(np.float64)


def first_choices(scores: np.ndarray, right: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Of questions with any element (score above -inf): the probability of the best one, and whether it is right."""
    there = np.isfinite(scores).any(1)
    logits, right = scale * scores[there].astype(np.float64), right[there]
    likely = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
    likely /= likely.sum(1, keepdims=True)
    first = likely.argmax(1)[:, None]
    return np.take_along_axis(likely, first, 1)[:, 0], np.take_along_axis(right, first, 1)[:, 0]


def fitted_scale(parts: Sequence[tuple[np.ndarray, np.ndarray]], scale: float) -> float:
    """What cosines are best multiplied by to be logits: where the first choice's probability has the least Brier score.

    Args:
        parts: cosines and which are right, of each memory; shape (questions, elements).
        scale: the one now; others of an eighth to eight times it are tried.
    """
    factors = 2.0 ** np.arange(-3, 3.01, 0.125)

    def brier(factor: float) -> float:
        found = [first_choices(scores, right, factor * scale) for scores, right in parts]
        return float(np.mean([np.square(likely - hit).mean() for likely, hit in found if len(hit)] or [0.0]))

    return float(scale * min(sorted(factors, key=lambda factor: abs(np.log(factor))), key=brier))
