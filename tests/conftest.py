"""What all tests share: no network, shapes checked at every call, and where the larger data sets are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from treemem.hierarchy.embed import Encoder
    from treemem.hierarchy.memory import Memory

# Before anything imports a model library: tests use the packaged models and never ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# And threads that wait for each other sleep meanwhile: else tests on a busy machine take many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Where tests run side by side each has one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jaxtyping

ROOT = Path(__file__).resolve().parent.parent


def modules_with_checkable_functions() -> list[str]:
    """Every module of treemem but those that numba compiles: it cannot see through the checking wrapper."""
    names = []
    for folder, _, files in os.walk(ROOT / "src" / "treemem", followlinks=True):
        for file in files:
            path = Path(folder, file)
            # Packages are left out since the hook would take all that lies below them.
            if path.suffix != ".py" or file == "__init__.py":
                continue
            if not re.search(r"^\s*(import|from) numba\b", path.read_text("utf-8"), re.MULTILINE):
                names.append(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    return names


# Types and shapes of every call in the tests are checked against the signatures; an int passes for a float, as it does
# for every other type checker.
TYPE_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook(modules_with_checkable_functions(), TYPE_CHECKER)

# Examples are the same on every run and machine; a slow machine is no failure.
hypothesis.settings.register_profile("treemem", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("treemem")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every tiny product are slow on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that hand over a wrong type on purpose, to see what treemem itself says to it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets, $TREEMEM_DATA; tests that need it are skipped where it is not given."""
    given = os.environ.get("TREEMEM_DATA")
    if not given:
        pytest.skip("needs the larger data sets: set TREEMEM_DATA to their folder")
    folder = Path(given)
    assert folder.is_dir(), f"TREEMEM_DATA = {given}: there is no such folder"
    return folder


@pytest.fixture(scope="session")
def minilm() -> Encoder:
    """The packaged encoder, loaded once."""
    from treemem.hierarchy.embed import load_encoder

    return load_encoder()


@pytest.fixture(scope="session")
def small_memory_path(tmp_path_factory: pytest.TempPathFactory, minilm: Encoder) -> Path:
    """Where the small memory lies. Copy it before changing anything in it."""
    from tests.small import CONFIG, documents

    from treemem.hierarchy.memory import Memory

    path = tmp_path_factory.mktemp("small") / "small.memory"
    Memory.build(documents(), path, encoder=minilm, config=CONFIG)
    return path


@pytest.fixture(scope="session")
def small_memory(small_memory_path: Path, minilm: Encoder) -> Memory:
    """A memory of `tests.small.documents()`, some two hundred chunks in four levels. Read-only."""
    from treemem.hierarchy.memory import Memory

    return Memory.open(small_memory_path, encoder=minilm)
