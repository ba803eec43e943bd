"""What the kernels for GPUs have beside what all back ends share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.kernels.trees import random_ends, random_masks, random_queries, random_tree, random_words

from treemem.errors import InputError, ModelError
from treemem.kernels import Found, back_end, gpu, reference


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_nvcc_compiles_the_kernels(architecture: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    out = tmp_path / "walk.ptx"
    options = ["--ptx", "-std=c++14", f"-arch={architecture}", "-Werror", "all-warnings"]
    command = ["nvcc", *options, "-o", str(out), str(gpu.SOURCE)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    text = out.read_text("utf-8")
    assert all(f".entry {name}(" in text for name in ("walk", "scan", "score", "quantise"))
    assert "dp4a" in text
    assert "ld.global.nc.v4" in text


def test_a_machine_without_one_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "CuPy is not installed" in str(gpu.why_not())
    with pytest.raises(InputError, match="pip install cupy"):
        back_end("gpu")


def test_a_machine_with_cupy_and_no_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class CUDARuntimeError(Exception):
        pass

    def none_found() -> int:
        raise CUDARuntimeError("no CUDA-capable device is detected")

    runtime = SimpleNamespace(getDeviceCount=none_found, CUDARuntimeError=CUDARuntimeError)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    with pytest.raises(
        InputError, match=r"no NVIDIA GPU \(no CUDA-capable device is detected\): use .* TREEMEM_KERNELS=cpu"
    ):
        back_end("gpu")
    runtime.getDeviceCount = lambda: 0
    with pytest.raises(InputError, match=r"there is no NVIDIA GPU: use .* TREEMEM_KERNELS=cpu"):
        back_end("gpu")
    runtime.getDeviceCount = lambda: 1
    assert gpu.why_not() is None


def test_the_upper_levels_come_first(emulated: Any) -> None:
    tree = random_tree(np.random.default_rng(4), 300)
    parts = ("upper", "upper_scales", "ids", "offsets", "rows", "scales")
    sizes = [[getattr(blocks, part).nbytes for part in parts] for blocks in tree.levels]
    assert emulated.place(tree, sum(map(sum, sizes[:-1]))) == sum(sizes[-1])
    kinds = [type(array).__name__ for array in gpu._placed(tree).arrays]
    assert kinds == ["Array"] * (len(parts) * (tree.depth - 1)) + ["Pinned"] * len(parts)


@pytest.mark.parametrize("memory", [0, 3000, 10**9])
def test_what_does_not_fit_stays_with_the_host(emulated: Any, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    tree = random_tree(generator, 300)
    monkeypatch.setenv(gpu.MEMORY, str(memory))
    whole = sum(
        getattr(blocks, name).nbytes
        for blocks in tree.levels
        for name in ("rows", "scales", "upper", "upper_scales", "ids", "offsets")
    )
    pinned = emulated.place(tree)
    assert whole - memory <= pinned <= whole if memory < whole else pinned == 0
    queries, words, ends = (
        random_queries(generator, tree, 4),
        random_words(generator, tree, 4),
        random_ends(generator, 300),
    )
    found = emulated.search(tree, queries, 4, 9, words=words, beside=1, ends=ends)
    expected = reference.search(tree, queries, 4, 9, words=words, beside=1, ends=ends)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_wrong_budget_is_refused(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.MEMORY, "much")
    with pytest.raises(InputError, match="TREEMEM_GPU_MEMORY = 'much'"):
        emulated.place(random_tree(np.random.default_rng(0), 10))


def test_queries_on_the_gpu_are_answered_there(emulated: Any, pretended: Any) -> None:
    generator = np.random.default_rng(1)
    tree = random_tree(generator, 200)
    queries = random_queries(generator, tree, 3)
    there = pretended.asarray(queries)
    found = emulated.search(tree, there, 4, 9)
    expected = reference.search(tree, queries, 4, 9)
    for name, got, array in zip(Found._fields, found, expected, strict=True):
        assert hasattr(got, "__cuda_array_interface__"), name
        np.testing.assert_array_equal(pretended.asnumpy(got), array)
    ids, scores = emulated.exact(tree, there[0], 9)
    assert hasattr(scores, "__cuda_array_interface__")
    np.testing.assert_array_equal(
        pretended.asnumpy(emulated.score_chunks(tree, there[0], ids)), pretended.asnumpy(scores)
    )
    # What speaks DLPack alone is taken where it lies, too.
    spoken = SimpleNamespace(__dlpack__=queries.__dlpack__, __dlpack_device__=lambda: (2, 0))
    assert np.shares_memory(gpu._held(spoken), queries)
    found = emulated.search(tree, spoken, 4, 9)
    assert hasattr(found.chunks, "__cuda_array_interface__")
    np.testing.assert_array_equal(pretended.asnumpy(found.chunks), expected.chunks)
    there[0, 0, 0, 0] = np.inf
    with pytest.raises(ModelError, match="not finite"):
        emulated.search(tree, there, 4, 9)


def test_too_much_for_a_block(emulated: Any) -> None:
    tree = random_tree(np.random.default_rng(2), 3000, fanout=1000, spill=1)
    with pytest.raises(InputError, match="use smaller ones"):
        emulated.search(tree, np.ones((tree.depth, 1, 1, 16), np.float32), 1000, 3000, beside=9, ends=np.array([3000]))


def test_a_smaller_search_takes_no_room_from_a_larger_one(emulated: Any, pretended: Any) -> None:
    # The limit belongs to the function, which threads share: one may be lowered between another's setting and launch.
    tree = random_tree(np.random.default_rng(5), 3000, fanout=32)
    for beam in (70, 45):
        emulated.search(tree, random_queries(np.random.default_rng(beam), tree, 1), beam, 9)
        if beam == 70:
            limit = pretended.kernel("walk").max_dynamic_shared_size_bytes
            assert limit > 48 << 10
    assert pretended.kernel("walk").max_dynamic_shared_size_bytes == limit


@pytest.mark.parametrize("k", [1, 7, 600])
@pytest.mark.parametrize("kept", [None, 0.3])
def test_exact_search_in_slices_and_parts(
    emulated: Any, k: int, kept: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(k)
    tree = random_tree(generator, 1500, twins=0.3)
    queries = random_queries(generator, tree, 7, 2)[0]
    masks = None if kept is None else random_masks(generator, tree, kept)
    monkeypatch.setattr(gpu, "_SLICE", 400)  # four slices, the last shorter
    monkeypatch.setattr(gpu, "_KEPT", 3 * 4 * k * 8)  # three queries a launch, then one
    assert list(gpu._parts(7, 4 * k * 8)) == [(0, 3), (3, 6), (6, 7)]
    for got, expected in zip(
        emulated.exact(tree, queries, k, masks), reference.exact(tree, queries, k, masks), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (9, 16), (70, 33)])
def test_vectors_are_quantised_alike(emulated: Any, shape: tuple[int, int]) -> None:
    vectors = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    vectors[::4] = 0
    for got, expected in zip(emulated.quantise(vectors), reference.quantise(vectors), strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()


def test_bad_vectors_are_named(emulated: Any) -> None:
    vectors = np.ones((4, 3), np.float32)
    vectors[2, 1] = np.nan
    with pytest.raises(ModelError, match="row 2, component 1"):
        emulated.quantise(vectors)
    with pytest.raises(ModelError, match="2049"):
        emulated.quantise(np.ones((1, 2049), np.float32))
    with pytest.raises(InputError, match=r"expected \[n, d\]"):
        emulated.quantise(np.ones(3, np.float32))
