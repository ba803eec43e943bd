"""Walks in a tree that does not fit into memory: in a control group that may hold a tenth of its files, and without."""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import percentiles, save

GROUP = Path("/sys/fs/cgroup/memory/treemem-benchmark")  # version 1 of control groups; needs root
QUERIES, BEAM, K = 500, 32, 10
PAGES, AT_ONCE = 20_000, (1, 16, 64)


def resident() -> int:
    """Bytes of this process that are no file's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def read_so_far() -> int:
    """Bytes that this process has had the disk read."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text("utf-8").splitlines())
    return int(lines["read_bytes"])


def forget(folder: Path) -> None:
    """Have the system forget what it holds of these files."""
    for file in folder.glob("level-*.npy"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def walk(folder: str, sizes: list[int], share: float | None, queue: Any) -> None:
    """Walk for queries near random chunks, with at most `share` of the files in memory; None for no limit."""
    os.environ["TREEMEM_THREADS"] = "1"
    from treemem.kernels import cpu
    from treemem.storage.image import read_tree

    if share is not None:
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    tree = read_tree(Path(folder), tuple(sizes), None if share is None else 0)
    total = sum(
        getattr(level, name).nbytes
        for level in tree.levels
        for name in ("rows", "scales", "upper", "upper_scales", "ids", "offsets")
    )
    rng = np.random.default_rng(0)
    chosen = rng.choice(sizes[-1], 2 * QUERIES)
    blocks = tree.levels[-1]
    queries = blocks.rows[chosen] * blocks.scales[chosen, None] + rng.normal(0, 0.02, (2 * QUERIES, tree.dimension))
    levels = np.stack([queries.astype(np.float32)[:, None]] * tree.depth)
    cpu.search(tree, levels[:, :1], BEAM, K)  # compiled, and the tree checked
    limit = None
    if share is not None:
        limit = resident() + int(share * total)
        (GROUP / "memory.limit_in_bytes").write_text(str(limit))
    seconds = []
    for number in range(2 * QUERIES):
        if number == QUERIES:
            read = read_so_far()
        begin = time.perf_counter()
        cpu.search(tree, levels[:, number : number + 1], BEAM, K)
        seconds.append(time.perf_counter() - begin)
    read = (read_so_far() - read) // QUERIES
    queue.put(
        {"files_bytes": total, "limit_bytes": limit, "bytes_read_a_query": read, **percentiles(seconds[QUERIES:])}
    )


def pages_a_second(folder: Path, at_once: int) -> int:
    """How many pages of a file, here and there, the disk hands out a second to so many who ask at once."""
    forget(folder)
    file = max(folder.glob("level-*.npy"), key=lambda file: file.stat().st_size)
    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    pages = file.stat().st_size // mmap.PAGESIZE
    chosen = np.random.default_rng(0).choice(pages, min(PAGES, pages), replace=False)

    def read(own: np.ndarray) -> None:
        for page in own.tolist():
            os.pread(handle, mmap.PAGESIZE, page * mmap.PAGESIZE)

    begin = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(read, np.array_split(chosen, at_once)))
    seconds = time.perf_counter() - begin
    os.close(handle)
    return int(len(chosen) / seconds)


def main() -> None:
    """Measure without a limit, then with a tenth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="a folder that benchmarks/scaling.py has left")
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="the tree's levels, top first")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for name, share in (("all of it in memory", None), ("a tenth in memory", 0.1)):
        if share is not None:
            GROUP.mkdir(exist_ok=True)
            forget(options.tree)
        queue = context.Queue()
        process = context.Process(target=walk, args=(str(options.tree), options.sizes, share, queue))
        process.start()
        rows[name] = queue.get()
        process.join()
        print(name, json.dumps(rows[name]), flush=True)
    GROUP.rmdir()
    one, two = (rows[name]["ms_p50"] for name in rows)
    disk = {str(number): pages_a_second(options.tree, number) for number in AT_ONCE}
    print("pages a second by how many ask at once:", disk)
    figures = {"sizes": options.sizes, "rows": rows, "p50 ratio": round(two / one, 1), "disk pages a second": disk}
    save("larger_than_ram", figures, options)


if __name__ == "__main__":
    main()
