"""How much of the words below each node a walk by both signals needs: levels without any, and terms left out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from common import RESULTS, arguments, hits, percentiles, save

from treemem import Memory
from treemem.config import SearchConfig
from treemem.evaluation import load_set
from treemem.hierarchy.walk import Searcher
from treemem.kernels import LexicalIndex, ServingTree, Signatures, back_end
from treemem.storage.signatures import kept_terms

# Development questions; those of scifact's train split, which has no other.
SETS = (("fairytaleqa", "dev"), ("scifact", "train"), ("medquad", "dev"), ("wiki_multi", "dev,train"))
SHARES = (0.5, 0.25)
"""How many of the nodes' entries are kept, of all levels."""
LEAST = (0.3, 0.4, 0.5, 0.6, 0.7)
"""How much of the largest idf a term must be worth to be kept from level 3 up."""
TERMS = (1024, 512, 256)
"""How many terms a node keeps from level 3 up."""
Kept = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""What is kept of the terms of nodes: offsets, terms and shares give the same of what is kept."""


def best(most: int, worth_of: np.ndarray, offsets: np.ndarray, terms: np.ndarray, shares: np.ndarray) -> Any:
    """Of each node the `most` terms with the largest `worth * share`."""
    counts = np.diff(offsets)
    order = np.lexsort((-worth_of[terms] * shares, np.repeat(np.arange(len(counts)), counts)))
    kept = np.sort(order[np.arange(len(terms)) - np.repeat(offsets[:-1], counts) < most])
    return np.concatenate([[0], np.cumsum(np.minimum(counts, most))]), terms[kept], shares[kept]


def made(tree: ServingTree, index: LexicalIndex, kept: Kept | None = None) -> tuple[Signatures, ...]:
    """The signatures of all levels, top first; from level 3 up of the terms that are kept."""
    offsets, terms = np.asarray(index.offsets), np.asarray(index.terms)
    counts = np.asarray(index.counts).astype(np.float32)
    norms = np.repeat(index.norms, np.diff(offsets))
    shares = np.ceil(255 * (counts / (counts + norms))).clip(1, 255).astype(np.uint8)
    values = np.minimum(counts, 255).astype(np.uint8)
    out: list[Signatures] = []
    for blocks in tree.levels[::-1]:
        own, largest = back_end().signatures(blocks.offsets, blocks.ids, offsets, terms, shares, values)
        offsets, terms, shares = own.offsets, own.terms, largest
        if kept is not None and out:
            offsets, terms, shares = kept(offsets, terms, shares)
        values = shares
        out.insert(0, own)
    return tuple(out)


def entries(own: Signatures) -> tuple[np.ndarray, np.ndarray]:
    """Of each entry the place of its term, and the parent."""
    parents = np.repeat(np.arange(len(own.offsets) - 1), np.diff(own.offsets))
    begins = own.bases[parents] + own.starts
    terms = np.repeat(np.arange(len(own.terms)), np.diff(np.append(begins, len(own.slots))))
    return terms, parents[terms]


def only(own: Signatures, chosen: np.ndarray) -> Signatures:
    """Signatures with these entries alone; `chosen` is bool [entries]."""
    terms, parents = entries(own)
    counts = np.bincount(terms[chosen], minlength=len(own.terms))
    there = counts > 0
    offsets = np.concatenate([[0], np.cumsum(there)])[own.offsets]
    bases = np.concatenate([[0], np.cumsum(np.bincount(parents[chosen], minlength=len(own.bases) - 1))])
    begins = np.concatenate([[0], np.cumsum(counts[there])])[:-1]
    starts = (begins - np.repeat(bases[:-1], np.diff(offsets))).astype(own.starts.dtype)
    return Signatures(offsets, own.terms[there], bases, starts, own.slots[chosen], own.values[chosen])


def worth(own: Signatures, children: np.ndarray, idf: np.ndarray) -> dict[str, np.ndarray]:
    """What each entry of a level of nodes may be worth, by several measures; `children`: int64 [parents]."""
    terms, parents = entries(own)
    shares, rarity = own.values / 255, idf[own.terms[terms]]
    n = children[parents]
    sums, squares = (np.bincount(terms, part, len(own.terms))[terms] for part in (shares, shares**2))
    return {
        "impact": shares,
        "idf": rarity + 1e-3 * shares,
        "idf x share": rarity * shares,
        # Of the block's children: what stands under all of them in equal measure does not tell them apart.
        "idf x deviation of the block": rarity * np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0)),
        "idf x difference from the block's mean": rarity * np.abs(shares - sums / n),
    }


def variants(tree: ServingTree, index: LexicalIndex, idf: np.ndarray) -> Iterator[tuple[str, tuple[Signatures, ...]]]:
    """Signatures of all levels, by what is left out."""
    full = made(tree, index)
    yield "all levels", full
    none = tuple(only(own, np.zeros(len(own.slots), bool)) for own in full)
    yield "chunks and level 2", none[:-2] + full[-2:]
    yield "chunks", none[:-1] + full[-1:]
    for least in LEAST:
        yield (
            f"idf x share of {least} and more from level 3 up",
            made(tree, index, partial(kept_terms, idf=idf, least=least)),
        )
    for most in TERMS:
        yield f"{most} terms a node from level 3 up, by idf x share", made(tree, index, partial(best, most, idf))
    yield "256 terms a node from level 3 up, by impact", made(tree, index, partial(best, 256, np.ones_like(idf)))
    worths = [worth(own, np.diff(blocks.offsets), idf) for own, blocks in zip(full[:-1], tree.levels[:-1], strict=True)]
    for share in SHARES:
        for measure in worths[0]:
            pruned = []
            for own, values in zip(full[:-1], worths, strict=True):
                chosen = np.zeros(len(own.slots), bool)
                chosen[np.argsort(-values[measure], kind="stable")[: round(share * len(own.slots))]] = True
                pruned.append(only(own, chosen))
            yield f"{share:g} of the nodes' entries, by {measure}", (*pruned, full[-1])


def main() -> None:
    """Search for every question with each variant, one right after the other, in an untrained tree."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--ways", default="", help="only variants with this in their name, the others stay")
    parser.add_argument("--most", type=int, default=1000, help="questions of a set")
    options = parser.parse_args()
    path = RESULTS / "pruning.json"
    found: dict[str, Any] = json.loads(path.read_text())["sets"] if path.exists() else {}
    for name, split in SETS:
        place = options.memories / name
        if not place.exists() or (options.sets and name not in options.sets):
            continue
        memory = Memory.open(place)
        image = memory.image
        searcher = Searcher(image, memory.searcher.encoder, memory.config.chunk_tokens, memory.config.language)
        queries = load_set(options.data / name, split=split).sample(options.most, options.seed).queries
        embedded = searcher.embed([query.text for query in queries])
        idf = image.lexical.idf(np.arange(len(image.lexical.frequencies), dtype=np.int32))
        config = SearchConfig(lexical="signatures")
        rows: dict[str, Any] = found.get(name, {}).get("variants", {})
        for way, signatures in variants(image.tree, image.lexical.index, idf):
            if options.ways not in way:
                continue
            image.signatures = signatures
            searcher.rank(embedded[0], config)
            seconds, ranked, scored = [], [], 0
            for query in embedded:
                start = time.perf_counter()
                got = searcher.rank(query, config)
                seconds.append(time.perf_counter() - start)
                ranked.append(got.chunks[:10])
                scored += got.scored
            size = [sum(getattr(own, f).nbytes for f in vars(own)) for own in signatures]
            rows[way] = {
                **hits(memory, queries, ranked),
                **percentiles(seconds),
                "scored": round(scored / len(queries), 1),
                "bytes": size,
                "entries": [len(own.slots) for own in signatures],
            }
            print(name, way, rows[way], flush=True)
        oracle = [searcher.rank(query, SearchConfig("exact+bm25")).chunks[:10] for query in embedded]
        found[name] = {
            "split": split,
            "questions": len(queries),
            "levels": list(image.tree.sizes),
            "exact+bm25": hits(memory, queries, oracle),
            "variants": rows,
        }
        save("pruning", {"sets": found}, options)


if __name__ == "__main__":
    main()
