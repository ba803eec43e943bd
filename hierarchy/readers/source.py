"""What passes between finding files, parsing them and making documents of them."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_DOCUMENT_BYTES = 256 * 2**20
"""A larger file (or line of a .jsonl file) is refused: it would have to be held whole."""
TOO_LARGE = f"larger than {MAX_DOCUMENT_BYTES // 2**20} MiB, split it into documents"

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotReadable(Exception):
    """Why a file, or one line of it, gives no document."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


@dataclass(frozen=True)
class Source:
    """A file to read."""

    path: Path
    name: str
    """Relative to the folder it was found in, posix; the document's id for most formats."""
    shown: str
    """As the user would name it: the given path, and what follows it."""
    named: bool = False
    """Whether the user named this very file."""


@dataclass(frozen=True)
class Draft:
    """What a parser makes of a file or a line, before it is cleaned."""

    text: str
    title: str = ""
    id: str = ""
    """Empty: the source's name."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = None
    lost: str = ""
    """What of the file had to be left out, for the report."""
    other_id: str = ""
    """For a document whose `id` is taken."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; anything else is refused without ever waiting for it.

    Raises:
        NotReadable: it is a pipe, a socket, a device or a folder.
        OSError: as `open` does.
    """
    _require_regular(os.stat(path).st_mode)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _require_regular(os.fstat(file.fileno()).st_mode)  # it may have been replaced since the first look
    except NotReadable:
        file.close()
        raise
    return file


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotReadable(f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")


def read_bytes(path: Path) -> bytes:
    """The whole content of a regular file of at most `MAX_DOCUMENT_BYTES`."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_DOCUMENT_BYTES:
            raise NotReadable(TOO_LARGE)
        return file.read()
