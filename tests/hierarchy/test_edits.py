"""Edits: whatever is done to a memory, it is what its documents make of it, and says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.fakes import FakeEncoder, documents

from treemem.config import MODES, SearchConfig, TreeConfig
from treemem.errors import DamagedMemory, InputError, OutOfSpace, StoreError, TreememError
from treemem.hierarchy import edits
from treemem.hierarchy.memory import Memory, rollback_memory
from treemem.hierarchy.segment import cut
from treemem.hierarchy.verify import verify
from treemem.storage import change as changes
from treemem.storage import follow as following
from treemem.storage import history as past
from treemem.storage import image as image_module
from treemem.storage.files import map_npy
from treemem.storage.follow import VECTORS
from treemem.storage.image import Image
from treemem.types import Document

CONFIG = TreeConfig(chunk_tokens=40, fanout=6)
ENCODER = FakeEncoder()
DOCUMENTS = [replace(own, metadata={"number": n, "even": n % 2 == 0}) for n, own in enumerate(documents(120, 12))]


def built(path: Path, given: Iterable[Document], config: TreeConfig = CONFIG) -> Memory:
    return Memory.build(list(given), path, encoder=ENCODER, config=config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edits") / "m"
    built(path, DOCUMENTS[:60])
    return path


@pytest.fixture
def memory(tmp_path: Path, whole: Path) -> Memory:
    shutil.copytree(whole, tmp_path / "m")
    return Memory.open(tmp_path / "m", encoder=ENCODER)


def changed(document: Document) -> Document:
    return replace(document, text=document.text + " And something new was written under it.")


def found(memory: Memory, query: str, **options: Any) -> list[tuple[str, float, str]]:
    return [(hit.document.id, hit.score, hit.text) for hit in memory.search(query, **options)]


def answers(memory: Memory, modes: Iterable[str] = MODES) -> list[Any]:
    """What a memory finds in every mode, with everything that a result says of it."""
    queries = ["violin number 11", "harbour item100 measures glacier", DOCUMENTS[70].text[:80]]
    out = []
    for mode in modes:
        for query in queries:
            result = memory.search(query, mode=mode)
            out += [[(hit.document, hit.score, hit.span, hit.text, hit.path) for hit in result.hits], result.gathered]
    return out


def hits(memory: Memory, modes: Iterable[str] = ("exact", "bm25", "exact+bm25")) -> list[Any]:
    """What is found, without the ways to it."""
    return [[hit[:4] for hit in own] for own in answers(memory, modes)[::2]]


def sound(memory: Memory) -> None:
    verification = memory.verify()
    assert verification.faults == []
    assert verification.checked.get("documents", 0) == len(memory.ids())


def test_what_is_added_is_found_and_the_rest_stays(memory: Memory) -> None:
    before = memory.store.snapshot
    done = memory.add(DOCUMENTS[60:80])
    assert done.added == tuple(own.id for own in DOCUMENTS[60:80])
    assert (done.replaced, done.unchanged, done.chunks_removed) == ((), (), 0)
    assert done.snapshot == memory.store.snapshot != before
    assert sorted(memory.ids()) == sorted(own.id for own in DOCUMENTS[:80])
    for own in DOCUMENTS[:80]:
        assert memory.document(own.id) == own
        assert found(memory, own.text[:90], k=1)[0][0] == own.id
    sound(memory)


def test_adding_twice_is_adding_once(memory: Memory) -> None:
    memory.add(DOCUMENTS[60:70])
    snapshot = memory.store.snapshot
    done = memory.add(DOCUMENTS[50:70])
    assert done.unchanged == tuple(own.id for own in DOCUMENTS[50:70])
    assert done.snapshot == memory.store.snapshot == snapshot
    assert len(memory.history()) == 2


def test_what_has_changed_takes_the_place_of_what_was_there(memory: Memory) -> None:
    other_title = replace(DOCUMENTS[4], title="Another title")
    done = memory.add([changed(DOCUMENTS[3]), other_title, DOCUMENTS[5]])
    assert done.replaced == (DOCUMENTS[3].id, DOCUMENTS[4].id)
    assert done.unchanged == (DOCUMENTS[5].id,)
    assert memory.document(DOCUMENTS[3].id) == changed(DOCUMENTS[3])
    assert memory.document(DOCUMENTS[4].id) == other_title
    assert len(memory.ids()) == 60
    sound(memory)


def test_one_id_twice_changes_nothing(memory: Memory) -> None:
    before = memory.store.snapshot
    with pytest.raises(InputError, match="given twice"):
        memory.add([DOCUMENTS[70], changed(DOCUMENTS[70])])
    assert Memory.open(memory.store.path).store.snapshot == before


def test_what_is_removed_is_gone_from_everything(memory: Memory) -> None:
    gone = [DOCUMENTS[n] for n in (0, 7, 8, 59)]
    done = memory.remove([own.id for own in gone])
    assert done.removed == tuple(own.id for own in gone)
    assert done.chunks_removed > 0
    for own in gone:
        with pytest.raises(InputError, match="is not in"):
            memory.document(own.id)
        for mode in MODES:
            assert own.id not in [hit[0] for hit in found(memory, own.text[:90], k=50, mode=mode)]
    text = memory.store.read("documents/text").tobytes()
    for own in gone:
        assert own.text.encode() not in text
        assert own.id.encode() not in memory.store.read("documents/records").tobytes()
    sound(memory)


def test_much_is_removed_a_part_at_a_time(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(len(own.text.encode()) for own in DOCUMENTS)
    monkeypatch.setattr(changes, "ERASED_AT_ONCE", longest)
    zero, parts = changes._zero, []

    async def counted(writer: Any, path: str, places: np.ndarray) -> None:
        parts.append((path, len(places)))
        await zero(writer, path, places)

    monkeypatch.setattr(changes, "_zero", counted)
    memory.remove([own.id for own in DOCUMENTS[5:55]])
    texts = [size for path, size in parts if path == "documents/text"]
    assert sum(texts) == sum(len(own.text.encode()) for own in DOCUMENTS[5:55])
    assert len(texts) > 10
    assert max(texts) < 2 * longest
    assert memory.ids() == [own.id for own in (*DOCUMENTS[:5], *DOCUMENTS[55:60])]
    sound(memory)


def test_removing_what_is_not_there_changes_nothing(memory: Memory) -> None:
    before = memory.store.snapshot
    with pytest.raises(InputError, match="'nobody' is not in this memory"):
        memory.remove([DOCUMENTS[0].id, "nobody"])
    assert memory.store.snapshot == before
    assert memory.remove([]).snapshot == before


def test_removing_by_a_condition(memory: Memory) -> None:
    done = memory.remove(where="number < 10 and even")
    assert done.removed == tuple(DOCUMENTS[n].id for n in (0, 2, 4, 6, 8))
    assert len(memory.ids()) == 55


def test_after_an_add_is_taken_back_all_is_found_as_before(memory: Memory) -> None:
    before = hits(memory)
    memory.add(DOCUMENTS[60:90])
    assert hits(memory) != before
    memory.remove([own.id for own in DOCUMENTS[60:90]])
    assert hits(memory) == before
    sound(memory)


def test_an_image_that_followed_is_the_one_that_would_be_made_anew(memory: Memory) -> None:
    memory.add(DOCUMENTS[60:75])
    memory.remove([DOCUMENTS[n].id for n in (1, 2, 3, 30, 62)])
    memory.add([changed(DOCUMENTS[10]), *DOCUMENTS[75:80]])
    memory.mask([DOCUMENTS[20].id])
    assert not memory.image.fresh
    followed = answers(memory)
    shutil.rmtree(memory.store.path / "cache")
    again = Memory.open(memory.store.path, encoder=ENCODER)
    assert again.image.fresh
    assert answers(again) == followed


@pytest.mark.parametrize("lexical", ["index", "signatures"])
def test_walks_in_an_edited_tree_find_what_scoring_all_finds(memory: Memory, lexical: str) -> None:
    memory.add(DOCUMENTS[60:])
    memory.remove([own.id for own in DOCUMENTS[:30]])
    same = 0
    for own in DOCUMENTS[30:]:
        walked = found(memory, own.text[20:90], config=SearchConfig("hybrid", lexical=lexical))  # type: ignore[arg-type]
        same += walked[0][0] == found(memory, own.text[20:90], mode="exact+bm25")[0][0]
    assert same >= 88  # of 90


def test_old_images_are_read_as_they_were(memory: Memory) -> None:
    """One image's files are appended to while another process, or thread, has it open."""
    other = Memory.open(memory.store.path, encoder=ENCODER)
    before = answers(other)
    memory.add(DOCUMENTS[60:70])
    memory.remove([DOCUMENTS[0].id])
    assert answers(other) == before
    reopened = Memory.open(memory.store.path, at=other.store.snapshot, encoder=ENCODER)
    assert answers(reopened) == before


def test_an_edit_that_was_killed_halfway_leaves_the_image_whole(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.add(DOCUMENTS[60:62])
    before = answers(memory)
    with monkeypatch.context() as patch:
        patch.setattr(edits, "replace_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            memory.add(DOCUMENTS[62:64])
    assert answers(memory) == before
    again = Memory.open(memory.store.path, encoder=ENCODER)  # the commit was made; its image is made now
    assert sorted(again.ids()) == sorted(own.id for own in DOCUMENTS[:64])
    again.add(DOCUMENTS[64:66])
    sound(again)
    back = Memory.open(memory.store.path, at=again.history()[2].id, encoder=ENCODER)
    assert answers(back) == before
    memory.add(DOCUMENTS[66:67])  # the one that was interrupted goes on, too
    assert sorted(memory.ids()) == sorted(own.id for own in DOCUMENTS[:67])


@pytest.mark.parametrize("name", ["text", "records", "spans", "level-1-rows", "words-terms", "level-2-words-values"])
def test_verify_sees_a_flipped_bit_of_the_image(memory: Memory, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "CHECKED_BYTES", 0)  # as of an image that is too large for it
    memory.add(DOCUMENTS[60:62])
    before = answers(memory)
    file = memory.image.folder / f"{name}.npy"
    data = bytearray(file.read_bytes())
    data[-3 if name != "spans" else -16] ^= 1
    file.unlink()  # other images may share it
    file.write_bytes(data)
    memory = Memory.open(memory.store.path, encoder=ENCODER)
    assert not memory.image.fresh
    (fault,) = memory.verify().faults
    assert f"the serving image was damaged ({name}.npy); it was made anew" in fault
    assert memory.image.fresh
    sound(memory)
    assert answers(Memory.open(memory.store.path, encoder=ENCODER)) == answers(memory) == before


def test_flipped_bits_of_the_image_are_noticed(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """At opening, or, where the image is too large for it, by `verify`; what meets them before has named errors."""
    memory.add(DOCUMENTS[60:62])
    memory.remove([memory.ids()[3]])
    folder, generator = memory.image.folder, np.random.default_rng(0)
    files = sorted(folder.glob("*.npy"))
    kept = {file: file.read_bytes() for file in files}
    most, named = image_module.CHECKED_BYTES, 0
    for _ in range(40):
        file = files[generator.integers(len(files))]
        data = bytearray(kept[file])
        data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        file.unlink()  # not the file that the open memory has mapped
        file.write_bytes(data)
        monkeypatch.setattr(image_module, "CHECKED_BYTES", most)
        with pytest.raises(DamagedMemory, match=f"{file.name} is not what was written"):
            Image(folder)
        monkeypatch.setattr(image_module, "CHECKED_BYTES", 0)
        try:
            image = Image(folder)
            other = Memory(memory.store, image, memory.store.info(), lambda: ENCODER)
            for mode in MODES:
                for hit in other.search("water and stone", mode=mode):
                    assert hit.document.id
            for own in other.ids():
                other.document(own)
            assert any(file.name in fault for fault in verify(other.store, image).faults)
        except TreememError:  # also of an id that is no more that of its hash
            named += 1
        file.unlink()
        file.write_bytes(kept[file])
    assert named > 5


@pytest.mark.parametrize("bit", [19, 30, 31])
def test_words_that_are_damaged_are_made_anew(memory: Memory, bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that is too large or negative is noticed at once, a lesser one when its document leaves."""
    monkeypatch.setattr("treemem.storage.image.CHECKED_BYTES", 0)  # as of an image that is too large for it
    rows = memory.image.rows["words-lengths"]
    path = memory.image.folder / "words-lengths.npy"
    data = bytearray(path.read_bytes())
    lengths = np.frombuffer(data, np.int32, offset=len(data) - 4 * rows)
    lengths.setflags(write=True)
    lengths.view(np.uint32)[0] ^= np.uint32(1 << bit)
    path.write_bytes(data)
    again = Memory.open(memory.store.path, encoder=FakeEncoder())
    again.remove([again.ids()[0]])
    assert again.image.fresh == (bit == 19), "made from the store now, or when it was opened"
    assert (np.abs(map_npy(again.image.folder / "words-lengths.npy")) < 1000).all()
    assert again.verify().sound


def test_a_disk_that_fills_when_the_words_follow(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise ValueError("Failed to open file for write: IoError { kind: StorageFull, No space left on device }")

    with monkeypatch.context() as patch:
        patch.setattr(following, "update_index", full)
        with pytest.raises(OutOfSpace, match="the disk is full"):
            memory.remove([DOCUMENTS[0].id])
    again = Memory.open(memory.store.path, encoder=ENCODER)  # committed it was, and the image is made now
    assert DOCUMENTS[0].id not in again.ids()
    sound(again)


def test_masks(memory: Memory) -> None:
    hidden = [DOCUMENTS[n] for n in range(0, 60, 7)]
    levels = [level.vectors for level in memory.store.levels()]
    before = answers(memory)
    done = memory.mask([own.id for own in hidden])
    assert done.masked == tuple(own.id for own in hidden)
    for mode in MODES:
        for own in hidden:
            assert own.id not in [hit[0] for hit in found(memory, own.text[:90], k=40, mode=mode)]
    assert all(np.array_equal(a, b.vectors) for a, b in zip(levels, memory.store.levels(), strict=True))
    assert memory.info().masked == len(hidden)
    assert memory.mask([hidden[0].id]).masked == ()
    sound(memory)
    memory.unmask([own.id for own in hidden])
    assert answers(memory) == before


def test_a_masked_document_stays_masked_when_it_is_replaced(memory: Memory) -> None:
    memory.mask([DOCUMENTS[3].id])
    memory.add([changed(DOCUMENTS[3])])
    assert memory.info().masked == 1
    assert DOCUMENTS[3].id not in [hit[0] for hit in found(memory, DOCUMENTS[3].text[:90], k=40)]


def test_masked_for_a_while(memory: Memory) -> None:
    query, before = DOCUMENTS[9].text[:90], memory.store.snapshot
    with memory.masked([DOCUMENTS[9].id]):
        assert DOCUMENTS[9].id not in [hit[0] for hit in found(memory, query, k=40)]
        with memory.masked(where="even"):
            assert all(memory.document(hit[0]).metadata["number"] % 2 for hit in found(memory, query, k=40))
    assert found(memory, query, k=1)[0][0] == DOCUMENTS[9].id
    assert memory.store.snapshot == before


def test_what_is_masked_for_a_while_is_never_written(memory: Memory) -> None:
    with memory.masked([DOCUMENTS[9].id]):
        for edit in (lambda: memory.add(DOCUMENTS[60:61]), lambda: memory.mask([DOCUMENTS[8].id]), memory.compact):
            with pytest.raises(StoreError, match="masked for a while"):
                edit()
    memory.add(DOCUMENTS[60:61])
    assert memory.info().masked == 0
    assert DOCUMENTS[60].id in memory.ids()


def test_labels_and_passages_know_nothing_of_what_is_masked(memory: Memory) -> None:
    """Only one document holds the word; the label of its node and the passages must not."""
    odd = Document("odd", "The xylophonist plays xylophone music on a xylophone. Xylophones are xylophones.")
    memory.add([odd])
    asked = memory.ask("xylophone", llm=None)
    assert "xylophone" in str(asked.context).lower()
    memory.mask(["odd"])
    assert "xylophon" not in str(memory.ask("xylophone", llm=None).context).lower()


def test_searching_where(memory: Memory) -> None:
    for mode in MODES:
        hits = memory.search("harbour item100 measures glacier", k=20, mode=mode, where="number >= 40").hits
        assert hits
        assert all(memory.document(hit.document.id).metadata["number"] >= 40 for hit in hits)
    both = memory.search("glacier", where="even", within=[DOCUMENTS[0].id, DOCUMENTS[1].id], mode="exact")
    assert {hit.document.id for hit in both} == {DOCUMENTS[0].id}
    assert memory.search("glacier", where="number > 1000").hits == ()


def test_compacting(memory: Memory) -> None:
    memory.add(DOCUMENTS[60:])
    memory.remove([own.id for own in DOCUMENTS[:40]])
    memory.mask([DOCUMENTS[50].id])
    assert memory.info().advice is not None
    before = hits(memory)
    done = memory.compact()
    assert memory.info().advice is None
    assert done.recall_before is not None
    assert done.recall_after is not None
    assert min(done.recall_before, done.recall_after) > 0.7
    assert memory.image.documents == 80
    assert memory.info().masked == 1
    sound(memory)
    assert hits(memory) == before


def test_numbers_without_gaps(memory: Memory) -> None:
    before = memory.store.snapshot
    memory.dense()
    assert memory.store.snapshot == before
    memory.remove([DOCUMENTS[4].id])
    memory.dense()
    assert memory.image.fresh
    assert memory.image.documents == 59
    assert memory.history()[0].message == "compact before training"
    after = memory.store.snapshot
    memory.dense()
    assert memory.store.snapshot == after


def test_a_tree_grows_and_shrinks_with_what_is_in_it(tmp_path: Path) -> None:
    memory = built(tmp_path / "m", DOCUMENTS[:1])
    depths = [memory.image.tree.depth]
    for n in range(1, 28):
        memory.add([DOCUMENTS[n]])
        depths.append(memory.image.tree.depth)
        if n % 4 == 0:
            sound(memory)
    assert depths[0] == 1
    assert depths[-1] >= 3
    assert depths == sorted(depths)
    for n in range(0, 27, 3):
        memory.remove([own.id for own in DOCUMENTS[n : n + 3]])
    sound(memory)
    assert found(memory, DOCUMENTS[27].text[:60], k=1)[0][0] == DOCUMENTS[27].id
    memory.remove([DOCUMENTS[27].id])
    assert memory.search("anything").hits == ()
    memory.add(DOCUMENTS[:20])
    sound(memory)


def test_an_empty_memory_can_be_filled(tmp_path: Path) -> None:
    memory = built(tmp_path / "m", [])
    memory.add(DOCUMENTS[:30])
    assert found(memory, DOCUMENTS[12].text[:80], k=1)[0][0] == DOCUMENTS[12].id
    sound(memory)


def test_documents_without_text(memory: Memory) -> None:
    memory.add([Document("empty", ""), Document("spaces", " \n ")])
    assert memory.document("spaces") == Document("spaces", " \n ")
    memory.remove(["empty"])
    sound(memory)


def test_two_that_write_at_once_take_turns(memory: Memory) -> None:
    other = Memory.open(memory.store.path, encoder=ENCODER)
    memory.add(DOCUMENTS[60:62])
    other.add(DOCUMENTS[62:64])  # goes on from what the first has committed
    assert sorted(other.ids()) == sorted(own.id for own in DOCUMENTS[:64])
    assert memory.refresh()
    assert not memory.refresh()
    assert sorted(memory.ids()) == sorted(own.id for own in DOCUMENTS[:64])


def test_what_has_begun_is_read_from_one_snapshot(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread removes and compacts, after which numbers mean other documents, in the middle of each call."""
    last = DOCUMENTS[59]

    def edited_after(owner: Any, name: str, gone: Document, call: Callable[[], Any]) -> Any:
        original = getattr(owner, name)
        edits_left = [gone]

        def then(*given: Any, **options: Any) -> Any:
            out = original(*given, **options)
            if edits_left:
                own = edits_left.pop()
                monkeypatch.setattr(owner, name, original)
                memory.remove([own.id])
                memory.compact()
            return out

        monkeypatch.setattr(owner, name, then)
        result = call()
        assert not edits_left
        return result

    assert edited_after(Image, "number_of", DOCUMENTS[0], lambda: memory.document(last.id)) == last
    ids = edited_after(Image, "record", DOCUMENTS[1], memory.ids)
    assert ids == [own.id for own in DOCUMENTS[1:60]]
    query = DOCUMENTS[2].text[:90]
    hits = edited_after(Image, "record", DOCUMENTS[2], lambda: memory.search(query, where="number < 9")).hits
    assert hits[0].document.id == DOCUMENTS[2].id
    asked = edited_after(Memory, "search_many", DOCUMENTS[3], lambda: memory.ask(last.text[:60], llm=None))
    for passage in asked.context.passages:
        start, end = passage.span
        assert passage.text == next(own for own in DOCUMENTS if own.id == passage.document.id).text[start:end]


def test_a_locked_memory_says_so(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    from treemem.hierarchy import memory as module
    from treemem.hierarchy.build import alone

    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    with alone(memory.store.path), pytest.raises(StoreError, match="another process is writing this memory"):
        memory.remove([DOCUMENTS[0].id])


# ---- the past


def test_history_and_going_back(memory: Memory) -> None:
    first = memory.store.snapshot
    memory.add(DOCUMENTS[60:63], message="three more")
    second = memory.store.snapshot
    memory.remove([DOCUMENTS[0].id])
    told = memory.history()
    assert [own.message for own in told] == ["1 removed, 4 chunks removed", "three more", told[-1].message]
    assert told[1].changes == {"added": 3, "chunks_added": 12}
    assert told[0].names == ("main",)
    assert memory.diff(first).to_json() == {
        "added": sorted(own.id for own in DOCUMENTS[60:63]), "removed": [DOCUMENTS[0].id], "changed": [], "masked": [],
        "unmasked": [],
    }  # fmt: skip
    past = Memory.open(memory.store.path, at=first[:10], encoder=ENCODER)
    assert sorted(past.ids()) == sorted(own.id for own in DOCUMENTS[:60])
    with pytest.raises(StoreError, match="a snapshot of the past"):
        past.remove([DOCUMENTS[1].id])
    left = memory.rollback(second)
    assert sorted(memory.ids()) == sorted(own.id for own in DOCUMENTS[:63])
    memory.rollback(left)
    assert len(memory.ids()) == 62
    by_time = Memory.open(memory.store.path, at=told[1].time, encoder=ENCODER)
    assert by_time.store.snapshot == second


def test_branches_and_tags(memory: Memory) -> None:
    memory.tag("release")
    memory.branch("draft")
    draft = Memory.open(memory.store.path, at="draft", encoder=ENCODER)
    draft.add(DOCUMENTS[60:64])
    memory.add(DOCUMENTS[70:72])
    draft.add(DOCUMENTS[64:66])
    for own, last in ((draft, DOCUMENTS[60:66]), (memory, DOCUMENTS[70:72])):
        assert sorted(own.ids()) == sorted(d.id for d in [*DOCUMENTS[:60], *last])
        sound(own)
    assert len(Memory.open(memory.store.path, at="release", encoder=ENCODER).ids()) == 60
    assert set(memory.branches()) == {"main", "draft"}
    assert set(memory.tags()) == {"release"}
    memory.delete("draft")
    memory.delete("release")
    assert (set(memory.branches()), memory.tags()) == ({"main"}, {})
    for name in ("main", "nobody"):
        with pytest.raises(InputError):
            memory.delete(name)
    # A store on disk writes other characters in ways that it does not read: the memory could not be opened any more.
    unusual = ["entwürfe", "名前", *(f"a{character}" for character in '"#%*<>?[]^`{|}~\t\x00'), "n" * 101]
    for name in ("", "a b", "2024-01-01", "main", "a/b", ".hidden", "ABCDEFGHJK", "build", *unusual):
        for make in (memory.branch, memory.tag):
            with pytest.raises(InputError):
                make(name)
    for name in ("v1.0_rc-2+x=@y,z", "n" * 100):
        memory.branch(name)
        memory.tag(f"t{name[1:]}")
        assert Memory.open(memory.store.path, at=name, encoder=ENCODER).store.branch == name
        assert Memory.open(memory.store.path, at=f"t{name[1:]}", encoder=ENCODER).ids() == memory.ids()
    assert set(memory.branches()) == {"main", "v1.0_rc-2+x=@y,z", "n" * 100}
    memory.delete("t1.0_rc-2+x=@y,z")
    with pytest.raises(InputError, match="a tag that was deleted cannot be made again"):
        memory.tag("t1.0_rc-2+x=@y,z")
    with pytest.raises(InputError, match="no branch, tag or snapshot"):
        Memory.open(memory.store.path, at="nothing")


def test_what_is_forgotten_is_nowhere(memory: Memory) -> None:
    secret = Document("secret", "The quokka Zebedee hides under the veranda and eats marzipan. " * 3, "Quokka")
    memory.add([secret])
    memory.tag("with-secret")
    memory.branch("other")
    memory.add(DOCUMENTS[60:62])
    begun = memory.store.path / "store" / "chunks" / "F73SJYX6TD15HRHB5EP0#1"  # by a process that was killed then
    begun.write_text(secret.text)
    done = memory.forget(["secret"])
    assert done.documents == ("secret",)
    assert done.tags == ("with-secret",)
    for name in ("main", "other"):  # what another machine had begun on any branch is made again
        assert Memory.open(memory.store.path, at=name, encoder=ENCODER).history()[0].message.startswith("1 removed")
    assert len(done.snapshots) >= 3
    assert done.bytes > 0
    assert "secret" not in memory.ids()
    assert "secret" not in Memory.open(memory.store.path, at="other", encoder=ENCODER).ids()
    sound(memory)
    for file in memory.store.path.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert b"Zebedee" not in data, file
            assert b"zebedee" not in data, file
    with pytest.raises(InputError, match="in no branch or tag"):
        memory.forget(["secret"])


def test_what_was_removed_before_can_be_forgotten(memory: Memory) -> None:
    """Older snapshots hold it still, even those that nothing leads to since the branch was put back."""
    first = memory.store.snapshot
    memory.add([Document("secret", "The quokka Zebedee hides under the veranda.")])
    memory.rollback(first)
    with pytest.raises(InputError, match="in no branch or tag"):
        memory.forget(["secret", "nobody"])
    assert memory.forget(["secret"]).bytes > 0
    memory.remove([DOCUMENTS[0].id])
    assert memory.forget([DOCUMENTS[0].id]).bytes > 0
    with pytest.raises(InputError, match="in no branch or tag"):
        memory.forget([DOCUMENTS[0].id])
    sound(memory)


def test_what_is_forgotten_by_a_condition_is_looked_for_on_all_branches(memory: Memory) -> None:
    memory.branch("draft")
    draft = Memory.open(memory.store.path, at="draft", encoder=ENCODER)
    draft.add([Document("secret", "The quokka Zebedee hides under the veranda.", "Q", {"kind": "secret"})])
    done = memory.forget(where='kind == "secret"')
    assert done.documents == ("secret",)
    assert "secret" not in Memory.open(memory.store.path, at="draft", encoder=ENCODER).ids()
    assert memory.forget(where='kind == "secret"').documents == ()


def test_snapshots_that_a_rollback_left_are_told_when_they_are_gone(memory: Memory) -> None:
    first = memory.store.snapshot
    memory.add([Document("secret", "The quokka Zebedee hides under the veranda.")])
    left = memory.store.snapshot
    memory.rollback(first)
    assert {first, left} <= set(memory.forget(["secret"]).snapshots)


def test_a_tag_that_is_made_while_something_is_forgotten_keeps_nothing(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.add([Document("secret", "The quokka Zebedee hides under the veranda.")])
    old, real = memory.store.snapshot, past.expire

    def late(store: Any, moment: Any) -> Any:
        if not past.tags(store):
            past.create_tag(store, "keep", old)
        monkeypatch.setattr(past, "expire", real)
        return real(store, moment)

    monkeypatch.setattr(past, "expire", late)
    done = memory.forget(["secret"])
    assert done.tags == ("keep",)
    assert old in done.snapshots
    assert memory.tags() == {}
    for file in memory.store.path.rglob("*"):
        assert not file.is_file() or b"Zebedee" not in file.read_bytes(), file


def test_forgetting_keeps_what_is_known_of_edits(memory: Memory) -> None:
    memory.add(DOCUMENTS[60:70])
    before = memory.info().edited
    memory.forget([DOCUMENTS[60].id])
    memory.forget([DOCUMENTS[61].id])
    own = memory.image
    gone = sum(len(cut(DOCUMENTS[n].text, ENCODER.token_spans, memory.config.chunk_tokens, "en")) for n in (60, 61))
    assert memory.info().edited == pytest.approx((before * (own.chunks + gone) + gone) / own.chunks)
    memory.compact()
    assert memory.info().edited == 0


def test_the_same_files_by_another_path_are_unchanged(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("bees", "key"):
        (tmp_path / "notes" / f"{name}.txt").write_text(f"The {name} of the harbour lies under the third flower pot.")
    monkeypatch.chdir(tmp_path)
    assert len(memory.add("notes").added) == 2
    for path in (tmp_path / "notes", "./notes", "notes/../notes", str(tmp_path / "notes" / "*.txt")):
        done = memory.add(path)
        assert (len(done.unchanged), done.added, done.replaced) == (2, (), ()), path
    (tmp_path / "notes" / "key.txt").write_text("The key is lost.")
    assert memory.add(tmp_path / "notes").replaced == ("key.txt",)
    # Of documents that are given as such the source counts like everything else.
    own = memory.document("key.txt")
    assert memory.add(replace(own, metadata={**own.metadata, "source": "elsewhere"})).replaced == ("key.txt",)


def test_what_is_masked_for_a_while_stays_hidden_when_others_write(memory: Memory) -> None:
    other = Memory.open(memory.store.path, encoder=ENCODER)
    hidden = DOCUMENTS[3]
    with memory.masked([hidden.id]):
        other.add(DOCUMENTS[60:61])
        assert not memory.refresh()
        assert hidden.id not in [hit.document.id for hit in memory.search(hidden.text[:70], k=50).hits]
    assert memory.refresh()
    assert DOCUMENTS[60].id in memory.ids()
    assert memory.verify().faults == []


def test_a_damaged_tip_can_be_left(memory: Memory) -> None:
    """Its serving image is gone and its store damaged: an older snapshot is sound, and the branch goes back to it."""
    good = memory.store.snapshot
    chunks = memory.store.path / "store" / "chunks"
    before = set(chunks.iterdir())
    memory.add(DOCUMENTS[60:62])
    for file in set(chunks.iterdir()) - before:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    shutil.rmtree(memory.store.path / "cache")
    with pytest.raises(DamagedMemory):
        Memory.open(memory.store.path, encoder=ENCODER)
    assert rollback_memory(memory.store.path, good) == (memory.store.snapshot, good)
    again = Memory.open(memory.store.path, encoder=ENCODER)
    assert again.store.snapshot == good
    sound(again)


def test_a_reader_whose_image_was_swept_is_no_damage(memory: Memory) -> None:
    reader = Memory.open(memory.store.path, encoder=ENCODER)
    for number in range(7):
        memory.add(DOCUMENTS[60 + number : 61 + number])
    assert not reader.image.folder.exists()
    assert reader.verify().faults == []


@pytest.mark.parametrize("moment", ["expire_snapshots", "garbage_collect"])
def test_forgetting_that_was_interrupted_is_done_to_its_end(
    memory: Memory, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(icechunk.Repository, moment, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            memory.forget([DOCUMENTS[0].id])
    again = Memory.open(memory.store.path, encoder=ENCODER)
    before = len(list((again.store.path / "store" / "chunks").iterdir()))
    assert again.forget([DOCUMENTS[0].id]).bytes > 0
    assert len(list((again.store.path / "store" / "chunks").iterdir())) < before
    assert len(list((again.store.path / "cache").iterdir())) == 1
    with pytest.raises(InputError, match="in no branch or tag"):
        again.forget([DOCUMENTS[0].id])


def test_the_first_edit_makes_the_vectors_that_later_ones_use(memory: Memory) -> None:
    assert VECTORS not in memory.image.rows
    memory.mask([DOCUMENTS[0].id])
    assert VECTORS not in memory.image.rows
    memory.remove([DOCUMENTS[1].id])
    assert memory.image.rows[VECTORS] == len(memory.image.spans)
    memory.add(DOCUMENTS[60:61])
    assert memory.image.rows[VECTORS] == len(memory.image.spans)


def test_an_image_whose_words_lead_nowhere_is_made_anew(memory: Memory) -> None:
    """What an edit finds of a damage, its checks when it is opened do not: they read no words."""
    memory.add(DOCUMENTS[60:61])
    assert memory.image.tree.depth > 2
    assert not memory.image.fresh
    path = memory.image.folder / "level-2-words-terms.npy"
    terms = np.load(path, mmap_mode="r+")
    terms[:] = np.iinfo(np.int32).min
    terms.flush()
    memory.add(DOCUMENTS[61:62])
    assert memory.image.fresh
    sound(memory)


# ---- any sequence of edits


class Edits(RuleBasedStateMachine):
    """A memory beside a plain dictionary of documents."""

    @initialize()
    def begin(self) -> None:
        self.path = Path(self.folder()) / "m"  # type: ignore[attr-defined]
        self.branch = "main"
        self.memory = built(self.path, DOCUMENTS[:12], replace(CONFIG, fanout=4))
        self.model = {own.id: own for own in DOCUMENTS[:12]}
        self.masked: set[str] = set()
        self.states = {self.memory.store.snapshot: (dict(self.model), set(self.masked))}

    def committed(self) -> None:
        self.states[self.memory.store.snapshot] = (dict(self.model), set(self.masked))

    def went_to(self, snapshot: str) -> None:
        model, masked = self.states[snapshot]
        self.model, self.masked = dict(model), set(masked)

    @rule(numbers=st.sets(st.integers(0, 39), min_size=1, max_size=8), different=st.booleans())
    def add(self, numbers: set[int], different: bool) -> None:
        given = [changed(DOCUMENTS[n]) if different else DOCUMENTS[n] for n in sorted(numbers)]
        self.memory.add(given)
        self.model.update({own.id: own for own in given})
        self.committed()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.sets(st.sampled_from(sorted(self.model)), min_size=1))
        self.memory.remove(sorted(gone))
        for own in gone:
            del self.model[own]
        self.masked -= gone
        self.committed()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), hide=st.booleans())
    def mask(self, data: st.DataObject, hide: bool) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.model)), min_size=1, max_size=4))
        if hide:
            self.memory.mask(sorted(chosen))
            self.masked |= chosen
        else:
            self.memory.unmask(sorted(chosen))
            self.masked -= chosen
        self.committed()

    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        history = [own.id for own in self.memory.history()]
        to = history[data.draw(st.integers(0, len(history) - 1))]  # ids are random, and so would be their order
        self.memory.rollback(to)
        self.went_to(to)

    @rule(name=st.sampled_from(["main", "one", "two"]))
    def go_on_with_a_branch(self, name: str) -> None:
        if name not in self.memory.branches():
            self.memory.branch(name)
        self.branch = name
        self.memory = Memory.open(self.path, at=name, encoder=ENCODER)
        self.went_to(self.memory.store.snapshot)

    @rule()
    def compact(self) -> None:
        self.memory.compact()
        self.committed()

    @rule(without_image=st.booleans())
    def reopen(self, without_image: bool) -> None:
        if without_image:
            shutil.rmtree(self.path / "cache")
        self.memory = Memory.open(self.path, at=self.branch, encoder=ENCODER)

    @invariant()
    def holds_the_documents(self) -> None:
        if not hasattr(self, "memory"):
            return
        assert sorted(self.memory.ids()) == sorted(self.model)
        for own in self.model.values():
            assert self.memory.document(own.id) == own
        sound(self.memory)
        visible = set(self.model) - self.masked
        for own in list(self.model.values())[:3]:
            for mode in ("hybrid", "exact"):
                hits = found(self.memory, own.text[:70], mode=mode, k=100)
                assert {hit[0] for hit in hits} <= visible
                if own.id in visible:
                    assert own.id in {hit[0] for hit in hits}
            assert {hit[0] for hit in found(self.memory, own.text[:70], mode="exact", k=1000)} == visible


def test_any_sequence_of_edits(tmp_path_factory: pytest.TempPathFactory) -> None:
    _run(tmp_path_factory, examples=4, steps=8)


@pytest.mark.slow
def test_many_sequences_of_edits(tmp_path_factory: pytest.TempPathFactory) -> None:
    _run(tmp_path_factory, examples=60, steps=20)


def _run(tmp_path_factory: pytest.TempPathFactory, examples: int, steps: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    class Here(Edits):
        def folder(self) -> Path:
            return tmp_path_factory.mktemp("machine")

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
