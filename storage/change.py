"""What an edit changes: told once, written to the store and followed by the serving image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float16, Int32

from treemem.storage.levels import Level, document_runs
from treemem.storage.schema import ENDS, READER, REMOVED, chunk_arrays, document_arrays
from treemem.storage.store import NewDocument, Store, write_documents, write_levels
from treemem.storage.writer import Writer, together
from treemem.types import Progress, no_progress


@dataclass(frozen=True)
class LevelChange:
    """What an edit makes of one level of nodes."""

    size: int
    """How many nodes there are afterwards, numbered from 0."""
    nodes: Int32[np.ndarray, " m"]
    """The numbers of the nodes that have changed, rising; all those that are new among them."""
    children: tuple[Int32[np.ndarray, " _"], ...]
    """The numbers of their children, rising."""
    vectors: Float16[np.ndarray, "m d"]


@dataclass(frozen=True)
class TreeChange:
    """What an edit makes of a tree: changes of its levels, level 2 first, or another tree in its place."""

    levels: tuple[LevelChange, ...] = ()
    regrown: tuple[Level, ...] | None = None


@dataclass(frozen=True)
class Change:
    """One edit of a memory."""

    added: tuple[NewDocument, ...]
    """Documents that come behind those that are there."""
    encodings: Float16[np.ndarray, "n d"]
    """What encoder 1 gave for their chunks."""
    vectors: Float16[np.ndarray, "n d"]
    """Their level-1 vectors."""
    removed: tuple[int, ...]
    """Numbers of documents that go, rising."""
    tree: TreeChange
    status: np.ndarray
    """Of all documents afterwards, uint8."""
    reader: Float16[np.ndarray, "n windows d"] | None = None
    """The reader vectors of the new chunks, where the memory keeps them."""


def write_change(store: Store, change: Change, message: str, metadata: dict[str, object]) -> str:
    """Commit a change. Returns the new snapshot."""
    with store.transaction(message, metadata) as writer:
        if change.removed:
            _erase(writer, np.array(change.removed))
        if change.added:
            write_documents(writer, change.added, change.encodings, change.reader)
        before = writer.array("documents/status")[:]
        places = np.flatnonzero(before != change.status)
        if len(places):
            writer.put("documents/status", places, change.status[places])
        if change.tree.regrown is not None:
            write_levels(writer, change.tree.regrown, store.info().config.fanout)
        together([c for n, level in enumerate(change.tree.levels, 2) for c in _level_writes(writer, n, level)])
    return store.snapshot


def close_gaps(store: Store, writer: Writer, progress: Progress = no_progress) -> None:
    """Write the arrays of documents and chunks anew without what was removed, in bounded memory.

    Args:
        store: what is read.
        writer: where it is written.
        progress: told about documents.
    """
    status = store.read("documents/status")
    kept = status != REMOVED
    if kept.all():
        return
    dimension, reader = store.info().dimension, READER in writer.digests
    ends = {of: store.read(f"documents/{name}") for name, of in ENDS.items()}
    for path, spec in {**document_arrays(), **chunk_arrays(dimension, reader=reader)}.items():
        writer.create(path, spec)
    for name, of in ENDS.items():
        writer.append(f"documents/{name}", np.cumsum(np.diff(ends[of], prepend=0)[kept]))
    writer.append("documents/status", status[kept])
    writer.append("documents/hashes", store.read("documents/hashes")[kept])
    for of, lasts in ends.items():
        paths = tuple(chunk_arrays(dimension, reader=reader)) if of == "chunks/spans" else (of,)
        for first, last in document_runs(lasts, 1 << 14 if of == "chunks/spans" else 1 << 24):
            progress(f"closing gaps in {of}", first, len(status))
            begin = int(lasts[first - 1]) if first else 0
            rows = np.repeat(kept[first:last], np.diff(lasts[first:last], prepend=begin))
            for path in paths:
                writer.append(path, store.read(path, begin, int(lasts[last - 1]))[rows])


def _erase(writer: Writer, documents: np.ndarray) -> None:
    """Put zeros in place of all that documents have; their numbers stay, so that no other's changes."""
    for ends, arrays in {
        "documents/text_ends": ("documents/text",),
        "documents/record_ends": ("documents/records",),
        "documents/chunk_ends": ("chunks/spans", "chunks/encodings", *([READER] if READER in writer.digests else [])),
    }.items():
        lasts = np.asarray(writer.array(ends)[:])
        begins = np.where(documents > 0, lasts[documents - 1], 0)
        places = np.concatenate([np.arange(a, b) for a, b in zip(begins, lasts[documents], strict=True)])
        for path in arrays:
            _zero(writer, path, places)
    _zero(writer, "documents/hashes", documents)


def _zero(writer: Writer, path: str, places: np.ndarray) -> None:
    if len(places):
        array = writer.array(path)
        writer.put(path, places, np.zeros((len(places), *array.shape[1:]), array.dtype))


def _level_writes(writer: Writer, number: int, change: LevelChange) -> list[Callable[[], None]]:
    """What writes a level's changes, one call for each of its arrays."""
    paths = [f"levels/{number}/{part}" for part in ("children", "vectors")]
    before, fanout = writer.array(paths[0]).shape
    slots = np.full((len(change.nodes), fanout), -1, np.int32)
    for row, children in zip(slots, change.children, strict=True):
        row[: len(children)] = children
    old = change.nodes < before

    def write(path: str, rows: np.ndarray) -> None:
        if old.any():
            writer.put(path, change.nodes[old], rows[old])
        writer.append(path, rows[~old])
        if change.size < before:
            writer.truncate(path, change.size)

    return [partial(write, path, rows) for path, rows in zip(paths, (slots, change.vectors), strict=True)]
