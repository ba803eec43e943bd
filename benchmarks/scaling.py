"""What a walk costs as the memory grows from 10^4 to 10^7 chunks: vectors scored and time, without and with words."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, arguments, peak_gb, percentiles, save
from planted import planted
from synthetic import Mixture, fit

from treemem import Memory
from treemem.evaluation import load_set
from treemem.hierarchy.build import contextual_file
from treemem.hierarchy.grow import grow
from treemem.hierarchy.weights import BM25_WEIGHT
from treemem.kernels import ServingTree, Words, cpu
from treemem.storage.files import write_npy
from treemem.storage.image import Image, read_tree, write_tree
from treemem.storage.levels import Spread, as_float32, unit
from treemem.storage.lexical import Lexical, build_lexical
from treemem.storage.signatures import read_signatures, write_signatures

BEAM, K = 32, 10
WIDER = (64, 128)
"""Beams that are measured besides."""
BM25_BEST = 256
QUESTIONS = 1000
JUDGED = 200  # questions that are compared with exact search


def fitted(options: Any, memory: Memory) -> tuple[Mixture, dict[int, str]]:
    """The mixture of a real memory, and for chunks that answer a question its text."""
    scratch = options.scratch / "real"
    vectors = as_float32(contextual_file(memory.store, memory.info().config.alpha, scratch))
    scratch.unlink()
    asked = load_set(options.data / options.set, split="dev,train").sample(2000, options.seed).queries
    embedded = memory.searcher.embed([query.text for query in asked])
    questions, answers, texts = [], [], {}
    for query, own in zip(asked, embedded, strict=True):
        # The best chunk of those that overlap with the answer.
        right = [c for document, spans in query.spans.items() for c in _overlapping(memory.image, document, spans)]
        if right:
            best = right[int(np.argmax(vectors[right] @ own.vectors[0]))]
            questions.append(own.vectors[0])
            answers.append(best)
            texts[best] = query.text
    print(f"fitted to {len(vectors)} chunks and {len(answers)} questions", flush=True)
    mixture = fit(vectors, np.asarray(memory.image.chunk_ends), np.stack(questions), np.array(answers), options.seed)
    return mixture, texts


def _overlapping(image: Image, document_id: str, spans: Any) -> list[int]:
    number = image.number_of(document_id)
    if number is None:
        return []
    own = image.chunks_of(number)
    begin, end = image.spans[own.start : own.stop, :2].T
    return [own.start + i for a, b in spans for i in np.flatnonzero((begin < b) & (end > a))]


def made(mixture: Mixture, count: int, folder: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors in a file, and each one's real chunk."""
    sources: list[np.ndarray] = []

    def rows() -> Iterator[np.ndarray]:
        for part, own in mixture.vectors(count, seed):
            sources.append(own.astype(np.int32))
            yield part

    write_npy(folder / "vectors.npy", np.dtype(np.float16), (count, mixture.centres.shape[1]), rows())
    return np.load(folder / "vectors.npy", mmap_mode="r"), np.concatenate(sources)


def touched(*owners: Any) -> None:
    """Read a byte of every page of their arrays: what is measured is not how a file comes to be mapped."""
    for owner in owners:
        for array in vars(owner).values():
            if isinstance(array, np.ndarray):
                array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max(initial=0)


def times(calls: list[Any], questions: int) -> list[list[float]]:
    """Seconds of every call for every question, the calls one after the other."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in [*range(20), *range(questions)]:
        for own, call in zip(seconds, calls, strict=True):
            begin = time.perf_counter()
            call(number)
            own.append(time.perf_counter() - begin)
    return [own[20:] for own in seconds]


def with_words(options: Any, image: Image, folder: Path, tree: ServingTree, sources: np.ndarray, levels: np.ndarray,
               texts: list[str], right: np.ndarray) -> dict[str, Any]:  # fmt: skip
    """One walk by both signals beside a walk and the inverted index's best, on the words of the real chunks.

    `right`: the chunk that each question was drawn around; others with the words of the same real chunk count as well.
    """
    shutil.rmtree(folder / "bm25", ignore_errors=True)  # of an earlier run
    words = build_lexical(folder, (image.chunk_text(int(source)) for source in sources), len(sources), "en")
    lexical = Lexical(folder, "en", len(sources), words)
    begin = time.perf_counter()
    write_signatures(folder, tree, lexical.index, lexical.idf(np.arange(len(lexical.frequencies), dtype=np.int32)))
    seconds = time.perf_counter() - begin
    signatures = read_signatures(folder, tree)
    touched(lexical.index, *signatures)

    def both(number: int) -> np.ndarray:
        known = lexical.query(texts[number])
        ends = np.array([0, len(known.terms)])
        words = Words(lexical.index, signatures, ends, known.terms, known.weights, BM25_WEIGHT)
        return cpu.search(tree, levels[:, number, None, None], BEAM, 64, words=words).chunks[0, :K]

    def apart(number: int) -> np.ndarray:
        known = lexical.query(texts[number])
        found = cpu.search(tree, levels[:, number, None, None], BEAM, BEAM * 32).chunks[0]
        best, _ = lexical.best(known, BM25_BEST)
        chunks = np.union1d(found[found >= 0], best).astype(np.int32)
        cosines = cpu.score_chunks(tree, levels[-1, number, None, None], chunks[None])[0]
        sums = cpu.bm25_scores(lexical.index, known.terms, known.weights, chunks)
        order = np.argsort(-(cosines + BM25_WEIGHT * sums / max(sums.max(), 1e-9)))
        return np.asarray(chunks[order[:K]])

    def hits(call: Callable[[int], np.ndarray]) -> dict[str, float]:
        found = np.stack([sources[call(number)] == sources[right[number]] for number in range(len(texts))])
        return {"hit@1": round(float(found[:, 0].mean()), 4), "hit@10": round(float(found.any(1).mean()), 4)}

    one, two = times([both, apart], len(texts))
    size = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    return {
        "signatures": {**percentiles(one), **hits(both)},
        "walk and inverted index": {**percentiles(two), **hits(apart)},
        "time ratio": round(float(np.median(np.divide(one, two))), 3),
        "write_signatures_seconds": round(seconds, 1),
        "bytes": {
            "signatures": sum(own for file, own in size.items() if "-words-" in file.name),
            "inverted index": sum(own for file, own in size.items() if file.parent.name == "bm25"),
            "forward index": sum(own for file, own in size.items() if file.name.startswith("words-")),
        },
    }


def of_planted(count: int, seed: int) -> dict[str, Any]:
    """What a walk costs in a tree that is drawn and not grown; questions are drawn around chunks."""
    import torch

    begin = time.perf_counter()
    tree = planted(count, 384, seed, torch, "cpu")
    print(f"{count}: {tree.sizes} drawn in {time.perf_counter() - begin:.0f} s", flush=True)
    blocks, rng = tree.levels[-1], np.random.default_rng(seed)
    near = rng.choice(count, QUESTIONS)
    noise = unit(rng.normal(size=(QUESTIONS, tree.dimension)))
    queries = unit(unit(blocks.rows[near] * blocks.scales[near, None]) + noise).astype(np.float32)
    query_map = np.linalg.qr(rng.normal(size=(tree.dimension, tree.dimension)))[0].astype(np.float32)

    def walk(number: int) -> None:
        own = queries[number, None]
        unit(own @ query_map)  # takes its time, but would lead a drawn tree's questions astray
        cpu.search(tree, np.stack([own] * tree.depth)[:, :, None], BEAM, K)

    seconds = times([walk], len(queries))[0]
    scored = cpu.search(tree, np.stack([queries] * tree.depth)[:, :, None], BEAM, K).scored
    size = sum(array.nbytes for level in tree.levels for array in vars(level).values())
    return {
        "levels": list(tree.sizes),
        "questions": QUESTIONS,
        "scored": round(float(scored.mean()), 1),
        "gb": round(size / 1e9, 2),
        **percentiles(seconds),
    }


def main() -> None:
    """Measure and save, one size after the other."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--set", default="wiki_multi", help="what the mixture is fitted to")
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e4, 3e4, 1e5, 3e5, 1e6])
    parser.add_argument(
        "--planted", type=float, nargs="*", default=[], help="sizes of trees that are drawn: see planted.py"
    )
    parser.add_argument("--words", type=float, default=1e6, help="largest size that is also searched with words")
    parser.add_argument("--scratch", type=Path, default=Path("scaling"))
    parser.add_argument(
        "--grown",
        action="store_true",
        help="measure the tree that an earlier run has left in --scratch, where it is there",
    )
    options = parser.parse_args()
    options.scratch.mkdir(exist_ok=True)
    os.environ[cpu.THREADS] = "1"
    drawn: dict[str, Any] = {}
    for count in map(int, options.planted):
        drawn[str(count)] = of_planted(count, options.seed)
        print(count, drawn[str(count)], flush=True)
        save("scaling-planted", {"sizes": drawn}, options)
    if not options.sizes:
        return
    memory = Memory.open(options.memories / options.set)
    mixture, texts = fitted(options, memory)
    path = RESULTS / "scaling.json"
    sizes: dict[str, Any] = json.loads(path.read_text())["sizes"] if path.exists() else {}
    for count in map(int, options.sizes):
        folder = options.scratch / str(count)
        before = sizes.get(str(count), {}) if options.grown and folder.exists() else {}
        if not before:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        vectors, sources = made(mixture, count, folder, options.seed)
        if not before:
            begin = time.perf_counter()
            levels = grow(vectors, 32, 2, options.seed)
            grown = round(time.perf_counter() - begin, 1)
            write_tree(folder, vectors, levels)
            before = {
                "levels": [*(len(level.vectors) for level in levels[::-1]), count],
                "grow_seconds": grown,
                "peak_gb_so_far": peak_gb(),
            }
            print(f"{count}: grown in {grown:.0f} s", flush=True)
            del levels
        query_map = Spread.of(vectors).map_queries()
        tree = read_tree(folder, tuple(before["levels"]))
        touched(*tree.levels)
        rng = np.random.default_rng(options.seed)
        answering = np.flatnonzero(np.isin(sources, list(texts)))
        chosen = np.sort(rng.choice(answering, QUESTIONS))  # a chunk may be asked for more than once, in other ways
        queries = mixture.asked(vectors[chosen], options.seed)
        asked = np.stack([*[unit(queries @ query_map)] * (tree.depth - 1), queries]).astype(np.float32)

        def walker(
            beam: int, tree: ServingTree = tree, queries: np.ndarray = queries, to: np.ndarray = query_map
        ) -> Callable[[int], None]:
            def walk(number: int) -> None:
                own = queries[number, None]
                at_nodes = unit(own @ to)
                cpu.search(tree, np.stack([*[at_nodes] * (tree.depth - 1), own])[:, :, None], beam, K)

            return walk

        exact = cpu.exact(tree, queries[:JUDGED, None], K)[0]
        beams = {}
        for beam in (BEAM, *WIDER):
            seconds = times([walker(beam)], len(queries))[0]
            found = cpu.search(tree, asked[:, :, None], beam, K)
            agreement = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found.chunks, exact, strict=False)])
            beams[beam] = {
                "scored": round(float(found.scored.mean()), 1),
                "agreement@10": round(float(agreement), 4),
                **percentiles(seconds),
            }
        own: dict[str, Any] = {**before, "questions": len(queries), **beams.pop(BEAM)}
        own["wider beams"] = {str(beam): figures for beam, figures in beams.items()}
        if count <= options.words:
            given = [texts[int(sources[chunk])] for chunk in chosen]
            own["words"] = with_words(options, memory.image, folder, tree, sources, asked, given, chosen)
        sizes[str(count)] = own
        print(count, own, flush=True)
        del tree, vectors
        if count < max(options.sizes):
            shutil.rmtree(folder)
        save("scaling", {"set": options.set, "sizes": sizes}, options)


if __name__ == "__main__":
    main()
