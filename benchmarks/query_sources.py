"""Where questions to train on may come from, and what each source is worth on real questions."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, arguments, save

from treemem import Memory
from treemem.errors import InputError
from treemem.evaluation import evaluate, load_set
from treemem.evaluation.questions import training_questions
from treemem.training import TrainConfig, train_memory
from treemem.training.questions import Question
from treemem.training.run import WRITTEN_MOST, trainable_levels
from treemem.training.sources import written

# Set and the split of real questions that is judged: none that another benchmark reports as its result.
SETS = (("fairytaleqa", "dev"), ("medquad", "dev"), ("qmsum", "dev"), ("wiki_multi", "dev"))
# Name, sources, and whether level 1 is trained, which `treemem train` leaves alone without labelled questions.
RUNS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("distilled", ("distilled",), False),
    ("headings", ("headings",), False),
    ("headings, level 1 too", ("headings",), True),
    ("written", ("written",), False),
    ("written, level 1 too", ("written",), True),
    ("headings + distilled (the default)", ("headings", "distilled"), False),
    ("headings + written + distilled", ("headings", "written", "distilled"), False),
    ("labelled", ("labelled",), True),
    ("labelled + headings + distilled", ("labelled", "headings", "distilled"), True),
)


def judged(memory: Memory, folder: Path, split: str, seed: int) -> dict[str, Any]:
    """hit@1 and hit@10 of walk, by cosines alone, and of hybrid, and what walks hold of exact search's best."""
    questions, modes = load_set(folder, split=split), {}
    for mode in ("walk", "hybrid"):
        report = evaluate(memory, questions, [mode], decoder=mode != "walk", seed=seed).to_json()
        modes[mode] = {key: report["modes"][mode][key] for key in ("hit@1", "hit@10")}
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
        given: dict[str, list[Question]] = {"labelled": training_questions(options.data / name)[0]}
        for title, sources, all_levels in RUNS:
            if options.runs and title not in options.runs:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                copy = Path(scratch) / name
                shutil.copytree(place, copy)
                memory, config = Memory.open(copy), TrainConfig(seed=options.seed)
                if "written" in sources and "written" not in given:
                    model = memory.language_model(options.llm)
                    assert model is not None
                    given["written"] = written(memory.searcher, model, WRITTEN_MOST, options.seed)
                levels = trainable_levels(memory, config)
                try:
                    report = train_memory(
                        memory,
                        [question for source in sources for question in given.get(source, ())],
                        sources=[source for source in sources if source not in given],
                        levels=levels if all_levels else [level for level in levels if level > 1],
                        config=config,
                        minutes=15,
                    )
                except InputError as error:  # too few questions of this kind
                    own[title] = {"failed": str(error)}
                    print(name, title, error, flush=True)
                    continue
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
