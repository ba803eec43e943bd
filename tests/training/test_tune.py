"""Fine-tuning encoder 1, on a tiny model of random weights that knows nothing: whatever it learns shows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.encoders import tiny_encoder_folder
from tests.fakes import documents
from tests.training.test_train import SHAPE, SHORT, questions

from treemem.config import TreeConfig
from treemem.errors import EncoderMismatch, InputError, ModelError
from treemem.hierarchy.adapter import Adapter
from treemem.hierarchy.embed import Encoder, load_encoder
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.weights import Hierarchy, HierarchyConfig
from treemem.training import TrainConfig, train_memory
from treemem.training.corpus import Corpus
from treemem.training.module import Batches
from treemem.training.questions import resolve, split_by_document
from treemem.training.tune import TrainableEncoder, TunedPair

TREE = TreeConfig(chunk_tokens=60, fanout=6, seed=1)
TUNE = replace(
    SHORT, epochs=1, joint_epochs=0, steps=12, tune_epochs=2, tune_batch=24, decoder_steps=0, lora_rank=4,
    lora_rate=1e-2, full_rate=1e-3,
)  # fmt: skip
KINDS = pytest.mark.parametrize("kind", ["lora", "full"])
TEXTS = ["The bees dance in the day", "honey of the queen", "a lamp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    path = tmp_path_factory.mktemp("tune") / "m"
    Memory.build(documents(40), path, encoder=str(folder), config=TREE)
    return path


@pytest.fixture
def memory(built: Path, tmp_path: Path) -> Memory:
    shutil.copytree(built, tmp_path / "m")
    return Memory.open(tmp_path / "m")


def changed(encoder: Encoder, kind: str) -> TrainableEncoder:
    """An encoder under training after steps that pull two texts together."""
    torch.manual_seed(0)
    trainable = TrainableEncoder(encoder, kind, 4)
    optimizer = torch.optim.Adam([p for p in trainable.model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(5):
        a, b, c = trainable.encode(TEXTS)
        (a @ c - a @ b).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainable.model.eval()
    return trainable


@KINDS
def test_what_is_stored_encodes_as_what_was_trained(folder: Path, kind: str) -> None:
    encoder = load_encoder(str(folder))
    before = encoder.encode(TEXTS)
    trainable = changed(encoder, kind)
    applied = trainable.adapter().applied(encoder)
    with torch.no_grad():
        expected = trainable.encode(TEXTS).numpy()
    np.testing.assert_allclose(applied.encode(TEXTS), expected, atol=2e-2 if applied.precision == "bfloat16" else 2e-3)
    np.testing.assert_array_equal(encoder.encode(TEXTS), before)
    assert np.abs(applied.encode(TEXTS) - before).max() > 0.02
    with torch.no_grad():
        queries = applied.differentiable(TEXTS, query=True).numpy()
    np.testing.assert_allclose(applied.encode(TEXTS, precise=True), queries, atol=1e-5)


@KINDS
def test_an_adapter_goes_with_its_hierarchy(folder: Path, kind: str, tmp_path: Path) -> None:
    encoder = load_encoder(str(folder))
    adapter = changed(encoder, kind).adapter()
    hierarchy = Hierarchy(HierarchyConfig(encoder.info, **SHAPE)).with_adapter(adapter)
    hierarchy.save(tmp_path / "h")
    loaded = Hierarchy.load(tmp_path / "h")
    np.testing.assert_array_equal(loaded.tuned(encoder).encode(TEXTS), adapter.applied(encoder).encode(TEXTS))
    assert loaded.with_adapter(None).tuned(encoder) is encoder
    other = Adapter.of({"0.nothing.weight": torch.ones(2, 2)})
    with pytest.raises(ModelError, match=r"has no 0\.nothing\.weight"):
        other.applied(encoder)


@KINDS
def test_adapters_add_up(folder: Path, kind: str) -> None:
    encoder = load_encoder(str(folder))
    first = changed(encoder, "lora").adapter()
    second = changed(first.applied(encoder), kind).adapter()
    both = second.after(first)
    parts, total = (first.differences(), second.differences()), both.differences()
    for name, difference in total.items():
        expected = sum(part[name] for part in parts if name in part)
        torch.testing.assert_close(difference, expected)
    assert both.config.rank == (8 if kind == "lora" else None)
    assert first.after(None) is first
    with pytest.raises(ValueError, match="all whole or all of one rank"):
        Adapter.of({"a": torch.zeros(2, 2), "b": (torch.zeros(2, 1), torch.zeros(1, 2))})


@KINDS
def test_gradients_reach_encoder_1(memory: Memory, kind: str, tmp_path: Path) -> None:
    pool = resolve(memory.searcher, questions(memory))
    train, held_out = split_by_document(pool, 0.2, 200, seed=0)
    corpus = Corpus("small", memory, pool.take(train), pool.take(held_out), tmp_path / "s")
    torch.manual_seed(0)
    hierarchy = Hierarchy(HierarchyConfig(memory.encoder.info, **SHAPE))
    trainable = TrainableEncoder(memory.encoder, kind, 4)
    for name, parameter in trainable.model.named_parameters():
        if "lora_B" in name:  # zero before training: A would be reached from the second step on
            torch.nn.init.normal_(parameter, std=0.02)
    module = TunedPair(hierarchy, [corpus], TUNE, trainable)
    module.log = lambda *_, **__: None  # type: ignore[assignment, method-assign]
    module.served = [corpus.serve(hierarchy.rounded())]
    rows = np.arange(24)
    met = corpus.meet(module.served[0], corpus.train, rows, 4, TUNE.hard)
    batch = Batches([corpus], [met], [rows], [(0, 0)], module.levels, module.settings, 0)[0]
    module.train()
    module.training_step(batch, 0).backward()
    tuned = {name: p for name, p in trainable.model.named_parameters() if p.requires_grad}
    assert tuned
    assert all("pooler" not in name for name in tuned)
    # A bias of keys shifts all of a softmax's logits alike.
    reached = {name for name, p in tuned.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name in tuned if not name.endswith("key.bias")} <= reached
    others = [p for p in trainable.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in others)
    # The encoder learns at a rate of its own, and nothing is left out or counted twice.
    groups = module.optimizer_groups()
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in module.parameters() if p.requires_grad
    )


@KINDS
def test_a_tuned_memory_is_searched_with_the_tuned_encoder(memory: Memory, kind: str, tmp_path: Path) -> None:
    before = memory.image.snapshot
    config = replace(TUNE, tune_encoder=kind)
    report = train_memory(memory, questions(memory), config=config, shape=SHAPE, save=tmp_path / "saved")
    assert report.adopted["encoder"] == {1: 1.0}
    assert report.improved
    assert report.snapshot != before
    assert report.after["walk MRR@10"] > report.before["walk MRR@10"] + 0.05
    opened = Memory.open(memory.store.path)
    texts = [opened.image.chunk_text(chunk) for chunk in range(opened.image.chunks)]
    stored = opened.store.read("chunks/encodings")
    np.testing.assert_allclose(stored, opened.encoder.encode(texts), atol=2e-2)
    assert np.abs(stored - memory.store.read("chunks/encodings")).max() > 0.05 or memory.store.path == opened.store.path
    assert np.abs(opened.encoder.encode(texts) - memory.encoder.encode(texts)).max() > 0.05
    opened.store.verify()
    again = Memory.build(
        documents(40), tmp_path / "again", encoder=opened.recorded_encoder, config=TREE, hierarchy=tmp_path / "saved"
    )
    np.testing.assert_allclose(again.store.read("chunks/encodings"), stored, atol=2e-2)
    with pytest.raises(EncoderMismatch):  # what a memory records is encoder 1 without what was learned
        _ = Memory.open(memory.store.path, encoder=opened.encoder).encoder


def test_an_encoder_that_got_worse_is_refused(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def worst(logits: torch.Tensor, right: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        return (logits * right).sum() / right.sum().clamp_min(1)  # away from what is right

    monkeypatch.setattr("treemem.training.module.any_right", worst)
    before, stored = memory.image.snapshot, memory.store.read("chunks/encodings")
    report = train_memory(memory, questions(memory), config=replace(TUNE, tune_encoder="full"), shape=SHAPE)
    assert report.adopted["encoder"] == {1: 0.0}
    assert not report.improved
    opened = Memory.open(memory.store.path)
    assert opened.image.snapshot == before
    np.testing.assert_array_equal(opened.store.read("chunks/encodings"), stored)


def test_tuning_goes_on_after_a_kill(memory: Memory, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    config = replace(TUNE, tune_encoder="lora")
    shutil.copytree(memory.store.path, tmp_path / "twin" / "m")
    whole = train_memory(Memory.open(tmp_path / "twin" / "m"), questions(memory), config=config, shape=SHAPE)

    def progress(stage: str, done: float, total: float | None) -> None:
        if stage.startswith("training levels 1-2") and done == 3:
            raise Killed

    with pytest.raises(Killed):
        train_memory(memory, questions(memory), config=config, shape=SHAPE, progress=progress)
    tuned = []
    resumed = train_memory(
        memory, questions(memory), config=config, shape=SHAPE,
        progress=lambda stage, *_: tuned.append(stage) if stage.startswith("training levels encoder") else None,
    )  # fmt: skip
    assert not tuned  # that stage was finished before
    assert resumed.after == whole.after
    parts = [Memory.open(path).store.read("chunks/encodings") for path in (memory.store.path, tmp_path / "twin" / "m")]
    np.testing.assert_array_equal(*parts)


def test_wrong_settings(memory: Memory) -> None:
    config = replace(TUNE, tune_encoder="lora")
    for given, levels in ((questions(memory), [2, 3]), (None, None)):
        with pytest.raises(InputError, match="fine-tuning encoder 1 trains levels 1 and 2"):
            train_memory(memory, given, levels=levels, config=config, shape=SHAPE)
    with pytest.raises(InputError, match="tune_batch = 0: it must be at least 1"):
        TrainConfig(tune_batch=0)
    with pytest.raises(InputError, match="tune_encoder = 'some': it must be none, lora or full"):
        TrainConfig(tune_encoder="some")
