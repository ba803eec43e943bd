"""Building: from any documents, in bounded memory, continued where it was interrupted."""

from __future__ import annotations

import shutil
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import FakeEncoder, documents, stored_arrays

from treemem.config import TreeConfig
from treemem.errors import EncoderMismatch, InputError, ModelError, StoreError, TreememError, UnfinishedMemory
from treemem.hierarchy import build as building
from treemem.hierarchy.build import build, contextual_file
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.memory import Memory
from treemem.storage.levels import contextual
from treemem.storage.store import Store
from treemem.types import Document

CONFIG = TreeConfig(chunk_tokens=40, fanout=8)


class Stop(Exception):
    """Ends a build from outside."""


@pytest.fixture
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "COMMIT_CHUNKS", 50)


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


def stopping(given_documents: list[Document], after: int) -> Iterator[Document]:
    """Documents whose reading fails after some."""
    yield from given_documents[:after]
    raise Stop


def interrupted(path: Path, encoder: Encoder, given_documents: list[Document], after: int) -> Store:
    with pytest.raises(Stop):
        build(path, stopping(given_documents, after), encoder, CONFIG)
    store = Store.open(path)
    assert not store.finished
    return store


def assert_same(one: Path, other: Path) -> None:
    a, b = stored_arrays(one), stored_arrays(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


# ---- what is built


def test_a_build_is_what_its_parts_say(tmp_path: Path, encoder: FakeEncoder, small_commits: None) -> None:
    given_documents = documents(40, 12)
    build(tmp_path / "m", given_documents, encoder, CONFIG)
    store = Store.open(tmp_path / "m")
    info = store.info()
    assert (info.state, info.documents, info.config, info.dimension) == ("complete", 40, CONFIG, 32)
    assert info.encoder == {"name": "fake", "dimension": 32, "weights": encoder.info.weights}
    texts = [
        given_documents[number].text[a:b]
        for number, (first, last) in enumerate(
            zip([0, *store.read("documents/chunk_ends")], store.read("documents/chunk_ends"), strict=False)
        )
        for a, b, _, _ in store.read("chunks/spans")[first:last]
    ]
    assert len(texts) == info.chunks
    np.testing.assert_array_equal(store.read("chunks/encodings"), encoder.encode(texts).astype(np.float16))
    assert info.levels[-1] <= 2 * CONFIG.fanout


def test_the_size_of_commits_changes_nothing(
    tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "large", documents(60, 10), encoder, CONFIG)
    monkeypatch.setattr(building, "COMMIT_CHUNKS", 7)
    monkeypatch.setattr(building, "CONTEXT_ROWS", 13)
    build(tmp_path / "small", documents(60, 10), encoder, CONFIG)
    assert_same(tmp_path / "large", tmp_path / "small")


def test_much_text_is_committed_although_it_gives_few_chunks(
    tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "COMMIT_CHARACTERS", 1000)
    given_documents = [Document(f"d{n}", "word " + " " * 600) for n in range(10)]
    store = interrupted(tmp_path / "m", encoder, given_documents, 10)
    assert store.info().documents == 10


def test_vectors_of_level_1(tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    given_documents = [*documents(30, 9), Document("nothing", " "), *documents(3, 30, seed=4)[:1]]
    given_documents[-1] = Document("long", given_documents[-1].text)
    build(tmp_path / "m", given_documents, encoder, CONFIG)
    store = Store.open(tmp_path / "m")
    expected = contextual(store.read("chunks/encodings"), store.read("documents/chunk_ends"), 0.25)
    for rows in (1, 10, 10_000):
        monkeypatch.setattr(building, "CONTEXT_ROWS", rows)
        assert contextual_file(store, 0.25, tmp_path / "v").tobytes() == expected.tobytes()


def test_progress_counts_chunks(tmp_path: Path, encoder: FakeEncoder, small_commits: None) -> None:
    told: list[tuple[str, float, float | None]] = []
    build(tmp_path / "m", documents(40, 12), encoder, CONFIG, lambda *what: told.append(what))
    done = [number for stage, number, _ in told if stage == "encoding"]
    assert done[0] == 0
    assert done == sorted(done)
    assert done[-1] == Store.open(tmp_path / "m").info().chunks
    assert {stage.split()[0] for stage, *_ in told} >= {"encoding", "clustering"}


def test_what_follows_the_encoding_tells_its_progress_too(
    tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "COMMIT_CHUNKS", 50)
    monkeypatch.setattr(building, "CONTEXT_ROWS", 100)
    interrupted(tmp_path / "m", encoder, documents(600), 600)
    told: list[tuple[str, float, float | None]] = []
    build(tmp_path / "m", documents(600), encoder, CONFIG, lambda *what: told.append(what))
    stored = Store.open(tmp_path / "m")
    for stage, total in (("comparing documents", 600), ("adding context", stored.info().chunks)):
        own = [(done, expected) for name, done, expected in told if name == stage]
        assert own
        assert own == sorted(own)
        assert all(0 < done < expected == total for done, expected in own)


# ---- documents of every kind


@pytest.mark.parametrize("text", ["", " ", " \n\t\r\n ", "\u2003\u00a0"])
def test_documents_without_words(tmp_path: Path, encoder: FakeEncoder, text: str) -> None:
    build(tmp_path / "m", [Document("before", "First words."), Document("d", text), Document("after", "Last words.")],
          encoder, CONFIG)  # fmt: skip
    memory = Memory.open(tmp_path / "m", encoder=encoder)
    assert memory.document("d").text == text
    assert memory.search("last words", k=1).hits[0].document.id == "after"
    assert memory.info().chunks == 2


def test_NUL_bytes_are_kept(tmp_path: Path, encoder: FakeEncoder) -> None:
    document = Document("d\0", "A text\0 with \0\0 in it. And more.", "t\0", {"k\0": "\0"})
    build(tmp_path / "m", [document], encoder, CONFIG)
    memory = Memory.open(tmp_path / "m", encoder=encoder)
    assert memory.document("d\0") == document
    (hit,) = memory.search("text with").hits
    assert hit.text == document.text[hit.span[0] : hit.span[1]]


@given(
    given_documents=st.lists(
        st.builds(
            Document,
            id=st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
            text=st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from("a b. \n\0"), max_size=300),
            title=st.text(st.characters(exclude_categories=("Cs",)), max_size=5),
        ),
        max_size=5,
        unique_by=lambda document: document.id,
    )
)
@settings(max_examples=8)
def test_any_documents_are_searched(given_documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "m"
    encoder = FakeEncoder()
    build(path, given_documents, encoder, TreeConfig(chunk_tokens=8, fanout=2))
    memory = Memory.open(path, encoder=encoder)
    for document in given_documents:
        assert memory.document(document.id) == document
    for hit in memory.search("a b", k=50, mode="exact").hits:
        assert memory.document(hit.document.id).text[hit.span[0] : hit.span[1]] == hit.text


@pytest.mark.parametrize("field", ["id", "text", "title", "metadata"])
def test_half_characters_are_refused_by_name(tmp_path: Path, encoder: FakeEncoder, field: str) -> None:
    half = {"metadata": {"k": "\ud83d"}} if field == "metadata" else {field: "half \ud83d of one"}
    broken = Document(**{"id": "broken", "text": "words", **half})
    with pytest.raises(InputError, match=r"document '(broken|half)") as caught:
        build(tmp_path / "m", [Document("fine", "words"), broken], encoder, CONFIG)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: "a string", "document 2: it is of type str, not treemem.Document"),
        (lambda: Document(7, "text"), r"document 2 \(7\): its id, title and text must be strings"),
        (lambda: Document("d", None), r"document 2 \('d'\): its id, title and text must be strings"),
        (lambda: Document("d", "text", "", {"when": object()}), "document 'd': its metadata cannot be stored as JSON"),
    ],
)
def test_things_that_are_no_documents(
    tmp_path: Path, encoder: FakeEncoder, made: Callable[[], Document], message: str, unchecked_types: None
) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path / "m", [Document("fine", "words"), made()], encoder, CONFIG)


def test_an_id_given_twice_is_refused(tmp_path: Path, encoder: FakeEncoder) -> None:
    twice = [Document("a", "one"), Document("b", "two"), Document("a", "three")]
    with pytest.raises(InputError, match="document 'a': given twice; ids must differ"):
        build(tmp_path / "m", twice, encoder, CONFIG)


def test_the_same_text_under_two_ids_is_kept_twice(tmp_path: Path, encoder: FakeEncoder) -> None:
    build(tmp_path / "m", [Document("a", "Same words."), Document("b", "Same words.")], encoder, CONFIG)
    hits = Memory.open(tmp_path / "m", encoder=encoder).search("same words").hits
    assert {hit.document.id for hit in hits} == {"a", "b"}


def test_a_thousand_equal_chunks(tmp_path: Path, encoder: FakeEncoder) -> None:
    build(tmp_path / "m", [Document(f"d{n}", "All the same here.") for n in range(1000)], encoder, CONFIG)
    memory = Memory.open(tmp_path / "m", encoder=encoder)
    assert len(memory.search("all the same", k=20).hits) == 20


@pytest.mark.parametrize(("fanout", "spill"), [(2, 1), (2, 2), (3, 8), (5, 2)])
def test_every_fanout_with_every_spill(tmp_path: Path, encoder: FakeEncoder, fanout: int, spill: int) -> None:
    config = TreeConfig(chunk_tokens=40, fanout=fanout, spill=spill)
    build(tmp_path / "m", documents(40), encoder, config)
    assert Memory.open(tmp_path / "m", encoder=encoder).search("violin number 11", k=1).hits[0].document.id == "doc-11"


def test_chunks_longer_than_the_encoder_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chunk_tokens = 40: encoder 'fake' takes 30"):
        build(tmp_path / "m", [], FakeEncoder(longest=30), CONFIG)
    assert not (tmp_path / "m").exists()


def test_nan_from_the_encoder_names_the_text(tmp_path: Path, minilm: Encoder) -> None:
    _ = minilm.info  # of the sound weights
    weights = next(p for name, p in minilm.model.named_parameters() if name.endswith("word_embeddings.weight"))
    token = minilm.model.tokenizer.convert_tokens_to_ids("violin")
    sound = weights.data[token].clone()
    given_documents = [Document("a", "A harbour at night."), Document("b", "The violin is out of tune.")]
    try:
        weights.data[token] = float("nan")
        with pytest.raises(ModelError, match=r"NaN or infinite values for the text 'The violin is out of tune\.'"):
            build(tmp_path / "m", given_documents, minilm, TreeConfig())
    finally:
        weights.data[token] = sound
    store = Store.open(tmp_path / "m")
    assert not store.finished
    assert store.info().documents == 0
    build(tmp_path / "m", given_documents, minilm, TreeConfig())


# ---- bounded memory


def test_documents_are_not_held(tmp_path: Path, encoder: FakeEncoder, small_commits: None) -> None:
    """At most the documents of two batches are alive: the one that is stored and the one that is gathered."""
    alive: weakref.WeakSet[Document] = weakref.WeakSet()
    most = 0

    class Tracked(Document):
        """Compared by identity, as a weak set needs it."""

        __hash__ = object.__hash__

    def stream() -> Iterator[Document]:
        nonlocal most
        for number in range(600):
            document = Tracked(f"d{number}", f"The harbour number {number} sleeps. " * 10)
            alive.add(document)
            most = max(most, len(alive))
            yield document
            del document

    build(tmp_path / "m", stream(), encoder, CONFIG)
    chunks = Store.open(tmp_path / "m").info().chunks
    per_batch = 50 / (chunks / 600)
    assert chunks >= 1200
    assert most <= 2 * per_batch + 4


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "COMMIT_CHARACTERS", 1_000_000)
    monkeypatch.setattr(building, "CONTEXT_ROWS", 100)
    body = " " * 200_000
    stream = (Document(f"d{n}", f"The harbour {n} sleeps. {body} It wakes.") for n in range(220))
    tracemalloc.start()
    build(tmp_path / "m", stream, FakeEncoder(dimension=8), TreeConfig())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert Store.open(tmp_path / "m").array("documents/text").shape[0] >= 44_000_000
    assert peak < 32_000_000  # some blocks of 8 MB, as arrays are copied


@pytest.mark.slow
def test_a_document_of_50_megabytes(tmp_path: Path) -> None:
    sentence = "The harbour number {} measures the glacier and forgets the orchard of day {}.\n"
    text = "".join(sentence.format(n, n % 365) for n in range(660_000))
    assert len(text) > 50_000_000
    encoder = FakeEncoder(dimension=8)
    build(tmp_path / "m", [Document("large", text), Document("small", "A violin.")], encoder, TreeConfig())
    memory = Memory.open(tmp_path / "m", encoder=encoder)
    assert memory.search("violin", k=1).hits[0].document.id == "small"
    hit = memory.search("harbour number 654321", k=1, mode="bm25").hits[0]
    assert "654321" in hit.text
    assert text[hit.span[0] : hit.span[1]] == hit.text


# ---- interrupted and continued


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed build of `documents(40, 12)`."""
    path = tmp_path_factory.mktemp("whole") / "m"
    build(path, documents(40, 12), FakeEncoder(), CONFIG)
    return path


@pytest.mark.parametrize("after", [0, 1, 13, 39, 40])
def test_an_interrupted_build_continues(tmp_path: Path, whole: Path, small_commits: None, after: int) -> None:
    given_documents = documents(40, 12)
    first = FakeEncoder()
    stored = interrupted(tmp_path / "m", first, given_documents, after).info()
    second = FakeEncoder()
    build(tmp_path / "m", iter(given_documents), second, CONFIG)
    assert_same(tmp_path / "m", whole)
    total = Store.open(tmp_path / "m").info().chunks
    assert second.encoded == total - stored.chunks, "what was committed is encoded again"
    if after >= 13:
        assert stored.chunks > 0


def test_interrupted_again_and_again(tmp_path: Path, whole: Path, small_commits: None) -> None:
    given_documents = documents(40, 12)
    for after in (10, 3, 25):
        with pytest.raises(Stop):
            build(tmp_path / "m", stopping(given_documents, after), FakeEncoder(), CONFIG)
    build(tmp_path / "m", given_documents, FakeEncoder(), CONFIG)
    assert_same(tmp_path / "m", whole)


def test_an_interrupted_memory_says_so(tmp_path: Path, encoder: FakeEncoder, small_commits: None) -> None:
    interrupted(tmp_path / "m", encoder, documents(40, 12), 30)
    with pytest.raises(UnfinishedMemory, match="its build was interrupted; run the same build again, it continues"):
        Memory.open(tmp_path / "m")


@pytest.mark.parametrize("change", ["text", "title", "metadata", "id", "order", "missing"])
def test_other_documents_are_refused(tmp_path: Path, encoder: FakeEncoder, small_commits: None, change: str) -> None:
    given_documents = documents(40, 12)
    interrupted(tmp_path / "m", encoder, given_documents, 39)
    before = stored_arrays(tmp_path / "m")
    old = given_documents[4]
    changed = {
        "text": Document(old.id, old.text + " More.", old.title, old.metadata),
        "title": Document(old.id, old.text, "Another", old.metadata),
        "metadata": Document(old.id, old.text, old.title, {}),
        "id": Document("another", old.text, old.title, old.metadata),
    }
    if change in changed:
        given_documents[4] = changed[change]
        message = rf"document 5 \('{given_documents[4].id}'\) differs; give the same documents, or remove this folder"
    elif change == "order":
        given_documents[4:6] = given_documents[5:3:-1]
        message = r"document 5 \('doc-5'\) differs"
    else:
        given_documents = given_documents[:4]
        message = "document 5 is missing"
    with pytest.raises(InputError, match=message):
        build(tmp_path / "m", given_documents, encoder, CONFIG)
    after = stored_arrays(tmp_path / "m")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_another_configuration_is_refused(tmp_path: Path, encoder: FakeEncoder, small_commits: None) -> None:
    interrupted(tmp_path / "m", encoder, documents(40, 12), 30)
    with pytest.raises(InputError, match=r"other settings; use TreeConfig\(chunk_tokens=40, fanout=8.*or another path"):
        build(tmp_path / "m", documents(40, 12), encoder, TreeConfig(chunk_tokens=40, fanout=9))


@pytest.mark.parametrize("other", [FakeEncoder("another"), FakeEncoder(dimension=16)])
def test_another_encoder_is_refused(
    tmp_path: Path, encoder: FakeEncoder, small_commits: None, other: FakeEncoder
) -> None:
    interrupted(tmp_path / "m", encoder, documents(40, 12), 30)
    with pytest.raises(EncoderMismatch, match=r"made with encoder 'fake' \(weights .*use the first or build a new"):
        build(tmp_path / "m", documents(40, 12), other, CONFIG)


def test_a_finished_memory_is_not_built_again(tmp_path: Path, encoder: FakeEncoder) -> None:
    build(tmp_path / "m", documents(10), encoder, CONFIG)
    for given_documents in (documents(10), documents(11), []):
        with pytest.raises(StoreError, match="a memory is there already; choose another path or remove it first"):
            build(tmp_path / "m", given_documents, encoder, CONFIG)
    assert Store.open(tmp_path / "m").info().documents == 10


def test_a_build_stopped_while_it_wrote_the_image_continues(
    tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_documents = documents(11)
    build(tmp_path / "whole", given_documents[:10], encoder, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(building, "build_image", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build(tmp_path / "m", given_documents[:10], encoder, CONFIG)
    with pytest.raises(StoreError, match="a memory is there already"):
        build(tmp_path / "m", given_documents, encoder, CONFIG)
    others = [given_documents[0], *given_documents[2:], given_documents[1]]
    for other, config in [(given_documents[:9], CONFIG), (others, CONFIG), (given_documents[:10], TreeConfig())]:
        with pytest.raises(StoreError, match="a memory is there already"):
            build(tmp_path / "m", other, encoder, config)
    build(tmp_path / "m", given_documents[:10], encoder, CONFIG)
    assert_same(tmp_path / "m", tmp_path / "whole")
    assert len(list((tmp_path / "m" / "cache").iterdir())) == 1


@pytest.mark.parametrize("then", [10, 11, 9])
def test_a_build_stopped_before_the_memory_was_visible_continues(
    tmp_path: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch, then: int
) -> None:
    """All was written but not published: the memory is whole, whatever documents come next."""
    given_documents = documents(11)
    build(tmp_path / "whole", given_documents[:10], encoder, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build(tmp_path / "m", given_documents[:10], encoder, CONFIG)
    if then == 10:
        build(tmp_path / "m", given_documents[:then], encoder, CONFIG)
    else:
        with pytest.raises(StoreError, match="a memory is there already"):
            build(tmp_path / "m", given_documents[:then], encoder, CONFIG)
    assert_same(tmp_path / "m", tmp_path / "whole")
    Store.open(tmp_path / "m").verify()
    memory = Memory.open(tmp_path / "m", encoder=encoder)
    assert memory.search("violin number 1", k=1).hits[0].document.id == "doc-1"


def test_a_book_does_not_keep_others_from_being_committed(
    tmp_path: Path, encoder: FakeEncoder, small_commits: None
) -> None:
    book = Document("book", documents(1, 600)[0].text)

    class Failing(FakeEncoder):
        def encode(self, texts: Sequence[str], *, precise: bool = False) -> np.ndarray:
            if any(text in book.text for text in texts):
                raise Stop
            return super().encode(texts, precise=precise)

    with pytest.raises(Stop):
        build(tmp_path / "m", [*documents(4)[1:], book], Failing(), CONFIG)
    assert Store.open(tmp_path / "m").info().documents == 3


def test_cutting_ahead_gives_the_same_memory(
    tmp_path: Path, encoder: FakeEncoder, small_commits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "one", documents(12), encoder, CONFIG)
    monkeypatch.setattr(FakeEncoder, "on_gpu", True)
    build(tmp_path / "other", documents(12), encoder, CONFIG)
    assert_same(tmp_path / "one", tmp_path / "other")

    def failing() -> Iterator[Document]:
        yield from documents(12)[:6]
        raise Stop

    with pytest.raises(Stop):  # of the thread that reads them
        build(tmp_path / "third", failing(), encoder, CONFIG)
    build(tmp_path / "third", documents(12), encoder, CONFIG)
    assert_same(tmp_path / "one", tmp_path / "third")


# ---- what lies at the path


@pytest.mark.parametrize("kind", ["file", "folder", "folder with a store", "repository of git"])
def test_something_else_is_left_alone(tmp_path: Path, encoder: FakeEncoder, kind: str) -> None:
    path = tmp_path / "m"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        if kind == "folder with a store":
            (path / "store").mkdir()
            (path / "store" / "stock.csv").write_text("mine")
        else:
            (path / (".git" if kind != "folder" else "thesis.txt")).write_text("mine")
    with pytest.raises(StoreError, match="there is something else at this path; choose another"):
        build(path, documents(3), encoder, CONFIG)
    assert [p.read_text() for p in [path, *path.rglob("*")] if p.is_file()] == ["mine"]


def test_an_empty_folder_will_do(tmp_path: Path, encoder: FakeEncoder) -> None:
    build(tmp_path, documents(3), encoder, CONFIG)
    assert Store.open(tmp_path).finished


def test_what_a_killed_creation_left_will_do(tmp_path: Path, encoder: FakeEncoder) -> None:
    (tmp_path / "m" / "creating-x" / "work" / "store").mkdir(parents=True)
    (tmp_path / "m" / "build.lock").touch()
    build(tmp_path / "m", documents(3), encoder, CONFIG)
    assert Store.open(tmp_path / "m").finished


def test_two_builds_of_one_memory(tmp_path: Path, encoder: FakeEncoder) -> None:
    (tmp_path / "m").mkdir()
    with FileLock(tmp_path / "m" / "build.lock"), pytest.raises(StoreError, match="another process is writing"):
        build(tmp_path / "m", documents(3), encoder, CONFIG)
    build(tmp_path / "m", documents(3), encoder, CONFIG)


def test_a_moved_memory_is_the_same(tmp_path: Path, encoder: FakeEncoder, small_commits: None) -> None:
    """Nothing stored depends on where the memory lies, finished or not."""
    given_documents = documents(40, 12)
    interrupted(tmp_path / "a", encoder, given_documents, 30)
    shutil.move(tmp_path / "a", tmp_path / "b")
    build(tmp_path / "b", given_documents, encoder, CONFIG)
    shutil.move(tmp_path / "b", tmp_path / "c")
    assert Memory.open(tmp_path / "c", encoder=encoder).search("violin number 11", k=1).hits[0].document.id == "doc-11"


def test_a_failing_reader_is_told_as_it_is(tmp_path: Path, encoder: FakeEncoder) -> None:
    """What the stream of documents raises is no damage of the memory."""

    def stream() -> Iterator[Document]:
        yield Document("a", "words")
        raise ValueError("my own mistake")

    with pytest.raises(ValueError, match=r"^my own mistake$") as caught:
        build(tmp_path / "m", stream(), encoder, CONFIG)
    assert not isinstance(caught.value, TreememError)
