"""The commands about a language model that reads a memory: teaching it, and seeing where it looked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from treemem.cli import (
    AsJson,
    At,
    MemoryPath,
    ModeOption,
    ReaderName,
    app,
    ask_and_print,
    out,
    print_json,
    progress_of,
    read_query,
    shown,
)
from treemem.errors import InputError


@app.command(name="train-reader")
def train_reader(
    memory: MemoryPath,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A data set in BEIR layout, with answers; without a split train, all but held-out."
        ),
    ] = None,
    examples: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Train on these gathered examples too.")
    ] = None,
    save_examples: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the gathered examples here and stop, to train elsewhere.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="With --save-examples: gather the questions of this split, not those of train.")
    ] = None,
    save: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the reader.")] = Path("my.reader"),
    llm: Annotated[str, typer.Option(help="Language model: smollm2, a folder, or a transformers id.")] = "smollm2",
    start: Annotated[
        str, typer.Option(metavar="READER", help="Go on with this reader: default (where it fits), a folder, or none.")
    ] = "default",
    minutes: Annotated[float, typer.Option(min=0.1, help="Train so long.")] = 25,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Teach it to answer from passages alone; vectors take a GPU.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    judges: Annotated[int, typer.Option(min=1, help="At most so many held-out questions.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Teach a language model to answer from a memory's passages and embeddings; an interrupted run goes on."""
    from dataclasses import asdict, replace

    from treemem import Memory
    from treemem.evaluation.dataset import load_set
    from treemem.evaluation.readers import answered, answered_questions, gate_table, judge
    from treemem.evaluation.retrieval import check_memory
    from treemem.hierarchy.generate import LocalModel, load_language_model
    from treemem.hierarchy.reader import DEFAULT_READER, NO_READER, ReadingModel, load_reader, save_reader
    from treemem.training.examples import AnsweredQuestion, Examples, gather_examples, text_examples
    from treemem.training.lightning import accelerator
    from treemem.training.reader import ReaderTrainer, ReaderTraining, check_folder

    # Everything that can be wrong with what was given is found before the first search.
    begun = None if start == NO_READER else load_reader(start)
    accelerator(device)
    config = ReaderTraining(minutes=minutes, seed=seed)
    if text_only:
        config = replace(config, shares=(1.0, 0.0, 0.0))
    if split is not None and (save_examples is None or dataset is None):
        raise InputError("--split: it says which questions are gathered; add --dataset and --save-examples")
    with progress_of(as_json) as progress:

        def loaded() -> LocalModel:
            model = load_language_model(llm, device=device, notify=lambda stage: progress(stage, 0, None))
            if not isinstance(model, LocalModel):
                raise InputError(f"--llm {llm}: a reader adapts a model on this machine; name one")
            return model

        opened = Memory.open(memory, progress=progress)
        given = [Examples.load(folder) for folder in examples or []]
        questions: list[AnsweredQuestion] = []
        held_out = None
        if dataset is not None:
            whole = load_set(dataset, split, progress)
            check_memory(opened, whole)
            questions, held_out = answered_questions(whole) if split is None else (answered(whole.queries), None)
        if save_examples is None:
            check_folder(save, begun)
            model = loaded()
            if begun is not None and start == DEFAULT_READER and not begun.fits(opened.encoder.info, model):
                begun = None
            if begun is not None:
                begun.check(opened.encoder.info, model)
        gathered = gather_examples(opened, questions, progress=progress)
        if not questions:
            documents = (opened.document(name) for name in opened.ids())
            limit, language = opened.config.chunk_tokens, opened.config.language
            gathered = text_examples(documents, opened.encoder, limit, language, most=20_000)
        if save_examples is not None:
            gathered.save(save_examples)
            counts = {"questions": len(gathered.rows), "chunks": len(gathered.texts)}
            if as_json:
                print_json({"examples": str(save_examples), **counts})
            else:
                told = ", ".join(f"{count:,} {what}" for what, count in counts.items())
                out.print(f"{shown(str(save_examples))}: {told}", soft_wrap=True)
            return
        sets = [gathered, *given]
        trainer = ReaderTrainer(
            model, opened.encoder, sets, save, config=config, start=begun, device=device, progress=progress
        )
        reader = trainer.fit()
        gates = None
        if held_out is not None:
            asked = gather_examples(opened, answered(held_out.sample(judges, seed).queries), progress=progress)
            asked.read(opened.encoder, progress)
            gates = judge(ReadingModel(loaded(), reader), asked, progress=progress)
            reader.config = replace(reader.config, best=gates.best)
        reader.card = {
            "summary": f"Trained for {minutes:g} minutes on {sum(len(own.rows) for own in sets):,} questions.",
            "data": {"memory": Path(memory).name, "chunks": sum(len(own.texts) for own in sets)},
            "settings": asdict(trainer.config),
            "figures": {} if gates is None else {name: asdict(own) for name, own in gates.figures.items()},
        }
        save_reader(reader, save)
    if as_json:
        print_json({"reader": str(save), "gates": None if gates is None else gates.to_json()})
        return
    if gates is not None:
        out.print(gate_table(gates))
    elif dataset is not None:
        out.print(f"{shown(str(dataset))} has no split dev, validation or val: the reader was not judged.")
    told = f'{shown(str(save))}: ask with  treemem ask {shown(memory)} "…" --reader {shown(str(save))}'
    out.print(told, soft_wrap=True)


@app.command()
def attribute(
    memory: MemoryPath,
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    llm: Annotated[str, typer.Option(help="Language model: smollm2, a folder, or a transformers id.")] = "smollm2",
    reader: ReaderName = "auto",
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Gradient times input too: a pass backward for each token.")
    ] = False,
    each: Annotated[
        bool, typer.Option("--each", help="A line for every vector, not a column for every level.")
    ] = False,
    mode: ModeOption = "deep",
    at: At = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest reply, in tokens.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Least score of the best hit, as of ask.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask, and show which passages and levels the language model looked at while it wrote each token."""
    from treemem import Memory

    question = read_query(question)
    with progress_of(as_json) as progress:
        opened = Memory.open(memory, at=at, progress=progress)
        model = opened.language_model(llm, progress=progress)
    answer = ask_and_print(
        opened,
        question,
        model,
        as_json,
        mode=mode,
        max_tokens=max_tokens,
        threshold=threshold,
        reader=reader,
        attribute="gradients" if gradients else "attention",
    )
    if as_json:
        return
    found = answer.attribution
    if found is None or not found.tokens:
        out.print("The language model wrote nothing.")
        return
    if answer.extractive:
        out.print(f"The language model wrote: {shown(found.reply)}", soft_wrap=True)
    for title, by_gradients in (("attention", False), *([("gradient x input", True)] if gradients else [])):
        groups = found.grouped(gradients=by_gradients, each=each)
        title = f"{title}, percent of each token"
        for table in _by_source(title, found.tokens, groups) if each else [_by_token(title, found.tokens, groups)]:
            out.print(table)


def _by_token(title: str, tokens: Sequence[str], groups: Mapping[str, Sequence[float]]) -> Table:
    """Shares: a line for each token."""
    table = Table("", title=title, title_justify="left", box=None)
    for name in groups:
        table.add_column(escape(name), justify="right")
    for row, token in enumerate(tokens):
        table.add_row(shown(token), *(f"{100 * own[row]:.0f}" for own in groups.values()))
    table.add_section()
    table.add_row("mean", *(f"{100 * sum(own) / len(own):.1f}" for own in groups.values()))
    return table


def _by_source(title: str, tokens: Sequence[str], groups: Mapping[str, Sequence[float]]) -> Iterator[Table]:
    """Shares: a line for each source, as many tokens to a table as stand side by side."""
    names = [shown(token) for token in tokens]
    first, left = 0, out.width - max(map(len, groups))
    while first < len(names):
        width, last = left - 8, first  # the mean takes 8
        while last < len(names) and (last == first or width >= max(3, len(names[last])) + 2):
            width -= max(3, len(names[last])) + 2
            last += 1
        table = Table("", title=title, title_justify="left", box=None)
        for name in names[first:last]:
            table.add_column(name, justify="right")
        table.add_column("mean", justify="right")
        for name, own in groups.items():
            shares = (f"{100 * share:.0f}" for share in own[first:last])
            table.add_row(escape(name), *shares, f"{100 * sum(own) / len(own):.1f}")
        yield table
        first = last
