"""From bytes to text: which encoding, and what every stored text goes through."""

from __future__ import annotations

import codecs
import io
from typing import Any

from treemem.hierarchy.readers.source import NotReadable

_BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\b\x1b"))
_ASCII = bytes(range(128))
_SAMPLE = 2**18
_SHIFT_JIS = ["shift_jis", "shift_jis_2004", "shift_jisx0213", "cp932"]
NOT_TEXT = "not text"


def clean(text: str) -> str:
    """The one form in which text is stored; character spans refer to it.

    Line ends become `\\n`, byte order marks in front go, NUL becomes a space, halves of surrogate pairs are
    joined or replaced by U+FFFD. So the result always encodes to UTF-8, and `clean(clean(x)) == clean(x)`.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.lstrip("\ufeff")


def clean_line(text: str) -> str:
    """`clean`, with every run of white space made one space: for titles."""
    return " ".join(clean(text).split())


def clean_value(value: Any) -> Any:
    """`clean` for every string, keys too, of a value that came from JSON."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(str(key)): clean_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean_value(item) for item in value]
    return value


def decode(data: bytes, declared: str | None = None) -> tuple[str, str]:
    """Text and the name of the encoding that it was in.

    A byte order mark decides; then strict UTF-8, then what the file declares of itself (`declared`), then detection.
    A declaration does not win over valid UTF-8, unless the bytes are plain ASCII and so say nothing.

    Raises:
        NotReadable: the bytes are not text.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _checked(data[len(mark) :] if encoding == "utf-8" else data, encoding)
    if wide := _wide(data):
        return _checked(data, wide)
    _refuse_binary(data, 0.1)
    text = _strict(data, "utf-8")
    if declared and (text is None or data.isascii()):
        by_declaration = _strict(data, declared)
        if by_declaration is not None:
            return by_declaration, declared
    return (text, "utf-8") if text is not None else _detected(data)


def detect(data: bytes) -> str:
    """The name of the encoding that a sample of a longer stream is in; it may end in the middle of a character."""
    return decode(data[: data.rfind(b"\n") + 1] or data)[1]


def with_encoding(encoding: str) -> dict[str, str]:
    """The metadata entry for an encoding; nothing for UTF-8."""
    return {} if encoding == "utf-8" else {"encoding": encoding}


def _strict(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except (UnicodeError, LookupError):
        return None


def _checked(data: bytes, encoding: str) -> tuple[str, str]:
    """Decode what was recognised by its pattern; damage becomes U+FFFD, too much of it is no text."""
    text = data.decode(encoding, "replace")
    if text.count("\ufffd") > 1 + len(text) // 10:
        raise NotReadable(NOT_TEXT)
    return text, encoding


def _wide(data: bytes) -> str | None:
    """UTF-16 without a mark: the zero bytes of its many ASCII characters stand all on one side."""
    sample = data[: 2**16]
    even, odd, pairs = sample[0::2].count(0), sample[1::2].count(0), len(sample) // 2
    if pairs and min(even, odd) <= pairs // 50 and max(even, odd) >= 0.3 * pairs:
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _refuse_binary(data: bytes, share: float) -> None:
    """A text may hold a stray control character, not many; compressed data is one ninth control characters."""
    if len(data) - len(data.translate(None, _CONTROLS)) > 1 + share * len(data):
        raise NotReadable(NOT_TEXT)


def _detected(data: bytes) -> tuple[str, str]:
    repaired = data.decode("utf-8", "replace")
    bad = repaired.count("\ufffd") - data.count("\ufffd".encode())
    good = len(repaired) - len(repaired.encode("ascii", "ignore")) - bad
    if 10 * bad <= good:  # UTF-8 with a damaged byte: everything else would spoil all its other characters
        return repaired, "utf-8"
    _refuse_binary(data, 0.02)
    encoding = _guess(_telling(data))
    return _checked(data, encoding)


def _telling(data: bytes) -> bytes:
    """The lines with anything but ASCII, a sample of them: only these tell one encoding from another."""
    lines: list[bytes] = []
    size = 0
    for line in io.BytesIO(data):
        if not line.isascii():
            start = len(line) - len(line.lstrip(_ASCII))
            lines.append(line[max(0, start - 200) : start + _SAMPLE])
            size += len(lines[-1])
            if size >= _SAMPLE:
                break
    return b"".join(lines)


def _half_width_share(text: str) -> float:
    return sum("\uff61" <= character <= "\uff9f" for character in text) / max(1, len(text))


def _guess(sample: bytes) -> str:
    from charset_normalizer import from_bytes

    matches = from_bytes(sample)
    best = matches.best()
    if best is not None and _half_width_share(str(best)) > 0.3:  # no one writes so; what looks so is KOI8-R
        matches = from_bytes(sample, cp_exclusion=_SHIFT_JIS)
        best = matches.best()
    if best is None:
        raise NotReadable(NOT_TEXT)
    # Short western text fits a dozen encodings equally well; by far the most common of them is Windows-1252.
    for match in matches:
        likely = match.chaos <= best.chaos + 0.02 and match.coherence >= best.coherence - 0.1
        if likely and "cp1252" in match.could_be_from_charset and _strict(sample, "cp1252") is not None:
            return "cp1252"
    return best.encoding
