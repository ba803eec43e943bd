"""A memory for language models: a tree of embeddings kept outside their weights.

from treemem import Memory

memory = Memory.build("docs/", path="my.memory")
for hit in memory.search("how do I merge sorted files?", k=5):
    print(hit.score, hit.document.title, hit.text)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Threads that wait for each other actively stall wherever other processes want the cores too: one query took 910 ms in
# place of 15 on 2 busy cores. Set here since it is heeded only before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from treemem.errors import TreememError
from treemem.types import Answer, Document, Hit, SearchResult

if TYPE_CHECKING:
    from treemem.hierarchy.memory import Memory

__version__ = "0.1.0"

__all__ = ["Answer", "Document", "Hit", "Memory", "SearchResult", "TreememError", "__version__"]


def __getattr__(name: str) -> Any:
    # Memory brings in torch, which takes seconds: `treemem --help` and `except TreememError` must not wait for it.
    if name == "Memory":
        from treemem.hierarchy.memory import Memory

        return Memory
    raise AttributeError(f"module 'treemem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
