"""Growing: every element seated, no node over its capacity, stable, the same for a seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treemem.hierarchy import grow as growing
from treemem.hierarchy.grow import SLACK, grow
from treemem.kernels import LevelBlocks, ServingTree, quantise, upper_halves
from treemem.kernels.reference import exact, search
from treemem.storage.levels import Level, as_float32, node_vectors, unit


def clustered(n: int, dimension: int = 24, seed: int = 0) -> np.ndarray:
    """Unit vectors around some centres, as the chunks of a corpus lie."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((max(1, n // 40), dimension))
    own = centres[generator.integers(0, len(centres), n)] + 0.6 * generator.standard_normal((n, dimension))
    return unit(own).astype(np.float16)


def check(levels: list[Level], vectors: np.ndarray, fanout: int, spill: int) -> None:
    """All that a tree promises, whatever the vectors."""
    below = vectors
    for number, level in enumerate(levels):
        copies = spill if number == 0 else 1
        counts = np.diff(level.offsets)
        assert level.offsets[0] == 0
        assert level.offsets[-1] == len(level.children)
        assert counts.min() >= 1, "an empty node"
        assert counts.max() <= fanout, "a node over its capacity"
        times = np.bincount(level.children, minlength=len(below))
        assert len(times) == len(below)
        assert times.min() >= 1, "an element that stands nowhere"
        assert times.max() <= copies
        for node in range(len(counts)):
            own = level.children[level.offsets[node] : level.offsets[node + 1]]
            assert (np.diff(own) > 0).all(), "children are not in order, or one stands twice under a node"
        if number:
            assert (np.diff(level.children) == 1).all(), "nodes are not numbered parent by parent"
        assert len(counts) <= max(2, round(SLACK * len(below) * copies / fanout))
        assert len(counts) * fanout >= len(below)
        expected = node_vectors(below, level.offsets, level.children)
        assert expected.tobytes() == level.vectors.tobytes()
        below = level.vectors
    assert len(below) <= 2 * fanout, "the top is too large"


def serving_tree(vectors: np.ndarray, levels: list[Level]) -> ServingTree:
    blocks: list[LevelBlocks] = []
    below = [vectors, *(level.vectors for level in levels)]
    for number, elements in enumerate(below):
        if number < len(levels):
            offsets, ids = levels[number].offsets, levels[number].children
        else:
            offsets, ids = np.array([0, len(elements)], np.int64), np.arange(len(elements), dtype=np.int32)
        rows, scales = quantise(as_float32(elements))
        blocks.insert(0, LevelBlocks(rows, scales, upper_halves(rows[ids]), scales[ids], ids, offsets))
    tree = ServingTree(tuple(blocks), tuple(len(e) for e in below[::-1]))
    tree.check()
    return tree


def walk_recall(vectors: np.ndarray, levels: list[Level], beam: int) -> float:
    """Share of the exact top 10 that a walk meets, over queries near random elements."""
    tree = serving_tree(vectors, levels)
    generator = np.random.default_rng(9)
    near = as_float32(vectors[generator.integers(0, len(vectors), 60)])
    queries = unit(near + 0.1 * generator.standard_normal(near.shape).astype(np.float32)).astype(np.float32)
    levelled = np.broadcast_to(queries[None, :, None], (tree.depth, len(queries), 1, queries.shape[1]))
    found = search(tree, np.ascontiguousarray(levelled), beam, 10).chunks
    best = exact(tree, queries[:, None], 10)[0]
    return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, best, strict=True)]))


@given(
    n=st.integers(0, 700),
    fanout=st.integers(2, 12),
    spill=st.integers(1, 8),
    seed=st.integers(0, 3),
    same=st.booleans(),
)
@settings(max_examples=60)
def test_any_tree_keeps_its_promises(n: int, fanout: int, spill: int, seed: int, same: bool) -> None:
    vectors = clustered(n, 8, seed)
    if same and n:  # many equal vectors among others
        vectors[: n // 2] = vectors[0]
    check(grow(vectors, fanout, spill, seed), vectors, fanout, spill)


@pytest.mark.parametrize(("n", "levels"), [(0, 0), (1, 0), (2, 0), (64, 0), (65, 1)])
def test_few_chunks_are_their_own_top(n: int, levels: int) -> None:
    vectors = clustered(n)
    grown = grow(vectors, 32, 2, 0)
    assert len(grown) == levels
    check(grown, vectors, 32, 2)


def test_sizes_follow_the_design() -> None:
    vectors = clustered(5000)
    levels = grow(vectors, 16, 2, 0)
    sizes = [len(level.vectors) for level in levels]
    # 1.25 * n * spill / fanout nodes, less those that no element came to.
    for size, below, copies in zip(sizes, [5000, *sizes], [2, 1, 1, 1], strict=False):
        asked = SLACK * below * copies / 16
        assert 0.9 * asked <= size <= asked + 1
    assert len(sizes) == 3


def test_spill_seats_most_chunks_twice() -> None:
    vectors = clustered(3000)
    times = np.bincount(grow(vectors, 16, 2, 0)[0].children)
    assert times.mean() > 1.9
    assert np.bincount(grow(vectors, 16, 1, 0)[0].children).max() == 1


def test_the_same_seed_gives_the_same_tree() -> None:
    vectors = clustered(2000)
    first, second, other = (grow(vectors, 8, 2, seed) for seed in (5, 5, 6))
    for a, b in zip(first, second, strict=True):
        assert a.children.tobytes() == b.children.tobytes()
        assert a.offsets.tobytes() == b.offsets.tobytes()
        assert a.vectors.tobytes() == b.vectors.tobytes()
    assert first[0].children.tobytes() != other[0].children.tobytes()


def test_memory_mapped_vectors_give_the_same_tree(tmp_path: object) -> None:
    vectors = clustered(1500)
    np.save(f"{tmp_path}/v.npy", vectors)
    mapped = np.load(f"{tmp_path}/v.npy", mmap_mode="r")
    for a, b in zip(grow(vectors, 8, 2, 0), grow(mapped, 8, 2, 0), strict=True):
        assert a.children.tobytes() == b.children.tobytes()


@pytest.mark.parametrize("kind", ["equal", "zero", "two"])
def test_degenerate_vectors(kind: str) -> None:
    vectors = np.zeros((3000, 8), np.float16)
    if kind != "zero":
        vectors[:, 0] = 1
    if kind == "two":
        vectors[::2] = 0
        vectors[::2, 1] = 1
    check(grow(vectors, 8, 2, 0), vectors, 8, 2)


def test_two_stages_give_a_tree_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(8000, 32)
    one = grow(vectors, 16, 2, 0)
    monkeypatch.setattr(growing, "TWO_STAGE_NODES", 64)
    two = grow(vectors, 16, 2, 0)
    check(two, vectors, 16, 2)
    assert two[0].children.tobytes() != one[0].children.tobytes(), "the second way was not taken"
    recalls = walk_recall(vectors, one, 8), walk_recall(vectors, two, 8)
    assert recalls[0] > 0.9
    assert recalls[1] > recalls[0] - 0.03


@given(n=st.integers(20, 400), seed=st.integers(0, 5), kind=st.sampled_from(["clustered", "equal", "half zero"]))
@settings(max_examples=30)
def test_two_stages_keep_the_promises(n: int, seed: int, kind: str) -> None:
    vectors = clustered(n, 6, seed)
    if kind == "equal":
        vectors[:] = vectors[0]
    if kind == "half zero":
        vectors[::2] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growing, "TWO_STAGE_NODES", 4)
        check(grow(vectors, 4, 1, seed), vectors, 4, 1)


def test_the_walk_finds_what_exact_search_finds() -> None:
    vectors = clustered(4000, 32)
    assert walk_recall(vectors, grow(vectors, 16, 2, 0), 16) > 0.95


def test_many_leftovers_are_seated_in_the_nearest_node_with_room() -> None:
    centres = unit(np.random.default_rng(0).standard_normal((40, 6))).astype(np.float32)
    below = np.tile(centres[3], (70, 1)).astype(np.float16)
    seats = np.full((40, 2), -1, np.int32)
    growing._seat_the_rest(seats, below, centres)
    assert sorted(seats[seats >= 0].tolist()) == list(range(70))
    # First come, first served: the nearest node holds the first two, the next nearest the next two, …
    order = np.argsort(-(centres @ centres[3]), kind="stable")
    assert seats[order[0]].tolist() == [0, 1]
    assert seats[order[1]].tolist() == [2, 3]
    assert (seats[order[35:]] == -1).all()


@given(rows=st.integers(0, 5), columns=st.integers(1, 40), wanted=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_best_columns_are_those_of_a_stable_sort(rows: int, columns: int, wanted: int, seed: int) -> None:
    wanted = min(wanted, columns)
    # Coarse scores, so that many tie.
    scores = np.random.default_rng(seed).integers(0, 6, (rows, columns)).astype(np.float32)
    ids = np.full((rows, wanted), -1, np.int32)
    growing._best(scores, ids)
    assert np.array_equal(ids, np.argsort(-scores, axis=1, kind="stable")[:, :wanted])


def test_kmeans_moves_centres_to_the_means_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "ITERATIONS", 1)
    monkeypatch.setattr(growing, "BLOCK", 64)
    rows = as_float32(clustered(300))
    chosen = np.sort(np.random.default_rng(3).choice(300, 20, replace=False))
    owners = growing._nearest(rows, rows[chosen], 1)[0][:, 0]
    order, counts = np.argsort(owners, kind="stable").astype(np.int32), np.bincount(owners, minlength=20)
    expected = node_vectors(rows, np.concatenate([[0], np.cumsum(counts)]), order)
    centres = growing.kmeans(rows, 20, np.random.default_rng(3))
    assert np.array_equal(centres, as_float32(expected))


@given(data=st.data())
@settings(max_examples=150)
def test_seats_are_a_stable_matching(data: st.DataObject) -> None:
    n, nodes = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 8))
    width, capacity = data.draw(st.integers(1, nodes)), data.draw(st.integers(1, 4))
    generator = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    # Coarse similarities, so that many tie.
    scores = generator.integers(0, 4, (n, nodes)).astype(np.float32)
    candidates = np.argsort(-scores, axis=1, kind="stable")[:, :width].astype(np.int32)
    similarities = np.take_along_axis(scores, candidates, 1)
    if width > 1:  # as two-stage growing gives them where cells have few nodes
        cut = generator.random(n) < 0.3
        candidates[cut, -1], similarities[cut, -1] = -1, -np.inf
    room = generator.integers(0, capacity + 1, nodes)
    seats = growing._seat(candidates, similarities, room)
    holders = [set(row[row >= 0].tolist()) for row in seats]
    assert sum(map(len, holders)) == int((seats >= 0).sum()), "an element sits twice in one node"
    for row in range(n):
        mine = [place for place, node in enumerate(candidates[row]) if node >= 0 and row in holders[node]]
        assert len(mine) <= 1
        for place, node in enumerate(candidates[row]):
            if node < 0 or row in holders[node]:
                continue
            wanted = not mine or place < mine[0]
            value = similarities[row, place]
            taken = [(scores[other, node], -other) for other in holders[node]]
            welcome = len(taken) < room[node] or (taken and min(taken) < (value, -row))
            assert not (wanted and welcome), f"element {row} and node {node} would rather have each other"
    for node, held in enumerate(holders):
        assert all(node in candidates[row] for row in held)


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "TWO_STAGE_NODES", 64)
    told: list[tuple[str, float, float | None]] = []
    levels = grow(clustered(500), 8, 2, 0, lambda *what: told.append(what))
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    assert stages[:2] == ["clustering level 2", "seating level 2"]
    assert {stage.split()[-1] for stage in stages} == {str(k) for k in range(2, 2 + len(levels))}
    assert all(total and done <= total for _, done, total in told)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_equal_vectors_do_not_make_a_giant_cell(share: float) -> None:
    """K-means inside a cell costs its square, and equal vectors all fall into one."""
    vectors = clustered(4000)
    vectors[: int(4000 * share)] = vectors[0]
    cells = growing._cells(vectors, 320, np.random.default_rng(0))
    sizes = np.diff(cells.row_ends, prepend=0)
    assert sizes.tolist() == [len(cells.rows(cell)) for cell in range(len(cells.vectors))]
    assert np.array_equal(np.sort(cells.order), np.arange(4000))
    assert sizes.max() <= growing.LARGE_CELL * 4000 / 18 + 1
    assert cells.node_ends[-1] == 320
    assert all(len(cells.nodes(cell)) <= size for cell, size in enumerate(sizes))


def test_what_all_chunks_share_does_not_decide_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 40 topics in 4 phrasings; the phrasing weighs more than the topic in every vector."""
    generator = np.random.default_rng(0)
    topics, phrasings = generator.normal(size=(40, 48)), 2 * generator.normal(size=(4, 48))
    topic, phrasing = np.repeat(np.arange(40), 100), np.tile(np.arange(4), 1000)
    vectors = unit(topics[topic] + phrasings[phrasing] + 0.7 * generator.normal(size=(4000, 48))).astype(np.float16)

    def purity() -> float:
        """Share of children that are of their node's most frequent topic."""
        level = grow(vectors, 32, 1, 0)[0]
        parts = np.split(topic[level.children], level.offsets[1:-1])
        return sum(int(np.bincount(part).max()) for part in parts) / len(level.children)

    scaled = purity()
    monkeypatch.setattr(growing, "CLUSTERING_POWER", 0.0)
    assert scaled > purity() + 0.05
