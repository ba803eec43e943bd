"""The serving image of one snapshot: what walks and searches read, memory-mapped, derived from the store.

It lies in `cache/<snapshot>` inside the memory's folder and can be deleted at any time: it is made again. The image of
a snapshot that an edit has made shares its arrays with that of the one before: it appends to them, and says of each how
many rows are its own (`treemem.storage.follow`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from treemem.errors import DamagedMemory, StoreError
from treemem.kernels import BackEnd, LevelBlocks, ServingTree, back_end, quantise, upper_halves
from treemem.kernels.tree import upper_bytes
from treemem.storage.files import checksum, map_npy, save_npy, work_folder, write_npy
from treemem.storage.levels import CLUSTERING_POWER, Level, as_float32
from treemem.storage.lexical import Lexical, build_lexical
from treemem.storage.schema import PRESENT, REMOVED
from treemem.storage.signatures import read_signatures, write_signatures
from treemem.storage.store import Store, guard
from treemem.types import Document, DocumentRef, Progress, Span, no_progress

IMAGE_VERSION = 6
CHECKED_BYTES = 32 << 20
"""So much of an image is compared with its checksums whenever it is opened, small files first, and all of it by
`verify`: 10 ms, in which memories of some 20,000 chunks are compared whole, of larger ones the tree's shape."""
ROWS = 16_384
_COPIED = {
    "text": "documents/text",
    "text_ends": "documents/text_ends",
    "records": "documents/records",
    "record_ends": "documents/record_ends",
    "chunk_ends": "documents/chunk_ends",
    "spans": "chunks/spans",
}
PARTS = ("rows", "scales", "upper", "upper-scales", "ids", "offsets")
OWN = ("status",)
"""Arrays that are not appended to: every image has its own, or shares one that never changes."""
FIXED = ("query-map", "cluster-map", "cluster-mean", "id-hashes", "id-documents")
HIERARCHY_FILES = ("hierarchy.json", "hierarchy.safetensors")


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
            _copy(store, "documents/status", folder / "status.npy")
            levels = store.levels()
            # Without nodes it is the chunks that stand at the top, those of removed documents left out.
            status, ends = (map_npy(folder / f"{name}.npy") for name in ("status", "chunk_ends"))
            present = np.flatnonzero(np.repeat(status != REMOVED, np.diff(ends, prepend=0))).astype(np.int32)
            write_tree(folder, vectors, levels, progress, top=None if levels else present)
            for number, level in enumerate(levels, 2):
                save_npy(folder / f"level-{number}-names.npy", np.arange(len(level.vectors), dtype=np.int32))
                save_npy(folder / f"level-{number}-vectors.npy", level.vectors)
            spread = store.spread()
            save_npy(folder / "query-map.npy", spread.map_queries())
            save_npy(folder / "cluster-map.npy", spread.scaling(CLUSTERING_POWER))
            save_npy(folder / "cluster-mean.npy", spread.mean)
            for name, data in zip(HIERARCHY_FILES, store.hierarchy() or (), strict=False):
                (folder / name).write_bytes(data)
            _write_ids(folder)
            texts = _chunk_texts(folder, progress)
            words = build_lexical(folder, texts, info.levels[0], info.config.language)
            tree = read_tree(folder, info.levels[::-1])
            lexical = Lexical(folder, info.config.language, info.chunks, words)
            write_signatures(folder, tree, lexical.index, lexical.all_idf(), progress)
            del tree, lexical
            describe(
                folder,
                {
                    "snapshot": info.snapshot,
                    "sizes": info.levels[::-1],
                    "language": info.config.language,
                    "chunks": info.chunks,
                    "words": words,
                    "fresh": True,
                },
                {file.stem: _npy_rows(file) for file in sorted(folder.glob("*.npy"))},
            )
            replace_folder(folder, target)
    return target


def describe(folder: Path, fields: dict[str, Any], rows: dict[str, int], sums: Mapping[str, int] | None = None) -> None:
    """Write what an image says of itself, last of all.

    Args:
        folder: holds its other files.
        fields: beside version, files and rows.
        rows: how many rows of each array are its own.
        sums: checksums of files, as far as they are known.
    """
    own = {name: count for name, count in rows.items() if name not in (*OWN, *FIXED)}
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name, size = str(file.relative_to(folder)), file.stat().st_size
            files[name] = size, sums[name] if sums and name in sums else checksum(file, size)
    description = {"image": IMAGE_VERSION, **fields, "rows": own, "files": files}
    (folder / "image.json").write_text(json.dumps({**description, "sum": description_sum(description)}, indent=1))


def description_sum(description: Mapping[str, Any]) -> int:
    """Checksum of what an image says of itself."""
    return zlib.crc32(json.dumps({name: own for name, own in description.items() if name != "sum"}).encode())


def _npy_rows(file: Path) -> int:
    return int(np.load(file, mmap_mode="r", allow_pickle=False).shape[0])


def replace_folder(folder: Path, target: Path) -> None:
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


def write_tree(
    folder: Path,
    vectors: np.ndarray,
    levels: Sequence[Level],
    progress: Progress = no_progress,
    *,
    top: np.ndarray | None = None,
) -> None:
    """Write every level: quantised vectors, and by parent the upper halves of the children's, side by side.

    Args:
        folder: gets the files that `read_tree` reads.
        vectors: level 1.
        levels: level 2 first.
        progress: told about rows laid out.
        top: which elements stand at the top; by default all of the last level.
    """
    below = [vectors, *(level.vectors for level in levels)]
    for number, elements in enumerate(below, 1):
        if number <= len(levels):
            offsets, ids = levels[number - 1].offsets, levels[number - 1].children
        else:
            ids = np.arange(len(elements), dtype=np.int32) if top is None else top
            offsets = np.array([0, len(ids)], np.int64)
        scales, shape = np.empty(len(elements), np.float32), elements.shape
        path = folder / f"level-{number}-rows.npy"
        write_npy(path, np.dtype(np.int8), shape, _quantised(elements, scales, progress))
        rows = map_npy(path)
        path = folder / f"level-{number}-upper.npy"
        write_npy(path, np.dtype(np.uint8), (len(ids), upper_bytes(shape[1])), _upper(rows, ids, progress))
        for name, array in {"scales": scales, "upper-scales": scales[ids], "ids": ids, "offsets": offsets}.items():
            save_npy(folder / f"level-{number}-{name}.npy", array)


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


def read_tree(
    folder: Path,
    sizes: tuple[int, ...],
    available: int | None = None,
    *,
    rows: Mapping[str, int] | None = None,
) -> ServingTree:
    """What `write_tree` wrote, memory-mapped.

    Args:
        folder: where it lies.
        sizes: number of elements of each level, top first.
        available: bytes of memory that its files may take; by default what the machine has to give. Where they are
            more, single pages are read, many at once, and not each with what lies around it.
        rows: how many rows of each array belong to it; by default all.

    Raises DamagedMemory where the arrays do not fit together.
    """
    levels, files = [], []
    for number in range(len(sizes), 0, -1):
        names = [f"level-{number}-{part}" for part in PARTS]
        parts = [map_npy(folder / f"{name}.npy", None if rows is None else rows[name]) for name in names]
        files += parts
        if number == len(sizes):  # after an edit the top has its children behind those that it had before
            parts[-1] = np.ascontiguousarray(parts[-1][-2:])
        levels.append(LevelBlocks(*parts))
    paged = sum(file.nbytes for file in files) > (available_memory() if available is None else available)
    tree = ServingTree(tuple(levels), sizes, paged)
    tree.check()  # reads whole files
    for blocks, by_page in zip(levels, tree.paged_levels, strict=True):
        for file in vars(blocks).values():
            if by_page and isinstance(file, np.memmap):
                file._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
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


def id_hash(document_id: str) -> int:
    """By which a document is looked up."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(errors="replace"), digest_size=8).digest(), "little")


def _write_ids(folder: Path) -> None:
    """Hashes of the documents' ids in rising order, each with its document's number; later ones go to the tail."""
    records, ends, status = (map_npy(folder / f"{name}.npy") for name in ("records", "record_ends", "status"))
    hashes = np.zeros(len(ends), np.uint64)
    begin = 0
    for document, end in enumerate(ends):
        if status[document] != REMOVED:
            hashes[document] = id_hash(json.loads(bytes(records[begin:end]))["id"])
        begin = int(end)
    order = np.argsort(hashes, kind="stable")
    save_npy(folder / "id-hashes.npy", hashes[order])
    save_npy(folder / "id-documents.npy", order)
    save_npy(folder / "id-tail.npy", np.empty(0, np.uint64))


def _chunk_texts(folder: Path, progress: Progress) -> Iterator[str | None]:
    """The texts of the chunks, None for those of removed documents."""
    text, text_ends, chunk_ends, spans, status = (
        map_npy(folder / f"{name}.npy") for name in ("text", "text_ends", "chunk_ends", "spans", "status")
    )
    chunk = 0
    for document, end in enumerate(chunk_ends):
        begin = int(text_ends[document - 1]) if document else 0
        for _, _, first, last in spans[chunk:end]:
            yield None if status[document] == REMOVED else bytes(text[begin + first : begin + last]).decode()
        if chunk // 4096 != end // 4096:
            progress("indexing words", float(end), float(len(spans)))
        chunk = int(end)


def _check_description(description: Any) -> None:
    fields = {
        "image": int, "snapshot": str, "sizes": list, "language": str, "chunks": int, "words": int,
        "fresh": bool, "files": dict, "rows": dict,
    }  # fmt: skip
    if not isinstance(description, dict) or description.get("image") != IMAGE_VERSION:
        raise ValueError("another version" if isinstance(description, dict) else "image.json holds something else")
    if description.get("sum") != description_sum(description):
        raise ValueError("image.json is not what was written")
    if any(not isinstance(description.get(f), t) for f, t in fields.items()):
        raise ValueError("image.json holds something else")
    numbers = [*description["sizes"], *description["rows"].values(), description["chunks"], description["words"]]
    for own in description["files"].values():
        if not isinstance(own, list) or len(own) != 2:
            raise ValueError("image.json holds something else")
        numbers += own
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or not description["sizes"]:
        raise ValueError("image.json holds sizes that are none")


class Image:
    """One snapshot, ready to be searched: ids, scales and offsets are checked once, vectors and texts are mapped.

    Nodes have numbers, by which the store knows them, and places in the tree, which an edit gives anew. Chunks and
    documents keep their numbers; those of removed ones stand empty.
    """

    def __init__(self, folder: Path) -> None:
        """Open an image.

        Raises DamagedMemory where a file is missing, too short, or inconsistent.
        """
        self.folder = folder
        try:
            description = json.loads((folder / "image.json").read_text("utf-8"))
            _check_description(description)
            self._rows: dict[str, int] = description["rows"]
            self.files: dict[str, tuple[int, int]] = {name: (a, b) for name, (a, b) in description["files"].items()}
            """Size and checksum of each file; what is appended to for a later snapshot lies behind it."""
            self.language: str = description["language"]
            for name, (size, _) in self.files.items():
                found = (folder / name).stat().st_size
                if found < size or (found > size and Path(name).stem not in self._rows):
                    raise ValueError(f"{name} has another size")
            if changed := self.changed_files(CHECKED_BYTES):
                raise ValueError(f"{changed[0]} is not what was written")
            self.snapshot: str = description["snapshot"]
            self.chunks: int = description["chunks"]
            """How many chunks the documents have that are there."""
            self.words: int = description["words"]
            """How many words these have."""
            self.fresh: bool = description["fresh"]
            """Whether it was written as a whole: nodes then stand at their numbers."""
            sizes = tuple(description["sizes"])
            self.tree = read_tree(folder, sizes, rows=self._rows)
            self.lexical = Lexical(folder, self.language, self.chunks, self.words, self._rows)
            self.signatures = read_signatures(folder, self.tree, self._rows)
            """The words of all levels, top first."""
            self._text, self._text_ends, self._records, self._record_ends, self._chunk_ends, self.spans = (
                self._load(name) for name in _COPIED
            )
            self.status: np.ndarray = np.asarray(self._load("status"))
            """[documents] `treemem.storage.schema.PRESENT`, `MASKED` or `REMOVED`."""
            self.query_map = self._load("query-map")
            """(d, d): what query vectors are multiplied by before they are compared with nodes."""
            self.hierarchy: tuple[bytes, bytes] | None = None
            """Configuration and weights of a trained hierarchy."""
            if HIERARCHY_FILES[0] in description["files"]:
                self.hierarchy = (
                    (folder / HIERARCHY_FILES[0]).read_bytes(),
                    (folder / HIERARCHY_FILES[1]).read_bytes(),
                )
            self._id_hashes, self._id_documents = self._load("id-hashes"), self._load("id-documents")
            self._id_tail = self._load("id-tail")
            self.cluster_map, self.cluster_mean = self._load("cluster-map"), self._load("cluster-mean")
            """(d, d) and (d): what vectors are multiplied by, less their mean, before they are clustered."""
            self._names = tuple(self._load(f"level-{number}-names") for number in range(len(sizes), 1, -1))
        except (OSError, ValueError, EOFError, RecursionError, LookupError, DamagedMemory) as error:
            raise self._damaged(error) from error

        known = len(self._id_hashes) + len(self._id_tail)
        if not known == len(self._text_ends) == len(self.status) or len(self.spans) != self.tree.sizes[-1]:
            raise self._damaged(ValueError("counts differ"))
        for ends, total in (
            (self._text_ends, len(self._text)),
            (self._record_ends, len(self._records)),
            (self._chunk_ends, len(self.spans)),
        ):
            if len(ends) and (ends[0] < 0 or ends[-1] != total or (np.diff(ends) < 0).any()):
                raise self._damaged(ValueError("documents do not end one after the other"))

    def _load(self, name: str) -> Any:
        return map_npy(self.folder / f"{name}.npy", self._rows.get(name))

    def changed_files(self, most: int | None = None, progress: Progress = no_progress) -> list[str]:
        """Names of the files that do not have their checksums.

        Args:
            most: only so many bytes are read, of the smallest files; by default all.
            progress: told about megabytes.

        Raises OSError where a file cannot be read.
        """
        done, total = 0, sum(size for size, _ in self.files.values())
        changed = []
        for name, (size, sum_) in sorted(self.files.items(), key=lambda item: item[1]):
            if most is not None and done + size > most:
                break
            progress("checking the serving image", done >> 20, total >> 20)
            if checksum(self.folder / name, size) != sum_:
                changed.append(name)
            done += size
        return changed

    @property
    def rows(self) -> dict[str, int]:
        """How many rows of each array are its own."""
        return dict(self._rows)

    @cached_property
    def hidden(self) -> bool:
        """Whether there are documents that were masked or removed."""
        return bool((self.status != PRESENT).any())

    @cached_property
    def visible(self) -> np.ndarray:
        """Of every chunk whether its document is neither masked nor removed, uint8."""
        return np.repeat((self.status == PRESENT).astype(np.uint8), np.diff(self._chunk_ends, prepend=0))

    # ---- nodes

    def names(self, level: int) -> np.ndarray:
        """The numbers of the nodes of a level, 2 or higher, by their places in the tree."""
        return np.asarray(self._names[self.tree.depth - level])

    def places(self, level: int) -> np.ndarray:
        """The places in the tree of the nodes of a level, 2 or higher, by their numbers."""
        return self._places[self.tree.depth - level]

    @cached_property
    def _places(self) -> tuple[np.ndarray, ...]:
        out = []
        for names, live in zip(self._names, self.tree.live_nodes, strict=True):
            if not np.array_equal(np.sort(names[live]), np.arange(len(live))):
                raise self._damaged(ValueError("numbers of nodes are missing"))
            places = np.empty(len(live), np.int32)
            places[names[live]] = live
            out.append(places)
        return tuple(out)

    def node_vectors(self, level: int) -> np.ndarray:
        """The vectors of the nodes of a level, float16, by their places in the tree; of level 1 where edits left them.

        Raises DamagedMemory where their file cannot be read.
        """
        try:
            return np.asarray(self._load(f"level-{level}-vectors"))
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many elements of each level stand in the tree, top first, the chunks last."""
        return (*(len(live) for live in self.tree.live_nodes), self.chunks)

    @cached_property
    def _factors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The map of queries: its diagonal and, quantised, the rest. Every query reads it whole."""
        diagonal = np.diagonal(self.query_map).astype(np.float32)
        factors = diagonal, *quantise(self.query_map.T - np.diag(diagonal))
        for factor in factors:
            factor.flags.writeable = False
        return factors

    def asked(self, vectors: np.ndarray, kernels: BackEnd | None = None) -> np.ndarray:
        """Vectors as each level is compared with them: float32 [n, d] to [depth, n, d], top first.

        Nodes: see `treemem.storage.levels.Spread`.
        """
        out = np.empty((self.tree.depth, *vectors.shape), np.float32)
        if self.tree.depth > 1:
            out[:-1] = (kernels or back_end()).project(*self._factors, np.asarray(vectors, np.float32))
        out[-1] = vectors
        return out

    # ---- documents

    @property
    def documents(self) -> int:
        """How many numbers documents have; those of removed ones stay empty."""
        return len(self._text_ends)

    @property
    def chunk_ends(self) -> np.ndarray:
        """Where each document's chunks end, shape (documents,)."""
        return np.asarray(self._chunk_ends)

    def number_of(self, document_id: str) -> int | None:
        """The number of the document with this id, None where there is none."""
        wanted = np.uint64(id_hash(document_id))
        place = int(np.searchsorted(self._id_hashes, wanted))
        numbers = []
        while place < len(self._id_hashes) and self._id_hashes[place] == wanted:
            numbers.append(int(self._id_documents[place]))
            place += 1
        numbers += (np.flatnonzero(self._id_tail == wanted) + len(self._id_hashes)).tolist()
        for number in numbers:
            if number >= len(self.status) or number < 0:
                raise self._damaged(ValueError("an id leads to no document"))
            if self.status[number] != REMOVED and self.record(number)["id"] == document_id:
                return number
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

    def content(self, document: int) -> tuple[bytes, bytes]:
        """Record and text of a document as they are stored."""
        first, last = (int(self._text_ends[document - 1]) if document else 0), int(self._text_ends[document])
        return self._record_bytes(document), bytes(self._text[first:last])

    def _record_bytes(self, document: int) -> bytes:
        begin = int(self._record_ends[document - 1]) if document else 0
        return bytes(self._records[begin : int(self._record_ends[document])])

    def record(self, document: int) -> dict[str, Any]:
        """Id, title and metadata of a document.

        Raises DamagedMemory where the image's file holds something else.
        """
        try:
            record: dict[str, Any] = json.loads(self._record_bytes(document))
            return {"id": record["id"], "title": record["title"], "metadata": record["metadata"]}
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(error) from error

    def reference(self, document: int) -> DocumentRef:
        """Id and title of a document."""
        record = self.record(document)
        return DocumentRef(record["id"], record["title"])

    def text(self, document: int) -> str:
        """The whole text of a document.

        Raises DamagedMemory where the image's file holds something else than text.
        """
        begin = int(self._text_ends[document - 1]) if document else 0
        return self._decoded(begin, int(self._text_ends[document]))

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
        return self._decoded(begin + int(self.spans[first, 2]), begin + int(self.spans[last, 3]))

    def _decoded(self, begin: int, end: int) -> str:
        try:
            return bytes(self._text[begin:end]).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DamagedMemory:
        return DamagedMemory(f"{self.folder}: the serving image is damaged ({error}); delete the folder")
