"""Documents from files: text, Markdown, reStructuredText, HTML, PDF, JSON Lines and Python source."""

from treemem.hierarchy.readers.documents import KNOWN_SUFFIXES, read
from treemem.hierarchy.readers.python import standard_library
from treemem.hierarchy.readers.report import ReadReport, Unreadable
from treemem.hierarchy.readers.text import clean

__all__ = ["KNOWN_SUFFIXES", "ReadReport", "Unreadable", "clean", "read", "standard_library"]
