"""Training on a small hierarchy whose answer is known: questions are the chunks' vectors, turned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes import FakeEncoder, documents

from treemem.config import TreeConfig
from treemem.errors import InputError, ModelError
from treemem.hierarchy.decoder import Decoder, DecoderConfig
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.tokens import TokenHead, TokenHeadConfig
from treemem.hierarchy.weights import Hierarchy, HierarchyConfig
from treemem.storage.store import Store
from treemem.training import HierarchyTrainer, LevelPair, Question, TrainConfig, train_memory
from treemem.training.corpus import Corpus
from treemem.training.losses import any_right
from treemem.training.questions import resolve, split_by_document
from treemem.training.train import interpolated, stages

TREE = TreeConfig(chunk_tokens=14, fanout=6, seed=1)
SHORT = TrainConfig(
    epochs=3,
    joint_epochs=1,
    steps=16,
    batch=48,
    node_questions=24,
    beam=4,
    weight_decay=0.01,
    decoder_steps=6,
    decoder_questions=60,
)
TURN = 0.06
"""How far questions are turned: little of the way is lost at 0, all at 1."""
SHAPE = {"gate_width": 16, "ranker_width": 64, "encoder_width": 16, "dropout": 0.0}


class Turned(FakeEncoder):
    """Questions are embedded like chunks, and then turned by a fixed rotation: what a ranker can learn to undo."""

    def __init__(self) -> None:
        super().__init__("turned")
        random = np.random.default_rng(5).standard_normal((self.dimension, self.dimension))
        skew, one = TURN * (random - random.T), np.eye(self.dimension)
        self.rotation = (np.linalg.inv(one + skew) @ (one - skew)).astype(np.float32)  # Cayley's form

    def encode(self, texts: Sequence[str], *, precise: bool = False, fast: bool = False) -> np.ndarray:
        vectors = super().encode(texts, precise=precise)
        return vectors @ self.rotation if precise else vectors


def questions(memory: Memory, source: str = "labelled") -> list[Question]:
    """Of every chunk its words in another order; the chunk is right."""
    out = []
    for chunk in range(memory.image.chunks):
        words = memory.image.chunk_text(chunk).rstrip(".").split()
        document = memory.image.reference(int(memory.image.document_of(np.array([chunk]))[0])).id
        out.append(Question(" ".join(words[1:][::-1]), {document: (memory.image.span(chunk),)}, source))
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "m"
    Memory.build(documents(90), path, encoder=Turned(), config=TREE)
    return path


@pytest.fixture
def memory(built: Path, tmp_path: Path) -> Memory:
    shutil.copytree(built, tmp_path / "m")
    return Memory.open(tmp_path / "m", encoder=Turned())


def start(seed: int = 0, **shape: Any) -> Hierarchy:
    torch.manual_seed(seed)
    return Hierarchy(HierarchyConfig(Turned().info, **{**SHAPE, **shape}))


def corpus(memory: Memory, scratch: Path, source: str = "labelled") -> Corpus:
    pool = resolve(memory.searcher, questions(memory, source))
    train, held_out = split_by_document(pool, 0.2, 200, seed=0)
    return Corpus("small", memory, pool.take(train), pool.take(held_out), scratch)


def weights(hierarchy: Hierarchy) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in hierarchy.state_dict().items()}


def losses(logs: Path) -> dict[str, list[float]]:
    """Logged values of all stages by name."""
    import csv

    out: dict[str, list[float]] = {}
    for file in sorted(logs.rglob("metrics.csv")):
        for row in csv.DictReader(file.open()):
            for name, value in row.items():
                if value:
                    out.setdefault(name, []).append(float(value))
    return out


def test_loss_falls_recall_rises_and_a_new_snapshot_is_made(memory: Memory, tmp_path: Path) -> None:
    before = memory.image.snapshot
    config = replace(SHORT, epochs=8)
    report = train_memory(memory, questions(memory), config=config, shape=SHAPE, save=tmp_path / "saved")
    assert report.improved
    assert report.snapshot != before
    logged = losses(Path(report.logs))
    assert np.mean(logged["loss/level-1"][-3:]) < 0.7 * np.mean(logged["loss/level-1"][:2])
    assert report.after["walk hit@1"] > report.before["walk hit@1"] + 0.1
    assert report.after["walk hit@10"] >= report.before["walk hit@10"]
    assert report.after["level 2 recall@32"] >= report.before["level 2 recall@32"]
    for name in ("gradient/ranker-1", "temperature/ranker-1", "held-out/level 2 calibration error"):
        assert logged[name], name
    # What is served from now on is what was measured, in this memory and in one that is built with the saved weights.
    opened = Memory.open(memory.store.path, encoder=Turned())
    assert opened.image.snapshot == report.snapshot
    assert "questions about m" in (opened.info().trained or "")
    again = Memory.build(documents(90), tmp_path / "again", encoder=Turned(), config=TREE, hierarchy=tmp_path / "saved")
    asked = questions(memory)[:60]
    for other, least in ((opened, 0.0), (again, 0.0), (memory, 0.1)):
        assert hit_rate(opened, asked) >= hit_rate(other, asked) + (least if other is memory else -0.15)
    Store.open(memory.store.path).verify()
    # The memory that was open all the while goes on with what it had.
    assert memory.hierarchy is None
    assert memory.search("harbour").hits


def hit_rate(memory: Memory, asked: list[Question]) -> float:
    hits = 0
    for question in asked:
        found = memory.search(question.text, mode="walk", k=1).hits
        document, spans = next(iter(question.targets.items()))
        hits += bool(found) and (found[0].document.id, found[0].span) == (document, (spans or ())[0])
    return hits / len(asked)


def test_an_interrupted_run_goes_on_to_the_same_weights(memory: Memory, tmp_path: Path) -> None:
    brief = replace(SHORT, steps=6)
    whole = HierarchyTrainer([corpus(memory, tmp_path / "s1")], start(), brief, tmp_path / "whole").fit()

    class Killed(Exception):
        pass

    for kill_at in (8, 18, 21):  # within an epoch, behind a stage, within the next one
        seen = [0]

        def progress(
            stage: str, done: float, total: float | None, at: int = kill_at, counted: list[int] = seen
        ) -> None:
            counted[0] += stage.startswith("training levels")
            if counted[0] >= at:
                raise Killed

        folder = tmp_path / f"parts-{kill_at}"
        with pytest.raises(Killed):
            HierarchyTrainer([corpus(memory, tmp_path / "s2")], start(), brief, folder, progress=progress).fit()
        resumed_steps = [0]

        def count(stage: str, done: float, total: float | None, counted: list[int] = resumed_steps) -> None:
            counted[0] += stage.startswith("training levels")

        resumed = HierarchyTrainer([corpus(memory, tmp_path / "s3")], start(), brief, folder, progress=count).fit()
        assert weights(resumed.hierarchy) == weights(whole.hierarchy), kill_at
        assert resumed.adopted == whole.adopted
        # Of what was done, at most the steps since the last whole epoch are done again.
        whole_steps = sum(stage.epochs * brief.steps for stage in stages(4, None, brief))
        assert whole_steps - resumed_steps[0] == (kill_at - 1) // brief.steps * brief.steps


def test_the_same_seed_gives_the_same_weights(memory: Memory, tmp_path: Path) -> None:
    brief = replace(SHORT, epochs=1, joint_epochs=0, steps=5)
    runs = [
        HierarchyTrainer(
            [corpus(memory, tmp_path / f"s{n}")], start(), replace(brief, seed=seed), tmp_path / f"r{n}"
        ).fit()
        for n, seed in enumerate((0, 0, 1))
    ]
    assert weights(runs[0].hierarchy) == weights(runs[1].hierarchy)
    assert weights(runs[0].hierarchy) != weights(runs[2].hierarchy)


def test_gradients_reach_every_parameter_of_a_pair(memory: Memory, tmp_path: Path) -> None:
    own = corpus(memory, tmp_path / "s")
    hierarchy = start()
    for name, parameter in hierarchy.named_parameters():
        if ".outwards." in name:  # behind zeros nothing is reached in the first step
            torch.nn.init.normal_(parameter, std=0.02)
    for level in (1, 2):
        module = LevelPair(hierarchy, [own], level, SHORT)
        module.log = lambda *_, **__: None  # type: ignore[assignment, method-assign]
        module.served = [own.serve(hierarchy.rounded())]
        rows = np.arange(48)
        met = own.meet(module.served[0], own.train, rows, 4, SHORT.hard)
        from treemem.training.module import Batches

        batch = Batches([own], [met], [rows], [(0, 0)], module.levels, SHORT, 0)[0]
        hierarchy.zero_grad()
        module.train()
        module.training_step(batch, 0).backward()
        for name, parameter in module.parts.named_parameters():
            assert parameter.grad is not None, name
            if "in_proj_bias" not in name:
                assert parameter.grad.abs().sum() > 0, name
        others = set(hierarchy.parameters()) - set(module.parts.parameters())
        assert all(parameter.grad is None for parameter in others)


def test_a_sabotaged_run_is_refused(memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worst(logits: torch.Tensor, right: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        return (logits * right).sum() / right.sum().clamp_min(1)  # away from what is right

    monkeypatch.setattr("treemem.training.module.any_right", worst)
    before = memory.image.snapshot
    config = replace(SHORT, decoder_steps=0)
    report = train_memory(memory, questions(memory), levels=[1, 2], config=config, shape=SHAPE, save=tmp_path / "saved")
    assert not report.improved
    assert report.adopted == {"1-2": {1: 0.0, 2: 0.0}}
    assert report.snapshot == before == Store.open(memory.store.path).info().snapshot
    assert report.after["walk hit@1"] >= report.before["walk hit@1"]
    assert Memory.open(memory.store.path, encoder=Turned()).hierarchy is None
    assert not (tmp_path / "saved").exists()


def test_nodes_are_taken_where_level_1_as_a_whole_does_harm(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right_way = any_right

    def worst_for_chunks(logits: torch.Tensor, right: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        if len(logits) == SHORT.batch:
            return (logits * right).sum() / right.sum().clamp_min(1)  # away from what is right
        return right_way(logits, right, counts)

    monkeypatch.setattr("treemem.training.module.any_right", worst_for_chunks)
    monkeypatch.setattr("treemem.training.train.STRENGTHS", (1.0,))  # whatever was learned is taken
    config = replace(SHORT, joint_epochs=0, decoder_steps=0)
    before = start()
    trainer = HierarchyTrainer([corpus(memory, tmp_path / "s")], before, config, tmp_path / "run", levels=[1, 2])
    run = trainer.fit()
    alone = trainer._nodes_alone().state_dict()
    learned, untrained = trainer.hierarchy.rounded().state_dict(), before.rounded().state_dict()
    for name, tensor in alone.items():
        of_nodes = name.startswith(("encoders.2.", "rankers.2."))
        assert torch.equal(tensor, (learned if of_nodes else untrained)[name]), name
    assert not torch.equal(learned["rankers.1.outwards.weight"], untrained["rankers.1.outwards.weight"])
    if run.improved:  # and else nothing is taken
        assert run.adopted["1-2"] == {1: 0.0, 2: 1.0}
        assert weights(run.hierarchy) == weights(trainer._nodes_alone())
    else:
        assert run.after["small"]["walk MRR@10"] < run.before["small"]["walk MRR@10"] + 0.02


def test_without_questions_level_1_is_left_alone(memory: Memory) -> None:
    report = train_memory(memory, config=replace(SHORT, epochs=2, steps=10), shape=SHAPE)
    assert set(report.questions) <= {"headings", "distilled"}
    assert report.questions["distilled"] > 10
    assert all(1 not in shares for shares in report.adopted.values())
    opened = Memory.open(memory.store.path, encoder=Turned())
    query = "orchard number 4 follows item3"
    assert [h.chunk for h in opened.search(query, mode="exact").hits] == [
        h.chunk for h in memory.search(query, mode="exact").hits
    ]


def test_without_level_1_its_ranking_stays_as_it_was(memory: Memory, tmp_path: Path) -> None:
    before = start()
    before.bm25_weight.fill_(0.0)  # as bad as can be for these questions
    brief = replace(SHORT, epochs=1, steps=2, joint_epochs=0, decoder_steps=0)
    weights = {}
    for levels in ([2], [1, 2]):
        name = f"{levels}"
        trainer = HierarchyTrainer([corpus(memory, tmp_path / name)], before, brief, tmp_path / "run", levels=levels)
        weights[name] = trainer.fit().hierarchy.bm25_weight.item()
    assert weights["[2]"] == 0
    assert weights["[1, 2]"] > 0


def test_without_questions_and_with_all_nodes_kept_there_is_nothing_to_learn(memory: Memory) -> None:
    with pytest.raises(InputError, match="a walk in this memory keeps all nodes"):
        train_memory(memory, config=replace(SHORT, beam=2000), shape=SHAPE)


def test_training_goes_on_from_what_is_there(memory: Memory) -> None:
    first = train_memory(memory, questions(memory), config=replace(SHORT, epochs=4, decoder_steps=0), shape=SHAPE)
    opened = Memory.open(memory.store.path, encoder=Turned())
    second = train_memory(opened, questions(memory), config=replace(SHORT, epochs=2, decoder_steps=0))
    assert first.improved
    assert second.before["walk MRR@10"] == pytest.approx(first.after["walk MRR@10"], abs=0.01)
    assert second.after["walk MRR@10"] >= second.before["walk MRR@10"]


def test_what_helps_no_more_leaves_decoder_and_level_0_as_they_were(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treemem.training.train._strongest", lambda value: 0.0)
    before = start().with_decoder(Decoder(DecoderConfig(32))).with_tokens(TokenHead(TokenHeadConfig(32, 8)))
    brief = replace(SHORT, epochs=1, steps=1, joint_epochs=0, decoder_steps=2, token_steps=2, token_questions=20)
    run = HierarchyTrainer([corpus(memory, tmp_path / "s")], before, brief, tmp_path / "run", levels=[0, 1, 2]).fit()
    assert run.adopted["decoder"] == {1: 0.0}
    assert run.adopted["tokens"] == {0: 0.0}
    own, old = run.hierarchy.state_dict(), before.rounded().state_dict()
    parts = [name for name in old if name.startswith(("decoder.", "tokens."))]
    assert parts
    assert all(torch.equal(own[name], old[name]) for name in parts)


def test_level_0_is_taken_where_the_levels_are_refused(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quality(measured: object) -> float:
        """The start is judged first; nothing that is measured later is as good."""
        return 1.0 if measured is looked[0] else 0.0

    looked: list[object] = []
    measured = HierarchyTrainer._measured

    def noted(self: HierarchyTrainer, hierarchy: Hierarchy | None) -> object:
        looked.append(measured(self, hierarchy))
        return looked[-1]

    monkeypatch.setattr(HierarchyTrainer, "_measured", noted)
    monkeypatch.setattr("treemem.training.train._quality", quality)
    monkeypatch.setattr("treemem.training.train._strongest", lambda value: 1.0)
    before = start()
    brief = replace(SHORT, epochs=1, steps=2, joint_epochs=0, decoder_steps=2, token_steps=2, token_questions=20)
    run = HierarchyTrainer([corpus(memory, tmp_path / "s")], before, brief, tmp_path / "run", levels=[0, 1, 2]).fit()
    assert run.improved
    assert run.adopted == {"1-2": {1: 0.0, 2: 0.0}, "decoder": {1: 0.0}, "tokens": {0: 1.0}}
    assert run.after == run.before
    own, old = run.hierarchy.state_dict(), before.rounded().state_dict()
    assert {name for name in own if name not in old} == {name for name in own if name.startswith("tokens.")}
    assert all(torch.equal(own[name], tensor) for name, tensor in old.items())


def test_of_few_questions_half_decide_and_too_few_are_refused(memory: Memory) -> None:
    brief = replace(SHORT, epochs=1, steps=1, joint_epochs=0, decoder_steps=0)
    report = train_memory(memory, questions(memory)[:70], config=brief, shape=SHAPE)
    assert 30 <= report.held_out <= 40
    with pytest.raises(InputError, match=r"of 40 questions [12][0-9] could be kept apart .* at least 30 are needed"):
        train_memory(memory, questions(memory)[:40], config=brief, shape=SHAPE)


def test_only_some_levels(memory: Memory) -> None:
    brief = replace(SHORT, epochs=1, steps=5)
    report = train_memory(memory, questions(memory), levels=[2], config=brief, shape=SHAPE)
    assert list(report.adopted) == ["2"]
    with pytest.raises(InputError, match="levels = 9: levels 1 to 4 can be trained"):
        train_memory(memory, questions(memory), levels=[9], config=brief, shape=SHAPE)


def test_level_0_is_trained_where_it_is_named(memory: Memory) -> None:
    config = replace(SHORT, token_steps=10, token_questions=60)
    report = train_memory(memory, questions(memory), levels=[0], config=config, shape=SHAPE)
    assert list(report.adopted) == ["tokens"]
    opened = Memory.open(memory.store.path, encoder=Turned())
    assert (opened.hierarchy is not None and opened.hierarchy.tokens is not None) == (report.adopted["tokens"][0] > 0)
    before, after = (m.search(questions(memory)[3].text, mode="deep", k=5).hits for m in (memory, opened))
    assert len(before) == len(after) == 5


def test_stages() -> None:
    config = TrainConfig(epochs=8, joint_epochs=2)
    assert [(s.name, s.levels, s.epochs) for s in stages(4, None, config)] == [
        ("1-2", (1, 2), 8), ("2-3", (2, 3), 1), ("3-4", (3, 4), 1), ("all", (1, 2, 3, 4), 2),
    ]  # fmt: skip
    assert [s.name for s in stages(2, None, config)] == ["1-2"]
    assert [s.name for s in stages(1, None, config)] == ["1"]
    assert [s.name for s in stages(4, [1, 3, 4], config)] == ["3-4", "1"]


def test_interpolation() -> None:
    zeros = {"encoder.outwards.weight": torch.zeros(2), "encoder.inwards.weight": torch.ones(2)}
    new = {"encoder.outwards.weight": torch.full((2,), 4.0), "encoder.inwards.weight": torch.full((2,), 3.0)}
    half = interpolated(zeros, new, 0.5)
    assert half["encoder.outwards.weight"].tolist() == [2, 2]  # of what was learned, half is added …
    assert half["encoder.inwards.weight"].tolist() == [3, 3]  # … as it was learned
    between = interpolated({**zeros, "encoder.outwards.weight": torch.ones(2)}, new, 0.5)
    assert between["encoder.outwards.weight"].tolist() == [2.5, 2.5]
    assert between["encoder.inwards.weight"].tolist() == [2, 2]


def test_minutes_are_kept(memory: Memory) -> None:
    report = train_memory(memory, questions(memory), config=replace(SHORT, epochs=500), shape=SHAPE, minutes=0.02)
    assert not report.complete


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"sources": ["gossip"]}, "source 'gossip'"),
        ({"sources": ["written"]}, "needs a language model"),
    ],
)
def test_wrong_settings(memory: Memory, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        train_memory(memory, questions(memory), config=SHORT, shape=SHAPE, **options)


def test_a_hierarchy_of_another_encoder_is_no_start(memory: Memory) -> None:
    with pytest.raises(ModelError, match="trained on encoder"):
        start().require_encoder(FakeEncoder().info)
    with pytest.raises(InputError, match="epochs = 0"):
        TrainConfig(epochs=0)


def test_offline_logging_to_wandb(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    brief = replace(SHORT, epochs=1, joint_epochs=0, steps=12)
    report = train_memory(memory, questions(memory), levels=[1, 2], config=brief, shape=SHAPE, wandb=True)
    runs = list(Path(report.logs).parent.rglob("offline-run-*"))
    assert len(runs) == 1
    assert any(file.suffix == ".wandb" and file.stat().st_size for file in runs[0].iterdir())


TWO_PROCESSES = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from pathlib import Path
from tests.training.test_train import SHAPE, SHORT, Turned, questions
from treemem.hierarchy.memory import Memory
from treemem.training import train_memory

if __name__ == "__main__":
    memory = Memory.open(Path({path!r}), encoder=Turned())
    options = {{"devices": 2, "strategy": "ddp"}}
    config = replace(SHORT, epochs=3)
    report = train_memory(memory, questions(memory), config=config, shape=SHAPE, device="cpu", trainer_options=options)
    print("walk", report.before["walk MRR@10"], report.after["walk MRR@10"], report.improved, flush=True)
"""


def test_two_processes_train_together(memory: Memory, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    root = str(Path(__file__).resolve().parents[2])
    script.write_text(TWO_PROCESSES.format(root=root, path=str(memory.store.path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = memory.image.snapshot
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=250, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("walk")]
    assert len(told) == 2  # each process; both know the same
    assert told[0] == told[1]
    assert float(told[0][2]) > float(told[0][1])
    assert Store.open(memory.store.path).info().snapshot != before
