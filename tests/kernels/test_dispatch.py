from __future__ import annotations

import subprocess
import sys

import pytest

import treemem.kernels
from treemem.errors import InputError
from treemem.kernels import BackEnd, back_end, reference
from treemem.kernels.dispatch import BACK_ENDS


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from treemem.kernels import cpu

    assert BACK_ENDS == ("reference", "cpu")
    monkeypatch.delenv("TREEMEM_KERNELS", raising=False)
    assert back_end() is cpu
    assert back_end("reference") is reference
    monkeypatch.setenv("TREEMEM_KERNELS", "reference")
    assert back_end() is reference
    assert back_end("cpu") is cpu


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="kernels = 'abacus': it must be one of reference, cpu"):
        back_end("abacus")
    monkeypatch.setenv("TREEMEM_KERNELS", "abacus")
    with pytest.raises(InputError, match="TREEMEM_KERNELS = 'abacus'"):
        back_end()


def test_back_ends_have_every_function() -> None:
    functions = [name for name in vars(BackEnd) if not name.startswith("_")]
    assert set(functions) == {"search", "signatures", "exact", "score_chunks", "bm25_all", "bm25_scores"}
    for name in BACK_ENDS:
        assert all(callable(getattr(back_end(name), function)) for function in functions)


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
        "first_rows",
        "quantise",
        "top_k",
    }
