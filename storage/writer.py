"""Writing arrays row by row, with a digest of each that follows what is written instead of reading everything again.

The digest of an array is the sum, modulo 2^256, of the SHA-256 of every storage chunk with its place (an additive
multiset hash, Bellare and Micciancio 1997, "A new paradigm for collision-free hashing"): a chunk's share is taken out
and put in anew when it changes. It is there to notice damage, not to withstand forgery.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import zarr
from zarr.api.asynchronous import open_array
from zarr.buffer.cpu import Buffer, buffer_prototype
from zarr.core.sync import sync

from treemem.storage.schema import ArraySpec, create_array, decode_chunk, encode_chunk

Rows = np.ndarray
T = TypeVar("T")
_MODULUS = 1 << 256
_AT_ONCE = 16  # storage chunks of an array that are read or written together


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
        self._arrays[path] = create_array(self.root, path, spec)
        self.digests[path] = _told(0)
        if rows is not None:
            self.append(path, rows)

    def remove(self, path: str) -> None:
        """Remove an array, if it is there."""
        if path in self.digests:
            del self.root[path]
            self.digests.pop(path)
            self._arrays.pop(path, None)

    def together(self, paths: Iterable[str], changes: Callable[[], Iterable[Awaitable[None]]]) -> None:
        """Make several changes at once: most of their time they wait for the storage.

        Args:
            paths: the arrays that they are of.
            changes: gives what is to be awaited, `appending`, `putting` or `truncating`.
        """
        missing = [path for path in paths if path not in self._arrays]

        async def looked_up_and_changed() -> None:
            found = await all_of(open_array(store=self.root.store_path, path=path, mode="r+") for path in missing)
            self._arrays.update(zip(missing, map(zarr.Array, found), strict=True))
            await all_of(changes())

        sync(looked_up_and_changed())

    def append(self, path: str, rows: Rows) -> None:
        """Add rows at the end."""
        self.together([path], lambda: [self.appending(path, rows)])

    async def appending(self, path: str, rows: Rows) -> None:
        """See `append`."""
        if len(rows) == 0:
            return
        array = self.array(path)
        first, inside = divmod(array.shape[0], array.chunks[0])
        rows, total = np.asarray(rows, array.dtype), int(self.digests[path], 16)
        if inside:
            last = (await _read(array, [first]))[0][:inside]
            total -= _leaf(first, last)
            rows = np.concatenate([last, rows])
        step = array.chunks[0]
        await array.async_array.resize((first * step + len(rows), *array.shape[1:]))
        blocks = [(first + n, rows[begin : begin + step]) for n, begin in enumerate(range(0, len(rows), step))]
        self.digests[path] = _told(total + await _write(array, blocks))

    def put(self, path: str, places: np.ndarray, rows: Rows) -> None:
        """Write rows anew.

        Args:
            path: the array.
            places: int [n], rising, each once, below the array's length.
            rows: [n, …].
        """
        self.together([path], lambda: [self.putting(path, places, rows)])

    async def putting(self, path: str, places: np.ndarray, rows: Rows) -> None:
        """See `put`."""
        array = self.array(path)
        step, size, total = array.chunks[0], array.shape[0], int(self.digests[path], 16)
        rows = np.asarray(rows, array.dtype)
        chunks, starts = np.unique(places // step, return_index=True)
        ends = np.append(starts[1:], len(places))
        for first in range(0, len(chunks), _AT_ONCE):
            own = chunks[first : first + _AT_ONCE].tolist()
            blocks = []
            for i, (chunk, whole) in enumerate(zip(own, await _read(array, own), strict=True), first):
                block = whole[: size - chunk * step]
                total -= _leaf(chunk, block)
                block[places[starts[i] : ends[i]] - chunk * step] = rows[starts[i] : ends[i]]
                blocks.append((chunk, block))
            total += await _write(array, blocks)
        self.digests[path] = _told(total)

    def truncate(self, path: str, size: int) -> None:
        """Leave the first `size` rows alone."""
        self.together([path], lambda: [self.truncating(path, size)])

    async def truncating(self, path: str, size: int) -> None:
        """See `truncate`."""
        array = self.array(path)
        step, before, total = array.chunks[0], array.shape[0], int(self.digests[path], 16)
        first, inside = divmod(size, step)
        last = np.empty(0)
        for chunk in range(first, -(-before // step)):
            block = (await _read(array, [chunk]))[0][: before - chunk * step]
            total -= _leaf(chunk, block)
            last = block if chunk == first else last
        await array.async_array.resize((size, *array.shape[1:]))
        if inside:  # what lies behind the end in the last storage chunk goes too
            total += await _write(array, [(first, last[:inside])])
        self.digests[path] = _told(total)


async def all_of(awaited: Iterable[Awaitable[T]]) -> list[T]:
    """What several give that are awaited at once; the first error is raised when all have come to their end."""
    done = await asyncio.gather(*awaited, return_exceptions=True)
    for own in done:
        if isinstance(own, BaseException):
            raise own
    return cast(list[T], done)


def _key(array: zarr.Array[Any], chunk: int) -> str:
    key = array.metadata.encode_chunk_key((chunk, *(0 for _ in array.shape[1:])))
    return f"{array.store_path.path}/{key}".lstrip("/")


async def _read(array: zarr.Array[Any], chunks: Sequence[int]) -> list[np.ndarray]:
    """Whole storage chunks, decoded here: what zarr does so that parts of one can be asked for takes longer than that.

    Raises ValueError where one is not what was written.
    """
    store, shape = array.store_path.store, array.chunks
    found = await all_of(store.get(_key(array, chunk), buffer_prototype) for chunk in chunks)
    return [
        np.zeros(shape, array.dtype) if own is None else decode_chunk(own.to_bytes(), shape, array.dtype)
        for own in found
    ]


async def rows_of(array: zarr.Array[Any], places: np.ndarray) -> np.ndarray:
    """Some rows of an array, in any order, from whole storage chunks of which `_AT_ONCE` are held at a time.

    Raises ValueError where a storage chunk is not what was written, or there is no such row.
    """
    outside = places[(places < 0) | (places >= array.shape[0])]
    if len(outside):
        raise ValueError(f"{array.path} has {array.shape[0]} rows: there is none of number {outside[0]}")
    out = np.empty((len(places), *array.shape[1:]), array.dtype)
    order = np.argsort(places, kind="stable")
    chunks, starts = np.unique(places[order] // array.chunks[0], return_index=True)
    own = np.split(order, starts[1:])
    for first in range(0, len(chunks), _AT_ONCE):
        some = chunks[first : first + _AT_ONCE].tolist()
        for block, at in zip(await _read(array, some), own[first:], strict=False):
            out[at] = block[places[at] % array.chunks[0]]
    return out


async def _write(array: zarr.Array[Any], blocks: Sequence[tuple[int, Rows]]) -> int:
    """Write storage chunks, zeros behind the rows given; none is kept of zeros alone. Returns their digest."""
    store, step = array.store_path.store, array.chunks[0]
    for first in range(0, len(blocks), _AT_ONCE):
        calls: list[Awaitable[None]] = []
        for chunk, rows in blocks[first : first + _AT_ONCE]:
            whole = np.zeros((step, *rows.shape[1:]), rows.dtype)
            whole[: len(rows)] = rows
            data = encode_chunk(whole)
            key = _key(array, chunk)
            calls.append(store.delete(key) if data is None else store.set(key, Buffer.from_bytes(data)))
        await all_of(calls)
    return sum(_leaf(chunk, rows) for chunk, rows in blocks)


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
