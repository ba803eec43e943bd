"""Edits under faults: killed, without room, damaged, several at once, and with awkward ids. See `tests.faults`."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from tests import faults
from tests.fakes import FakeEncoder
from tests.faults import CONFIG, DOCUMENTS, MOMENTS, Trials
from tests.processes import Forks, Job

from treemem.errors import InputError, StoreError
from treemem.hierarchy import memory as module
from treemem.hierarchy.memory import Memory
from treemem.types import Document

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")

QUERY = DOCUMENTS[7].text[:80]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forking = Forks()
    yield forking
    forking.close()


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Trials:
    return Trials(forks, tmp_path_factory.mktemp("trials"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with faults.small_disk(tmp_path / "disk") as reason:
        if reason:
            pytest.skip(reason)
        yield tmp_path / "disk"


def counted(rounds: int, trial: Callable[[int], str]) -> Counter[str]:
    return Counter(trial(number) for number in range(rounds))


# ---- killed


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(trials: Trials, moment: str) -> None:
    edit, function, _ = MOMENTS[moment]
    before_the_commit = function.endswith((":Session.commit", "Writer.append", "Writer.put", ":write_levels")) or (
        function.endswith(":write_change")  # of the branch that this memory is at, after the other one
    )
    assert trials.kill_at(moment) == ("old" if before_the_commit else "new"), edit


def test_killed_at_random_moments(trials: Trials) -> None:
    generator = random.Random(0)
    counts = counted(20, lambda number: trials.kill(generator, timed=number % 2 == 0))
    assert counts["old"] >= 3
    assert counts["new"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_many_random_moments(trials: Trials) -> None:
    generator = random.Random(1)
    counts = counted(200, lambda number: trials.kill(generator, timed=number % 2 == 0))
    assert min(counts["old"], counts["new"]) >= 20


# ---- no room


def test_a_disk_that_fills_under_an_edit(trials: Trials, disk: Path) -> None:
    generator = random.Random(0)
    counts = counted(5, lambda _: trials.fill(disk, generator))
    assert counts["old full"] + counts["new full"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_disk_that_fills_under_many_edits(trials: Trials, disk: Path) -> None:
    generator = random.Random(1)
    counts = counted(50, lambda _: trials.fill(disk, generator))
    assert counts["old full"] >= 5
    assert counts["new full"] >= 2


# ---- damaged


def test_damage_after_edits(trials: Trials) -> None:
    generator = random.Random(0)
    kinds = ["chunks", "manifests", "snapshots", "refs", "image"] * 2
    counts = counted(10, lambda number: trials.damage(generator, kinds[number]))
    assert counts["error"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_much_damage_after_edits(trials: Trials) -> None:
    generator = random.Random(1)
    counts = counted(100, lambda _: trials.damage(generator))
    assert counts["error"] >= 20
    assert counts["repaired"] >= 5


def test_a_damaged_image_is_made_again(trials: Trials) -> None:
    """What is cut or gone is noticed when the image is opened, of whatever file."""
    generator = random.Random(2)
    for way in ("cut", "gone"):
        assert trials.damage(generator, "image", way) == "repaired"


# ---- two that write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "m"
    Memory.build(DOCUMENTS[:20], path, encoder=FakeEncoder(), config=CONFIG)
    return path


@pytest.fixture
def path(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits wait for each other however slow the machine is."""
    monkeypatch.setattr(module, "LOCK_SECONDS", 200.0)


def opened(path: Path, **options: Any) -> Memory:
    return Memory.open(path, encoder=FakeEncoder(), **options)


def test_a_writer_in_another_process_is_waited_for_or_named(
    path: Path, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = opened(path)
    forks.start(Job(call="tests.faults:hold", given=(str(path), "600"), output=str(tmp_path / "told")))
    try:
        wait_until(lambda: (told := tmp_path / "told.out").exists() and "held" in told.read_text())
        monkeypatch.setattr(module, "LOCK_SECONDS", 0.2)
        with pytest.raises(StoreError, match="another process is writing this memory; wait for it or end it"):
            memory.add(DOCUMENTS[20])
        assert len(memory.ids()) == 20
        monkeypatch.setattr(module, "LOCK_SECONDS", 60.0)
        adding = Concurrent(lambda: memory.add(DOCUMENTS[20]))
        time.sleep(0.3)
        assert adding.thread.is_alive()
    finally:
        forks.signal(9)  # the lock goes with its process
        forks.wait()
    adding.end()
    assert DOCUMENTS[20].id in opened(path).ids()


def test_writers_in_two_processes_lose_nothing(path: Path, forks: Forks, tmp_path: Path, patient: None) -> None:
    memory = opened(path)
    forks.start(
        Job(call="tests.faults:add_one_by_one", given=(str(path), "20", "24"), output=str(tmp_path / "told"))
    )  # fmt: skip
    for own in DOCUMENTS[24:27]:
        memory.add(own)
    assert forks.wait() == 0, (tmp_path / "told.err").read_text()
    memory = opened(path)
    assert sorted(memory.ids()) == sorted(own.id for own in DOCUMENTS[:27])
    assert len(memory.history()) == 1 + 7
    assert memory.verify().faults == []


def test_writers_in_two_threads_lose_nothing(path: Path, patient: None) -> None:
    """One with the same memory, one with another opened beside it."""
    memory, other = opened(path), opened(path)
    writers = [
        Concurrent(lambda own=own, part=part: [own.add(document) for document in part])  # type: ignore[misc]
        for own, part in ((memory, DOCUMENTS[20:22]), (memory, DOCUMENTS[22:24]), (other, DOCUMENTS[24:26]))
    ]
    for writer in writers:
        writer.end()
    memory = opened(path)
    assert sorted(memory.ids()) == sorted(own.id for own in DOCUMENTS[:26])
    assert memory.verify().faults == []


# ---- many that read beside one that writes


def test_readers_keep_their_snapshot_beside_a_writer(path: Path, forks: Forks, tmp_path: Path) -> None:
    """In a process and in threads; the writer makes more snapshots than images are kept."""
    writer, shared = opened(path), opened(path)
    before = found(shared)
    forks.start(Job(call="tests.faults:read_on", given=(str(path), str(path)), output=str(tmp_path / "told")))
    done = threading.Event()
    rounds = [0] * 3

    def read(number: int) -> None:
        own = shared if number < 2 else opened(path, at=shared.store.snapshot)
        while not done.is_set() or rounds[number] == 0:
            assert found(own) == before
            assert own.document(DOCUMENTS[7].id) == DOCUMENTS[7]
            rounds[number] += 1

    readers = [Concurrent(lambda number=number: read(number)) for number in range(3)]  # type: ignore[misc]
    wait_until(lambda: "reading" in (tmp_path / "told.out").read_text())
    try:
        for own in DOCUMENTS[20:26]:
            writer.add(own)
        writer.remove([DOCUMENTS[7].id])
        writer.compact()
    finally:
        done.set()
        (path / "stop").touch()
    for reader in readers:
        reader.end()
    assert forks.wait() == 0, (tmp_path / "told.err").read_text()
    assert min(rounds) >= 1
    assert found(shared) == before
    assert shared.refresh()
    assert found(shared) == found(opened(path)) != before


def test_readers_of_one_memory_that_is_edited(path: Path) -> None:
    """Each search is of one snapshot, the one before an edit or the one after."""
    memory = opened(path)
    texts = {own.id: own.text for own in DOCUMENTS}
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for hit in memory.search(QUERY, where="number >= 2"):
                assert hit.text in texts[hit.document.id]
            for own in memory.ids():
                assert own in texts

    readers = [Concurrent(read) for _ in range(2)]
    try:
        memory.add(DOCUMENTS[20:22])
        memory.remove([DOCUMENTS[0].id, DOCUMENTS[8].id])
        memory.compact()
    finally:
        done.set()
    for reader in readers:
        reader.end()


def found(memory: Memory) -> list[Any]:
    return [
        (hit.document.id, hit.score, hit.text) for mode in ("hybrid", "bm25") for hit in memory.search(QUERY, mode=mode)
    ]


class Concurrent:
    """A thread whose failure is the test's."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self.failure = error

    def end(self) -> None:
        self.thread.join(200)
        assert not self.thread.is_alive()
        if self.failure is not None:
            raise self.failure


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- awkward ids and metadata

AWKWARD = (
    "../../etc/passwd",
    "..",
    "/",
    "\0",
    "a\nb",
    "",
    " ",
    "'",
    '"',
    "\\",
    "é",
    "e\u0301",
    "😀",
    "\u2028",
    "x" * 10_000,
)
texts = st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
values = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts
)


@given(
    ids=st.lists(texts, min_size=2, max_size=5, unique=True).filter(lambda own: len(repr(own)) < 2_000),
    key=texts.filter(lambda own: len(repr(own)) < 2_000),
    value=values.filter(lambda own: len(repr(own)) < 2_000),
    number=st.integers(0, 10**9),
)
@example(ids=["../../etc/passwd", "\0", "x" * 10_000], key="two words", value="a\nb", number=0)
@example(ids=["é", "e\u0301"], key="", value="\0", number=1)
@settings(max_examples=2, deadline=None, phases=[Phase.explicit, Phase.generate])  # to shrink takes minutes
def test_any_id_and_metadata(
    ids: list[str], key: str, value: object, number: int, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("awkward")
    memory = opened(Path(shutil.copytree(whole, folder / "m")))
    beside = sorted(own.name for own in folder.iterdir())
    given_documents = [
        Document(own, f"The lighthouse {n} was painted by {own[:50]}.", own, {key: value, "number": number + n})
        for n, own in enumerate(ids)
    ]
    memory.add(given_documents)
    memory = opened(memory.store.path)
    for own in given_documents:
        assert memory.document(own.id) == own
        assert {hit.document.id for hit in memory.search("lighthouse", mode="exact", within=[own.id])} == {own.id}
    assert memory.ids(where=f"id == {ids[0]!r}") == [ids[0]]
    assert set(ids) <= set(memory.ids(where=f"meta[{key!r}] == {value!r}")) or key == "number"
    memory.mask([ids[0]])
    assert ids[0] not in {hit.document.id for hit in memory.search("lighthouse", k=50, mode="exact")}
    assert memory.add(given_documents).unchanged == tuple(ids)
    memory.remove([ids[0]])
    memory.forget(where=f"id == {ids[1]!r}")
    assert not {*ids[:2]} & set(memory.ids())
    for gone in ids[:2]:
        with pytest.raises(InputError) as caught:
            memory.document(gone)
        assert "\0" not in str(caught.value)
    assert memory.verify().faults == []
    assert sorted(own.name for own in folder.iterdir()) == beside


@given(text=texts | st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_condition_is_read_or_refused(text: str, whole_memory: Memory) -> None:
    try:
        found = whole_memory.ids(where=text)
    except InputError as error:
        message = str(error)
    else:
        message = "where: it was read"
        assert set(found) <= {own.id for own in DOCUMENTS}
    assert message.startswith("where")


@pytest.fixture(scope="module")
def whole_memory(whole: Path) -> Memory:
    return opened(whole)
