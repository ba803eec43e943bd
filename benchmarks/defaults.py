"""Default weights: a decoder trained on all public train splits, and what it gives sets that it never saw."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, arguments, save

from treemem import Document, Memory
from treemem.evaluation import evaluate, load_set
from treemem.evaluation.questions import training_questions
from treemem.hierarchy.build import retrain
from treemem.hierarchy.decoder import PARTS, Decoder, DecoderConfig
from treemem.hierarchy.readers import ReadReport, read
from treemem.hierarchy.weights import Hierarchy, HierarchyConfig
from treemem.training.corpus import Corpus
from treemem.training.decode import DecoderSet, DecoderTraining, decoder_set, ranked_by_decoder, train_decoder
from treemem.training.fit import hit_rates, reciprocal_rank
from treemem.training.questions import resolve, split_by_document
from treemem.training.sources import headings

TRAINED = ("medquad", "fairytaleqa", "wiki_multi", "scifact", "wikiqa", "qmsum", "pubmedqa")
NEVER = ("locomo", "cranfield", "npl", "hotpotqa_200", "musique_100", "limit_small")
PROSE = "prose"
"""Text without questions: its headings are asked for."""
PROSE_FILES = (("wiki-valid.jsonl.zst", 1), ("manuals.jsonl.zst", 20))
"""Files, and n where every n-th of their documents is taken."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
MOST = 2500
"""Questions of a set that are trained on."""
JUDGES = 800
# In this set documents with right answers to training questions have no titles: their lack must not be learned.
WITHOUT_TITLES = "wikiqa"


def prose(folder: Path) -> Iterator[Document]:
    """A sample of articles and manual pages."""
    for name, step in PROSE_FILES:
        yield from islice(read(folder / name, ReadReport()), 0, None, step)


def gathered(place: Path, data: Path, scratch: Path, seed: int) -> tuple[DecoderSet, DecoderSet]:
    """Candidates of a set's train split, and of its development split or, without one, of a fifth of the documents."""
    if place.name == PROSE and not place.exists():
        Memory.build(prose(data), place, hierarchy="none")
    memory = Memory.open(place)
    questions, held_out = (headings(memory.image), None) if place.name == PROSE else training_questions(data)
    pool = resolve(memory.searcher, questions)
    if held_out:
        train, judges = pool, resolve(memory.searcher, held_out)
    else:
        apart, inside = split_by_document(pool, 0.2, JUDGES, seed)
        train, judges = pool.take(apart), pool.take(inside)
    corpus = Corpus(place.name, memory, train, judges, scratch)
    searcher = memory.searcher
    out = []
    for one, most in ((train, MOST), (judges, JUDGES)):
        rows = np.unique(np.linspace(0, len(one) - 1, min(most, len(one))).round().astype(np.int64))
        made = decoder_set(corpus, searcher, one, rows)
        if place.name == WITHOUT_TITLES:
            made.inputs.parts[..., PARTS.index("title")] = 0
        out.append(made)
    return out[0], out[1]


def trained(sets: Iterable[DecoderSet], options: Any) -> Decoder:
    """A decoder trained on some sets."""
    sets = list(sets)
    torch.manual_seed(options.seed)
    decoder = Decoder(DecoderConfig(sets[0].inputs.query.shape[-1], layers=options.layers))
    train_decoder(decoder, sets, DecoderTraining(steps=options.steps, seed=options.seed))
    return decoder


def gains(decoder: Decoder, judges: DecoderSet) -> dict[str, dict[str, float]]:
    """hit@1, hit@10 and MRR@10 without the decoder, and with it at each strength."""
    out = {}
    for strength in (0.0, *STRENGTHS):
        own = None
        if strength:
            own = Decoder(replace(decoder.config, strength=strength)).eval()
            own.load_state_dict(decoder.state_dict())
        one, ten = hit_rates(ranked_by_decoder(own, judges), (1, 10))
        mrr = reciprocal_rank(ranked_by_decoder(own, judges))
        out[str(strength)] = {"hit@1": one, "hit@10": ten, "mrr@10": mrr}
    return out


def as_hierarchy(memory: Memory, decoder: Decoder, strength: float, names: Iterable[str], seed: int) -> Hierarchy:
    """An untrained hierarchy with this decoder."""
    chosen = Decoder(replace(decoder.config, strength=strength))
    chosen.load_state_dict(decoder.state_dict())
    torch.manual_seed(seed)
    hierarchy = Hierarchy(HierarchyConfig(memory.encoder.info)).with_decoder(chosen)
    names = list(names)
    hierarchy.card = {
        "summary": f"A decoder trained on {', '.join(names)}; levels and encoder as they come",
        "data": {name: "headings" if name == PROSE else "split train" for name in names},
        "settings": {"strength": strength, "seed": seed},
    }
    return hierarchy.rounded()


def judged(place: Path, data: Path, split: str | None, hierarchy: Hierarchy, options: Any) -> dict[str, Any]:
    """A memory's figures before and after it is given a hierarchy."""
    questions = load_set(data, split=split)
    out: dict[str, Any] = {"split": split}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / place.name
        shutil.copytree(place, copy)
        for state in ("before", "after"):
            if state == "after":
                retrain(Memory.open(copy).store, hierarchy, "default weights")
            modes = evaluate(Memory.open(copy), questions, ("hybrid",), seed=options.seed).to_json()["modes"]
            if options.deep_queries:
                deep = evaluate(
                    Memory.open(copy), questions, ("deep",), max_queries=options.deep_queries, seed=options.seed
                )
                modes |= deep.to_json()["modes"]
            out[state] = modes
    return out


def line(name: str, run: dict[str, Any]) -> str:
    """What changed, in points of hit@1 and hit@10."""
    cells = []
    for mode in run["after"]:
        for key in ("hit@1", "hit@10"):
            cells.append(f"{100 * (run['after'][mode][key] - run['before'][mode][key]):+.1f}")
    return f"{name}: {' '.join(run['after'])} {' / '.join(cells)}"


def trained_part(options: Any) -> dict[str, Any]:
    """Train with each set left out, choose a strength by what that gives, and train on all."""
    sets: dict[str, tuple[DecoderSet, DecoderSet]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*TRAINED, PROSE) if options.prose else TRAINED:
            file = options.cache and options.cache / f"{name}.pt"
            if file and file.exists():
                sets[name] = torch.load(file, weights_only=False)
            else:
                sets[name] = gathered(options.memories / name, options.data / name, Path(scratch) / name, options.seed)
                if file:
                    torch.save(sets[name], file)
            print(name, *map(len, sets[name]), flush=True)
    first = Memory.open(options.memories / TRAINED[0])
    left_out = {}
    for name in TRAINED:
        begin = time.monotonic()
        others = [other for other in sets if other != name]
        decoder = trained((sets[other][0] for other in others), options)
        left_out[name] = gains(decoder, sets[name][1])
        if options.cache:
            as_hierarchy(first, decoder, 1.0, others, options.seed).save(options.cache / f"without-{name}")
        print(name, json.dumps(left_out[name]), f"{time.monotonic() - begin:.0f} s", flush=True)
    means = {
        strength: float(np.mean([run[str(strength)]["mrr@10"] - run["0.0"]["mrr@10"] for run in left_out.values()]))
        for strength in STRENGTHS
    }
    strength = options.strength or max(means, key=means.__getitem__)
    whole = trained((train for train, _ in sets.values()), options)
    chosen = as_hierarchy(first, whole, strength, sets, options.seed)
    chosen.card["figures"] = {
        f"{name} (trained without it), {key}": (run["0.0"][key], run[str(strength)][key])
        for name, run in left_out.items()
        for key in ("hit@1", "hit@10")
    }
    chosen.save(options.out)
    together = {name: gains(whole, judges) for name, (_, judges) in sets.items()}
    return {
        "questions": {name: [len(part) for part in parts] for name, parts in sets.items()},
        "left_out": left_out,
        "strength": strength,
        "mean_gain_by_strength": means,
        "together": together,
    }


def main() -> None:
    """Train the default weights, and search with them what they were not trained on."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the default weights")
    parser.add_argument("--deep-queries", type=int, default=200)
    parser.add_argument("--strength", type=float, help="in place of the one that development questions choose")
    parser.add_argument("--prose", action="store_true", help="train on headings of articles and manuals too")
    parser.add_argument("--cache", type=Path, help="a folder to keep candidates and decoders in; needed for `test`")
    parser.add_argument(
        "--parts", nargs="*", default=["train", "never"], choices=["train", "test", "never"],
        help="train; search the test splits, each with the weights trained without that set; the sets never trained on",
    )  # fmt: skip
    options = parser.parse_args()
    path = RESULTS / "defaults.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    if "train" in options.parts:
        made = trained_part(options)
        runs |= {"with_headings": made} if options.prose else made
        save("defaults", {"runs": runs}, options)
    for part, names, split in (("test", TRAINED, "test"), ("never", NEVER, None)):
        if part not in options.parts:
            continue
        for name in names:
            hierarchy = Hierarchy.load(options.cache / f"without-{name}" if part == "test" else options.out)
            decoder = hierarchy.decoder
            assert decoder is not None
            first = Memory.open(options.memories / name)
            used = as_hierarchy(first, decoder, runs["strength"], hierarchy.card["data"], options.seed)
            runs.setdefault(part, {})[name] = judged(options.memories / name, options.data / name, split, used, options)
            print(line(name, runs[part][name]), flush=True)
            save("defaults", {"runs": runs}, options)


if __name__ == "__main__":
    main()
