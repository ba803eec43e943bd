"""What may import what, what an import costs, and what the project's files may not say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

import treemem
from treemem.types import no_progress

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "treemem"

WORDS = {"errors", "types", "config"}
"""Modules that everything may import and that import nothing but each other."""
LAYERS = ["kernels", "storage", "hierarchy", "training"]
"""Each may import itself and those before it. What is not named here stands on top: evaluation, server, cli, ..."""
TOP = len(LAYERS)


def module_files() -> dict[str, Path]:
    """Every module of treemem by its dotted name."""
    found = {}
    for folder, _, files in os.walk(SOURCE, followlinks=True):
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(SOURCE.parent).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = module_files()


def imports(module: str, source: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module's source imports, at its top or inside functions."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from treemem import storage` imports treemem.storage.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(name: str) -> int:
    """-1 for the shared words, then the place in LAYERS; the rest of treemem stands on top."""
    part = name.split(".")[1] if "." in name else ""
    if part in WORDS:
        return -1
    return LAYERS.index(part) if part in LAYERS else TOP


def forbidden_imports(module: str, source: str, is_package: bool) -> list[str]:
    """Imports that point the wrong way, from lower to higher."""
    wrong = []
    for name in imports(module, source, is_package):
        if name.split(".")[0] in {*LAYERS, "src"}:
            wrong.append(f"{name} (say treemem.{name})")
        elif name.split(".")[0] == "treemem" and name != "treemem.__version__" and layer(name) > layer(module):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    path = MODULES[module]
    wrong = forbidden_imports(module, path.read_text("utf-8"), path.name == "__init__.py")
    assert not wrong, f"{module} imports {', '.join(wrong)}; the order is {' -> '.join(LAYERS)} -> everything else"


@pytest.mark.parametrize(
    ("module", "is_package", "source", "wrong"),
    [
        ("treemem.kernels.cpu", False, "from treemem.storage.image import Image", True),
        ("treemem.kernels.cpu", False, "def f():\n    import treemem.hierarchy.walk", True),
        ("treemem.kernels.cpu", False, "from treemem import storage", True),
        ("treemem.kernels.cpu", False, "from ..storage import image", True),
        ("treemem.kernels", True, "from ..storage import image", True),
        ("treemem.hierarchy.readers.html", False, "from ...training import data", True),
        ("treemem.hierarchy.memory", False, "from treemem import cli", True),
        ("treemem.hierarchy.memory", False, "from treemem import Memory", True),
        ("treemem.storage.store", False, "import kernels", True),
        ("treemem.errors", False, "from treemem.kernels import reference", True),
        ("treemem.kernels.cpu", False, "from treemem.kernels import reference", False),
        ("treemem.kernels.cpu", False, "from .reference import walk", False),
        ("treemem.storage.store", False, "from treemem import __version__", False),
        ("treemem.storage.store", False, "from treemem.errors import StoreError\nimport numpy", False),
        ("treemem.hierarchy.readers", True, "from .html import read\nfrom treemem.storage import store", False),
        ("treemem.cli", False, "from treemem.evaluation import run\nimport treemem.training.train", False),
    ],
)
def test_the_check_itself_tells_right_from_wrong(module: str, is_package: bool, source: str, wrong: bool) -> None:
    assert bool(forbidden_imports(module, source, is_package)) == wrong


def test_all_four_folders_are_linked() -> None:
    for name in LAYERS:
        assert (SOURCE / name).is_symlink(), f"src/treemem/{name} must be a link to ../../{name}"
        assert (SOURCE / name).resolve() == ROOT / name
        assert any(module.startswith(f"treemem.{name}.") for module in MODULES) or not any(
            (ROOT / name).glob("[a-z]*.py")
        )


def test_exported_names() -> None:
    exported = ["Answer", "Document", "Hit", "Memory", "SearchResult", "TreememError", "__version__"]
    assert sorted(treemem.__all__) == exported
    for name in exported:
        assert getattr(treemem, name) is not None
        assert name in dir(treemem)
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", treemem.__version__)
    with pytest.raises(AttributeError, match="no attribute 'Memroy'"):
        treemem.Memroy  # noqa: B018


def test_calls_are_checked_against_signatures_in_tests() -> None:
    # Without this a test of shapes could pass because nothing looks at them.
    with pytest.raises(jaxtyping.TypeCheckError, match="done"):
        no_progress("reading", "half", None)  # type: ignore[arg-type]


HEAVY = ("torch", "transformers", "sentence_transformers", "numba", "zarr", "icechunk", "docutils", "jaxtyping")


def modules_loaded_by(program: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has imported after running a program."""
    program += f"\nimport sys\nprint('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].removeprefix("loaded:").split())


def test_importing_treemem_is_quick() -> None:
    program = "import treemem\nassert issubclass(treemem.TreememError, Exception)"
    assert modules_loaded_by(program) == set()


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\nfrom treemem.cli import main\n"
        "sys.argv = ['treemem', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert modules_loaded_by(program) == set()


# A folder of a person's or a build machine's, at the beginning of a path. `/tmp` and `/usr` are everyone's.
MACHINE_PATH = re.compile(r"(?<![\w.}~-])(?:/(?:home|root|Users|work|workspace|builds)/[\w.-]|[A-Z]:\\Users\\)")


def project_texts() -> list[Path]:
    """The files that are, or are about to be, under version control."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the version control's list of files, and this is no checkout")
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


def test_no_file_names_a_path_of_a_developers_machine() -> None:
    paths = project_texts()
    assert ROOT / "pyproject.toml" in paths
    found = []
    for path in paths:
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if match := MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line[match.start() : match.end() + 40]}")
    assert not found, "paths of one machine:\n" + "\n".join(found)


@pytest.mark.parametrize("place", ["home", "root", "Users", "work"])
def test_machine_paths_are_recognised(place: str) -> None:
    assert MACHINE_PATH.search(f'File "/{place}/someone/x.py"')
    assert not MACHINE_PATH.search(f"see https://example.org/{place}/someone and data/{place}/x")
