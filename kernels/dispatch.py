"""Which implementation of the kernels is used: one table, one choice."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from treemem.errors import InputError
from treemem.kernels.reference import Masks
from treemem.kernels.tree import Found, LexicalIndex, ServingTree, Signatures, Words

VARIABLE = "TREEMEM_KERNELS"
"""Environment variable that names the back end."""

DEFAULT = "cpu"

_DLPACK_CUDA = 2  # kDLCUDA of dlpack.h

# Modules by name, imported when first asked for: numba takes a second.
_MODULES = {
    "reference": "treemem.kernels.reference",  # NumPy: the specification
    "cpu": "treemem.kernels.cpu",  # numba
    "gpu": "treemem.kernels.gpu",  # CuPy
}

_loaded: dict[str, ModuleType] = {}

BACK_ENDS = tuple(_MODULES)
"""Names that `back_end` knows."""


@runtime_checkable
class BackEnd(Protocol):
    """The functions that every implementation has; `reference.py` documents and defines them."""

    def search(
        self,
        tree: ServingTree,
        queries: NDArray[np.float32],
        beam: int,
        k: int,
        *,
        words: Words | None = None,
        beside: int = 0,
        ends: NDArray[np.int64] | None = None,
        allowed: Masks | None = None,
    ) -> Found:
        """See `reference.search`."""
        ...

    def signatures(
        self,
        offsets: NDArray[np.int64],
        ids: NDArray[np.int32],
        child_offsets: NDArray[np.int64],
        child_terms: NDArray[np.int32],
        child_shares: NDArray[np.uint8],
        child_values: NDArray[np.uint8],
    ) -> tuple[Signatures, NDArray[np.uint8]]:
        """See `reference.signatures`."""
        ...

    def exact(
        self, tree: ServingTree, queries: NDArray[np.float32], k: int, allowed: Masks | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """See `reference.exact`."""
        ...

    def score_chunks(
        self, tree: ServingTree, queries: NDArray[np.float32], ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """See `reference.score_chunks`."""
        ...

    def project(
        self,
        diagonal: NDArray[np.float32],
        rows: NDArray[np.int8],
        scales: NDArray[np.float32],
        queries: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """See `reference.project`."""
        ...

    def bm25_all(
        self, index: LexicalIndex, terms: NDArray[np.int32], weights: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `reference.bm25_all`."""
        ...

    def bm25_scores(
        self, index: LexicalIndex, terms: NDArray[np.int32], weights: NDArray[np.float32], chunks: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """See `reference.bm25_scores`."""
        ...


def lives_on_gpu(array: Any) -> bool:
    """Whether it is an array on an NVIDIA GPU: CuPy's, torch's, any with `__cuda_array_interface__` or DLPack."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and device()[0] == _DLPACK_CUDA


def back_end(name: str | None = None, *arrays: Any) -> BackEnd:
    """The kernels called `name`, else those that TREEMEM_KERNELS names, else those for where the arrays live.

    Arrays on a GPU (see `lives_on_gpu`) go to the GPU's kernels, all others, and none, to the CPU's. Raises InputError
    for an unknown name, or where the GPU's kernels cannot be used here.
    """
    source = "kernels" if name else VARIABLE
    here = "gpu" if any(map(lives_on_gpu, arrays)) else DEFAULT
    name = name or os.environ.get(VARIABLE) or here
    if name not in _MODULES:
        raise InputError(f"{source} = {name!r}: it must be one of {', '.join(BACK_ENDS)}")
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = import_module(_MODULES[name])
    reason = module.why_not() if name == "gpu" else None
    if reason is not None:
        raise InputError(reason)
    return cast(BackEnd, module)
