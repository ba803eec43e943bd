"""What all benchmarks share: where results go, and what they say of the machine that made them."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treemem import Memory
from treemem.evaluation import load_set
from treemem.evaluation.dataset import EvalQuery
from treemem.evaluation.metrics import hit_at_k, right_chunks
from treemem.hierarchy.build import retrain
from treemem.hierarchy.walk import EmbeddedQuery, Searcher
from treemem.hierarchy.weights import load_hierarchy

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "sentence-transformers",
    "transformers",
    "numpy",
    "numba",
    "zarr",
    "icechunk",
    "tantivy",
    "faiss-cpu",
    "hnswlib",
    "usearch",
)


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    given = os.environ.get("TREEMEM_DATA")
    parser.add_argument(
        "--data", type=Path, default=given and Path(given), required=not given, help="the data sets; or $TREEMEM_DATA"
    )
    parser.add_argument("--memories", type=Path, default=Path("memories"), help="folder of memories, one per data set")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def commit() -> str:
    """What is measured; $TREEMEM_COMMIT says it for a copy without its history."""
    try:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return os.environ.get("TREEMEM_COMMIT", "")
    return asked.stdout.strip() or os.environ.get("TREEMEM_COMMIT", "")


def measured() -> dict[str, str]:
    """Day and commit, for the rows of a file that several runs fill."""
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit()}


def machine() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _last_parts(value: Any) -> Any:
    if isinstance(value, list):
        return [_last_parts(own) for own in value]
    # A place may be given as text too, where a name is as good (`--reader default`).
    return Path(value).name if isinstance(value, Path) or str(value).startswith("/") else value


def save(name: str, figures: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write figures with the command that made them, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    # Options that name a place on a machine say nothing about the figures; of lists of them the names are kept.
    options = {k: _last_parts(v) for k, v in vars(arguments).items() if not isinstance(v, Path)}
    document = {
        "command": f"benchmarks/{Path(sys.argv[0]).name}",
        "options": options,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        **figures,
    }
    path = RESULTS / f"{name}.json"
    path.with_suffix(".tmp").write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".tmp").rename(path)
    print(f"written: {path.relative_to(ROOT)}")


@dataclass(frozen=True)
class Asked:
    """A memory that is searched without what it has learned, and some embedded questions."""

    name: str
    split: str
    memory: Memory
    searcher: Searcher
    queries: Sequence[EvalQuery]
    embedded: list[EmbeddedQuery]


def asked(options: argparse.Namespace, sets: Sequence[tuple[str, str]], *, packaged: bool = False) -> Iterator[Asked]:
    """The chosen sets whose memories are there, one after the other.

    Args:
        options: with `sets` (None for all), `most` (questions of a set), and those that every benchmark has.
        sets: names and splits.
        packaged: whether copies of them are searched, with the weights that new memories get.
    """
    for name, split in sets:
        place = options.memories / name
        if not place.exists() or (options.sets and name not in options.sets):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            if packaged:
                place = Path(shutil.copytree(place, Path(scratch) / name))
                default = load_hierarchy("default")
                assert default is not None
                retrain(Memory.open(place).store, default, "default weights")
            memory = Memory.open(place)
            config = memory.config
            searcher = Searcher(
                memory.image,
                memory.encoder,
                config.chunk_tokens,
                config.language,
                memory.hierarchy if packaged else None,
            )
            queries = load_set(options.data / name, split=split).sample(options.most, options.seed).queries
            yield Asked(name, split, memory, searcher, queries, searcher.embed([query.text for query in queries]))


def hits(memory: Memory, queries: Sequence[EvalQuery], found: Iterable[np.ndarray]) -> dict[str, float]:
    """hit@1 and hit@10 of chunks, best first, for every query."""
    rows = []
    for query, chunks in zip(queries, found, strict=True):
        numbers = {d: memory.image.number_of(d) for d in (*query.relevant, *query.spans)}
        spans = {numbers[d]: own for d, own in query.spans.items()} if query.judged_by != "documents" else None
        relevant = [numbers[d] for d in query.relevant]
        chunks = chunks[chunks >= 0]
        right = right_chunks(memory.image.document_of(chunks), memory.image.spans[chunks, :2], relevant, spans)
        rows.append((hit_at_k(right, 1), hit_at_k(right, 10)))
    means = np.mean(rows, axis=0)
    return {"hit@1": round(float(means[0]), 4), "hit@10": round(float(means[1]), 4)}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    return {
        "ms_p50": round(float(np.percentile(seconds, 50)) * 1e3, 4),
        "ms_p95": round(float(np.percentile(seconds, 95)) * 1e3, 4),
    }


def peak_gb() -> float:
    """Peak resident memory of this process in GB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)
