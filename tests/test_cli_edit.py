"""The commands that edit a memory: what they print, as text and as JSON, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.test_cli import Run, run
from tests.test_json import check, one_document

__all__ = ["run"]

EDIT = {
    "snapshot": str, "added": list, "replaced": list, "unchanged": list, "removed": list, "masked": list,
    "unmasked": list, "chunks_added": int, "chunks_removed": int, "recall_before": float | None,
    "recall_after": float | None, "seconds": dict,
}  # fmt: skip
SNAPSHOT = {"id": str, "time": str, "message": str, "changes": dict, "names": list}
DIFF = {"added": list, "removed": list, "changed": list, "masked": list, "unmasked": list}
VERIFY = {"snapshot": str, "sound": bool, "checked": dict, "faults": list}
FORGET = {"documents": list, "snapshots": list, "tags": list, "bytes": int}


@pytest.fixture
def memory(tmp_path: Path, small_memory_path: Path) -> Path:
    shutil.copytree(small_memory_path, tmp_path / "my.memory")
    return tmp_path / "my.memory"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    lines = [
        {"id": "key", "text": "Ada keeps her spare key under the third flower pot.", "metadata": {"kind": "mail"}},
        {"id": "heron", "text": "A blue heron stood in the reeds and ate a frog.", "metadata": {"kind": "web"}},
    ]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "notes.jsonl"


def asked(run: Run, *arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert (done.code, done.err) == (0, ""), done
    return one_document(done.out)


def best(run: Run, memory: Path, *options: object) -> list[str]:
    found = asked(run, "search", memory, "Where is the spare key?", "-k", "100", *options)
    return [hit["document"]["id"] for hit in found["hits"]]


def test_a_memory_is_edited_from_the_command_line(run: Run, memory: Path, notes: Path) -> None:
    done = run("add", memory, notes, "-m", "two notes")
    assert re.search(r"2 added, 2 chunks added\. Snapshot [0-9A-Z]{20}", done.out)
    assert "nothing changed, 2 as they were" in run("add", memory, notes).out
    assert best(run, memory)[0] == "key"
    assert set(best(run, memory, "--where", 'kind == "web"')) == {"heron"}
    assert run("mask", memory, "key").out.startswith("1 masked")
    assert "key" not in best(run, memory)
    assert "1 of them masked" in run("info", memory).out
    assert run("unmask", memory, "--where", 'kind == "mail"').out.startswith("1 unmasked")
    assert best(run, memory)[0] == "key"
    told = run("history", memory).out
    assert "two notes (2 added, 2 chunks added)" in told
    assert "1 masked (" not in told
    assert "main" in told
    snapshots = asked(run, "history", memory)["snapshots"]
    assert [own["message"] for own in snapshots[:3]] == ["1 unmasked", "1 masked", "two notes"]
    first = snapshots[-1]["id"]
    assert "key" not in best(run, memory, "--at", first)
    assert run("diff", memory, first).out.split() == ["+", "added", "heron", "+", "added", "key"]
    assert run("diff", memory, "main").out == "The same documents.\n"
    assert "All of it is what it is made of." in run("verify", memory).out
    assert "1 documents, 1 chunks" in run("verify", memory, "--document", "key").out
    assert run("remove", memory, "key", "heron").out.startswith("2 removed, 2 chunks removed")
    back = run("rollback", memory, snapshots[0]["id"]).out
    assert best(run, memory)[0] == "key"
    assert re.search(r"to go back there: treemem rollback \S+ [0-9A-Z]{20}$", back.strip())


def test_branches_and_tags(run: Run, memory: Path, notes: Path) -> None:
    assert run("tag", memory).out == "No tags.\n"
    assert run("tag", memory, "v1").out.split()[0] == "v1"
    assert [line.split()[0] for line in run("branch", memory, "draft").out.splitlines()] == ["draft", "main"]
    assert run("add", memory, notes, "--branch", "draft").code == 0
    assert best(run, memory, "--at", "draft")[0] == "key"
    assert "key" not in best(run, memory)
    assert "key" not in best(run, memory, "--at", "v1")
    assert run("add", memory, notes, "--branch", "draft").out.startswith("nothing changed")
    back = run("rollback", memory, "v1", "--branch", "draft").out.split("to go back there: treemem ")[1].split()
    assert back[-2:] == ["--branch", "draft"]
    assert run(*back).code == 0
    assert best(run, memory, "--at", "draft")[0] == "key"
    assert "key" not in best(run, memory)
    assert "'draft' is a branch; to remove it: treemem branch" in run("tag", memory, "draft", "--delete").error
    assert "'v1' is a tag; to remove it: treemem tag" in run("branch", memory, "v1", "--delete").error
    assert run("branch", memory, "draft", "--delete").out.split()[0] == "main"
    assert run("search", memory, "x", "--at", "draft").error.startswith(f"{memory} has no branch, tag or snapshot")


def test_compacting_and_forgetting(run: Run, memory: Path, notes: Path) -> None:
    run("add", memory, notes)
    done = run("compact", memory)
    assert len(re.findall(r"A walk finds \d\.\d{3} of the ten chunks nearest to a chunk (before|after)", done.out)) == 2
    told = run("forget", memory, "key").out
    assert told.startswith("Gone for good: 1 documents")
    assert "document key" in told
    assert "key" not in best(run, memory)
    for file in memory.rglob("*"):
        assert not file.is_file() or b"flower pot" not in file.read_bytes(), file


def test_json(run: Run, memory: Path, notes: Path) -> None:
    value = asked(run, "add", memory, notes)
    check(value["edit"], EDIT)
    assert set(value) == {"edit", "read"}
    assert set(value["edit"]["seconds"]) == {"encode", "commit", "image"}
    for command in ("mask", "unmask", "remove"):
        check(asked(run, command, memory, "key"), EDIT)
    check(asked(run, "compact", memory), EDIT)
    check(asked(run, "history", memory), {"snapshots": [SNAPSHOT]})
    check(asked(run, "diff", memory, "main"), DIFF)
    check(asked(run, "verify", memory), VERIFY)
    check(asked(run, "branch", memory), {"branches": {"main": str}})
    check(asked(run, "tag", memory, "t"), {"tags": {"t": str}})
    check(asked(run, "rollback", memory, "t"), {"branch": str, "snapshot": str, "before": str})
    check(asked(run, "forget", memory, "heron"), FORGET)


def test_verify_ends_with_1_where_something_is_wrong(run: Run, memory: Path) -> None:
    import zarr

    from treemem.storage.store import Store

    session = Store.open(memory).repository.writable_session("main")
    root: Any = zarr.open_group(session.store, mode="r+")
    root["levels/2/vectors"][0] = 0
    session.commit("tampered", {"treemem": {}})
    done = run("verify", memory, "--json")
    assert done.code == 1
    value = one_document(done.out)
    assert value["sound"] is False
    assert any("levels/2/vectors" in fault for fault in value["faults"])
    assert "wrong:" in run("verify", memory).out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("remove", "M"), "name documents by their ids, or give --where"),
        (("mask", "M"), "name documents by their ids, or give --where"),
        (("forget", "M"), "name documents by their ids, or give --where"),
        (("remove", "M", "nobody"), "document 'nobody' is not in this memory"),
        (("remove", "M", "--where", "kind ="), "where = 'kind ='"),
        (("verify", "M", "--document", "nobody"), "document 'nobody' is not in"),
        (("tag", "M", "--delete"), "name what is to be removed"),
        (("tag", "M", "a b"), "'a b' is no name"),
        (("branch", "M", "main"), "a branch or tag of this name already"),
        (("branch", "M", "main", "--delete"), "cannot be removed"),
        (("rollback", "M", "yesterday"), "has no branch, tag or snapshot 'yesterday'"),
        (("rollback", "M", "1999-01-01"), "no snapshot that is as old as 1999-01-01"),
        (("diff", "M", "nothing"), "has no branch, tag or snapshot 'nothing'"),
        (("add", "M", "nowhere.txt"), "nowhere.txt"),
        (("history", "nowhere"), "there is nothing there"),
        (("add", "nowhere", "x"), "there is nothing there"),
    ],
)
def test_wrong_use_is_told_in_one_line(run: Run, memory: Path, arguments: tuple[str, ...], told: str) -> None:
    done = run(*(memory if part == "M" else part for part in arguments))
    assert done.code == 1
    assert told in done.error
