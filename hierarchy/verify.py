"""Proof that a memory is what it says: nodes from their children, texts by their hashes, nothing of what is gone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treemem.errors import DamagedMemory, InputError
from treemem.hierarchy.build import stored_hierarchy
from treemem.hierarchy.weights import Hierarchy
from treemem.kernels import quantise
from treemem.storage.image import Image
from treemem.storage.levels import Level, as_float32, contextual, document_runs, node_vectors
from treemem.storage.schema import MASKED, PRESENT, READER, REMOVED
from treemem.storage.store import Store, content_hash
from treemem.types import Progress, no_progress

_BLOCK = 16_384
MOST_TOLD = 20
"""How many faults are told one by one."""


@dataclass
class Verification:
    """What was looked at, and what is wrong with it."""

    snapshot: str
    checked: dict[str, int] = field(default_factory=dict)
    """How many documents, chunks, nodes and so on were compared."""
    faults: list[str] = field(default_factory=list)
    damaged_files: list[str] = field(default_factory=list)
    """Of the serving image; what it holds was not compared with the store then."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The documented JSON of `treemem verify --json`."""
        return {"snapshot": self.snapshot, "sound": self.sound, "checked": self.checked, "faults": self.faults}

    def _fault(self, what: str) -> None:
        if len(self.faults) < MOST_TOLD:
            self.faults.append(what)
        elif len(self.faults) == MOST_TOLD:
            self.faults.append("and more")

    def _count(self, what: str, count: int) -> None:
        self.checked[what] = self.checked.get(what, 0) + count


def verify(store: Store, image: Image | None = None, progress: Progress = no_progress) -> Verification:
    """Check a whole memory.

    Args:
        store: the memory at one snapshot.
        image: its serving image, where that is to be compared with the store.
        progress: told what is being checked.

    Every storage chunk is compared with its checksum and every array with its digest; every document's text and record
    with their hash; every chunk's place in the text and in the tree; every node's vector with what its children give,
    bit for bit (where level encoders are trained: to one step of float16); that of removed documents nothing is left.
    """
    found = Verification(store.snapshot)
    try:
        for name in store.damages(progress):
            found._fault(str(store.damaged(name)))
        if found.faults:
            return found  # what is compared below could not be relied on
        _documents(found, store, progress)
        chunks, levels = _tree(found, store, progress)
        if image is not None:
            _image(found, store, image, chunks, levels, progress)
    except DamagedMemory as error:
        found._fault(str(error))
    return found


def verify_document(store: Store, image: Image, document_id: str) -> Verification:
    """Check one document: its text, its chunks, the nodes that they stand in and all nodes above.

    Raises InputError where the memory does not hold it.
    """
    found = Verification(store.snapshot)
    number = image.number_of(document_id)
    if number is None:
        raise InputError(f"document {document_id!r} is not in {store.path}")
    try:
        _one_document(found, store, number)
    except DamagedMemory as error:
        found._fault(str(error))
    return found


# ---- documents


def _documents(found: Verification, store: Store, progress: Progress) -> None:
    ends = {name: store.read(f"documents/{name}") for name in ("text_ends", "record_ends", "chunk_ends")}
    status, hashes = store.read("documents/status"), store.read("documents/hashes")
    lengths = {
        "text_ends": "documents/text", "record_ends": "documents/records", "chunk_ends": "chunks/spans"
    }  # fmt: skip
    for name, of in lengths.items():
        own, total = ends[name], store.array(of).shape[0]
        if len(own) != len(status) or (len(own) and (own[-1] != total or (np.diff(own, prepend=0) < 0).any())):
            found._fault(f"documents/{name} do not rise to {total}, the length of {of}")
            return
    for name in _vector_arrays(store):
        if store.array(name).shape[0] != store.array("chunks/spans").shape[0]:
            found._fault(f"there are not as many rows of {name} as chunks")
            return
    if not np.isin(status, (PRESENT, MASKED, REMOVED)).all():
        found._fault("documents/status has unknown values")
    ids: set[str] = set()
    for first, last in document_runs(ends["text_ends"], 1 << 24):
        progress("checking documents", first, len(status))
        text_first, text = _run(store, "documents/text", ends["text_ends"], first, last)
        record_first, records = _run(store, "documents/records", ends["record_ends"], first, last)
        chunk_first, spans = _run(store, "chunks/spans", ends["chunk_ends"], first, last)
        for number in range(first, last):
            own_text = _part(text, ends["text_ends"], number, text_first)
            own_record = _part(records, ends["record_ends"], number, record_first)
            own_spans = _part(spans, ends["chunk_ends"], number, chunk_first)
            if status[number] == REMOVED:
                rest = (own_text, own_record, own_spans, hashes[number])
                if any(part.any() for part in rest) or _any_vector(store, ends["chunk_ends"], number):
                    found._fault(f"document number {number} was removed, and something of it is left")
                found._count("removed documents", 1)
                continue
            found._count("documents", 1)
            found._count("chunks", len(own_spans))
            record = _check_document(found, number, own_text, own_record, own_spans, hashes[number])
            if record is not None:
                if record["id"] in ids:
                    found._fault(f"two documents have the id {record['id']!r}")
                ids.add(record["id"])


def _run(store: Store, name: str, ends: np.ndarray, first: int, last: int) -> tuple[int, np.ndarray]:
    begin = int(ends[first - 1]) if first else 0
    return begin, store.read(name, begin, int(ends[last - 1]))


def _part(run: np.ndarray, ends: np.ndarray, number: int, begin: int) -> np.ndarray:
    return run[(int(ends[number - 1]) if number else 0) - begin : int(ends[number]) - begin]


def _vector_arrays(store: Store) -> tuple[str, ...]:
    return ("chunks/encodings", READER) if store.keeps_reader_vectors else ("chunks/encodings",)


def _any_vector(store: Store, ends: np.ndarray, number: int) -> bool:
    begin, end = int(ends[number - 1]) if number else 0, int(ends[number])
    return any(store.read(name, begin, end).any() for name in _vector_arrays(store))


def _check_document(
    found: Verification, number: int, text: np.ndarray, record: np.ndarray, spans: np.ndarray, expected: np.ndarray
) -> dict[str, Any] | None:
    where = f"document number {number}"
    try:
        read: dict[str, Any] = json.loads(record.tobytes())
        where = f"document {read['id']!r}"
        written = text.tobytes().decode()
    except (ValueError, KeyError, TypeError):
        found._fault(f"{where}: its record or text cannot be read")
        return None
    if content_hash(record.tobytes(), text.tobytes()) != expected.tobytes():
        found._fault(f"{where}: it has another hash than when it was added")
    last = 0
    for start, end, first_byte, last_byte in spans.tolist():
        if (
            not last <= start < end <= len(written)
            or text[first_byte:last_byte].tobytes() != written[start:end].encode()
        ):
            found._fault(f"{where}: a chunk's span ({start}, {end}) does not fit its text")
            break
        last = end
    return read


# ---- the tree


def _tree(found: Verification, store: Store, progress: Progress) -> tuple[np.ndarray, list[Level]]:
    """Check the nodes. Returns the level-1 vectors that they were compared with, and the levels above."""
    config = store.info().config
    ends, status = store.read("documents/chunk_ends"), store.read("documents/status")
    levels = store.levels()
    alive = np.repeat(status != REMOVED, np.diff(ends, prepend=0))
    hierarchy = stored_hierarchy(store)
    chunks = vectors = _contextual(store, config.alpha, hierarchy, ends, progress)
    for number, level in enumerate(levels, 2):
        progress(f"checking level {number}", number - 2, len(levels))
        found._count("nodes", len(level.vectors))
        children, counts = level.children, np.diff(level.offsets)
        size = len(vectors)
        if len(children) and not (0 <= children.min() and children.max() < size):
            found._fault(f"level {number}: a child is outside 0 to {size - 1}")
            return chunks, levels
        if (counts == 0).any() or (counts > config.fanout).any():
            found._fault(f"level {number}: a node has no child, or more than {config.fanout}")
        owners = np.repeat(np.arange(len(counts)), counts)
        if (np.diff(children)[np.diff(owners) == 0] <= 0).any():
            found._fault(f"level {number}: the children of a node do not rise")
        stands = np.bincount(children, minlength=size)
        if number == 2:
            _orphans(found, stands, alive, config.spill)
        elif (stands != 1).any():
            node = int(np.flatnonzero(stands != 1)[0])
            found._fault(f"level {number - 1}: node {node} stands under {stands[node]} nodes")
        residual = None if hierarchy is None else hierarchy.residuals.get(number)
        made = node_vectors(vectors, level.offsets, children, residual) if (counts > 0).all() else level.vectors
        wrong = np.flatnonzero(_differ(made, level.vectors, exact=residual is None))
        if len(wrong):
            found._fault(f"level {number}: node {wrong[0]} is not what its children give ({len(wrong)} such nodes)")
        vectors = level.vectors
    if levels and len(levels[-1].vectors) > 2 * config.fanout:
        found._fault(f"the top has {len(levels[-1].vectors)} nodes, more than {2 * config.fanout}")
    if not levels and alive.sum() > 2 * config.fanout:
        found._fault(f"{alive.sum()} chunks have no nodes above them")
    return chunks, levels


def _orphans(found: Verification, stands: np.ndarray, alive: np.ndarray, spill: int) -> None:
    if stands[~alive].any():
        found._fault(
            f"a chunk of a removed document stands in the tree: chunk {np.flatnonzero(~alive & (stands > 0))[0]}"
        )
    if (stands[alive] == 0).any():
        found._fault(f"a chunk stands in no node: chunk {np.flatnonzero(alive & (stands == 0))[0]}")
    if (stands > spill).any():
        found._fault(f"a chunk stands in more than {spill} nodes: chunk {np.flatnonzero(stands > spill)[0]}")


def _contextual(
    store: Store, alpha: float, hierarchy: Hierarchy | None, ends: np.ndarray, progress: Progress
) -> np.ndarray:
    gate = None if hierarchy is None else hierarchy.context
    out = np.empty(store.array("chunks/encodings").shape, np.float16)
    for first, last in document_runs(ends, _BLOCK):
        begin = int(ends[first - 1]) if first else 0
        progress("adding context", begin, len(out))
        rows = store.read("chunks/encodings", begin, int(ends[last - 1]))
        out[begin : int(ends[last - 1])] = contextual(rows, ends[first:last] - begin, alpha, gate)
    return out


def _differ(made: np.ndarray, stored: np.ndarray, *, exact: bool) -> np.ndarray:
    if exact:
        return np.asarray((made.view(np.uint16) != stored.view(np.uint16)).any(1))
    # A trained encoder's sums may come in another order where other nodes are computed beside.
    return np.asarray((np.abs(made.astype(np.float32) - stored.astype(np.float32)) > 2.0**-11).any(1))


# ---- the image


def _image(
    found: Verification, store: Store, image: Image, chunks: np.ndarray, levels: list[Level], progress: Progress
) -> None:
    if not image.folder.exists():  # swept away after later edits; what is open of it goes on being read
        return
    try:
        found.damaged_files = image.changed_files(progress=progress)
    except OSError as error:
        found.damaged_files = [str(error)]
    if found.damaged_files:
        files = ", ".join(found.damaged_files)
        found._fault(f"{image.folder}: the serving image is damaged ({files}); delete the folder, it is made again")
        return  # what is compared below could not be relied on
    if image.snapshot != store.snapshot:
        found._fault("the serving image is of another snapshot")
        return
    if not np.array_equal(image.status, store.read("documents/status")):
        found._fault("the serving image has another status of documents")
        return
    tree, hashes = image.tree, store.read("documents/hashes")
    for number in np.flatnonzero(image.status != REMOVED).tolist():
        if content_hash(*image.content(number)) != hashes[number].tobytes():
            found._fault(f"the serving image has another text or record of document number {number}")
    present = np.repeat(image.status != REMOVED, np.diff(image.chunk_ends, prepend=0))
    same = np.array_equal(image.chunk_ends, store.read("documents/chunk_ends"))
    if not same or not np.array_equal(image.spans[present], store.read("chunks/spans")[present]):
        found._fault("the serving image has other chunks")
        return
    for start in range(0, len(chunks), _BLOCK):
        part = slice(start, start + _BLOCK)
        rows, scales = quantise(as_float32(chunks[part]))
        kept = present[part]
        wrong = (tree.levels[-1].rows[part] != rows).any(1) | (tree.levels[-1].scales[part] != scales)
        if wrong[kept].any():
            found._fault(f"the serving image has another vector of chunk {start + int(np.argmax(wrong & kept))}")
            break
    if tree.depth != len(levels) + 1:
        found._fault("the serving image has another number of levels")
        return
    for number, level in enumerate(levels, 2):
        places, names = image.places(number), image.names(number)
        if len(places) != len(level.vectors) or not np.array_equal(names[places], np.arange(len(places))):
            found._fault(f"the serving image has other nodes at level {number}")
            return
        blocks = tree.levels[tree.depth - number + 1]
        below = image.names(number - 1) if number > 2 else None
        for node, place in enumerate(places):
            ids = blocks.ids[blocks.offsets[place] : blocks.offsets[place + 1]]
            own = np.sort(ids if below is None else below[ids])
            if not np.array_equal(own, level.children[level.offsets[node] : level.offsets[node + 1]]):
                found._fault(f"the serving image has other children of node {node} of level {number}")
                return
        own_rows, own_scales = quantise(as_float32(level.vectors))
        stored = tree.levels[tree.depth - number]
        if not (np.array_equal(stored.rows[places], own_rows) and np.array_equal(stored.scales[places], own_scales)):
            found._fault(f"the serving image has other vectors at level {number}")
    found._count("nodes of the image", sum(len(level.vectors) for level in levels))


# ---- one document


def _one_document(found: Verification, store: Store, number: int) -> None:
    config, hierarchy = store.info().config, stored_hierarchy(store)
    status = int(store.read("documents/status", number, number + 1)[0])
    bounds = {}
    for name in ("text_ends", "record_ends", "chunk_ends"):
        own = store.read(f"documents/{name}", max(number - 1, 0), number + 1)
        bounds[name] = (int(own[0]) if number else 0, int(own[-1]))
    text = store.read("documents/text", *bounds["text_ends"])
    record = store.read("documents/records", *bounds["record_ends"])
    spans = store.read("chunks/spans", *bounds["chunk_ends"])
    expected = store.read("documents/hashes", number, number + 1)[0]
    if status == REMOVED:
        found._fault(f"document number {number} was removed")
        return
    _check_document(found, number, text, record, spans, expected)
    found._count("documents", 1)
    found._count("chunks", len(spans))
    elements = np.arange(*bounds["chunk_ends"])
    ends = store.read("documents/chunk_ends")
    sizes = store.info().levels
    for level in range(2, len(sizes) + 1):
        slots = store.read(f"levels/{level}/children")
        above = np.unique(np.nonzero(np.isin(slots, elements))[0])
        stands = np.bincount(slots[above][np.isin(slots[above], elements)], minlength=sizes[level - 2])[elements]
        if (stands < 1).any() or (stands > (config.spill if level == 2 else 1)).any():
            found._fault(
                f"level {level - 1}: element {elements[(stands < 1) | (stands > 1)][0]} stands nowhere, or too often"
            )
        own = slots[above]
        children = own[own >= 0]
        offsets = np.concatenate([[0], np.cumsum((own >= 0).sum(1))]).astype(np.int64)
        wanted, places = np.unique(children, return_inverse=True)
        below = (
            _some_chunks(store, wanted, ends, config.alpha, hierarchy)
            if level == 2
            else store.rows(f"levels/{level - 1}/vectors", wanted)
        )
        residual = None if hierarchy is None else hierarchy.residuals.get(level)
        made = node_vectors(below, offsets, places.reshape(-1).astype(np.int32), residual)
        wrong = np.flatnonzero(_differ(made, store.rows(f"levels/{level}/vectors", above), exact=residual is None))
        if len(wrong):
            found._fault(f"level {level}: node {above[wrong[0]]} is not what its children give")
        found._count("nodes", len(above))
        elements = above


def _some_chunks(
    store: Store, chunks: np.ndarray, ends: np.ndarray, alpha: float, hierarchy: Hierarchy | None
) -> np.ndarray:
    """Level-1 vectors of some chunks, rising, from the encodings of their documents."""
    gate = None if hierarchy is None else hierarchy.context
    documents = np.unique(np.searchsorted(ends, chunks, side="right"))
    begins = np.where(documents > 0, ends[documents - 1], 0)
    counts = ends[documents] - begins
    rows = np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    encodings = store.rows("chunks/encodings", rows)
    return contextual(encodings, np.cumsum(counts), alpha, gate, np.searchsorted(rows, chunks))
