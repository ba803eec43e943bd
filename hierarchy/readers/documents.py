"""From paths to documents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from treemem.errors import InputError
from treemem.hierarchy.readers import find, html, jsonl, markdown, pdf, plain, python, rst
from treemem.hierarchy.readers.report import ReadReport, Unreadable
from treemem.hierarchy.readers.source import Draft, NotReadable, Source, read_bytes
from treemem.hierarchy.readers.text import clean, clean_line
from treemem.types import Document

_PARSERS: dict[str, Callable[[bytes, Source], Draft]] = {
    ".txt": plain.parse,
    ".text": plain.parse,
    ".md": markdown.parse,
    ".markdown": markdown.parse,
    ".rst": rst.parse,
    ".html": html.parse,
    ".htm": html.parse,
    ".pdf": pdf.parse,
    ".py": python.parse,
}
_LINES = tuple(suffix + packed for suffix in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst"))
KNOWN_SUFFIXES = (*_PARSERS, *_LINES)
"""Suffixes of the formats that `read` knows, upper or lower case."""

_KNOWN = "known are " + " ".join(KNOWN_SUFFIXES)
_NO_TEXT = "no text"


def read(paths: Sequence[str | Path] | str | Path, report: ReadReport) -> Iterator[Document]:
    """The documents of files, folders (walked recursively) and globs, one at a time, always in the same order.

    A document's id is its path relative to the folder it was found in, or to what several folders have in common; its
    file's name where it was named itself; for JSON Lines what the line says; for Python the module's dotted path, or
    the file's path where an earlier module has that. A file that several paths lead to is read once. `report` is
    filled on the way.

    Raises:
        InputError: at once, before anything is read, for a path that does not exist; at the end where nothing was
            readable.
    """
    return _documents(find.resolve(paths), report)


def _documents(roots: list[find.Root], report: ReadReport) -> Iterator[Document]:
    before = report.documents
    report.bytes_total += sum(_size(source) for source in _fresh(find.sources(roots, ReadReport()), ReadReport()))
    ids: dict[bytes, str] = {}  # digests, because a corpus may have a hundred million ids
    for source in _fresh(find.sources(roots, report), report):
        tell = partial(_reached, report, report.bytes_done)
        for item in _items(source, tell):
            try:
                document = _document(item, source, ids)
            except NotReadable as error:
                _note(error, source, report)
            else:
                report.documents += 1
                yield document
                del document
            del item  # one document at a time: not this one while the next is read
        tell(_size(source))
    if report.documents == before:
        raise InputError(_nothing(roots, report))


def _reached(report: ReadReport, before: int, position: int) -> None:
    report.bytes_done = before + position


def _size(source: Source) -> int:
    try:
        return os.stat(source.path).st_size
    except OSError:
        return 0


def _fresh(sources: Iterator[Source], report: ReadReport) -> Iterator[Source]:
    """Files of known formats, each once; the others go to the report."""
    met: set[bytes] = set()
    for source in sources:
        if not source.path.name.lower().endswith(KNOWN_SUFFIXES):
            _unknown(source, report)
            continue
        digest = _digest(os.fsencode(os.path.realpath(source.path)))
        if digest not in met:
            met.add(digest)
            yield source


def _unknown(source: Source, report: ReadReport) -> None:
    if source.named:
        report.add(Unreadable(source.shown, f"of an unknown format; {_KNOWN}"))
        return
    path = PurePosixPath(source.name.lower())
    packed = path.suffix in (".gz", ".zst", ".bz2", ".xz")
    suffix = "".join(path.suffixes[-2:]) if packed else path.suffix
    report.skipped[suffix or "(none)"] += 1


class _Empty(NotReadable):
    """A Python file without docstrings: common, and no failure."""


def _items(source: Source, tell: Callable[[int], None]) -> Iterator[Draft | NotReadable]:
    """What a file holds, or why it could not be read; `tell` is given the place that was reached in the file."""
    any_item = False
    try:
        for item in _parsed(source, tell):
            any_item = True
            yield item
            del item
    except NotReadable as error:
        yield error
    except OSError as error:
        yield NotReadable(find.reason(error))
    except MemoryError:
        yield NotReadable("too large for the memory of this machine")
    except Exception as error:  # parsers are large and files are wild: one of them must not end a long build
        yield NotReadable(f"its parser failed ({type(error).__name__}: {clean_line(str(error))[:200]})")
    else:
        if not any_item:
            yield NotReadable(_NO_TEXT)


def _parsed(source: Source, tell: Callable[[int], None]) -> Iterator[Draft | NotReadable]:
    name = source.path.name.lower()
    if name.endswith(_LINES):
        yield from jsonl.records(source, tell)
        return
    suffix = os.path.splitext(name)[1] or name  # a file called just ".md"
    item = _single(source, _PARSERS[suffix])
    tell(_size(source))
    yield item
    if isinstance(item, Draft) and item.lost:
        yield NotReadable(item.lost)


def _single(source: Source, parse: Callable[[bytes, Source], Draft]) -> Draft | NotReadable:
    data = read_bytes(source.path)
    is_python = parse is python.parse
    draft = parse(data, source) if data.strip() else Draft("")
    if is_python and not draft.text:
        return _Empty("no docstrings")
    return replace(draft, title=draft.title or source.path.stem, id=draft.id or source.name)


def _document(item: Draft | NotReadable, source: Source, ids: dict[bytes, str]) -> Document:
    if isinstance(item, NotReadable):
        raise item
    text = clean(item.text)
    if not text.strip():
        raise NotReadable(_NO_TEXT, item.line)
    identity = clean(item.id)
    digest = _digest(identity.encode())
    if digest in ids and item.other_id:
        identity = clean(item.other_id)
        digest = _digest(identity.encode())
    if digest in ids:
        raise NotReadable(f'its id "{identity[:200]}" is already used by {ids[digest]}', item.line)
    ids[digest] = source.shown
    return Document(identity, text, clean_line(item.title), {**item.metadata, "source": source.shown})


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _note(error: NotReadable, source: Source, report: ReadReport) -> None:
    if isinstance(error, _Empty):
        report.empty += 1
    else:
        report.add(Unreadable(source.shown, error.reason, error.line))


def _nothing(roots: list[find.Root], report: ReadReport) -> str:
    places = ", ".join(find.shown(root.path) for root in roots[:3]) + (", …" if len(roots) > 3 else "")
    found = [str(report.unreadable[0])] if report.unreadable else []
    found += report.summary(listed=0)[1:]
    return f"{places}: nothing readable there ({'; '.join([*found, _KNOWN])})"
