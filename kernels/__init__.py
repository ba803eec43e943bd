"""The arithmetic of searching: walks, exact search and BM25 over plain arrays."""

from treemem.kernels.dispatch import BackEnd, back_end
from treemem.kernels.reference import Masks, quantise, top_k, upper_halves
from treemem.kernels.tree import (
    Found,
    LevelBlocks,
    LexicalIndex,
    ServingTree,
    Signatures,
    Words,
)

__all__ = [
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
]
