"""Text into vectors and back: how much of held-out Wikipedia comes through, by width and number of vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS, arguments, save

from treemem.evaluation import run
from treemem.training.autoencode import ENCODER_FOLDER, AutoEncodeConfig, AutoEncodeReport, train_autoencoder

SHAPES = ((512, 1), (256, 1), (1024, 1), (512, 2), (512, 4), (512, 8))
"""Width and number of vectors."""
REDUCED = {
    "tokens": 16, "code": 32, "encoder_width": 64, "encoder_layers": 1, "decoder_width": 96, "decoder_layers": 2,
    "head": 32,
}  # fmt: skip
"""What a CPU can train: an eighth of the tokens, and of the width, so that a token has as many numbers."""
RETRIEVAL = "fairytaleqa"


def row(report: AutoEncodeReport) -> dict[str, Any]:
    """What is published of a run."""
    document = report.to_json()
    del document["folder"]
    return document


def retrieval(encoder: Path, folder: Path, queries: int, seed: int) -> dict[str, Any]:
    """hit@1 and hit@10 of a memory of a data set whose encoder 1 is the trained one; tree and decoder untrained."""
    report = run(
        folder,
        split="dev",
        modes=["walk", "exact", "bm25", "hybrid"],
        max_queries=queries,
        decoder=False,
        encoder=str(encoder),
        seed=seed,
    )
    return dict(report.to_json()["modes"])


def main() -> None:
    """Train what is asked for, or take runs that are there, and write the figures."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--prose", nargs="+", default=[], help="what to train on; by default DATA/prose/wiki-0*")
    parser.add_argument("--shapes", nargs="+", default=["512x1", "512x4"], help="WIDTHxVECTORS, of these: all, …")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--steps", type=int, help="in place of minutes: every shape sees as many texts")
    parser.add_argument("--batch", type=int, default=AutoEncodeConfig.batch, help="texts in a step")
    parser.add_argument("--reduced", action="store_true", help="an eighth of tokens and width, for a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("autoencoders"), help="a folder for each shape goes here")
    parser.add_argument("--retrieval", type=int, default=400, metavar="QUESTIONS", help="of the first shape; 0: none")
    options = parser.parse_args()
    known = [f"{width}x{vectors}" for width, vectors in SHAPES]
    shapes = known if options.shapes == ["all"] else options.shapes
    if unknown := set(shapes) - set(known):
        parser.error(f"--shapes {' '.join(sorted(unknown))}: known are {' '.join(known)}")
    name = "autoencode-reduced" if options.reduced else "autoencode"
    path = RESULTS / f"{name}.json"
    figures: dict[str, Any] = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else {}
    for shape in shapes:
        width, vectors = map(int, shape.split("x"))
        reduced = {**REDUCED, "width": width // 8} if options.reduced else {}
        folder = options.out / (f"{shape}-reduced" if options.reduced else shape)
        if (folder / "metrics.json").exists():
            report = AutoEncodeReport.load(folder)
        else:
            report = train_autoencoder(
                options.prose or sorted(map(str, (options.data / "prose").glob("wiki-0*"))),
                folder,
                shape={"width": width, "vectors": vectors, **reduced},
                config=AutoEncodeConfig(
                    minutes=options.minutes, steps=options.steps, batch=options.batch, seed=options.seed
                ),
                held_out=[str(options.data / "prose" / "wiki-valid.jsonl.zst")],
                device=options.device,
                progress=lambda stage, done, total: None,
            )
        figures[shape] = {**figures.get(shape, {}), **row(report)}
        told = ", ".join(f"{name} {value:.4f}" for name, value in report.figures.items())
        print(f"{shape}, {report.seconds:,.0f} s, {report.examples:,} texts: {told}", flush=True)
    encoder = options.out / shapes[0] / ENCODER_FOLDER
    if options.retrieval and not options.reduced and encoder.exists():
        found = retrieval(encoder, options.data / RETRIEVAL, options.retrieval, options.seed)
        figures[shapes[0]]["retrieval"] = {"set": RETRIEVAL, "split": "dev", "modes": found}
        print(RETRIEVAL, {mode: (own["hit@1"], own["hit@10"]) for mode, own in found.items()})
    save(name, {"runs": figures}, options)


if __name__ == "__main__":
    main()
