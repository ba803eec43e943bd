"""Trains a hierarchy on one memory or several, and decides by held-out questions what of it is adopted."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from treemem.errors import InputError, MissingPackage
from treemem.hierarchy.adapter import Adapter, AdapterConfig
from treemem.hierarchy.decoder import Decoder, DecoderConfig
from treemem.hierarchy.tokens import TokenHead, TokenHeadConfig
from treemem.hierarchy.weights import Hierarchy
from treemem.training.corpus import Corpus, Met
from treemem.training.decode import DecoderTraining, decoder_set, ranked_by_decoder, train_decoder
from treemem.training.fit import reciprocal_rank
from treemem.training.lightning import accelerator, fit, quiet
from treemem.training.measure import KEPT, Measured, figures_of, fitted_scale, measure, searched
from treemem.training.module import AllLevels, LevelPair, LevelsModule, TrainConfig
from treemem.training.questions import Pool
from treemem.training.tokens import (
    TokenSet,
    TokenTraining,
    ranked_by_tokens,
    token_basis,
    token_set,
    train_tokens,
)
from treemem.training.tune import TrainableEncoder, TunedPair
from treemem.types import Progress, no_progress

STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""How much of what was learned may be adopted; 0 keeps the old weights."""
BM25_WEIGHTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
JUDGES = 600
"""So many held-out questions of each memory decide."""
TOKEN_JUDGES = 200
"""The same about level 0, where each has the tokens of 16 chunks read."""
TUNING = "encoder"
"""The stage that fine-tunes encoder 1."""
_STATE = "state.json"


@dataclass(frozen=True)
class Stage:
    """Levels that are trained together, and for how long."""

    name: str
    levels: tuple[int, ...]
    epochs: int


@dataclass(frozen=True)
class Outcome:
    """What training gave."""

    hierarchy: Hierarchy
    """With the adopted weights, as they are saved."""
    adopted: dict[str, dict[int, float]]
    """By stage and level: how much of what was learned was taken, 0 to 1."""
    before: dict[str, dict[str, float]]
    """Held-out figures by memory."""
    after: dict[str, dict[str, float]]
    improved: bool
    """Whether the held-out questions are found better than before; else the old weights should stay."""
    seconds: float
    complete: bool
    """False where the time ran out."""


@dataclass(frozen=True)
class _Learned:
    """Weights, how much of what was learned they hold, and what held-out questions find with them."""

    hierarchy: Hierarchy
    adopted: dict[str, dict[int, float]]
    figures: dict[str, Measured]


def interpolated(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], strength: float) -> dict[str, Any]:
    """Weights between two states: with the outermost layers scaled, since what they give is added to what was before.

    Where the old state is untrained (zeros), this scales what was learned; between two trained states all weights are
    interpolated (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
    """
    untrained = not any(tensor.any() for name, tensor in old.items() if ".outwards." in f".{name}")
    out = {}
    for name, tensor in new.items():
        if untrained:
            out[name] = tensor * strength if ".outwards." in f".{name}" else tensor
        else:
            out[name] = old[name] + (tensor - old[name]) * strength
    return out


class HierarchyTrainer:
    """Trains pair after pair of adjacent levels, then all together; every level is adopted or refused on its own."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        hierarchy: Hierarchy,
        config: TrainConfig,
        folder: Path,
        *,
        levels: Sequence[int] | None = None,
        device: str = "auto",
        minutes: float | None = None,
        wandb: bool = False,
        progress: Progress = no_progress,
        trainer_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare a run; the run of the same name in the same folder that was interrupted goes on.

        Args:
            corpora: memories with questions to train on and held-out ones, all of one encoder 1.
            hierarchy: where to start; it is not changed.
            config: how.
            folder: gets logs and, until the end, checkpoints.
            levels: only these; 0 are the tokens, which are trained only if they are named.
            device: `auto`, `cpu` or `cuda`.
            minutes: stop after these, at the end of a step; what was learned is judged all the same.
            wandb: log to Weights and Biases too.
            progress: told about steps, with loss and held-out recall.
            trainer_options: for `lightning.Trainer`, such as `devices` and `strategy`.

        Raises:
            InputError: a setting cannot be used, or no memory has held-out questions.
            MissingPackage: wandb is asked for and not installed.
        """
        if not any(len(corpus.held_out) for corpus in corpora):
            raise InputError("no held-out questions: give questions about more documents, so that some are kept apart")
        self.corpora = list(corpora)
        if config.tune_encoder != "none" and levels is not None and not {1, 2} <= set(levels):
            raise InputError(
                "fine-tuning encoder 1 trains levels 1 and 2 with it, on questions with known answers: "
                "give those (--queries), and name both levels or none"
            )
        questions = sum(len(corpus.train) for corpus in corpora)
        steps = max(1, min(config.steps, config.passes * questions // (config.batch * config.epochs)))
        self.config = replace(config, steps=steps)
        self.folder = folder
        self.progress = progress
        self.minutes = minutes
        self._options = {**accelerator(device), **(trainer_options or {})}
        self._wandb = _wandb(folder) if wandb else None
        self._start = hierarchy
        self.hierarchy = copy.deepcopy(hierarchy)
        # Where a level has no more elements than a walk keeps, all are kept: there is nothing to learn.
        narrowed = [level for corpus in corpora for level, size in enumerate(corpus.sizes, 1) if size > config.beam]
        deepest = min(max(narrowed, default=1), hierarchy.config.levels)
        self._tokens = levels is not None and 0 in levels
        above = None if levels is None else [level for level in levels if level]
        self.stages = [] if above == [] else stages(deepest, above, config)
        self._levels = {level for stage in self.stages for level in stage.levels}
        self._begin = time.monotonic()

    # ---- the run

    def fit(self) -> Outcome:
        """Train, and judge."""
        with quiet():
            adopted = self._resume()
            before = self._measured(None if self._untrained(self._start) else self._start.rounded())
            complete = self._train_stages(adopted)
            if 1 in self._levels:
                self._fit_bm25_weight()
            self._fit_temperatures()
            hierarchy = self.hierarchy.rounded()
            if self._wants_decoder(complete):
                hierarchy, share = self._with_decoder(hierarchy)
                adopted["decoder"] = {1: share}
            learned = self._best_whole(_Learned(hierarchy, adopted, self._measured(hierarchy)), before)
            if self._tokens:
                learned = self._with_level_0(learned, before)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        gain = _quality(learned.figures) - _quality(before)
        return Outcome(
            learned.hierarchy,
            learned.adopted,
            {name: measured.figures() for name, measured in before.items()},
            {name: measured.figures() for name, measured in learned.figures.items()},
            # Level 0 is judged by itself: walk and hybrid know nothing of it.
            gain >= 0 if learned.adopted.get("tokens", {}).get(0) else gain > 0,
            time.monotonic() - self._begin,
            complete,
        )

    def _train_stages(self, done: dict[str, dict[int, float]]) -> bool:
        """Train what is not done yet and adopt of it what serves, noted in `done`; False where the time ran out."""
        complete = True
        if done.get(TUNING, {}).get(1):
            self._encode()
        if self.config.tune_encoder != "none" and TUNING not in done:
            taken, complete = self._tune()
            done[TUNING] = {1: taken}
            self._save(done)
        for stage in self.stages:
            if stage.name in done:
                continue
            old = {level: _state(self.hierarchy, level) for level in stage.levels}
            complete = self._train(stage) and complete
            done[stage.name] = self._adopt(stage, old)
            self._save(done)
        return complete

    def _best_whole(self, learned: _Learned, before: Mapping[str, Measured]) -> _Learned:
        """What was learned, or, where that as a whole is no better than before, what was learned about nodes alone."""
        tuned = learned.adopted.get(TUNING, {}).get(1)
        if _quality(learned.figures) > _quality(before) or 1 not in self._levels or tuned:
            return learned
        nodes = self._nodes_alone()
        figures = self._measured(nodes)
        if _quality(figures) <= _quality(before):
            return learned
        adopted = {name: {k: v if k > 1 else 0.0 for k, v in own.items()} for name, own in learned.adopted.items()}
        return _Learned(nodes, adopted, figures)

    def _with_level_0(self, learned: _Learned, before: dict[str, Measured]) -> _Learned:
        """Train the tokens behind what was learned, or, where that is refused, behind what was there before."""
        refused = _quality(learned.figures) < _quality(before) and not learned.adopted.get(TUNING, {}).get(1)
        hierarchy, share = self._with_tokens(self._start.rounded() if refused else learned.hierarchy)
        if share and refused:
            nothing = {name: dict.fromkeys(own, 0.0) for name, own in learned.adopted.items()}
            return _Learned(hierarchy, {**nothing, "tokens": {0: share}}, before)
        adopted = {**learned.adopted, "tokens": {0: share}}
        return replace(learned, hierarchy=hierarchy if share else learned.hierarchy, adopted=adopted)

    def _tune(self) -> tuple[float, bool]:
        """Fine-tune encoder 1 with levels 1 and 2; all three are taken as they were learned, or none (1 or 0).

        They are taken only if the held-out questions are found better than without the encoder's part.
        """
        stage = Stage(TUNING, (1, 2), self.config.tune_epochs)
        old = {level: _state(self.hierarchy, level) for level in stage.levels}
        encoder = self.corpora[0].memory.encoder
        trainable = TrainableEncoder(encoder, self.config.tune_encoder, self.config.lora_rank)
        before = self._value(1)
        complete = self._train(stage, TunedPair(self.hierarchy, self.corpora, self.config, trainable))
        before = max(before, self._value(1))
        plain, encoded = self.hierarchy, [corpus.encoded for corpus in self.corpora]
        self.hierarchy = plain.with_adapter(trainable.adapter().after(plain.adapter))
        self._encode()
        if self._value(1) > before:
            return 1.0, complete
        self.hierarchy = plain
        for corpus, own in zip(self.corpora, encoded, strict=True):
            corpus.encoded = own
        for level, state in old.items():
            _set(self.hierarchy, level, state)
        return 0.0, complete

    def _encode(self) -> None:
        """Encode all chunks and questions with the encoder that was tuned."""
        for corpus in self.corpora:
            corpus.encoded = corpus.encode(self.hierarchy.tuned(corpus.memory.recorded_encoder), self.progress)

    def _train(self, stage: Stage, module: LevelsModule | None = None) -> bool:
        """Train one stage; False where the time ran out."""
        left = None if self.minutes is None else self.minutes * 60 - (time.monotonic() - self._begin)
        if left is not None and left <= 0:
            return False
        torch.manual_seed(self.config.seed)
        self.hierarchy.eval()
        module = module or self._module(stage)
        module.train()  # Lightning leaves every module in the mode that it finds
        checkpoints = self.folder / "checkpoints" / stage.name
        loggers: list[Logger] = [CSVLogger(self.folder, name="logs", version=stage.name)]
        if self._wandb is not None:
            loggers.append(self._wandb(stage.name))
        trainer = lightning.Trainer(
            max_epochs=stage.epochs,
            max_time=None if left is None else {"seconds": max(1, int(left))},
            logger=loggers,
            callbacks=[
                ModelCheckpoint(
                    checkpoints, "last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
                ),
                _Told(stage, self.config.steps * stage.epochs, self.progress),
            ],
            gradient_clip_val=1.0,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=10,
            default_root_dir=self.folder,
            **self._options,
        )
        last = checkpoints / "last.ckpt"
        try:
            fit(trainer, module, ckpt_path=last if last.exists() else None)
        finally:
            self.hierarchy.cpu().eval()
        return bool(trainer.current_epoch >= stage.epochs)

    def _module(self, stage: Stage) -> LevelsModule:
        if len(stage.levels) == 2 and stage.name != "all":
            return LevelPair(self.hierarchy, self.corpora, stage.levels[0], self.config)
        if stage.name == "all":
            return AllLevels(self.hierarchy, self.corpora, stage.levels[-1], self.config)
        return LevelsModule(self.hierarchy, self.corpora, stage.levels, self.config)

    # ---- what is adopted

    def _adopt(self, stage: Stage, old: Mapping[int, dict[str, torch.Tensor]]) -> dict[int, float]:
        """Of each level, bottom up, as much of what was learned as serves the held-out questions best."""
        taken = {}
        new = {level: _state(self.hierarchy, level) for level in stage.levels}
        for level in stage.levels:
            _set(self.hierarchy, level, old[level])
        for number, level in enumerate(stage.levels):
            best, best_value = 0.0, -np.inf
            finely = level == 1 and stage == self.stages[0]
            for strength in sorted(STRENGTHS if finely else STRENGTHS[::2]):
                self.progress(f"judging level {level}", number, len(stage.levels))
                _set(self.hierarchy, level, interpolated(old[level], new[level], strength))
                value = self._value(level)
                if value > best_value:
                    best, best_value = strength, value
            _set(self.hierarchy, level, interpolated(old[level], new[level], best) if best else old[level])
            taken[level] = best
        return taken

    def _nodes_alone(self) -> Hierarchy:
        """What was learned about nodes, with all else as it was: each part may have served questions, and not both."""
        made = self._start.rounded()
        for level in self._levels - {1}:
            _set(made, level, _state(self.hierarchy, level))
        return made.rounded()

    def _value(self, level: int) -> float:
        """How well one level serves the held-out questions, on the mean of the memories."""
        values = []
        frozen = self.hierarchy.rounded()
        for corpus in self.corpora:
            rows = self._judges(corpus, level)
            if len(rows) == 0 or level > corpus.depth:
                continue
            found = measure(corpus, corpus.serve(frozen), rows, beam=self.config.beam, exact=level == 1)
            if level == 1:
                values.append(float(found.walk[:, 2].mean() + found.hybrid[:, 2].mean()))
            else:
                values.append(float(found.nodes[level].mean()))
        return float(np.mean(values)) if values else 0.0

    def _met(self, frozen: Hierarchy) -> list[tuple[Corpus, np.ndarray, Met]]:
        """Of each memory what its held-out questions with words of their own meet."""
        judges = [(corpus, self._judges(corpus, 1)) for corpus in self.corpora]
        return [
            (corpus, rows, corpus.meet(corpus.serve(frozen), corpus.held_out, rows, self.config.beam, KEPT))
            for corpus, rows in judges
            if len(rows)
        ]

    def _fit_bm25_weight(self) -> None:
        """Take the weight of BM25 that ranks the held-out questions' right chunks best; a single number."""
        frozen = self.hierarchy.rounded()
        met = self._met(frozen)

        def value(weight: float) -> float:
            figures = [figures_of(corpus, own, rows, frozen, weight) for corpus, rows, own in met]
            return float(np.mean([found.hybrid[:, 2].mean() for found in figures]))

        if met:
            self.hierarchy.bm25_weight.fill_(max((float(self.hierarchy.bm25_weight), *BM25_WEIGHTS), key=value))

    def _fit_temperatures(self) -> None:
        """Make the probabilities of every trained level's first choices as right as they can be on held-out questions.

        After what was learned is scaled down, the learned temperature no longer fits (Guo et al. 2017, section 4.2).
        """
        met = self._met(self.hierarchy.rounded())
        for level in sorted(self._levels):
            found = []
            for corpus, rows, own in met:
                if level <= corpus.depth:
                    ids = own.chunks[:, :KEPT] if level == 1 else own.nodes[level - 2]
                    scores = own.cosines[:, :KEPT] if level == 1 else own.node_scores[level - 2]
                    found.append((scores, corpus.is_right(corpus.held_out, level, rows[:, None], ids)))
            if found:
                self.hierarchy.set_scale(level, fitted_scale(found, self.hierarchy.scale(level).item()))

    # ---- the decoder

    def _wants_decoder(self, complete: bool) -> bool:
        labelled = any(source != "distilled" for corpus in self.corpora for source in corpus.train.sources)
        return bool(complete and labelled and self.config.decoder_steps and 1 in self._levels)

    def _with_decoder(self, hierarchy: Hierarchy) -> tuple[Hierarchy, float]:
        """Train a decoder on what the trained levels find, and take it as far as it helps; 0 = the one before."""
        config = self.config
        weight = float(hierarchy.bm25_weight)
        train, judges = [], []
        for corpus in self.corpora:
            searcher = corpus.serve(hierarchy).searcher
            rows = _own_words(corpus.train, config.decoder_questions)
            train.append(decoder_set(corpus, searcher, corpus.train, rows, self.progress))
            rows = self._judges(corpus, 1)
            if len(rows):
                judges.append(decoder_set(corpus, searcher, corpus.held_out, rows, self.progress))
        torch.manual_seed(config.seed)
        old = hierarchy.decoder
        decoder = Decoder(DecoderConfig(hierarchy.config.encoder.dimension)) if old is None else copy.deepcopy(old)
        settings = DecoderTraining(bm25_weight=weight, seed=config.seed)
        questions = sum(len(one) for one in train)
        steps = max(1, min(config.decoder_steps, config.passes * questions // settings.batch))
        settings = replace(settings, steps=steps)
        try:
            train_decoder(decoder, train, settings, self.progress)
        except InputError:  # every right chunk is found first already, or none at all
            return hierarchy, 0.0
        halved = {name: tensor.half().float() for name, tensor in decoder.state_dict().items()}  # as it will be stored

        def strengthened(strength: float) -> Decoder:
            made = Decoder(replace(decoder.config, strength=strength)).eval()
            made.load_state_dict(halved)
            return made

        def value(strength: float) -> float:
            own = strengthened(strength) if strength else old
            return float(np.mean([reciprocal_rank(ranked_by_decoder(own, one, weight)) for one in judges]))

        best = _strongest(value)
        return (hierarchy.with_decoder(strengthened(best)).rounded() if best else hierarchy), best

    def _with_tokens(self, hierarchy: Hierarchy) -> tuple[Hierarchy, float]:
        """Train level 0 behind all the rest, and take it as far as it helps; 0 = as it was before."""
        config = self.config
        basis = token_basis(self.corpora, seed=config.seed, progress=self.progress)
        train: list[TokenSet] = []
        judges: list[TokenSet] = []
        for corpus in self.corpora:
            searcher = corpus.serve(hierarchy).searcher
            for pool, sets, most in (
                (corpus.train, train, config.token_questions),
                (corpus.held_out, judges, TOKEN_JUDGES),
            ):
                rows = _own_words(pool, most)
                if len(rows):
                    sets.append(token_set(corpus, searcher, pool, rows, basis, progress=self.progress))
        torch.manual_seed(config.seed)
        head = TokenHead(TokenHeadConfig(len(basis)))
        try:
            train_tokens(head, train, TokenTraining(steps=config.token_steps, seed=config.seed), self.progress)
        except InputError:  # every right chunk is found first already, or none at all
            return hierarchy, 0.0
        old = TokenHead(TokenHeadConfig(len(basis), len(basis)))
        if hierarchy.tokens is not None:
            old = hierarchy.tokens.unfolded(np.ascontiguousarray(basis.T)).eval()

        def value(strength: float) -> float:
            own = head.strengthened(strength) if strength else old
            return float(np.mean([reciprocal_rank(ranked_by_tokens(own, one)) for one in judges]))

        best = _strongest(value)
        if best == 0:
            return hierarchy, 0.0
        return hierarchy.with_tokens(head.strengthened(best).unfolded(basis).eval()).rounded(), best

    def _measured(self, hierarchy: Hierarchy | None) -> dict[str, Measured]:
        """Of each memory what its held-out questions find, as users search."""
        out = {}
        for corpus in self.corpora:
            rows = self._judges(corpus, 2)
            if len(rows):
                self.progress(f"measuring {corpus.name}", 0, None)
                served = corpus.serve(hierarchy)
                found = measure(corpus, served, rows, beam=self.config.beam)
                walk, hybrid = searched(corpus, served, rows, ("walk", "hybrid"))
                out[corpus.name] = replace(found, walk=walk, hybrid=hybrid)
        return out

    @staticmethod
    def _judges(corpus: Corpus, level: int) -> np.ndarray:
        """Held-out questions that decide about a level: evenly spread, at most `JUDGES`; distilled ones from 2 on."""
        sources = np.array(corpus.held_out.sources)
        rows = np.flatnonzero(sources != "distilled") if level == 1 else np.arange(len(sources))
        return rows[np.unique(np.linspace(0, max(0, len(rows) - 1), min(len(rows), JUDGES)).round().astype(np.int64))]

    @staticmethod
    def _untrained(hierarchy: Hierarchy) -> bool:
        return not hierarchy.card

    # ---- going on after a kill

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps([asdict(self.config), [asdict(s) for s in self.stages]]).encode())
        digest.update(self._start.config_bytes() + self._start.weights_bytes())
        for corpus in self.corpora:
            digest.update(corpus.memory.info().snapshot.encode())
            for pool in (corpus.train, corpus.held_out):
                digest.update("\0".join(pool.texts).encode("utf-8", "replace") + pool.right.tobytes())
        return digest.hexdigest()

    def _resume(self) -> dict[str, dict[int, float]]:
        """Stages that an interrupted run of the same settings finished; anything else in the folder goes."""
        from safetensors.torch import load_file

        digest = self._digest()
        try:
            state = json.loads((self.folder / _STATE).read_text())
            if state["digest"] == digest:
                if state["done"]:
                    if state["adapter"]:
                        self.hierarchy = self.hierarchy.with_adapter(Adapter(AdapterConfig(**state["adapter"])))
                    last = list(state["done"])[-1]
                    self.hierarchy.load_state_dict(load_file(self.folder / "checkpoints" / f"{last}.safetensors"))
                return {name: {int(k): v for k, v in own.items()} for name, own in state["done"].items()}
        except (OSError, ValueError, KeyError):
            pass
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.folder / _STATE).write_text(json.dumps({"digest": digest, "done": {}}))
        return {}

    def _save(self, done: dict[str, dict[int, float]]) -> None:
        from safetensors.torch import save_file

        if _rank():
            return
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        save_file(self.hierarchy.state_dict(), folder / f"{list(done)[-1]}.safetensors")
        config = self.hierarchy.config.adapter
        adapter = None if config is None else asdict(config)
        work = self.folder / "state.part"
        work.write_text(json.dumps({"digest": self._digest(), "done": done, "adapter": adapter}))
        work.replace(self.folder / _STATE)


def stages(deepest: int, levels: Sequence[int] | None, config: TrainConfig) -> list[Stage]:
    """What is trained after what: every pair of adjacent levels, bottom up, then all together.

    Args:
        deepest: highest level of any memory.
        levels: only these; a level without a neighbour among them is trained alone.
        config: says for how long.

    Raises InputError for levels that there are not.
    """
    wanted = list(range(1, deepest + 1)) if levels is None else sorted(set(levels))
    if not wanted or wanted[0] < 1 or wanted[-1] > deepest:
        raise InputError(f"levels = {','.join(map(str, wanted))}: levels 1 to {deepest} can be trained here")
    out = [Stage(f"{k}-{k + 1}", (k, k + 1), max(1, config.epochs >> 3 * (k - 1))) for k in wanted if k + 1 in wanted]
    paired = {level for stage in out for level in stage.levels}
    out += [Stage(str(k), (k,), config.epochs) for k in wanted if k not in paired]
    if len(wanted) == deepest > 2 and config.joint_epochs:
        out.append(Stage("all", tuple(wanted), config.joint_epochs))
    return out


def _strongest(value: Callable[[float], float]) -> float:
    """The strength of largest value; of equal ones the least."""
    return max(sorted(STRENGTHS), key=value)


def _own_words(pool: Pool, most: int) -> np.ndarray:
    """Questions with words of their own, evenly spread."""
    rows = np.flatnonzero(np.array(pool.sources) != "distilled")
    return rows[np.unique(np.linspace(0, max(0, len(rows) - 1), min(len(rows), most)).round().astype(np.int64))]


def _state(hierarchy: Hierarchy, level: int) -> dict[str, torch.Tensor]:
    """A copy of what belongs to a level."""
    parts = {"encoder": hierarchy.encoder(level), "ranker": hierarchy.rankers[str(level)]}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


def _set(hierarchy: Hierarchy, level: int, state: Mapping[str, torch.Tensor]) -> None:
    for name, part in {"encoder": hierarchy.encoder(level), "ranker": hierarchy.rankers[str(level)]}.items():
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        part.load_state_dict(own)


def _quality(measured: Mapping[str, Measured]) -> float:
    """What a hierarchy is judged by as a whole: reciprocal ranks of walk and hybrid, on the mean of the memories."""
    return float(np.mean([found.walk[:, 2].mean() + found.hybrid[:, 2].mean() for found in measured.values()]))


class _Told(Callback):
    """Passes on how far a stage has come."""

    def __init__(self, stage: Stage, steps: int, progress: Progress) -> None:
        self.stage, self.steps, self.progress = stage, steps, progress

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        figures = trainer.callback_metrics
        told = f"training levels {self.stage.name}"
        if "loss" in figures:
            told += f", loss {float(figures['loss']):.2f}"
        name = "held-out/walk MRR@10" if 1 in self.stage.levels else f"held-out/level {self.stage.levels[0]} recall@32"
        if name in figures:
            told += f", {name.removeprefix('held-out/')} {float(figures[name]):.3f}"
        self.progress(told, trainer.global_step, self.steps)


def _wandb(folder: Path) -> Callable[[str], Logger]:
    try:
        import wandb  # noqa: F401
        from lightning.pytorch.loggers import WandbLogger
    except ImportError as error:
        raise MissingPackage("logging to Weights and Biases needs wandb; run: pip install wandb") from error

    def make(stage: str) -> Logger:
        return WandbLogger(name=stage, group=folder.parent.name, project="treemem", save_dir=folder)

    return make


def _rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
