"""Builds a memory from a stream of documents, committing as it goes, so that a killed build continues."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Float16

from treemem.config import TreeConfig
from treemem.errors import DamagedMemory, EncoderMismatch, InputError, ModelError, StoreError
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.grow import grow
from treemem.hierarchy.segment import cut
from treemem.hierarchy.weights import Hierarchy
from treemem.storage.files import is_work, work_folder
from treemem.storage.image import build_image, image_folder
from treemem.storage.levels import Gate, Spread, contextual, document_runs, node_vectors
from treemem.storage.remote import is_local_part, named, url_of
from treemem.storage.schema import READER_VECTORS
from treemem.storage.store import NewDocument, Store, document_hash, document_record, guard, storable
from treemem.types import Document, Progress, no_progress

COMMIT_CHUNKS = 4096
"""Documents are encoded and committed together once they have this many chunks, …"""
COMMIT_CHARACTERS = 16_000_000
"""… or this much text."""
ENCODE_CHUNKS = 512
"""Chunks that are encoded between two reports of progress."""
CONTEXT_ROWS = 16_384
"""Chunks whose contextual vectors are computed at once."""
_LOCK = "build.lock"


def build(
    path: Path,
    documents: Iterable[Document],
    encoder: Encoder,
    config: TreeConfig,
    progress: Progress = no_progress,
    *,
    distinct_ids: bool = False,
    hierarchy: Hierarchy | None = None,
    reader_vectors: bool = False,
) -> None:
    """Build a memory, or continue a build that was interrupted.

    Args:
        path: where the memory is to lie.
        documents: read once, in order; a continued build must be given the same documents in the same order.
        encoder: encoder 1.
        config: how the tree is built.
        progress: told about chunks encoded (of those cut so far), levels grown and the image written.
        distinct_ids: whether the documents' ids are known to differ.
        hierarchy: a trained one that the tree is grown with; None for an untrained tree.
        reader_vectors: whether to keep what a language model reads of each chunk, see `Encoder.reader_vectors`.

    Raises:
        StoreError: a whole memory is there already, or another process is building it.
        InputError: a document cannot be stored or its id stood before; a continued build is given other documents or
            another configuration.
        EncoderMismatch: a continued build is given another encoder.
        ModelError: the encoder gives NaN or infinity, or the hierarchy was trained on another.
        OutOfSpace: the disk is full; the same build again continues.
    """
    if config.chunk_tokens > encoder.longest:
        raise InputError(f"chunk_tokens = {config.chunk_tokens}: encoder {encoder.name!r} takes {encoder.longest}")
    if hierarchy is not None:
        hierarchy.require_encoder(encoder.info)
    require_free(path)
    with alone(path):
        store = _open_or_create(path, encoder, config, hierarchy, reader_vectors)
        given = checked(documents)
        remaining = _skip_stored(store, given if distinct_ids else distinct(given), progress)
        if store.finished:
            _only_image(store, remaining, config, progress)
            return
        _encode(store, remaining, encoder if hierarchy is None else hierarchy.tuned(encoder), config, progress)
        _finish(store, config, progress)


def require_free(path: Path) -> None:
    """Raise StoreError where a memory or something else lies; what an interrupted build left is neither."""
    if Store.exists(path):
        store = Store.open(path)
        if store.finished and image_folder(store, store.info().snapshot).exists():
            raise _taken(path)
        return
    with guard(path):
        other = path.exists() and (not path.is_dir() or any(not _is_ours(path, inside) for inside in path.iterdir()))
    if other:
        raise StoreError(f"{named(path)}: there is something else at this path; choose another")


def _is_ours(path: Path, inside: Path) -> bool:
    remote = url_of(path) is not None and is_local_part(inside.name)
    return is_work(inside) or inside.name == _LOCK or remote


def _taken(path: Path) -> StoreError:
    return StoreError(f"{named(path)}: a memory is there already; choose another path or remove it first")


@contextmanager
def alone(path: Path, wait: float = 0) -> Iterator[None]:
    """Hold the memory's lock, which the system takes back from a process that is killed.

    Waits so many seconds for another process that holds it, and raises StoreError then.
    """
    with guard(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / _LOCK, timeout=wait)
        try:
            lock.acquire()
        except Timeout:
            raise StoreError(f"{named(path)}: another process is writing this memory; wait for it or end it") from None
    try:
        yield
    finally:
        lock.release()


def _open_or_create(
    path: Path, encoder: Encoder, config: TreeConfig, hierarchy: Hierarchy | None, reader_vectors: bool
) -> Store:
    given = None if hierarchy is None else (hierarchy.config_bytes(), hierarchy.weights_bytes())
    if not Store.exists(path):
        return Store.create(path, config, asdict(encoder.info), given, reader=reader_vectors)
    store = Store.open(path)
    info = store.info()
    if info.state == "complete" and not store.finished:  # killed when all was written, but not yet visible
        store.publish()
    if store.finished and (info.config != config or image_folder(store, info.snapshot).exists()):
        raise _taken(path)
    check_encoder(path, info.encoder, encoder)
    if info.config != config:
        raise InputError(f"{named(path)}: its interrupted build has other settings; use {info.config} or another path")
    if store.hierarchy() != given:
        raise InputError(
            f"{named(path)}: its interrupted build has another hierarchy; give that one, or use another path"
        )
    if store.keeps_reader_vectors != reader_vectors:
        which = "with" if store.keeps_reader_vectors else "without"
        raise InputError(
            f"{named(path)}: its interrupted build is {which} reader vectors; go on so, or use another path"
        )
    store.remove_leftovers()
    return store


def check_encoder(path: Path, recorded: dict[str, object], encoder: Encoder) -> None:
    """Raise EncoderMismatch unless a memory was made with this encoder."""
    if recorded["weights"] != encoder.info.weights or recorded["dimension"] != encoder.info.dimension:
        raise EncoderMismatch(
            f"{named(path)}: made with encoder {recorded['name']!r} (weights {recorded['weights']}), "
            f"given {encoder.name!r} (weights {encoder.info.weights}); use the first or build a new memory"
        )


def checked(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, each looked at before anything is done with it."""
    for number, document in enumerate(documents, 1):
        if not isinstance(document, Document):
            raise InputError(f"document {number}: it is of type {type(document).__name__}, not treemem.Document")
        if not (isinstance(document.id, str) and isinstance(document.text, str) and isinstance(document.title, str)):
            raise InputError(f"document {number} ({document.id!r}): its id, title and text must be strings")
        document_record(document)
        if not storable(document.text):
            raise InputError(
                f"document {document.id!r}: its text has half a character (a lone surrogate), which no file can hold; "
                "replace it: text.encode('utf-8', 'replace').decode()"
            )
        yield document


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, as long as their ids differ. Holds some 100 bytes for each, however long the ids are."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
        if digest in seen:
            raise InputError(f"document {document.id!r}: given twice; ids must differ")
        seen.add(digest)
        yield document


def _skip_stored(store: Store, documents: Iterator[Document], progress: Progress) -> Iterator[Document]:
    """Pass over the documents that are committed already, checking that they are the same."""
    hashes = store.read("documents/hashes")
    for number, expected in enumerate(hashes):
        if number % 256 == 255:
            progress("comparing documents", number, len(hashes))
        document = next(documents, None)
        if document is None or document_hash(document) != expected.tobytes():
            if store.finished:
                raise _taken(store.path)
            what = "is missing" if document is None else f"({document.id!r}) differs"
            raise InputError(
                f"{store.name}: the interrupted build cannot be continued: document {number + 1} {what}; "
                "give the same documents, or remove this folder and build again"
            )
    return documents


def _only_image(store: Store, remaining: Iterator[Document], config: TreeConfig, progress: Progress) -> None:
    """What is left of a build that was interrupted while it wrote the serving image."""
    if next(remaining, None) is not None:
        raise _taken(store.path)
    write_image(store, config, progress)


def _encode(
    store: Store, documents: Iterator[Document], encoder: Encoder, config: TreeConfig, progress: Progress
) -> None:
    """Cut, encode and commit documents, batch by batch."""
    done = store.info().chunks
    progress("encoding", done, None)
    batches = _batches(documents, encoder, config)
    for batch in _ahead(batches) if encoder.on_gpu else batches:
        texts = [new.document.text[a:b] for new in batch for a, b in new.spans]
        told = partial(_after, progress, done)
        store.append(batch, *encode_chunks(texts, encoder, told, reader_vectors=store.keeps_reader_vectors))
        done += len(texts)


def _ahead(batches: Iterator[list[NewDocument]]) -> Iterator[list[NewDocument]]:
    """The same, the next one made by a thread meanwhile: cutting takes longer than encoding on a GPU."""
    with ThreadPoolExecutor(1, "cutting") as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def _after(progress: Progress, before: int, stage: str, done: float, total: float | None) -> None:
    progress(stage, before + done, before + (total or 0))


def encode_chunks(
    texts: Sequence[str], encoder: Encoder, progress: Progress = no_progress, *, reader_vectors: bool = False
) -> tuple[Float16[np.ndarray, "n d"], Float16[np.ndarray, "n windows d"] | None]:
    """What encoder 1 gives for chunks, as it is stored, and their reader vectors where these are asked for."""
    encodings = np.empty((len(texts), encoder.dimension), np.float16)
    windows = np.empty((len(texts), READER_VECTORS, encoder.dimension), np.float16) if reader_vectors else None
    for start in range(0, len(texts), ENCODE_CHUNKS):
        part = texts[start : start + ENCODE_CHUNKS]
        rows = slice(start, start + len(part))
        if windows is None:
            encodings[rows] = encoder.encode(part)
        else:
            encodings[rows], windows[rows] = encoder.encode_chunks(part)
        progress("encoding", start + len(part), len(texts))
    return encodings, windows


def _batches(documents: Iterator[Document], encoder: Encoder, config: TreeConfig) -> Iterator[list[NewDocument]]:
    """Cut documents and put them together until a batch is worth a commit. Depends on the documents alone."""
    batch: list[NewDocument] = []
    chunks = characters = 0
    for document in documents:
        spans = cut(document.text, encoder.token_spans, config.chunk_tokens, config.language)
        if batch and len(spans) >= COMMIT_CHUNKS:  # what was gathered need not wait for a book
            yield batch
            batch, chunks, characters = [], 0, 0
        batch.append(NewDocument(document, spans))
        chunks += len(spans)
        characters += len(document.text)
        if chunks >= COMMIT_CHUNKS or characters >= COMMIT_CHARACTERS:
            yield batch
            batch, chunks, characters = [], 0, 0
    if batch:
        yield batch


def _finish(store: Store, config: TreeConfig, progress: Progress) -> None:
    """Grow the tree over all chunks, make the memory visible and write its serving image."""
    hierarchy = stored_hierarchy(store)
    with guard(store.path, ()), work_folder(store.path, "growing-") as scratch:
        vectors = contextual_file(store, config.alpha, scratch / "level-1", progress, _gate(hierarchy))
        residuals = None if hierarchy is None else hierarchy.residuals
        spread = Spread.of(vectors)
        levels = grow(vectors, config.fanout, config.spill, config.seed, progress, residuals, spread)
        info = store.info()
        store.finish(levels, spread, f"build: {info.documents:,} documents, {info.chunks:,} chunks", progress)
        build_image(store, vectors, progress)


def stored_hierarchy(store: Store) -> Hierarchy | None:
    """The trained hierarchy of a memory, None where its tree is untrained.

    Raises DamagedMemory where it cannot be read.
    """
    stored = store.hierarchy()
    if stored is None:
        return None
    try:
        return Hierarchy.from_bytes(*stored)
    except ModelError as error:
        raise DamagedMemory(f"{store.name}: its trained hierarchy: {error}") from error


def _gate(hierarchy: Hierarchy | None) -> Gate | None:
    return None if hierarchy is None else hierarchy.context


def write_image(store: Store, config: TreeConfig, progress: Progress = no_progress) -> Path:
    """Write the serving image of a finished memory whose image is missing. Returns its folder.

    Raises DamagedMemory and OutOfSpace as `build_image` does.
    """
    hierarchy = stored_hierarchy(store)
    with guard(store.path, ()), work_folder(store.path, "imaging-") as scratch:
        vectors = contextual_file(store, config.alpha, scratch / "level-1", progress, _gate(hierarchy))
        return build_image(store, vectors, progress)


def contextual_file(
    store: Store,
    alpha: float,
    path: Path,
    progress: Progress = no_progress,
    gate: Gate | None = None,
    encodings: Any = None,
    chunk_ends: np.ndarray | None = None,
) -> np.ndarray:
    """Level-1 vectors of all chunks, float16, in a memory-mapped file that the caller removes.

    `encodings` and `chunk_ends` take the place of the stored ones.
    """
    chunk_ends = store.read("documents/chunk_ends") if chunk_ends is None else chunk_ends
    given: Any = store.array("chunks/encodings") if encodings is None else encodings
    if given.shape[0] == 0:
        return np.empty(given.shape, np.float16)
    with guard(store.path):
        # Written first, then mapped: see treemem.storage.files.
        with path.open("wb") as file:
            for first, last in document_runs(chunk_ends, CONTEXT_ROWS):
                begin = int(chunk_ends[first - 1]) if first else 0
                if begin:
                    progress("adding context", begin, given.shape[0])
                rows = np.asarray(given[begin : int(chunk_ends[last - 1])])
                file.write(contextual(rows, chunk_ends[first:last] - begin, alpha, gate).data)
        return np.memmap(path, np.float16, "r", shape=given.shape)


def retrain(
    store: Store,
    hierarchy: Hierarchy,
    message: str,
    progress: Progress = no_progress,
    encodings: np.ndarray | None = None,
) -> str:
    """Give a finished memory a trained hierarchy: a new snapshot with the nodes' new vectors, and its serving image.

    The tree keeps its shape. What was searched before goes on being searched where it is open.

    Args:
        store: the memory.
        hierarchy: takes the place of the one before.
        message: of the snapshot.
        progress: told what is done.
        encodings: of all chunks, float16, where encoder 1 has been tuned.

    Returns:
        The new snapshot.

    Raises:
        StoreError: another process writes this memory.
        OutOfSpace: the disk is full; the memory is as it was, or its image is made when it is opened next.
    """
    info, hierarchy = store.info(), hierarchy.rounded()  # vectors are of the weights that are stored
    with alone(store.path), guard(store.path, ()), work_folder(store.path, "growing-") as scratch:
        below = contextual_file(store, info.config.alpha, scratch / "level-1", progress, hierarchy.context, encodings)
        first, vectors = below, []
        for number, level in enumerate(store.levels(), 2):
            progress(f"encoding level {number}", number, len(info.levels))
            below = node_vectors(below, level.offsets, level.children, hierarchy.residuals.get(number))
            vectors.append(below)
        weights = hierarchy.config_bytes(), hierarchy.weights_bytes()
        snapshot = store.retrain(vectors, Spread.of(first), weights, message, encodings)
        build_image(store, first, progress)
    return snapshot
