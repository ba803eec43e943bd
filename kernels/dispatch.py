"""Which implementation of the kernels is used: one table, one choice."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from treemem.errors import InputError
from treemem.kernels.reference import Masks
from treemem.kernels.tree import Found, LexicalIndex, ServingTree, Signatures, Words

VARIABLE = "TREEMEM_KERNELS"
"""Environment variable that names the back end."""

DEFAULT = "cpu"

# Modules by name, imported when first asked for: numba takes a second.
_MODULES = {"reference": "treemem.kernels.reference", "cpu": "treemem.kernels.cpu"}

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


def back_end(name: str | None = None) -> BackEnd:
    """The kernels called `name`, else those that TREEMEM_KERNELS names, else the default.

    Raises InputError for an unknown name.
    """
    source = "kernels" if name else VARIABLE
    name = name or os.environ.get(VARIABLE) or DEFAULT
    if name not in _MODULES:
        raise InputError(f"{source} = {name!r}: it must be one of {', '.join(BACK_ENDS)}")
    return cast(BackEnd, import_module(_MODULES[name]))
