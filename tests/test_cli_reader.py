"""A reader from the command line: trained on a set, judged on its held-out questions, asked with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.evaluation.sets import COUNTRIES, corpus, queries, write_jsonl, write_set
from tests.models import saved_model
from tests.test_cli import Run, run
from tests.test_json import ASK, NUMBER, check, one_document

from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.reader import DEFAULT_FOLDER
from treemem.training.examples import Examples

__all__ = ["run"]  # a fixture of the command line's tests

CONDITION = {"exact_match": NUMBER, "f1": NUMBER, "contained": NUMBER}
ATTRIBUTION = {
    "reply": str,
    "tokens": [str],
    "sources": [dict.fromkeys(("level", "element", "place", "number"), int | None) | {"kind": str}],
    "attention": [[float]],
    "gradients": [[float]],
}
WAYS = ("unadapted", "no context", "shuffled", "vectors", "text", "both", "gold")
QUESTION = "What is the capital of Peru?"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the questions are to train on."""
    folder = write_set(tmp_path_factory.mktemp("sets") / "countries")
    asked = queries()
    for number, query in enumerate(asked):
        query["split"] = "train" if number % 2 else "dev"
    write_jsonl(folder, "queries", asked, "")
    return folder


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory, dataset: Path, minilm: Encoder) -> Path:
    path = tmp_path_factory.mktemp("memory") / "countries.memory"
    Memory.build([dataset / "corpus.jsonl"], path, encoder=minilm)
    return path


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("llm"), tuple(" ".join(row) for row in COUNTRIES))


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, memory: Path, dataset: Path, llm: Path
) -> tuple[Path, list[object]]:
    """Where the reader will be, and the command that trains it."""
    folder = tmp_path_factory.mktemp("reader") / "my.reader"
    command = ["train-reader", memory, "--dataset", dataset, "--llm", llm, "--save", folder, "--minutes", "0.1"]
    return folder, [*command, "--device", "cpu", "--judges", "4"]


def test_trained_judged_and_asked_with(
    run: Run, trained: tuple[Path, list[object]], memory: Path, dataset: Path, llm: Path
) -> None:
    folder, command = trained
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    done = run(*command, "--json")
    assert done.code == 0, done.err
    told = one_document(done.out)
    assert told["reader"] == str(folder)
    check(told["gates"]["conditions"], dict.fromkeys(WAYS, CONDITION))
    assert set(told["gates"]) == {"questions", "vectors", "text_tokens", "conditions", "gates", "best"}
    assert told["gates"]["questions"] == 4
    described = json.loads((folder / "config.json").read_text())
    assert described["best"] == told["gates"]["best"]
    assert "## Held-out questions" in (folder / "README.md").read_text()
    assert not (folder / "checkpoints").exists()
    assert "a reader is there already; name another folder" in run(*command).error

    replies = {}
    for how in ("text", "vectors", "both"):
        done = run("ask", memory, QUESTION, "--llm", llm, "--reader", f"{how}@{folder}", "--threshold", "0", "--json")
        assert done.code == 0, done.err
        value = one_document(done.out)
        check(value, ASK)
        replies[how] = value
    assert all(value["found"] for value in replies.values())

    asked = [
        "attribute",
        memory,
        QUESTION,
        "--llm",
        llm,
        "--reader",
        f"both@{folder}",
        "--threshold",
        "0",
        "--max-tokens",
        "5",
    ]
    done = run(*asked, "--gradients", "--json")
    assert done.code == 0, done.err
    value = one_document(done.out)
    check(value, {**ASK, "attribution": ATTRIBUTION})
    assert len(value["attribution"]["attention"]) == len(value["attribution"]["tokens"])
    done = run(*asked)
    lines = [line.split() for line in done.out.splitlines()]
    assert any(line[:3] == ["L1", "L0", "[1]"] for line in lines), done.out
    assert lines[-1][0] == "mean"
    assert 98 < sum(map(float, lines[-1][1:])) < 102
    done = run(*asked, "--each")
    lines = [line.strip().rsplit(maxsplit=1) for line in done.out.splitlines()]
    means = {line[0].split("  ")[0]: float(line[1]) for line in lines if line and line[-1][0].isdigit()}
    vectors = [name for name in means if name.startswith("L")]
    assert len(vectors) == sum(source["kind"] == "vectors" for source in value["attribution"]["sources"]), done.out
    assert 98 < sum(means.values()) < 102

    options = ["--memory", memory, "--split", "dev", "--answers", "--llm", llm, "--max-queries", "2", "--modes", "walk"]
    done = run("eval", dataset, *options, "--readers", "--reader", folder)
    assert [
        word for word in ("no context", "shuffled", "gold", "vectors beat no context") if word not in done.out
    ] == []
    torch.set_num_threads(before)


def test_a_reader_of_text_alone(
    run: Run, trained: tuple[Path, list[object]], memory: Path, llm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "text.reader"
    command = [folder if part == trained[0] else part for part in trained[1]]
    done = run(*command, "--text-only", "--json")
    assert done.code == 0, done.err
    gates = one_document(done.out)["gates"]
    assert set(gates["conditions"]) == {"unadapted", "no context", "text", "gold"}
    assert gates["best"] == "text"
    assert {path.name for path in folder.iterdir()} == {"config.json", "README.md", "text"}
    asked = ["ask", memory, QUESTION, "--llm", llm, "--threshold", "0", "--json", "--reader"]
    done = run(*asked, folder)
    assert done.code == 0, done.err
    assert one_document(done.out)["found"]
    assert "it has learned to read text alone" in run(*asked, f"vectors@{folder}").error


def test_examples_alone(run: Run, memory: Path, dataset: Path, tmp_path: Path) -> None:
    done = run("train-reader", memory, "--dataset", dataset, "--save-examples", tmp_path / "examples")
    assert done.code == 0, done.err
    assert "30 chunks" in done.out
    done = run(
        "train-reader", memory, "--dataset", dataset, "--save-examples", tmp_path / "dev", "--split", "dev", "--json"
    )
    value = one_document(done.out)
    assert value == {"examples": str(tmp_path / "dev"), "questions": value["questions"], "chunks": 30}
    train, dev = (Examples.load(tmp_path / name) for name in ("examples", "dev"))
    assert value["questions"] == len(dev.rows)
    assert not {row.question for row in train.rows} & {row.question for row in dev.rows}
    assert {path.name for path in (tmp_path / "examples").iterdir()} == {"examples.json.zst", "vectors.npz"}


def test_a_reader_of_another_model_is_refused_in_one_line(run: Run, memory: Path, tmp_path: Path, llm: Path) -> None:
    done = run("ask", memory, QUESTION, "--llm", llm, "--reader", "text")
    assert done.code == 1
    assert "trained for the language model 'smollm2'" in done.error
    said = run("ask", memory, QUESTION, "--llm", llm, "--reader", "vector").error
    assert "vector: no reader there (config.json is missing); give text, vectors, both, none, auto or a folder" in said
    for options in (["--llm", "none"], ["--llm", llm]):
        said = run("attribute", memory, QUESTION, *options).error
        assert "a language model on this machine and a reader for it" in said
        assert "--reader none" not in said
    assert "needs a language model on this machine" in run(
        "ask", memory, QUESTION, "--llm", "none", "--reader", "text"
    ).error  # fmt: skip


def test_readers_without_answers(run: Run, dataset: Path) -> None:
    assert "add --answers" in run("eval", dataset, "--readers").error
    for options, said in ((["--llm", "none"], "name one with --llm"), (["--reader", "none"], "name one with --reader")):
        done = run("eval", dataset, "--memory", "nowhere", "--answers", "--readers", *options)
        assert said in done.error, "it is told before the memory is opened"


def test_what_cannot_be_trained_on_is_told_before_the_first_search(
    run: Run, memory: Path, dataset: Path, tmp_path: Path, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treemem.training.examples.gather_examples", lambda *_, **__: pytest.fail("it was searched"))
    (tmp_path / "file").write_text("")
    other = write_set(tmp_path / "other")
    write_jsonl(other, "corpus", [{**own, "text": own["text"] + "\nMore."} for own in corpus()], "")
    wrong: list[tuple[list[object], str]] = [
        (["--device", "tpu"], "device = 'tpu': it must be auto, cpu or cuda"),
        (["--examples", tmp_path], "no examples that can be read"),
        (["--save", tmp_path / "file"], "that is a file; name a folder"),
        (["--llm", "none"], "a reader adapts a model on this machine"),
        (["--start", DEFAULT_FOLDER, "--llm", llm], "it was trained for the language model 'smollm2'"),
        (["--dataset", other], "has another text than in"),
        (["--split", "dev"], "add --dataset and --save-examples"),
    ]
    for options, said in wrong:
        done = run("train-reader", memory, "--dataset", dataset, *options)
        assert (done.code, said in done.error) == (1, True), (options, done.err)


def test_what_cannot_be_gone_on_with_is_told_at_once(run: Run, memory: Path, dataset: Path, tmp_path: Path) -> None:
    done = run("train-reader", memory, "--dataset", dataset, "--start", tmp_path / "nowhere")
    assert done.code != 0
    assert done.err.strip().count("\n") == 0
    assert "no reader there" in done.err
