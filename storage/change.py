"""What an edit changes: told once, written to the store and followed by the serving image."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Float16, Int32

from treemem.storage.levels import Level, document_runs
from treemem.storage.schema import ENDS, READER, REMOVED, chunk_arrays, document_arrays
from treemem.storage.store import NewDocument, Store, document_parts, write_levels
from treemem.storage.writer import Writer, all_of
from treemem.types import Progress, no_progress

ERASED_AT_ONCE = 1 << 24
"""Bytes of text that are erased in one go."""


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
        if change.tree.regrown is not None:
            write_levels(writer, change.tree.regrown, store.info().config.fanout)
        status = np.concatenate([writer.array("documents/status")[:], np.zeros(len(change.added), np.uint8)])
        places = np.flatnonzero(status != change.status)
        erased = _erasures(writer, np.array(change.removed, np.int64)) if change.removed else iter(())
        added = document_parts(writer, change.added, change.encodings, change.reader) if change.added else {}
        levels = {f"levels/{number}": level for number, level in enumerate(change.tree.levels, 2)}

        async def write_documents() -> None:
            for gone in erased:
                await all_of(_zero(writer, path, rows) for path, rows in gone.items())
            await all_of(writer.appending(path, rows) for path, rows in added.items())
            if len(places):
                await writer.putting("documents/status", places, change.status[places])

        writer.together(
            [path for path in writer.digests if path.startswith(("documents/", "chunks/", "levels/"))],
            lambda: [write_documents(), *chain.from_iterable(_writes(writer, *own) for own in levels.items())],
        )
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


def _erasures(writer: Writer, documents: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Where what documents have stands in each array, some documents at a time.

    Zeros take its place, so that no other document's numbers change.
    """
    arrays = {
        "documents/text_ends": ("documents/text",),
        "documents/record_ends": ("documents/records",),
        "documents/chunk_ends": ("chunks/spans", "chunks/encodings", *([READER] if READER in writer.digests else [])),
    }
    bounds = {}
    for name in arrays:
        ends = np.asarray(writer.array(name)[:])
        bounds[name] = np.where(documents > 0, ends[documents - 1], 0), ends[documents]
    lengths = np.subtract(*reversed(bounds["documents/text_ends"]))

    def places(some: np.ndarray) -> dict[str, np.ndarray]:
        out = {"documents/hashes": documents[some]}
        for name, (begins, ends) in bounds.items():
            rows = np.concatenate([np.arange(a, b) for a, b in zip(begins[some], ends[some], strict=True)])
            out |= dict.fromkeys(arrays[name], rows)
        return {path: rows for path, rows in out.items() if len(rows)}

    cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // ERASED_AT_ONCE)) + 1
    return map(places, np.split(np.arange(len(documents)), cuts))


async def _zero(writer: Writer, path: str, places: np.ndarray) -> None:
    array = writer.array(path)
    zeros = np.broadcast_to(np.zeros((), array.dtype), (len(places), *array.shape[1:]))
    await writer.putting(path, places, zeros)


def _writes(writer: Writer, name: str, change: LevelChange) -> list[Coroutine[Any, Any, None]]:
    """What writes a level's changes, one for each of its arrays."""
    before, fanout = writer.array(f"{name}/children").shape
    slots = np.full((len(change.nodes), fanout), -1, np.int32)
    for row, children in zip(slots, change.children, strict=True):
        row[: len(children)] = children
    old = change.nodes < before

    async def write(path: str, rows: np.ndarray) -> None:
        if old.any():
            await writer.putting(path, change.nodes[old], rows[old])
        await writer.appending(path, rows[~old])
        if change.size < before:
            await writer.truncating(path, change.size)

    return [write(f"{name}/children", slots), write(f"{name}/vectors", change.vectors)]
