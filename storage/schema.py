"""The arrays of a memory: names, types and chunk shapes of its Zarr hierarchy.

    /                         attributes: format, state, config, encoder, digests
    /documents/status         uint8    0 = present, 1 = masked, 2 = removed: what it had is zeros, its numbers stay
    /documents/text           uint8    all texts, UTF-8, one after the other
    /documents/text_ends      int64    where each document's text ends
    /documents/records        uint8    {"id", "title", "metadata"} of each document as JSON, one after the other
    /documents/record_ends    int64    where each record ends
    /documents/hashes         uint8    (documents, 32) SHA-256 of record and text
    /documents/chunk_ends     int64    how many chunks there are up to and with each document
    /chunks/spans             int64    (chunks, 4) first and last character, first and last byte in the document's text
    /chunks/encodings         float16  (chunks, d) what encoder 1 gave for each chunk
    /chunks/reader            float16  (chunks, 8, d) only where it is kept: what a language model reads of each chunk,
                                       a vector for 16 tokens, then zeros
    /levels/K/children        int32    (nodes, fanout) elements of level K-1, rising, then -1; K = 2, 3, … up to the top
    /levels/K/vectors         float16  (nodes, d)
    /spread/mean              float64  (d) how the chunks' vectors spread: see `treemem.storage.levels.Spread`
    /spread/values            float64  (d)
    /spread/directions        float64  (d, d)
    /hierarchy/config         uint8    of a trained tree alone: shape and card of its hierarchy as JSON
    /hierarchy/weights        uint8    and its weights as a safetensors file

Level 1, the contextual vectors of the chunks, is derived: see `treemem.storage.levels.contextual`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import zarr
import zstandard
from zarr.codecs import Crc32cCodec, ZstdCodec

HIERARCHY_PARTS = ("config", "weights")
SPREAD_PARTS = ("mean", "values", "directions")
READER = "chunks/reader"
"""The one array that a memory may lack."""
READER_VECTORS = 8
"""Most reader vectors of a chunk."""

ENDS = {"text_ends": "documents/text", "record_ends": "documents/records", "chunk_ends": "chunks/spans"}
"""Arrays of `documents` that say where each document ends in another array."""
PRESENT, MASKED, REMOVED = range(3)
"""Values of `documents/status`."""
_ZSTD_LEVEL = 3
_CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class ArraySpec:
    """One array: its type, the shape of its rows and how many rows make a storage chunk."""

    dtype: str
    row: tuple[int, ...]
    rows_per_chunk: int


def document_arrays() -> dict[str, ArraySpec]:
    """Arrays that hold documents, by path. Storage chunks are small where an edit writes some of their rows anew."""
    return {
        "documents/text": ArraySpec("uint8", (), 1 << 18),
        "documents/text_ends": ArraySpec("int64", (), 1 << 12),
        "documents/records": ArraySpec("uint8", (), 1 << 16),
        "documents/record_ends": ArraySpec("int64", (), 1 << 12),
        "documents/hashes": ArraySpec("uint8", (32,), 1 << 10),
        "documents/chunk_ends": ArraySpec("int64", (), 1 << 12),
        "documents/status": ArraySpec("uint8", (), 1 << 14),
    }


def chunk_arrays(dimension: int, *, reader: bool = False) -> dict[str, ArraySpec]:
    """Arrays that hold chunks, by path; with `reader` also what a language model reads of them."""
    arrays = {
        "chunks/spans": ArraySpec("int64", (4,), 1 << 12),
        "chunks/encodings": ArraySpec("float16", (dimension,), _rows(1 << 18, dimension)),
    }
    if reader:
        row = (READER_VECTORS, dimension)
        arrays[READER] = ArraySpec("float16", row, _rows(1 << 18, READER_VECTORS * dimension))
    return arrays


def level_arrays(level: int, dimension: int, fanout: int) -> dict[str, ArraySpec]:
    """Arrays of one level of nodes, by path."""
    return {
        f"levels/{level}/children": ArraySpec("int32", (fanout,), 64),
        f"levels/{level}/vectors": ArraySpec("float16", (dimension,), _rows(1 << 15, dimension)),
    }


def _rows(size: int, dimension: int) -> int:
    """How many float16 vectors make a storage chunk of about `size` bytes."""
    return max(1, size // (2 * dimension))


def create_array(root: zarr.Group, path: str, spec: ArraySpec, rows: int = 0) -> zarr.Array[Any]:
    """Make one array. Every storage chunk carries a checksum, so that damage is noticed when it is read."""
    compressors = [ZstdCodec(level=_ZSTD_LEVEL)] if _compressed(spec.dtype) else []
    return root.create_array(
        path,
        shape=(rows, *spec.row),
        chunks=(spec.rows_per_chunk, *spec.row),
        dtype=spec.dtype,
        compressors=[*compressors, Crc32cCodec()],
        fill_value=0,
    )


def _compressed(dtype: str) -> bool:
    return dtype != "float16"  # vectors do not compress


def encode_chunk(rows: np.ndarray) -> bytes | None:
    """The bytes of a storage chunk, as zarr writes them in what `create_array` makes; None for one of zeros alone."""
    data = rows.tobytes()
    if data == bytes(len(data)):
        return None
    if _compressed(rows.dtype.name):
        data = zstandard.compress(data, _ZSTD_LEVEL)
    return data + google_crc32c.value(data).to_bytes(_CHECKSUM_BYTES, "little")


def decode_chunk(data: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The rows of a storage chunk.

    Raises ValueError where they are not what was written.
    """
    data, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if google_crc32c.value(data) != int.from_bytes(checksum, "little"):
        raise ValueError("a storage chunk is not what its checksum says")
    if _compressed(dtype.name):
        try:
            data = zstandard.decompress(data)
        except zstandard.ZstdError as error:
            raise ValueError(f"a storage chunk cannot be decompressed: {error}") from error
    return np.frombuffer(data, dtype).reshape(shape).copy()
