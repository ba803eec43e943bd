"""The parts of the compiled kernels, and what they do differently on processors of other kinds."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.extending import intrinsic
from tests.kernels.trees import random_tree

from treemem.kernels import cpu, reference, upper_halves


@pytest.fixture(params=[False, True], ids=["by words", "by bytes"])
def by_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The products compiled for a processor without AVX-512 VNNI, and for one that has it."""
    if request.param and not cpu._BYTE_PRODUCTS:
        pytest.skip("this processor has no AVX-512 VNNI")
    monkeypatch.setattr(cpu, "_BYTE_PRODUCTS", request.param)
    return bool(request.param)


def fours(products: Any, rows: np.ndarray, query: np.ndarray, size: int) -> list[int]:
    """The products of four rows with a query, and that nothing else is written."""

    @numba.njit
    def multiply(one: int, two: int, three: int, four: int, query: int, size: int, dots: int) -> None:
        products(one, two, three, four, query, size, dots)

    dots = np.full(6, 7, np.int32)
    multiply(*(row.ctypes.data for row in rows), query.ctypes.data, size, dots[1:].ctypes.data)
    assert dots[0] == dots[-1] == 7
    return list(dots[1:-1])


@pytest.mark.parametrize("pieces", [1, 2, 7, 8, 9, 16, 17, 32])
def test_products_of_upper_halves(by_bytes: bool, pieces: int) -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(-127, 128, (4, 64 * pieces), dtype=np.int8)
    query = generator.integers(-127, 128, 64 * pieces, dtype=np.int8)
    rows[0] = np.where(query > 0, 127, -127)
    for asked in (query, np.full_like(query, 127), np.full_like(query, -127)):  # in 16 bits no sum must overflow
        expected = ((rows.astype(int) + 128) >> 4) @ asked.astype(int)
        assert fours(intrinsic(cpu._multiplying_upper), upper_halves(rows), asked, pieces) == expected.tolist()


@pytest.mark.parametrize("dimension", [1, 31, 32, 33, 64, 384, 2047, 2048])
def test_products_of_rows(by_bytes: bool, dimension: int) -> None:
    products = intrinsic(cpu._multiplying_rows) if by_bytes else cpu._rows_by_words
    laid_out = numba.njit(error_model="numpy")(cpu._laid_out.py_func)
    generator = np.random.default_rng(0)
    rows = np.frombuffer(before_a_wall(4 * dimension), np.int8).reshape(4, dimension)
    rows[:] = generator.integers(-127, 128, rows.shape, dtype=np.int8)
    rows[0], rows[1] = 127, -127
    padded = 32 * -(-dimension // 32)
    for query in (
        generator.integers(-8191, 8192, dimension),
        np.full(dimension, 8191),
        np.full(dimension, -8191),
        np.resize([63, 64, 65, -64, -65, 0], dimension),  # where the lower part ends
    ):
        q16 = np.zeros(padded, np.int16)
        q16[:dimension] = query
        asked = np.full(2 * padded, 99, np.int8)
        shift = int(laid_out(q16, asked))
        found = np.array(fours(products, rows, asked, dimension)).astype(np.int32) + np.int32(shift)
        assert found.tolist() == (rows.astype(int) @ query).tolist()


def before_a_wall(size: int) -> memoryview:
    """Memory behind which nothing may be read: the process ends where something is."""
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = pages * mmap.PAGESIZE
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory, end))
    library = ctypes.CDLL(None, use_errno=True)
    assert library.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return memoryview(memory)[end - size : end]


@pytest.mark.parametrize("count", [0, 1, 2, 40, cpu._FEW, cpu._FEW + 1, 1000])
@pytest.mark.parametrize("wanted", [0, 1, 10, 64, cpu._FEW, cpu._FEW + 1, 2000])
def test_the_smallest_keys(count: int, wanted: int) -> None:
    generator = np.random.default_rng(count)
    keys = generator.choice(10**17, count, replace=False) * generator.choice([-1, 1], count)
    best = np.zeros(wanted, np.int64)
    size = cpu._keep_best(np.append(keys, np.int64(-5)), count, best)
    assert size == min(count, wanted)
    assert best[:size].tolist() == np.sort(keys)[:wanted].tolist()
    if size == 0:
        return
    for enough in (size, 2 * size):
        assert size <= (keys <= cpu._bound_of_best(keys, size, enough)).sum() <= enough
    many = np.repeat(keys, 3)
    assert (many <= cpu._bound_of_best(many, count, count)).sum() >= count


@pytest.mark.parametrize("spread", [0, 200, 2**31 - 2])
@pytest.mark.parametrize(("repeats", "masked"), [(1, 0), (2, 0), (30, 0), (2, 500), (30, 599), (1, 600)])
def test_places_of_the_best(repeats: int, masked: int, spread: int) -> None:
    """As one after the other would list them: repeated elements at the first of their places, masked ones never."""
    generator = np.random.default_rng(repeats)
    ids = np.repeat(np.arange(600 // repeats, dtype=np.int32), repeats)
    keys = generator.integers(-spread, spread + 1, 600 // repeats, dtype=np.int32).repeat(repeats)
    order = generator.permutation(600)
    ids, keys = ids[order], keys[order]
    keys[generator.permutation(600)[:masked]] = cpu._MASKED
    met, most = 600 - masked, 48
    places, room = np.empty(600, np.int64), np.empty(600, np.int64)
    table = np.empty(2048 if repeats > 1 else 0, np.int32)
    count = cpu._best_places(keys, met, most, ids, table, places, room)
    first = {int(ids[place]): place for place in range(599, -1, -1) if keys[place] != cpu._MASKED}
    expected = sorted(sorted(first.values(), key=lambda place: (keys[place], ids[place]))[:most])
    assert places[:count].tolist() == expected


@pytest.mark.parametrize(
    ("features", "expected"), [("+avx512vnni,+avx512vl,+avx2", True), ("+avx512vnni,-avx512vl", False), ("", False)]
)
def test_what_is_compiled_for_decides(features: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # NUMBA_CPU_NAME=generic gives no features: instructions of this machine would then abort the process.
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    assert cpu._byte_products() is expected


def test_a_map_in_another_layout_is_the_same_map() -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(-127, 128, (40, 40), dtype=np.int8)
    factors = generator.standard_normal(40).astype(np.float32), generator.random(40, np.float32)
    queries = generator.standard_normal((3, 40)).astype(np.float32)
    expected = reference.project(factors[0], rows, factors[1], queries)
    for layout in (rows, np.asfortranarray(rows), np.repeat(rows, 2, 1)[:, ::2]):
        np.testing.assert_array_equal(cpu.project(factors[0], layout, factors[1], queries), expected)


def test_a_tree_larger_than_memory_is_walked_alike() -> None:
    generator = np.random.default_rng(0)
    tree = random_tree(generator, 2000)
    queries = generator.standard_normal((tree.depth, 9, 2, tree.dimension)).astype(np.float32)
    paged = replace(tree, paged=True)
    assert paged.paged_levels[-1]
    found = cpu.search(paged, queries, 40, 10)
    assert found.scored.min() > 200  # more than are looked at twice
    with_neighbours: dict[str, Any] = {"beside": 2, "ends": np.arange(5, 2001, 5)}
    for options in ({}, with_neighbours):
        for one, other in zip(
            cpu.search(paged, queries, 40, 10, **options), cpu.search(tree, queries, 40, 10, **options), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_what_lies_close_together_is_asked_for_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(cpu, "_advise", lambda address, size: asked.append((int(address), int(size))))
    far = cpu._GAP // 100
    begins = np.array([3, 10, 10 + far, 12 + 2 * far, 12 + 2 * far, 20 + 9 * far])
    ends = np.array([10, 10, 11 + far, 13 + 2 * far, 14 + 2 * far, 21 + 9 * far])
    cpu._advise_spans.py_func(5000, 100, begins, ends)
    # Row 11 + far to 12 + 2 * far are more than the gap apart.
    spans = [(3, 11 + far), (12 + 2 * far, 14 + 2 * far), (20 + 9 * far, 21 + 9 * far)]
    assert asked == [(5000 + 100 * begin, 100 * (end - begin)) for begin, end in spans]


ELSEWHERE = """
import numpy as np
from tests.kernels.trees import random_tree
from treemem.kernels import cpu, quantise, reference

assert not cpu._BYTE_PRODUCTS
generator = np.random.default_rng(0)
tree = random_tree(generator, 900, dimension=80)
queries = generator.standard_normal((tree.depth, 5, 3, 80)).astype(np.float32)
factors = np.ones(80, np.float32), *quantise(generator.standard_normal((80, 80)))
for name, given in {
    "search": (tree, queries, 30, 10), "exact": (tree, queries[0], 10), "project": (*factors, queries[0, 0]),
}.items():
    for one, other in zip(getattr(cpu, name)(*given), getattr(reference, name)(*given), strict=True):
        np.testing.assert_array_equal(one, other)
"""


def test_walks_on_a_processor_without_products_of_bytes(tmp_path: Path) -> None:
    """All of it, compiled for one: in a process of its own, since what is compiled for is settled at the import."""
    features = "+sse4.2,+avx2" if platform.machine() in ("x86_64", "AMD64") else ""
    own = {"NUMBA_CPU_FEATURES": features, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=root, env={**os.environ, **own}, check=True)


def test_keys_that_follow_each_other_are_told_apart() -> None:
    """As those of elements of one score are."""
    for first in (-40, 0, cpu._NO_KEY - 50):
        keys = first + np.random.default_rng(0).permutation(50)
        for wanted in range(1, 51):
            assert (keys <= cpu._bound_of_best(keys, wanted, wanted)).sum() == wanted


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64, 100])
def test_first_above(count: int) -> None:
    values = np.sort(np.random.default_rng(count).integers(0, 50, count))
    for value in range(-1, 52):
        assert cpu._first_above(values, value) == np.searchsorted(values, value, side="right")


def test_many_walks_have_all_pages_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[Any] = []
    called = threading.Event()
    monkeypatch.setattr(cpu, "_map_pages", lambda arrays: (mapped.append(arrays), called.set()))
    generator = np.random.default_rng(0)
    tree = random_tree(generator, 40)
    queries = generator.standard_normal((tree.depth, cpu._MANY - 1, 1, tree.dimension)).astype(np.float32)
    cpu.search(tree, queries, 2, 3)
    assert not mapped
    for _ in range(3):
        cpu.search(tree, queries[:, :1], 2, 3)
    assert called.wait(10)
    assert len(mapped) == 1
    assert any(array is tree.levels[-1].rows for array in mapped[0])
    paged = replace(tree, paged=True)
    for _ in range(3):
        cpu.search(paged, queries, 2, 3)
    assert len(mapped) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked to map pages")
def test_pages_are_mapped(tmp_path: Path) -> None:
    file = tmp_path / "array.npy"
    np.save(file, np.zeros(1 << 22, np.uint8))
    array = np.load(file, mmap_mode="r")

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        next(line for line in lines if line.endswith(str(file)))
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) << 10

    before = resident()
    cpu._map_pages((array,))
    if resident() == before:
        pytest.skip("this system cannot be asked to map pages: Linux 5.14 can")
    assert resident() >= array.nbytes
