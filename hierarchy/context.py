"""What a walk gathered, made readable: labels of nodes, and passages of text around the best chunks."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8

from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.prompt import content_words
from treemem.hierarchy.walk import below, subtree
from treemem.storage.image import Image
from treemem.storage.levels import unit
from treemem.types import GatheredLevel, GatheredNode, Hit, Passage

LABEL_WORDS = 5
LABEL_CHUNKS = 2000
"""At most so many chunks, evenly spaced, are looked at for a label."""
LABELS_KEPT = 10_000
"""How many labels of an image are kept for the next question."""
_WORD = re.compile(r"[^\W\d_]{3,}")
_LOOKED_AT = 4
"""In how many chunks the written form of a stem is looked for."""
_labels: WeakKeyDictionary[Image, dict[tuple[int, int], str]] = WeakKeyDictionary()
_labels_lock = threading.Lock()


def label(image: Image, level: int, node: int, allowed: UInt8[np.ndarray, " chunks"] | None = None) -> str:
    """The most telling words of the chunks below a node of level 2 or higher; made once, then kept while it is used.

    `allowed`: which chunks they may come from; by default all that are not hidden.
    """
    if allowed is not None:
        return make_label(image, level, node, allowed=allowed)
    with _labels_lock:
        known = _labels.setdefault(image, {})
        if (level, node) in known:
            return known[level, node]
    made = make_label(image, level, node)
    with _labels_lock:
        known[level, node] = made
        while len(known) > LABELS_KEPT:
            del known[next(iter(known))]
    return made


def relative_entropy(
    shares: Float64[np.ndarray, " t"], overall: Float64[np.ndarray, " t"]
) -> Float64[np.ndarray, " t"]:
    """How much terms tell of a node: their parts in the relative entropy of node and memory.

    That is a term's share inside, times the logarithm of how many times its share in the whole memory that is (Tomokiyo
    and Hurst 2003, section 3.1). `benchmarks/labels.py` has it beside class-based TF-IDF.

    Args:
        shares: of the node's chunks, those that hold a term.
        overall: of all chunks, those that hold it.
    """
    return shares * np.log(shares / overall)


def make_label(
    image: Image,
    level: int,
    node: int,
    weigh: Callable[..., np.ndarray] = relative_entropy,
    allowed: UInt8[np.ndarray, " chunks"] | None = None,
) -> str:
    """The words that tell most of the chunks below a node, by a weight of terms as `relative_entropy`."""
    index = image.lexical.index
    chunks = subtree(image, level, node, allowed)
    if len(chunks) > LABEL_CHUNKS:
        chunks = chunks[np.linspace(0, len(chunks) - 1, LABEL_CHUNKS).astype(np.int64)]
    if len(chunks) == 0:
        return ""
    begins, lengths = index.offsets[chunks], index.offsets[chunks + 1] - index.offsets[chunks]
    holders = np.repeat(chunks, lengths)
    entries = index.terms[np.arange(len(holders)) + np.repeat(begins - np.cumsum(lengths) + lengths, lengths)]
    terms, counts = np.unique(entries, return_counts=True)
    weights = weigh(counts / len(chunks), image.lexical.frequencies[terms] / image.chunks)
    words: list[str] = []
    for place in np.argsort(-weights, kind="stable")[: 4 * LABEL_WORDS]:
        term = terms[place]
        written = _written(image, int(term), holders[entries == term][:_LOOKED_AT])
        if content_words(written) and written not in words:
            words.append(written)
        if len(words) == LABEL_WORDS:
            break
    return ", ".join(words)


def _written(image: Image, term: int, chunks: np.ndarray) -> str:
    """The commonest written form of a stemmed term in chunks that hold it; empty for numbers."""
    forms: Counter[str] = Counter()
    for chunk in chunks:
        words = _WORD.findall(image.chunk_text(int(chunk)))
        stems = [image.lexical.analyze(word) for word in words]
        numbers = image.lexical.numbers([stem[0] if len(stem) == 1 else "" for stem in stems])
        forms.update(word.lower() for word, number in zip(words, numbers, strict=True) if number == term)
    return min(forms, key=lambda form: (-forms[form], form)) if forms else ""


def labelled(
    image: Image,
    gathered: Sequence[GatheredLevel],
    most: int,
    allowed: UInt8[np.ndarray, " chunks"] | None = None,
) -> tuple[GatheredLevel, ...]:
    """The gathered levels of nodes with labels on the best `most` of each; the chunks' level is left as it is."""
    out = []
    for level in gathered:
        if level.level == 1:
            out.append(level)
            continue
        nodes = tuple(
            GatheredNode(node.node, node.score, label(image, level.level, node.node, allowed)) if i < most else node
            for i, node in enumerate(level.nodes)
        )
        out.append(replace(level, nodes=nodes))
    return tuple(out)


def passages(
    image: Image, hits: Sequence[Hit], count_tokens: Callable[[str], int], budget_tokens: int, neighbours: int = 1
) -> tuple[Passage, ...]:
    """Merge the best chunks with their neighbours in the document into passages, best first.

    Args:
        image: the searched snapshot.
        hits: best first.
        count_tokens: length of a text in tokens of the model that is to read it.
        budget_tokens: what all passages together may take; what does not fit any more is left out, the best is kept.
        neighbours: how many chunks before and after a hit are taken along.

    Returns:
        Passages numbered from 1, each a run of one document's text, disjoint, with the score of its best hit.
    """
    runs: list[tuple[int, int, int, float]] = []  # document, first chunk, last chunk, score
    spent = 0
    for hit in hits:
        document = int(image.document_of(np.array(hit.chunk)))
        own = image.chunks_of(document)
        first, last = max(hit.chunk - neighbours, own.start), min(hit.chunk + neighbours, own.stop - 1)
        merged = [run for run in runs if run[0] == document and run[1] <= last + 1 and first <= run[2] + 1]
        for run in merged:
            first, last = min(first, run[1]), max(last, run[2])
        cost = count_tokens(image.run_text(first, last))
        saved = sum(count_tokens(image.run_text(run[1], run[2])) for run in merged)
        if runs and spent + cost - saved > budget_tokens:
            continue
        spent += cost - saved
        score = max([hit.score, *(run[3] for run in merged)])
        place = min((runs.index(run) for run in merged), default=len(runs))
        runs = [run for run in runs if run not in merged]
        runs.insert(place, (document, first, last, score))
    return tuple(
        Passage(
            number,
            image.reference(document),
            (image.span(first)[0], image.span(last)[1]),
            image.run_text(first, last),
            score,
        )
        for number, (document, first, last, score) in enumerate(runs, 1)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a walk gathered, as vectors


@dataclass(frozen=True)
class PassageText:
    """What of a passage a model is shown."""

    title: str
    text: str


@dataclass(frozen=True)
class GatheredVectors:
    """Embeddings of all levels that one walk met, coarse to fine, best first in each level.

    The best chunks come last, each as the vectors of its windows of tokens (level 0).
    """

    vectors: Float32[np.ndarray, "n d"]
    levels: Int64[np.ndarray, " n"]
    """0 for windows of a chunk's tokens, 1 for chunks, from 2 on for nodes."""
    elements: Int64[np.ndarray, " n"]
    """Numbers of the nodes, or of the chunks."""
    places: Int64[np.ndarray, " n"]
    """Which window of its chunk; 0 for others."""
    ranks: Int64[np.ndarray, " n"]
    """Of the node or chunk in what was gathered of its level."""
    scores: Float32[np.ndarray, " n"]
    """Of the walk."""

    def __len__(self) -> int:
        return len(self.levels)


def gather_vectors(
    image: Image,
    encoder: Encoder,
    gathered: Sequence[GatheredLevel],
    hits: Sequence[Hit],
    shape: tuple[int, int, int],
    stored: Callable[[Sequence[int]], Sequence[np.ndarray] | None] | None = None,
    allowed: UInt8[np.ndarray, " chunks"] | None = None,
    score: Callable[[int, np.ndarray], float] | None = None,
) -> GatheredVectors:
    """The embeddings that a language model is given of what a walk gathered.

    Nothing in them comes from masked or removed documents, or from others than those that the search was restricted to:
    a node that has such chunks below it is given as the mean of the rest, with that vector's own score, and in its
    order.

    Args:
        image: the searched snapshot.
        encoder: of the memory; reads the chunks' text for the vectors of their windows.
        gathered: what the search kept of each level.
        hits: its best chunks, best first.
        shape: how many nodes of each upper level are given; how many of the best chunks, window by window; how many
            chunks after them, as their one vector.
        stored: gives the vectors of chunks' windows where they are kept, so that no text is encoded.
        allowed: which chunks the search was restricted to.
        score: of a level and a node's vector, see `Searcher.node_scorer`. Where something is hidden, nodes are scored
            anew with it; without it they keep the walk's scores and order, of which hidden chunks have a part.
    """
    nodes, chunks, more = shape
    anew = score if image.hidden or allowed is not None else None
    parts: list[tuple[np.ndarray, int, int, int, int, float]] = []
    for level in sorted(gathered, key=lambda level: -level.level):
        kept: list[tuple[float, int, np.ndarray]] = []
        for node in level.nodes[:nodes] if level.level > 1 else ():
            vector = _node_vector(image, level.level, node.node, allowed)
            if vector is not None:
                kept.append((node.score if anew is None else anew(level.level, vector), node.node, vector))
        if anew is not None:
            kept.sort(key=lambda own: (-own[0], own[1]))
        parts += [(vector, level.level, node, 0, rank, own) for rank, (own, node, vector) in enumerate(kept)]
    blocks = image.tree.levels[-1]
    for rank, hit in enumerate(hits[chunks : chunks + more], chunks):
        parts.append((blocks.rows[hit.chunk] * np.float32(blocks.scales[hit.chunk]), 1, hit.chunk, 0, rank, hit.score))
    windows = None if stored is None else stored([hit.chunk for hit in hits[:chunks]])
    if windows is None:
        windows = encoder.reader_vectors([hit.text for hit in hits[:chunks]])
    for rank, (hit, vectors) in enumerate(zip(hits[:chunks], windows, strict=True)):
        parts += [(vector, 0, hit.chunk, place, rank, hit.score) for place, vector in enumerate(vectors)]
    return joined(parts, encoder.dimension)


def joined(parts: Sequence[tuple[np.ndarray, int, int, int, int, float]], dimension: int) -> GatheredVectors:
    """Gathered vectors from their parts: each a vector, its level, element, place, rank and score."""
    vectors = np.array([part[0] for part in parts], np.float32).reshape(len(parts), dimension)
    levels, elements, places, ranks = (np.array([part[i] for part in parts], np.int64) for i in range(1, 5))
    return GatheredVectors(vectors, levels, elements, places, ranks, np.array([part[5] for part in parts], np.float32))


def _node_vector(
    image: Image, level: int, node: int, allowed: UInt8[np.ndarray, " chunks"] | None
) -> np.ndarray | None:
    """The vector of a node, without what is hidden below it; None where all of it is."""
    if image.hidden or allowed is not None:
        chunks = subtree(image, level, node, allowed)
        if len(chunks) == 0:
            return None
        if len(chunks) < len(below(image, level, node)):
            blocks = image.tree.levels[-1]
            return unit((blocks.rows[chunks] * blocks.scales[chunks, None]).sum(0, keepdims=True))[0]
    return image.node_vectors(level)[image.places(level)[node]].astype(np.float32)
