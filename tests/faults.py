"""What edits are put through: kills, full disks, damage. Shared by the tests and by `benchmarks/faults.py`.

A trial works on a copy of a small memory that was edited before. Whatever touches a memory runs in a process of its
own, so that a crash is seen as what it is; what it found comes back as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import zarr
from tests.fakes import FakeEncoder, documents
from tests.processes import Forks, Job

from treemem.config import TreeConfig
from treemem.errors import TreememError
from treemem.hierarchy import memory as module
from treemem.hierarchy.build import alone
from treemem.hierarchy.memory import Memory
from treemem.storage import image as image_module
from treemem.storage.store import guard
from treemem.types import Document

CONFIG = TreeConfig(chunk_tokens=40, fanout=4)
DOCUMENTS = documents(40, 5)
SECRET = Document("secret", "The quokka Zebedee hides under the veranda and eats marzipan. " * 3, "Quokka")
CHANGED = replace(DOCUMENTS[6], text=DOCUMENTS[6].text + " And something new was written under it.")
MODES = ("hybrid", "exact", "bm25")
QUERIES = ("violin number 11", DOCUMENTS[7].text[:80], CHANGED.text[-60:] + " quokka")

EDITS: dict[str, Callable[[Memory], object]] = {
    "add": lambda memory: memory.add([*DOCUMENTS[24:27], CHANGED]),
    "remove": lambda memory: memory.remove([DOCUMENTS[n].id for n in (0, 7, 21)]),
    "mask": lambda memory: memory.mask([DOCUMENTS[n].id for n in (1, 2)]),
    "compact": lambda memory: memory.compact(),
    "forget": lambda memory: memory.forget([SECRET.id]),
    "train": lambda memory: trained(memory),
}

MOMENTS = {
    "when the commit begins": ("add", "icechunk:Session.commit", 1),
    "when it is made": ("add", "treemem.hierarchy.edits:follow", 1),
    "when some arrays of the image are appended to": ("add", "treemem.storage.follow:append_npy", 9),
    "when the words are": ("add", "treemem.storage.follow:update_index", 1),
    "before the image says what it is": ("remove", "treemem.storage.follow:describe", 1),
    "when the image is put in place": ("remove", "treemem.hierarchy.edits:replace_folder", 1),
    "when old images are removed": ("mask", "treemem.hierarchy.memory:Memory._sweep", 1),
    "when gaps are closed": ("compact", "treemem.storage.writer:Writer.append", 4),
    "when the new tree is not written yet": ("compact", "treemem.hierarchy.edits:write_levels", 1),
    "before the image of the new tree": ("compact", "treemem.hierarchy.edits:build_image", 1),
    "when a trained tree is half written": ("train", "treemem.storage.writer:Writer.put", 2),
    "before the image of the trained tree": ("train", "treemem.hierarchy.build:build_image", 1),
    "when a branch has forgotten and the other has not": ("forget", "treemem.hierarchy.edits:write_change", 2),
    "before the older snapshots are": ("forget", "icechunk:Repository.expire_snapshots", 1),
    "before their bytes are": ("forget", "icechunk:Repository.garbage_collect", 1),
    "when the bytes are gone": ("forget", "treemem.hierarchy.memory:write_image", 1),
}
"""Edit, function and at which of its calls the process dies."""

FULL = "the disk is full; free some space and run the same command again, it continues"
KINDS = ("chunks", "manifests", "snapshots", "refs", "image")
WAYS = ("flipped", "cut", "gone")


# ---- in processes of their own


def make(path: str) -> None:
    """The memory that trials are made with: built, edited, with a tag and a second branch."""
    memory = Memory.build(DOCUMENTS[:20], path, encoder=FakeEncoder(), config=CONFIG)
    memory.add([*DOCUMENTS[20:22], SECRET])
    memory.tag("earlier")
    memory.branch("other")
    memory.remove([DOCUMENTS[3].id])
    memory.mask([DOCUMENTS[4].id])


def edit(path: str, name: str) -> None:
    """One of `EDITS`; an error as the command line tells it."""
    try:
        EDITS[name](Memory.open(path, encoder=FakeEncoder()))
    except TreememError as error:
        print(f"treemem: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def look(path: str, output: str, checked: str) -> None:
    """Write down what a memory holds, what it finds and what it says of itself; then whether editing goes on.

    `checked`: how many bytes of the image are compared with their checksums when it is opened.
    """
    image_module.CHECKED_BYTES = int(checked)
    told: dict[str, Any] = {}

    def tell(name: str, what: Callable[[], Any]) -> None:
        try:
            told[name] = what()
        except TreememError as error:
            told[name] = {"error": type(error).__name__, "message": str(error)}

    try:
        memory = Memory.open(path, encoder=FakeEncoder())
    except TreememError as error:
        told["open"] = {"error": type(error).__name__, "message": str(error)}
    else:
        told["image"] = [memory.store.snapshot, memory.image.folder.stat().st_ino]
        _describe(memory, tell)
        tell("history", lambda: [own.id for own in memory.history()])
        tell("verified", lambda: memory.verify().faults)
        tell("edited", lambda: _go_on(memory))
        tell("tip", lambda: memory.store.snapshot)
    Path(output).write_text(json.dumps(told))


def trained(memory: Memory) -> None:
    """What training does to a memory at its end: a hierarchy, here a random one, takes the place of the one before."""
    import torch

    from treemem.hierarchy.build import retrain
    from treemem.hierarchy.weights import Hierarchy, HierarchyConfig

    torch.manual_seed(0)
    config = HierarchyConfig(FakeEncoder().info, gate_width=16, ranker_width=16, encoder_width=16)
    hierarchy = Hierarchy(config).eval()
    for name, parameter in hierarchy.named_parameters():
        if ".outwards." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    retrain(memory.store, hierarchy, "trained")


def hold(path: str, seconds: str) -> None:
    """Hold a memory's lock."""
    with alone(Path(path)):
        print("held", flush=True)
        time.sleep(float(seconds))


def add_one_by_one(path: str, first: str, last: str) -> None:
    """Add documents, each by an edit of its own, however long others write."""
    module.LOCK_SECONDS = 200.0
    memory = Memory.open(path, encoder=FakeEncoder())
    for document in DOCUMENTS[int(first) : int(last)]:
        memory.add(document)


def read_on(path: str, stop: str) -> None:
    """Search until a file named `stop` is there: always the same is found."""
    memory = Memory.open(path, encoder=FakeEncoder())
    before = [_answer(memory, query, mode) for query in QUERIES for mode in MODES]
    print("reading", flush=True)
    while not Path(stop, "stop").exists():
        assert [_answer(memory, query, mode) for query in QUERIES for mode in MODES] == before


def _describe(memory: Memory, tell: Callable[[str, Callable[[], Any]], None]) -> None:
    tell("documents", lambda: {own: _sum(repr(memory.document(own)).encode()) for own in sorted(memory.ids())})
    tell("answers", lambda: [_answer(memory, query, mode) for query in QUERIES for mode in MODES])
    tell("arrays", lambda: _arrays(memory))


def _arrays(memory: Memory) -> dict[str, str]:
    """All that is stored, opened once: much of the time that looking takes goes into opening."""
    with guard(memory.store.path):
        members = memory.store._root().members(max_depth=None)
        return {name: _sum(array[:].tobytes()) for name, array in members if isinstance(array, zarr.Array)}


def _answer(memory: Memory, query: str, mode: str) -> list[Any]:
    return [(hit.document.id, hit.document.title, hit.score, hit.text) for hit in memory.search(query, mode=mode)]


def _go_on(memory: Memory) -> dict[str, Any]:
    told: dict[str, Any] = {}
    memory.add([DOCUMENTS[30], replace(DOCUMENTS[10], title="Another title")])
    _describe(memory, lambda name, what: told.__setitem__(name, what()))
    told["faults"] = memory.verify().faults
    return told


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ---- trials


class Wrong(AssertionError):
    """A memory that is neither what it was nor what it was to become, or that said nothing of its damage."""


class Trials:
    """A small edited memory, and what every edit makes of it."""

    def __init__(self, forks: Forks, folder: Path) -> None:
        """Make the memory, and do every edit once without a fault."""
        self.forks = forks
        self.folder = folder
        self.memory = folder / "memory"
        self._run(make, str(self.memory))
        self.before = self._look(self._copy())
        assert sound(self.before)
        self.after: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.growth: dict[str, int] = {}
        for name in EDITS:
            path = self._copy()
            begin, size = time.monotonic(), _blocks(path)
            self._run(edit, str(path), name, die_after=-1)
            self.seconds[name] = time.monotonic() - begin
            self.growth[name] = _blocks(path) - size
            self.calls[name] = int((self.folder / "told.out").read_text())
            if name == "forget":
                self.left = _stored(path)
            self.after[name] = self._look(path)
            assert sound(self.after[name])

    def kill(self, generator: random.Random, *, timed: bool) -> str:
        """Kill a random edit after a random time, or at a random call. Returns `old` or `new`."""
        name = generator.choice(list(EDITS))
        path = self._copy()
        if timed:
            self.forks.start(self._job(edit, str(path), name))
            time.sleep(generator.uniform(0, self.seconds[name]))
            self.forks.signal(9)
            code = self.forks.wait()
        else:
            code = self.forks.run(self._job(edit, str(path), name, die_after=generator.randint(1, self.calls[name])))
        if code not in (0, -9):
            raise Wrong(f"{name}: exit code {code}: {self._told()}")
        return self._settled(path, name)

    def kill_at(self, moment: str) -> str:
        """Kill an edit at one of `MOMENTS`. Returns `old` or `new`."""
        name, function, nth = MOMENTS[moment]
        path = self._copy()
        code = self.forks.run(replace(self._job(edit, str(path), name), die_at=function, nth=nth))
        if code != -9:
            raise Wrong(f"{name} was not killed {moment}: exit code {code}: {self._told()}")
        return self._settled(path, name)

    def fill(self, disk: Path, generator: random.Random) -> str:
        """Let the disk run full under a random edit. Returns `old full`, `new full` or, where it had room, `new`."""
        name = generator.choice(list(EDITS))
        path = disk / "m"
        resize(disk, 200_000)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.memory, path)
        resize(disk, used(disk) + int(generator.uniform(0, 1.3) * abs(self.growth[name])))
        code = self.forks.run(self._job(edit, str(path), name))
        told = self._told().splitlines()
        resize(disk, 200_000)
        if code not in (0, 1) or (code == 1 and told != [f"treemem: {path}: {FULL}"]):
            raise Wrong(f"{name} on a full disk: exit code {code}: {told}")
        settled = self._settled(path, name)
        if code == 0 and settled != "new":
            raise Wrong(f"{name} said that all went well")
        return settled if code == 0 else f"{settled} full"

    def damage(self, generator: random.Random, kind: str | None = None, way: str | None = None) -> str:
        """Damage files of one kind.

        Returns:
            `right`: all is as it was; `error`: one that names the memory; `repaired`: the image was made again; or
            `verified`: something is read otherwise than it was written, and `verify` says so. That is accepted of an
            image alone, where half of the trials compare nothing with its checksum at opening, as if it were large.
        """
        kind, way = kind or generator.choice(KINDS), way or generator.choice(WAYS)
        path = self._copy()
        image = path / "cache" / self.before["image"][0]
        if kind == "image":
            files = sorted(own for own in image.rglob("*") if own.is_file())
        else:
            files = sorted(own for own in (path / "store" / kind).rglob("*") if own.is_file())
            if generator.random() < 0.5:  # else the image answers without a look at the store
                shutil.rmtree(path / "cache")
        inode = image.stat().st_ino if image.exists() else None
        chosen = generator.sample(files, 1 if kind == "image" else min(len(files), 1 + len(files) // 3))
        for file in chosen:
            spoil(file, way, generator)
        told = self._look(path, generator.choice((0, image_module.CHECKED_BYTES)))
        where = f"{kind} {way}: {chosen[0].name}"
        repaired = inode is not None and "image" in told and told["image"][1] != inode
        judged = self._judged(told, where, path, repaired=repaired)
        if judged == "verified" and kind != "image":
            raise Wrong(f"{where}: what is stored is read otherwise than it was written")
        return judged

    def _judged(self, told: dict[str, Any], where: str, path: Path, *, repaired: bool) -> str:
        parts = [told["open"]] if "open" in told else [told[name] for name in ("documents", "answers", "arrays")]
        named = [part for part in [*parts, told.get("verified"), told.get("edited")] if _failed(part)]
        for part in named:
            if str(path) not in part["message"] or "\n" in part["message"]:
                raise Wrong(f"{where}: {part}")
        wrong = [name for name in ("documents", "answers", "arrays") if name in told and not _failed(told[name])]
        wrong = [name for name in wrong if told[name] != self.before[name]]
        noticed = _failed(told.get("verified")) or bool(told.get("verified"))
        if wrong and not noticed:
            raise Wrong(f"{where}: {wrong} are not what was written, and nothing says so")
        if wrong:
            return "verified"
        edited = told.get("edited")
        if edited is not None and not _failed(edited) and not noticed and edited != self.before["edited"]:
            raise Wrong(f"{where}: edits afterwards give something else: {edited['faults']}")
        if named or noticed:
            return "error"
        return "repaired" if repaired else "right"

    def _settled(self, path: Path, name: str) -> str:
        """Which of the two states a memory is in, after which all must go on as from there."""
        if name == "forget":
            return self._forgotten(path)
        told = self._look(path)
        for state, expected in (("old", self.before), ("new", self.after[name])):
            if all(told.get(part) == expected[part] for part in ("documents", "answers", "arrays")):
                if not sound(told):
                    raise Wrong(f"{name}, {state}: {told['verified']}, {told['edited']}")
                if told["edited"] != expected["edited"]:
                    raise Wrong(f"{name}, {state}: edits afterwards give something else")
                lost = set(self.before["history"]) - set(told["history"])
                if lost:
                    raise Wrong(f"{name}, {state}: snapshots are lost")
                return state
        raise Wrong(f"{name}: neither old nor new: {json.dumps(told)[:2000]}")

    def _forgotten(self, path: Path) -> str:
        """Interrupted while it forgot: the document is there or not; asked again, nothing of it is left anywhere."""
        looked = self.folder / "looked"
        shutil.rmtree(looked, ignore_errors=True)
        shutil.copytree(path, looked)  # looking edits, and what is edited then is another memory
        told = self._look(looked)
        state = "old" if SECRET.id in told.get("documents", ()) else "new"
        expected = self.before if state == "old" else self.after["forget"]
        for part in ("documents", "answers", "arrays"):
            if told.get(part) != expected[part]:
                raise Wrong(f"forget: {part} neither old nor new: {json.dumps(told)[:2000]}")
        if not sound(told):
            raise Wrong(f"forget, {state}: {told['verified']}, {told['edited']}")
        code = self.forks.run(self._job(edit, str(path), "forget"))
        if code and (code != 1 or "is in no branch or tag" not in self._told()):
            raise Wrong(f"forget, asked again: exit code {code}: {self._told()}")
        left = _stored(path)
        if left != self.left:
            raise Wrong(f"forget, asked again: {left} are left, not {self.left}")
        for file in path.rglob("*"):
            if file.is_file() and b"zebedee" in file.read_bytes().lower():
                raise Wrong(f"forget, asked again: something is left in {file.relative_to(path)}")
        return state

    def _copy(self) -> Path:
        path = self.folder / "m"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.memory, path)
        return path

    def _job(self, function: Callable[..., None], *given: str, die_after: int = 0) -> Job:
        return Job(
            call=f"tests.faults:{function.__name__}", given=given, die_after=die_after, output=str(self.folder / "told")
        )

    def _told(self) -> str:
        return (self.folder / "told.err").read_text()

    def _run(self, function: Callable[..., None], *given: str, die_after: int = 0) -> None:
        code = self.forks.run(self._job(function, *given, die_after=die_after))
        if code:
            raise Wrong(f"{function.__name__}: exit code {code}: {self._told()}")

    def _look(self, path: Path, checked: int = image_module.CHECKED_BYTES) -> dict[str, Any]:
        output = self.folder / "looked.json"
        output.unlink(missing_ok=True)
        self._run(look, str(path), str(output), str(checked))
        told: dict[str, Any] = json.loads(output.read_text())
        return told


def sound(told: dict[str, Any]) -> bool:
    """Whether nothing was found at fault, before and after further edits."""
    edited = told.get("edited", {})
    return told.get("verified") == [] and not _failed(edited) and edited.get("faults") == []


def _failed(part: Any) -> bool:
    return isinstance(part, dict) and "error" in part


def _stored(path: Path) -> dict[str, int]:
    """How many files of each kind the store has, and how many images there are."""
    kinds = {kind: len(list((path / "store" / kind).rglob("*"))) for kind in ("chunks", "manifests", "snapshots")}
    return kinds | {"images": len([own for own in (path / "cache").iterdir() if (own / "image.json").exists()])}


def spoil(file: Path, way: str, generator: random.Random) -> None:
    """Damage a file, which then has no hard links."""
    data = file.read_bytes()
    file.unlink()
    if way == "gone":
        return
    data = data or b" "
    place = generator.randrange(len(data))
    if way == "cut":
        file.write_bytes(data[:place])
    else:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :])


# ---- a disk that can be filled


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount a file system whose size can be changed. Gives the reason why not, empty where it is there."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        yield "needs the command mount"
        return
    if mounted.returncode:
        yield f"needs the right to mount a small file system: {mounted.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, kilobytes: int) -> None:
    """Give a small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True, capture_output=True)


def used(folder: Path) -> int:
    """Kilobytes that are in use on a small disk."""
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize // 1024


def _blocks(path: Path) -> int:
    """Kilobytes that a folder takes where blocks have 4096 bytes, hard links once."""
    files = {own.stat().st_ino: own.stat().st_size for own in path.rglob("*") if own.is_file()}
    return sum(-(-size // 4096) * 4 for size in files.values())
