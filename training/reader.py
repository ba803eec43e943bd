"""Training a reader: a language model learns to answer from passages, then from the embeddings of all levels.

Three stages share the time. `text`: an adapter learns to answer from the passages that searches gave. `reading`: the
projection and a second adapter, which starts from the first, learn to give back a chunk's text from its vectors (as
in-context autoencoders do, Ge et al. 2023), to go on where it ends, and to fill gaps in it. `answering`: both learn to
answer questions from the vectors of real searches, by the right answer and by what the first adapter says that has
read the text (distillation, Hinton et al. 2015); in some examples the text is there too, so that both can be used
together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from jaxtyping import Float, Int64
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from treemem.errors import InputError
from treemem.hierarchy.context import GatheredVectors, PassageText, joined
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.generate import LocalModel
from treemem.hierarchy.reader import (
    ADAPTERS,
    CONFIG_FILE,
    PROJECTION_FILE,
    How,
    Reader,
    ReaderConfig,
    ReaderPrompt,
    ReadingModel,
    embedding_scale,
    generate_many,
    model_id,
    passage_ids,
    reader_prompt,
    save_reader,
    tensors,
)
from treemem.training.examples import Examples
from treemem.training.lightning import accelerator, fit, quiet
from treemem.types import Progress, no_progress

Task = Literal["text", "restore", "continue", "fill", "vectors", "both"]
STAGES = ("text", "reading", "answering")
MIXTURES: dict[str, dict[Task, float]] = {
    "text": {"text": 1.0},
    "reading": {"restore": 0.6, "continue": 0.05, "fill": 0.35},
    "answering": {"vectors": 0.7, "both": 0.05, "restore": 0.05, "fill": 0.2},
}
"""Shares of the examples of each stage."""
CPU_TOKENS, GPU_TOKENS = 2048, 32768
"""Tokens of a batch: some ten seconds of two cores, or 30 GB of a GPU, where the model has 135 million weights."""
SHORTEST = 20
"""Characters of a chunk that is worth giving back."""
RESTORED = {1: 0.6, 2: 0.2, 8: 0.2}
"""How many windows of a chunk are given back at once, and how often; short ones teach the most in a second."""
NEAR = 8
"""Half of the chunks among which a gap is to be filled stand at most so far from the right one."""
INSTRUCTIONS: dict[Task, str] = {
    "restore": "Write down the text that the memory holds.",
    "continue": "Write how the text goes on.",
}
STATE_FILE = "state.json"
_FACT = re.compile(r"(?<=[\w,;] )(?:[A-Z][\w'-]+(?: (?:of |the |de )?[A-Z][\w'-]+)*|\d[\d,.]*\d|\d+)(?=[ .,;:!?])")
"""A name or number inside a sentence: what is left out of it to be filled in."""


@dataclass(frozen=True)
class ReaderTraining:
    """How long and with what a reader is trained."""

    minutes: float = 25.0
    """Of all stages together; what the preparation takes is not counted."""
    steps: int | None = None
    """In place of the minutes: so many steps in each stage; for runs that can be repeated exactly."""
    shares: tuple[float, float, float] = (0.25, 0.4, 0.35)
    """Of the time, for `text`, `reading` and `answering`; a stage without a share is left out."""
    batch_tokens: int = 0
    """Most tokens in a batch, padding included; 0 for what suits the device (`CPU_TOKENS`, `GPU_TOKENS`)."""
    batch: int = 512
    """Most examples in a batch."""
    rate: float = 2e-3
    """Highest learning rate of the adapters."""
    projection_rate: float = 2e-3
    weight_decay: float = 0.01
    text_tokens: int = 900
    """Most tokens of a prompt with passages."""
    answer_tokens: int = 48
    """Most tokens of an answer."""
    distil: float = 0.5
    """Weight of the distillation beside the likelihood of the right answer."""
    teacher: int = 32
    """How many of the likeliest tokens of the teacher are kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or (self.steps is not None and self.steps < 1):
            raise InputError(f"minutes = {self.minutes}, steps = {self.steps}: they must be above 0")
        if min(self.shares) < 0 or sum(self.shares) == 0 or (self.shares[1] == 0) != (self.shares[2] == 0):
            raise InputError(
                f"shares = {self.shares}: none below 0, not all 0, and reading and answering only with each other"
            )


@dataclass
class Drawn:
    """One example as the model is trained on it."""

    prompt: ReaderPrompt
    given: GatheredVectors | None
    target: list[int]
    teacher: tuple[np.ndarray, np.ndarray] | None = None
    """Likeliest tokens at each place of the target, and their logarithms of probability."""


@dataclass
class Batch:
    """Some examples, padded on the right."""

    ids: Int64[Tensor, "b n"]
    """What follows an example is padding, which no state of the example sees."""
    wanted: Int64[Tensor, "m 2"]
    """Row and place of the states that predict the targets."""
    targets: Int64[Tensor, " m"]
    vector_places: Int64[Tensor, "v 2"]
    vectors: tuple[Tensor, ...] | None
    taught: Int64[Tensor, " t"]
    """Which targets a teacher has an opinion of, of which the next two tell."""
    teacher_ids: Int64[Tensor, "t k"]
    teacher_logs: Float[Tensor, "t k"]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same where a GPU can fetch it from while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        own: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        vectors = self.vectors
        if vectors is not None:
            # The levels stay: which rows are of a level is found out without waiting for the GPU.
            vectors = tuple(part if i == 1 else change(part) for i, part in enumerate(vectors))
        return Batch(**own, vectors=vectors)


class ReaderData:
    """Draws examples of every task."""

    def __init__(
        self, model: LocalModel, sets: Sequence[Examples], config: ReaderTraining, reader: ReaderConfig
    ) -> None:
        """Prepare what is drawn from.

        Args:
            model: its tokenizer and chat template are used.
            sets: examples whose vectors were read.
            config: sizes.
            reader: how much a model is given.
        """
        self.model = model
        self.sets = list(sets)
        self.config = config
        self.shape = (reader.nodes, reader.chunks, reader.more)
        self.passages = reader.chunks
        self.questions = [(s, r) for s, own in enumerate(sets) for r, row in enumerate(own.rows) if any(row.answers)]
        self.chunks = [(s, c) for s, own in enumerate(sets) for c, text in enumerate(own.texts) if len(text) > SHORTEST]
        self._cut: dict[PassageText, list[int]] = {}
        # Once, before there are workers, each of which would do it again.
        shown = {passage for own in self.sets for row in own.rows for passage in row.passages[: self.passages]}
        self._cut.update(zip(shown, passage_ids(model, list(shown)), strict=True))
        self.teacher: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        ends = model.model.generation_config.eos_token_id
        self.end = ends[0] if isinstance(ends, list) else int(ends)

    def cut(self, model: LocalModel, passages: Sequence[PassageText]) -> list[list[int]]:
        """`passage_ids`, remembered."""
        return [self._cut[passage] for passage in passages]

    def target(self, text: str | list[int], most: int | None = None, *, ended: bool = True) -> list[int]:
        """Token ids of what is to be said, with the end mark where all of it fits."""
        most = most or self.config.answer_tokens
        ids = self.model.encode(text) if isinstance(text, str) else text
        return [*ids[:most], *([self.end] if ended and len(ids) <= most else [])]

    def question(self, where: tuple[int, int], how: How, rng: np.random.Generator | None = None) -> Drawn:
        """A question as it is asked; with fewer passages at times where random numbers are given."""
        own = self.sets[where[0]]
        row = own.rows[where[1]]
        count = 0
        if how != "vectors":
            count = self.passages if rng is None else int(rng.integers(1, self.passages + 1))
        given = own.given(row, self.shape) if how != "text" else None
        most = self.config.text_tokens + (len(given) if given is not None else 0)
        prompt = reader_prompt(
            self.model, row.question, row.passages[:count], 0 if given is None else len(given), most, self.cut
        )
        answer = min(row.answers, key=len) if rng is None else row.answers[rng.integers(len(row.answers))]
        return Drawn(prompt, given, self.target(answer))

    def draw(self, task: Task, rng: np.random.Generator) -> Drawn | None:
        """One example of a task; None where the drawn chunk does not serve."""
        if task in ("text", "vectors", "both"):
            where = self.questions[rng.integers(len(self.questions))]
            if task == "text":
                return self.question(where, "text", rng)
            taught = where in self.teacher
            drawn = self.question(where, task, None if taught else rng)
            if taught:
                drawn.teacher = self.teacher[where]
            return drawn
        s, chunk = self.chunks[rng.integers(len(self.chunks))]
        own = self.sets[s]
        text = own.texts[chunk]
        if task == "restore":
            pieces = own.pieces[chunk]
            count = min(len(pieces), int(rng.choice(list(RESTORED), p=list(RESTORED.values()))))
            first = int(rng.integers(len(pieces) - count + 1))
            said = text[pieces[first][0] : pieces[first + count - 1][1]]
            parts = own.parts(chunk, 0.5, 0)[first : first + count]
            return self._about(own, parts, INSTRUCTIONS[task], self.target(said, 160))
        if task == "continue":
            if chunk == 0 or not own.follows[chunk]:
                return None
            return self._about(own, own.parts(chunk - 1, 0.5, 0), INSTRUCTIONS[task], self.target(text, 64))
        facts = list(_FACT.finditer(text))
        if not facts:
            return None
        fact = facts[rng.integers(len(facts))]
        begin = max(text.rfind(". ", 0, fact.start()) + 2 if ". " in text[: fact.start()] else 0, fact.start() - 120)
        stop = text.find(". ", fact.end())
        stop = min(stop + 1 if stop >= 0 else len(text), fact.end() + 60)
        gap = f"{text[begin : fact.start()]}___{text[fact.end() : stop]}"
        far = rng.choice(len(own.texts), min(self.passages, len(own.texts)), replace=False)
        near = np.clip(chunk + rng.integers(-NEAR, NEAR + 1, self.passages), 0, len(own.texts) - 1)
        others = [int(a if rng.random() < 0.5 else b) for a, b in zip(far, near, strict=False)]
        shown = [other for other in dict.fromkeys(others[: rng.integers(0, self.passages)]) if other != chunk]
        shown.insert(int(rng.integers(0, min(3, len(shown)) + 1)), chunk)
        parts = [part for rank, number in enumerate(shown) for part in own.parts(number, 0.5, rank)]
        return self._about(own, parts, f"What belongs in the gap: {gap}", self.target(fact[0]))

    def _about(self, own: Examples, parts: Sequence[Any], asked: str, target: list[int]) -> Drawn:
        given = joined(parts, own.chunks.shape[1])
        return Drawn(reader_prompt(self.model, asked, (), len(given)), given, target)

    def batches(self, mixture: Mapping[Task, float], seed: int) -> Iterator[Batch]:
        """Batches without end, each of examples of similar length."""
        rng = np.random.default_rng(seed)
        tasks = [task for task in mixture if self._possible(task)]
        chances = np.array([mixture[task] for task in tasks])
        chances /= chances.sum()
        while True:
            pool: list[Drawn] = []
            while len(pool) < 2 * self.config.batch:
                drawn = self.draw(tasks[rng.choice(len(tasks), p=chances)], rng)
                if drawn is not None:
                    pool.append(drawn)
            pool.sort(key=lambda own: len(own.prompt.ids) + len(own.target))
            groups: list[list[Drawn]] = [[]]
            for drawn in pool:
                longest = len(drawn.prompt.ids) + len(drawn.target)
                if groups[-1] and (
                    (len(groups[-1]) + 1) * longest > self.config.batch_tokens or len(groups[-1]) >= self.config.batch
                ):
                    groups.append([])
                groups[-1].append(drawn)
            for place in rng.permutation(len(groups)):
                yield collate(groups[place], self.config.teacher)

    def _possible(self, task: Task) -> bool:
        return bool(self.questions if task in ("text", "vectors", "both") else self.chunks)


def collate(drawn: Sequence[Drawn], teacher: int) -> Batch:
    """Examples as one batch."""
    longest = max(len(own.prompt.ids) + len(own.target) for own in drawn)
    ids = torch.zeros((len(drawn), longest), dtype=torch.long)
    wanted: list[tuple[int, int]] = []
    targets: list[int] = []
    places: list[tuple[int, int]] = []
    taught: list[int] = []
    opinions = [(np.zeros((0, teacher), np.int64), np.zeros((0, teacher), np.float32))]
    for row, own in enumerate(drawn):
        begin, end = len(own.prompt.ids), len(own.prompt.ids) + len(own.target)
        ids[row, :end] = torch.tensor([*own.prompt.ids, *own.target])
        if own.teacher is not None and len(own.teacher[0]) == len(own.target):
            taught += range(len(targets), len(targets) + len(own.target))
            opinions.append(own.teacher)
        wanted += [(row, place) for place in range(begin - 1, end - 1)]
        targets += own.target
        places += [(row, place) for place in own.prompt.vectors]
    parts = [own.given for own in drawn if own.given is not None and len(own.prompt.vectors)]
    stacked = [torch.cat(columns) for columns in zip(*(tensors(own, "cpu") for own in parts), strict=True)]
    return Batch(
        ids,
        torch.tensor(wanted),
        torch.tensor(targets),
        torch.tensor(places, dtype=torch.long).reshape(-1, 2),
        tuple(stacked) if parts else None,
        torch.tensor(taught, dtype=torch.long),
        torch.from_numpy(np.concatenate([tokens for tokens, _ in opinions]).astype(np.int64)),
        torch.from_numpy(np.concatenate([logs for _, logs in opinions]).astype(np.float32)),
    )


class _Stream(IterableDataset[Batch]):
    def __init__(self, data: ReaderData, mixture: Mapping[Task, float], seed: int) -> None:
        self.data, self.mixture, self.seed = data, mixture, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        return self.data.batches(self.mixture, self.seed * 64 + (0 if worker is None else worker.id))


class ReaderModule(lightning.LightningModule):
    """One stage: an adapter of the language model, and from the second stage on the projection."""

    def __init__(self, peft_model: Any, reader: Reader, stage: str, config: ReaderTraining) -> None:
        """Take what is trained; whatever is frozen is no part of the checkpoints."""
        super().__init__()
        self.config = config
        self.stage = stage
        self.adapter = "text" if stage == "text" else "vectors"
        self._peft = [peft_model]  # in a list, so that it is no submodule and its frozen weights are not saved
        peft_model.set_adapter(self.adapter)
        self.adapters = nn.ParameterList(
            parameter for name, parameter in peft_model.named_parameters() if f".{self.adapter}." in name
        )
        self.projection = reader.projection if stage != "text" else None
        self.strict_loading = False
        self._begin = time.monotonic()
        self.spent = 0.0
        """Seconds of earlier parts of an interrupted run."""
        self.budget: float | None = None
        """Seconds of this stage, None where steps are counted."""

    @property
    def fraction(self) -> float:
        """How much of the stage is over."""
        if self.budget is None:
            return self.global_step / max(1, self.config.steps or 1)
        return min(1.0, (self.spent + time.monotonic() - self._begin) / self.budget)

    def on_fit_start(self) -> None:
        """Start the clock."""
        self._peft[0].to(self.device).train()
        self._begin = time.monotonic()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how much of the time is over."""
        checkpoint["spent"] = self.spent + time.monotonic() - self._begin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.spent = checkpoint["spent"]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch."""
        return batch.to(device)

    def logits(self, batch: Batch) -> Float[Tensor, "m vocabulary"]:
        """What the model thinks at each place of the targets."""
        model = self._peft[0].get_base_model()
        embeds = model.get_input_embeddings()(batch.ids)
        if batch.vectors is not None and self.projection is not None:
            rows, columns = batch.vector_places.T
            embeds = embeds.index_put((rows, columns), self.projection(*batch.vectors).to(embeds.dtype))
        # No mask: padding stands behind what is wanted, where nothing looks; attention is faster without one.
        states = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        wanted = states[batch.wanted[:, 0], batch.wanted[:, 1]]
        return model.get_output_embeddings()(wanted).float()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Likelihood of the targets, and nearness to the teacher where there is one."""
        logits = self.logits(batch)
        loss = nn.functional.cross_entropy(logits, batch.targets)
        if self.config.distil and len(batch.taught):
            logs = logits[batch.taught].log_softmax(-1).gather(1, batch.teacher_ids)
            loss = loss - self.config.distil * (batch.teacher_logs.exp() * logs).sum(1).mean()
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """Learning rates follow the clock: up over a twentieth, then down along a cosine."""
        fraction = self.fraction
        factor = min(1.0, fraction / 0.05 + 0.02) * 0.5 * (1 + np.cos(np.pi * min(1.0, fraction)))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["highest"] * factor

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the projection learns faster than the adapters."""
        groups = [{"params": list(self.adapters), "lr": self.config.rate, "highest": self.config.rate}]
        if self.projection is not None:
            rate = self.config.projection_rate
            groups.append({"params": list(self.projection.parameters()), "lr": rate, "highest": rate})
        return torch.optim.AdamW(groups, weight_decay=self.config.weight_decay, betas=(0.9, 0.98))


class _Clock(Callback):
    """Ends a stage when its time is over, tells progress, and keeps checkpoints."""

    def __init__(self, checkpoint: Path, progress: Progress, every: float = 60.0) -> None:
        self.checkpoint, self.progress, self.every = checkpoint, progress, every
        self.saved = time.monotonic()
        self.done = False

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(trainer.callback_metrics["loss"]) if trainer.global_step % 5 == 0 else None
        if loss is not None:
            self.told = f"stage {module.stage}, loss {loss:.2f}"
        fraction = module.fraction
        total = module.budget or module.config.steps or 1
        self.progress(getattr(self, "told", f"stage {module.stage}"), fraction * total, total)
        if fraction >= 1.0:
            self.done = True
            trainer.should_stop = True
        elif time.monotonic() - self.saved > self.every:
            trainer.save_checkpoint(self.checkpoint)
            self.saved = time.monotonic()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            with contextlib.suppress(OSError):
                trainer.save_checkpoint(self.checkpoint)


def fit_maps(
    reader: Reader, model: LocalModel, sets: Sequence[Examples], most: int = 4000, ridge: float = 1e-2
) -> float:
    """Begin the projection where it is of use at once: a window becomes the sum of its words' token embeddings.

    What all token embeddings of a model have in common is large, and says nothing; so a projected vector is their mean
    plus the ridge regression, on reader vectors, of what the tokens of a window have beside it. That part is as large
    as it is in a single token. Rare tokens weigh more (by their inverse document frequency).

    Args:
        reader: whose projection is set, all levels alike.
        model: whose token embeddings are aimed at.
        sets: whose reader vectors are made.
        most: so many chunks are looked at, evenly spaced.
        ridge: penalty, as a share of the mean square of an input.

    Returns:
        Mean cosine of what is predicted and what was aimed at, the means taken off.
    """
    chosen = [(own, chunk) for own in sets for chunk in range(len(own.texts))]
    chosen = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, min(most, len(chosen))).astype(int))]
    texts = [own.texts[chunk][begin:end] for own, chunk in chosen for begin, end in own.pieces[chunk]]
    if not texts:
        return 0.0
    table = model.model.get_input_embeddings().weight.detach()
    device, scale = table.device, embedding_scale(model.model)
    given = torch.from_numpy(np.concatenate([own.windows_of(chunk) for own, chunk in chosen])).float().to(device)
    given = nn.functional.normalize(given, dim=1) * given.shape[1] ** 0.5

    ids = model.encode_many(texts)
    rows = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(own) for own in ids])).to(device)
    flat = torch.tensor([number for own in ids for number in own], device=device)
    seen = torch.bincount(torch.unique(rows * len(table) + flat) % len(table), minlength=len(table))
    rarity = torch.log(len(ids) / seen.clamp(min=1))
    common = table.float().mean(0)
    wanted = torch.zeros((len(ids), table.shape[1]), device=device)
    for start in range(0, len(flat), 1 << 18):
        own = flat[start : start + (1 << 18)]
        wanted.index_add_(0, rows[start : start + (1 << 18)], (table[own].float() - common) * rarity[own, None])

    middle = given.mean(0)
    inputs, wanted = given - middle, wanted - wanted.mean(0)
    gram = inputs.T @ inputs
    gram += torch.eye(len(gram), device=device) * gram.trace() / len(gram) * ridge
    fitted = torch.linalg.solve(gram, inputs.T @ wanted)
    predicted = inputs @ fitted
    cosine = nn.functional.cosine_similarity(predicted, wanted, dim=1).mean()
    deviation = (table.float() - common).pow(2).mean().sqrt()
    fitted *= deviation / predicted.pow(2).mean().sqrt().clamp(min=1e-12) / scale
    with torch.no_grad():
        for linear in reader.projection.maps:
            linear.get_parameter("weight").copy_(fitted.T)
        reader.projection.level.weight[:] = common / scale - middle @ fitted
    return float(cosine)


class ReaderTrainer:
    """Trains a reader in a folder; the run that was interrupted there goes on."""

    def __init__(
        self,
        model: LocalModel,
        encoder: Encoder,
        sets: Sequence[Examples],
        folder: str | Path,
        *,
        config: ReaderTraining | None = None,
        shape: Mapping[str, Any] | None = None,
        start: Reader | None = None,
        device: str = "auto",
        progress: Progress = no_progress,
    ) -> None:
        """Prepare a run.

        Args:
            model: the language model; it is adapted in place while it is trained, so load one for this alone.
            encoder: encoder 1 of the examples.
            sets: examples to train on.
            folder: gets the reader, and until the end checkpoints in `checkpoints`.
            config: how.
            shape: fields of `ReaderConfig`.
            start: a reader that is gone on with, as far as it has learned to read; else one is made anew.
            device: `auto`, `cpu` or `cuda`.
            progress: told about seconds (or steps) of each stage.

        Raises:
            InputError: a setting cannot be used, or the reader to start from is for another encoder or language model.
        """
        self._options = accelerator(device)
        if self._options["accelerator"] == "cpu" and model.model.dtype == torch.bfloat16:
            self._options["precision"] = "bf16-mixed"  # as the model was loaded, where the processor computes in it
        self.config = config or ReaderTraining()
        if not self.config.batch_tokens:
            tokens = GPU_TOKENS if self._options["accelerator"] == "gpu" else CPU_TOKENS
            self.config = replace(self.config, batch_tokens=tokens)
        self.model, self.encoder, self.sets = model, encoder, list(sets)
        self.folder = Path(folder)
        check_folder(self.folder, start)
        self.progress = progress
        width = model.model.get_input_embeddings().weight.shape[1]
        made = ReaderConfig(encoder.info, model_id(model), model.name, width, **(shape or {}))
        if not self._by_vectors:
            made = replace(made, reads=("text",))
        self._begun: tuple[How, ...] = ()
        self._start = None if start is None else _digest(start)
        if start is not None:
            start.check(encoder.info, model)
            made = replace(made, rank=start.config.rank, hidden=start.config.hidden, levels=start.config.levels)
            made = replace(made, reads=start.config.reads if "vectors" in start.config.reads else made.reads)
            self._begun = start.config.reads
        torch.manual_seed(self.config.seed)
        self.reader = Reader(made, embedding_scale(model.model))
        self.peft_model = _with_adapters(model.model, made.rank)
        if start is not None:
            for name, folder_of in start.adapters.items():
                self._set_adapter(name, folder_of)
            if "vectors" in self._begun:
                self.reader.projection.load_state_dict(start.projection.state_dict())
        self.data: ReaderData | None = None
        self.steps: dict[str, int] = {}
        """Steps of each stage of this run."""
        self.fitted = 0.0
        """Mean cosine of what the maps gave before training and what they aimed at."""

    def fit(self) -> Reader:
        """Train all stages that are not done yet, and save the reader after each.

        Raises:
            InputError: there is nothing to train on, or the folder holds a run of other settings or examples.
            KeyboardInterrupt: it was interrupted; the next run goes on.
        """
        done = self._resume()
        for own in self.sets if self._by_vectors else ():
            if own.windows is None:
                own.read(self.encoder, self.progress)
        self.data = ReaderData(self.model, self.sets, self.config, self.reader.config)
        if not self.data.questions and not (self._by_vectors and self.data.chunks):
            raise InputError(
                "there is nothing to train a reader on: no questions with answers, and no texts to be read as vectors"
            )
        if self._by_vectors and not {"reading", "answering"} & set(done) and "vectors" not in self._begun:
            self.progress("fitting the maps", 0, None)
            self.fitted = fit_maps(self.reader, self.model, self.sets)
        with quiet():
            for number, stage in enumerate(STAGES):
                if stage in done or not self.config.shares[number]:
                    continue
                if not (self.data.chunks if stage == "reading" else self.data.questions):
                    continue
                if stage == "answering" and self.config.distil and "text" in done:
                    self._teach()
                if stage == "reading" and "text" in done and "vectors" not in self._begun:
                    _copy_adapter(self.peft_model)  # whoever has learned to answer from text need not begin anew
                self._stage(number, stage)
                done.append(stage)
                self._save(done)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.reader.adapters = {name: self.folder / name for name in self._adapters}
        self.reader.eval()
        return self.reader

    def _stage(self, number: int, stage: str) -> None:
        module = ReaderModule(self.peft_model, self.reader, stage, self.config)
        if self.config.steps is None:
            module.budget = self.config.minutes * 60 * self.config.shares[number] / sum(self.config.shares)
        checkpoint = self.folder / "checkpoints" / f"{stage}.ckpt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        clock = _Clock(checkpoint, self.progress)
        assert self.data is not None
        workers = max(2, (os.cpu_count() or 4) - 2) if self._options["accelerator"] == "gpu" else 0
        stream = _Stream(self.data, MIXTURES[stage], self.config.seed + number)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            pin_memory=bool(workers),
            prefetch_factor=4 if workers else None,
            worker_init_fn=_worker,
        )
        trainer = lightning.Trainer(
            max_steps=self.config.steps or -1,
            max_epochs=-1 if self.config.steps is None else None,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            default_root_dir=self.folder,
            **self._options,
        )
        from peft.helpers import disable_input_dtype_casting

        # Mixed precision casts what it needs; peft would cast everything to float32 first.
        with disable_input_dtype_casting(self.peft_model, active=self._mixed):
            fit(trainer, module, loader, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=False)
        self.steps[stage] = trainer.global_step

    @torch.no_grad()
    def _teach(self) -> None:
        """Let the model that was taught to answer from text answer every question, and keep what it thinks."""
        assert self.data is not None
        device = torch.device("cuda" if self._options["accelerator"] == "gpu" else "cpu")
        module = ReaderModule(self.peft_model, self.reader, "text", self.config)
        self.peft_model.to(device).eval()
        drawn = [self.data.question(where, "text") for where in self.data.questions]
        order = sorted(range(len(drawn)), key=lambda i: -len(drawn[i].prompt.ids))
        start = 0
        while start < len(order):
            count = max(
                1, self.config.batch_tokens // (len(drawn[order[start]].prompt.ids) + self.config.answer_tokens)
            )
            rows = order[start : start + count]
            batch = collate([drawn[i] for i in rows], self.config.teacher).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._mixed):
                logs = module.logits(batch).log_softmax(-1)
            best = logs.topk(min(self.config.teacher, logs.shape[1]), dim=1)
            ends = np.cumsum([len(drawn[i].target) for i in rows])[:-1]
            for row, ids, values in zip(
                rows, np.split(best.indices.cpu().numpy(), ends), np.split(best.values.cpu().numpy(), ends), strict=True
            ):
                self.data.teacher[self.data.questions[row]] = (ids, values)
            start += len(rows)
            self.progress("what the teacher thinks", start, len(order))

    @property
    def _by_vectors(self) -> bool:
        """Whether this run teaches to read vectors."""
        return any(self.config.shares[1:])

    @property
    def _adapters(self) -> tuple[str, ...]:
        """Those that the reader has in the end."""
        return ADAPTERS if "vectors" in self.reader.config.reads else ADAPTERS[:1]

    @property
    def _mixed(self) -> bool:
        """Whether products are computed in bfloat16."""
        return self._options.get("precision") == "bf16-mixed"

    # ---- files

    def _save(self, done: Sequence[str]) -> None:
        for name in self._adapters:
            self.peft_model.save_pretrained(str(self.folder / "saving"), selected_adapters=[name])
            shutil.rmtree(self.folder / name, ignore_errors=True)
            _halved(self.folder / "saving" / name / "adapter_model.safetensors")
            (self.folder / "saving" / name / "README.md").unlink(missing_ok=True)
            _named(self.folder / "saving" / name / "adapter_config.json", self.model.name)
            (self.folder / "saving" / name).rename(self.folder / name)
        shutil.rmtree(self.folder / "saving", ignore_errors=True)
        save_reader(self.reader, self.folder)
        self._note(done)

    def _note(self, done: Sequence[str]) -> None:
        """Note what the next run has to know if this one is interrupted."""
        place = self.folder / "checkpoints" / STATE_FILE
        place.with_suffix(".tmp").write_text(json.dumps({"done": list(done), **self._run}))
        place.with_suffix(".tmp").rename(place)

    @property
    def _run(self) -> dict[str, Any]:
        """What makes a run another one."""
        run = {
            "config": asdict(self.config),
            "model": self.reader.config.model,
            "examples": [own.digest for own in self.sets],
            "start": self._start,
        }
        return dict(json.loads(json.dumps(run)))

    def _resume(self) -> list[str]:
        """Stages that an interrupted run of the same settings and examples has done."""
        place = self.folder / "checkpoints" / STATE_FILE
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            state = json.loads(place.read_text()) if place.exists() else None
            if state is None:
                self._note([])
                return []
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}: it cannot be used ({error})") from error
        other = [name for name, value in self._run.items() if state.get(name) != value]
        if other:
            raise InputError(
                f"{self.folder}: an interrupted run of other settings is there ({', '.join(other)}); repeat its "
                "command, or remove the folder"
            )
        if not state["done"]:
            return []
        from safetensors.torch import load_file

        try:
            for name in self._adapters:
                self._set_adapter(name, self.folder / name)
            saved = load_file(self.folder / PROJECTION_FILE) if "vectors" in self._adapters else {}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.folder}: the interrupted run there is damaged ({error}); remove it") from error
        if saved:
            self.reader.projection.load_state_dict({key: value.float() for key, value in saved.items()})
        return list(state["done"])

    def _set_adapter(self, name: str, folder: Path) -> None:
        """Set an adapter to saved weights."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        weights = {key: value.float() for key, value in load_file(folder / "adapter_model.safetensors").items()}
        set_peft_model_state_dict(self.peft_model, weights, adapter_name=name)


def check_folder(folder: Path, start: Reader | None = None) -> None:
    """Raise InputError where a run cannot save its reader; one that is there may be gone on with, not replaced."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: that is a file; name a folder for the reader")
    own = start is not None and any(place.resolve().parent == folder.resolve() for place in start.adapters.values())
    if (folder / CONFIG_FILE).exists() and not (folder / "checkpoints" / STATE_FILE).exists() and not own:
        raise InputError(f"{folder}: a reader is there already; name another folder, or go on with it by --start")


def _digest(reader: Reader) -> str:
    """By which a run knows the reader again that it began with."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, folder in sorted(reader.adapters.items()):
        hashed.update(name.encode() + (folder / "adapter_model.safetensors").read_bytes())
    return hashed.hexdigest()


def _with_adapters(model: Any, rank: int) -> Any:
    """The model with two untrained adapters on all its projections."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what one library deprecates for the other
        made = get_peft_model(model, config, adapter_name=ADAPTERS[0])
        made.add_adapter(ADAPTERS[1], replace(config))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return made


def _copy_adapter(peft_model: Any) -> None:
    """Set the second adapter to what the first has learned."""
    parameters = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".{ADAPTERS[1]}." in name:
                parameter.copy_(parameters[name.replace(f".{ADAPTERS[1]}.", f".{ADAPTERS[0]}.")])


def _worker(number: int) -> None:
    """A tokenizer that starts threads in a forked process may wait for ever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _named(path: Path, model: str) -> None:
    """Name the model in an adapter's description, not the folder that it was loaded from."""
    described = json.loads(path.read_text())
    described["base_model_name_or_path"] = model
    path.write_text(json.dumps(described, indent=1) + "\n")


def _halved(path: Path) -> None:
    """Write weights anew as float16."""
    from safetensors.torch import load_file, save_file

    save_file({name: value.half() for name, value in load_file(path).items()}, path)


CONDITIONS: tuple[str, ...] = ("unadapted", "no context", "shuffled", "vectors", "text", "both", "gold")
"""What is judged: the model as it came, with passages; and with the reader: nothing but the question, the vectors of
another question, its own vectors, its passages, both, the text that holds the answer."""


def replies(
    reading: ReadingModel,
    examples: Examples,
    condition: str,
    *,
    text_tokens: int = 900,
    max_tokens: int = 32,
    batch_tokens: int = 16384,
    progress: Progress = no_progress,
) -> list[str]:
    """What a model with a reader says to each question.

    Args:
        reading: both.
        examples: whose reader vectors are made.
        condition: one of `CONDITIONS`.
        text_tokens: most tokens of a prompt with passages, those of vectors not counted.
        max_tokens: most tokens of a reply.
        batch_tokens: see `generate_many`.
        progress: told how many replies there are.
    """
    config, rows = reading.reader.config, examples.rows
    shape = (config.nodes, config.chunks, config.more)
    how: How = {"shuffled": "vectors", "vectors": "vectors", "both": "both"}.get(condition, "text")  # type: ignore[assignment]
    model = reading.model if condition == "unadapted" else reading.model_for(how)
    prompts, given = [], []
    for i, row in enumerate(rows):
        own: GatheredVectors | None = None
        if how != "text":
            own = examples.given(rows[(i + len(rows) // 2) % len(rows)] if condition == "shuffled" else row, shape)
        passages: Sequence[PassageText] = ()
        if condition in ("unadapted", "text", "both"):
            passages = row.passages[: config.chunks]
        elif condition == "gold":
            passages = row.gold
        vectors = 0 if own is None else len(own)
        prompts.append(reader_prompt(model, row.question, passages, vectors, text_tokens + vectors))
        given.append(own)
    return generate_many(
        model, reading.projection, prompts, given, max_tokens, batch_tokens,
        told=lambda done: progress(f"answering: {condition}", done, len(rows)),
    )  # fmt: skip
