"""From which best score on a memory holds an answer: its own questions beside those of other sets, mode deep."""

from __future__ import annotations

import numpy as np
from common import arguments, save

from treemem import Memory
from treemem.config import SearchConfig
from treemem.evaluation import load_set

SETS = (("fairytaleqa", "dev"), ("scifact", "train"), ("medquad", "dev"))


def main() -> None:
    """Ask every memory its own and the others' questions."""
    parser = arguments(__doc__)
    parser.add_argument("--queries", type=int, default=60)
    options = parser.parse_args()
    questions = {}
    for name, split in SETS:
        texts = [query.text for query in load_set(options.data / name, split=split).queries]
        rng = np.random.default_rng(options.seed)
        questions[name] = [texts[i] for i in rng.choice(len(texts), min(options.queries, len(texts)), replace=False)]
    scores: dict[str, dict[str, list[float]]] = {}
    for name, _ in SETS:
        if not (options.memories / name).exists():
            continue
        memory = Memory.open(options.memories / name)
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
    save("threshold", {"score percentiles 5, 50, 95": percentiles, "thresholds": table}, options)


if __name__ == "__main__":
    main()
