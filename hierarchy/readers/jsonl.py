"""One JSON object a line: `{"id", "title", "text", ...}`, plain, gzip or Zstandard, always streamed."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from treemem.hierarchy.readers.source import MAX_DOCUMENT_BYTES, TOO_LARGE, Draft, NotReadable, Source, open_regular
from treemem.hierarchy.readers.text import clean, clean_value, detect, with_encoding

_DAMAGE = (EOFError, OSError, zlib.error)
_SAMPLE = 2**20


def records(source: Source, tell: Callable[[int], None] = lambda _: None) -> Iterator[Draft | NotReadable]:
    """A draft for each good line, and for each bad one the reason; both carry their line's number.

    `tell` is given the place in the file (compressed, where it is) after each line.

    `_id` serves as `id`; without either, the id is `<name>:<line>`. Keys beside id, title and text are metadata.
    Damage of the compressed stream ends it: what came before is kept, the reason comes last.

    Raises:
        OSError, NotReadable: the file cannot be opened, or is not text.
    """
    encoding = _encoding(source)
    file = open_regular(source.path)
    with _unpacked(source, file) as stream:
        number = 0
        try:
            for number, line in enumerate(_lines(stream, encoding), 1):
                tell(file.tell())
                if line is None or line.strip():
                    yield _record(line, number, encoding, source)
        except _DAMAGE as error:
            yield NotReadable(f"damaged or cut short ({error}); the lines before are kept", number + 1)


def _record(line: bytes | None, number: int, encoding: str, source: Source) -> Draft | NotReadable:
    try:
        if line is None:
            raise NotReadable(TOO_LARGE)
        return _draft(_object(line, encoding), f"{source.name}:{number}", number, with_encoding(encoding))
    except NotReadable as error:
        return NotReadable(error.reason, number)


def _object(line: bytes, encoding: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode(_narrow(encoding)), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise NotReadable(f"not {encoding.upper()} text") from None
    except json.JSONDecodeError as error:
        raise NotReadable(f"not JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:  # numbers of thousands of digits
        raise NotReadable(f"not usable JSON ({error})") from None
    except RecursionError:
        raise NotReadable("nested too deeply") from None
    if not isinstance(value, dict):
        raise NotReadable("not a JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise NotReadable(f"not JSON ({name} is not a JSON number)")


def _draft(record: dict[str, Any], fallback_id: str, number: int, extra: dict[str, str]) -> Draft:
    text = record.pop("text", None)
    if not isinstance(text, str):
        raise NotReadable('no "text"' if text is None else '"text" is not a string')
    title = record.pop("title", None) or ""
    if not isinstance(title, str):
        raise NotReadable('"title" is not a string')
    identity, second = record.pop("id", None), record.pop("_id", None)
    chosen = second if identity is None else identity
    if isinstance(chosen, bool) or not isinstance(chosen, str | int | None):
        raise NotReadable('"id" is neither a string nor a whole number')
    name = clean("" if chosen is None else str(chosen)).strip()
    return Draft(text, title, name or fallback_id, {**_metadata(record), **extra}, number)


def _metadata(record: dict[str, Any]) -> dict[str, Any]:
    """The remaining keys; a nested `metadata` object is laid flat, `source` makes way for the path of the file."""
    nested = record.get("metadata")
    if isinstance(nested, dict):
        del record["metadata"]
        record = {**nested, **record}
    try:
        cleaned = cast(dict[str, Any], clean_value(record))
    except RecursionError:
        raise NotReadable("nested too deeply") from None
    if "source" in cleaned:
        cleaned["record_source"] = cleaned.pop("source")
    return cleaned


def _narrow(encoding: str) -> str:
    """The encoding of what `_lines` gives: UTF-16 and UTF-32 cannot be cut at the byte of a line end."""
    return "utf-8" if _is_wide(encoding) else encoding


def _is_wide(encoding: str) -> bool:
    return encoding.startswith(("utf-16", "utf-32"))


def _lines(stream: io.BufferedIOBase, encoding: str) -> Iterator[bytes | None]:
    """Lines as bytes; None for one that is too long to hold."""
    if _is_wide(encoding):
        for text in io.TextIOWrapper(cast(IO[bytes], stream), encoding, errors="replace", newline="\n"):
            yield text.encode("utf-8", "replace")
        return
    first = True
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        if len(line) <= MAX_DOCUMENT_BYTES:
            yield line.removeprefix(b"\xef\xbb\xbf") if first else line
        else:
            while line and not line.endswith(b"\n"):
                line = stream.readline(_SAMPLE)
            yield None
        first = False


def _encoding(source: Source) -> str:
    """Judged by the first megabyte, in a pass of its own because damage further on must not lose lines."""
    sample = b""
    with _unpacked(source, open_regular(source.path)) as stream:
        try:
            while len(sample) < _SAMPLE and (piece := stream.read1(2**16)):
                sample += piece
        except _DAMAGE:
            pass  # met again, and reported, when the lines are read
    return detect(sample) if sample else "utf-8"


def _unpacked(source: Source, file: io.BufferedReader) -> io.BufferedIOBase:
    """What the file holds; closing it closes the file."""
    name = source.path.name.lower()
    if name.endswith(".gz"):
        return _Gzip(file)
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(file), 2**17)
    return file


class _Gzip(gzip.GzipFile):
    """Closes the file below it, which GzipFile leaves open when it was handed in."""

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class _Zstandard(io.RawIOBase):
    """Frames one after the other; unlike zstandard's own stream reader it notices a stream that was cut short."""

    _PIECE = 2**10  # so little at a time that the most compressible input stays within some 32 MB of output

    def __init__(self, file: io.BufferedReader) -> None:
        import zstandard

        self._file = file
        self._error = zstandard.ZstdError
        self._frames = zstandard.ZstdDecompressor()
        self._frame = self._frames.decompressobj()
        self._inside = False
        self._left = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._left or self._file.read(self._PIECE)
            self._left = b""
            if not piece:
                if self._inside:
                    raise EOFError("the compressed stream ends in the middle")
                return 0
            self._ready = memoryview(self._decompress(piece))
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken

    def _decompress(self, piece: bytes) -> bytes:
        try:
            out = self._frame.decompress(piece)
        except self._error as error:
            raise OSError(str(error)) from None
        self._inside = not self._frame.eof
        if self._frame.eof:
            self._left = self._frame.unused_data
            self._frame = self._frames.decompressobj()
        return out

    def close(self) -> None:
        self._file.close()
        super().close()
