"""Memories of older formats, brought to this one when they are opened: one function for each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import zarr

from treemem.config import FORMAT_VERSION
from treemem.hierarchy.build import alone, contextual_file, stored_hierarchy
from treemem.storage.files import work_folder
from treemem.storage.levels import Level, Spread, document_runs
from treemem.storage.schema import ENDS, ArraySpec, chunk_arrays, document_arrays
from treemem.storage.store import MAIN, Store, close, guard, write_levels, write_spread
from treemem.storage.writer import Writer
from treemem.types import Progress, no_progress


def migrate(store: Store, progress: Progress = no_progress) -> None:
    """Bring a finished memory to today's format; nothing is done where it has it. Each step is a commit.

    Raises StoreError where another process is writing it, or it cannot be written to.
    """
    while (version := store.format()) < FORMAT_VERSION:
        with alone(store.path, wait=60):
            if store.format() == version:
                _STEPS[version](store, progress)


def from_1_to_2(store: Store, progress: Progress = no_progress) -> None:
    """Children in slots of each node, status of documents, the spread, digests that follow edits, smaller chunks."""
    with guard(store.path):
        old: Any = zarr.open_group(store.repository.readonly_session(MAIN).store, mode="r")
        session = store.repository.writable_session(MAIN)
        root: Any = zarr.open_group(session.store, mode="r+")
        config, dimension = root.attrs["config"], old["chunks/encodings"].shape[1]
        writer = Writer(root, {name: "" for name, own in root.members(max_depth=None) if isinstance(own, zarr.Array)})
        ends = {of: old[f"documents/{name}"][:] for name, of in ENDS.items()}
        for path, spec in {**document_arrays(), **chunk_arrays(dimension)}.items():
            writer.create(path, spec)
        for name, of in ENDS.items():
            writer.append(f"documents/{name}", ends[of])
        writer.append("documents/hashes", old["documents/hashes"][:])
        writer.append("documents/status", np.zeros(len(ends["documents/text"]), np.uint8))
        for of, lasts in ends.items():
            paths = ("chunks/spans", "chunks/encodings") if of == "chunks/spans" else (of,)
            for first, last in document_runs(lasts, 1 << 14 if of == "chunks/spans" else 1 << 24):
                progress(f"bringing {of} to format 2", first, len(lasts))
                begin = int(lasts[first - 1]) if first else 0
                for path in paths:
                    writer.append(path, old[path][begin : int(lasts[last - 1])])
        levels: list[Level] = []
        while (name := f"levels/{len(levels) + 2}") in old:
            levels.append(Level(*(old[f"{name}/{part}"][:] for part in ("offsets", "children", "vectors"))))
        write_levels(writer, levels, config["fanout"], progress)
        for path in [path for path in writer.digests if path.startswith("hierarchy/")]:
            writer.create(path, ArraySpec("uint8", (), 1 << 20), old[path][:])
        with work_folder(store.path, "growing-") as scratch:
            hierarchy = stored_hierarchy(store)
            gate = None if hierarchy is None else hierarchy.context
            rows, chunk_ends = old["chunks/encodings"], ends["chunks/spans"]
            vectors = contextual_file(
                store, config["alpha"], scratch / "level-1", progress, gate, encodings=rows, chunk_ends=chunk_ends
            )
            write_spread(writer, Spread.of(vectors))
        root.attrs["format"] = 2
        close(writer)
        counts = {"documents": len(ends["documents/text"]), "chunks": rows.shape[0]}
        session.commit("brought to format 2", {"treemem": counts})


_STEPS: dict[int, Callable[[Store, Progress], None]] = {1: from_1_to_2}
