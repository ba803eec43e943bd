"""The command line: each command parses, calls the library once and formats what comes back."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from treemem import __version__
from treemem.errors import InputError, TreememError, UnreadableInput
from treemem.types import Answer, DocumentRef, Progress, SearchResult, Span, no_progress

if TYPE_CHECKING:
    from treemem.hierarchy.readers import ReadReport
    from treemem.training import TrainReport

app = typer.Typer(
    name="treemem",
    help="A memory for language models: documents as a tree of embeddings, searched from the top.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)
_debug = False

MemoryPath = Annotated[str, typer.Argument(metavar="MEMORY", help="Folder of the memory, or s3://bucket/prefix.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, nothing else.")]
ModeOption = Annotated[
    str, typer.Option("--mode", help="hybrid, deep, walk, exact, bm25, exact+bm25 or auto: see the documentation.")
]
Beam = Annotated[int, typer.Option(help="Nodes that a walk keeps per level.")]
WithDecoder = Annotated[bool, typer.Option("--decoder/--no-decoder", help="Let a trained decoder rank the best anew.")]
Within = Annotated[list[str] | None, typer.Option("--within", metavar="ID", help="Search in this document only.")]
Where = Annotated[
    str | None,
    typer.Option(
        "--where", metavar="CONDITION", help="Documents whose metadata meet it: 'kind == \"mail\" and year > 2020'."
    ),
]
At = Annotated[str | None, typer.Option("--at", metavar="REF", help="A branch, tag, snapshot or time (ISO 8601).")]
Llm = Annotated[
    str, typer.Option(help="Language model: smollm2, none, a folder, a transformers id, or a name at --llm-url.")
]
LlmUrl = Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint, such as http://localhost:8080/v1.")]
ReaderName = Annotated[
    str,
    typer.Option(
        "--reader",
        help="What the model is given of the memory: text, vectors, both; a folder; vectors@FOLDER; none; auto.",
    ),
]
EncoderName = Annotated[str, typer.Option("--encoder", help="minilm, a folder, or a sentence-transformers id.")]


def main() -> None:
    """Run the command line; errors are one line, and Ctrl-C says how to go on."""
    # Libraries report on their own; what users must know, treemem says.
    os.environ.setdefault("ICECHUNK_LOG", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal or a pipe does not know is no error
            stream.reconfigure(errors="replace")
    try:
        code = app(_arguments(), standalone_mode=False)
        sys.stdout.flush()  # here, where a closed pipe is still noticed
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except TreememError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            "interrupted; run the same command again: what was committed stays, and long work goes on from there", 130
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError:
        _fail("out of memory; close other programs or build from fewer documents at once", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # wrong use of the command line
            if not error.format_message():  # no command at all: the help is printed
                sys.exit(2)
            _fail(f"{error.format_message()} (treemem --help lists the commands)", 2)
        first = next(iter(str(error).strip().splitlines()), "no message")
        _fail(f"unexpected {type(error).__name__}: {first}; --debug shows where", 70)


def _arguments() -> list[str]:
    """The command line, with a --debug that was added at the end of a failed one put in front, where it belongs."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    moved = [argument for argument in given[:end] if argument == "--debug"]
    return [*moved, *(argument for argument in given[:end] if argument != "--debug"), *given[end:]]


def _fail(message: str, code: int) -> None:
    if _debug:
        traceback.print_exc()
    err.print(f"[bold red]treemem:[/] {shown(message)}", soft_wrap=True)
    sys.exit(code)


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _harmless(text: str) -> str:
    """Text of documents and models for people: without control characters, which would steer the terminal."""
    return _CONTROLS.sub("\ufffd", text)


def shown(text: str) -> str:
    """The same on one line, and with its brackets taken as they are."""
    return escape(" ".join(_harmless(text).splitlines()))


def _version(asked: bool) -> bool:
    if asked:
        print(__version__)
        raise typer.Exit
    return asked


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


# ---- progress


@contextmanager
def progress_of(quiet: bool = False) -> Iterator[Progress]:
    """A bar per stage on standard error: what is done, the rate, the time left; plain lines where no one looks."""
    if quiet:
        yield no_progress
        return
    from treemem.progress import bars

    with bars(err) as report:
        yield report


def report_unreadable(report: ReadReport) -> None:
    """Say what could not be read."""
    for line in report.summary():
        err.print(shown(line), soft_wrap=True, style="yellow" if line.startswith("  ") else None)


# ---- commands


@app.command()
def build(
    memory: MemoryPath,
    paths: Annotated[list[str], typer.Argument(metavar="PATH…", help="Files, folders or globs to read.")],
    encoder: EncoderName = "minilm",
    hierarchy: Annotated[
        str, typer.Option(help="Trained weights to grow the tree with: a folder (see treemem train), default or none.")
    ] = "default",
    fanout: Annotated[int, typer.Option(help="Most children of a node.")] = 32,
    spill: Annotated[int, typer.Option(help="In how many nodes a chunk stands.")] = 2,
    chunk_tokens: Annotated[int, typer.Option(help="Most encoder tokens in a chunk.")] = 126,
    seed: Annotated[int, typer.Option(help="Seed of the clustering.")] = 0,
    language: Annotated[str, typer.Option(help="Language of the documents (ISO 639-1).")] = "en",
    strict: Annotated[bool, typer.Option("--strict", help="Fail if anything cannot be read.")] = False,
    store_reader_vectors: Annotated[
        bool, typer.Option("--store-reader-vectors", help="Keep what ask --reader vectors reads of each chunk.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build a memory from documents; an interrupted build continues where it stopped."""
    from treemem import Memory
    from treemem.config import TreeConfig
    from treemem.hierarchy.readers import ReadReport

    config = TreeConfig(chunk_tokens=chunk_tokens, fanout=fanout, spill=spill, seed=seed, language=language)
    report = ReadReport()
    try:
        with progress_of(as_json) as progress:
            built = Memory.build(
                paths,
                memory,
                encoder=encoder,
                hierarchy=hierarchy,
                config=config,
                report=report,
                strict=strict,
                store_reader_vectors=store_reader_vectors,
                progress=progress,
            )
    except UnreadableInput:
        report_unreadable(report)
        raise
    info = built.info()
    if as_json:
        print_json({"memory": asdict(info), "read": report.to_json()})
        return
    report_unreadable(report)
    out.print(
        f"[bold]{escape(str(memory))}[/]: {info.documents:,} documents, {info.chunks:,} chunks, "
        f"{len(info.levels)} levels ({' / '.join(f'{n:,}' for n in info.levels)})",
        soft_wrap=True,
    )
    out.print(
        f'Next: treemem search {escape(str(memory))} "…"   or   treemem ask {escape(str(memory))} "…"', soft_wrap=True
    )


@app.command()
def search(
    memory: MemoryPath,
    query: Annotated[str, typer.Argument(help="What to look for; - reads it from standard input.")],
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    mode: ModeOption = "hybrid",
    beam: Beam = 32,
    decoder: WithDecoder = True,
    within: Within = None,
    where: Where = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Find the chunks that answer a query."""
    from treemem import Memory
    from treemem.config import SearchConfig

    config = SearchConfig(mode=mode, k=k, beam=beam, decoder=decoder)  # type: ignore[arg-type]
    query = read_query(query)
    with progress_of(as_json) as progress:
        opened = Memory.open(memory, at=at, progress=progress)
    result = opened.search(query, config=config, within=within, where=where)
    if as_json:
        print_json(result.to_json())
    else:
        _print_hits(result, opened.info().chunks)


@app.command()
def ask(
    memory: MemoryPath,
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    llm: Llm = "smollm2",
    llm_url: LlmUrl = None,
    mode: ModeOption = "deep",
    beam: Beam = 32,
    within: Within = None,
    where: Where = None,
    at: At = None,
    reader: ReaderName = "auto",
    max_tokens: Annotated[int | None, typer.Option(help="Longest reply, in tokens.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Least score of the best hit, in the scores of --mode; below it the memory does not hold the answer. "
            "Default: 1.7 in mode deep with the packaged weights or an untrained tree of the encoder minilm; else none."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question from the memory, with citations."""
    from treemem import Memory

    question = read_query(question)
    with progress_of(as_json) as progress:
        opened = Memory.open(memory, at=at, progress=progress)
        model = opened.language_model(llm, url=llm_url, progress=progress)
    options = {"mode": mode, "beam": beam, "within": within, "where": where, "max_tokens": max_tokens}
    ask_and_print(opened, question, model, as_json, threshold=threshold, reader=reader, **options)


@app.command()
def info(memory: MemoryPath, at: At = None, as_json: AsJson = False) -> None:
    """Tell what a memory holds."""
    from treemem import Memory

    with progress_of(as_json) as progress:
        found = Memory.open(memory, at=at, progress=progress).info()
    if as_json:
        print_json({**asdict(found), "advice": found.advice})
        return
    table = Table(show_header=False, box=None)
    table.add_row("documents", f"{found.documents:,}" + (f", {found.masked:,} of them masked" if found.masked else ""))
    table.add_row("chunks", f"{found.chunks:,}")
    table.add_row("levels", " / ".join(f"{n:,}" for n in found.levels) + "  (top first)")
    table.add_row("encoder", f"{shown(found.encoder)}, {found.dimension} dimensions")
    table.add_row("tree", f"fanout {found.config.fanout}, spill {found.config.spill}, seed {found.config.seed}")
    table.add_row("trained", shown(found.trained or "no"))
    if found.reader_vectors:
        table.add_row("reader vectors", "kept in the store")
    table.add_row(
        "on disk", f"{found.store_bytes / 1e6:,.1f} MB store, {found.image_bytes / 1e6:,.1f} MB serving image"
    )
    place = "of the past" if found.branch is None else f"of branch {shown(found.branch)}"
    table.add_row("snapshot", f"{found.snapshot} {place}, format {found.format}")
    out.print(table)
    if found.advice:
        out.print(shown(found.advice), style="yellow", soft_wrap=True)


@app.command(name="eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A data set in BEIR layout.")],
    memory: Annotated[Path | None, typer.Option(help="A memory of its corpus; built if none is named.")] = None,
    split: Annotated[str | None, typer.Option(help="Only queries of this split, or several: dev,test.")] = None,
    modes: Annotated[str, typer.Option(help="Modes to compare, separated by commas.")] = "walk,exact,bm25,hybrid",
    max_queries: Annotated[int | None, typer.Option(help="At most so many queries, drawn at random.")] = None,
    answers: Annotated[bool, typer.Option("--answers", help="Ask the language model too.")] = False,
    readers: Annotated[
        bool, typer.Option("--readers", help="With --answers: what the model says from nothing, vectors, text, both.")
    ] = False,
    reader: ReaderName = "auto",
    llm: Llm = "smollm2",
    llm_url: LlmUrl = None,
    within_document: Annotated[
        bool, typer.Option("--within-document", help="Search inside the document that a query is about.")
    ] = False,
    beam: Beam = 32,
    decoder: WithDecoder = True,
    encoder: EncoderName = "minilm",
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure retrieval, and answers, on a data set."""
    from treemem.evaluation import print_report, run

    with progress_of(as_json) as progress:
        report = run(
            folder,
            memory_path=memory,
            split=split,
            modes=[mode.strip() for mode in modes.split(",") if mode.strip()],
            max_queries=max_queries,
            answers=answers,
            readers=readers,
            reader=reader,
            llm=llm,
            llm_url=llm_url,
            within_document=within_document,
            beam=beam,
            decoder=decoder,
            encoder=encoder,
            seed=seed,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report, out)


@app.command()
def train(
    memory: MemoryPath,
    queries: Annotated[
        Path | None, typer.Option(help='Questions: lines {"query": …, "document": ID, "start": 0, "end": 9}.')
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A data set in BEIR layout: trains on its split train.")
    ] = None,
    sources: Annotated[
        str, typer.Option(help="Also questions from: headings, written, distilled. Without any, headings,distilled.")
    ] = "",
    levels: Annotated[str | None, typer.Option(help="Only these levels, such as 1,2 (1 = chunks, 0 = tokens).")] = None,
    tune_encoder: Annotated[
        str, typer.Option(help="First fine-tune encoder 1 with levels 1 and 2: none, lora or full (wants a GPU).")
    ] = "none",
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop training after these.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Train in so many processes, one for each device.")] = 1,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the hierarchy here, for build --hierarchy.")
    ] = None,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Log to Weights and Biases (WANDB_MODE=offline works).")
    ] = False,
    llm: Llm = "smollm2",
    llm_url: LlmUrl = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a memory's tree; it changes only if held-out questions are found better than before."""
    from treemem import Memory
    from treemem.evaluation.questions import training_questions
    from treemem.training import TrainConfig, read_pairs, train_memory

    if queries is not None and dataset is not None:
        raise InputError("--queries and --dataset: give one of them")
    chosen = [source.strip() for source in sources.split(",") if source.strip()]
    with progress_of(as_json) as progress:
        opened = Memory.open(memory, progress=progress)
        questions, held_out = None, None
        if queries is not None:
            questions = read_pairs(queries)
        elif dataset is not None:
            questions, held_out = training_questions(dataset, progress)
        report = train_memory(
            opened,
            questions,
            held_out=held_out,
            sources=chosen,
            model=opened.language_model(llm, url=llm_url, progress=progress) if "written" in chosen else None,
            levels=None if levels is None else _whole_numbers("--levels", levels),
            config=TrainConfig(seed=seed, tune_encoder=tune_encoder),
            minutes=minutes,
            device=device,
            wandb=wandb,
            save=save,
            trainer_options={"devices": devices, "strategy": "ddp"} if devices > 1 else None,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
    else:
        _print_training(report)


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: give whole numbers separated by commas, such as 1,2") from None


QUESTIONS = (
    "How do I merge several sorted inputs into one sorted stream?",
    "How can I remove the common indentation from the lines of a text?",
    "How can I find the median of a list of numbers?",
)


@app.command()
def demo(
    memory: Annotated[Path, typer.Argument(metavar="MEMORY", help="Where the demonstration's memory lies.")] = Path(
        "demo.memory"
    ),
    llm: Llm = "smollm2",
    llm_url: LlmUrl = None,
) -> None:
    """Build a memory of Python's own documentation and ask it three questions."""
    from treemem import Memory
    from treemem.hierarchy.readers import ReadReport, standard_library
    from treemem.storage.store import Store

    with progress_of() as progress:
        if Store.exists(memory) and Store.open(memory).finished:
            opened = Memory.open(memory, progress=progress)
            err.print(f"Using {escape(str(memory))} again.")
        else:
            err.print("Reading the docstrings of this Python's standard library …")
            report = ReadReport()
            opened = Memory.build([str(p) for p in standard_library()], memory, report=report, progress=progress)
        found = opened.info()
        err.print(
            f"[bold]{escape(str(memory))}[/]: {found.documents:,} documents, {found.chunks:,} chunks, "
            f"levels {' / '.join(f'{n:,}' for n in found.levels)}"
        )
        model = opened.language_model(llm, url=llm_url, progress=progress)
    for question in QUESTIONS:
        out.rule(style="dim")
        out.print(f"[bold]{escape(question)}[/]")
        ask_and_print(opened, question, model, False)
    out.rule(style="dim")
    name = escape(str(memory))
    out.print("Go on:", style="bold")
    out.print(
        f'  treemem search {name} "read a zip file"        the chunks themselves, with their paths', soft_wrap=True
    )
    out.print(f'  treemem ask {name} "…"                          your own question', soft_wrap=True)
    out.print("  treemem build my.memory ~/notes                      a memory of your own documents", soft_wrap=True)


# ---- printing


def _print_training(report: TrainReport) -> None:
    told = ", ".join(f"{count:,} {source}" for source, count in report.questions.items())
    out.print(f"Trained on {told} questions in {report.seconds:,.0f} s; {report.held_out:,} held-out questions decide:")
    table = Table(box=None)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, after in report.after.items():
        before = report.before.get(name)
        table.add_row(name, "" if before is None else f"{before:.3f}", f"{after:.3f}")
    out.print(table)
    for stage, shares in report.adopted.items():
        kept = ", ".join(
            f"level {level} " + ("refused" if share == 0 else "adopted" if share == 1 else f"adopted by {share:.0%}")
            for level, share in shares.items()
        )
        out.print(f"Stage {stage}: {kept}", style="dim")
    if not report.complete:
        out.print("The time was over before the last step; --minutes gives more.", style="yellow")
    if report.left_out:
        out.print(f"{report.left_out:,} questions are about nothing in this memory and were left out.", style="yellow")
    if report.improved:
        out.print(f"Adopted: snapshot {report.snapshot}. Logs: {escape(report.logs)}", soft_wrap=True)
    else:
        out.print(
            f"Not adopted: held-out questions are found no better than before, so the memory keeps its weights. "
            f"Logs: {escape(report.logs)}",
            soft_wrap=True,
        )


def read_query(query: str) -> str:
    """A query as it was given, or standard input for `-`."""
    return sys.stdin.read() if query == "-" else query


def print_json(value: Any) -> None:
    """Print one JSON document."""
    # JSON lets these stand as they are in its strings; a terminal does not.
    text = json.dumps(value, ensure_ascii=False, default=str)
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def _beginning(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rstrip() + " …"


def _place(document: DocumentRef, span: Span) -> str:
    """A document's title, where it has one, its id, and the characters."""
    title = f"[bold]{shown(document.title)}[/] " if document.title not in ("", document.id) else ""
    return f"{title}[dim]{shown(document.id)}:{span[0]}-{span[1]}[/]"


def _print_hits(result: SearchResult, chunks: int) -> None:
    if not result.hits:
        out.print("No hits: the query is empty." if not result.query.strip() else "No hits.")
        return
    for number, hit in enumerate(result.hits, 1):
        where = " > ".join(f"L{step.level}:{step.node} {step.score:.2f}" for step in hit.path)
        out.print(
            f"[bold cyan]{number:>2}[/] [bold]{hit.score:.3f}[/]  {_place(hit.document, hit.span)}  [dim]{where}[/]",
            soft_wrap=True,
        )
        text = " ".join(hit.text.split())
        out.print("    " + shown(_beginning(text, 240)), soft_wrap=True)
    out.print(f"[dim]{result.scored:,} vectors scored in a memory of {chunks:,} chunks, {result.ms:.1f} ms[/]")


def ask_and_print(opened: Any, question: str, model: Any, as_json: bool, **options: Any) -> Answer:
    """Ask, showing the reply as it comes, then what it cites."""
    streamed: list[str] = []

    def show(piece: str) -> None:
        streamed.append(piece)
        out.print(_harmless(piece), end="", markup=False, highlight=False, soft_wrap=True)

    live = not as_json and out.is_terminal
    answer: Answer = opened.ask(question, llm=model, on_text=show if live else None, **options)
    if as_json:
        print_json(answer.to_json())
        return answer
    if streamed:
        out.print()
        if answer.extractive and answer.found:
            out.print("[yellow]The passages do not bear this reply; what they say:[/]")
    if not streamed or "".join(streamed).strip() != answer.text:
        out.print(escape(_harmless(answer.text)), soft_wrap=True)
    for citation in answer.citations:
        quote = " ".join(citation.text.split())
        out.print(
            f"  [cyan]\\[{citation.number}][/] {_place(citation.document, citation.span)} "
            f"{shown(_beginning(quote, 160))}",
            soft_wrap=True,
        )
    # The first token is a part of generating.
    out.print(f"[dim]{sum(s for step, s in answer.timings.items() if step != 'first_token'):.1f} s[/]")
    return answer


from treemem import cli_autoencode, cli_edit, cli_reader  # noqa: E402, F401 - their commands belong to `app`

if __name__ == "__main__":
    main()
