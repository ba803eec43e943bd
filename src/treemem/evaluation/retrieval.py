"""What each mode of search finds in an evaluation set, how fast, and how much a walk loses on its way down."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float64, Int32, Int64

from treemem.config import MODES, Mode, SearchConfig
from treemem.errors import InputError
from treemem.evaluation.ancestors import Ancestors
from treemem.evaluation.dataset import EvalQuery, EvalSet, text_digest
from treemem.evaluation.metrics import document_ranking, hit_at_k, ndcg_at_k, percentile, recall_at_k, right_chunks
from treemem.evaluation.report import EvalReport, LevelRecall, ModeFigures, SourceFigures
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.walk import EmbeddedQuery, Scope, Searcher
from treemem.types import Progress, Span, no_progress

RANK_FUSION = "rrf"
"""Extra mode, for comparison only: reciprocal rank fusion of exact search and BM25, the best 256 of each."""
MODE_NAMES = (*MODES, RANK_FUSION)
DEFAULT_MODES = ("bm25", "exact", "walk", "hybrid", "exact+bm25", "deep")

HITS = 10
"""Hits of the search that is timed and judged."""
RANKED_DOCUMENTS = 100
"""How many documents are ranked for nDCG@10, recall@10 and recall@100."""
FIRST_CHUNKS = 1000
"""How many chunks are asked for at first to rank so many documents; four times as many until they suffice."""
FUSION_OFFSET = 60
ENCODED_ALONE = 32
"""So many queries are encoded one by one, to time it; the others in batches."""
QUERY_BATCH = 64
_WALKS = {"walk", "hybrid", "deep"}


class _Found(NamedTuple):
    """What one mode found for one query; the order of `ModeFigures`."""

    hit_1: float
    hit_10: float
    ndcg_10: float
    recall_10: float
    recall_100: float
    scored: float
    ms: float


@dataclass(frozen=True)
class _Judged:
    """A query with its judgements by the memory's own numbers of documents."""

    query: EmbeddedQuery
    grades: Mapping[int, int]
    ideal: tuple[int, ...]
    evidence: Mapping[int, Sequence[Span]] | None
    within: frozenset[str] | None


def evaluate(
    memory: Memory,
    eval_set: EvalSet,
    modes: Sequence[str] = DEFAULT_MODES,
    *,
    beam: int = 32,
    decoder: bool = True,
    within_document: bool = False,
    max_queries: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> EvalReport:
    """Search for every query in every mode and judge what is found.

    What is timed is one search for 10 hits at a time, as a user makes it, the encoding of the query left out; in mode
    `deep` it includes the query's token states, and chunks that an earlier query met may have theirs in the cache.
    Documents are ranked afterwards, untimed, by their best chunks among as many chunks as it takes for 100 documents:
    `exact`, `exact+bm25` and `bm25` rank all that match, `walk`, `hybrid` and `deep` what the walk met (and BM25's
    best), `rrf` the two lists of 256; so recall@100 of the latter is bounded by their candidates.

    Args:
        memory: holds the set's corpus.
        eval_set: the queries and what is right for them.
        modes: modes of search, and `rrf`.
        beam: how many nodes a walk keeps per level.
        decoder: whether a trained decoder ranks the best candidates anew, where the memory has one.
        within_document: search each query only in its relevant documents; queries that are judged by documents are
            left out then, since every chunk would be right, and so are figures over documents.
        max_queries: at most so many, drawn at random.
        seed: of the drawing.
        progress: told how many queries were searched for.

    Raises InputError for an unknown mode, settings out of range, or a memory that does not hold the set's documents.
    """
    modes = checked_modes(modes)
    config = SearchConfig(k=HITS, beam=beam, decoder=decoder)
    queries = [query for query in eval_set.queries if not (within_document and query.judged_by == "documents")]
    left_out = {"without_qrels": eval_set.without_qrels, "nothing_to_find": len(eval_set.queries) - len(queries)}
    if not queries:
        raise InputError(f"{eval_set.folder}: no query has evidence or sections to find within its document")
    drawn = replace(eval_set, queries=tuple(queries)).sample(max_queries, seed)
    check_memory(memory, drawn)
    searcher = _searcher(memory, modes)
    embedded, encode_ms = _embed(searcher, drawn.queries, progress)
    judged = [_judged(memory, q, e, within_document) for q, e in zip(drawn.queries, embedded, strict=True)]
    trial = _Trial(searcher, judged, config, within_document)
    found = {mode: trial.run(mode, progress) for mode in modes}
    levels = trial.levels(progress) if _WALKS & set(modes) else ()
    info = memory.info()
    return EvalReport(
        set=eval_set.name,
        split=eval_set.split,
        documents=info.documents,
        chunks=info.chunks,
        queries=len(judged),
        left_out=left_out,
        judged_by=dict(Counter(query.judged_by for query in drawn.queries)),
        modes={mode: _figures(rows, within_document) for mode, rows in found.items()},
        per_level_recall=levels,
        by_source=_by_source(drawn.queries, found, within_document),
        encode_ms=encode_ms,
        settings={
            "memory": info.path,
            "snapshot": info.snapshot,
            "encoder": info.encoder,
            "tree": asdict(info.config),
            "search": {key: value for key, value in asdict(config).items() if key != "mode"},
            "within_document": within_document,
            "max_queries": max_queries,
            "seed": seed,
        },
        notes=_notes(eval_set, left_out, info.documents, modes),
    )


def checked_modes(modes: Sequence[str]) -> tuple[str, ...]:
    """The modes, each once.

    Raises InputError for an unknown one.
    """
    for mode in modes:
        if mode not in MODE_NAMES:
            raise InputError(f"mode = {mode!r}: it must be one of {', '.join(MODE_NAMES)}")
    return tuple(dict.fromkeys(modes))


def rank_fusion(
    rankings: Sequence[Int32[np.ndarray, " _"]],
) -> tuple[Int32[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): the sum of 1 / (60 + rank), rank from 1.

    Args:
        rankings: chunks, best first.

    Returns:
        Chunks, best first, ties by the smaller chunk, with their sums.
    """
    chunks = np.concatenate(rankings)
    parts = np.concatenate([1 / (FUSION_OFFSET + np.arange(1, len(ranking) + 1)) for ranking in rankings])
    unique, places = np.unique(chunks, return_inverse=True)
    sums = np.bincount(places, parts, len(unique))
    order = np.lexsort((unique, -sums))
    return unique[order].astype(np.int32), sums[order].astype(np.float64)


# ---- before the searches


def _searcher(memory: Memory, modes: Sequence[str]) -> Searcher:
    if set(modes) - {"bm25"}:
        return memory.searcher
    config = memory.info().config
    return Searcher(memory.image, None, config.chunk_tokens, config.language)


def check_memory(memory: Memory, eval_set: EvalSet) -> None:
    """Raise InputError unless the memory holds the documents that the queries are about, with the same texts."""
    place = memory.store.path
    wanted = {document for query in eval_set.queries for document in (*query.relevant, *query.spans)}
    for document in sorted(wanted & set(eval_set.text_digests)):
        number = memory.image.number_of(document)
        if number is None:
            raise InputError(
                f"{place}: it does not hold document {document!r} of {eval_set.folder}; name another memory"
            )
        if text_digest(memory.image.text(number)) != eval_set.text_digests[document]:
            raise InputError(
                f"{place}: document {document!r} has another text than in {eval_set.folder}; build it again"
            )


def _embed(searcher: Searcher, queries: Sequence[EvalQuery], progress: Progress) -> tuple[list[EmbeddedQuery], float]:
    """All queries, encoded once, and the median milliseconds of encoding one."""
    texts = [query.text for query in queries]
    if searcher.encoder is None:
        return [EmbeddedQuery(text, np.empty((0, 0), np.float32), ()) for text in texts], 0.0
    out: list[EmbeddedQuery] = []
    times = []
    for text in texts[:ENCODED_ALONE]:
        start = time.perf_counter()
        out += searcher.embed([text])
        times.append((time.perf_counter() - start) * 1000)
    for start_at in range(ENCODED_ALONE, len(texts), QUERY_BATCH):
        progress("encoding queries", start_at, len(texts))
        out += searcher.embed(texts[start_at : start_at + QUERY_BATCH])
    progress("encoding queries", len(texts), len(texts))
    return out, percentile(times, 50)


def _judged(memory: Memory, query: EvalQuery, embedded: EmbeddedQuery, within_document: bool) -> _Judged:
    numbers = {document: memory.image.number_of(document) for document in (*query.relevant, *query.spans)}
    grades = {n: grade for document, grade in query.relevant.items() if (n := numbers[document]) is not None}
    evidence = {n: spans for document, spans in query.spans.items() if (n := numbers[document]) is not None}
    within = frozenset(d for d in query.relevant if numbers[d] is not None) if within_document else None
    by_spans = query.judged_by != "documents"
    return _Judged(embedded, grades, tuple(query.relevant.values()), evidence if by_spans else None, within)


# ---- the searches


class _Trial:
    """Judged queries against one searcher."""

    def __init__(self, searcher: Searcher, queries: Sequence[_Judged], config: SearchConfig, inside: bool) -> None:
        self.searcher = searcher
        self.image = searcher.image
        self.queries = queries
        self.config = config
        self.inside = inside
        # A few, because each is as long as there are chunks, and neighbouring queries tend to be about one document.
        self._cached_scope = lru_cache(64)(searcher.scope)

    def scope(self, query: _Judged) -> Scope | None:
        """What the search is restricted to; made before the clock runs."""
        return None if query.within is None else self._cached_scope(query.within)

    def run(self, mode: str, progress: Progress) -> Float64[np.ndarray, "queries 7"]:
        """A row of `_Found` per query."""
        stage = f"searching: {mode}"
        # The first search of a kind compiles kernels. Deep's first query must not find its chunks in the cache.
        self._search("hybrid" if mode == "deep" else mode, self.queries[0])
        rows = []
        for done, query in enumerate(self.queries):
            if done % 16 == 0:
                progress(stage, done, len(self.queries))
            top, scored, ms = self._search(mode, query)
            rows.append(self._found(mode, query, top, scored, ms))
        progress(stage, len(self.queries), len(self.queries))
        return np.array(rows, np.float64)

    def _search(self, mode: str, query: _Judged) -> tuple[Int32[np.ndarray, " _"], int, float]:
        """The best 10 chunks, how many vectors were scored, and the milliseconds it took."""
        scope = self.scope(query)
        if mode == RANK_FUSION:
            start = time.perf_counter()
            chunks = self._fused(query, scope)[:HITS]
            return chunks, self.image.chunks, (time.perf_counter() - start) * 1000
        result = self.searcher.search_one(query.query, replace(self.config, mode=cast(Mode, mode)), scope)
        return np.array([hit.chunk for hit in result.hits], np.int32), result.scored, result.ms

    def _fused(self, query: _Judged, scope: Scope | None) -> Int32[np.ndarray, " _"]:
        k = self.config.bm25_candidates
        dense = self.searcher.rank(query.query, replace(self.config, mode="exact", k=k, decoder=False), scope)
        lexical = self.searcher.rank(query.query, replace(self.config, mode="bm25", k=k), scope)
        return rank_fusion([dense.chunks, lexical.chunks])[0]

    def _found(self, mode: str, query: _Judged, top: Int32[np.ndarray, " _"], scored: int, ms: float) -> _Found:
        documents = self.image.document_of(top)
        right = right_chunks(documents, self.image.spans[top, :2], query.grades, query.evidence)
        hits = hit_at_k(right, 1), hit_at_k(right, HITS)
        if self.inside:
            return _Found(*hits, 0, 0, 0, scored, ms)
        ranking = self._documents(mode, query)
        total = len(query.ideal)
        return _Found(
            *hits,
            ndcg_at_k(ranking, query.grades, query.ideal, 10),
            recall_at_k(ranking, query.grades, total, 10),
            recall_at_k(ranking, query.grades, total, RANKED_DOCUMENTS),
            scored,
            ms,
        )

    def _documents(self, mode: str, query: _Judged) -> Int64[np.ndarray, " _"]:
        """At least 100 documents by their best chunks, fewer where the mode ranks fewer."""
        k = FIRST_CHUNKS
        while True:
            chunks = self._chunks(mode, query, k)
            documents = document_ranking(self.image.document_of(chunks))
            if mode not in ("exact", "bm25") or len(documents) >= RANKED_DOCUMENTS or len(chunks) < k:
                return documents
            k *= 4

    def _chunks(self, mode: str, query: _Judged, k: int) -> Int32[np.ndarray, " _"]:
        scope = self.scope(query)
        if mode == RANK_FUSION:
            return self._fused(query, scope)
        config = replace(self.config, mode=cast(Mode, mode), k=k)
        ranked = self.searcher.rank(query.query, config, scope).chunks
        if mode != "deep":
            return ranked
        # The chunks' token states are in the cache by now, so this encodes only the query's own once more.
        again = self.searcher.search_one(query.query, replace(config, k=config.deep_candidates), scope)
        first = np.array([hit.chunk for hit in again.hits], np.int32)
        return np.concatenate([first, ranked[~np.isin(ranked, first)]])

    # ---- the walk, level by level

    def levels(self, progress: Progress) -> tuple[LevelRecall, ...]:
        """Of every level, top first: how much of exact search's best chunks by cosines the walk still holds there."""
        tree = self.image.tree
        ancestors = Ancestors(tree)
        cosines = replace(self.config, decoder=False)
        rows: list[list[tuple[float, float, float]]] = []
        for done, query in enumerate(self.queries):
            if done % 16 == 0:
                progress("walk against exact", done, len(self.queries))
            scope = self.scope(query)
            best = self.searcher.rank(query.query, replace(cosines, mode="exact"), scope).chunks[:HITS]
            if len(best) == 0:  # an empty query
                continue
            ranked = self.searcher.rank(query.query, replace(cosines, mode="walk"), scope)
            kept = [*ranked.walked.nodes[:, 0], ranked.chunks]
            rows.append(ancestors.held(best, [elements[elements >= 0] for elements in kept]))
        progress("walk against exact", len(self.queries), len(self.queries))
        if not rows:
            return ()
        means = np.array(rows).mean(0)  # (levels, 3)
        return tuple(
            LevelRecall(tree.depth - i, int(tree.sizes[i]), *(float(mean) for mean in means[i]))
            for i in range(tree.depth)
        )


# ---- after the searches


def _figures(rows: Float64[np.ndarray, "queries 7"], inside: bool) -> ModeFigures:
    means = _Found(*(float(mean) for mean in rows.mean(0)))
    times = rows[:, -1]
    return ModeFigures(
        hit_1=means.hit_1,
        hit_10=means.hit_10,
        ndcg_10=None if inside else means.ndcg_10,
        recall_10=None if inside else means.recall_10,
        recall_100=None if inside else means.recall_100,
        scored=means.scored,
        ms_p50=percentile(times, 50),
        ms_p95=percentile(times, 95),
    )


def _by_source(
    queries: Sequence[EvalQuery], found: Mapping[str, Float64[np.ndarray, "queries 7"]], inside: bool
) -> dict[str, SourceFigures]:
    """Figures of each source, where the queries come from more than one."""
    sources = np.array([query.source or "-" for query in queries])
    names = sorted(set(sources.tolist()))
    if len(names) < 2 or not found:
        return {}
    out = {}
    for name in names:
        own = sources == name
        out[name] = SourceFigures(int(own.sum()), {mode: _figures(rows[own], inside) for mode, rows in found.items()})
    return out


def _notes(eval_set: EvalSet, left_out: Mapping[str, int], documents: int, modes: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if left_out["without_qrels"]:
        notes.append(f"{left_out['without_qrels']:,} queries without relevant documents left out")
    if left_out["nothing_to_find"]:
        notes.append(
            f"{left_out['nothing_to_find']:,} queries left out: only their whole document is known to be right"
        )
    if documents != eval_set.documents:
        notes.append(f"the memory holds {documents:,} documents, the set {eval_set.documents:,}")
    if eval_set.unreadable:
        notes.append(f"{eval_set.unreadable:,} lines of the corpus give no document")
    if eval_set.missing:
        notes.append(f"{eval_set.missing:,} relevant documents are not in the corpus and count as not found")
    if eval_set.changed:
        notes.append(f"{eval_set.changed:,} documents' texts were cleaned; their spans were moved along")
    if RANK_FUSION in modes:
        notes.append("rrf is for comparison only; its times leave out the making of hits")
    return tuple(notes)
