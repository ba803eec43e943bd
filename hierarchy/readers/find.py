"""Which files the given paths stand for, in a fixed order."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from treemem.errors import InputError
from treemem.hierarchy.readers.report import ReadReport, Unreadable
from treemem.hierarchy.readers.source import Source

_SKIPPED = frozenset({"__pycache__", "node_modules"})


@dataclass(frozen=True)
class Root:
    """One thing to read: a file that was named, or a file or folder that a folder or glob led to."""

    path: Path
    base: Path
    """Names are relative to it."""
    named: bool
    """Whether the user named this very file."""


def resolve(paths: Sequence[str | Path] | str | Path) -> list[Root]:
    """What to read, nothing of it opened yet.

    Raises:
        InputError: no path, an empty one, one that does not exist, a glob that matches nothing.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise InputError("no paths to read: name files, folders or globs")
    roots = list(dict.fromkeys(root for path in given for root in _roots(path)))
    if any(not root.named for root in roots):
        return _told_apart(roots)
    alike: dict[str, list[Root]] = defaultdict(list)
    for root in roots:
        alike[root.path.name].append(root)
    apart = {root: told for group in alike.values() for root, told in zip(group, _told_apart(group), strict=True)}
    return [apart[root] for root in roots]


def _told_apart(roots: list[Root]) -> list[Root]:
    """Roots in several folders get names relative to the folder that these have in common."""
    bases = {os.path.abspath(root.base) for root in roots}
    if len(bases) == 1:
        return roots
    common = Path(os.path.commonpath(bases))
    return [replace(root, base=common) for root in roots]


def _roots(given: str | Path) -> list[Root]:
    if not str(given):
        raise InputError("an empty path: name a file, a folder or a glob")
    path = Path(given)
    if _exists(path):
        return [Root(path, path, False)] if path.is_dir() else [Root(path, path.parent, True)]
    if not glob.has_magic(str(path)):
        raise InputError(f"{shown(path)}: no such file or folder")
    base = _fixed_part(path)
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    kept = [match for match in matches if not any(_is_skipped(part) for part in match.relative_to(base).parts)]
    if not kept:
        raise InputError(f"{shown(path)}: no file or folder matches")
    return [Root(match, base, False) for match in kept]


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in the path
        return False


def _fixed_part(pattern: Path) -> Path:
    """The folders before the first wildcard."""
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def sources(roots: Sequence[Root], report: ReadReport) -> Iterator[Source]:
    """Every file, in order: as given, in folders by name, links after what is really there.

    Hidden entries, `__pycache__` and `node_modules` are passed over; a folder that several ways lead to is walked
    once, so that links cannot make a loop. Folders that cannot be listed go to the report.
    """
    visited: set[str] = set()
    for root in roots:
        for path in _walk(root.path, visited, report):
            name = Path(os.path.relpath(path, root.base))
            yield Source(path, shown(name), shown(path), root.named)


def _walk(root: Path, visited: set[str], report: ReadReport) -> Iterator[Path]:
    pending = [root]
    while pending:
        path = pending.pop()
        if not os.path.isdir(path):
            yield path
            continue
        real = os.path.realpath(path)
        if real in visited:
            continue
        visited.add(real)
        try:
            with os.scandir(path) as entries:
                kept = sorted((e.is_symlink(), e.name) for e in entries if not _is_skipped(e.name))
        except OSError as error:
            report.add(Unreadable(shown(path), reason(error)))
            continue
        pending.extend(path / name for _, name in reversed(kept))


def _is_skipped(name: str) -> bool:
    return (name.startswith(".") and name != "..") or name in _SKIPPED


def reason(error: OSError) -> str:
    """What the system said, for people."""
    if isinstance(error, FileNotFoundError):
        return "no longer there, or a link to nothing"
    return (error.strerror or str(error) or type(error).__name__).lower()


def shown(path: Path) -> str:
    """A path as text that can be stored: bytes that are no UTF-8 become U+FFFD."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")
