"""The values that treemem returns."""

from __future__ import annotations

from treemem.types import DocumentRef, Hit, SearchResult


def test_a_result_is_iterated_over_its_hits() -> None:
    hits = tuple(Hit(1.0 / (n + 1), DocumentRef(str(n), ""), (0, 1), "x", (), n) for n in range(3))
    result = SearchResult("q", hits, (), 0, 0.0)
    assert list(result) == list(hits)
    assert len(result) == 3
    assert len(SearchResult("q", (), (), 0, 0.0)) == 0
