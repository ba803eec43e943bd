"""Edits of a memory: adding, removing, masking and compacting; each is one commit, which the image follows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from treemem.config import TreeConfig
from treemem.errors import DamagedMemory, InputError
from treemem.hierarchy.build import checked, contextual_file, distinct, encode_chunks, stored_hierarchy, write_image
from treemem.hierarchy.edit import Editor
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.grow import grow
from treemem.hierarchy.segment import cut
from treemem.hierarchy.weights import Hierarchy
from treemem.kernels import back_end
from treemem.storage.change import Change, TreeChange, close_gaps, write_change
from treemem.storage.files import map_npy, save_npy, work_folder
from treemem.storage.follow import VECTORS, follow
from treemem.storage.image import Image, build_image, image_folder, replace_folder
from treemem.storage.levels import Gate, Spread, contextual
from treemem.storage.schema import MASKED, PRESENT, REMOVED
from treemem.storage.signatures import Outgrown
from treemem.storage.store import (
    IMAGE_DAMAGE,
    NewDocument,
    Store,
    document_hash,
    guard,
    write_levels,
    write_spread,
)
from treemem.types import Document, Progress, no_progress

COUNTED = ("added", "replaced", "removed", "masked", "unmasked", "chunks_added", "chunks_removed")
"""Fields of an `EditReport` that are counted in a snapshot's metadata."""


@dataclass(frozen=True)
class EditReport:
    """What an edit has done."""

    snapshot: str
    """The snapshot that it made; the one before where nothing was to be done."""
    added: tuple[str, ...] = ()
    """Ids of documents that are new."""
    replaced: tuple[str, ...] = ()
    """… that were there with another content."""
    unchanged: tuple[str, ...] = ()
    """… that were there as they are."""
    removed: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()
    chunks_added: int = 0
    chunks_removed: int = 0
    recall_before: float | None = None
    """Where the tree was grown anew: which part of the ten chunks nearest to a chunk a walk found before …"""
    recall_after: float | None = None
    """… and finds since."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long it took to `encode` what is new, to place and `commit` all of it, and to follow with the `image`."""

    def counts(self) -> dict[str, int]:
        """What is not zero, for the snapshot's metadata."""
        found = {name: getattr(self, name) for name in COUNTED}
        counts = {name: own if isinstance(own, int) else len(own) for name, own in found.items()}
        return {name: count for name, count in counts.items() if count}

    def message(self) -> str:
        """What the snapshot is called where nothing else is asked for."""
        return told(self.counts()) or "nothing changed"


def told(changes: Mapping[str, Any]) -> str:
    """What a snapshot's metadata says of an edit, for people; nothing of other snapshots."""
    return ", ".join(f"{changes[name]:,} {name.replace('_', ' ')}" for name in COUNTED if name in changes)


@dataclass
class Plan:
    """Documents that an edit takes in, sorted by what becomes of them."""

    new: list[Document] = field(default_factory=list)
    changed: list[Document] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


def sort_out(store: Store, image: Image, documents: Iterable[Document], *, from_files: bool = False) -> Plan:
    """Compare documents with those that a memory holds, by id and by the hash of their content.

    Args:
        store: at the snapshot of `image`.
        image: of what is held.
        documents: given.
        from_files: their `source` is the path that they were read by, of which several lead to a file: it does not
            count.

    Raises InputError where two have one id, or one cannot be stored.
    """
    plan = Plan()
    known: list[tuple[Document, int]] = []
    for document in distinct(checked(documents)):
        number = image.number_of(document.id)
        if number is None:
            plan.new.append(document)
        else:
            known.append((document, number))
    hashes = store.rows("documents/hashes", np.array([number for _, number in known], np.int64))
    for (document, number), stored in zip(known, hashes, strict=True):
        same = document_hash(document) == stored.tobytes()
        if not same and from_files:
            source = image.record(number)["metadata"].get("source")
            moved = replace(document, metadata={**document.metadata, "source": source})
            same = document_hash(moved) == stored.tobytes()
        if same:
            plan.unchanged.append(document.id)
        else:
            plan.changed.append(document)
    return plan


def encode(
    documents: Sequence[Document],
    encoder: Encoder,
    config: TreeConfig,
    progress: Progress = no_progress,
    *,
    reader_vectors: bool = False,
) -> tuple[list[NewDocument], Float16[np.ndarray, "n d"], Float16[np.ndarray, "n windows d"] | None]:
    """Cut documents and encode their chunks: their encodings, and their reader vectors where these are kept."""
    new = [
        NewDocument(own, cut(own.text, encoder.token_spans, config.chunk_tokens, config.language)) for own in documents
    ]
    texts = [one.document.text[a:b] for one in new for a, b in one.spans]
    return new, *encode_chunks(texts, encoder, progress, reader_vectors=reader_vectors)


def apply(
    store: Store,
    image: Image,
    config: TreeConfig,
    hierarchy: Hierarchy | None,
    *,
    added: Sequence[NewDocument] = (),
    encodings: Float16[np.ndarray, "n d"] | None = None,
    reader: Float16[np.ndarray, "n windows d"] | None = None,
    removed: Sequence[int] = (),
    hidden: Sequence[int] = (),
    status: np.ndarray | None = None,
    message: str,
    metadata: dict[str, Any],
    progress: Progress = no_progress,
) -> tuple[Image, dict[str, float]]:
    """Commit an edit, and bring the serving image after it. The caller holds the memory's lock.

    Args:
        store: at the snapshot of `image`, which is the tip of its branch.
        image: what is edited.
        config: how its tree is built.
        hierarchy: what the tree has learned.
        added: documents with their chunks.
        encodings: what encoder 1 gave for these.
        reader: their reader vectors, where the memory keeps them.
        removed: numbers of documents that go.
        hidden: which of `added` are masked, counted from 0.
        status: of the documents that are there, where some are to be hidden or shown.
        message: of the snapshot.
        metadata: kept with it.
        progress: told what is done.

    Returns:
        The image of the new snapshot, and how many seconds it took to `commit` and to make the `image`.
    """
    begin = time.perf_counter()
    dimension = image.tree.dimension
    encodings = np.empty((0, dimension), np.float16) if encodings is None else encodings
    status = image.status if status is None else status
    status = np.concatenate([status, np.full(len(added), PRESENT, np.uint8)]).astype(np.uint8)
    status[list(removed)] = REMOVED
    status[image.documents + np.array(hidden, np.int64)] = MASKED
    gone = np.concatenate([np.empty(0, np.int64), *(np.asarray(image.chunks_of(number)) for number in removed)])
    tree, vectors = TreeChange(), encodings
    cache = image_folder(store, image.snapshot).parent
    with guard(store.path, ()):
        cache.mkdir(exist_ok=True)
    with guard(store.path, ()), work_folder(cache, "making-") as folder:
        if len(encodings) or len(gone):
            gate = None if hierarchy is None else hierarchy.context
            ends = np.cumsum([len(new.spans) for new in added]).astype(np.int64)
            vectors = contextual(encodings, ends, config.alpha, gate)
            below = level_1(store, image, config, gate, folder, progress)
            editor = Editor(image, below, config, None if hierarchy is None else hierarchy.residuals)
            editor.remove(gone)
            progress("placing chunks", 0, len(vectors))
            editor.add(vectors)
            tree = editor.finish()
            del below, editor
        change = Change(tuple(added), encodings, vectors, tuple(sorted(removed)), tree, status, reader)
        snapshot = write_change(store, change, message, metadata)
        committed = time.perf_counter()
        made: Image | None = None
        if tree.regrown is None:
            # Where the older image turns out to be damaged the new one is made from the store.
            with suppress(Outgrown, DamagedMemory), guard(store.path, IMAGE_DAMAGE):  # a full disk may be a ValueError
                follow(folder, image, change, snapshot)
                replace_folder(folder, cache / snapshot)
                made = Image(cache / snapshot)
    made = made or Image(write_image(store, config, progress))
    return made, {"commit": committed - begin, "image": time.perf_counter() - committed}


def level_1(
    store: Store,
    image: Image,
    config: TreeConfig,
    gate: Gate | None,
    folder: Path,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Level-1 vectors of all chunks: the image's own, or computed into `folder`, where its successor takes them."""
    if VECTORS in image.rows:
        return image.node_vectors(1)
    scratch = folder / "level-1"
    vectors = contextual_file(store, config.alpha, scratch, progress, gate)
    save_npy(folder / f"{VECTORS}.npy", np.asarray(vectors))
    if scratch.exists():
        scratch.unlink()
    return map_npy(folder / f"{VECTORS}.npy")


def compact(store: Store, message: str, progress: Progress = no_progress) -> Image:
    """Grow the tree anew over what is there, and give documents and chunks numbers without gaps.

    The caller holds the memory's lock. Returns the image of the new snapshot.
    """
    config, hierarchy = store.info().config, stored_hierarchy(store)
    with guard(store.path, ()), work_folder(store.path, "growing-") as scratch:
        with store.transaction(message, {"compacted": True}) as writer:
            close_gaps(store, writer, progress)
            ends = np.asarray(writer.array("documents/chunk_ends")[:])
            gate = None if hierarchy is None else hierarchy.context
            encodings = writer.array("chunks/encodings")
            vectors = contextual_file(
                store, config.alpha, scratch / "level-1", progress, gate, encodings=encodings, chunk_ends=ends
            )
            spread = Spread.of(vectors)
            residuals = None if hierarchy is None else hierarchy.residuals
            levels = grow(vectors, config.fanout, config.spill, config.seed, progress, residuals, spread)
            write_levels(writer, levels, config.fanout, progress)
            write_spread(writer, spread)
        return Image(build_image(store, vectors, progress))


def recall(image: Image, seed: int, chunks: int = 200, beam: int = 32) -> float:
    """Which part of the ten chunks nearest to a chunk a walk finds: the mean of some chunks, drawn at random."""
    alive = np.unique(image.tree.live[-1])
    if len(alive) == 0:
        return 1.0
    chosen = np.random.default_rng(seed).choice(alive, min(chunks, len(alive)), replace=False)
    blocks, kernels = image.tree.levels[-1], back_end()
    vectors = blocks.rows[chosen] * blocks.scales[chosen, None]
    found = kernels.search(image.tree, image.asked(vectors)[:, :, None], beam, 10).chunks
    masks = tuple(np.ones(size, np.uint8) for size in image.tree.sizes)
    masks[-1][:] = 0
    masks[-1][alive] = 1
    best, _ = kernels.exact(image.tree, vectors[:, None], 10, masks)
    return float(np.mean([np.isin(own[own >= 0], met).mean() for own, met in zip(best, found, strict=True)]))


def numbers_of(image: Image, ids: Iterable[str]) -> list[int]:
    """The numbers of documents, each once.

    Raises InputError for an id that the memory does not hold.
    """
    out: dict[int, None] = {}
    for document_id in [ids] if isinstance(ids, str) else ids:
        number = image.number_of(document_id)
        if number is None:
            raise InputError(
                f"document {document_id!r} is not in this memory; the results of `treemem search` show ids"
            )
        out[number] = None
    return list(out)


def masked_status(image: Image, numbers: Sequence[int], value: int) -> np.ndarray:
    """The status of all documents with some of them hidden (`MASKED`) or shown (`PRESENT`)."""
    assert value in (MASKED, PRESENT)
    status = image.status.copy()
    status[list(numbers)] = value
    return status
