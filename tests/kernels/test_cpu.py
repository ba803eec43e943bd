"""What the compiled kernels do differently on processors of other kinds."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numba
import numpy as np
import pytest
from numba.extending import intrinsic

from treemem.kernels import cpu, upper_halves


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


@pytest.mark.parametrize("count", [1, 2, 40, cpu._FEW, cpu._FEW + 1, 1000])
@pytest.mark.parametrize("wanted", [1, 10, 64, 2000])
def test_the_smallest_keys(count: int, wanted: int) -> None:
    generator = np.random.default_rng(count)
    keys = generator.choice(10**17, count, replace=False) * generator.choice([-1, 1], count)
    best = np.zeros(wanted, np.int64)
    size = cpu._keep_best(np.append(keys, np.int64(-5)), count, best)
    assert size == min(count, wanted)
    assert best[:size].tolist() == np.sort(keys)[:wanted].tolist()
    for enough in (size, 2 * size):
        assert size <= (keys <= cpu._bound_of_best(keys, size, enough)).sum() <= enough
    many = np.repeat(keys, 3)
    assert (many <= cpu._bound_of_best(many, count, count)).sum() >= count


@pytest.mark.parametrize(("repeats", "masked"), [(1, 0), (2, 0), (30, 0), (2, 500), (30, 599), (1, 600)])
def test_places_of_the_best(repeats: int, masked: int) -> None:
    """As one after the other would list them: repeated elements at the first of their places, masked ones never."""
    generator = np.random.default_rng(repeats)
    ids = np.repeat(np.arange(600 // repeats, dtype=np.int32), repeats)
    keys = np.repeat(generator.integers(-200, 200, 600 // repeats, dtype=np.int32), repeats)  # some are equal
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
