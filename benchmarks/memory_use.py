"""Peak resident memory of building and of searching, each in a process of its own, and the time to open."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from common import RESULTS, arguments, peak_gb, save


def search(path: Path, questions: Path) -> dict[str, float]:
    """Open a memory, search it in every mode, and say how much memory that took."""
    from treemem import Memory

    begin = time.perf_counter()
    memory = Memory.open(path)
    opened = time.perf_counter() - begin
    after_open = peak_gb()
    texts = json.loads(questions.read_text())
    out = {"open_seconds": round(opened, 3), "open_gb": after_open}
    for mode in ("walk", "hybrid", "deep", "exact", "exact+bm25"):
        for text in texts:
            memory.search(text, mode=mode)
        out[f"{mode}_gb"] = peak_gb()
    return out


def build(corpus: Path, path: Path) -> dict[str, float]:
    """Build a memory (or continue one) and say how much memory that took."""
    from treemem import Memory

    begin = time.perf_counter()
    memory = Memory.build([str(corpus)], path)
    return {"chunks": memory.image.chunks, "seconds": round(time.perf_counter() - begin, 1), "peak_gb": peak_gb()}


def main() -> None:
    """Start a process for each part."""
    parser = arguments(__doc__)
    parser.add_argument("--set", default="wiki_multi")
    parser.add_argument("--part", choices=["search", "build"])
    parser.add_argument("--build-to", type=Path, help="build here too, and measure it")
    parser.add_argument("--questions", type=Path)
    options = parser.parse_args()
    if options.part == "search":
        print(json.dumps(search(options.memories / options.set, options.questions)))
        return
    if options.part == "build":
        print(json.dumps(build(options.data / options.set / "corpus.jsonl.zst", options.build_to)))
        return
    from treemem.evaluation import load_set

    questions = Path("questions.tmp.json")
    loaded = load_set(options.data / options.set)
    questions.write_text(json.dumps([query.text for query in loaded.queries[:100]]))
    common = [sys.executable, __file__, "--set", options.set, "--memories", str(options.memories)]
    common += ["--data", str(options.data), "--questions", str(questions)]
    # Building takes an hour or more: what was measured before stays beside a new measurement of searching.
    before = RESULTS / "memory_use.json"
    kept = json.loads(before.read_text()) if before.exists() else {}
    figures: dict[str, object] = {"set": options.set}
    if kept.get("set") == options.set and "build" in kept:
        figures["build"] = kept["build"]
    try:
        for part in ("search", *(["build"] if options.build_to else [])):
            more = ["--build-to", str(options.build_to)] if part == "build" else []
            done = subprocess.run([*common, "--part", part, *more], check=True, capture_output=True, text=True)
            figures[part] = json.loads(done.stdout.strip().splitlines()[-1])
            print(part, figures[part], flush=True)
    finally:
        questions.unlink()
    save("memory_use", figures, options)


if __name__ == "__main__":
    main()
