"""Training a memory from questions to a new snapshot: what `treemem train` does."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treemem.errors import InputError
from treemem.hierarchy.build import retrain
from treemem.hierarchy.embed import EncoderInfo
from treemem.hierarchy.generate import LanguageModel
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.weights import Hierarchy, HierarchyConfig
from treemem.training.corpus import Corpus
from treemem.training.module import TrainConfig
from treemem.training.questions import Pool, Question, resolve, split_by_document
from treemem.training.sources import distilled, headings, sentences, written
from treemem.training.train import TUNING, HierarchyTrainer, Outcome
from treemem.types import Progress, no_progress

HELD_OUT_SHARE = 0.12
HELD_OUT_MOST = 1000
"""Questions that are kept apart to decide, if none are given for it: this share, at most so many, by document."""
HELD_OUT_LEAST = 30
"""Fewer cannot tell what helps from what came by chance; of few questions up to half are kept apart."""
HEADINGS_MOST = 4000
DISTILLED_MOST = 2000
WRITTEN_MOST = 200
OWN_SOURCES = ("headings", "distilled")
"""Where questions come from if none are given."""


@dataclass(frozen=True)
class TrainReport:
    """What `treemem train` tells."""

    memory: str
    questions: dict[str, int]
    """By source, those that were trained on."""
    held_out: int
    """Questions that decided, about documents of which none was trained on."""
    left_out: int
    """Questions given that have no right chunk in this memory."""
    before: dict[str, float]
    after: dict[str, float]
    adopted: dict[str, dict[int, float]]
    """By stage and level: how much of what was learned was taken; 0 = refused."""
    improved: bool
    complete: bool
    """False where the minutes were over before the last step."""
    snapshot: str
    """The memory's snapshot now: a new one where it improved."""
    seconds: float
    logs: str

    def to_json(self) -> dict[str, Any]:
        """The report for programs."""
        return asdict(self)


def train_memory(
    memory: Memory,
    questions: Sequence[Question] | None = None,
    *,
    held_out: Sequence[Question] | None = None,
    sources: Sequence[str] = (),
    model: LanguageModel | None = None,
    levels: Sequence[int] | None = None,
    config: TrainConfig | None = None,
    shape: dict[str, Any] | None = None,
    minutes: float | None = None,
    device: str = "auto",
    wandb: bool = False,
    save: str | Path | None = None,
    trainer_options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> TrainReport:
    """Train a memory's hierarchy; a new snapshot is made only if held-out questions are found better than before.

    What was edited since the tree was grown is compacted first.

    Args:
        memory: finished; whoever holds it open goes on searching the old snapshot.
        questions: labelled ones. Without any the memory's own headings and distilled exact search train the levels
            above the chunks, and level 1 is left alone.
        held_out: labelled ones that decide about adoption; if none are given, some of `questions` are kept apart.
        sources: also questions from these: `headings`, `written`, `distilled`.
        model: writes the questions of source `written`.
        levels: only these.
        config: how.
        shape: of an untrained hierarchy: fields of `HierarchyConfig`.
        minutes: stop training after these.
        device: `auto`, `cpu` or `cuda`.
        wandb: log to Weights and Biases too.
        save: write the trained hierarchy into this folder, if it is adopted.
        trainer_options: for `lightning.Trainer`.
        progress: told how far it has come.

    Raises:
        InputError: questions or settings cannot be used.
        StoreError: another process writes this memory, or the disk is full.
        ModelError: the language model fails, or a trained hierarchy is of another encoder.
        MissingPackage: wandb is asked for and not installed.
    """
    begin = time.monotonic()
    memory.dense(progress)
    config = config or TrainConfig()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    folder = memory.store.path / "training" / (f"rank-{rank}" if rank else "")
    given = list(questions or [])
    sources = list(sources) or ([] if given else list(OWN_SOURCES))
    gathered = given + _gathered(memory, sources, model, config.seed, progress)
    start = memory.hierarchy
    if start is None:
        torch.manual_seed(config.seed)
        alpha = memory.config.alpha
        start = Hierarchy(HierarchyConfig(EncoderInfo(**memory.store.info().encoder), alpha=alpha, **(shape or {})))
    if not given and levels is None:
        levels = [level for level in trainable_levels(memory, config, start.config.levels) if level > 1]
        if not levels:
            raise InputError(
                "a walk in this memory keeps all nodes, so only the ranking of chunks can learn, and headings mislead "
                "that; give questions with known answers (--queries)"
            )
    pool = resolve(memory.searcher, gathered, progress)
    if held_out:
        judges = resolve(memory.searcher, held_out, progress)
        train = pool.take(_apart(pool, judges))
    else:
        share = max(HELD_OUT_SHARE, min(0.5, HELD_OUT_LEAST / max(1, len(pool))))
        apart, inside = split_by_document(pool, share, HELD_OUT_MOST, config.seed)
        train, judges = pool.take(apart), pool.take(inside)
        if len(judges) < HELD_OUT_LEAST:
            raise InputError(
                f"of {len(pool)} questions {len(judges)} could be kept apart to decide what helps, and at least "
                f"{HELD_OUT_LEAST} are needed; give more, about more documents"
            )
    if len(train) == 0:
        raise InputError("no questions are left to train on beside the held-out ones; give more, about more documents")
    scratch = memory.store.path / "training" / f"served-{rank}"
    try:
        corpus = Corpus(memory.store.path.name, memory, train, judges, scratch)
        trainer = HierarchyTrainer(
            [corpus], start, config, folder, levels=levels, device=device, minutes=minutes, wandb=wandb,
            progress=progress, trainer_options=trainer_options,
        )  # fmt: skip
        outcome = trainer.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds = time.monotonic() - begin
    before, after = outcome.before[corpus.name], outcome.after[corpus.name]
    counts = dict(Counter(train.sources))
    snapshot = memory.image.snapshot
    if outcome.improved and rank == 0:
        outcome.hierarchy.card = _card(memory, counts, len(judges), outcome, config, before, after)
        tuned = corpus.encodings if outcome.adopted.get(TUNING, {}).get(1) else None
        snapshot = retrain(memory.store, outcome.hierarchy, outcome.hierarchy.card["summary"], progress, tuned)
        if save is not None:
            outcome.hierarchy.save(save)
    return TrainReport(
        memory=str(memory.store.path),
        questions=counts,
        held_out=len(judges),
        left_out=len(gathered) - len(pool),
        before=before,
        after=after,
        adopted=outcome.adopted,
        improved=outcome.improved,
        complete=outcome.complete,
        snapshot=snapshot,
        seconds=round(seconds, 1),
        logs=str(folder / "logs"),
    )


def trainable_levels(memory: Memory, config: TrainConfig, most: int = HierarchyConfig.levels) -> list[int]:
    """The levels, up to `most`, of which a walk does not keep all elements; level 1 always among them."""
    sizes = memory.info().levels[::-1][:most]
    return [level for level, size in enumerate(sizes, 1) if level == 1 or size > config.beam]


def _gathered(
    memory: Memory, sources: Sequence[str], model: LanguageModel | None, seed: int, progress: Progress
) -> list[Question]:
    out: list[Question] = []
    for source in sources:
        if source == "headings":
            out += headings(memory.image, HEADINGS_MOST, seed)
        elif source == "written":
            if model is None:
                raise InputError("source 'written' needs a language model; give --llm, or leave it out")
            out += written(memory.searcher, model, WRITTEN_MOST, seed, progress)
        elif source == "distilled":
            texts = [question.text for question in headings(memory.image, DISTILLED_MOST, seed)]
            texts += sentences(memory.image, DISTILLED_MOST - len(texts), seed)
            out += distilled(memory.searcher, texts, progress)
        else:
            raise InputError(f"source {source!r}: it must be headings, written or distilled")
    return out


def _apart(pool: Pool, judges: Pool) -> np.ndarray:
    """Questions about none of the documents that held-out ones are about."""
    documents = frozenset[int]().union(*judges.right_documents)
    return np.array([row for row, own in enumerate(pool.right_documents) if not own & documents], np.int64)


def _card(
    memory: Memory,
    counts: dict[str, int],
    held_out: int,
    outcome: Outcome,
    config: TrainConfig,
    before: dict[str, float],
    after: dict[str, float],
) -> dict[str, Any]:
    total = sum(counts.values())
    date = time.strftime("%Y-%m-%d")
    return {
        "summary": f"Trained on {date} with {total:,} questions about {memory.store.path.name}",
        "data": {"memory": memory.store.path.name, "held-out questions": held_out, **counts},
        "settings": asdict(config),
        "figures": {name: (before.get(name, float("nan")), value) for name, value in after.items() if name in before},
        "adopted": {
            stage: {str(level): share for level, share in own.items()} for stage, own in outcome.adopted.items()
        },
    }
