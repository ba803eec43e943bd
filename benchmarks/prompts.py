"""Which prompt answers best with the small default model: replies of every style, judged on development questions."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, save

from treemem import Memory
from treemem.config import SearchConfig
from treemem.evaluation import EvalQuery, load_set
from treemem.evaluation.metrics import contained, exact_match, token_f1
from treemem.hierarchy.ask import AskConfig
from treemem.hierarchy.context import labelled, passages
from treemem.hierarchy.generate import LanguageModel
from treemem.hierarchy.prompt import (
    PROMPTS,
    REFUSAL,
    SHORT_EXAMPLES,
    PromptExample,
    PromptStyle,
    build_prompt,
    grounded_share,
    is_grounded,
    is_refusal,
    prose,
    quoted,
    ranked_sentences,
)

RIVER, BAKER, _ = SHORT_EXAMPLES
SENTENCES = (
    replace(RIVER, reply="The Vell is 212 km long [1]."),
    PromptExample("Who built the lighthouse of Orm?", ("Orm: Orm is a fishing village of 300 people.",), REFUSAL),
    replace(BAKER, reply="She closed it because there was no flour to be had [2]."),
)
STYLES = {
    **PROMPTS,
    "passages": replace(PROMPTS["map"], map_labels=0, passages=4),
    "examples": PromptStyle(PROMPTS["map"].system, map_labels=0, passages=4, examples=SENTENCES),
    "short": replace(PROMPTS["short with map"], map_labels=0),
    "brief": PromptStyle(
        "Read the text and answer the question with a short phrase from the text.", map_labels=0, passages=3
    ),
}
# Style, chunks taken along on each side, tokens for passages.
VARIANTS = (
    ("map", 1, 900), ("map", 0, 500), ("passages", 1, 900), ("passages", 0, 500), ("examples", 0, 500),
    ("brief", 0, 500), ("short", 0, 500), ("short", 0, 250), ("short with map", 0, 500),
)  # fmt: skip
Variants = tuple[tuple[str, int, int], ...]
SETS = (("fairytaleqa", "dev"), ("wiki_multi", "dev"))


def judge(reply: str, golds: tuple[str, ...]) -> dict[str, float]:
    """Answer metrics of one text."""
    return {"em": exact_match(reply, golds), "f1": token_f1(reply, golds), "contained": contained(reply, golds)}


def replies(
    memory: Memory, queries: list[EvalQuery], model: LanguageModel, max_tokens: int, log: Path, variants: Variants
) -> list[dict[str, Any]]:
    """Every query in every variant; one JSON line each in `log`."""
    rows = []
    config = AskConfig()
    for number, query in enumerate(queries):
        result = memory.search_many([query.text], SearchConfig(mode="deep", k=10))[0]
        levels = labelled(memory.image, result.gathered, config.labels)
        for style, neighbours, budget in variants:
            found = passages(memory.image, result.hits, model.count_tokens, budget, neighbours)
            prompt = build_prompt(query.text, levels, found, model.count_tokens, model.context_tokens - max_tokens,
                                  style=STYLES[style], markers=model.control_markers)  # fmt: skip
            begin = time.perf_counter()
            reply = "".join(model.stream(prompt.messages, max_tokens)).strip()
            shown = prompt.context.passages
            ranked = ranked_sentences(query.text, shown, lambda t: memory.encoder.encode(t, precise=True))
            quote = quoted(prose(ranked)[:1])
            rows.append({
                "question": query.text, "golds": list(query.answers),
                "variant": f"{style}, neighbours {neighbours}, {budget} tokens",
                "score": result.hits[0].score, "reply": reply, "quote": quote, "refused": is_refusal(reply),
                "grounded": is_grounded(reply, query.text, shown), "share": grounded_share(reply, query.text, shown),
                "seconds": time.perf_counter() - begin, "said": judge(reply, query.answers),
                "quoted": judge(quote, query.answers),
            })  # fmt: skip
            with log.open("a") as file:
                file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
        print(number + 1, "questions", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means by variant: of the replies, of the quotes, and of what `ask` would have said."""
    out = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        asked = [row["said"] if row["grounded"] and not row["refused"] else row["quoted"] for row in own]
        figures = {
            "f1": np.mean([row["said"]["f1"] for row in own]),
            "exact match": np.mean([row["said"]["em"] for row in own]),
            "contained": np.mean([row["said"]["contained"] for row in own]),
            "refused": np.mean([row["refused"] for row in own]),
            "grounded": np.mean([row["grounded"] for row in own]),
            "quote f1": np.mean([row["quoted"]["f1"] for row in own]),
            "quote contained": np.mean([row["quoted"]["contained"] for row in own]),
            "checked f1": np.mean([row["f1"] for row in asked]),
            "checked contained": np.mean([row["contained"] for row in asked]),
            "seconds": np.median([row["seconds"] for row in own]),
        }
        out[variant] = {name: round(float(value), 3) for name, value in figures.items()}
    return out


def main() -> None:
    """Ask, judge, save."""
    parser = arguments(__doc__)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--sets", nargs="*")
    parser.add_argument("--styles", nargs="*", help="only these styles")
    parser.add_argument("--log", type=Path, default=Path("replies.jsonl"))
    options = parser.parse_args()
    sets = {}
    for name, split in SETS:
        if not (options.memories / name).exists() or (options.sets and name not in options.sets):
            continue
        memory = Memory.open(options.memories / name)
        model = memory.language_model()
        rng = np.random.default_rng(options.seed)
        queries = [query for query in load_set(options.data / name, split=split).queries if query.answers]
        queries = [
            queries[i] for i in sorted(rng.choice(len(queries), min(options.queries, len(queries)), replace=False))
        ]
        chosen = tuple(v for v in VARIANTS if not options.styles or v[0] in options.styles)
        rows = replies(memory, queries, model, options.max_tokens, options.log, chosen)
        sets[f"{name} {split}"] = {"questions": len(queries), "variants": table(rows)}
        print(json.dumps(sets, indent=1))
    save("prompts", {"sets": sets, "styles": sorted(STYLES)}, options)


if __name__ == "__main__":
    main()
