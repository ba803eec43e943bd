"""What reading did: counts, and every file or line that gave no document, with its reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_LISTED = 10_000
"""So many failures are kept one by one; the rest are counted, so that a broken corpus cannot fill the memory."""


@dataclass(frozen=True)
class Unreadable:
    """A file, or one line of it, that gave no document."""

    path: str
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        place = self.path if self.line is None else f"{self.path}, line {self.line}"
        return f"{place}: {self.reason}"


@dataclass
class ReadReport:
    """Filled by `read` while documents come out of it; complete once they are all out."""

    documents: int = 0
    """Documents that were read."""
    unreadable: list[Unreadable] = field(default_factory=list)
    """What could not be read, in the order it was met."""
    unlisted: int = 0
    """Further failures beyond the first 10,000, counted only."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files of unknown formats met in folders, by suffix."""
    empty: int = 0
    """Python files that hold no docstring."""
    bytes_total: int = 0
    """Size of all files that are read."""
    bytes_done: int = 0
    """How much of it was read, compressed bytes of compressed files."""

    @property
    def fraction(self) -> float | None:
        """How much was read, from 0 to 1; None where that is not known yet."""
        return min(1.0, self.bytes_done / self.bytes_total) if self.bytes_total else None

    @property
    def failures(self) -> int:
        """How many files and lines could not be read; `--strict` refuses any."""
        return len(self.unreadable) + self.unlisted

    def add(self, failure: Unreadable) -> None:
        """Note one file or line that could not be read."""
        if len(self.unreadable) < MOST_LISTED:
            self.unreadable.append(failure)
        else:
            self.unlisted += 1

    def summary(self, listed: int = 20) -> list[str]:
        """Lines for people: the counts, and the first `listed` failures with their reasons."""
        lines = [f"{self.documents:,} {'document' if self.documents == 1 else 'documents'} read"]
        if self.failures:
            lines.append(f"{self.failures:,} could not be read:")
            lines += [f"  {failure}" for failure in self.unreadable[:listed]]
            more = self.failures - min(listed, len(self.unreadable))
            lines += [f"  and {more:,} more"] if more else []
        if self.skipped:
            lines.append(f"{self.skipped.total():,} skipped, their formats are not known: {self._suffixes()}")
        if self.empty:
            lines.append(f"{self.empty:,} Python {'file' if self.empty == 1 else 'files'} left out: no docstrings")
        return lines

    def _suffixes(self, listed: int = 20) -> str:
        ranked = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{suffix} {count:,}" for suffix, count in ranked[:listed]]
        rest = sum(count for _, count in ranked[listed:])
        return ", ".join([*parts, *([f"others {rest:,}"] if rest else [])])

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "documents": self.documents,
            "unreadable": [asdict(failure) for failure in self.unreadable],
            "unlisted": self.unlisted,
            "skipped": dict(sorted(self.skipped.items())),
            "empty": self.empty,
        }
