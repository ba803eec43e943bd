"""How structure is written as plain text, the same for every format: headings, lists, code, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def blocks(parts: Iterable[str]) -> str:
    """Blocks one below the other, a blank line between them; empty ones left out."""
    return "\n\n".join(part for part in parts if part.strip())


def lines(parts: Iterable[str]) -> str:
    """The same without blank lines between them, as in a list."""
    return "\n".join(part for part in parts if part.strip())


def heading(level: int, text: str) -> str:
    """A heading line, `## text`; nothing for an empty heading."""
    return f"{'#' * min(max(level, 1), 6)} {text}" if text.strip() else ""


def hang(marker: str, body: str, following: str | None = None) -> str:
    """`body` behind a marker, its further lines indented as far (or led by `following`)."""
    if not body.strip():
        return ""
    lead = " " * len(marker) if following is None else following
    first, *rest = body.split("\n")
    return "\n".join([marker + first, *((lead + line).rstrip() for line in rest)])


def code(text: str) -> str:
    """A block of code, indented by four spaces."""
    return hang("    ", text.strip("\n").expandtabs(4))


def table(rows: Iterable[Sequence[str]]) -> str:
    """One line per row, its cells between bars."""
    return lines(" | ".join(" ".join(cell.split()) for cell in row).strip(" |") for row in rows)
