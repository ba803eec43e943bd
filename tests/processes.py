"""Runs builds and commands in processes that can be killed: forked from one that has loaded everything already.

Run as a script it reads jobs from standard input, one JSON object a line, and for each prints the process id of a child
that does it; at the line `wait` it waits for the child and prints its wait status. Use it through `Forks`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """What a child is to do: a build of `tests.fakes.documents`, a function, or a command."""

    path: str = ""
    """Where the memory is built."""
    documents: int = 40
    sentences: int = 6
    encoder: str = "fake"
    """`fake` or `minilm`."""
    commit_chunks: int = 50
    die_at: str = ""
    """module:attribute of a function at whose call the child kills itself …"""
    nth: int = 1
    """… the n-th time."""
    die_after: int = 0
    """After how many calls in treemem and the storage libraries the child kills itself; -1: it prints how many."""
    call: str = ""
    """module:function that is called with `given` instead of a build."""
    given: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    """A command instead of a build."""
    encoder_command: bool = False
    """Whether the command needs the packaged encoder, which is loaded once for all children."""
    without_rights: bool = False
    """Whether the child gives up root's right to read and write whatever it likes."""
    output: str = "/dev/null"
    """Where standard output and error go: two files, with .out and .err put behind this name."""


class Forks:
    """The process that forks, as seen by the tests."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

        self._child = 0

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forking process has ended"
        return line

    def start(self, job: Job) -> None:
        """Start a job; `wait` must follow."""
        if self._child:  # left by a test that failed
            self.signal(signal.SIGKILL)
            self.wait()
        self._say(json.dumps(asdict(job)))
        self._child = int(self._line())
        assert self._child > 1

    def signal(self, number: int) -> None:
        """Send the child a signal. It stays at least as a zombie until `wait`, so its id is no one else's."""
        assert self._child
        os.kill(self._child, number)

    def wait(self) -> int:
        """Exit code of the child; -9 where it was killed."""
        self._say("wait")
        try:
            status = int(self._line())
        except BaseException:  # a test that ran out of time: leave nothing that the next one would read
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._line()
            raise
        finally:
            self._child = 0
        return os.waitstatus_to_exitcode(status)

    def run(self, job: Job) -> int:
        """Start and wait."""
        self.start(job)
        return self.wait()

    def close(self) -> None:
        """End the process, and a child that a failed test left."""
        if self._child:
            self.signal(signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


# ---- the other side


def _give_up_rights() -> None:
    """Drop the capabilities by which root passes over file permissions (Linux)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for word in (0, 1):
        data[word] &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert libc.capset(header, data) == 0


def _die_at(where: str, nth: int) -> None:
    import importlib

    module_name, _, attribute = where.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = attribute.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def _count_calls(last: int) -> Callable[[], int]:
    """Kill this process at the call with this number; other processes that do the same reach the same place."""
    import threading

    counted = ("/treemem/", "/zarr/", "/icechunk/")
    calls = 0

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call") and any(part in frame.f_code.co_filename for part in counted):
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)
    return lambda: calls


def _build(job: Job, loaded: Any) -> None:
    from tests.fakes import FakeEncoder, documents

    from treemem.config import TreeConfig
    from treemem.hierarchy.build import build

    encoder = loaded if job.encoder == "minilm" else FakeEncoder()
    given = documents(job.documents, job.sentences)
    build(Path(job.path), given, encoder, TreeConfig(chunk_tokens=40, fanout=8))


def _child(job: Job, loaded: Any) -> None:
    from treemem.hierarchy import build, memory

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = job.output if job.output == "/dev/null" else f"{job.output}.{name}"
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    build.COMMIT_CHUNKS = job.commit_chunks
    if loaded is not None:
        memory.load_encoder = lambda name: loaded
    if job.without_rights and os.geteuid() == 0:
        _give_up_rights()
    if job.die_at:
        _die_at(job.die_at, job.nth)
    if job.call:
        import importlib

        module, _, name = job.call.partition(":")
        function = getattr(importlib.import_module(module), name)
        counted = _count_calls(job.die_after) if job.die_after else None
        function(*job.given)
        if counted is not None:
            print(counted())
        return
    if not job.arguments:
        _build(job, loaded)
        return
    from treemem.cli import main

    sys.argv = ["treemem", *job.arguments]
    main()


def _warm() -> None:
    """Load what is compiled, which takes longer than most that children do."""
    import numpy as np
    from tests.kernels.trees import random_index, random_queries, random_tree, random_words

    from treemem.kernels import back_end, quantise

    generator, kernels = np.random.default_rng(0), back_end()
    tree = random_tree(generator, 40, dimension=32)
    queries = random_queries(generator, tree, 1)
    for words in (None, random_words(generator, tree, 1)):
        kernels.search(tree, queries, 4, 4, words=words)
    kernels.exact(tree, queries[0], 4)
    index = random_index(generator, 40)
    terms = np.arange(4, dtype=np.int32)
    kernels.bm25_scores(index, terms, np.ones(4, np.float32), terms)
    square = generator.standard_normal((32, 32)).astype(np.float32)
    kernels.project(square[0], *quantise(square), queries[0, 0])


def _serve() -> None:
    import torch

    import treemem.cli
    import treemem.hierarchy.memory  # all that children need is imported once
    import treemem.kernels.cpu  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork
    loaded, warm = None, False
    while line := sys.stdin.readline():
        job = Job(**json.loads(line))
        if loaded is None and (job.encoder == "minilm" or job.encoder_command):
            from treemem.hierarchy.embed import load_encoder

            loaded = load_encoder()
        if (job.call or job.arguments) and not warm:
            _warm()
            warm = True
        child = os.fork()
        if child == 0:
            code = 0
            try:
                _child(job, loaded)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        assert sys.stdin.readline() in ("wait\n", "")
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    _serve()
