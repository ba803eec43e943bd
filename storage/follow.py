"""The serving image of a snapshot that an edit has made, from that of the one before, by what has changed.

Nothing in the arrays of an image is ever changed: an edit appends. A node that has changed is appended anew, with the
block of its children, and so is its parent, up to the top (path copying: Driscoll et al. 1989, "Making data structures
persistent"). So both images share one set of files by hard links, and a search of either reads what it always read.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from treemem.kernels import quantise, upper_halves
from treemem.storage.change import Change
from treemem.storage.files import append_npy, read_header, save_npy
from treemem.storage.image import Image, describe, id_hash
from treemem.storage.levels import as_float32
from treemem.storage.lexical import Lexical, update_index
from treemem.storage.schema import REMOVED
from treemem.storage.signatures import append_signatures
from treemem.storage.store import document_rows

VECTORS = "level-1-vectors"
"""The array of level 1 in float16, which edits need and searches do not: made by the first edit."""


class _Arrays:
    """The arrays of an image that is being made: linked, then appended to."""

    def __init__(self, folder: Path, rows: dict[str, int], sums: dict[str, int]) -> None:
        self.folder = folder
        self.rows = rows
        self.sums = sums
        self._headers: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}

    def append(self, name: str, array: np.ndarray) -> None:
        if len(array):
            path = self._path(name)
            data = append_npy(path, array.astype(self._header(name)[0], copy=False))
            self.rows[name] += len(array)
            if path.name in self.sums:
                self.sums[path.name] = zlib.crc32(data.data, self.sums[path.name])

    def read(self, name: str) -> np.ndarray:
        dtype, row, begin = self._header(name)
        shape = (self.rows[name], *row)
        return np.empty(shape, dtype) if 0 in shape else np.memmap(self._path(name), dtype, "r", begin, shape)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _header(self, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
        if name not in self._headers:
            with self._path(name).open("rb") as file:
                dtype, shape = read_header(file)
                self._headers[name] = dtype, shape[1:], file.tell()
        return self._headers[name]


def follow(folder: Path, image: Image, change: Change, snapshot: str) -> None:
    """Write the image of a new snapshot.

    Args:
        folder: gets it; holds `level-1-vectors.npy` of the snapshot before already, where `image` does not.
        image: of the snapshot before.
        change: what was committed; no tree that was grown anew.
        snapshot: the new one.
    """
    arrays = _Arrays(folder, image.rows, share(image, folder))
    if VECTORS not in arrays.rows and (folder / f"{VECTORS}.npy").exists():
        arrays.rows[VECTORS] = len(image.spans)
    save_npy(folder / "status.npy", change.status)
    _append_documents(arrays, change)
    chunks, words = _append_words(arrays, image, change)
    lexical = Lexical(folder, image.language, chunks, words, arrays.rows)
    sizes = _append_tree(arrays, image, change, lexical)
    fields: dict[str, Any] = {
        "snapshot": snapshot, "sizes": sizes, "language": image.language, "chunks": chunks, "words": words,
        "fresh": False,
    }  # fmt: skip
    describe(folder, fields, arrays.rows, arrays.sums)


def share(image: Image, folder: Path) -> dict[str, int]:
    """Link the files of an image into a folder; what another edit has appended to is copied as far as it is ours.

    Returns their checksums.
    """
    sums = {}
    for name, (size, sum_) in image.files.items():
        source, target = image.folder / name, folder / name
        if name in ("image.json", "status.npy") or target.exists():
            continue
        target.parent.mkdir(exist_ok=True)
        if source.parent.name == "bm25" and (source.suffix in (".json", ".lock") or source.name.startswith(".")):
            shutil.copy(source, target)  # tantivy writes these anew
            continue
        sums[name] = sum_
        if source.stat().st_size == size and _linked(source, target):
            continue
        else:
            with source.open("rb") as file, target.open("wb") as copy:
                left = size
                while left and (block := file.read(min(left, 1 << 24))):
                    copy.write(block)
                    left -= len(block)
    return sums


def _linked(source: Path, target: Path) -> bool:
    with suppress(OSError):  # a file system without hard links
        os.link(source, target)
        return True
    return False


def _append_documents(arrays: _Arrays, change: Change) -> None:
    ends = {"text_ends": "text", "record_ends": "records", "chunk_ends": "spans"}
    rows = document_rows(change.added, {name: arrays.rows[of] for name, of in ends.items()})
    for name, own in rows.items():
        arrays.append(name, own)
    arrays.append("id-tail", np.array([id_hash(new.document.id) for new in change.added], np.uint64))


def _append_words(arrays: _Arrays, image: Image, change: Change) -> tuple[int, int]:
    """Follow with both indexes of words. Returns how many chunks there are, and how many words they have."""
    texts = [new.document.text[a:b] for new in change.added for a, b in new.spans]
    gone = [chunk for document in change.removed for chunk in image.chunks_of(document)]
    lengths = arrays.read("words-lengths")
    words = image.words - int(lengths[gone].sum())
    first = len(lengths)
    index = image.lexical.index
    counts = Counter(term for chunk in gone for term in index.terms[slice(*index.offsets[chunk : chunk + 2])].tolist())
    added = image.lexical.entries(texts)
    for name in ("tail", "terms", "counts", "lengths"):
        arrays.append(f"words-{name}", added[name])
    arrays.append("words-offsets", arrays.read("words-offsets")[-1] + np.cumsum(added["entries"]))
    changes = Counter(added["terms"].tolist())
    changes.subtract(counts)
    arrays.append("words-changes", np.array(sorted(changes.items()), np.int32).reshape(-1, 2))
    if texts or gone:
        update_index(arrays.folder / "bm25", image.language, texts, first, gone)
    return image.chunks - len(gone) + len(texts), words + int(added["lengths"].sum())


def _append_tree(arrays: _Arrays, image: Image, change: Change, lexical: Lexical) -> list[int]:
    """Append what has changed of the tree. Returns how many elements each level has, top first."""
    tree = image.tree
    if not change.tree.levels and (tree.depth > 1 or not (len(change.vectors) or change.removed)):
        return list(tree.sizes)
    rows, scales = quantise(as_float32(change.vectors))
    arrays.append("level-1-rows", rows)
    arrays.append("level-1-scales", scales)
    if VECTORS in arrays.rows:
        arrays.append(VECTORS, change.vectors)
    sizes = [tree.sizes[-1] + len(rows)]
    words = lexical.index, lexical.all_idf()
    places: np.ndarray | None = None  # of the level's elements, by their numbers; chunks stand at theirs
    for number, level in enumerate(change.tree.levels, 2):
        _append_blocks(arrays, number - 1, [own if places is None else places[own] for own in level.children])
        append_signatures(arrays, number - 1, len(level.nodes), *words)
        rows, scales = quantise(as_float32(level.vectors))
        first = tree.sizes[tree.depth - number]
        parts: dict[str, np.ndarray] = {"rows": rows, "scales": scales, "names": level.nodes, "vectors": level.vectors}
        for name, array in parts.items():
            arrays.append(f"level-{number}-{name}", array)
        before = image.places(number)
        places = np.full(max(level.size, len(before)), -1, np.int32)
        places[: len(before)] = before
        places[level.nodes] = first + np.arange(len(level.nodes), dtype=np.int32)
        places = places[: level.size]
        sizes.append(first + len(level.nodes))
    if places is None:
        alive = np.repeat(change.status != REMOVED, np.diff(arrays.read("chunk_ends"), prepend=0))
        places = np.flatnonzero(alive).astype(np.int32)
    _append_blocks(arrays, tree.depth, [places])
    append_signatures(arrays, tree.depth, 1, *words)
    return sizes[::-1]


def _append_blocks(arrays: _Arrays, number: int, blocks: list[np.ndarray]) -> None:
    """Append blocks of children, elements of level `number`."""
    ids = np.concatenate([np.empty(0, np.int32), *blocks])
    arrays.append(f"level-{number}-upper", upper_halves(arrays.read(f"level-{number}-rows")[ids]))
    arrays.append(f"level-{number}-upper-scales", arrays.read(f"level-{number}-scales")[ids])
    ends = arrays.rows[f"level-{number}-ids"] + np.cumsum(np.array([len(block) for block in blocks], np.int64))
    arrays.append(f"level-{number}-ids", ids)
    arrays.append(f"level-{number}-offsets", ends)
