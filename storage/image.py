"""The serving image of one snapshot: what walks and searches read, memory-mapped, derived from the store.

It lies in `cache/<snapshot>` inside the memory's folder and can be deleted at any time: it is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from treemem.errors import DamagedMemory, StoreError
from treemem.kernels import LevelBlocks, ServingTree, first_rows, quantise, upper_halves
from treemem.kernels.tree import upper_bytes
from treemem.storage.files import save_npy, work_folder, write_npy
from treemem.storage.levels import Level, Spread, as_float32
from treemem.storage.lexical import Lexical, build_lexical
from treemem.storage.signatures import read_signatures, write_signatures
from treemem.storage.store import Store, guard
from treemem.types import Document, DocumentRef, Progress, Span, no_progress

IMAGE_VERSION = 4
ROWS = 16_384
_COPIED = {
    "text": "documents/text",
    "text_ends": "documents/text_ends",
    "records": "documents/records",
    "record_ends": "documents/record_ends",
    "chunk_ends": "documents/chunk_ends",
    "spans": "chunks/spans",
}
_PARTS = ("rows", "scales", "upper", "upper-scales", "ids", "offsets")
_HIERARCHY = ("hierarchy.json", "hierarchy.safetensors")


def image_folder(store: Store, snapshot: str) -> Path:
    """Where the image of a snapshot lies."""
    return store.path / "cache" / snapshot


def build_image(store: Store, vectors: np.ndarray, progress: Progress = no_progress) -> Path:
    """Write the serving image of the current snapshot; it appears at once and whole, or not at all.

    Args:
        store: a finished memory.
        vectors: level-1 vectors of all chunks, float16, shape (n, d).
        progress: told about chunks indexed.

    Returns:
        The image's folder.

    Raises:
        DamagedMemory: what the store holds is not what was written.
        OutOfSpace: the disk is full; the memory is whole, and the image is made when it is opened next.
    """
    info = store.info()
    store.verify(progress)
    target = image_folder(store, info.snapshot)
    with guard(store.path):
        target.parent.mkdir(exist_ok=True)
        with work_folder(target.parent, "making-") as folder:
            for name, source in _COPIED.items():
                _copy(store, source, folder / f"{name}.npy")
            write_tree(folder, vectors, store.levels(), progress)
            save_npy(folder / "query-map.npy", Spread.of(vectors).map_queries())
            for name, data in zip(_HIERARCHY, store.hierarchy() or (), strict=False):
                (folder / name).write_bytes(data)
            _write_ids(folder)
            texts = _chunk_texts(folder, progress)
            build_lexical(folder, texts, info.chunks, info.config.language)
            tree = read_tree(folder, info.levels[::-1])
            lexical = Lexical(folder, info.config.language)
            idf = lexical.idf(np.arange(len(lexical.frequencies), dtype=np.int32))
            write_signatures(folder, tree, lexical.index, idf, progress)
            del tree, lexical
            files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
            description = {
                "image": IMAGE_VERSION,
                "snapshot": info.snapshot,
                "sizes": info.levels[::-1],
                "language": info.config.language,
                "files": files,
            }
            (folder / "image.json").write_text(json.dumps(description, indent=1))
            _replace(folder, target)
    return target


def _replace(folder: Path, target: Path) -> None:
    """Move a finished image into place, unless another process has put a whole one there: that one is being read."""
    for _ in range(10):
        try:
            os.replace(folder, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            Image(target)
            return  # images of one snapshot are equal; this one goes with the work folder
        except DamagedMemory:
            with suppress(FileNotFoundError):  # another process has just moved the damaged one
                os.replace(target, folder.parent / f"old-{time.monotonic_ns()}")  # removed with the work folder
    raise StoreError(f"{target}: other processes keep making this image; let one of them end and try again")


def _copy(store: Store, source: str, path: Path) -> None:
    array = store.array(source)
    write_npy(path, array.dtype, array.shape, store.blocks(source, array.chunks[0] * 8))


def write_tree(folder: Path, vectors: np.ndarray, levels: Sequence[Level], progress: Progress = no_progress) -> None:
    """Write every level: quantised vectors, and by parent the upper halves of the children's, side by side.

    Args:
        folder: gets the files that `read_tree` reads.
        vectors: level 1.
        levels: level 2 first.
        progress: told about rows laid out.
    """
    below = [vectors, *(level.vectors for level in levels)]
    for number, elements in enumerate(below, 1):
        if number <= len(levels):
            offsets, ids = levels[number - 1].offsets, levels[number - 1].children
        else:
            offsets = np.array([0, len(elements)], np.int64)
            ids = np.arange(len(elements), dtype=np.int32)
        scales, shape = np.empty(len(elements), np.float32), elements.shape
        path = folder / f"level-{number}-rows.npy"
        write_npy(path, np.dtype(np.int8), shape, _quantised(elements, scales, progress))
        rows = _mapped(folder, path.stem)
        path = folder / f"level-{number}-upper.npy"
        write_npy(path, np.dtype(np.uint8), (len(ids), upper_bytes(shape[1])), _upper(rows, ids, progress))
        for name, array in {"scales": scales, "upper-scales": scales[ids], "ids": ids, "offsets": offsets}.items():
            save_npy(folder / f"level-{number}-{name}.npy", array)
        if number == 1:
            save_npy(folder / "first-row.npy", first_rows(ids, len(elements)))


def _quantised(elements: np.ndarray, scales: np.ndarray, progress: Progress) -> Iterator[np.ndarray]:
    """Quantised rows of elements; fills `scales` on the way."""
    for start in range(0, len(elements), ROWS):
        rows, scales[start : start + ROWS] = quantise(as_float32(elements[start : start + ROWS]))
        if len(elements) > ROWS:
            progress("quantising vectors", start, len(elements))
        yield rows


def _upper(rows: np.ndarray, ids: np.ndarray, progress: Progress) -> Iterator[np.ndarray]:
    """Upper halves of rows in the order of `ids`."""
    for start in range(0, len(ids), ROWS):
        if len(ids) > ROWS:
            progress("laying out the tree", start, len(ids))
        yield upper_halves(rows[ids[start : start + ROWS]])


def _mapped(folder: Path, name: str) -> Any:
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def read_tree(folder: Path, sizes: tuple[int, ...], available: int | None = None) -> ServingTree:
    """What `write_tree` wrote, memory-mapped.

    Args:
        folder: where it lies.
        sizes: number of elements of each level, top first.
        available: bytes of memory that its files may take; by default what the machine has to give. Where they are
            more, single pages are read, many at once, and not each with what lies around it.

    Raises DamagedMemory where the arrays do not fit together.
    """
    levels = tuple(
        LevelBlocks(*(_mapped(folder, f"level-{number}-{part}") for part in _PARTS))
        for number in range(len(sizes), 0, -1)
    )
    files = [getattr(level, field.name) for level in levels for field in fields(level)]
    paged = sum(file.nbytes for file in files) > (available_memory() if available is None else available)
    tree = ServingTree(levels, sizes, _mapped(folder, "first-row"), paged)
    tree.check()  # reads whole files
    for file in files:
        if paged and file.size:
            file._mmap.madvise(mmap.MADV_RANDOM)
    return tree


def available_memory() -> int:
    """Bytes of memory that this process can still have: the machine's, or its control group's where that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        found = [int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": no limit
            found.append(int(Path(limit).read_text("utf-8")))
    return min(found)


def _id_hash(document_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(document_id.encode(errors="replace"), digest_size=8).digest(), "little")


def _write_ids(folder: Path) -> None:
    """Hashes of the documents' ids in rising order, each with its document's number."""
    records, ends = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("records", "record_ends"))
    hashes = np.empty(len(ends), np.uint64)
    begin = 0
    for document, end in enumerate(ends):
        hashes[document] = _id_hash(json.loads(bytes(records[begin:end]))["id"])
        begin = int(end)
    order = np.argsort(hashes, kind="stable")
    save_npy(folder / "id-hashes.npy", hashes[order])
    save_npy(folder / "id-documents.npy", order)


def _chunk_texts(folder: Path, progress: Progress) -> Iterator[str]:
    text, text_ends, chunk_ends, spans = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("text", "text_ends", "chunk_ends", "spans")
    )
    chunk = 0
    for document, end in enumerate(chunk_ends):
        begin = int(text_ends[document - 1]) if document else 0
        for _, _, first, last in spans[chunk:end]:
            yield bytes(text[begin + first : begin + last]).decode()
        if chunk // 4096 != end // 4096:
            progress("indexing words", float(end), float(len(spans)))
        chunk = int(end)


def _check_description(description: Any) -> None:
    fields = {"image": int, "snapshot": str, "sizes": list, "language": str, "files": dict}
    if not isinstance(description, dict) or any(not isinstance(description.get(f), t) for f, t in fields.items()):
        raise ValueError("image.json holds something else")
    if description["image"] != IMAGE_VERSION:
        raise ValueError(f"version {description['image']}")
    numbers = [*description["sizes"], *description["files"].values()]
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or not description["sizes"]:
        raise ValueError("image.json holds sizes that are none")


class Image:
    """One snapshot, ready to be searched: ids, scales and offsets are checked once, vectors and texts are mapped."""

    def __init__(self, folder: Path) -> None:
        """Open an image.

        Raises DamagedMemory where a file is missing, too short, or inconsistent.
        """
        self.folder = folder
        try:
            description = json.loads((folder / "image.json").read_text("utf-8"))
            _check_description(description)
            for name, size in description["files"].items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"{name} has another size")
            self.snapshot: str = description["snapshot"]
            self.tree = read_tree(folder, tuple(description["sizes"]))
            self.lexical = Lexical(folder, description["language"])
            self.signatures = read_signatures(folder, self.tree)
            """The words of all levels, top first."""
            self._text, self._text_ends, self._records, self._record_ends, self._chunk_ends, self.spans = (
                self._load(name) for name in _COPIED
            )
            self.query_map = self._load("query-map")
            """(d, d): what query vectors are multiplied by before they are compared with nodes."""
            self.hierarchy: tuple[bytes, bytes] | None = None
            """Configuration and weights of a trained hierarchy."""
            if _HIERARCHY[0] in description["files"]:
                self.hierarchy = ((folder / _HIERARCHY[0]).read_bytes(), (folder / _HIERARCHY[1]).read_bytes())
            self._id_hashes, self._id_documents = self._load("id-hashes"), self._load("id-documents")
        except (OSError, ValueError, EOFError, RecursionError, DamagedMemory) as error:
            raise DamagedMemory(f"{folder}: the serving image is damaged ({error}); delete the folder") from error

        if len(self._id_hashes) != self.documents or len(self.spans) != self.tree.sizes[-1]:
            raise DamagedMemory(f"{folder}: the serving image is damaged (counts differ); delete the folder")

    def _load(self, name: str) -> Any:
        return _mapped(self.folder, name)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self._text_ends)

    @property
    def chunk_ends(self) -> np.ndarray:
        """Where each document's chunks end, shape (documents,)."""
        return np.asarray(self._chunk_ends)

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self.spans)

    def number_of(self, document_id: str) -> int | None:
        """The number of the document with this id, None where there is none."""
        wanted = np.uint64(_id_hash(document_id))
        place = int(np.searchsorted(self._id_hashes, wanted))
        while place < len(self._id_hashes) and self._id_hashes[place] == wanted:
            number = int(self._id_documents[place])
            if self.record(number)["id"] == document_id:
                return number
            place += 1
        return None

    def document_of(self, chunks: np.ndarray) -> np.ndarray:
        """Numbers of the documents that chunks stand in."""
        return np.asarray(np.searchsorted(self._chunk_ends, chunks, side="right"))

    def bounds(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents' chunks begin and end."""
        begin = np.where(documents > 0, self._chunk_ends[documents - 1], 0)
        return begin, np.asarray(self._chunk_ends[documents])

    def chunks_of(self, document: int) -> range:
        """The chunks of a document."""
        return range(int(self._chunk_ends[document - 1]) if document else 0, int(self._chunk_ends[document]))

    def record(self, document: int) -> dict[str, Any]:
        """Id, title and metadata of a document."""
        begin = int(self._record_ends[document - 1]) if document else 0
        record = json.loads(bytes(self._records[begin : int(self._record_ends[document])]))
        assert isinstance(record, dict)
        return record

    def reference(self, document: int) -> DocumentRef:
        """Id and title of a document."""
        record = self.record(document)
        return DocumentRef(record["id"], record["title"])

    def text(self, document: int) -> str:
        """The whole text of a document."""
        begin = int(self._text_ends[document - 1]) if document else 0
        return bytes(self._text[begin : int(self._text_ends[document])]).decode()

    def document(self, document: int) -> Document:
        """A whole document."""
        record = self.record(document)
        return Document(record["id"], self.text(document), record["title"], record["metadata"])

    def span(self, chunk: int) -> Span:
        """Characters of a chunk in its document's text."""
        return int(self.spans[chunk, 0]), int(self.spans[chunk, 1])

    def chunk_text(self, chunk: int) -> str:
        """The text of a chunk, read without the rest of its document."""
        return self.run_text(chunk, chunk)

    def run_text(self, first: int, last: int) -> str:
        """The text from the beginning of one chunk to the end of another of the same document."""
        document = int(self.document_of(np.array(first)))
        begin = int(self._text_ends[document - 1]) if document else 0
        return bytes(self._text[begin + int(self.spans[first, 2]) : begin + int(self.spans[last, 3])]).decode()
