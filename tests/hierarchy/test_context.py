"""Labels of nodes, and passages of text around the best chunks."""

from __future__ import annotations

import gc
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.small import AWKWARD, QUESTIONS

from treemem.hierarchy import context
from treemem.hierarchy.context import LABEL_WORDS, label, labelled, passages
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.walk import subtree
from treemem.storage.image import Image
from treemem.types import DocumentRef, GatheredLevel, GatheredNode, Hit

PLENTY = 10**9


def words(text: str) -> int:
    return len(text.split())


def hit(image: Image, chunk: int, score: float = 1.0) -> Hit:
    (document,) = image.document_of(np.array([chunk]))
    return Hit(score, image.reference(int(document)), image.span(chunk), image.chunk_text(chunk), (), chunk)


# ---- labels


@pytest.mark.parametrize("level", [2, 3, 4])
def test_labels_are_words_of_the_texts_below(small_memory: Memory, level: int) -> None:
    image = small_memory.image
    for node in range(image.tree.sizes[image.tree.depth - level]):
        own = label(image, level, node).split(", ")
        assert 1 <= len(own) <= LABEL_WORDS
        assert len(set(own)) == len(own)
        below = " ".join(image.chunk_text(int(chunk)) for chunk in subtree(image, level, node)).lower()
        assert set(own) <= set(re.findall(r"[^\W\d_]+", below))


@pytest.mark.parametrize("level", [3, 4])
def test_labels_tell_nodes_apart(small_memory: Memory, level: int) -> None:
    image = small_memory.image
    labels = [set(label(image, level, node).split(", ")) for node in range(image.tree.sizes[image.tree.depth - level])]
    for one, other in itertools.combinations(labels, 2):
        assert len(one & other) <= 2


def test_a_label_says_what_the_node_is_about(small_memory: Memory) -> None:
    """The node above most of the chess documents is labelled by chess, not by the words of all documents."""
    image = small_memory.image
    chess = {c for i in range(5) for c in image.chunks_of(small_memory.image.number_of(f"chess/{i}") or 0)}
    shares = [len(chess & set(subtree(image, 3, node).tolist())) for node in range(image.tree.sizes[1])]
    own = label(image, 3, int(np.argmax(shares)))
    assert set(own.split(", ")) & {"king", "queen", "moves", "pawn", "bishops", "zugzwang", "endgame", "rook", "game"}


def test_large_nodes_are_not_labelled_by_the_commonest_words(small_memory: Memory) -> None:
    for node in range(small_memory.image.tree.sizes[0]):
        own = set(label(small_memory.image, 4, node).split(", "))
        assert not own & {"the", "and", "was", "from", "with", "his", "for", "its", "into"}


def test_labels_are_given_to_the_best_of_each_level(small_memory: Memory) -> None:
    gathered = small_memory.search(QUESTIONS[0], 5, beam=5).gathered
    out = labelled(small_memory.image, gathered, 2)
    assert [level.level for level in out] == [4, 3, 2, 1]
    for before, after in zip(gathered, out, strict=True):
        assert [(n.node, n.score) for n in after.nodes] == [(n.node, n.score) for n in before.nodes]
        has = [bool(node.label) for node in after.nodes]
        assert has == ([False] * len(has) if after.level == 1 else [i < 2 for i in range(len(has))])
    assert labelled(small_memory.image, (), 3) == ()
    nothing = GatheredLevel(2, 65, (GatheredNode(0, 0.5),))
    assert labelled(small_memory.image, [nothing], 0) == (nothing,)


def test_labels_are_made_once_and_kept_while_their_image_is(
    small_memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []

    def counted(image: Image, level: int, node: int) -> str:
        made.append((level, node))
        return f"{level} {node}"

    monkeypatch.setattr(context, "make_label", counted)
    monkeypatch.setattr(context, "LABELS_KEPT", 3)
    image = Image(small_memory.image.folder)
    for node in (0, 1, 0, 2, 1, 3, 0):
        assert label(image, 2, node) == f"2 {node}"
    assert made == [(2, 0), (2, 1), (2, 2), (2, 3), (2, 0)]  # the oldest went for the fourth
    assert label(Image(small_memory.image.folder), 2, 0) == "2 0"
    assert len(made) == 6
    kept = len(context._labels)
    del image
    gc.collect()
    assert len(context._labels) < kept


def test_a_label_looks_at_some_chunks_of_a_large_node(small_memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "LABEL_CHUNKS", 8)
    read: set[int] = set()
    chunk_text = Image.chunk_text
    image = Image(small_memory.image.folder)
    monkeypatch.setattr(Image, "chunk_text", lambda self, chunk: read.add(chunk) or chunk_text(self, chunk))
    assert len(subtree(image, 4, 0)) > 8
    assert label(image, 4, 0)
    assert len(read) <= 8


# ---- passages


def check(image: Image, hits: list[Hit], budget: int, neighbours: int) -> None:
    """What holds of passages whatever the hits are."""
    found = passages(image, hits, words, budget, neighbours)
    assert [passage.number for passage in found] == list(range(1, len(found) + 1))
    runs: dict[str, list[tuple[int, int]]] = {}
    for passage in found:
        number = image.number_of(passage.document.id)
        assert number is not None
        assert image.text(number)[slice(*passage.span)] == passage.text
        assert passage.document == image.reference(number)
        runs.setdefault(passage.document.id, []).append(passage.span)
    for spans in runs.values():
        for one, other in itertools.pairwise(sorted(spans)):
            assert one[1] <= other[0]
    if len(found) > 1:
        assert sum(words(passage.text) for passage in found) <= budget
    if hits:
        best = found[0]
        assert best.document == hits[0].document
        assert best.span[0] <= hits[0].span[0]
        assert hits[0].span[1] <= best.span[1]
        assert best.score == max(h.score for h in hits if _inside(h, best.document, best.span))
    for one in hits:
        shown = [p for p in found if _inside(one, p.document, p.span)]
        assert len(shown) <= 1
        assert all(p.score >= one.score for p in shown)
        if budget == PLENTY:
            assert shown


def _inside(hit: Hit, document: DocumentRef, span: tuple[int, int]) -> bool:
    return hit.document == document and span[0] <= hit.span[0] and hit.span[1] <= span[1]


@given(
    st.lists(st.integers(0, 10**6), unique=True, max_size=25),
    st.one_of(st.just(PLENTY), st.integers(1, 600)),
    st.integers(0, 3),
)
@settings(max_examples=120)
def test_passages_are_disjoint_exact_and_within_the_budget(
    small_memory: Memory, draws: list[int], budget: int, neighbours: int
) -> None:
    image = small_memory.image
    chunks = list(dict.fromkeys(draw % image.chunks for draw in draws))
    hits = [hit(image, chunk, 1 / (rank + 1)) for rank, chunk in enumerate(chunks)]
    check(image, hits, budget, neighbours)


def test_no_hits_no_passages(small_memory: Memory) -> None:
    assert passages(small_memory.image, [], words, 100) == ()


def test_neighbours_stay_in_the_document(small_memory: Memory) -> None:
    image = small_memory.image
    for number in range(image.documents):
        own = image.chunks_of(number)
        (passage,) = passages(image, [hit(image, own.start)], words, PLENTY, neighbours=100)
        assert passage.span == (image.span(own.start)[0], image.span(own.stop - 1)[1])
        assert passage.document.id == image.reference(number).id


def test_neighbours_are_taken_along(small_memory: Memory) -> None:
    image = small_memory.image
    number = image.number_of("awkward/long")
    assert number is not None
    own = image.chunks_of(number)
    assert len(own) >= 6
    middle = own.start + 3
    for neighbours in (0, 1, 2):
        (passage,) = passages(image, [hit(image, middle)], words, PLENTY, neighbours)
        assert passage.text == image.run_text(middle - neighbours, middle + neighbours)


def test_hits_that_touch_are_merged_at_the_place_of_the_best(small_memory: Memory) -> None:
    image = small_memory.image
    number = image.number_of("awkward/long")
    assert number is not None
    first = image.chunks_of(number).start
    other = image.chunks_of(0).start
    hits = [hit(image, first + 4, 0.9), hit(image, other, 0.8), hit(image, first, 0.7), hit(image, first + 2, 0.6)]
    found = passages(image, hits, words, PLENTY, neighbours=0)
    assert len(found) == 4  # apart from one another by a chunk each
    found = passages(image, hits, words, PLENTY, neighbours=1)
    assert [passage.document.id for passage in found] == ["awkward/long", image.reference(0).id]
    assert found[0].text == image.run_text(first, first + 5)
    assert found[0].score == 0.9


def test_the_best_is_kept_though_it_is_too_long(small_memory: Memory) -> None:
    image = small_memory.image
    hits = [hit(image, 0, 0.9), hit(image, image.chunks - 1, 0.8)]
    found = passages(image, hits, words, 1, neighbours=1)
    assert len(found) == 1
    assert found[0].document.id == hits[0].document.id


def test_a_shorter_one_may_come_after_one_that_did_not_fit(small_memory: Memory) -> None:
    image = small_memory.image
    long, short = image.number_of("awkward/long"), image.number_of("awkward/twin-1")
    assert long is not None
    assert short is not None
    hits = [hit(image, c) for c in (0, image.chunks_of(long).start + 1, image.chunks_of(short).start)]
    room = words(passages(image, hits[:1], words, PLENTY)[0].text) + words(AWKWARD[2].text)
    found = passages(image, hits, words, room)
    assert [passage.document.id for passage in found] == [hits[0].document.id, "awkward/twin-1"]
