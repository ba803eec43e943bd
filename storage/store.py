"""The truth: one Icechunk repository per memory, with Zarr arrays inside (see `schema`)."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import icechunk
import numpy as np
import zarr
import zarr.errors
from jaxtyping import Float, Int

from treemem.config import FORMAT_VERSION, TreeConfig
from treemem.errors import (
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
from treemem.storage.levels import Level
from treemem.storage.schema import HIERARCHY_PARTS, ArraySpec, chunk_arrays, create_array, document_arrays, level_arrays
from treemem.types import Document, Progress, no_progress

State = Literal["reading", "complete"]

_BUILD_BRANCH = "build"
_NO_SPACE = ("no space left", "os error 28", "quota exceeded")
_NO_PERMISSION = ("permission denied", "read-only file system", "operation not permitted")
_DAMAGE = (icechunk.IcechunkError, ValueError, RuntimeError, EOFError)
"""What icechunk, zarr and the codecs raise over data that they cannot read."""
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
    except Exception as error:
        if isinstance(error, (OSError, *damage)) or type(error).__name__ == _PANIC:
            raise _explained(path, error) from error
        raise


def _explained(path: Path, error: Exception) -> StoreError:
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or any(mark in text.lower() for mark in _NO_SPACE):
        return OutOfSpace(f"{path}: the disk is full; free some space and run the same command again, it continues")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or any(mark in text.lower() for mark in _NO_PERMISSION):
        return StoreError(f"{path}: permission denied; check who owns the folder and whether it may be written")
    lines = [line.strip(" |\n").removeprefix("x ") for line in text.splitlines() if line.strip(" |\n")]
    reason = lines[0][:200] if lines else type(error).__name__
    if isinstance(error, zarr.errors.NodeNotFoundError):  # also an OSError, of zarr's own making
        reason = "arrays are missing"
    elif isinstance(error, OSError):
        return StoreError(f"{path}: {error.strerror or reason}; check the path and the disk")
    return DamagedMemory(
        f"{path}: stored data cannot be read ({reason}); restore the folder from a copy or build it again"
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
    chunks: int
    levels: tuple[int, ...]
    """Number of elements of each level, chunks first."""
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
    record = document_record(document)
    return hashlib.sha256(len(record).to_bytes(8, "little") + record + document.text.encode()).digest()


def _byte_spans(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
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
    """A memory on disk. A build writes to a branch of its own; `main` moves when the memory is whole."""

    def __init__(self, path: Path, repository: icechunk.Repository) -> None:
        """Wrap an open repository; `create`, `open` and `resume` open one."""
        self.path = path
        self._repository = repository

    # ---- opening

    @staticmethod
    def _storage(path: Path) -> icechunk.Storage:
        # At every opening icechunk prints, on standard output, a warning of concurrent commits on a local disk; builds
        # take a lock against them. Whoever set icechunk's own variable hears what they asked for.
        icechunk.set_logs_filter(os.environ.get("ICECHUNK_LOG", _QUIET))
        return icechunk.local_filesystem_storage(str(path / "store"))

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether something that looks like a memory lies at `path`."""
        with guard(path):
            try:
                inside = os.listdir(path / "store")
            except (FileNotFoundError, NotADirectoryError):
                return False
            return "refs" in inside or "snapshots" in inside

    @classmethod
    def create(
        cls, path: Path, config: TreeConfig, encoder: dict[str, Any], hierarchy: tuple[bytes, bytes] | None = None
    ) -> Store:
        """Make an empty memory and begin its build.

        Args:
            path: a folder that does not exist yet or is empty.
            config: how the tree is built.
            encoder: name, dimension and weights' hash of encoder 1.
            hierarchy: configuration and weights of a trained hierarchy that the tree will be grown with.
        """
        with guard(path):
            path.mkdir(parents=True, exist_ok=True)
            # Made aside and moved into place, so that a killed process leaves no half of a repository.
            with work_folder(path, "creating-") as work:
                repository = icechunk.Repository.create(cls._storage(work))
                repository.create_branch(_BUILD_BRANCH, repository.lookup_branch("main"))
                session = repository.writable_session(_BUILD_BRANCH)
                root = zarr.create_group(session.store)
                for name, spec in {**document_arrays(), **chunk_arrays(int(encoder["dimension"]))}.items():
                    create_array(root, name, spec)
                if hierarchy is not None:
                    _write_hierarchy(root, hierarchy)
                root.attrs.update(
                    {"format": FORMAT_VERSION, "state": "reading", "config": asdict(config), "encoder": encoder}
                )
                session.commit("begin")
                os.replace(work / "store", path / "store")
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a memory.

        Raises:
            NotAMemory: there is none.
            NewerFormat: it was written by a later treemem.
            DamagedMemory: its root cannot be read.
        """
        if not cls.exists(path):
            what = "there is nothing there" if not path.exists() else "this is no memory"
            raise NotAMemory(f"{path}: {what}; make one with: treemem build {path} PATH…")
        remove_stale_work(path)
        with guard(path, _METADATA_DAMAGE):
            store = cls(path, icechunk.Repository.open(cls._storage(path)))
            version = store._root().attrs.get("format")
        if not isinstance(version, int):
            raise NotAMemory(f"{path}: this is no treemem memory; choose another path")
        if version > FORMAT_VERSION:
            raise NewerFormat(
                f"{path}: written in format {version}, this treemem reads up to {FORMAT_VERSION}; "
                "run: pip install --upgrade treemem"
            )
        return store

    @property
    def finished(self) -> bool:
        """Whether the build came to its end."""
        with guard(self.path):
            return _BUILD_BRANCH not in self._repository.list_branches()

    def _branch(self) -> str:
        return "main" if self.finished else _BUILD_BRANCH

    def _root(self) -> Any:  # a zarr.Group; what it gives is typed as array or group
        return zarr.open_group(self._repository.readonly_session(self._branch()).store, mode="r")

    @contextmanager
    def _transaction(self, message: str) -> Iterator[Any]:
        """Changes that are committed together, or not at all."""
        with guard(self.path):
            session = self._repository.writable_session(self._branch())
            yield zarr.open_group(session.store, mode="r+")
            session.commit(message)

    # ---- reading

    def info(self) -> StoreInfo:
        """What the root says: configuration, encoder, counts, snapshot."""
        with guard(self.path, _METADATA_DAMAGE):
            root = self._root()
            attributes = root.attrs.asdict()
            digests = attributes.get("digests")
            if digests is not None and digests["attributes"] != _attributes_digest(attributes):
                raise self._damaged("the memory's settings")
            config = TreeConfig(**attributes["config"])
            levels = [root["chunks/spans"].shape[0]]
            while (name := f"levels/{len(levels) + 1}/vectors") in root:
                levels.append(root[name].shape[0])
            return StoreInfo(
                format=attributes["format"],
                state=attributes["state"],
                config=config,
                encoder=attributes["encoder"],
                documents=root["documents/text_ends"].shape[0],
                chunks=levels[0],
                levels=tuple(levels),
                dimension=int(attributes["encoder"]["dimension"]),
                snapshot=self._repository.lookup_branch(self._branch()),
            )

    def require_finished(self) -> None:
        """Raise UnfinishedMemory where the build was interrupted."""
        if not self.finished:
            raise UnfinishedMemory(f"{self.path}: its build was interrupted; run the same build again, it continues")

    def array(self, name: str) -> zarr.Array[Any]:
        """One array by its path in the hierarchy."""
        with guard(self.path, _METADATA_DAMAGE):
            array = self._root().get(name)
        if not isinstance(array, zarr.Array):
            raise DamagedMemory(f"{self.path}: {name} is missing; restore the folder from a copy or build it again")
        return array

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of an array."""
        array = self.array(name)
        with guard(self.path):
            return np.asarray(array[start : array.shape[0] if stop is None else stop])

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
            Level(*(self.read(f"levels/{k}/{part}") for part in ("offsets", "children", "vectors")))
            for k in range(2, count + 1)
        ]

    def hierarchy(self) -> tuple[bytes, bytes] | None:
        """Configuration and weights of the trained hierarchy, None where the tree is untrained."""
        with guard(self.path, _METADATA_DAMAGE):
            if "hierarchy" not in self._root():
                return None
        config, weights = (self.read(f"hierarchy/{part}").tobytes() for part in HIERARCHY_PARTS)
        return config, weights

    def verify(self, progress: Progress = no_progress) -> None:
        """Compare every array with the digest that was recorded when the memory was finished.

        Storage chunks have checksums of their own; this also notices damage to the files that say where they are.

        Raises DamagedMemory.
        """
        with guard(self.path, _METADATA_DAMAGE):
            root = self._root()
            digests = root.attrs.asdict().get("digests")
            if digests is None:  # written before there were any
                return
            expected = digests["arrays"]
            for name in expected.keys() - set(_array_names(root)):
                raise self._damaged(name)
            for name, digest in _digests(root, sorted(expected), progress):
                if digest != expected[name]:
                    raise self._damaged(name)

    def _damaged(self, what: str) -> DamagedMemory:
        return DamagedMemory(
            f"{self.path}: {what} is not what was written; restore the folder from a copy or build it again"
        )

    # ---- building

    def remove_leftovers(self) -> None:
        """Remove what writers that were killed, or had no room, left behind. Only where no other process writes."""
        with guard(self.path):
            self._repository.garbage_collect(datetime.now(UTC))

    def append(self, documents: Sequence[NewDocument], encodings: Float[np.ndarray, "chunks d"]) -> None:
        """Commit documents with their chunks and what the encoder gave for them, in order."""
        records = [document_record(new.document) for new in documents]
        texts = [new.document.text.encode() for new in documents]
        spans = [
            (*characters, *bytes_)
            for new in documents
            for characters, bytes_ in zip(new.spans, _byte_spans(new.document.text, new.spans), strict=True)
        ]
        with self._transaction(f"read {len(documents):,} documents") as root:
            parts: dict[str, np.ndarray] = {
                "documents/text": np.frombuffer(b"".join(texts), np.uint8),
                "documents/text_ends": root["documents/text"].shape[0] + _ends([len(t) for t in texts]),
                "documents/records": np.frombuffer(b"".join(records), np.uint8),
                "documents/record_ends": root["documents/records"].shape[0] + _ends([len(r) for r in records]),
                "documents/hashes": np.frombuffer(
                    b"".join(document_hash(new.document) for new in documents), np.uint8
                ).reshape(-1, 32),
                "documents/chunk_ends": root["chunks/spans"].shape[0] + _ends([len(new.spans) for new in documents]),
                "chunks/spans": np.array(spans, np.int64).reshape(-1, 4),
                "chunks/encodings": encodings.astype(np.float16),
            }
            for name, rows in parts.items():
                if len(rows):
                    root[name].append(rows)

    def finish(self, levels: Sequence[Level], message: str, progress: Progress = no_progress) -> str:
        """Write the nodes and make the memory visible: one commit. Returns the snapshot."""
        with self._transaction(message) as root:
            dimension = root["chunks/encodings"].shape[1]
            for number, level in enumerate(levels, 2):
                parts = {"offsets": level.offsets, "children": level.children, "vectors": level.vectors}
                for name, spec in level_arrays(number, dimension).items():
                    rows = parts[name.rsplit("/", 1)[1]]
                    create_array(root, name, spec, len(rows))[:] = rows
            root.attrs["digests"] = {
                "attributes": _attributes_digest(root.attrs.asdict()),
                "arrays": dict(_digests(root, _array_names(root), progress)),
            }
            root.attrs["state"] = "complete"
        return self.publish()

    def retrain(
        self,
        vectors: Sequence[Float[np.ndarray, "_ d"]],
        hierarchy: tuple[bytes, bytes],
        message: str,
        encodings: Float[np.ndarray, "chunks d"] | None = None,
    ) -> str:
        """Put a hierarchy in place of the one before, with the nodes' vectors that it gives: one commit.

        Args:
            vectors: of every level of nodes, level 2 first; which children they have does not change.
            hierarchy: configuration and weights.
            message: of the commit.
            encodings: what encoder 1 gives for the chunks, where it has been tuned.

        Returns:
            The new snapshot.
        """
        with self._transaction(message) as root:
            changed = []
            replaced = {f"levels/{number}/vectors": rows for number, rows in enumerate(vectors, 2)}
            if encodings is not None:
                replaced["chunks/encodings"] = encodings
            for name, rows in replaced.items():
                if root[name].shape != rows.shape:
                    raise AssertionError(f"{name}: vectors of shape {rows.shape} for {root[name].shape}")
                root[name][:] = rows
                changed.append(name)
            changed += _write_hierarchy(root, hierarchy)
            digests = root.attrs["digests"]
            digests["arrays"].update(_digests(root, changed, no_progress))
            root.attrs["digests"] = digests
        with guard(self.path):
            return self._repository.lookup_branch("main")

    def publish(self) -> str:
        """Make a memory visible whose nodes are written. Returns the snapshot.

        A part of `finish`; called again where a build was killed just before it.
        """
        with guard(self.path):
            snapshot = self._repository.lookup_branch(_BUILD_BRANCH)
            self._repository.reset_branch("main", snapshot)
            self._repository.delete_branch(_BUILD_BRANCH)
        return snapshot


def _write_hierarchy(root: Any, hierarchy: tuple[bytes, bytes]) -> list[str]:
    """Write configuration and weights as arrays of bytes. Returns the arrays' names."""
    names = []
    for part, data in zip(HIERARCHY_PARTS, hierarchy, strict=True):
        name = f"hierarchy/{part}"
        if name in root:
            del root[name]
        create_array(root, name, ArraySpec("uint8", (), 1 << 20), len(data))[:] = np.frombuffer(data, np.uint8)
        names.append(name)
    return names


def _array_names(root: Any) -> list[str]:
    return sorted(name for name, member in root.members(max_depth=None) if isinstance(member, zarr.Array))


def _digests(root: Any, names: Sequence[str], progress: Progress) -> Iterator[tuple[str, str]]:
    """SHA-256 of each array's type, shape and values."""
    arrays = {name: root[name] for name in names}
    total = sum(array.nbytes for array in arrays.values()) / 1e6
    done = 0
    for name, array in arrays.items():
        digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        rows = array.chunks[0] * 8
        for start in range(0, array.shape[0], rows):
            if start:
                progress("checking (MB)", done / 1e6, total)
            block = np.ascontiguousarray(array[start : start + rows])
            digest.update(block.view(np.uint8).data)
            done += block.nbytes
        yield name, digest.hexdigest()


def _attributes_digest(attributes: dict[str, Any]) -> str:
    chosen = {name: attributes[name] for name in _DIGESTED_ATTRIBUTES}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def _ends(lengths: list[int]) -> Int[np.ndarray, " n"]:
    return np.cumsum(np.array(lengths, np.int64))
