"""What the compiled kernels do differently on processors of other kinds."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
from numba.extending import intrinsic

from treemem.kernels import cpu, upper_halves


def dot_of_upper(by_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The product that walks wait for, compiled for a processor with AVX-512 VNNI or for one without."""
    monkeypatch.setattr(cpu, "_BYTE_PRODUCTS", by_bytes)
    dotting = intrinsic(cpu._dotting)

    @numba.njit
    def dot(row: int, query: int, pieces: int) -> int:
        return dotting(row, query, pieces)  # type: ignore[no-any-return]

    return dot  # type: ignore[no-any-return]


@pytest.mark.parametrize("by_bytes", [False, True])
def test_products_of_upper_halves(by_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_bytes and not cpu._BYTE_PRODUCTS:
        pytest.skip("this processor has no AVX-512 VNNI")
    dot = dot_of_upper(by_bytes, monkeypatch)
    generator = np.random.default_rng(0)
    for pieces in (1, 2, 7, 8, 9, 16, 17, 32):
        rows = generator.integers(-127, 128, (4, 64 * pieces), dtype=np.int8)
        queries = generator.integers(-127, 128, rows.shape, dtype=np.int8)
        rows[0], queries[0] = 127, 127  # the largest sum: in 16 bits it must not overflow
        rows[1], queries[1] = 127, -127
        expected = (((rows.astype(int) + 128) >> 4) * queries).sum(1)
        upper = upper_halves(rows)
        got = [dot(row.ctypes.data, query.ctypes.data, pieces) for row, query in zip(upper, queries, strict=True)]
        assert got == expected.tolist()


@pytest.mark.parametrize(
    ("features", "expected"), [("+avx512vnni,+avx512vl,+avx2", True), ("+avx512vnni,-avx512vl", False), ("", False)]
)
def test_what_is_compiled_for_decides(features: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # NUMBA_CPU_NAME=generic gives no features: instructions of this machine would then abort the process.
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    assert cpu._byte_products() is expected
