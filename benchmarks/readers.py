"""Readers: training one on gathered examples, and what it says under every condition: the gates of `--reader`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import arguments, save

from treemem.evaluation.readers import judge
from treemem.hierarchy.embed import load_encoder
from treemem.hierarchy.generate import LocalModel, load_language_model
from treemem.hierarchy.reader import ReadingModel, load_reader
from treemem.training.examples import Examples
from treemem.training.reader import CONDITIONS, ReaderTrainer, ReaderTraining


def told(stage: str, done: float, total: float | None) -> None:
    """Progress, a line every ten seconds."""
    if time.monotonic() - told.last > 10:  # type: ignore[attr-defined]
        told.last = time.monotonic()  # type: ignore[attr-defined]
        print(f"{stage} {done:.0f} of {total or 0:.0f}", flush=True)


told.last = 0.0  # type: ignore[attr-defined]


def language_model() -> LocalModel:
    """The packaged model."""
    model = load_language_model("smollm2")
    assert isinstance(model, LocalModel)
    return model


def trained(options: argparse.Namespace) -> dict[str, Any]:
    """Train a reader and save it; how long it took."""
    begin = time.monotonic()
    sets = [Examples.load(folder) for folder in options.train]
    encoder = load_encoder("minilm", options.device)
    config = ReaderTraining(
        minutes=options.minutes,
        shares=tuple(options.shares),
        batch_tokens=options.train_batch_tokens,
        rate=options.rate,
        projection_rate=options.rate,
        seed=options.seed,
    )
    start = load_reader(options.start) if options.start else None
    trainer = ReaderTrainer(
        language_model(), encoder, sets, options.reader, config=config, start=start, device=options.device,
        progress=told,
    )  # fmt: skip
    reader = trainer.fit()
    return {
        "minutes": options.minutes,
        "seconds": round(time.monotonic() - begin, 1),
        "questions": sum(len(own.rows) for own in sets),
        "chunks": sum(len(own.texts) for own in sets),
        "weights": sum(parameter.numel() for parameter in reader.parameters()),
        "steps": trainer.steps,
        "cosine of the fitted maps": round(trainer.fitted, 4),
    }


def main() -> None:
    """Train where examples are given, then judge."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--reader", type=Path, required=True, help="folder of the reader")
    parser.add_argument("--train", type=Path, nargs="*", default=[], help="folders of examples to train on first")
    parser.add_argument("--judge", nargs="*", default=[], help="NAME=FOLDER of examples to judge by")
    parser.add_argument("--start", help="reader that is gone on with: default, or a folder")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--shares", type=float, nargs=3, default=ReaderTraining.shares)
    parser.add_argument("--train-batch-tokens", type=int, default=ReaderTraining.batch_tokens)
    parser.add_argument("--rate", type=float, default=ReaderTraining.rate)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS))
    parser.add_argument("--most", type=int, help="at most so many questions of each set")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--name", default="readers", help="of the result")
    options = parser.parse_args()
    out: dict[str, Any] = {}
    if options.train:
        out["training"] = trained(options)
        print(out["training"], flush=True)
    reader = load_reader(options.reader)
    assert reader is not None
    reading = ReadingModel(language_model(), reader)
    encoder = load_encoder("minilm", options.device)
    out["device"] = torch.cuda.get_device_name() if reading.model.model.device.type == "cuda" else "cpu"
    out["sets"] = {}
    samples: dict[str, Any] = {}
    places = dict(named.split("=", 1) for named in options.judge)
    options.judge = list(places)  # what is kept with the figures
    for name, folder in places.items():
        examples = Examples.load(folder)
        examples = examples.take(range(min(len(examples.rows), options.most or len(examples.rows))))
        examples.read(encoder)
        begin = time.monotonic()
        said: dict[str, list[str]] = {}
        gates = judge(
            reading, examples, options.conditions, batch_tokens=options.batch_tokens, progress=told, said=said
        )
        out["sets"][name] = gates.to_json() | {"seconds": round(time.monotonic() - begin, 1)}
        print(name, out["sets"][name], flush=True)
        asked = [[row.question, row.answers[0]] for row in examples.rows[:12]]
        samples[name] = {"asked": asked, **{condition: own[:12] for condition, own in said.items()}}
        (options.reader / "samples.json").write_text(json.dumps(samples, indent=1))
        save(options.name, out, options)


if __name__ == "__main__":
    main()
