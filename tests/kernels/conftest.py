"""One body of tests for all back ends; the GPU's run on a GPU, and besides on the CPU, thread by thread."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from tests.kernels import emulator

from treemem.kernels import BackEnd, back_end, gpu
from treemem.kernels.dispatch import BACK_ENDS


@pytest.fixture(scope="session")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """CuPy's place is taken by an emulation."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the kernels for GPUs cannot be tried on the CPU")
    return emulator.cupy(tmp_path_factory.mktemp("kernels"), free=1 << 30)


@pytest.fixture
def emulated(pretended: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackEnd]:
    """The kernels for GPUs, on the CPU."""
    monkeypatch.setattr(gpu, "_cupy", lambda: pretended)
    monkeypatch.setattr(gpu, "_kernel", pretended.kernel)
    monkeypatch.setattr(gpu, "THREADS", 64)  # so that loops over threads go round more than once
    for kept in (gpu._trees, gpu._words):
        kept.clear()
    yield gpu
    for kept in (gpu._trees, gpu._words):
        kept.clear()


@pytest.fixture(params=[*BACK_ENDS, "emulated gpu"])
def kernels(request: pytest.FixtureRequest) -> BackEnd:
    """Each back end in turn."""
    if request.param == "gpu" and gpu.why_not() is not None:
        pytest.skip(str(gpu.why_not()))
    chosen: BackEnd = request.getfixturevalue("emulated") if "emulated" in request.param else back_end(request.param)
    return chosen
