"""How well nodes' labels tell nodes apart: a label, searched for like a question, should lead back to its node."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from common import arguments, save

from treemem import Memory
from treemem.hierarchy.context import make_label, relative_entropy

SETS = ("fairytaleqa", "scifact", "medquad")


def class_based_tf_idf(shares: np.ndarray, overall: np.ndarray, *, per_node: float) -> np.ndarray:
    """Class-based TF-IDF (Grootendorst 2022) with nodes as classes, on shares of chunks that hold a term.

    It weighs a term by `tf * log(1 + A / f)`: `f` its occurrences in all classes, `A` all occurrences of all terms over
    the number of classes. Here both are divided by the number of chunks, so `per_node` is terms a chunk over nodes.
    """
    return shares * np.log1p(per_node / overall)


def led_back(memory: Memory, level: int, weigh: Callable[..., np.ndarray], most: int, seed: int) -> dict[str, float]:
    """Whether the label of a node, as a query vector, is nearer to the node than to any other of its level."""
    stored = memory.store.levels()[level - 2].vectors.astype(np.float32)
    nodes = np.sort(np.random.default_rng(seed).permutation(len(stored))[:most])
    labels = [make_label(memory.image, level, int(node), weigh) for node in nodes]
    scores = memory.encoder.encode(labels, precise=True) @ memory.image.query_map.T @ stored.T
    ranks = 1 + (scores > scores[np.arange(len(nodes)), nodes][:, None]).sum(1)
    return {
        "nodes": len(stored),
        "labels": len(nodes),
        "different": len(set(labels)),
        "first": round(float((ranks == 1).mean()), 3),
        "mean reciprocal rank": round(float((1 / ranks).mean()), 3),
    }


def main() -> None:
    """Label every level of the memories that are there, in both ways."""
    parser = arguments(__doc__)
    parser.add_argument("--nodes", type=int, default=300, help="at most so many of a level")
    options = parser.parse_args()
    sets: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name in SETS:
        if not (options.memories / name).exists():
            continue
        memory = Memory.open(options.memories / name)
        sets[name] = {}
        for level in range(2, len(memory.image.tree.sizes) + 1):
            per_node = len(memory.image.lexical.index.terms) / memory.image.chunks / memory.image.tree.sizes[-level]
            ways = {"relative entropy": relative_entropy, "c-TF-IDF": partial(class_based_tf_idf, per_node=per_node)}
            sets[name][f"level {level}"] = {
                way: led_back(memory, level, weigh, options.nodes, options.seed) for way, weigh in ways.items()
            }
            print(name, level, sets[name][f"level {level}"], flush=True)
    save("labels", {"sets": sets}, options)


if __name__ == "__main__":
    main()
