"""The truth: one Icechunk repository per memory, with Zarr arrays inside (see `schema`)."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import icechunk
import numpy as np
import zarr
import zarr.errors
from jaxtyping import Float, Float16
from zarr.core.sync import sync

from treemem.config import FORMAT_VERSION, TreeConfig
from treemem.errors import (
    Conflict,
    DamagedMemory,
    InputError,
    NewerFormat,
    NotAMemory,
    OutOfSpace,
    StoreError,
    TreememError,
    UnfinishedMemory,
)
from treemem.storage.files import remove_stale_work, work_folder
from treemem.storage.levels import Level, Spread
from treemem.storage.remote import named, storage_of, url_of
from treemem.storage.schema import (
    ENDS,
    HIERARCHY_PARTS,
    MASKED,
    READER,
    REMOVED,
    SPREAD_PARTS,
    ArraySpec,
    chunk_arrays,
    document_arrays,
    level_arrays,
)
from treemem.storage.writer import Writer, digest, rows_of
from treemem.types import Document, Progress, no_progress

State = Literal["reading", "complete"]

MAIN = "main"
"""The branch that a memory is built on, and opened at where nothing else is asked for."""
BUILD = "build"
"""The branch that an unfinished build writes to."""
_NO_SPACE = ("no space left", "os error 28", "quota exceeded")
_NO_PERMISSION = ("permission denied", "read-only file system", "operation not permitted")
_DAMAGE = (icechunk.IcechunkError, ValueError, RuntimeError, EOFError)
"""What icechunk, zarr and the codecs raise over data that they cannot read."""
IMAGE_DAMAGE = (*_DAMAGE, IndexError)
"""… and what NumPy raises where a number in a serving image leads nowhere."""
_METADATA_DAMAGE = (*_DAMAGE, KeyError, TypeError, AttributeError, IndexError)
"""… and while they make sense of metadata."""
_PANIC = "RustPanic"
"""icechunk meets a damaged snapshot now and then with a panic, whose class cannot be imported."""
_QUIET = "warn,icechunk::storage::object_store=error"
_DIGESTED_ATTRIBUTES = ("format", "config", "encoder")

# A thread of icechunk's may still hold on to Python objects of the last read when the interpreter goes, and then aborts
# the process although all went well: 7 of 30 scripts that read and end at once, none of 30 with this pause.
atexit.register(time.sleep, 0.02)


@contextmanager
def guard(path: Path, damage: tuple[type[Exception], ...] = _DAMAGE) -> Iterator[None]:
    """Turn what the storage libraries raise into one-line errors that name the memory.

    Args:
        path: the memory.
        damage: exceptions that mean damaged data here; others are programming errors and pass.
    """
    try:
        yield
    except TreememError:
        raise
    except icechunk.ConflictError as error:
        raise Conflict(f"{named(path)}: another process has committed meanwhile; run the same command again") from error
    except Exception as error:
        if isinstance(error, (OSError, *damage)) or type(error).__name__ == _PANIC:
            raise _explained(path, error) from error
        raise


def _explained(path: Path, error: Exception) -> StoreError:
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or any(mark in text.lower() for mark in _NO_SPACE):
        return OutOfSpace(
            f"{named(path)}: the disk is full; free some space and run the same command again, it continues"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or any(mark in text.lower() for mark in _NO_PERMISSION):
        return StoreError(f"{named(path)}: permission denied; check who owns the folder and whether it may be written")
    lines = [line.strip(" |\n").removeprefix("x ") for line in text.splitlines() if line.strip(" |\n")]
    reason = lines[0][:200] if lines else type(error).__name__
    if "snapshot" in reason.lower() and "not found" in reason.lower():
        return DamagedMemory(
            f"{named(path)}: its snapshot is not there any more ({reason}); open the memory again, since forget "
            "removes older ones, or restore the folder from a copy"
        )
    if isinstance(error, zarr.errors.NodeNotFoundError):  # also an OSError, of zarr's own making
        reason = "arrays are missing"
    elif isinstance(error, OSError):
        return StoreError(f"{named(path)}: {error.strerror or reason}; check the path and the disk")
    return DamagedMemory(
        f"{named(path)}: stored data cannot be read ({reason}); restore the folder from a copy or build it again"
    )


@dataclass(frozen=True)
class NewDocument:
    """A document with its chunks, ready to be stored."""

    document: Document
    spans: list[tuple[int, int]]
    """Characters of each chunk."""


@dataclass(frozen=True)
class StoreInfo:
    """What the root of a memory says of it."""

    format: int
    state: State
    config: TreeConfig
    encoder: dict[str, Any]
    documents: int
    """Those that are there, masked ones included."""
    masked: int
    """Documents that are hidden."""
    removed: int
    """Documents that were removed since their numbers were last given anew."""
    chunks: int
    """Those of the documents that are there."""
    levels: tuple[int, ...]
    """Number of elements of each level, chunks first, those of removed documents included."""
    dimension: int
    snapshot: str


def storable(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def document_record(document: Document) -> bytes:
    """The stored JSON of a document without its text."""
    record = {"id": document.id, "title": document.title, "metadata": dict(document.metadata)}
    try:
        return json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    except (TypeError, ValueError, UnicodeEncodeError) as error:
        raise InputError(f"document {document.id!r}: its metadata cannot be stored as JSON ({error})") from error


def document_hash(document: Document) -> bytes:
    """SHA-256 of a document's record and text."""
    return content_hash(document_record(document), document.text.encode())


def content_hash(record: bytes, text: bytes) -> bytes:
    """SHA-256 of a document's stored record and text."""
    return hashlib.sha256(len(record).to_bytes(8, "little") + record + text).digest()


def byte_spans(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Byte positions in UTF-8 of ordered, disjoint character spans."""
    if text.isascii():
        return list(spans)
    out = []
    character = byte = 0
    for start, end in spans:
        byte += len(text[character:start].encode())
        stop = byte + len(text[start:end].encode())
        out.append((byte, stop))
        character, byte = end, stop
    return out


class Store:
    """A memory on disk, at the tip of a branch or at one snapshot.

    A build writes to a branch of its own; `main` moves when the memory is whole.
    """

    def __init__(
        self, path: Path, repository: icechunk.Repository, branch: str | None = MAIN, snapshot: str | None = None
    ) -> None:
        """Wrap an open repository; `create`, `open` and `at` give one.

        Args:
            path: the memory.
            repository: its Icechunk repository.
            branch: what is read, and written to; None where a snapshot is read that nothing can be written behind.
            snapshot: read this snapshot and not the branch's tip.
        """
        self.path = path
        self.repository = repository
        self.branch = branch
        self._snapshot = snapshot
        self._opened: tuple[str, Any] | None = None  # the root of the snapshot that was read last

    # ---- opening

    @staticmethod
    def _storage(path: Path) -> icechunk.Storage:
        # At every opening icechunk prints, on standard output, a warning of concurrent commits on a local disk; builds
        # take a lock against them. Whoever set icechunk's own variable hears what they asked for.
        icechunk.set_logs_filter(os.environ.get("ICECHUNK_LOG", _QUIET))
        return storage_of(path)

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether something that looks like a memory lies at `path`."""
        with guard(path):
            if url_of(path) is not None:
                return icechunk.Repository.exists(cls._storage(path))
            try:
                inside = os.listdir(path / "store")
            except (FileNotFoundError, NotADirectoryError):
                return False
            return "refs" in inside or "snapshots" in inside

    @classmethod
    def create(
        cls,
        path: Path,
        config: TreeConfig,
        encoder: dict[str, Any],
        hierarchy: tuple[bytes, bytes] | None = None,
        *,
        reader: bool = False,
    ) -> Store:
        """Make an empty memory and begin its build.

        Args:
            path: a folder that does not exist yet or is empty.
            config: how the tree is built.
            encoder: name, dimension and weights' hash of encoder 1.
            hierarchy: configuration and weights of a trained hierarchy that the tree will be grown with.
            reader: whether reader vectors will be kept.
        """
        with guard(path):
            path.mkdir(parents=True, exist_ok=True)
            if url_of(path) is not None:
                cls._begin(cls._storage(path), config, encoder, hierarchy, reader)
            else:  # made aside and moved into place, so that a killed process leaves no half of a repository
                with work_folder(path, "creating-") as work:
                    cls._begin(cls._storage(work), config, encoder, hierarchy, reader)
                    os.replace(work / "store", path / "store")
        return cls.open(path)

    @staticmethod
    def _begin(
        storage: icechunk.Storage,
        config: TreeConfig,
        encoder: dict[str, Any],
        hierarchy: tuple[bytes, bytes] | None,
        reader: bool,
    ) -> None:
        """Make an empty repository on which a build can go on."""
        repository = icechunk.Repository.create(storage)
        repository.create_branch(BUILD, repository.lookup_branch(MAIN))
        session = repository.writable_session(BUILD)
        root = zarr.create_group(session.store)
        root.attrs.update({"format": FORMAT_VERSION, "state": "reading", "config": asdict(config), "encoder": encoder})
        writer = Writer(root, {})
        for name, spec in {**document_arrays(), **chunk_arrays(int(encoder["dimension"]), reader=reader)}.items():
            writer.create(name, spec)
        if hierarchy is not None:
            _write_hierarchy(writer, hierarchy)
        close(writer)
        session.commit("begin")

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a memory.

        Raises:
            NotAMemory: there is none.
            NewerFormat: it was written by a later treemem.
            DamagedMemory: its root cannot be read.
        """
        if not cls.exists(path):
            what = "this is no memory" if path.exists() and url_of(path) is None else "there is nothing there"
            raise NotAMemory(f"{named(path)}: {what}; make one with: treemem build {named(path)} PATH…")
        remove_stale_work(path)
        with guard(path, _METADATA_DAMAGE):
            store = cls(path, icechunk.Repository.open(cls._storage(path)))
            store.branch = MAIN if store.finished else BUILD
            version = store._root().attrs.get("format")
        if not isinstance(version, int):
            raise NotAMemory(f"{named(path)}: this is no treemem memory; choose another path")
        if version > FORMAT_VERSION:
            raise NewerFormat(
                f"{named(path)}: written in format {version}, this treemem reads up to {FORMAT_VERSION}; "
                "run: pip install --upgrade treemem"
            )
        return store

    @property
    def finished(self) -> bool:
        """Whether the build came to its end."""
        with guard(self.path):
            return BUILD not in self.repository.list_branches()

    def at(self, snapshot: str, branch: str | None = None) -> Store:
        """The same memory at one snapshot, whatever is written later.

        `branch`: what edits go to, whose tip it must be then; None where there are to be none.
        """
        return Store(self.path, self.repository, branch, snapshot)

    @property
    def name(self) -> str:
        """What it is called in messages: its folder, or its URL."""
        return named(self.path)

    def stored_bytes(self) -> int:
        """How many bytes the repository takes; of a remote one those of its arrays alone."""
        with guard(self.path):
            if url_of(self.path) is not None:
                return int(self.repository.total_chunks_storage())
            return sum(file.stat().st_size for file in (self.path / "store").rglob("*") if file.is_file())

    @property
    def snapshot(self) -> str:
        """The snapshot that is read."""
        with guard(self.path):
            return self._snapshot or self.repository.lookup_branch(self.branch or MAIN)

    def _root(self, snapshot: str | None = None) -> Any:  # a zarr.Group; what it gives is typed as array or group
        snapshot = snapshot or self.snapshot
        opened = self._opened
        if opened is None or opened[0] != snapshot:
            session = self.repository.readonly_session(snapshot_id=snapshot)
            opened = self._opened = (snapshot, zarr.open_group(session.store, mode="r"))
        return opened[1]

    @contextmanager
    def transaction(self, message: str, metadata: dict[str, Any] | None = None) -> Iterator[Writer]:
        """Changes that are committed together, or not at all; afterwards the store reads what was committed.

        Args:
            message: of the commit.
            metadata: what changed, kept with the snapshot, which is a step of a build without it.

        Raises:
            StoreError: the branch was written to since this snapshot, or there is none to write to.
        """
        if self.branch is None:
            raise StoreError(
                f"{self.name}: opened at a snapshot of the past, which stays as it is; make a branch of it"
            )
        with guard(self.path):
            session = self.repository.writable_session(self.branch)
            if self._snapshot is not None and session.snapshot_id != self._snapshot:
                raise Conflict(
                    f"{self.name}: branch {self.branch!r} has changed since this snapshot; open the memory again"
                )
            root: Any = zarr.open_group(session.store, mode="r+")
            writer = Writer(root, root.attrs["digests"]["arrays"])
            yield writer
            close(writer)
            if not session.has_uncommitted_changes:  # Icechunk makes no commit of nothing
                root.attrs["touched"] = datetime.now(UTC).isoformat()
            snapshot = session.commit(message, None if metadata is None else {"treemem": metadata})
            if self._snapshot is not None:
                self._snapshot = snapshot

    # ---- reading

    def info(self) -> StoreInfo:
        """What the root says: configuration, encoder, counts, snapshot."""
        with guard(self.path, _METADATA_DAMAGE):
            snapshot = self.snapshot
            root = self._root(snapshot)
            attributes = deepcopy(root.attrs.asdict())  # the root is kept, and what is given away may be changed
            if attributes["digests"]["attributes"] != _attributes_digest(attributes):
                raise self.damaged("the memory's settings")
            levels = [root["chunks/spans"].shape[0]]
            while (name := f"levels/{len(levels) + 1}/vectors") in root:
                levels.append(root[name].shape[0])
            status = np.asarray(root["documents/status"][:])
            removed = status == REMOVED
            gone = np.diff(np.asarray(root["documents/chunk_ends"][:]), prepend=0)[removed] if removed.any() else [0]
            return StoreInfo(
                format=attributes["format"],
                state=attributes["state"],
                config=TreeConfig(**attributes["config"]),
                encoder=attributes["encoder"],
                documents=int((~removed).sum()),
                masked=int((status == MASKED).sum()),
                removed=int(removed.sum()),
                chunks=levels[0] - int(np.sum(gone)),
                levels=tuple(levels),
                dimension=int(attributes["encoder"]["dimension"]),
                snapshot=snapshot,
            )

    def format(self) -> int:
        """The version of the stored layout."""
        with guard(self.path, _METADATA_DAMAGE):
            return int(self._root().attrs["format"])

    def require_finished(self) -> None:
        """Raise UnfinishedMemory where the build was interrupted."""
        if not self.finished:
            raise UnfinishedMemory(f"{self.name}: its build was interrupted; run the same build again, it continues")

    def array(self, name: str) -> zarr.Array[Any]:
        """One array by its path in the hierarchy."""
        with guard(self.path, _METADATA_DAMAGE):
            array = self._root().get(name)
        if not isinstance(array, zarr.Array):
            raise DamagedMemory(f"{self.name}: {name} is missing; restore the folder from a copy or build it again")
        return array

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of an array."""
        array = self.array(name)
        with guard(self.path):
            return np.asarray(array[start : array.shape[0] if stop is None else stop])

    def rows(self, name: str, places: np.ndarray) -> np.ndarray:
        """Some rows of an array, in any order."""
        array = self.array(name)
        with guard(self.path):
            return np.asarray(sync(rows_of(array, places)))

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """An array in runs of `rows` rows."""
        array = self.array(name)
        for start in range(0, array.shape[0], rows):
            with guard(self.path):
                block = np.asarray(array[start : start + rows])
            yield block

    def levels(self) -> list[Level]:
        """All levels of nodes, level 2 first."""
        count = len(self.info().levels)
        return [
            Level.of_slots(*(self.read(f"levels/{k}/{part}") for part in ("children", "vectors")))
            for k in range(2, count + 1)
        ]

    def spread(self) -> Spread:
        """How the chunks' vectors spread, as it was found when the tree was last grown or trained."""
        mean, values, directions = (self.read(f"spread/{part}") for part in SPREAD_PARTS)
        return Spread(mean.astype(np.float32), values, directions)

    def hierarchy(self) -> tuple[bytes, bytes] | None:
        """Configuration and weights of the trained hierarchy, None where the tree is untrained."""
        with guard(self.path, _METADATA_DAMAGE):
            if "hierarchy" not in self._root():
                return None
        config, weights = (self.read(f"hierarchy/{part}").tobytes() for part in HIERARCHY_PARTS)
        return config, weights

    def verify(self, progress: Progress = no_progress) -> None:
        """Raise DamagedMemory for the first array that is not what was written."""
        for name in self.damages(progress):
            raise self.damaged(name)

    def damages(self, progress: Progress = no_progress) -> Iterator[str]:
        """The arrays that do not have the digest that was recorded when they were written, or cannot be read.

        Storage chunks have checksums of their own; this also notices damage to the files that say where they are.

        Raises DamagedMemory where not even the names of the arrays can be read.
        """
        with guard(self.path, _METADATA_DAMAGE):
            root = self._root()
            expected = root.attrs.asdict()["digests"]["arrays"]
            there = set(_array_names(root))
            arrays = {name: root[name] for name in sorted(there & expected.keys())}
        yield from sorted(expected.keys() - there)
        done, total = 0.0, sum(array.nbytes for array in arrays.values()) / 1e6
        for name, array in arrays.items():
            progress("checking (MB)", done, total)
            same = False
            with suppress(DamagedMemory), guard(self.path, _METADATA_DAMAGE):
                same = digest(array) == expected[name]
            if not same:
                yield name
            done += array.nbytes / 1e6

    def damaged(self, what: str) -> DamagedMemory:
        """What to raise where `what` is not as it was written."""
        return DamagedMemory(
            f"{self.name}: {what} is not what was written; restore the folder from a copy or build it again"
        )

    # ---- building

    def remove_leftovers(self) -> None:
        """Remove what writers that were killed, or had no room, left behind. Only where no other process writes."""
        with guard(self.path):
            self.repository.garbage_collect(datetime.now(UTC))

    def append(
        self,
        documents: Sequence[NewDocument],
        encodings: Float[np.ndarray, "chunks d"],
        reader: Float16[np.ndarray, "chunks windows d"] | None = None,
    ) -> None:
        """Commit documents with their chunks and what the encoder gave for them, in order."""
        with self.transaction(f"read {len(documents):,} documents") as writer:
            write_documents(writer, documents, encodings, reader)

    @property
    def keeps_reader_vectors(self) -> bool:
        """Whether reader vectors are stored beside the encodings."""
        with guard(self.path, _METADATA_DAMAGE):
            return READER in self._root()

    def finish(self, levels: Sequence[Level], spread: Spread, message: str, progress: Progress = no_progress) -> str:
        """Write the nodes and make the memory visible: one commit. Returns the snapshot.

        Args:
            levels: level 2 first.
            spread: how the chunks' vectors spread.
            message: of the commit.
            progress: told about levels.
        """
        config = self.info().config
        counts = {"documents": self.info().documents, "chunks": self.info().chunks}
        with self.transaction(message, counts) as writer:
            write_levels(writer, levels, config.fanout, progress)
            write_spread(writer, spread)
            writer.root.attrs["state"] = "complete"
        return self.publish()

    def retrain(
        self,
        vectors: Sequence[Float[np.ndarray, "_ d"]],
        spread: Spread,
        hierarchy: tuple[bytes, bytes],
        message: str,
        encodings: Float[np.ndarray, "chunks d"] | None = None,
    ) -> str:
        """Put a hierarchy in place of the one before, with the nodes' vectors that it gives: one commit.

        Args:
            vectors: of every level of nodes, level 2 first; which children they have does not change.
            spread: how the chunks' vectors spread under it.
            hierarchy: configuration and weights.
            message: of the commit.
            encodings: what encoder 1 gives for the chunks, where it has been tuned; reader vectors, which the tuned
                one would give otherwise, are no longer stored then.

        Returns:
            The new snapshot.
        """
        with self.transaction(message, {"trained": True}) as writer:
            replaced = {f"levels/{number}/vectors": rows for number, rows in enumerate(vectors, 2)}
            if encodings is not None:
                replaced["chunks/encodings"] = encodings
                writer.remove(READER)
            for name, rows in replaced.items():
                if writer.array(name).shape != rows.shape:
                    raise AssertionError(f"{name}: vectors of shape {rows.shape} for {writer.array(name).shape}")
                writer.put(name, np.arange(len(rows)), rows)
            write_spread(writer, spread)
            _write_hierarchy(writer, hierarchy)
        return self.snapshot

    def publish(self) -> str:
        """Make a memory visible whose nodes are written. Returns the snapshot.

        A part of `finish`; called again where a build was killed just before it.
        """
        with guard(self.path):
            snapshot = self.repository.lookup_branch(BUILD)
            self.repository.reset_branch(MAIN, snapshot)
            self.repository.delete_branch(BUILD)
            self.branch = MAIN
        return snapshot


def write_documents(
    writer: Writer,
    documents: Sequence[NewDocument],
    encodings: Float[np.ndarray, "chunks d"],
    reader: Float16[np.ndarray, "chunks windows d"] | None = None,
) -> None:
    """Add documents with their chunks and what the encoder gave for them, in order, behind those that are there.

    Args:
        writer: where to.
        documents: with their chunks.
        encodings: of the chunks.
        reader: their reader vectors, where the memory keeps them.
    """
    parts = document_parts(writer, documents, encodings, reader)
    writer.together(parts, lambda: (writer.appending(path, rows) for path, rows in parts.items()))


def document_parts(
    writer: Writer,
    documents: Sequence[NewDocument],
    encodings: Float[np.ndarray, "chunks d"],
    reader: Float16[np.ndarray, "chunks windows d"] | None = None,
) -> dict[str, np.ndarray]:
    """What `write_documents` appends to each array, by path."""
    if (READER in writer.digests) != (reader is not None):
        raise AssertionError(f"reader vectors given: {reader is not None}, kept: {READER in writer.digests}")
    rows = document_rows(documents, {name: writer.array(of).shape[0] for name, of in ENDS.items()})
    hashes = b"".join(document_hash(new.document) for new in documents)
    return {
        **{f"documents/{name}": rows[name] for name in ("text", "records", *ENDS)},
        "documents/hashes": np.frombuffer(hashes, np.uint8).reshape(-1, 32),
        "documents/status": np.zeros(len(documents), np.uint8),
        "chunks/spans": rows["spans"],
        "chunks/encodings": encodings.astype(np.float16),
        **({} if reader is None else {READER: reader}),
    }


def document_rows(documents: Sequence[NewDocument], before: Mapping[str, int]) -> dict[str, np.ndarray]:
    """What documents add to the arrays of texts, records and spans, and where each ends in these.

    `before`: for each of `ENDS` how long the array is already in which it counts.
    """
    records = [document_record(new.document) for new in documents]
    texts = [new.document.text.encode() for new in documents]
    spans = [
        (*characters, *bytes_)
        for new in documents
        for characters, bytes_ in zip(new.spans, byte_spans(new.document.text, new.spans), strict=True)
    ]
    lengths = {
        "text_ends": [len(text) for text in texts],
        "record_ends": [len(record) for record in records],
        "chunk_ends": [len(new.spans) for new in documents],
    }
    return {
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "records": np.frombuffer(b"".join(records), np.uint8),
        "spans": np.array(spans, np.int64).reshape(-1, 4),
        **{name: before[name] + np.cumsum(np.array(own, np.int64)) for name, own in lengths.items()},
    }


def write_levels(writer: Writer, levels: Sequence[Level], fanout: int, progress: Progress = no_progress) -> None:
    """Put levels of nodes, level 2 first, in place of those that are there."""
    for name in [name for name in writer.digests if name.startswith("levels/")]:
        writer.remove(name)
    for number, level in enumerate(levels, 2):
        progress(f"writing level {number}", number - 2, len(levels))
        parts = {"children": level.slots(fanout), "vectors": level.vectors}
        for name, spec in level_arrays(number, level.vectors.shape[1], fanout).items():
            writer.create(name, spec, parts[name.rsplit("/", 1)[1]])


def write_spread(writer: Writer, spread: Spread) -> None:
    """Put a spread in place of the one before."""
    for part in SPREAD_PARTS:
        rows = np.asarray(getattr(spread, part), np.float64)
        writer.create(f"spread/{part}", ArraySpec("float64", rows.shape[1:], 1 << 10), rows)


def close(writer: Writer) -> None:
    """Record the digests of what was written."""
    attributes = writer.root.attrs.asdict()
    writer.root.attrs["digests"] = {"attributes": _attributes_digest(attributes), "arrays": writer.digests}


def _write_hierarchy(writer: Writer, hierarchy: tuple[bytes, bytes]) -> None:
    """Write configuration and weights as arrays of bytes."""
    for part, data in zip(HIERARCHY_PARTS, hierarchy, strict=True):
        writer.create(f"hierarchy/{part}", ArraySpec("uint8", (), 1 << 20), np.frombuffer(data, np.uint8))


def _array_names(root: Any) -> list[str]:
    return sorted(name for name, member in root.members(max_depth=None) if isinstance(member, zarr.Array))


def _attributes_digest(attributes: dict[str, Any]) -> str:
    chosen = {name: attributes[name] for name in _DIGESTED_ATTRIBUTES}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
