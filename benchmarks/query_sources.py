"""Where questions to train on may come from, and what each source is worth on real questions."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, arguments, save

from treemem import Memory
from treemem.evaluation import evaluate, load_set
from treemem.evaluation.questions import training_questions
from treemem.training import TrainConfig, train_memory
from treemem.training.run import trainable_levels

# Set and the split of real questions that is judged: none that another benchmark reports as its result.
SETS = (("medquad", "dev"), ("fairytaleqa", "dev"), ("qmsum", "dev"), ("scifact", "test"), ("wiki_multi", "dev"))
MODES = ("walk", "hybrid")
# Name, sources of treemem.training, whether labelled questions are given too, and the levels (None: as `train` has it).
RUNS: tuple[tuple[str, tuple[str, ...], bool, bool], ...] = (
    ("distilled", ("distilled",), False, False),
    ("headings", ("headings",), False, False),
    ("headings, level 1 too", ("headings",), False, True),
    ("written", ("written",), False, False),
    ("written, level 1 too", ("written",), False, True),
    ("headings + distilled (the default)", ("headings", "distilled"), False, False),
    ("headings + written + distilled", ("headings", "written", "distilled"), False, False),
    ("labelled", (), True, False),
    ("labelled + headings + distilled", ("headings", "distilled"), True, False),
)


def judged(memory: Memory, folder: Path, split: str, seed: int) -> dict[str, Any]:
    """hit@1 and hit@10 of walk and hybrid, and how often a walk's beam holds a right node of level 2."""
    report = evaluate(memory, load_set(folder, split=split), MODES, seed=seed).to_json()
    modes = {mode: {key: figures[key] for key in ("hit@1", "hit@10")} for mode, figures in report["modes"].items()}
    return {"modes": modes, "per_level_recall": report["per_level_recall"]}


def main() -> None:
    """Train copies of each set's memory, one with every source, and search for the real questions."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sets", nargs="*", help="only these sets")
    parser.add_argument("--runs", nargs="*", help="only these")
    parser.add_argument("--llm", default="smollm2", help="writes the questions of source `written`")
    options = parser.parse_args()
    path = RESULTS / "query_sources.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for name, split in SETS:
        place = options.memories / name
        if not place.exists() or (options.sets and name not in options.sets):
            continue
        own = runs.setdefault(name, {"split": split})
        own["untrained"] = judged(Memory.open(place), options.data / name, split, options.seed)
        for title, sources, labelled, all_levels in RUNS:
            if options.runs and title not in options.runs:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                copy = Path(scratch) / name
                shutil.copytree(place, copy)
                memory, config = Memory.open(copy), TrainConfig(seed=options.seed)
                report = train_memory(
                    memory,
                    training_questions(options.data / name)[0] if labelled else None,
                    sources=sources,
                    model=memory.language_model(options.llm) if "written" in sources else None,
                    levels=trainable_levels(memory, config) if all_levels else None,
                    config=config,
                    minutes=15,
                )
                after = judged(Memory.open(copy), options.data / name, split, options.seed)
            told = report.to_json()
            kept = {key: told[key] for key in ("questions", "held_out", "adopted", "improved", "seconds")}
            own[title] = {**after, "training": kept}
            save("query_sources", {"runs": runs}, options)
            cells = [
                f"{mode} {figures['hit@1']:.3f} / {figures['hit@10']:.3f}" for mode, figures in after["modes"].items()
            ]
            print(name, title, *cells, flush=True)


if __name__ == "__main__":
    main()
