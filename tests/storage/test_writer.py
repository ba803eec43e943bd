"""Arrays that are written in place keep the digest that reading all of them would give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from treemem.storage.schema import ArraySpec
from treemem.storage.writer import Writer, digest

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
    fresh = Writer(zarr.create_group(zarr.storage.MemoryStore()), {})
    fresh.create("a", ArraySpec(dtype, row, step), model)
    assert fresh.digests == writer.digests  # the digest knows nothing of how it came about


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
