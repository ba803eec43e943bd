"""The arithmetic of searching: walks, exact search and BM25 over plain arrays."""

from treemem.kernels.dispatch import BackEnd, back_end
from treemem.kernels.reference import Masks, quantise, top_k
from treemem.kernels.tree import LevelBlocks, LexicalIndex, ServingTree, Walked, first_rows

__all__ = [
    "BackEnd",
    "LevelBlocks",
    "LexicalIndex",
    "Masks",
    "ServingTree",
    "Walked",
    "back_end",
    "first_rows",
    "quantise",
    "top_k",
]
