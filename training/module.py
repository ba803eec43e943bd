"""What Lightning trains: adjacent levels together, end to end, on what walks get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from treemem.errors import InputError, MissingPackage
from treemem.hierarchy.weights import Hierarchy
from treemem.training.corpus import Corpus, Met, Served
from treemem.training.losses import any_right
from treemem.training.measure import measure
from treemem.training.questions import Pool

try:
    import lightning
except ImportError as error:
    raise MissingPackage("training needs lightning; run: pip install 'treemem[train]'") from error

WATCHED = 256
"""Held-out questions of each memory that are looked at after every epoch."""


@dataclass(frozen=True)
class TrainConfig:
    """How a hierarchy is trained."""

    epochs: int = 8
    """Of levels 1 and 2; an eighth as many for 2 and 3, and so on. Before each, walks are made as the weights are."""
    joint_epochs: int = 1
    """Of the pass over all levels together at the end."""
    steps: int = 60
    """Batches of an epoch, fewer where there are few questions: see `passes`."""
    passes: int = 12
    """At most so often each question is asked in a stage, on the mean: few questions are soon learned by heart."""
    batch: int = 128
    """Questions of a batch; all of one memory."""
    node_questions: int = 32
    """How many of them are asked of the nodes of level 2, a quarter of it higher up: nodes take long to encode."""
    negatives: int = 8
    """Wrong chunks for each question, half of the walk's best and half of BM25's."""
    node_negatives: int = 2
    """Wrong nodes of each level for each question."""
    decoder_steps: int = 300
    """Of the decoder, after all levels; 0: none is trained."""
    decoder_questions: int = 2000
    """At most so many of each memory's questions train it."""
    token_steps: int = 400
    """Of level 0, where it is asked for."""
    token_questions: int = 400
    """At most so many of each memory's questions train it: each has the tokens of 16 chunks read."""
    tune_encoder: str = "none"
    """Whether encoder 1 is fine-tuned first, with levels 1 and 2: `none`, `lora` (low-rank differences) or `full`."""
    tune_epochs: int = 2
    tune_batch: int = 32
    """Questions of a batch; their chunks and two wrong ones for each are encoded too."""
    lora_rank: int = 8
    lora_rate: float = 2e-4
    """Highest learning rate of LoRA's matrices."""
    full_rate: float = 2e-5
    """The same of whole weights."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.3
    beam: int = 32
    hard: int = 32
    """From how many of a walk's best wrong chunks the negatives are drawn."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tune_encoder not in ("none", "lora", "full"):
            raise InputError(f"tune_encoder = {self.tune_encoder!r}: it must be none, lora or full")
        sizes = "tune_batch lora_rank batch node_questions negatives node_negatives beam hard"
        for name in f"tune_epochs epochs steps passes {sizes}".split():
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True)
class LevelBatch:
    """Questions against elements of one level."""

    questions: Int64[np.ndarray, " questions"]
    """Rows of the batch."""
    elements: Int64[np.ndarray, " elements"]
    right: np.ndarray
    """bool [questions, elements]"""


@dataclass(frozen=True)
class Batch:
    """Questions of one memory with right and wrong elements of the levels that are trained."""

    corpus: int
    rows: np.ndarray
    """int64 [questions], of the memory's questions to train on"""
    vectors: np.ndarray
    """float32 [questions, d]"""
    levels: dict[int, LevelBatch]
    own: np.ndarray
    """int64 [questions, 1 + negatives], places among the elements of level 1: a right chunk and wrong ones, …"""
    own_counts: np.ndarray
    """… bool, which are there, …"""
    own_right: np.ndarray
    """… which are right, …"""
    own_bm25: np.ndarray
    """… and their shares of the question's best BM25 score."""


class Batches(Dataset[Batch]):
    """The batches of one epoch, each made when it is asked for, from its number alone."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        met: Sequence[Met],
        rows: Sequence[np.ndarray],
        plan: Sequence[tuple[int, int]],
        levels: Sequence[int],
        config: TrainConfig,
        epoch: int,
    ) -> None:
        """Keep what walks met.

        Args:
            corpora: the memories.
            met: of each, what walks met for its questions of this epoch.
            rows: of each, which questions these are.
            plan: of each batch, the memory, and where its questions begin among them.
            levels: that are trained.
            config: sizes.
            epoch: for the random choices.
        """
        self.corpora, self.met, self.rows, self.plan = corpora, met, rows, plan
        self.levels, self.config, self.epoch = levels, config, epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.config.seed, self.epoch, number])
        index, begin = self.plan[number]
        corpus, met = self.corpora[index], self.met[index]
        own = slice(begin, begin + self.config.batch)
        rows = self.rows[index][own]
        pool = corpus.train
        targets = np.array([_drawn(rng, pool.right_of(int(row)), self._weights(corpus, int(row))) for row in rows])
        wrong, bm25, counts = self._wrong_chunks(rng, corpus, rows, met.chunks[own], met.bm25[own])
        target_bm25 = [_bm25_of(pool, int(row), int(target)) for row, target in zip(rows, targets, strict=True)]
        # What exact search found says nothing about how chunks should be ranked, only about the way to them.
        own_words = np.array([pool.sources[row] != "distilled" for row in rows])
        levels = {}
        chosen = np.concatenate([targets[:, None], wrong], 1)
        places = np.zeros(chosen.shape, np.int64)
        for level in self.levels:
            if level > corpus.depth:
                continue
            if level == 1:
                elements, places = np.unique(np.maximum(chosen, 0), return_inverse=True)
                asked = np.arange(len(rows))
            else:
                wanted = max(1, self.config.node_questions // (1 if level == 2 else 4))
                asked = np.sort(rng.choice(len(rows), min(wanted, len(rows)), replace=False))
                elements = self._nodes(
                    rng, corpus, level, rows[asked], targets[asked], met.nodes[level - 2][own][asked]
                )
            right = corpus.is_right(pool, level, rows[asked][:, None], elements[None])
            if level == 1:
                right &= own_words[:, None]
            levels[level] = LevelBatch(asked, elements.astype(np.int64), right)
        return Batch(
            index,
            rows,
            pool.vectors[rows],
            levels,
            places.reshape(chosen.shape),
            np.concatenate([np.ones((len(rows), 1), bool), counts], 1),
            corpus.is_right(pool, 1, rows[:, None], chosen) & own_words[:, None],
            np.concatenate([np.array(target_bm25, np.float32)[:, None], bm25], 1),
        )

    @staticmethod
    def _weights(corpus: Corpus, row: int) -> np.ndarray:
        ends = corpus.train.right_ends
        return corpus.target_weights[(ends[row - 1] if row else 0) : ends[row]]

    def _wrong_chunks(
        self, rng: np.random.Generator, corpus: Corpus, rows: np.ndarray, chunks: np.ndarray, bm25: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Some wrong chunks of the walk and of BM25 for each question, their BM25 shares, and which are there."""
        counts = (chunks >= 0) & ~corpus.is_right(corpus.train, 1, rows[:, None], chunks)
        half = self.config.negatives // 2
        picked = []
        hard = self.config.hard
        for part, number in ((slice(hard), self.config.negatives - half), (slice(hard, None), half)):
            keys = np.where(counts[:, part], rng.random(counts[:, part].shape), -1.0)
            picked.append(np.argsort(-keys, axis=1)[:, :number] + (part.start or 0))
        places = np.concatenate(picked, 1)
        take = np.take_along_axis
        return take(chunks, places, 1), take(bm25, places, 1), take(counts, places, 1)

    def _nodes(
        self,
        rng: np.random.Generator,
        corpus: Corpus,
        level: int,
        rows: np.ndarray,
        targets: np.ndarray,
        kept: np.ndarray,
    ) -> np.ndarray:
        """The ancestors of the right chunks, and some of the nodes that walks kept and that lead to none."""
        ancestors = corpus.ancestors(level, targets)
        counts = (kept >= 0) & ~corpus.is_right(corpus.train, level, rows[:, None], kept)
        # The better a wrong node scores, the likelier it is drawn.
        keys = np.where(counts, rng.random(kept.shape) / (1 + np.arange(kept.shape[1])), -1.0)
        places = np.argsort(-keys, axis=1)[:, : self.config.node_negatives]
        wrong = np.take_along_axis(kept, places, 1)[np.take_along_axis(counts, places, 1)]
        return np.unique(np.concatenate([ancestors, wrong]))


def _drawn(rng: np.random.Generator, chunks: np.ndarray, weights: np.ndarray) -> int:
    place = int(np.searchsorted(np.cumsum(weights), rng.random()))
    return int(chunks[min(place, len(chunks) - 1)])


def _bm25_of(pool: Pool, row: int, chunk: int) -> float:
    known = np.flatnonzero(pool.bm25_chunks[row] == chunk)
    return float(pool.bm25_scores[row, known[0]]) if len(known) else 0.0


class _Once(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> int:
        return number


class LevelsModule(lightning.LightningModule):
    """Some levels of a hierarchy under training: their encoders and rankers."""

    def __init__(
        self, hierarchy: Hierarchy, corpora: Sequence[Corpus], levels: Sequence[int], config: TrainConfig
    ) -> None:
        """Train levels of a hierarchy, which is changed.

        Args:
            hierarchy: all levels; those that are not trained here stay as they are.
            corpora: memories with their questions.
            levels: adjacent ones.
            config: how.
        """
        super().__init__()
        self.levels = tuple(levels)
        self.settings = config
        self.parts = nn.ModuleDict()
        for level in self.levels:
            self.parts[f"ranker-{level}"] = hierarchy.rankers[str(level)]
            self.parts[f"encoder-{level}"] = hierarchy.gate if level == 1 else hierarchy.encoders[str(level)]
        # Not registered as modules: their weights are not this one's.
        self._outside: tuple[Hierarchy, Sequence[Corpus]] = (hierarchy, corpora)
        self.served: list[Served] = []
        self.served_step = -1

    @property
    def hierarchy(self) -> Hierarchy:
        """All levels."""
        return self._outside[0]

    @property
    def corpora(self) -> Sequence[Corpus]:
        """The memories."""
        return self._outside[1]

    # ---- data

    def serve(self) -> list[Served]:
        """The memories under the weights of the moment, made once per step."""
        if self.served_step != self.global_step or not self.served:
            frozen = self.hierarchy.rounded()
            self.served = [corpus.serve(frozen) for corpus in self.corpora]
            self.served_step = self.global_step
        return self.served

    def train_dataloader(self) -> DataLoader[Batch]:
        """The next epoch's batches, with negatives from walks under the weights of the moment."""
        config, epoch = self.settings, self.current_epoch
        rng = np.random.default_rng([config.seed, epoch])
        sizes = np.array([len(corpus.train) for corpus in self.corpora], float) ** 0.6
        workers = self.trainer.world_size
        drawn = rng.choice(len(self.corpora), config.steps * workers, p=sizes / sizes.sum())
        plan, rows, met = [], [], []
        for index, (corpus, served) in enumerate(zip(self.corpora, self.serve(), strict=True)):
            wanted = int((drawn == index).sum()) * config.batch
            again = -(-wanted // len(corpus.train))
            own = np.concatenate([rng.permutation(len(corpus.train)) for _ in range(again)] or [np.empty(0, np.int64)])
            rows.append(own[:wanted])
            # Each question is walked for once, however often it is asked in this epoch.
            unique, back = np.unique(rows[-1], return_inverse=True)
            found = corpus.meet(served, corpus.train, unique, config.beam, config.hard)
            met.append(_at(found, back))
        used = [0] * len(self.corpora)
        for index in drawn:
            plan.append((int(index), used[index]))
            used[index] += config.batch
        batches = Batches(self.corpora, met, rows, plan, self.levels, config, epoch)
        return DataLoader(batches, batch_size=None, shuffle=False)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches hold arrays; what is gathered with them is moved."""
        return batch

    # ---- forward

    def queries(self, corpus: int, level: int, vectors: Tensor) -> Float[Tensor, "n d"]:
        """Question vectors as a level's ranker gives them."""
        if level > 1:
            image = self.served[corpus].searcher.image
            vectors = F.normalize(vectors @ torch.from_numpy(np.asarray(image.query_map)).to(self.device), dim=1)
        out: Tensor = self.parts[f"ranker-{level}"](vectors)
        return out

    def question_vectors(self, batch: Batch) -> Float[Tensor, "questions d"]:
        """Of a batch's questions, as encoder 1 gives them."""
        return torch.from_numpy(batch.vectors).to(self.device)

    def chunk_inputs(self, corpus: int, chunks: Int64[np.ndarray, " n"]) -> tuple[Tensor, ...]:
        """What the context gate reads of chunks of a memory."""
        return tuple(part.to(self.device) for part in self.corpora[corpus].chunk_inputs(chunks))

    def elements(
        self, corpus: int, level: int, ids: Int64[np.ndarray, " n"], below: tuple[np.ndarray, Tensor] | None = None
    ) -> Float[Tensor, "n d"]:
        """Vectors of elements of a level, by its encoder.

        Args:
            corpus: number of the memory.
            level: of the elements.
            ids: which.
            below: what the batch holds of the level below: sorted elements, and vectors that take gradients. Other
                children are as they were served.
        """
        encoder = self.parts[f"encoder-{level}"]
        if level == 1:
            out: Tensor = encoder(*self.chunk_inputs(corpus, ids))
            return out
        children, present = self.corpora[corpus].children(level, ids)
        rows = torch.from_numpy(self.served[corpus].vectors[level - 2][children].astype(np.float32)).to(self.device)
        if below is not None:
            known, vectors = below
            places = np.minimum(np.searchsorted(known, children), len(known) - 1)
            live = torch.from_numpy((known[places] == children) & present).to(self.device)
            rows[live] = vectors[torch.from_numpy(places).to(self.device)[live]]
        out = encoder(rows, torch.from_numpy(present).to(self.device))
        return out

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The sum of the levels' losses."""
        # Random states by the step, so that a resumed run goes on as an uninterrupted one.
        torch.manual_seed(self.settings.seed * 1_000_003 + self.global_step * 1009 + self.global_rank)
        vectors = self.question_vectors(batch)
        total = vectors.new_zeros(())
        below = None
        for level, part in sorted(batch.levels.items()):
            queries = self.queries(batch.corpus, level, vectors[torch.from_numpy(part.questions).to(self.device)])
            elements = self.elements(batch.corpus, level, part.elements, below)
            below = part.elements, elements
            cosines = queries @ elements.T
            scale = self.hierarchy.scale(level)
            loss = any_right(scale * cosines, torch.from_numpy(part.right).to(self.device))
            if level == 1:
                both = any_right(
                    scale * self._convex_sum(batch, cosines),
                    torch.from_numpy(batch.own_right).to(self.device),
                    torch.from_numpy(batch.own_counts).to(self.device),
                )
                self.log("loss/hybrid", both, batch_size=len(vectors))
                total = total + both
            self.log(f"loss/level-{level}", loss, batch_size=len(vectors))
            total = total + loss
        self.log("loss", total, batch_size=len(vectors), prog_bar=True)
        return total

    def _convex_sum(self, batch: Batch, cosines: Tensor) -> Float[Tensor, "questions own"]:
        """What hybrid search ranks by, for each question's own elements."""
        own = cosines.gather(1, torch.from_numpy(batch.own).to(self.device))
        return own + self.hierarchy.bm25_weight.to(self.device) * torch.from_numpy(batch.own_bm25).to(self.device)

    # ---- optimisation

    def configure_optimizers(self) -> Any:
        """AdamW on a one-cycle schedule; only matrices decay."""
        config = self.settings
        optimizer = torch.optim.AdamW(self.optimizer_groups(), lr=config.learning_rate)
        steps = config.steps * (self.trainer.max_epochs or 1)
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameters by how they decay, and with `lr` where that is another."""
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        return [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of each part's gradient and its temperature."""
        if self.global_step % 10:
            return
        for name, part in self.parts.items():
            norms = [parameter.grad.norm() for parameter in part.parameters() if parameter.grad is not None]
            if norms:
                self.log(f"gradient/{name}", torch.stack(norms).norm())
            if name.startswith("ranker"):
                self.log(f"temperature/{name}", self.hierarchy.scale(int(name.removeprefix("ranker-"))))

    # ---- held-out questions

    def val_dataloader(self) -> DataLoader[int]:
        """One item: all held-out questions are looked at together."""
        return DataLoader(_Once(), batch_size=None)

    def validation_step(self, batch: int, batch_index: int) -> None:
        """Log how much of the held-out questions walks find, level by level, and how well scores are calibrated."""
        parts = []
        for corpus, served in zip(self.corpora, self.serve(), strict=True):
            rows = np.arange(min(len(corpus.held_out), WATCHED))
            if len(rows):
                parts.append(measure(corpus, served, rows, beam=self.settings.beam).figures())
        for name in parts[0] if parts else {}:
            values = [part[name] for part in parts if name in part]
            self.log(f"held-out/{name}", float(np.mean(values)), batch_size=1, rank_zero_only=True)


class LevelPair(LevelsModule):
    """Two adjacent levels, trained end to end through both levels' encoders and rankers."""

    def __init__(self, hierarchy: Hierarchy, corpora: Sequence[Corpus], level: int, config: TrainConfig) -> None:
        """Train levels `level` and `level + 1`."""
        super().__init__(hierarchy, corpora, (level, level + 1), config)


class AllLevels(LevelsModule):
    """All levels together under the model's own beam, after the pairs."""

    def __init__(self, hierarchy: Hierarchy, corpora: Sequence[Corpus], levels: int, config: TrainConfig) -> None:
        """Train levels 1 to `levels`."""
        super().__init__(hierarchy, corpora, range(1, levels + 1), config)


def _at(met: Met, rows: np.ndarray) -> Met:
    return Met(
        tuple(nodes[rows] for nodes in met.nodes),
        tuple(scores[rows] for scores in met.node_scores),
        met.chunks[rows],
        met.cosines[rows],
        met.bm25[rows],
    )
