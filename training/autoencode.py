"""An autoencoder of text: tokens into one vector, and out of it again. What `treemem autoencode` does."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from treemem.errors import InputError, MissingPackage, ModelError, OutOfSpace
from treemem.hierarchy.readers import ReadReport, read
from treemem.hierarchy.vector import VectorConfig, save_encoder
from treemem.training.lightning import accelerator, fit, quiet
from treemem.training.prose import (
    ASIDE_EVERY,
    Tokens,
    Window,
    aligned,
    kept,
    load_tokenizer,
    pieces_of,
    read_tokens,
    windows,
)
from treemem.training.rebuild import AutoEncoder, corrupted
from treemem.types import Progress, no_progress

CHECKPOINT = "last.ckpt"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.json"
ENCODER_FOLDER = "encoder"
CURVE_FILE = "curve.png"
ROUNDS = (1, 2, 4, 8)
"""Rounds of decoding that are tried; training texts choose."""
SAMPLES = 5
CHOSEN_SHARE = 0.02
"""Of the tokens, kept apart for choosing the rounds."""
_MARKS = 50
"""Points of the curve."""
_LOOKS = 10
"""How often held-out texts are rebuilt on the way."""
_CHOSEN_MOST = 400
"""Windows that the rounds are chosen on, at most."""
_FORCED = 32
"""Windows that are decoded with the true tokens before each place, which takes as many passes as there are tokens."""


@dataclass(frozen=True, kw_only=True)
class AutoEncodeConfig:
    """How an autoencoder is trained."""

    minutes: float = 25
    steps: int | None = None
    """In place of minutes: the same number of steps gives the same weights on the same machine."""
    batch: int = 256
    rate: float = 1e-3
    """Highest learning rate, of one cycle that follows the time; tokens' embeddings learn twice as fast."""
    warm_up: float = 0.04
    weight_decay: float = 0.01
    whole: float = 0.5
    """Share of texts that are decoded with no token known."""
    wrong: float = 0.1
    """Share of wrong ones among the tokens that are told to the decoder."""
    scored: float = 0.5
    """Share of places that are compared with the vocabulary in a step; drawn anew each time."""
    checkpoint_seconds: float = 300
    held_out: int = 1000
    """Held-out windows that are measured at the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("minutes", "batch", "rate", "held_out", "checkpoint_seconds"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} = {getattr(self, name)}: it must be more than 0")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps = {self.steps}: it must be at least 1")
        for name in ("whole", "wrong", "scored", "warm_up"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} = {getattr(self, name)}: it must be between 0 and 1")


@dataclass(frozen=True)
class Sample:
    """A held-out text and what was rebuilt of it."""

    text: str
    original: list[str]
    """Tokens."""
    rebuilt: list[str]

    def marked(self) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
        """Tokens of both, each with whether it stands in the longest common subsequence."""
        pairs = aligned(self.original, self.rebuilt)
        first, second = {i for i, _ in pairs}, {j for _, j in pairs}
        return (
            [(token, i in first) for i, token in enumerate(self.original)],
            [(token, j in second) for j, token in enumerate(self.rebuilt)],
        )


@dataclass(frozen=True)
class AutoEncodeReport:
    """What training gave."""

    folder: str
    shape: dict[str, Any]
    settings: dict[str, Any]
    device: str
    seconds: float
    """Of training, without reading and measuring."""
    steps: int
    examples: int
    train_tokens: int
    held_out: int
    """Windows of held-out texts that were measured."""
    figures: dict[str, float]
    """`token accuracy` free-running and teacher-forced, and what `treemem.training.prose.kept` tells."""
    rounds: int
    """Of decoding, chosen on texts of the training's kind that were kept apart."""
    by_rounds: dict[str, float]
    """Token accuracy there by the number of rounds."""
    curve: list[dict[str, float]]
    """Points: `seconds`, `steps`, `examples`, `loss`, at some of them `token accuracy` of held-out texts."""
    drawn: bool
    """False where the curve could not be drawn for want of matplotlib."""
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON of `treemem autoencode --json`."""
        return asdict(self)

    @classmethod
    def load(cls, folder: Path) -> AutoEncodeReport:
        """The report of a finished run.

        Raises InputError where there is none.
        """
        try:
            document = json.loads((folder / METRICS_FILE).read_text("utf-8"))
            samples = [Sample(**sample) for sample in document.pop("samples")]
            return cls(**{**document, "samples": samples})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{folder}: no finished autoencoder there ({METRICS_FILE} cannot be read)") from error


# ---- training


class _Steps(IterableDataset[int]):
    """Numbers without end: what a step trains on is drawn where the tokens lie, on the device."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class AutoEncoderModule(lightning.LightningModule):
    """An autoencoder under training; its schedule follows the time, so that it ends when the minutes do."""

    def __init__(
        self,
        model: AutoEncoder,
        tokens: Int32[Tensor, " n"],
        config: AutoEncodeConfig,
        judge: Callable[[AutoEncoder], float],
        progress: Progress = no_progress,
    ) -> None:
        """Prepare.

        Args:
            model: it is trained in place.
            tokens: what windows are drawn from.
            config: how.
            judge: token accuracy on held-out texts, asked a few times on the way.
            progress: told about examples, with the loss.
        """
        super().__init__()
        self.model = model
        self.config = config
        self.progress = progress
        self.register_buffer("tokens", tokens, persistent=False)
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        """Trained before this process."""
        self._judge = judge
        self._losses: list[Tensor] = []
        self._begin: float | None = None
        self._not_counted = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those of earlier processes too, without looks at held-out texts."""
        now = 0.0 if self._begin is None else time.monotonic() - self._begin - self._not_counted
        return self.seconds + now

    @property
    def share(self) -> float:
        """How much of the run is over."""
        if self.config.steps is not None:
            return self.global_step / self.config.steps
        return self.elapsed / (60 * self.config.minutes)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate."""
        if self._begin is None:
            self._begin = time.monotonic()
        share = min(1.0, self.share)
        rising = min(1.0, (share + 1e-3) / max(self.config.warm_up, 1e-6))
        falling = min(1.0, (1 - share) / 0.75)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["highest"] * rising * max(falling, 0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Float[Tensor, ""]:
        """The loss of windows drawn at random; which ones depends on seed and step alone."""
        config, tokens = self.config, self.tokens
        assert isinstance(tokens, Tensor)
        length = self.model.config.tokens
        generator = torch.Generator(tokens.device).manual_seed(config.seed * 1_000_003 + self.global_step)
        starts = torch.randint(
            0, len(tokens) - length + 1, (config.batch, 1), generator=generator, device=tokens.device
        )
        ids = tokens[starts + torch.arange(length, device=tokens.device)].long()
        given = corrupted(ids, config.whole, config.wrong, generator)
        scored = None
        if config.scored < 1:
            count = max(1, int(ids.numel() * config.scored))
            scored = torch.randint(0, ids.numel(), (count,), generator=generator, device=tokens.device)
        loss = self.model.loss(ids, given, scored)
        self._losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients here: Lightning refuses to where an optimizer is fused."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note a point of the curve, look at held-out texts, and stop where the time is over."""
        share = self.share
        marks = len(self.curve)
        if share >= (marks + 1) / _MARKS or share >= 1:
            looks = sum("token accuracy" in point for point in self.curve)
            self._note(share >= (looks + 1) / _LOOKS or share >= 1)
        elif self.global_step % 10 == 0:
            self._tell()
        if share >= 1:
            self.trainer.should_stop = True

    def _note(self, look: bool) -> None:
        loss = float(torch.stack(self._losses).float().mean()) if self._losses else float("nan")
        self._losses = []
        if not np.isfinite(loss):
            raise ModelError("training went astray: the loss is not finite; give a smaller rate")
        point = {
            "seconds": round(self.elapsed, 2),
            "steps": self.global_step,
            "examples": self.global_step * self.config.batch,
            "loss": round(loss, 4),
        }
        if look:
            begin = time.monotonic()
            self.model.eval()
            point["token accuracy"] = round(self._judge(self.model), 4)
            self.model.train()
            self._not_counted += time.monotonic() - begin
        self.curve.append(point)
        self._tell()

    def _tell(self) -> None:
        share = min(1.0, max(self.share, 1e-9))
        done = self.global_step * self.config.batch
        told = "training"
        if self.curve:
            told += f", loss {self.curve[-1]['loss']:.2f}"
        accuracy = [point["token accuracy"] for point in self.curve if "token accuracy" in point]
        if accuracy:
            told += f", held-out tokens {accuracy[-1]:.3f}"
        self.progress(told, done, round(done / share))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW: matrices are decayed, embeddings and vectors are not."""
        words = self.model.encoder.words.weight
        others = [p for p in self.model.parameters() if p is not words]
        config = self.config
        groups = [
            {"params": [p for p in others if p.ndim > 1], "highest": config.rate, "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "highest": config.rate, "weight_decay": 0.0},
            {"params": [words], "highest": 2 * config.rate, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.98), eps=1e-8, fused=self.device.type == "cuda")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the curve and the time."""
        checkpoint["autoencode"] = {"curve": self.curve, "seconds": self.elapsed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        self.curve = list(checkpoint["autoencode"]["curve"])
        self.seconds = float(checkpoint["autoencode"]["seconds"])


class _Keep(Callback):
    """Writes checkpoints: now and then, and where a run is broken off."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds, self._last = path, seconds, time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._last > self.seconds:
            self.write(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step:
            self.write(trainer)

    def write(self, trainer: lightning.Trainer) -> None:
        partial = self.path.with_name(self.path.name + ".part")
        trainer.save_checkpoint(partial)
        partial.replace(self.path)
        self._last = time.monotonic()


def train_autoencoder(
    prose: Sequence[str],
    folder: Path,
    *,
    shape: Mapping[str, Any] | None = None,
    config: AutoEncodeConfig | None = None,
    held_out: Sequence[str] = (),
    tokenizer: str = "minilm",
    device: str = "auto",
    resume: bool = False,
    progress: Progress = no_progress,
) -> AutoEncodeReport:
    """Train an autoencoder on prose, measure it on held-out texts, and write both.

    The folder gets `model.safetensors` and `config.json`, `encoder/` (for `treemem build --encoder`), `metrics.json`
    with the curve and samples, `curve.png`, and a card, `README.md`.

    Args:
        prose: what `read_tokens` takes.
        folder: where it goes.
        shape: fields of `VectorConfig`, but the vocabulary.
        config: how.
        held_out: files with texts to measure on; needed where `prose` are token files alone. Otherwise every 50th
            document is kept apart.
        tokenizer: see `load_tokenizer`.
        device: `auto`, `cpu` or `cuda`.
        resume: go on with the run that was interrupted in this folder.
        progress: told about tokens read and examples trained on.

    Raises:
        InputError: an option or a file cannot be used, there is too little text, or there is nothing to resume.
        ModelError: training went astray.
        OutOfSpace: the disk is full.
    """
    config = config or AutoEncodeConfig()
    options = accelerator(device)
    loaded = load_tokenizer(tokenizer)
    made = VectorConfig(**{**(shape or {}), "vocabulary": loaded.get_vocab_size()})
    _ready(folder, resume)
    train, texts = _texts(prose, held_out, loaded, progress)
    judged = windows(texts, loaded, made.tokens, config.held_out, config.seed)
    if not judged:
        raise InputError(f"no held-out text of {made.tokens} tokens; give longer ones, or fewer --tokens")
    apart = min(max(int(len(train.ids) * CHOSEN_SHARE), 4 * made.tokens), _CHOSEN_MOST * made.tokens)
    ids = torch.from_numpy(train.ids.astype(np.int32))
    ids, chosen_on = ids[: len(ids) - apart], ids[len(ids) - apart :]
    if len(ids) < 8 * made.tokens:
        raise InputError(
            f"{len(train.ids):,} tokens to train on: give more text, at least some thousand windows of {made.tokens}"
        )
    torch.manual_seed(config.seed)
    model = AutoEncoder(made, torch.bincount(ids.long(), minlength=made.vocabulary))
    with _told_full(folder):
        module = _fit(model, ids, config, judged, folder, options, resume, progress)
        if options["accelerator"] == "gpu":
            model.cuda()  # Lightning has brought it back
        return _finish(module, chosen_on, judged, loaded, folder, len(train.ids), progress)


def _ready(folder: Path, resume: bool) -> None:
    there = (folder / CHECKPOINT).exists()
    if resume and not there:
        raise InputError(f"{folder}: nothing to resume there; leave --resume away")
    if there and not resume:
        raise InputError(
            f"{folder}: holds a run that was interrupted; --resume goes on with it, or name another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: that is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}") from error


def _texts(
    prose: Sequence[str], held_out: Sequence[str], tokenizer: Tokenizer, progress: Progress
) -> tuple[Tokens, list[str]]:
    if not prose:
        raise InputError("no prose: name files or folders to train on")
    if held_out:
        texts = [document.text for document in read(list(held_out), ReadReport())]
        return read_tokens(prose, tokenizer, progress), texts
    aside: list[str] = []
    tokens = read_tokens(prose, tokenizer, progress, aside=aside)
    if not aside:
        raise InputError(
            f"no held-out texts: name some with --held-out, or give at least {ASIDE_EVERY} documents as text"
        )
    return tokens, aside


def _fit(
    model: AutoEncoder,
    ids: Int32[Tensor, " n"],
    config: AutoEncodeConfig,
    judged: Sequence[Window],
    folder: Path,
    options: Mapping[str, Any],
    resume: bool,
    progress: Progress,
) -> AutoEncoderModule:
    looked_at = torch.from_numpy(np.stack([window.ids for window in judged[:128]]))

    def judge(model: AutoEncoder) -> float:
        return float((rebuilt(model, looked_at) == looked_at).float().mean())

    module = AutoEncoderModule(model, ids, config, judge, progress)
    checkpoint = folder / CHECKPOINT
    with quiet():
        trainer = lightning.Trainer(
            max_epochs=1,
            max_steps=-1,
            logger=False,
            callbacks=[_Keep(checkpoint, config.checkpoint_seconds)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **options,
        )
        loader = DataLoader(_Steps(), batch_size=None)
        fit(trainer, module, loader, ckpt_path=checkpoint if resume else None)
    return module


# ---- measuring


@contextlib.contextmanager
def _at_work(model: AutoEncoder) -> Iterator[torch.device]:
    """The model's device, in the arithmetic that it was trained in there."""
    device = model.bias.device
    was = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        yield device
    model.train(was)


def rebuilt(model: AutoEncoder, ids: Int64[Tensor, "n t"], rounds: int = 1, batch: int = 256) -> Int64[Tensor, "n t"]:
    """What is rebuilt of texts from their vectors alone, in `rounds` of decoding."""
    with _at_work(model) as device:
        parts = [model.rebuild(model.encoder(part.to(device)), rounds).cpu() for part in ids.split(batch)]
    return torch.cat(parts)


def measured(
    model: AutoEncoder, texts: Sequence[Window], tokenizer: Tokenizer, rounds: int
) -> tuple[dict[str, float], Int64[Tensor, "n t"]]:
    """Figures of held-out windows, and what was rebuilt of them.

    Args:
        model: trained.
        texts: the windows.
        tokenizer: that made them.
        rounds: of decoding.

    Returns:
        `token accuracy, free-running`: share of places whose token is right, from the vector alone; `token accuracy,
        teacher-forced`: the same of each token with the true ones before it, on the first 32 windows; `whole texts
        exact`; and the shares of `treemem.training.prose.kept`. And the tokens.
    """
    ids = torch.from_numpy(np.stack([window.ids for window in texts]))
    found = rebuilt(model, ids, rounds)
    with _at_work(model) as device:
        forced = model.forced(ids[:_FORCED].to(device)).float().mean()
    right = found == ids
    figures = {
        "token accuracy, free-running": float(right.float().mean()),
        "token accuracy, teacher-forced": float(forced),
        "whole texts exact": float(right.all(1).float().mean()),
        **kept(texts, list(found.numpy()), tokenizer).shares(),
    }
    return {name: round(value, 4) for name, value in figures.items()}, found


def _finish(
    module: AutoEncoderModule,
    chosen_on: Tensor,
    judged: Sequence[Window],
    tokenizer: Tokenizer,
    folder: Path,
    train_tokens: int,
    progress: Progress,
) -> AutoEncodeReport:
    """Choose the rounds, measure, draw and write."""
    model, config = module.model, module.config
    length = model.config.tokens
    apart = chosen_on[: len(chosen_on) // length * length].view(-1, length).long()
    progress("measuring", 0, None)
    by_rounds = {n: float((rebuilt(model, apart, n) == apart).float().mean()) for n in ROUNDS if n <= length}
    rounds = max(by_rounds, key=lambda n: (round(by_rounds[n], 4), -n))
    figures, found = measured(model, judged, tokenizer, rounds)
    shown = np.linspace(0, len(judged) - 1, min(SAMPLES, len(judged))).round().astype(int)
    samples = [
        Sample(judged[i].text, pieces_of(judged[i].ids, tokenizer), pieces_of(found[i].tolist(), tokenizer))
        for i in shown
    ]
    device = model.bias.device
    report = AutoEncodeReport(
        folder=str(folder),
        shape=model.config.to_json(),
        settings=asdict(config),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        seconds=module.curve[-1]["seconds"],
        steps=int(module.curve[-1]["steps"]),
        examples=int(module.curve[-1]["examples"]),
        train_tokens=train_tokens,
        held_out=len(judged),
        figures=figures,
        rounds=rounds,
        by_rounds={str(n): round(value, 4) for n, value in by_rounds.items()},
        curve=module.curve,
        drawn=_drawn(folder, module.curve),
        samples=samples,
    )
    _write(model.cpu(), tokenizer, report, folder)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return report


# ---- files


def _write(model: AutoEncoder, tokenizer: Tokenizer, report: AutoEncodeReport, folder: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)
    _write_json(folder / CONFIG_FILE, model.config.to_json())
    save_encoder(model.encoder, json.loads(tokenizer.to_str()), folder / ENCODER_FOLDER)
    (folder / "README.md").write_text(_card(report), "utf-8")
    _write_json(folder / METRICS_FILE, report.to_json())  # last: where it stands, the rest does


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


def load_autoencoder(folder: Path) -> AutoEncoder:
    """What `train_autoencoder` wrote.

    Raises ModelError where it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model = AutoEncoder(VectorConfig(**json.loads((folder / CONFIG_FILE).read_text("utf-8"))))
        model.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS_FILE).items()})
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{folder}: no autoencoder can be read there ({reason}); train it again") from error
    return model.eval()


def _card(report: AutoEncodeReport) -> str:
    shape = report.shape
    lines = [
        "# An autoencoder of text",
        "",
        f"{shape['tokens']} tokens into {shape['vectors']} vector(s) of {shape['width']} numbers and back again. "
        f"`{ENCODER_FOLDER}/` is an encoder 1: `treemem build my.memory PATH --encoder {ENCODER_FOLDER}`.",
        "",
        f"Trained for {report.seconds:,.0f} s on {report.device}: {report.examples:,} windows drawn from "
        f"{report.train_tokens:,} tokens. Measured on {report.held_out:,} held-out windows, {report.rounds} round(s).",
        "",
        "| figure | share |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in report.figures.items()),
        "",
        f"![curve]({CURVE_FILE})" if report.drawn else "",
    ]
    return "\n".join(lines).rstrip() + "\n"


def _drawn(folder: Path, curve: Sequence[Mapping[str, float]]) -> bool:
    try:
        draw_curves({"": curve}, folder / CURVE_FILE)
    except MissingPackage:
        return False
    return True


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw loss and held-out accuracy against steps.

    Args:
        curves: of runs, by what they are called.
        path: of the picture.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage("drawing needs matplotlib; run: pip install matplotlib") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot([p["steps"] for p in curve], [p["loss"] for p in curve], label=name or None)
        looks = [(p["steps"], p["token accuracy"]) for p in curve if "token accuracy" in p]
        right.plot(*zip(*looks, strict=True), "o-", label=name or None)
    left.set(title="loss (nats a token, some tokens told)", xlabel="steps", ylim=(0, None))
    right.set(title="held-out tokens right, from the vector alone", xlabel="steps", ylim=(0, 1.02))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        if any(curves):
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


@contextlib.contextmanager
def _told_full(folder: Path) -> Iterator[None]:
    """A full disk is told as that."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOSPC or "No space left" in str(error) or "PytorchStreamWriter failed" in str(error):
            raise OutOfSpace(
                f"{folder}: no room for the weights; free some space, then run this again, with --resume where there "
                f"is a {CHECKPOINT}"
            ) from error
        raise
