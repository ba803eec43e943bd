"""Plain text."""

from __future__ import annotations

from treemem.hierarchy.readers.source import Draft, Source
from treemem.hierarchy.readers.text import decode, with_encoding


def parse(data: bytes, source: Source) -> Draft:
    """The text as it stands."""
    text, encoding = decode(data)
    return Draft(text, metadata=with_encoding(encoding))
