"""Random trees, queries, masks and lexical indexes for tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from treemem.kernels import (
    LevelBlocks,
    LexicalIndex,
    Masks,
    ServingTree,
    Signatures,
    Words,
    quantise,
    reference,
    upper_halves,
)


def random_tree(
    generator: np.random.Generator,
    chunks: int,
    *,
    dimension: int = 16,
    fanout: int = 4,
    spill: int = 2,
    twins: float = 0.0,
) -> ServingTree:
    """A tree of random shape: uneven and empty blocks, children in any order.

    `twins`: share of the elements of each level that have the vector of another one, so that scores tie.
    """
    sizes = [chunks]
    while sizes[0] > 2 * fanout:
        sizes.insert(0, max(2, -(-sizes[0] * (spill if len(sizes) == 1 else 1) // fanout)))
    parents = [1, *sizes[:-1]]
    copies = [1] * (len(sizes) - 1) + [min(spill, parents[-1])]
    levels = [_random_level(generator, *shape, dimension, twins) for shape in zip(parents, sizes, copies, strict=True)]
    return ServingTree(tuple(levels), tuple(sizes))


def _random_level(
    generator: np.random.Generator, parents: int, size: int, copies: int, dimension: int, twins: float
) -> LevelBlocks:
    vectors = generator.standard_normal((size, dimension))
    if size:
        twin = generator.random(size) < twins
        vectors[twin] = vectors[generator.integers(0, size, twin.sum())]
    rows, scales = quantise((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))
    homes = [generator.choice(parents, copies, replace=False) for _ in range(size)]
    below: list[list[int]] = [[] for _ in range(parents)]
    for element in generator.permutation(size):
        for home in homes[element]:
            below[home].append(int(element))
    ids = np.array([element for block in below for element in block], np.int32)
    offsets = np.cumsum([0, *map(len, below)], dtype=np.int64)
    return laid_out(rows, scales, ids, offsets)


def laid_out(
    rows: NDArray[np.int8], scales: NDArray[np.float32], ids: NDArray[np.int32], offsets: NDArray[np.int64]
) -> LevelBlocks:
    """A level from its rows."""
    return LevelBlocks(rows, scales, upper_halves(rows[ids]), scales[ids], ids, offsets)


def random_queries(
    generator: np.random.Generator, tree: ServingTree, batch: int, embeddings: int = 1
) -> NDArray[np.float32]:
    """Queries for a walk, float32 [depth, batch, embeddings, d]; one level of them serves exact search."""
    return generator.standard_normal((tree.depth, batch, embeddings, tree.dimension)).astype(np.float32)


def random_masks(generator: np.random.Generator, tree: ServingTree, kept: float) -> Masks:
    """Masks that allow about the share `kept` of each level."""
    return tuple((generator.random(size) < kept).astype(np.uint8) for size in tree.sizes)


def random_index(generator: np.random.Generator, chunks: int, *, vocabulary: int = 40) -> LexicalIndex:
    """A lexical index of chunks with up to 12 terms each, some with none."""
    terms = [np.sort(generator.choice(vocabulary, generator.integers(0, 13), replace=False)) for _ in range(chunks)]
    offsets = np.cumsum([0, *map(len, terms)], dtype=np.int64)
    entries = int(offsets[-1])
    counts = generator.integers(1, 300, entries)
    norms = (0.3 + 2 * generator.random(chunks)).astype(np.float32)
    all_terms = np.concatenate([np.zeros(0), *terms]).astype(np.int32)
    wide = bool(generator.integers(2))
    return LexicalIndex(
        offsets, all_terms, counts.astype(np.uint16) if wide else counts.clip(1, 255).astype(np.uint8), norms
    )


Kept = Callable[[int, int], bool]
"""Whether a node keeps a term, by its number and its share."""


def signatures_of(tree: ServingTree, index: LexicalIndex, kept: Kept | None = None) -> tuple[Signatures, ...]:
    """The signatures of all levels, top first; `kept` decides about the nodes from level 3 up."""
    counts = index.counts.astype(np.float32)
    parts = counts / (counts + np.repeat(index.norms, np.diff(index.offsets)))
    offsets, terms, shares = index.offsets, index.terms, np.ceil(parts * 255).clip(1, 255).astype(np.uint8)
    values = index.counts.clip(1, 255).astype(np.uint8)
    made: list[Signatures] = []
    for blocks in tree.levels[::-1]:
        own, shares = reference.signatures(blocks.offsets, blocks.ids, offsets, terms, shares, values)
        offsets, terms = own.offsets, own.terms
        if kept is not None and made:
            there = [bool(kept(int(term), int(share))) for term, share in zip(terms, shares, strict=True)]
            offsets = np.array([sum(there[:end]) for end in offsets])
            terms, shares = terms[there], shares[there]
        values = shares
        made.insert(0, own)
    return tuple(made)


def random_words(generator: np.random.Generator, tree: ServingTree, batch: int, *, vocabulary: int = 40) -> Words:
    """Up to 6 terms a query, some of them unknown."""
    index = random_index(generator, tree.sizes[-1], vocabulary=vocabulary)
    offsets = np.cumsum([0, *generator.integers(0, 7, batch)], dtype=np.int64)
    terms = generator.integers(-1, vocabulary + 5, offsets[-1]).astype(np.int32)
    weights = (10 * generator.random(len(terms))).astype(np.float32)
    return Words(index, signatures_of(tree, index), offsets, terms, weights, float(generator.choice([0.0, 0.4])))


def random_ends(generator: np.random.Generator, chunks: int) -> NDArray[np.int64]:
    """Where the documents of so many chunks end; some have none."""
    inner = np.sort(generator.integers(0, chunks + 1, generator.integers(0, 1 + chunks // 3 + 1)))
    return np.append(inner, chunks).astype(np.int64)
