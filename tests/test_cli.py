"""The command line as people use it: what is printed where, exit codes, errors of one line, pipes, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rich.console
from tests.hierarchy.test_ask import GROUNDED, ChosenReplies

from treemem import __version__, cli
from treemem.config import FORMAT_VERSION, Mode, SearchConfig
from treemem.errors import ModelError
from treemem.hierarchy import memory as memory_module
from treemem.hierarchy import readers
from treemem.hierarchy.embed import Encoder, load_encoder
from treemem.hierarchy.memory import Memory
from treemem.types import Answer, Context

ROOT = Path(__file__).resolve().parent.parent
ESCAPE = "\x1b["


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What went wrong: exactly one line on standard error."""
        lines = [line for line in self.err.splitlines() if line.startswith("treemem: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("treemem: ")


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], minilm: Encoder) -> Run:
    """Call `main` as the installed command does, with the encoder that the tests have loaded already."""

    def loaded(name: str = "minilm") -> Encoder:
        return minilm if name == "minilm" else load_encoder(name)

    def call(*arguments: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["treemem", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        monkeypatch.setattr(cli, "_debug", False)
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capsys.readouterr())

    monkeypatch.setattr(memory_module, "load_encoder", loaded)
    return call


def shell(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `$treemem` is the real command in a process of its own."""
    known = {**os.environ, "treemem": f"{sys.executable} -m treemem", "PYTHONPATH": str(ROOT / "src"), **environment}
    line = ["bash", "-c", command, "bash", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=known, timeout=120, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents in several formats, and what cannot be read."""
    docs = tmp_path / "docs"
    (docs / "deep").mkdir(parents=True)
    (docs / "bees.txt").write_text("Smoke calms a hive because the bees fill themselves with honey.")
    (docs / "bread.md").write_text("# Bread\n\nSteam in the oven makes a crust crackle.")
    (docs / "deep" / "page.html").write_text("<title>Chess</title><p>Zugzwang means that every move is bad.</p>")
    (docs / "lines.jsonl").write_text(
        '{"id": "ice", "title": "Ice", "text": "Ice cores hold bubbles of air."}\n'
        '{"id": "bad"}\n'
        '{"id": "[bold]odd[/]", "title": "[red]Odd[/]", "text": "Brackets [bold]stay[/bold] as they are."}\n'
    )
    (docs / "code.py").write_text('"""Merge sorted inputs."""\n')
    (docs / "empty.txt").write_bytes(b"")
    (docs / "photo.png").write_bytes(b"\x89PNG")
    return docs


# ---- help and wrong use


def test_help_and_version_are_quick_and_load_nothing() -> None:
    code = (
        "import sys; sys.argv = ['treemem', '--help']\ntry:\n    from treemem.cli import main; main()\nfinally:\n"
        + ("    print('LOADED', [m for m in ('torch', 'numba', 'zarr', 'transformers') if m in sys.modules])")
    )
    done = shell(f'{sys.executable} -c "$1"', code)
    assert "LOADED []" in done.stdout
    assert "build" in done.stdout
    assert shell("$treemem --version").stdout == f"{__version__}\n"


@pytest.mark.parametrize("command", ["build", "search", "ask", "info", "eval", "train", "demo"])
def test_every_command_has_help(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert "Usage" in done.out
    assert done.err == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope"], "No such command 'nope'"),
        (["search"], "Missing argument"),
        (["search", "m"], "Missing argument"),
        (["search", "m", "q", "--nope"], "No such option"),
        (["search", "m", "q", "-k", "many"], "Invalid value for '-k'"),
        (["build", "m"], "Missing argument"),
    ],
)
def test_wrong_use_is_exit_code_2(run: Run, arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert told in done.error
    assert "treemem --help" in done.error
    assert done.out == ""


def test_no_command_prints_the_help(run: Run) -> None:
    done = run()
    assert (done.code, done.err) == (2, "")
    assert "search" in done.out


# ---- errors


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["search", "{tmp}/no\nsuch", "q"], "{tmp}/no such: there is nothing there; make one with: treemem build"),
        (["ask", "{small}", "q", "--llm", "none", "--max-tokens", "0"], "max_tokens = 0: it must be at least 1"),
        (["search", "{tmp}/missing", "q"], "{tmp}/missing: there is nothing there; make one with: treemem build"),
        (["info", "{tmp}"], "{tmp}: this is no memory"),
        (["ask", "{tmp}", "q", "--llm", "none"], "{tmp}: this is no memory"),
        (["search", "{small}", "q", "-k", "0"], "k = 0: it must be a whole number, at least 1"),
        (["search", "{small}", "q", "--beam", "0"], "beam = 0: it must be a whole number from 1 to 4096"),
        (["search", "{small}", "q", "--mode", "best"], "mode = 'best': it must be one of deep, hybrid"),
        (["search", "{small}", "q", "--within", "nope"], "document 'nope' is not in this memory"),
        (["ask", "{small}", "q", "--llm", "no-such-model"], "no-such-model"),
        (["ask", "{small}", "q", "--llm", "x", "--llm-url", "ftp://x"], "ftp://x"),
        (["build", "{tmp}/m", "{tmp}/missing"], "{tmp}/missing: no such file or folder"),
        (["build", "{tmp}/m", "{tmp}/*.txt"], "{tmp}/*.txt: no file or folder matches"),
        (["build", "{tmp}/m", "{tmp}/void"], "{tmp}/void: nothing readable there"),
        (["build", "{tmp}/m", "{docs}", "--encoder", "no-such-model"], "encoder 'no-such-model': it cannot be loaded"),
        (["build", "{small}", "{docs}"], "{small}: a memory is there already; choose another path"),
        (["build", "{docs}", "{docs}"], "{docs}: there is something else at this path"),
        (["build", "{tmp}/m", "{docs}", "--fanout", "1"], "fanout = 1: it must be a whole number from 2 to 1024"),
        (["build", "{tmp}/m", "{docs}", "--language", "english"], "language = 'english'"),
    ],
)
def test_errors_are_one_line(
    run: Run, tmp_path: Path, folder: Path, small_memory_path: Path, arguments: list[str], told: str
) -> None:
    (tmp_path / "void").mkdir()
    places = {"tmp": tmp_path, "small": small_memory_path, "docs": folder}
    done = run(*[argument.format(**places) for argument in arguments])
    assert done.code == 1
    assert told.format(**places) in done.error
    assert done.out == ""
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("place", ["front", "end"])
def test_debug_shows_the_trace(run: Run, tmp_path: Path, place: str) -> None:
    arguments: list[object] = ["search", tmp_path / "missing", "q"]
    done = run(*(["--debug", *arguments] if place == "front" else [*arguments, "--debug"]))
    assert done.code == 1
    assert "Traceback" in done.err
    assert "NotAMemory" in done.err
    assert done.err.splitlines()[-1].startswith("treemem: ")


def test_debug_after_two_dashes_is_a_query(run: Run, small_memory_path: Path) -> None:
    done = run("search", small_memory_path, "--mode", "bm25", "--", "--debug")
    assert (done.code, done.out) == (0, "No hits.\n")


def test_what_nobody_expected_is_one_line_too(
    run: Run, small_memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(Memory, "search", broken)
    done = run("search", small_memory_path, "q")
    assert done.code == 70
    assert "RuntimeError" in done.error
    assert "first line" in done.error
    assert "second line" not in done.err
    monkeypatch.setattr(Memory, "search", lambda *_, **__: [0] * 10**16)
    assert "out of memory" in run("search", small_memory_path, "q").error


@pytest.mark.parametrize("command", ["build", "search"])
def test_ctrl_c_says_how_to_go_on(
    run: Run, tmp_path: Path, folder: Path, small_memory_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Memory, command, interrupted)
    done = run(*(["build", tmp_path / "m", folder] if command == "build" else ["search", small_memory_path, "q"]))
    assert done.code == 130
    assert "interrupted" in done.error


def test_an_interrupted_build_continues(
    run: Run, tmp_path: Path, folder: Path, minilm: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = minilm.encode
    monkeypatch.setattr("treemem.hierarchy.build.COMMIT_CHUNKS", 2)
    calls: list[int] = []

    def interrupted(texts: list[str], **options: Any) -> Any:
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(texts, **options)

    monkeypatch.setattr(minilm, "encode", interrupted)
    assert run("build", tmp_path / "m", folder).code == 130
    done = run("search", tmp_path / "m", "bees")
    assert done.code == 1
    assert "its build was interrupted; run the same build again, it continues" in done.error
    assert run("build", tmp_path / "m", folder, "--fanout", "8").error.startswith(f"{tmp_path / 'm'}: its interrupted")
    done = run("build", tmp_path / "m", folder)
    assert done.code == 0
    assert sum(calls) == 6 + 2  # six chunks, of which the two of the interrupted batch were tried twice
    assert run("search", tmp_path / "m", "Why does smoke calm bees?", "-k", "1").code == 0


# ---- build, search, ask, info


def test_build_search_ask_info(run: Run, tmp_path: Path, folder: Path) -> None:
    memory = tmp_path / "my [x].memory"  # brackets are no markup
    done = run("build", memory, folder, "--chunk-tokens", "60", "--seed", "7")
    assert done.code == 0
    assert f"{memory}: 6 documents, 6 chunks, 1 levels (6)" in done.out
    assert "6 documents read" in done.err
    assert "2 could not be read:" in done.err
    assert f"  {folder}/empty.txt: no text" in done.err
    assert f'  {folder}/lines.jsonl, line 2: no "text"' in done.err
    assert "1 skipped, their formats are not known: .png 1" in done.err

    done = run("search", memory, "Why does smoke calm bees?", "-k", "2")
    assert done.code == 0
    lines = done.out.splitlines()
    assert len(lines) == 5
    assert re.fullmatch(r" 1 \d\.\d{3}  bees bees\.txt:0-63  L1:\d+ \d\.\d\d", lines[0])
    assert lines[1] == "    Smoke calms a hive because the bees fill themselves with honey."
    assert re.fullmatch(r"\d+ vectors scored in a memory of 6 chunks, \d+\.\d ms", lines[4])

    done = run("search", memory, "odd brackets", "-k", "1", "--mode", "deep")
    assert "[red]Odd[/]" in done.out
    assert "[bold]odd[/]:0-" in done.out
    assert "Brackets [bold]stay[/bold] as they are." in done.out

    done = run("ask", memory, "Why does smoke calm bees?", "--llm", "none")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == '"Smoke calms a hive because the bees fill themselves with honey." [1]'
    assert any(line.startswith("  [1] bees bees.txt:0-63 Smoke calms") for line in lines)
    assert re.fullmatch(r"\d+\.\d s", lines[-1])

    done = run("info", memory)
    assert done.code == 0
    for shown in ("documents", "6", "minilm, 384 dimensions", "fanout 32, spill 2, seed 7", f"format {FORMAT_VERSION}"):
        assert shown in done.out


@pytest.fixture
def own_memory(small_memory_path: Path, tmp_path: Path) -> Path:
    """A copy of the small memory that a test may change."""
    return Path(shutil.copytree(small_memory_path, tmp_path / "own.memory"))


def pairs(memory: Path, encoder: Encoder, file: Path) -> Path:
    """A question about every document: its title."""
    image = Memory.open(memory, encoder=encoder).image
    references = [image.reference(number) for number in range(image.documents)]
    file.write_text("\n".join(json.dumps({"query": r.title, "document": r.id}) for r in references))
    return file


def test_train_tells_what_it_did(run: Run, own_memory: Path, minilm: Encoder, tmp_path: Path) -> None:
    asked = pairs(own_memory, minilm, tmp_path / "pairs.jsonl")
    done = run("train", own_memory, "--queries", asked, "--levels", "1,2", "--minutes", "1", "--save", tmp_path / "w")
    assert done.code == 0, done.err
    assert re.search(r"Trained on \d+ labelled questions in \d+ s; \d+ held-out questions decide:", done.out)
    for shown in ("walk hit@1", "hybrid MRR@10", "level 2 recall@32", "before", "after", "Stage 1-2: level 1"):
        assert shown in done.out
    adopted = "Adopted: snapshot" in done.out
    assert adopted != ("Not adopted: held-out questions are found no better" in done.out)
    assert ("Trained on" in run("info", own_memory).out) == adopted
    assert (tmp_path / "w" / "model.safetensors").exists() == adopted
    assert "training levels 1-2, loss" in done.err


def test_train_refuses_in_one_line(run: Run, own_memory: Path, minilm: Encoder, tmp_path: Path) -> None:
    asked = pairs(own_memory, minilm, tmp_path / "pairs.jsonl")
    nobody = tmp_path / "nobody.jsonl"
    nobody.write_text(json.dumps({"query": "who?", "document": "nobody"}))
    for arguments, told in (
        (["--queries", asked, "--dataset", tmp_path], "give one of them"),
        (["--queries", tmp_path / "none.jsonl"], "cannot be read"),
        (["--queries", nobody], "none of 1 questions has a right chunk"),
        (["--queries", asked, "--levels", "one"], "give whole numbers"),
        (["--queries", asked, "--levels", "1,9"], "can be trained here"),
        (["--queries", asked, "--device", "tpu"], "it must be auto, cpu or cuda"),
        (["--dataset", tmp_path / "nothing"], "no such folder"),
        (["--queries", asked, "--sources", "gossip"], "source 'gossip'"),
    ):
        done = run("train", own_memory, *arguments)
        assert done.code == 1
        assert told in done.error


def test_build_with_a_hierarchy_that_is_not_there(run: Run, tmp_path: Path, folder: Path) -> None:
    done = run("build", tmp_path / "m", folder, "--hierarchy", tmp_path / "none")
    assert done.code == 1
    assert "no such folder with config.json and model.safetensors" in done.error


def test_control_characters_do_not_reach_the_terminal(run: Run, tmp_path: Path, model: ChosenReplies) -> None:
    planted = "\x1b]0;owned\x07 \x1b[2J \x9b31m \x7f\x08"
    record = {"id": f"a{planted}", "title": f"Bees {planted}", "text": f"Smoke {planted} calms a hive of bees."}
    (tmp_path / "lines.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"id": planted, "text": 1}))
    model.reply = f"Smoke {planted} calms a hive of bees [1]."
    memory = tmp_path / "m"
    done = [run("build", memory, tmp_path / "lines.jsonl"), run("search", memory, "smoke")]
    done += [run("ask", memory, "What calms a hive?", "--threshold", "0", *llm) for llm in ([], ["--llm", "none"])]
    done.append(run("search", memory, "smoke", "--json"))
    for one in done:
        assert one.code == 0, one.err
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", one.out + one.err)
    assert "Smoke \ufffd]0;owned\ufffd \ufffd[2J" in done[1].out
    assert json.loads(done[-1].out)["hits"][0]["text"] == record["text"]


def test_the_threshold(run: Run, small_memory_path: Path) -> None:
    question = ["ask", small_memory_path, "Why does smoke calm bees?", "--llm", "none"]
    assert "honey" in run(*question).out
    assert run(*question, "--threshold", "99").out.startswith("The memory does not hold the answer.")
    assert "--threshold" in run("ask", "--help").out


def test_the_time_is_that_of_all_steps(run: Run, small_memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {"search": 1.0, "context": 2.0, "first_token": 0.5, "generate": 4.0, "cite": 8.0}
    answer = Answer("Yes.", (), Context((), ()), True, False, True, timings)
    monkeypatch.setattr(Memory, "ask", lambda *_, **__: answer)
    assert run("ask", small_memory_path, "q", "--llm", "none").out.splitlines()[-1] == "15.0 s"


def test_strict_fails_and_lists_what_could_not_be_read(run: Run, tmp_path: Path, folder: Path) -> None:
    done = run("build", tmp_path / "m", folder, "--strict")
    assert done.code == 1
    assert "2 inputs could not be read" in done.error
    assert f"  {folder}/empty.txt: no text" in done.err


def test_a_search_without_hits(run: Run, small_memory_path: Path) -> None:
    assert run("search", small_memory_path, " ").out == "No hits: the query is empty.\n"
    assert run("search", small_memory_path, "qwertz", "--mode", "bm25").out == "No hits.\n"
    assert run("ask", small_memory_path, "", "--llm", "none").out.startswith("The memory does not hold the answer.")


@pytest.mark.parametrize("stdin", ["smoke and bees\n", "smoke \udcff and bees", "", "smoke bees " * 60_000])
def test_the_query_from_standard_input(run: Run, small_memory_path: Path, stdin: str) -> None:
    done = run(
        "search", small_memory_path, "-", "-k", "1", "--mode", "bm25", stdin=stdin.encode("utf-8", "surrogateescape")
    )
    assert done.code == 0
    assert ("beekeeping/" in done.out) == bool(stdin)


@pytest.mark.parametrize("mode", ["walk", "hybrid"])
def test_with_and_without_the_decoder(run: Run, small_memory_path: Path, small_memory: Memory, mode: Mode) -> None:
    told = []
    for option, decoder in (("--decoder", True), ("--no-decoder", False)):
        done = run("search", small_memory_path, "Why does smoke calm bees?", "--mode", mode, option, "--json")
        expected = small_memory.search("Why does smoke calm bees?", config=SearchConfig(mode, decoder=decoder))
        told.append([hit["score"] for hit in json.loads(done.out)["hits"]])
        assert told[-1] == [pytest.approx(hit.score, abs=1e-6) for hit in expected.hits]
    assert told[0] != told[1]


def test_within_one_and_several_documents(run: Run, small_memory_path: Path) -> None:
    done = run("search", small_memory_path, "king", "--within", "chess/1", "--within", "gardens/2", "--json")
    ids = {hit["document"]["id"] for hit in json.loads(done.out)["hits"]}
    assert ids == {"chess/1", "gardens/2"}


# ---- a language model


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ChosenReplies:
    chosen = ChosenReplies()
    monkeypatch.setattr(memory_module, "load_language_model", lambda *_, **__: chosen)
    return chosen


def test_a_reply_with_its_citation(run: Run, small_memory_path: Path, model: ChosenReplies) -> None:
    done = run("ask", small_memory_path, "Why does smoke calm bees?", "--max-tokens", "9")
    assert done.code == 0
    assert done.out.splitlines()[0] == GROUNDED
    assert done.out.count(GROUNDED) == 1
    assert re.search(r"^  \[1\] Beekeeping of \w+ beekeeping/\d:\d+-\d+ Smoke calms", done.out, re.MULTILINE)
    assert model.max_tokens == [9]


def test_an_error_of_the_model(run: Run, small_memory_path: Path, model: ChosenReplies) -> None:
    model.error = ModelError("the endpoint went away")
    done = run("ask", small_memory_path, "Why does smoke calm bees?")
    assert (done.code, done.error) == (1, "the endpoint went away")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("invented", [False, True])
def test_on_a_terminal_the_reply_streams(
    run: Run, small_memory_path: Path, model: ChosenReplies, monkeypatch: pytest.MonkeyPatch, invented: bool
) -> None:
    shown = Terminal()
    monkeypatch.setattr(cli, "out", rich.console.Console(file=shown, force_terminal=True, width=100))
    if invented:
        model.reply = "Chloroform paralyses the nervous system [red]of[/red] insects [1]."
    assert run("ask", small_memory_path, "Why does smoke calm bees?").code == 0
    text = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
    assert text.startswith(model.reply + "\n")
    assert text.count(model.reply) == 1
    assert ESCAPE in shown.getvalue()  # colour, on a terminal
    assert ("The passages do not bear this reply" in text) == invented
    assert ("Smoke calms a hive because the bees fill themselves with honey." in text.splitlines()[2]) == invented


# ---- the demonstration


def test_the_demonstration(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "heapq.py").write_text(
        '"""Heaps."""\ndef merge(*iterables):\n    """Merge multiple sorted inputs into a single sorted output."""\n'
    )
    (tmp_path / "lib" / "statistics.py").write_text(
        'def median(data):\n    """Return the median of a list of numbers."""\n'
    )
    monkeypatch.setattr(readers, "standard_library", lambda: sorted((tmp_path / "lib").iterdir()))
    monkeypatch.chdir(tmp_path)
    done = run("demo", "--llm", "none")
    assert done.code == 0, done.err
    assert "Reading the docstrings" in done.err
    assert "demo.memory: 2 documents" in done.err
    for question in cli.QUESTIONS:
        assert question in done.out
    assert "Merge multiple sorted inputs into a single sorted output." in done.out
    assert "treemem search demo.memory" in done.out
    again = run("demo", "--llm", "none")
    assert again.code == 0
    assert "Using demo.memory again." in again.err
    assert "Reading" not in again.err
    other = run("demo", tmp_path / "other.memory", "--llm", "none")
    assert f"treemem ask {tmp_path / 'other.memory'}" in other.out


# ---- processes, pipes and terminals


def test_no_colour_codes_when_piped(small_memory_path: Path) -> None:
    for command in ("search $1 smoke --mode bm25", "info $1", "search /nowhere x"):
        done = shell(f"$treemem {command}", small_memory_path)
        assert ESCAPE not in done.stdout + done.stderr


@pytest.mark.parametrize("options", ["", "--json"])
@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_reader_that_stops_reading(small_memory_path: Path, options: str, reader: str) -> None:
    done = shell(f'$treemem search $1 "the a of" -k 1000 --mode bm25 {options} | {reader}', small_memory_path)
    assert done.stderr == ""
    assert done.stdout.count("\n") == (1 if reader == "head -1" else 0)


def test_an_odd_path_and_a_narrow_terminal(small_memory_path: Path) -> None:
    """Bytes in a path that are no UTF-8, and a terminal that knows ASCII only."""
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = shell("$treemem search $'/nowhere/\\xff' x", **ascii_only)
    assert done.returncode == 1
    assert done.stderr.startswith("treemem: /nowhere/")
    assert "Traceback" not in done.stderr
    done = shell('$treemem search $1 "naïve 日本茶" --mode bm25 -k 1', small_memory_path, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert "awkward/unicode" in done.stdout


def test_standard_input_in_a_shell(small_memory_path: Path, tmp_path: Path) -> None:
    (tmp_path / "query").write_bytes(b"smoke \xff bees")
    done = shell('$treemem search "$1" - --mode bm25 -k 1 --json < "$2"', small_memory_path, tmp_path / "query")
    assert json.loads(done.stdout)["hits"][0]["document"]["id"].startswith("beekeeping/")
    assert done.stderr == ""


@pytest.mark.slow
def test_a_build_and_a_search_in_processes_of_their_own(tmp_path: Path, folder: Path) -> None:
    done = shell('$treemem build "$1" "$2" --json', tmp_path / "m", folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory"]["documents"] == 6
    assert done.stderr == ""
    done = shell('$treemem search "$1" "Why does smoke calm bees?" --json', tmp_path / "m")
    assert json.loads(done.stdout)["hits"][0]["document"]["id"] == "bees.txt"
    assert done.stderr == ""


@pytest.mark.slow
def test_a_real_ctrl_c(tmp_path: Path) -> None:
    with (tmp_path / "many.jsonl").open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"id": str(i), "text": f"Bees dance in hive number {i}. " * 20}) + "\n")
    command = [sys.executable, "-m", "treemem", "build", str(tmp_path / "m"), str(tmp_path / "many.jsonl")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in a shell's background ignore it
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline().startswith("encoding")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.splitlines()[-1].startswith("treemem: interrupted; run the same command again")
    assert "Traceback" not in told
