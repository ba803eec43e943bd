"""Training: each public set's memory trained on its train split, its test split searched before and after."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, arguments, measured, save

from treemem import Memory
from treemem.evaluation import evaluate, load_set
from treemem.evaluation.questions import training_questions
from treemem.hierarchy.build import retrain
from treemem.hierarchy.weights import load_hierarchy
from treemem.training import TrainConfig, train_memory
from treemem.training.run import trainable_levels

# Set, the split that is judged at the end, the one for choosing (None: held-out questions of the train split).
SETS: tuple[tuple[str, str, str | None], ...] = (
    ("medquad", "test", "dev"),
    ("fairytaleqa", "test", "dev"),
    ("wiki_multi", "test", "dev"),
    ("scifact", "test", None),
    ("wikiqa", "test", "dev"),
    ("qmsum", "test", "dev"),
)
MODES = ("walk", "exact", "hybrid")
STATES = ("untrained", "packaged", "trained")
"""As it was before there was any training, with the packaged weights, and trained on from these."""


def judged(memory: Memory, folder: Path, split: str, seed: int, deep_queries: int) -> dict[str, Any]:
    """All modes on all questions of a split, those of vectors by cosines alone too, and level 0 on some."""
    questions = load_set(folder, split=split)
    report = evaluate(memory, questions, MODES, seed=seed).to_json()
    out = {key: report[key] for key in ("queries", "modes", "per_level_recall")}
    if memory.hierarchy is not None:
        out["cosines"] = evaluate(memory, questions, MODES[:2], decoder=False, seed=seed).to_json()["modes"]
    if deep_queries:
        out["deep"] = evaluate(memory, questions, ("hybrid", "deep"), max_queries=deep_queries, seed=seed).to_json()[
            "modes"
        ]
    return out


def row(name: str, run: dict[str, Any]) -> str:
    """One line: hit@1 / hit@10 of walk and exact by cosines, then of the modes as users search, in each state."""
    cells = []
    for kind, mode in (
        ("cosines", "walk"),
        ("cosines", "exact"),
        *(("modes", mode) for mode in MODES),
        ("deep", "deep"),
    ):
        for state in STATES:
            if figures := run[state].get(kind, {}).get(mode):
                cells.append(f"{figures['hit@1']:.3f} / {figures['hit@10']:.3f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def device() -> str:
    """What encodes and trains."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def timed(name: str, options: Any) -> None:
    """How long a set's memory is trained, level 0 left out, as `treemem train MEMORY --dataset DIR` does."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / name
        shutil.copytree(options.memories / name, copy)
        default = load_hierarchy("default")
        assert default is not None
        retrain(Memory.open(copy).store, default, "default weights")
        memory = Memory.open(copy)
        questions, held_out = training_questions(options.data / name)
        config = TrainConfig(seed=options.seed, tune_encoder=options.tune)
        report = train_memory(memory, questions, held_out=held_out, config=config).to_json()
    told = {key: report[key] for key in ("questions", "held_out", "adopted", "before", "after", "seconds")}
    save(options.name, {"set": name, "chunks": memory.image.chunks, "device": device(), **told}, options)
    print(f"{name}: {report['seconds']:.0f} s")


def main() -> None:
    """Train a copy of each set's untrained memory, and put its figures beside those measured before."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--development", action="store_true", help="judge by development splits, for choosing")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--deep-queries", type=int, default=400, help="how many questions level 0 is judged by")
    parser.add_argument("--time", metavar="SET", help="only time the training of this set's memory")
    parser.add_argument("--tune", default="none", choices=("none", "lora", "full"), help="… and fine-tune encoder 1")
    parser.add_argument("--name", default="training-time", help="of the result of --time")
    options = parser.parse_args()
    if options.time:
        return timed(options.time, options)
    result = "training-development" if options.development else "training"
    path = RESULTS / f"{result}.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for name, test, development in SETS:
        place = Path(options.memories) / name
        split = development if options.development else test
        if not place.exists() or split is None or (options.sets and name not in options.sets):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / name
            shutil.copytree(place, copy)
            untrained = judged(Memory.open(copy), options.data / name, split, options.seed, options.deep_queries)
            default = load_hierarchy("default")
            assert default is not None
            retrain(Memory.open(copy).store, default, "default weights")
            packaged = judged(Memory.open(copy), options.data / name, split, options.seed, options.deep_queries)
            questions, held_out = training_questions(options.data / name)
            memory, config = Memory.open(copy), TrainConfig(seed=options.seed)
            report = train_memory(
                memory,
                questions,
                held_out=held_out,
                levels=[0, *trainable_levels(memory, config)],
                config=config,
                minutes=options.minutes,
            )
            trained = judged(Memory.open(copy), options.data / name, split, options.seed, options.deep_queries)
        told = report.to_json()
        del told["memory"], told["logs"]
        runs[name] = {
            "measured": measured(),
            "split": split,
            "device": device(),
            "training": told,
            "untrained": untrained,
            "packaged": packaged,
            "trained": trained,
        }
        save(result, {"runs": runs}, options)
        print(row(name, runs[name]), flush=True)


if __name__ == "__main__":
    main()
