"""A trained hierarchy: neutral before training, the same after saving, refused where it does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fakes import FakeEncoder, documents, stored_arrays

from treemem.config import SearchConfig, TreeConfig
from treemem.errors import InputError, ModelError
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.encoder import ContextGate, ContextGateConfig, LevelEncoder, LevelEncoderConfig
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.ranker import Ranker, RankerConfig
from treemem.hierarchy.weights import (
    CONFIG_FILE,
    DEFAULT_FOLDER,
    WEIGHTS_FILE,
    Hierarchy,
    HierarchyConfig,
    load_hierarchy,
)
from treemem.storage.levels import contextual, node_vectors, padded
from treemem.types import Document

CONFIG = TreeConfig(chunk_tokens=12, fanout=6, seed=1)


def hierarchy(seed: int = 0, trained: float = 0.0, encoder: FakeEncoder | None = None) -> Hierarchy:
    """A hierarchy of small parts; `trained` is the size of what its outermost layers add."""
    torch.manual_seed(seed)
    info = (encoder or FakeEncoder()).info
    made = Hierarchy(HierarchyConfig(info, gate_width=16, ranker_width=16, encoder_width=16))
    for name, parameter in made.named_parameters():
        if ".outwards." in name:
            torch.nn.init.normal_(parameter, std=trained) if trained else None
    return made.eval()


def memory(path: Path, weights: Hierarchy | None) -> Memory:
    encoder = FakeEncoder()
    return Memory.build(documents(60), path, encoder=encoder, config=CONFIG, hierarchy=weights)


def image_files(built: Memory) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in built.image.folder.glob("*.npy")}


def hits(built: Memory, mode: str) -> list[tuple[int, float]]:
    result = built.search("harbour number 20 measures item3", config=SearchConfig(mode=mode, k=8, beam=4))  # type: ignore[arg-type]
    return [(hit.chunk, hit.score) for hit in result.hits]


def test_before_training_a_hierarchy_changes_nothing(tmp_path: Path) -> None:
    plain, neutral = memory(tmp_path / "plain", None), memory(tmp_path / "neutral", hierarchy())
    assert plain.hierarchy is None
    assert neutral.hierarchy is not None
    assert len(plain.image.tree.levels) >= 4
    for name, array in stored_arrays(tmp_path / "plain").items():
        assert array.tobytes() == stored_arrays(tmp_path / "neutral")[name].tobytes(), name
    assert image_files(plain) == image_files(neutral)
    for mode in ("walk", "exact", "hybrid"):
        assert hits(plain, mode) == hits(neutral, mode)


def test_a_trained_hierarchy_changes_vectors_and_ranks(tmp_path: Path) -> None:
    plain, trained = memory(tmp_path / "plain", None), memory(tmp_path / "trained", hierarchy(trained=0.3))
    for level in range(len(plain.image.tree.levels)):
        assert plain.image.tree.levels[level].rows.tobytes() != trained.image.tree.levels[level].rows.tobytes()
    assert hits(plain, "exact") != hits(trained, "exact")


@pytest.mark.parametrize("mode", ["walk", "exact", "hybrid"])
def test_saved_and_loaded_it_walks_the_same(tmp_path: Path, mode: str) -> None:
    weights = hierarchy(trained=0.3)
    weights.card = {"summary": "made by a test", "data": {"questions": 3}, "figures": {"hit@1": (0.25, 0.5)}}
    weights.save(tmp_path / "weights")
    loaded = Hierarchy.load(tmp_path / "weights")
    assert loaded.card["summary"] == "made by a test"
    built, again = memory(tmp_path / "a", weights), memory(tmp_path / "b", loaded)
    reopened = Memory.open(tmp_path / "a", encoder=FakeEncoder())
    assert hits(built, mode) == hits(again, mode) == hits(reopened, mode)
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "made by a test" in card
    assert "| hit@1 | 0.250 | 0.500 |" in card
    assert not any(b"pickle" in f.read_bytes() for f in (tmp_path / "weights").iterdir())


def test_the_image_that_is_made_again_is_the_same(tmp_path: Path) -> None:
    import shutil

    built = memory(tmp_path / "m", hierarchy(trained=0.3))
    before, found = image_files(built), hits(built, "hybrid")
    shutil.rmtree(built.image.folder)
    again = Memory.open(tmp_path / "m", encoder=FakeEncoder())
    assert image_files(again) == before
    assert hits(again, "hybrid") == found


def test_a_trained_memory_is_edited_with_what_it_learned(tmp_path: Path) -> None:
    weights = hierarchy(trained=0.3)
    given = documents(80)
    edited = Memory.build(given[:60], tmp_path / "m", encoder=FakeEncoder(), config=CONFIG, hierarchy=weights)
    edited.add(given[60:])
    edited.remove([own.id for own in given[:10]])
    assert edited.verify().faults == []
    assert edited.verify("doc-70").faults == []
    at_once = Memory.build(given[10:], tmp_path / "o", encoder=FakeEncoder(), config=CONFIG, hierarchy=weights)
    one, other = (
        [(hit.document.id, hit.score) for hit in own.search("harbour item3", mode="exact")] for own in (edited, at_once)
    )
    assert one == other  # every chunk has the vector that it has in a memory built of these documents alone
    untrained = Memory.build(given[10:], tmp_path / "u", encoder=FakeEncoder(), config=CONFIG, hierarchy=None)
    assert [(hit.document.id, hit.score) for hit in untrained.search("harbour item3", mode="exact")] != one


def test_what_was_learned_can_stand_for_another_memory(tmp_path: Path) -> None:
    weights = hierarchy(trained=0.1)
    other = Memory.build(documents(9, seed=4), tmp_path / "o", encoder=FakeEncoder(), config=CONFIG, hierarchy=weights)
    assert other.search("the orchard follows", k=3).hits


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    weights = hierarchy(encoder=FakeEncoder("other"))
    with pytest.raises(ModelError, match="trained on encoder 'other'"):
        memory(tmp_path / "m", weights)
    assert not (tmp_path / "m").exists()


def test_an_interrupted_build_keeps_to_its_hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import treemem.hierarchy.build as building

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "grow", stop)
        with pytest.raises(KeyboardInterrupt):
            memory(tmp_path / "m", hierarchy(trained=0.1))
    with pytest.raises(InputError, match="another hierarchy"):
        memory(tmp_path / "m", None)
    assert memory(tmp_path / "m", hierarchy(trained=0.1)).hierarchy is not None


@pytest.mark.parametrize("damage", ["missing", "cut", "not json", "newer", "not finite", "other shape"])
def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    weights = hierarchy(trained=0.1)
    if damage == "not finite":
        with torch.no_grad():
            weights.rankers["1"].inwards.bias[0] = float("nan")
    weights.save(tmp_path)
    config, tensors = tmp_path / CONFIG_FILE, tmp_path / WEIGHTS_FILE
    if damage == "missing":
        tensors.unlink()
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif damage == "not json":
        config.write_text("{")
    elif damage == "newer":
        config.write_text(json.dumps({**json.loads(config.read_text()), "version": 99}))
    elif damage == "other shape":
        config.write_text(config.read_text().replace('"ranker_width": 16', '"ranker_width": 17'))
    with pytest.raises((InputError, ModelError)) as caught:
        Hierarchy.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# ---- the parts


def test_a_node_does_not_depend_on_the_order_of_its_children() -> None:
    torch.manual_seed(0)
    encoder = LevelEncoder(LevelEncoderConfig(8, width=16, layers=2)).eval()
    torch.nn.init.normal_(encoder.outwards.weight)
    children = torch.nn.functional.normalize(torch.randn(5, 7, 8), dim=2)
    present = torch.arange(7) < torch.tensor([7, 1, 3, 7, 5])[:, None]
    order = torch.randperm(7)
    with torch.inference_mode():
        straight = encoder(children, present)
        turned = encoder(children[:, order], present[:, order])
        garbled = encoder(torch.where(present[:, :, None], children, torch.full_like(children, 9.0)), present)
    torch.testing.assert_close(straight, turned)
    torch.testing.assert_close(straight, garbled)
    torch.testing.assert_close(straight.norm(dim=1), torch.ones(5))


def test_the_arithmetic_at_work_is_that_of_the_modules() -> None:
    weights = hierarchy(trained=0.3)
    rng = np.random.default_rng(0)
    encodings = rng.standard_normal((11, 32)).astype(np.float16)
    ends = np.array([3, 3, 4, 11], np.int64)
    got = contextual(encodings, ends, 0.25, weights.context)
    documents = np.stack([encodings[a:b].astype(np.float64).sum(0) for a, b in ((0, 3), (3, 4), (4, 11))])
    documents = np.repeat(documents / np.linalg.norm(documents, axis=1, keepdims=True), [3, 1, 7], axis=0)
    before, after = np.zeros((11, 32)), np.zeros((11, 32))
    for row in range(11):
        if row not in (0, 3, 4):
            before[row] = encodings[row - 1]
        if row not in (2, 3, 10):
            after[row] = encodings[row + 1]
    with torch.inference_mode():
        rows = [torch.from_numpy(part).float() for part in (encodings.astype(np.float64), documents, before, after)]
        expected = weights.gate(*rows).numpy()
    np.testing.assert_allclose(got.astype(np.float32), expected, atol=1e-3)

    offsets, children = np.array([0, 4, 5, 11], np.int64), rng.permutation(11).astype(np.int32)
    nodes = node_vectors(got, offsets, children, weights.residuals[2])
    below, present = padded(got[children].astype(np.float64), np.diff(offsets))
    with torch.inference_mode():
        expected = weights.encoders["2"](torch.from_numpy(below).float(), torch.from_numpy(present)).numpy()
    np.testing.assert_allclose(nodes.astype(np.float32), expected, atol=1e-3)

    queries = rng.standard_normal((3, 32)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    with torch.inference_mode():
        expected = weights.rankers["3"](torch.from_numpy(queries)).numpy()
    np.testing.assert_allclose(weights.rank(3, queries), expected, atol=1e-5)
    assert weights.rank(99, queries) is queries


def test_vectors_do_not_depend_on_what_is_computed_beside_them() -> None:
    weights = hierarchy(trained=0.3)
    rng = np.random.default_rng(1)
    encodings = rng.standard_normal((400, 32)).astype(np.float16)
    ends = np.arange(4, 404, 4)
    together = contextual(encodings, ends, 0.25, weights.context)
    alone = [contextual(encodings[a : a + 4], np.array([4]), 0.25, weights.context) for a in range(0, 400, 4)]
    assert together.tobytes() == np.concatenate(alone).tobytes()
    some = np.flatnonzero(rng.random(400) < 0.3)
    assert contextual(encodings, ends, 0.25, weights.context, some).tobytes() == together[some].tobytes()
    offsets, children = np.arange(0, 401, 8), np.arange(400, dtype=np.int32)
    nodes = node_vectors(together, offsets, children, weights.residuals[2])
    for node in (0, 17, 49):
        own = children[offsets[node] : offsets[node + 1]]
        assert node_vectors(together, np.array([0, 8]), own, weights.residuals[2]).tobytes() == nodes[node].tobytes()


@pytest.mark.parametrize("part", ["gate", "encoder", "ranker"])
def test_gradients_reach_every_parameter(part: str) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(6, 8) for _ in range(4)]
    if part == "gate":
        module: torch.nn.Module = ContextGate(ContextGateConfig(8, width=8, dropout=0.0))
    elif part == "encoder":
        module = LevelEncoder(LevelEncoderConfig(8, width=8, heads=2, layers=2, dropout=0.0))
    else:
        module = Ranker(RankerConfig(8, width=8, dropout=0.0))
    torch.nn.init.normal_(module.outwards.weight)  # type: ignore[union-attr, arg-type]
    if part == "gate":
        out = module(*rows)
    elif part == "encoder":
        out = module(torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool))
    else:
        out = module(rows[0]) * module.log_scale.exp()  # type: ignore[operator, union-attr]
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # A bias of the keys shifts all of a query's logits alike.
        if "in_proj_bias" not in name:
            assert parameter.grad.abs().sum() > 0, name


def test_a_hierarchy_needs_two_levels() -> None:
    with pytest.raises(InputError, match="levels = 1"):
        replace(hierarchy().config, levels=1)


# ---- the packaged one


def test_the_packaged_weights_rank_anew_and_change_nothing_else(small_memory: Memory) -> None:
    default = load_hierarchy("default")
    assert default is not None
    assert sum(file.stat().st_size for file in DEFAULT_FOLDER.iterdir()) < 20e6
    assert default.context is None
    assert default.residuals == {}
    assert default.decoder is not None
    assert small_memory.hierarchy is not None  # taken unless something else is asked for
    assert small_memory.hierarchy.weights_bytes() == default.weights_bytes()
    queries = np.eye(384, dtype=np.float32)[:3]
    assert default.rank(1, queries) is queries
    found = [small_memory.search("Why does smoke calm bees?", config=SearchConfig(decoder=d)) for d in (True, False)]
    assert [hit.score for hit in found[0].hits] != [hit.score for hit in found[1].hits]


def test_which_weights_a_memory_is_grown_with(tmp_path: Path, minilm: Encoder) -> None:
    one = Document("one", "A lamp hangs over the table.")
    assert Memory.build(one, tmp_path / "a", encoder=minilm, hierarchy="none").hierarchy is None
    assert Memory.build(one, tmp_path / "b", encoder=minilm, hierarchy=None).hierarchy is None
    assert Memory.build(one, tmp_path / "c", encoder=FakeEncoder()).hierarchy is None  # the packaged ones do not fit
    assert Memory.build(one, tmp_path / "d", encoder=minilm).hierarchy is not None
    with pytest.raises(ModelError, match="trained on encoder 'minilm'"):
        Memory.build(one, tmp_path / "e", encoder=FakeEncoder(), hierarchy=DEFAULT_FOLDER)
    assert not (tmp_path / "e").exists()
