"""Python source: docstrings and signatures, read through `ast`; nothing is ever imported."""

from __future__ import annotations

import ast
import io
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from treemem.errors import InputError
from treemem.hierarchy.readers import layout
from treemem.hierarchy.readers.source import Draft, NotReadable, Source
from treemem.hierarchy.readers.text import with_encoding

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_NOT_PUBLIC = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "__phello__",
        "__pycache__",
    ]
)


def parse(data: bytes, source: Source) -> Draft:
    """A module's docstring, then signature and docstring of its public classes, methods and functions, in order.

    The text is empty where there is no docstring at all. The id is the dotted module path for a module in a package,
    otherwise the source's name without its suffix; the source's name where another module has that id.
    """
    module = _tree(data)
    name = _dotted(source)
    encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0].removesuffix("-sig")
    parts = [ast.get_docstring(module) or "", *_members(module.body, "")]
    text = layout.blocks(parts) if _has_docstring(module) else ""
    return Draft(text, name, name, with_encoding(encoding), other_id=source.name)


def standard_library() -> list[Path]:
    """The source files of the running interpreter's public standard library, sorted.

    Raises:
        InputError: this interpreter came without source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if _is_public(name) and (Path(folder) / name / "__init__.py").is_file()]
        found += [Path(folder) / name for name in files if name.endswith(".py") and _is_public(name)]
    if not found:
        raise InputError(f"{root}: no source files of the standard library there; use a Python that has them")
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _is_public(name: str) -> bool:
    return name == "__init__.py" or not (name.startswith("_") or name in _NOT_PUBLIC or not _is_module(name))


def _is_module(name: str) -> bool:
    return name.removesuffix(".py").isidentifier()


def _tree(data: bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(data)
    except SyntaxError as error:
        raise NotReadable(f"not valid Python ({error.msg})", error.lineno) from None
    except ValueError as error:
        raise NotReadable(f"not valid Python ({error})") from None
    except (RecursionError, MemoryError):
        raise NotReadable("nested too deeply") from None


def _dotted(source: Source) -> str:
    path = Path(os.path.abspath(source.path))
    parts = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder = folder.parent
    in_package = folder != path.parent
    return ".".join(parts) if in_package else source.name.removesuffix(path.suffix)


def _has_docstring(module: ast.Module) -> bool:
    return any(ast.get_docstring(node) for node in [module, *_public(module.body, deep=True)])


def _public(body: list[ast.stmt], deep: bool = False) -> Iterator[ast.ClassDef | _Function]:
    """Public definitions, also those under `if`, `try` and `with`; `deep`: also those inside public classes."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            for branch in _branches(node):
                yield from _public(branch, deep)
        elif isinstance(node, ast.ClassDef | _Function) and _is_shown(node):
            yield node
            if deep and isinstance(node, ast.ClassDef):
                yield from _public(node.body, deep)


def _branches(node: ast.If | ast.Try | ast.With) -> Iterator[list[ast.stmt]]:
    yield node.body
    if isinstance(node, ast.Try):
        yield from (handler.body for handler in node.handlers)
    if not isinstance(node, ast.With):
        yield node.orelse


def _is_shown(node: ast.ClassDef | _Function) -> bool:
    """Public names and constructors; not the overloads and setters that repeat another definition."""
    if node.name.startswith("_") and node.name != "__init__":
        return False
    return not {"overload", "setter", "deleter"} & _decorators(node)


def _decorators(node: ast.ClassDef | _Function) -> set[str]:
    """The last part of each decorator's name: `overload` for `@typing.overload`."""
    return {ast.unparse(item).partition("(")[0].rpartition(".")[2] for item in node.decorator_list}


def _members(body: list[ast.stmt], owner: str) -> Iterator[str]:
    for node in _public(body):
        yield layout.heading(3 if owner and not isinstance(node, ast.ClassDef) else 2, _signature(node, owner))
        yield ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            yield from _members(node.body, f"{owner}{node.name}.")


def _signature(node: ast.ClassDef | _Function, owner: str) -> str:
    name = owner + node.name
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {name}({bases})" if bases else f"class {name}"
    if owner and {"property", "cached_property", "getter"} & _decorators(node):
        return f"{name}{_returns(node)}"
    lead = "" if owner else "def "
    lead = f"async {lead}" if isinstance(node, ast.AsyncFunctionDef) else lead
    return f"{lead}{name}({ast.unparse(_as_called(node.args) if owner else node.args)}){_returns(node)}"


def _returns(node: _Function) -> str:
    return f" -> {ast.unparse(node.returns)}" if node.returns else ""


def _as_called(args: ast.arguments) -> ast.arguments:
    """Without the `self` or `cls` that no caller writes."""
    for group in ("posonlyargs", "args"):
        names: list[ast.arg] = getattr(args, group)
        if names and names[0].arg in ("self", "cls"):
            fields = {name: getattr(args, name) for name in args._fields}
            return ast.arguments(**{**fields, group: names[1:]})
    return args
