"""Edits of memories of several sizes: time to the commit, bytes, recall after many additions, masks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, arguments, hits, measured, percentiles, save

from treemem import Memory
from treemem.config import SearchConfig
from treemem.evaluation import load_set
from treemem.hierarchy.embed import Encoder
from treemem.types import Document

SETS = ("locomo", "fairytaleqa", "medquad", "wiki_multi")
ROUNDS = 15
CHUNKS = 10  # of the document that is added and removed
PORTIONS = 20
MASKED = 0.1


class Known:
    """Encoder 1 that knows what it gave for some texts before, so that a memory can be built twice and encoded once."""

    def __init__(self, memory: Memory) -> None:
        self._real: Encoder = memory.encoder
        stored = memory.store.read("chunks/encodings")
        self._known = {memory.image.chunk_text(chunk): stored[chunk] for chunk in range(memory.image.chunks)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def encode(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        """What was given before."""
        return np.stack([self._known[text] for text in texts]).astype(np.float32)


def size_of(folder: Path) -> int:
    """Bytes of a folder's files, those that have several names once."""
    files = (file.stat() for file in folder.rglob("*") if file.is_file())
    return sum({own.st_ino: own.st_size for own in files}.values())


def copied(options: Any, name: str) -> Path:
    """A copy of a memory that may be changed."""
    target = Path(options.scratch / name)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(options.memories / name, target)
    return target


def one_document(options: Any, name: str) -> dict[str, Any]:
    """A document of ten chunks is added, verified and removed, several times."""
    memory = Memory.open(copied(options, name))
    rng = np.random.default_rng(options.seed)
    chosen = rng.choice(memory.image.chunks, ROUNDS * CHUNKS)
    texts = [memory.image.chunk_text(int(chunk)) for chunk in chosen]
    rows: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for key, value in values.items():
            rows.setdefault(key, []).append(value)

    for number in range(-1, ROUNDS):  # the first makes the vectors that later edits use
        own = texts[number * CHUNKS : (number + 1) * CHUNKS] if number >= 0 else texts[:CHUNKS]
        document = Document(f"added-{number}", "\n\n".join(own), "Added")
        store, image = size_of(memory.store.path / "store"), size_of(memory.store.path / "cache")
        done = memory.add([document])
        written = size_of(memory.store.path / "store") - store
        followed = size_of(memory.store.path / "cache") - image
        begin = time.perf_counter()
        found = memory.verify(document=document.id)
        verified = time.perf_counter() - begin
        if not found.sound:
            raise AssertionError(found.faults)
        gone = memory.remove([document.id])
        if number < 0:
            first = done.seconds
            continue
        note(
            add_commit=done.seconds["commit"], add_image=done.seconds["image"], verify=verified,
            remove_commit=gone.seconds["commit"], remove_image=gone.seconds["image"],
            store_bytes=written, chunks=done.chunks_added,
        )  # fmt: skip
        if followed > 0:  # no older image was swept away meanwhile
            note(image_bytes=followed)
    medians = {key: float(np.median(values)) for key, values in rows.items()}
    told = {key: round(value * (1 if "bytes" in key or key == "chunks" else 1e3), 2) for key, value in medians.items()}
    return {
        "chunks_in_all": memory.image.chunks,
        "levels": list(memory.image.sizes),
        "first_edit_seconds": {key: round(value, 2) for key, value in first.items()},
        "unit": "ms and bytes, medians; encoding apart",
        **told,
    }


def portions(options: Any, name: str) -> dict[str, Any]:
    """Half of a set is built, the other half added in portions; beside a memory that was built of all at once."""
    whole = Memory.open(copied(options, name))
    encoder: Any = Known(whole)
    documents = [whole.document(own) for own in whole.ids()]
    order = np.random.default_rng(options.seed).permutation(len(documents))
    half = [documents[n] for n in order[: len(order) // 2]]
    place = options.scratch / f"{name}-half"
    shutil.rmtree(place, ignore_errors=True)
    begin = time.perf_counter()
    memory = Memory.build(half, place, encoder=encoder)
    built = time.perf_counter() - begin
    split = load_set(options.data / name, split="dev,train" if name == "wiki_multi" else "dev")
    queries = split.sample(options.most, options.seed).queries
    embedded = whole.searcher.embed([query.text for query in queries])
    rows = []
    for number, part in enumerate(np.array_split(order[len(order) // 2 :], PORTIONS), 1):
        begin = time.perf_counter()
        done = memory.add([documents[n] for n in part])
        seconds = time.perf_counter() - begin
        rows.append({"chunks": done.chunks_added, "seconds": round(seconds, 2), "levels": list(memory.image.sizes)})
        print(number, rows[-1], flush=True)
    faults = memory.verify().faults
    if faults:
        raise AssertionError(faults)
    config = SearchConfig("walk", decoder=False)
    found: dict[str, Any] = {}
    for title, own in (("built at once", whole), ("half of it added", memory)):
        ranked = {mode: [] for mode in ("walk", "exact")}
        for query in embedded:
            for mode, results in ranked.items():
                one = own.searcher.rank(query, SearchConfig(mode, decoder=False))  # type: ignore[arg-type]
                results.append(one.chunks[:10])
        found[title] = {mode: hits(own, queries, results) for mode, results in ranked.items()}
        pairs = zip(*ranked.values(), strict=True)
        found[title]["agreement@10"] = round(float(np.mean([np.isin(e, w).mean() for w, e in pairs])), 4)
    begin = time.perf_counter()
    compacted = memory.compact()
    found["compacted"] = {"recall_before": compacted.recall_before, "recall_after": compacted.recall_after}
    ranked_again = [memory.searcher.rank(query, config).chunks[:10] for query in embedded]
    found["compacted"] |= {
        "walk": hits(memory, queries, ranked_again),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    return {
        "documents": len(documents), "chunks": whole.image.chunks, "questions": len(queries),
        "half_built_seconds": round(built, 1), "added_seconds": round(sum(row["seconds"] for row in rows), 1),
        "portions": rows, **found,
    }  # fmt: skip


def masks(options: Any, name: str) -> dict[str, Any]:
    """A tenth of the documents is masked: how long searches take, and whether any hidden document is found."""
    memory = Memory.open(copied(options, name))
    queries = load_set(options.data / name).queries
    texts = [query.text for query in queries]
    embedded = memory.searcher.embed(texts[: options.most])
    rng = np.random.default_rng(options.seed)
    ids = np.array(memory.ids())
    hidden = set(rng.choice(ids, round(len(ids) * MASKED), replace=False).tolist())
    plain = memory.searcher
    begin = time.perf_counter()
    memory.mask(sorted(hidden))
    seconds = time.perf_counter() - begin
    masked = memory.searcher
    out: dict[str, Any] = {"documents": len(ids), "masked": len(hidden), "mask_seconds": round(seconds, 2)}
    for mode in ("walk", "hybrid"):
        times: list[list[float]] = [[], []]
        config = SearchConfig(mode, decoder=False)  # type: ignore[arg-type]
        for query in embedded:
            for own, searcher in zip(times, (plain, masked), strict=True):
                begin = time.perf_counter()
                searcher.rank(query, config)
                own.append(time.perf_counter() - begin)
        ratio = float(np.median(np.divide(times[1], times[0])))
        out[mode] = {"plain": percentiles(times[0]), "masked": percentiles(times[1]), "ratio": round(ratio, 3)}
    asked = wrong = 0
    while asked < 10_000:
        for query in embedded:
            mode = ("hybrid", "walk", "exact", "bm25")[asked % 4]
            ranked = masked.rank(query, SearchConfig(mode, decoder=False, k=10))  # type: ignore[arg-type]
            documents = memory.image.document_of(ranked.chunks[:10])
            wrong += sum(memory.image.record(int(own))["id"] in hidden for own in documents)
            asked += 1
            if asked == 10_000:
                break
    return {**out, "searches": asked, "masked documents found": wrong}


def main() -> None:
    """Measure what is asked for, and put it beside what was measured before."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--parts", nargs="*", default=["one", "portions", "masks"])
    parser.add_argument("--most", type=int, default=1000, help="questions of a set")
    parser.add_argument("--scratch", type=Path, default=Path("editing"))
    parser.add_argument("--name", default="editing", help="of the result")
    options = parser.parse_args()
    options.scratch.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, Any] = {part: kept.get(part, {}) for part in ("one", "portions", "masks")}
    measure = {"one": one_document, "portions": portions, "masks": masks}
    for part in options.parts:
        for name in options.sets:
            found[part][name] = {"measured": measured(), **measure[part](options, name)}
            print(part, name, json.dumps(found[part][name]), flush=True)
            save(options.name, found, options)
    shutil.rmtree(options.scratch)


if __name__ == "__main__":
    main()
