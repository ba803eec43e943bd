"""From which best score on a memory holds an answer: its own questions beside those of other sets, mode deep."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, arguments, save

from treemem import Memory
from treemem.config import SearchConfig
from treemem.evaluation import load_set
from treemem.hierarchy.build import retrain
from treemem.hierarchy.weights import DEFAULT_FOLDER, load_hierarchy

SETS = (("fairytaleqa", "dev"), ("scifact", "train"), ("medquad", "dev"))


def main() -> None:
    """Ask every memory its own and the others' questions."""
    parser = arguments(__doc__)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--weights", default="default", help="that the untrained memories are given: default or none")
    parser.add_argument("--record", type=float, help="write this threshold into the card of the weights, a folder")
    options = parser.parse_args()
    if options.record is not None:
        weights = load_hierarchy(options.weights)
        assert weights is not None
        weights.card["threshold"] = options.record
        weights.save(DEFAULT_FOLDER if options.weights == "default" else options.weights)
        return
    questions = {}
    for name, split in SETS:
        texts = [query.text for query in load_set(options.data / name, split=split).queries]
        rng = np.random.default_rng(options.seed)
        questions[name] = [texts[i] for i in rng.choice(len(texts), min(options.queries, len(texts)), replace=False)]
    scores: dict[str, dict[str, list[float]]] = {}
    for name, _ in SETS:
        if not (options.memories / name).exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / name
            shutil.copytree(options.memories / name, place)
            weights = load_hierarchy(options.weights)
            if weights is not None:
                retrain(Memory.open(place).store, weights, f"{options.weights} weights")
            memory = Memory.open(place)
            scores[name] = {}
            for other, texts in questions.items():
                found = memory.search_many(texts, SearchConfig(mode="deep", k=1))
                scores[name][other] = [result.hits[0].score for result in found]
                print(name, other, np.percentile(scores[name][other], [1, 5, 25, 50, 75, 95, 99]).round(2), flush=True)
    own = np.concatenate([np.array(rows[name]) for name, rows in scores.items()])
    foreign = np.concatenate([np.array(rows[o]) for name, rows in scores.items() for o in rows if o != name])
    table = {
        str(round(float(t), 2)): {
            "own refused": round(float((own < t).mean()), 3),
            "foreign refused": round(float((foreign < t).mean()), 3),
        }
        for t in np.arange(1.0, 2.6, 0.1)
    }
    print(table)
    percentiles = {
        name: {o: np.percentile(v, [5, 50, 95]).round(3).tolist() for o, v in rows.items()}
        for name, rows in scores.items()
    }
    path = RESULTS / "threshold.json"
    runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs[options.weights] = {"score percentiles 5, 50, 95": percentiles, "thresholds": table}
    save("threshold", {"runs": runs}, options)


if __name__ == "__main__":
    main()
