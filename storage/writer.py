"""Writing arrays row by row, with a digest of each that follows what is written instead of reading everything again.

The digest of an array is the sum, modulo 2^256, of the SHA-256 of every storage chunk with its place (an additive
multiset hash, Bellare and Micciancio 1997, "A new paradigm for collision-free hashing"): a chunk's share is taken out
and put in anew when it changes. It is there to notice damage, not to withstand forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zarr

from treemem.storage.schema import ArraySpec, create_array

Rows = np.ndarray
_MODULUS = 1 << 256
_THREADS = 8
_AT_ONCE = 16  # storage chunks that are read or written together


class Writer:
    """Changes arrays of one Zarr hierarchy and keeps their digests; `digests` has them by path."""

    def __init__(self, root: Any, digests: dict[str, str]) -> None:
        """Wrap a writable group whose arrays have these digests."""
        self.root = root
        self.digests = dict(digests)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def array(self, path: str) -> zarr.Array[Any]:
        """An array, looked up once."""
        if path not in self._arrays:
            self._arrays[path] = self.root[path]
        return self._arrays[path]

    def create(self, path: str, spec: ArraySpec, rows: Rows | None = None) -> None:
        """Make an array, in place of one that is there, and fill it."""
        self.remove(path)
        array = self._arrays[path] = create_array(self.root, path, spec, 0 if rows is None else len(rows))
        total = 0
        if rows is not None and len(rows):
            rows = np.asarray(rows, array.dtype)
            array[:] = rows
            total = digest_of(array, lambda first, last: rows[first:last])
        self.digests[path] = _told(total)

    def remove(self, path: str) -> None:
        """Remove an array, if it is there."""
        if path in self.digests:
            del self.root[path]
            self.digests.pop(path)
            self._arrays.pop(path, None)

    def append(self, path: str, rows: Rows) -> None:
        """Add rows at the end."""
        if len(rows) == 0:
            return
        array = self.array(path)
        size = array.shape[0]
        begin = size - size % array.chunks[0]
        last = np.asarray(array[begin:size]) if begin < size else None
        array.resize((size + len(rows), *array.shape[1:]))
        # Whole storage chunks are written, so that none is read a second time for its first rows.
        rows = np.asarray(rows, array.dtype)
        rows = rows if last is None else np.concatenate([last, rows])
        array[begin:] = rows
        step, total = array.chunks[0], int(self.digests[path], 16)
        if last is not None:
            total -= _leaf(begin // step, last)
        for place in range(0, len(rows), step):
            total += _leaf((begin + place) // step, rows[place : place + step])
        self.digests[path] = _told(total)

    def put(self, path: str, places: np.ndarray, rows: Rows) -> None:
        """Write rows anew.

        Args:
            path: the array.
            places: int [n], rising, each once, below the array's length.
            rows: [n, …].
        """
        array = self.array(path)
        step, size, total = array.chunks[0], array.shape[0], int(self.digests[path], 16)
        rows = np.asarray(rows, array.dtype)
        chunks, starts = np.unique(places // step, return_index=True)
        ends = np.append(starts[1:], len(places))
        for first in range(0, len(chunks), _AT_ONCE):
            own = chunks[first : first + _AT_ONCE]
            wanted = np.concatenate([np.arange(c * step, min((c + 1) * step, size)) for c in own])
            whole = np.asarray(array.oindex[wanted])
            begin = 0
            for i, chunk in enumerate(own, first):
                block = whole[begin : begin + min(step, size - chunk * step)]
                begin += len(block)
                total -= _leaf(int(chunk), block)
                block[places[starts[i] : ends[i]] - chunk * step] = rows[starts[i] : ends[i]]
                total += _leaf(int(chunk), block)
            array.oindex[wanted] = whole
        self.digests[path] = _told(total)

    def truncate(self, path: str, size: int) -> None:
        """Leave the first `size` rows alone."""
        array = self.array(path)
        step, total = array.chunks[0], int(self.digests[path], 16)
        begin = size - size % step
        rest = np.asarray(array[begin:])
        for place in range(0, len(rest), step):
            total -= _leaf((begin + place) // step, rest[place : place + step])
        array.resize((size, *array.shape[1:]))
        if begin < size:
            # What lies behind the end in the last storage chunk goes too.
            array[begin:size] = rest[: size - begin]
            total += _leaf(begin // step, rest[: size - begin])
        self.digests[path] = _told(total)


def together(calls: Sequence[Callable[[], object]]) -> None:
    """Make calls that write different arrays at once: most of their time they wait for the storage."""
    if len(calls) < 2:
        for call in calls:
            call()
        return
    with ThreadPoolExecutor(min(_THREADS, len(calls))) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def digest_of(array: Any, read: Callable[[int, int], Rows] | None = None) -> int:
    """The digest of a whole array. `read(first, last)` gives its rows, by default from the array."""
    step, size, total = array.chunks[0], array.shape[0], 0
    for start in range(0, size, step * _AT_ONCE):
        end = min(start + step * _AT_ONCE, size)
        block = np.asarray(array[start:end] if read is None else read(start, end))
        for place in range(0, len(block), step):
            total += _leaf((start + place) // step, block[place : place + step])
    return total % _MODULUS


def digest(array: Any) -> str:
    """The digest of a whole array, as `Writer.digests` has it."""
    return _told(digest_of(array))


def _leaf(place: int, rows: Rows) -> int:
    own = hashlib.sha256(f"{place} {rows.dtype} {rows.shape}".encode())
    own.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
    return int.from_bytes(own.digest(), "little")


def _told(total: int) -> str:
    return f"{total % _MODULUS:064x}"
