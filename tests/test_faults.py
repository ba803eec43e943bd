"""What goes wrong outside: kills, interruptions, full disks, damaged files, missing rights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests import faults
from tests.fakes import FakeEncoder, documents, stored_arrays
from tests.faults import resize, used
from tests.processes import ROOT, Forks, Job

from treemem.config import TreeConfig
from treemem.errors import InputError, StoreError
from treemem.hierarchy.build import build
from treemem.hierarchy.memory import Memory
from treemem.storage.files import is_work
from treemem.storage.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forking = Forks()
    yield forking
    forking.close()


def assert_same(one: Path, other: Path) -> None:
    """The same arrays, bit for bit."""
    a, b = stored_arrays(one), stored_arrays(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


def told(output: Path) -> str:
    return output.with_name(output.name + ".err").read_text()


def messages(output: Path) -> list[str]:
    """The lines on standard error that treemem ends with, progress left out."""
    return [line for line in told(output).splitlines() if line.startswith("treemem:")]


# ---- killed


def test_killed_at_random_moments_and_continued(tmp_path: Path, forks: Forks) -> None:
    """The real encoder, SIGKILL after random times, the same command again, until a build comes to its end."""
    job = Job(documents=40, sentences=8, encoder="minilm", commit_chunks=12)
    assert forks.run(replace(job, path=str(tmp_path / "first"), documents=1)) == 0  # the encoder is loaded
    started = time.monotonic()
    assert forks.run(replace(job, path=str(tmp_path / "whole"))) == 0
    whole = time.monotonic() - started
    generator = random.Random(11)
    kills, stored, path = 0, [0], tmp_path / "m"
    for attempt in range(40):
        forks.start(replace(job, path=str(path)))
        if attempt < 5:
            time.sleep(generator.uniform(0.02, 0.35) * whole)
            forks.signal(signal.SIGKILL)
        code = forks.wait()
        assert code in (0, -9)
        if Store.exists(path):
            stored.append(Store.open(path).info().documents)
        if code == 0:
            break
        kills += 1
    assert kills >= 2
    assert stored == sorted(stored)
    assert_same(path, tmp_path / "whole")
    assert len([p for p in (path / "cache").iterdir() if not is_work(p)]) == 1
    encoder = FakeEncoder()  # not the one of this memory, and not needed for words
    assert Memory.open(path, encoder=encoder).search("violin number 11", mode="bm25").hits[0].document.id == "doc-11"


MOMENTS = {
    "while the repository is made": "icechunk:Repository.create_branch",
    "before the first commit": "icechunk:Session.commit",
    "when the repository is put in place": "treemem.storage.store:os.replace",
    "in the middle of a batch": "treemem.storage.writer:_write",
    "before the vectors of level 1": "treemem.hierarchy.build:contextual_file",
    "while growing": "treemem.hierarchy.grow:_seat",
    "before the nodes are committed": "treemem.storage.store:Store.finish",
    "before the memory is made visible": "treemem.storage.store:Store.publish",
    "while it is made visible": "icechunk:Repository.delete_branch",
    "before the image": "treemem.hierarchy.build:build_image",
    "in the middle of the image": "treemem.storage.image:build_lexical",
    "when the image is put in place": "treemem.storage.image:replace_folder",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    path = tmp_path_factory.mktemp("whole") / "m"
    assert forks.run(Job(path=str(path))) == 0
    return path


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment_and_continued(tmp_path: Path, forks: Forks, whole: Path, moment: str) -> None:
    path = tmp_path / "m"
    times = {"in the middle of a batch": (3, 11)}.get(moment, (1,))
    for nth in times:
        job = Job(path=str(path), die_at=MOMENTS[moment], nth=nth, output=str(tmp_path / "killed"))
        assert forks.run(job) == -9, told(tmp_path / "killed")
    assert forks.run(Job(path=str(path), output=str(tmp_path / "again"))) == 0, told(tmp_path / "again")
    assert_same(path, whole)
    assert len([p for p in (path / "cache").iterdir() if not is_work(p)]) == 1


def test_what_killed_processes_left_is_gone_once_it_is_old(tmp_path: Path, forks: Forks) -> None:
    path = tmp_path / "m"
    for moment in ("before the first commit", "while growing", "in the middle of the image"):
        assert forks.run(Job(path=str(path), die_at=MOMENTS[moment])) == -9
    work = [p for folder in (path, path / "cache") for p in folder.iterdir() if is_work(p)]
    assert sorted(p.name.split("-")[0] for p in work) == ["creating", "growing", "growing", "making"]
    for folder in work:
        os.utime(folder, (time.time() - 3600, time.time() - 3600))
    assert forks.run(Job(path=str(path))) == 0
    assert sorted(p.name for p in path.iterdir()) == ["build.lock", "cache", "store"]
    assert len(list((path / "cache").iterdir())) == 1


def test_interrupted_with_control_c(tmp_path: Path, forks: Forks) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for document in documents(80, 12):
        (folder / f"{document.id}.txt").write_text(document.text)
    arguments = ("build", str(tmp_path / "m"), str(folder), "--chunk-tokens", "40", "--json")
    job = Job(arguments=arguments, encoder_command=True, commit_chunks=24, output=str(tmp_path / "first"))
    forks.start(job)
    snapshots = tmp_path / "m" / "store" / "snapshots"
    deadline = time.monotonic() + 60
    while not (snapshots.exists() and len(list(snapshots.iterdir())) >= 4):  # the empty one, `begin`, two batches
        assert time.monotonic() < deadline
        time.sleep(0.01)
    forks.signal(signal.SIGINT)
    assert forks.wait() == 130
    assert told(tmp_path / "first").splitlines() == [
        "treemem: interrupted; run the same command again: what was committed stays, and long work goes on from there"
    ]
    kept = Store.open(tmp_path / "m")
    assert not kept.finished
    stored = kept.info().documents
    assert 0 < stored < 80
    again = Job(arguments=arguments, encoder_command=True, commit_chunks=24, output=str(tmp_path / "second"))
    assert forks.run(again) == 0, told(tmp_path / "second")
    printed = json.loads((tmp_path / "second.out").read_text())
    assert printed["memory"]["documents"] == 80


# ---- damaged


def commands_on(path: Path) -> list[tuple[str, ...]]:
    return [("info", str(path)), ("search", str(path), "violin number 11", "--mode", "bm25", "--json")]


def test_commands_on_a_damaged_memory(tmp_path: Path, forks: Forks, whole: Path) -> None:
    """One line that names the memory, or what an undamaged one gives; never a trace."""
    good = tmp_path / "good.memory"
    shutil.copytree(whole, good)
    results = {}
    for arguments in commands_on(good):
        output = tmp_path / arguments[0]
        assert forks.run(Job(arguments=arguments, output=str(output))) == 0, told(output)
        results[arguments[0]] = hits(output) if arguments[0] == "search" else None
    generator = random.Random(5)
    path = tmp_path / "m"
    refused = 0
    for round_ in range(12):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        if round_ % 4:
            shutil.rmtree(path / "cache")  # with its image, a memory is searched without its store
        kind = ("snapshots", "manifests", "chunks", "refs/branch.main")[round_ % 4]
        for file in (path / "store" / kind).iterdir():  # all of a kind, so that those in use are among them
            data = bytearray(file.read_bytes())
            if round_ % 3 == 0:
                data = data[: generator.randrange(len(data))]
            else:
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            file.write_bytes(bytes(data))
        for arguments in commands_on(path):
            output = tmp_path / "damaged"
            code = forks.run(Job(arguments=arguments, output=str(output)))
            if code == 0:
                assert arguments[0] == "info" or hits(output) == results["search"]
                continue
            refused += 1
            assert code == 1, told(output)
            assert len(messages(output)) == 1
            assert "Traceback" not in told(output)
            assert str(path) in told(output)
    assert refused >= 10


def hits(output: Path) -> object:
    return json.loads(output.with_name(output.name + ".out").read_text())["hits"]


def test_a_damaged_memory_as_a_user_meets_it(tmp_path: Path, whole: Path) -> None:
    """The very command, in a process of its own."""
    path = tmp_path / "m"
    shutil.copytree(whole, path)
    shutil.rmtree(path / "cache")
    for file in (path / "store" / "chunks").iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    done = subprocess.run(
        [sys.executable, "-m", "treemem", "search", str(path), "violin"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith(f"treemem: {path}: ")
    assert "restore the folder from a copy or build it again" in lines[-1]
    assert "Traceback" not in done.stderr


# ---- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system whose size can be changed, by `resize`."""
    with faults.small_disk(tmp_path / "disk") as reason:
        if reason:
            pytest.skip(reason)
        yield tmp_path / "disk"


def test_a_disk_that_fills_at_every_stage(tmp_path: Path, forks: Forks, small_disk: Path) -> None:
    """Ever a little more room: each time one line, and the next build goes on until it ends."""
    path = small_disk / "m"
    texts = tmp_path / "texts.jsonl"
    with texts.open("w") as file:
        for document in documents(40, 6):
            record = {"id": document.id, "title": document.title, "text": document.text}
            file.write(json.dumps(record) + "\n")
    output = tmp_path / "out"
    job = Job(
        arguments=("build", str(path), str(texts), "--fanout", "8", "--chunk-tokens", "40", "--json"),
        encoder_command=True,
        commit_chunks=40,
        output=str(output),
    )
    resize(small_disk, 100_000)
    assert forks.run(job) == 0, told(output)
    # What the store takes and what is there in the end; rooms on the way to both, then more until it is done.
    kept = sum(f.stat().st_size for f in (path / "store").rglob("*") if f.is_file()) // 1024
    total = used(small_disk)
    shutil.rmtree(path)
    rooms = [16, kept // 6, kept // 2, *range(kept, total, max(1, (total - kept) // 5))]
    rooms += [total + step * total // 10 for step in range(20)]
    stages = set()
    for room in rooms:
        resize(small_disk, max(room, used(small_disk)))
        code = forks.run(job)
        if code == 0:
            break
        assert code == 1, told(output)
        assert told(output).splitlines() == [
            f"treemem: {path}: the disk is full; free some space and run the same command again, it continues"
        ]
        store = Store.open(path) if Store.exists(path) else None
        stages.add("creating" if store is None else "writing the image" if store.finished else "building")
    assert code == 0
    assert stages == {"creating", "building", "writing the image"}
    memory = Memory.open(path, encoder=FakeEncoder())
    assert memory.search("violin number 11", mode="bm25", k=1).hits[0].document.title == "About violin 11"
    assert not list(path.glob("*ing-*"))


def test_a_disk_that_is_full_when_a_memory_is_opened(
    tmp_path: Path, forks: Forks, whole: Path, small_disk: Path
) -> None:
    resize(small_disk, 100_000)
    path = small_disk / "m"
    shutil.copytree(whole, path)
    shutil.rmtree(path / "cache")
    for room in (0, 40, 200, 300):
        resize(small_disk, used(small_disk) + room)
        output = tmp_path / "out"
        code = forks.run(Job(arguments=commands_on(path)[1], output=str(output)))
        if code == 0:
            break
        assert messages(output) == [
            f"treemem: {path}: the disk is full; free some space and run the same command again, it continues"
        ]
    assert room >= 40
    resize(small_disk, 100_000)
    assert forks.run(Job(arguments=commands_on(path)[1], output=str(tmp_path / "out"))) == 0


# ---- no right


def test_a_memory_that_may_not_be_read(tmp_path: Path, forks: Forks, whole: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(whole, path)
    output = tmp_path / "out"
    for part in (path, path / "store", path / "store" / "snapshots"):
        part.chmod(0)
        for arguments in commands_on(path):
            code = forks.run(Job(arguments=arguments, output=str(output), without_rights=True))
            (message,) = messages(output)
            assert str(path) in message
            if part != path:  # that one the reading of the command line refuses
                assert code == 1
            if part == path / "store":
                assert message.endswith("permission denied; check who owns the folder and whether it may be written")
        part.chmod(0o755)


def test_a_memory_that_may_only_be_read(tmp_path: Path, forks: Forks, whole: Path) -> None:
    """It is searched as it is; without its image it cannot be, and says why."""
    path = tmp_path / "m"
    shutil.copytree(whole, path)
    expected = tmp_path / "expected"
    assert forks.run(Job(arguments=commands_on(path)[1], output=str(expected))) == 0
    folders = [p for p in path.rglob("*") if p.is_dir()]
    (path / "growing-stale").mkdir()
    os.utime(path / "growing-stale", (0, 0))
    everything = [path, *path.rglob("*")]
    for part in everything:
        part.chmod(0o555 if part.is_dir() else 0o444)
    output = tmp_path / "out"
    assert forks.run(Job(arguments=commands_on(path)[1], output=str(output), without_rights=True)) == 0, told(output)
    assert hits(output) == hits(expected)
    for part in [path, *folders]:
        part.chmod(0o755)
    shutil.rmtree(path / "cache")
    path.chmod(0o555)
    code = forks.run(Job(arguments=commands_on(path)[1], output=str(output), without_rights=True))
    assert code == 1
    assert len(messages(output)) == 1
    assert "permission denied" in told(output)
    path.chmod(0o755)


def test_building_where_nothing_may_be_written(tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "text.txt").write_text("Some words.")
    output = tmp_path / "out"
    arguments = ("build", str(tmp_path / "closed" / "m"), str(tmp_path / "text.txt"))
    code = forks.run(Job(arguments=arguments, encoder_command=True, output=str(output), without_rights=True))
    assert code == 1, told(output)
    assert messages(output) == [
        f"treemem: {tmp_path / 'closed' / 'm'}: permission denied; check who owns the folder and whether it may be "
        "written"
    ]


# ---- two at once


def test_a_second_build_of_the_same_memory_is_refused_while_the_first_lives(tmp_path: Path, forks: Forks) -> None:
    """… and takes over once it was killed: the lock goes with its process."""
    path = tmp_path / "m"
    forks.start(Job(path=str(path), documents=4000, sentences=30))
    deadline = time.monotonic() + 60
    while not Store.exists(path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    forks.signal(signal.SIGSTOP)
    try:
        with pytest.raises(StoreError, match="another process is writing this memory; wait for it or end it"):
            build(path, documents(40), FakeEncoder(), TreeConfig(chunk_tokens=40, fanout=8))
    finally:
        forks.signal(signal.SIGKILL)
        assert forks.wait() == -9
    stored = Store.open(path).info().documents
    if stored:
        with pytest.raises(InputError, match="differs"):
            build(path, documents(1), FakeEncoder(), TreeConfig(chunk_tokens=40, fanout=8))
    else:
        build(path, documents(1), FakeEncoder(), TreeConfig(chunk_tokens=40, fanout=8))
