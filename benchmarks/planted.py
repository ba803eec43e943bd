"""A tree of any size without growing it: every vector is drawn around its parent.

It takes a GPU seconds and a CPU minutes. What a walk costs depends on the tree's shape, not on whether its clusters
were found or drawn. Quality does: none is reported of such trees.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from treemem.kernels import LevelBlocks, ServingTree
from treemem.kernels.reference import upper_halves

CHILDREN = 25.6
"""Mean of a grown tree with fanout 32."""
NEAR = (0.9, 0.85, 0.8, 0.75, 0.7)
"""Cosine of an element and its parent, top first; the last for all that are deeper."""
BLOCK = 1 << 16


def sizes_of(chunks: int) -> tuple[int, ...]:
    """Nodes of each level, top first, the chunks last; each chunk stands under two nodes."""
    sizes = [chunks, round(2 * chunks / CHILDREN)]
    while sizes[-1] > 64:
        sizes.append(max(1, round(sizes[-1] / CHILDREN)))
    return tuple(sizes[::-1])


def planted(chunks: int, dimension: int, seed: int, torch: Any, device: str) -> ServingTree:
    """Draw a tree.

    Args:
        chunks: how many.
        dimension: of the vectors.
        seed: of the drawing.
        torch: the module.
        device: where vectors are drawn and quantised.
    """
    draw = torch.Generator(device=device).manual_seed(seed)
    sizes = sizes_of(chunks)
    levels = []
    above = torch.zeros((1, dimension), device=device)
    owners = np.zeros(sizes[0], np.int64)
    for level, size in enumerate(sizes):
        near = NEAR[min(level, len(NEAR) - 1)] if level else 0.0
        if level:
            owners = np.minimum(np.arange(size) * sizes[level - 1] // size, sizes[level - 1] - 1)
        last = level == len(sizes) - 1
        vectors = torch.empty((0 if last else size, dimension), device=device)
        rows, scales = np.empty((size, dimension), np.int8), np.empty(size, np.float32)
        for start in range(0, size, BLOCK):
            own = torch.from_numpy(owners[start : start + BLOCK]).to(device)
            noise = torch.randn((len(own), dimension), generator=draw, device=device) / dimension**0.5
            drawn = torch.nn.functional.normalize(near * above[own] + (1 - near**2) ** 0.5 * noise, dim=1)
            if not last:
                vectors[start : start + BLOCK] = drawn
            rows[start : start + BLOCK], scales[start : start + BLOCK] = _quantised(drawn, torch)
        entries, parents = np.arange(size), owners
        if last:  # the second seat is with a node beside the first
            beside = np.minimum(owners ^ 1, sizes[level - 1] - 1)
            entries, parents = np.tile(entries, 2), np.concatenate([owners, beside])
        order = np.argsort(parents, kind="stable")
        ids = entries[order].astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(parents, minlength=max(1, len(above))))]).astype(np.int64)
        levels.append(_blocks(rows, scales, ids, offsets))
        above = vectors
    return ServingTree(tuple(levels), sizes)


def _quantised(vectors: Any, torch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scales, as `treemem.kernels.reference.quantise` makes them."""
    scales = (vectors.abs().amax(1) / 127).float()
    rows = torch.round(vectors / scales[:, None]).clamp_(-127, 127).to(torch.int8)
    return rows.cpu().numpy(), scales.cpu().numpy()


def _blocks(rows: np.ndarray, scales: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> LevelBlocks:
    """One level as the kernels read it."""
    upper = np.empty((len(ids), 32 * -(-rows.shape[1] // 64)), np.uint8)

    def lay_out(start: int) -> None:
        upper[start : start + BLOCK] = upper_halves(rows[ids[start : start + BLOCK]])

    with ThreadPoolExecutor() as pool:
        list(pool.map(lay_out, range(0, len(ids), BLOCK)))
    return LevelBlocks(rows, scales, upper, scales[ids], ids, offsets)
