from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import treemem.kernels
from treemem.errors import InputError
from treemem.kernels import BackEnd, back_end, reference
from treemem.kernels.dispatch import BACK_ENDS


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from treemem.kernels import cpu

    assert BACK_ENDS == ("reference", "cpu", "gpu")
    monkeypatch.delenv("TREEMEM_KERNELS", raising=False)
    assert back_end() is cpu
    assert back_end("reference") is reference
    monkeypatch.setenv("TREEMEM_KERNELS", "reference")
    assert back_end() is reference
    assert back_end("cpu") is cpu


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="kernels = 'abacus': it must be one of reference, cpu, gpu"):
        back_end("abacus")
    monkeypatch.setenv("TREEMEM_KERNELS", "abacus")
    with pytest.raises(InputError, match="TREEMEM_KERNELS = 'abacus'"):
        back_end()


def test_back_ends_have_every_function() -> None:
    functions = [name for name in vars(BackEnd) if not name.startswith("_")]
    assert set(functions) == {"search", "signatures", "exact", "score_chunks", "project", "bm25_all", "bm25_scores"}
    for name in BACK_ENDS:
        module = importlib.import_module(f"treemem.kernels.{name}")
        assert all(callable(getattr(module, function)) for function in functions)


def test_arrays_on_a_gpu_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from treemem.kernels import cpu, gpu

    class OnGpu:
        __cuda_array_interface__: ClassVar[dict[str, int]] = {}

    monkeypatch.delenv("TREEMEM_KERNELS", raising=False)
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    assert back_end(None, np.zeros(1), OnGpu()) is gpu
    assert back_end(None, SimpleNamespace(__dlpack_device__=lambda: (2, 0))) is gpu
    assert back_end(None, SimpleNamespace(__dlpack_device__=lambda: (1, 0)), torch.zeros(1)) is cpu
    assert back_end(None, np.zeros(1)) is cpu
    assert back_end("reference", OnGpu()) is reference
    monkeypatch.setattr(gpu, "why_not", lambda: "there is none")
    with pytest.raises(InputError, match="there is none"):
        back_end(None, OnGpu())


def test_numba_is_imported_only_when_needed() -> None:
    code = "import sys, treemem.kernels as k; k.back_end('reference'); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_exported_names() -> None:
    assert all(hasattr(treemem.kernels, name) for name in treemem.kernels.__all__)
    assert set(treemem.kernels.__all__) == {
        "BackEnd",
        "Found",
        "LevelBlocks",
        "LexicalIndex",
        "Masks",
        "ServingTree",
        "Signatures",
        "Words",
        "back_end",
        "quantise",
        "top_k",
        "upper_halves",
    }
