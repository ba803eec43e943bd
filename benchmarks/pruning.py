"""How much of the words below each node a walk by both signals needs: levels without any, and terms left out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from common import RESULTS, arguments, asked, hits, percentiles, save

from treemem.config import SearchConfig
from treemem.kernels import LexicalIndex, ServingTree, Signatures, back_end
from treemem.storage.signatures import NODE_SHARE, kept_terms

# Development questions; those of scifact's train split, which has no other.
SETS = (("fairytaleqa", "dev"), ("scifact", "train"), ("medquad", "dev"), ("wiki_multi", "dev,train"))
SHARES = (0.5, 0.25)
"""How many of the nodes' entries are kept, of all levels."""
MEASURES = (
    "impact",
    "idf",
    "idf x share",
    "idf x deviation of the block",
    "idf x difference from the block's mean",
)
LEAST = (0.3, 0.4, 0.5, 0.6, 0.7)
"""How much of the largest idf a term must be worth to be kept from level 3 up."""
TERMS = (1024, 512, 256)
"""How many terms a node keeps from level 3 up."""
INDEX = "none: a walk by vectors, then the inverted index"
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
    deviation = np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0))  # 0: it does not tell the children apart
    values = shares, rarity + 1e-3 * shares, rarity * shares, rarity * deviation, rarity * np.abs(shares - sums / n)
    return dict(zip(MEASURES, values, strict=True))


def fewer(
    tree: ServingTree, full: tuple[Signatures, ...], idf: np.ndarray, share: float, measure: str
) -> tuple[Signatures, ...]:
    """Of each level of nodes this share of the entries, those that are worth most."""
    out = []
    for own, blocks in zip(full[:-1], tree.levels[:-1], strict=True):
        values = worth(own, np.diff(blocks.offsets), idf)[measure]
        chosen = np.zeros(len(own.slots), bool)
        chosen[np.argsort(-values, kind="stable")[: round(share * len(own.slots))]] = True
        out.append(only(own, chosen))
    return (*out, full[-1])


def variants(
    tree: ServingTree, index: LexicalIndex, idf: np.ndarray
) -> Iterator[tuple[str, Callable[[], tuple[Signatures, ...]]]]:
    """What makes the signatures of all levels, by what is left out; a beam other than 32 is named at the end."""
    full = made(tree, index)
    yield INDEX, lambda: full
    none = tuple(only(own, np.zeros(len(own.slots), bool)) for own in full)
    yield "all levels", lambda: full
    yield "chunks and level 2", lambda: none[:-2] + full[-2:]
    yield "chunks", lambda: none[:-1] + full[-1:]
    for least in LEAST:
        kept = partial(kept_terms, idf=idf, least=least)
        for beam in ("", ", beam 48", ", beam 64") if least == NODE_SHARE else ("",):
            yield f"idf x share of {least} and more from level 3 up{beam}", partial(made, tree, index, kept)
    for most in TERMS:
        yield (
            f"{most} terms a node from level 3 up, by idf x share",
            partial(made, tree, index, partial(best, most, idf)),
        )
    by_impact = partial(best, 256, np.ones_like(idf))
    yield "256 terms a node from level 3 up, by impact", partial(made, tree, index, by_impact)
    for share in SHARES:
        for measure in MEASURES:
            yield f"{share:g} of the nodes' entries, by {measure}", partial(fewer, tree, full, idf, share, measure)


def main() -> None:
    """Search for every question with each variant, one right after the other, in an untrained tree."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--ways", nargs="*", help="only variants with one of these in their name; others stay")
    parser.add_argument("--most", type=int, default=1000, help="questions of a set")
    options = parser.parse_args()
    path = RESULTS / "pruning.json"
    found: dict[str, Any] = json.loads(path.read_text())["sets"] if path.exists() else {}
    for own_set in asked(options, SETS):
        name, split, memory = own_set.name, own_set.split, own_set.memory
        searcher, queries, embedded = own_set.searcher, own_set.queries, own_set.embedded
        image, idf = memory.image, memory.image.lexical.all_idf()
        rows: dict[str, Any] = found.get(name, {}).get("variants", {})
        for way, make in variants(image.tree, image.lexical.index, idf):
            if options.ways and not any(part in way for part in options.ways):
                continue
            image.signatures = signatures = make()
            beam = int(way.rpartition("beam ")[2]) if "beam" in way else SearchConfig.beam
            config = SearchConfig(lexical="index" if way == INDEX else "signatures", beam=beam)
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
        known = found.get(name, {})
        oracle = known.get("exact+bm25") if known.get("questions") == len(queries) else None
        if oracle is None:
            every = [searcher.rank(query, SearchConfig("exact+bm25")).chunks[:10] for query in embedded]
            oracle = hits(memory, queries, every)
        found[name] = {
            "split": split,
            "questions": len(queries),
            "levels": list(image.tree.sizes),
            "exact+bm25": oracle,
            "variants": rows,
        }
        save("pruning", {"sets": found}, options)


if __name__ == "__main__":
    main()
