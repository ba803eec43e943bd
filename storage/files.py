"""Files beside the store: arrays that are written without memory maps, and folders for work in progress.

A memory map of a file that the disk has no room for ends the process with a bus error, where writing raises OSError.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

STALE_SECONDS = 60.0
"""A work folder is looked at this long after it was made, when its process has surely locked it."""
_WORK = ("creating-", "growing-", "imaging-", "making-")
_LOCK = "lock"


def write_npy(path: Path, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write an array in NumPy's file format block by block, in bounded memory.

    Args:
        path: the file.
        dtype: type of the array.
        shape: shape of the whole array.
        blocks: runs of rows, in order, which together have this shape.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    rows = 0
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            rows += len(block)
            file.write(np.ascontiguousarray(block, dtype).data)
    if rows != shape[0]:
        raise AssertionError(f"{path.name}: {rows} rows were given for {shape[0]}")


def save_npy(path: Path, array: np.ndarray) -> None:
    """Write a whole array. Unlike `numpy.save` it tells a full disk from other failures."""
    write_npy(path, array.dtype, array.shape, [array])


def map_npy(path: Path, rows: int | None = None) -> np.ndarray:
    """An array's file, memory-mapped.

    Args:
        path: the file.
        rows: how many rows are taken; a file that was appended to has more than its header says. By default those of
            the header.

    Raises ValueError where it is no array's file, or too short.
    """
    with path.open("rb") as file:
        dtype, shape = read_header(file)
        shape = shape if rows is None else (rows, *shape[1:])
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape)


def read_header(file: BinaryIO) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape of the array in a file, which is left where the values begin.

    Raises ValueError where it is no array's file.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{Path(file.name).name}: another version of NumPy's file format")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (SyntaxError, TypeError, tokenize.TokenError, EOFError) as error:  # of a header that is no Python literal
        raise ValueError(f"{Path(file.name).name}: its header is damaged ({error})") from error
    if fortran or dtype.hasobject:
        raise ValueError(f"{Path(file.name).name}: no plain array")
    return dtype, shape


def append_npy(path: Path, array: np.ndarray) -> np.ndarray:
    """Append rows to an array's file, whose header stays as it is: `map_npy` is told how many there are.

    Returns the bytes that were written.
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    with path.open("ab") as file:
        file.write(data.data)
    return data


def checksum(path: Path, size: int) -> int:
    """CRC-32 of the first bytes of a file. That of a file that was appended to goes on from it (`zlib.crc32`)."""
    sum_ = 0
    with path.open("rb") as file:
        while size and (block := file.read(min(size, 1 << 22))):
            sum_ = zlib.crc32(block, sum_)
            size -= len(block)
    return sum_


@contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder for work in progress, gone afterwards; the folders of processes that were killed go first.

    Args:
        parent: the memory's folder, or one in it.
        prefix: `creating-`, `growing-`, `imaging-` or `making-`.
    """
    remove_stale_work(parent)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with FileLock(folder / _LOCK):  # the system lets go of it when the process ends, however it ends
            inside = folder / "work"
            inside.mkdir()
            yield inside
    except BaseException:
        # A thread of the storage library may go on for a moment, and makes the folders that it writes into anew.
        for _ in range(10):
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_work(path: Path) -> bool:
    """Whether this is the name of a work folder."""
    return path.name.startswith(_WORK)


def remove_stale_work(parent: Path) -> None:
    """Remove the work folders in `parent` whose processes are dead; what cannot be removed stays."""
    try:
        folders = [folder for folder in parent.iterdir() if is_work(folder)]
        for folder in folders:
            if time.time() - folder.stat().st_mtime < STALE_SECONDS:
                continue
            try:
                with FileLock(folder / _LOCK, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
            except Timeout:
                pass  # its process lives
    except OSError:
        pass  # a read-only disk, or another process was faster
