"""Arrays that are written in place keep the digest that reading all of them would give."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.sync import sync

from treemem.storage.schema import ArraySpec, decode_chunk, encode_chunk
from treemem.storage.writer import Writer, all_of, digest, rows_of

ROWS = st.integers(0, 12)


@given(
    data=st.data(), row=st.sampled_from([(), (3,)]), step=st.integers(1, 7), dtype=st.sampled_from(["int32", "uint8"])
)
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_writes(data: st.DataObject, row: tuple[int, ...], step: int, dtype: str) -> None:
    root: Any = zarr.create_group(zarr.storage.MemoryStore())
    writer = Writer(root, {})
    generator = np.random.default_rng(0)

    def values(count: int) -> np.ndarray:
        return generator.integers(0, 200, (count, *row)).astype(dtype)

    model = values(data.draw(ROWS))
    writer.create("a", ArraySpec(dtype, row, step), model)
    for _ in range(data.draw(st.integers(0, 6))):
        kind = data.draw(st.sampled_from(["append", "put", "truncate"]))
        if kind == "append":
            new = values(data.draw(ROWS))
            writer.append("a", new)
            model = np.concatenate([model, new])
        elif kind == "put" and len(model):
            places = np.array(sorted(data.draw(st.sets(st.integers(0, len(model) - 1), min_size=1))))
            new = values(len(places))
            writer.put("a", places, new)
            model[places] = new
        elif kind == "truncate":
            size = data.draw(st.integers(0, len(model)))
            writer.truncate("a", size)
            model = model[:size].copy()
        assert np.array_equal(np.asarray(root["a"][:]), model)
        assert writer.digests["a"] == digest(root["a"])
    if len(model):
        places = np.array(data.draw(st.lists(st.integers(0, len(model) - 1), max_size=20)), np.int64)
        assert np.array_equal(sync(rows_of(root["a"], places)), model[places])
    fresh = Writer(zarr.create_group(zarr.storage.MemoryStore()), {})
    fresh.create("a", ArraySpec(dtype, row, step), model)
    assert fresh.digests == writer.digests  # the digest knows nothing of how it came about


def test_many_rows_are_read_a_few_storage_chunks_at_a_time() -> None:
    root: Any = zarr.create_group(zarr.storage.MemoryStore())
    rows = np.arange(3 * 100).reshape(100, 3)
    Writer(root, {}).create("a", ArraySpec("int64", (3,), 2), rows)
    places = np.random.default_rng(0).permutation(100)
    assert np.array_equal(sync(rows_of(root["a"], places)), rows[places])


@pytest.mark.parametrize("place", [-1, 5, 100])
def test_rows_that_there_are_not(place: int) -> None:
    root: Any = zarr.create_group(zarr.storage.MemoryStore())
    Writer(root, {}).create("a", ArraySpec("int64", (), 4), np.arange(5))
    with pytest.raises(ValueError, match=f"a has 5 rows: there is none of number {place}"):
        sync(rows_of(root["a"], np.array([2, place])))


def test_the_digest_sees_values_places_types_and_lengths() -> None:
    def told(array: np.ndarray, step: int = 2) -> str:
        writer = Writer(zarr.create_group(zarr.storage.MemoryStore()), {})
        writer.create("a", ArraySpec(str(array.dtype), array.shape[1:], step), array)
        return writer.digests["a"]

    base = np.array([1, 2, 3, 4, 5], np.int32)
    others = [
        np.array([1, 2, 3, 4, 6], np.int32), np.array([3, 4, 1, 2, 5], np.int32), np.array([2, 1, 3, 4, 5], np.int32),
        base.astype(np.int64), base[:4], np.append(base, 0).astype(np.int32), base[:, None],
    ]  # fmt: skip
    assert len({told(array) for array in [base, *others]}) == 8
    assert told(base) == told(base.copy())


def test_what_was_cut_off_does_not_come_back() -> None:
    root: Any = zarr.create_group(zarr.storage.MemoryStore())
    writer = Writer(root, {})
    writer.create("a", ArraySpec("int32", (), 4), np.arange(1, 7))
    writer.truncate("a", 2)
    root["a"].resize((6,))
    assert root["a"][:].tolist() == [1, 2, 0, 0, 0, 0]


def test_removing_an_array() -> None:
    root: Any = zarr.create_group(zarr.storage.MemoryStore())
    writer = Writer(root, {})
    writer.create("a/b", ArraySpec("int32", (), 4), np.arange(3))
    writer.create("a/b", ArraySpec("uint8", (), 4), np.arange(5))
    assert root["a/b"].shape == (5,)
    writer.remove("a/b")
    writer.remove("never there")
    assert writer.digests == {}
    with pytest.raises(KeyError):
        root["a/b"]


@pytest.mark.parametrize("dtype", ["int64", "float16", "uint8"])
def test_chunks_are_those_that_zarr_writes_and_reads(dtype: str) -> None:
    root: Any = zarr.create_group(zarr.storage.MemoryStore())
    writer = Writer(root, {})
    writer.create("ours", ArraySpec(dtype, (2,), 4))
    writer.create("theirs", ArraySpec(dtype, (2,), 4))
    rows = np.arange(14).reshape(7, 2).astype(dtype)
    writer.append("ours", rows)
    root["theirs"].resize((7, 2))
    root["theirs"][:] = rows
    assert np.array_equal(root["ours"][:], rows)
    chunks = {
        name: [root.store._store_dict[f"{name}/c/{i}/0"].to_bytes() for i in range(2)] for name in ("ours", "theirs")
    }
    assert [decode_chunk(own, (4, 2), rows.dtype).tolist() for own in chunks["theirs"]] == [
        decode_chunk(own, (4, 2), rows.dtype).tolist() for own in chunks["ours"]
    ]


def test_a_chunk_of_zeros_is_not_kept() -> None:
    root: Any = zarr.create_group(zarr.storage.MemoryStore())
    writer = Writer(root, {})
    writer.create("a", ArraySpec("int32", (), 2), np.array([1, 2, 0, 0, 5]))
    assert "a/c/0" in root.store._store_dict
    assert "a/c/1" not in root.store._store_dict
    writer.put("a", np.array([0, 1, 2]), np.array([0, 0, 7]))
    assert "a/c/0" not in root.store._store_dict
    assert root["a"][:].tolist() == [0, 0, 7, 0, 5]
    assert writer.digests["a"] == digest(root["a"])


@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_a_chunk_that_is_damaged_is_told(dtype: str) -> None:
    data = encode_chunk(np.arange(8).astype(dtype))
    assert data is not None
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(ValueError, match="checksum"):
            decode_chunk(bytes(broken), (8,), np.dtype(dtype))
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"checksum|decompressed|reshape|buffer"):
            decode_chunk(data[:size], (8,), np.dtype(dtype))


def test_the_first_error_is_raised_when_all_have_ended() -> None:
    ended: list[str] = []

    async def fails() -> None:
        ended.append("failed")
        raise OSError("the disk is full")

    async def lasts() -> None:
        await asyncio.sleep(0.05)
        ended.append("lasted")

    with pytest.raises(OSError, match="full"):
        asyncio.run(all_of([fails(), lasts()]))
    assert ended == ["failed", "lasted"]
