"""The command line's `autoencode`: text into a vector and back again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from treemem.cli import AsJson, app, err, out, print_json, progress_of
from treemem.errors import InputError

if TYPE_CHECKING:
    from treemem.training.autoencode import AutoEncodeReport, Sample


@app.command()
def autoencode(
    prose: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROSE…", help="Files, folders or globs to train on, or prepared .tokens.xz files."),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where what is trained goes.")] = None,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", metavar="PATH", help="Texts to measure on, never trained on.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Numbers in a vector.")] = 512,
    vectors: Annotated[int, typer.Option(min=1, help="Vectors of a text.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in a text.")] = 128,
    minutes: Annotated[float, typer.Option(min=0.01, help="Train for so long; the schedule follows the time.")] = 25,
    batch: Annotated[int, typer.Option(min=1, help="Texts in a step.")] = 256,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tokenizer: Annotated[str, typer.Option(help="minilm, or a folder with a tokenizer.json.")] = "minilm",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted there.")] = False,
    samples: Annotated[bool, typer.Option("--samples", help="Only show the samples of a finished run.")] = False,
    prepare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only write the tokens of PROSE to this .tokens.xz file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train an encoder to vectors from which the text can be rebuilt, and measure how much comes through."""
    if prepare is not None:
        _prepare(prose or [], prepare, tokenizer, as_json)
        return
    if folder is None:
        raise InputError("--out: name the folder that what is trained goes to")
    from treemem.training.autoencode import AutoEncodeConfig, AutoEncodeReport, train_autoencoder

    if samples:
        report = AutoEncodeReport.load(folder)
    else:
        try:
            with progress_of(as_json) as progress:
                report = train_autoencoder(
                    prose or [],
                    folder,
                    shape={"width": width, "vectors": vectors, "tokens": tokens},
                    config=AutoEncodeConfig(minutes=minutes, batch=batch, rate=rate, seed=seed),
                    held_out=held_out or [],
                    tokenizer=tokenizer,
                    device=device,
                    resume=resume,
                    progress=progress,
                )
        except KeyboardInterrupt:
            err.print("The same command with --resume goes on from here.")
            raise
    if as_json:
        print_json(report.to_json())
        return
    if not samples:
        _print_report(report)
    for sample in report.samples:
        _print_sample(sample)


def _prepare(prose: list[str], path: Path, tokenizer: str, as_json: bool) -> None:
    from treemem.training.prose import SUFFIX, load_tokenizer, read_tokens, save_tokens

    if not prose:
        raise InputError("no prose: name files or folders to prepare")
    if not path.name.endswith(SUFFIX):
        raise InputError(f"--prepare {path}: its name must end in {SUFFIX}")
    loaded = load_tokenizer(tokenizer)
    with progress_of(as_json) as progress:
        tokens = read_tokens(prose, loaded, progress)
        save_tokens(tokens, loaded, path)
    if as_json:
        print_json({"path": str(path), "documents": len(tokens.starts), "tokens": len(tokens.ids)})
    else:
        out.print(
            f"{escape(str(path))}: {len(tokens.ids):,} tokens of {len(tokens.starts):,} documents", soft_wrap=True
        )


def _print_report(report: AutoEncodeReport) -> None:
    shape = report.shape
    out.print(
        f"{shape['tokens']} tokens into {shape['vectors']} x {shape['width']} numbers: {report.examples:,} texts in "
        f"{report.seconds:,.0f} s on {escape(report.device)}; {report.held_out:,} held-out texts, "
        f"{report.rounds} round(s) of decoding:",
        soft_wrap=True,
    )
    table = Table(box=None, show_header=False)
    for name, value in report.figures.items():
        table.add_row(name, f"{value:.1%}")
    out.print(table)
    out.print(f"[bold]{escape(report.folder)}[/]: weights, encoder/, metrics.json, README.md", soft_wrap=True)
    if not report.drawn:
        out.print("The curve was not drawn: that needs matplotlib (pip install matplotlib).", style="yellow")


def _print_sample(sample: Sample) -> None:
    """The original and what was rebuilt, one below the other, with what differs in colours and brackets."""
    out.rule(style="dim")
    original, rebuilt = sample.marked()
    for title, tokens, style in (("original", original, "green"), ("rebuilt", rebuilt, "bold red")):
        line = Text(f"{title:<9}", style="dim")
        for token, same in tokens:
            piece = token.removeprefix("##") if token.startswith("##") else f" {token}"
            line.append(piece if same else f"[{piece.strip()}]" if token.startswith("##") else f" [{piece.strip()}]",
                        style="" if same else style)  # fmt: skip
        out.print(line, soft_wrap=True)
