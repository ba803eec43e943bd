"""Searching: the walk from the top of the tree, BM25, both together, and the token states at the end of it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from treemem.config import MAX_QUERY_EMBEDDINGS, SearchConfig
from treemem.errors import InputError
from treemem.hierarchy.decode import CandidateReader
from treemem.hierarchy.decoder import CANDIDATES, Decoder, DecoderInputs
from treemem.hierarchy.embed import Encoder, TokenStates
from treemem.hierarchy.segment import cut
from treemem.hierarchy.tokens import TOKEN_WEIGHT, TokenScorer, token_idf
from treemem.hierarchy.weights import BM25_WEIGHT, Hierarchy
from treemem.kernels import Found, Words, back_end
from treemem.kernels.reference import quantise_queries
from treemem.storage.image import Image
from treemem.storage.lexical import LexicalQuery
from treemem.types import GatheredLevel, GatheredNode, Hit, PathStep, SearchResult, Span, TokenMatch

AUTO_CHUNKS = 1024
"""Up to so many chunks mode `auto` scores all of them, some 10 µs more than a walk (`benchmarks/crossover.py`)."""
CACHED_CHUNKS = 256
"""How many chunks' token states are kept for the next query."""
WIDE_SCOPE = 8
"""A scope that holds this part of the chunks or more is wide."""
TITLE_TOKENS = 32
"""How much of its document's title a chunk's tokens are read with, where the encoder has room for it."""
_NO_WALK = Found(
    np.empty((0, 1, 0), np.int32),
    np.empty((0, 1, 0), np.float32),
    np.empty((1, 0), np.int32),
    np.empty((1, 0), np.float32),
    np.empty((1, 0), np.float32),
    np.empty((1, 0), np.float32),
    np.empty((1, 0), np.int32),
    np.zeros(1, np.float32),
    np.zeros(1, np.int64),
)


@dataclass(frozen=True)
class EmbeddedQuery:
    """A query with its embeddings: one, or several where it is longer than a chunk; none where it is empty."""

    text: str
    vectors: Float32[np.ndarray, "m d"]
    spans: tuple[Span, ...]
    """Characters of the query behind each embedding."""
    states: tuple[TokenStates, ...] = ()
    """Token states behind each embedding."""


@dataclass(frozen=True)
class Scope:
    """What a search is restricted to: masks of all levels, top first, as the kernels take them."""

    masks: tuple[UInt8[np.ndarray, " _"], ...]

    @cached_property
    def chunks(self) -> Int32[np.ndarray, " chunks"]:
        """The allowed chunks."""
        return np.flatnonzero(self.masks[-1]).astype(np.int32)

    @cached_property
    def wide(self) -> bool:
        """Whether it holds so much of the memory that an index of all of it is asked and the rest passed over."""
        return len(self.chunks) * WIDE_SCOPE >= len(self.masks[-1])


@dataclass(frozen=True)
class Ranked:
    """Chunks, best first, with their final scores."""

    chunks: Int32[np.ndarray, " n"]
    scores: Float32[np.ndarray, " n"]
    scored: int
    """How many vectors were scored for it."""
    walked: Found = _NO_WALK


def _ranked(chunks: np.ndarray, scores: np.ndarray, scored: int, walked: Found = _NO_WALK) -> Ranked:
    order = np.argsort(-scores, kind="stable")
    if (np.diff(scores[order]) == 0).any():  # equal scores: the smaller chunk first
        order = np.lexsort((chunks, -scores))
    return Ranked(chunks[order].astype(np.int32), scores[order].astype(np.float32), scored, walked)


class Searcher:
    """Answers queries from one serving image. Safe to share between threads: its only state is a cache under a lock."""

    def __init__(
        self,
        image: Image,
        encoder: Encoder | None,
        chunk_tokens: int,
        language: str,
        hierarchy: Hierarchy | None = None,
    ) -> None:
        """Wrap an image, with its trained hierarchy where it has one; without an encoder only BM25 can be asked."""
        self.image = image
        self.encoder = encoder
        self.hierarchy = hierarchy
        self.kernels = back_end()
        self._reader = CandidateReader(image, self.kernels)
        trained = None if hierarchy is None else hierarchy.tokens
        self._scorer = None if trained is None else TokenScorer(trained)
        self._chunk_tokens = chunk_tokens
        self._language = language
        self._states: OrderedDict[int, TokenStates] = OrderedDict()
        self._states_lock = threading.Lock()
        self._everything = self._masked(image.visible) if image.hidden else None
        """What a search is restricted to where nothing is asked for: None where nothing is hidden."""
        if encoder is not None and image.chunks:
            self._warm()

    def _warm(self) -> None:
        """Load the compiled kernels, 0.3 s once a process, so that no query is measured with it."""
        vector = np.zeros((1, self.image.tree.dimension), np.float32)
        first = int(np.argmax(np.diff(self.image.spans[:, :2], axis=1)[:, 0] > 0))
        query = EmbeddedQuery(self.image.chunk_text(first), vector, ((0, 1),))
        self.rank(query, SearchConfig(beam=1))
        self._cosines(self.asked(query.vectors), np.array([first], np.int32))

    # ---- queries

    def embed(self, queries: Sequence[str], *, fast: bool = False) -> list[EmbeddedQuery]:
        """Embed queries; what is longer than a chunk is cut like a document, at most 32 pieces evenly spread.

        `fast` is for training: see `Encoder.encode`.
        """
        encoder = self._require_encoder()
        texts = [_encodable(query) for query in queries]
        spans = [self._cut(text, encoder) for text in texts]
        parts = [text[a:b] for text, own in zip(texts, spans, strict=True) for a, b in own]
        vectors, states = encoder.encode_queries(parts, fast=fast)
        out = []
        begin = 0
        for text, own in zip(texts, spans, strict=True):
            end = begin + len(own)
            out.append(EmbeddedQuery(text, vectors[begin:end], tuple(own), tuple(states[begin:end])))
            begin = end
        return out

    def _cut(self, text: str, encoder: Encoder) -> list[Span]:
        spans = cut(text, encoder.token_spans, self._chunk_tokens, self._language)
        if len(spans) > MAX_QUERY_EMBEDDINGS:
            spread = np.linspace(0, len(spans) - 1, MAX_QUERY_EMBEDDINGS).round().astype(int)
            spans = [spans[i] for i in spread]
        return spans

    def _require_encoder(self) -> Encoder:
        if self.encoder is None:
            raise InputError("this search has no encoder: only mode 'bm25' can be asked")
        return self.encoder

    # ---- restricting

    def scope(self, document_ids: Iterable[str]) -> Scope:
        """Restrict a search to some documents; a single string is one id. Masked ones stay hidden.

        Raises InputError for an id that the memory does not hold.
        """
        mask = np.zeros(len(self.image.spans), np.uint8)
        for document_id in [document_ids] if isinstance(document_ids, str) else document_ids:
            number = self.image.number_of(document_id)
            if number is None:
                raise InputError(f"document {document_id!r} is not in this memory; search without `within` to see ids")
            own = self.image.chunks_of(number)
            mask[own.start : own.stop] = 1
        return self._masked(mask & self.image.visible if self.image.hidden else mask)

    def _masked(self, mask: UInt8[np.ndarray, " chunks"]) -> Scope:
        """The scope of these chunks, with the nodes that lead to them."""
        masks = [mask]
        for blocks in self.image.tree.levels[:0:-1]:
            masks.append(np.maximum.reduceat(masks[-1][blocks.ids], blocks.offsets[:-1]))
        return Scope(tuple(masks[::-1]))

    # ---- searching

    def search(
        self, queries: Sequence[str], config: SearchConfig, within: Iterable[str] | None = None
    ) -> list[SearchResult]:
        """Search for texts; an empty query finds nothing. Results hold the texts as tokenizers take them."""
        scope = None if within is None else self.scope(within)
        if config.mode == "bm25":
            embedded = [EmbeddedQuery(_encodable(query), np.empty((0, 0), np.float32), ()) for query in queries]
        else:
            embedded = self.embed(queries)
        return [self.search_one(query, config, scope) for query in embedded]

    def search_one(self, query: EmbeddedQuery, config: SearchConfig, scope: Scope | None = None) -> SearchResult:
        """Search for one embedded query."""
        start = time.perf_counter()
        scope = self._everything if scope is None else scope
        config = self.decided(config, scope)
        ranked = self.rank(query, config, scope)
        matches: dict[int, tuple[TokenMatch, ...]] = {}
        if config.mode == "deep" and len(ranked.chunks):
            ranked, matches = self._deepen(query, ranked, config)
        hits = self._hits(query, ranked, config.k, matches)
        gathered = self._gathered(ranked, config.beam)
        return SearchResult(query.text, hits, gathered, ranked.scored, (time.perf_counter() - start) * 1000)

    def decided(self, config: SearchConfig, scope: Scope | None = None) -> SearchConfig:
        """The configuration with the mode that `auto` stands for."""
        if config.mode != "auto":
            return config
        chunks = self.image.chunks if scope is None else len(scope.chunks)
        return replace(config, mode="exact+bm25" if chunks <= AUTO_CHUNKS else "hybrid")

    def rank(self, query: EmbeddedQuery, config: SearchConfig, scope: Scope | None = None) -> Ranked:
        """Rank chunks without level 0: in mode `deep` this is what `hybrid` gives.

        Where a decoder was trained, it ranks the best of them anew, in every mode but `bm25`. Returns at least
        `config.k` chunks where there are as many candidates.
        """
        scope = self._everything if scope is None else scope
        config = self.decided(config, scope)
        nothing = Ranked(np.empty(0, np.int32), np.empty(0, np.float32), 0)
        if self.image.chunks == 0 or not query.text.strip():
            return nothing
        if config.mode == "bm25":
            chunks, scores = self._bm25_best(self.image.lexical.query(query.text), config.k, scope)
            return Ranked(chunks, scores, 0)
        if len(query.vectors) == 0:
            return nothing
        asked = self.asked(query.vectors)
        ranked = self._candidates(query, asked, config, scope)
        decoder = None if self.hierarchy is None or not config.decoder else self.hierarchy.decoder
        if decoder is None or len(ranked.chunks) == 0:
            return ranked
        return self._decoded(query, asked, ranked, config, decoder)

    def nearest(
        self, vectors: Float32[np.ndarray, "n d"], k: int = 10, beam: int = 32, *, beside: int = SearchConfig.beside
    ) -> Found:
        """Walk for many embeddings at once, by vectors alone: for those who bring their own.

        Args:
            vectors: unit vectors of the memory's encoder, one a query.
            k: how many chunks each gets.
            beam: how many nodes a walk keeps per level.
            beside: how many neighbours of the best chunks are scored too.

        Raises:
            InputError: wrong shapes, or k or beam below 1.
            ModelError: a vector is not finite.
        """
        asked = self.asked(vectors)[:, :, None]
        allowed = None if self._everything is None else self._everything.masks
        ends = self.image.chunk_ends
        return self.kernels.search(self.image.tree, asked, beam, k, beside=beside, ends=ends, allowed=allowed)

    def _candidates(self, query: EmbeddedQuery, asked: np.ndarray, config: SearchConfig, scope: Scope | None) -> Ranked:
        """What a mode looks at, ranked by cosines, or by the convex sum of both signals."""
        if config.mode == "exact":
            chunks, scores = self.kernels.exact(
                self.image.tree,
                asked[-1][None],
                max(config.k, CANDIDATES),
                None if scope is None else scope.masks,
            )
            found = chunks[0] >= 0
            scored = self.image.chunks if scope is None else len(scope.chunks)
            return Ranked(chunks[0][found], scores[0][found], scored)
        if config.mode == "exact+bm25":
            chunks = np.arange(self.image.chunks, dtype=np.int32) if scope is None else scope.chunks
            return self._both(query, asked, chunks, self._cosines(asked, chunks), config, scope, len(chunks), _NO_WALK)
        few = scope is not None and len(scope.chunks) <= config.beam * self._most_children
        words = None
        if config.mode != "walk" and config.lexical == "signatures" and not few:
            words = self._words(query, config)
        wanted = max(config.k, config.beam, CANDIDATES, config.deep_candidates)
        if config.mode != "walk" and words is None:  # all that is scored is ranked anew
            wanted = config.beam * (self._most_children + 2 * config.beside)
        found = self.kernels.search(
            self.image.tree,
            asked[:, None],
            config.beam,
            wanted,
            words=words,
            beside=0 if few else config.beside,
            ends=self.image.chunk_ends,
            allowed=None if scope is None else scope.masks,
        )
        scored = int(found.scored[0])
        if few and scope is not None:
            # No more than a walk may score at the chunks' level: all of them, then, and none is missed.
            chunks = scope.chunks
            cosines = self._cosines(asked, chunks)
            scored += len(chunks)
            if config.mode == "walk":
                return _ranked(chunks, cosines, scored, found)
        else:
            met = found.chunks[0] >= 0
            chunks, cosines = found.chunks[0][met], found.cosines[0][met]
            if config.mode == "walk" or words is not None:
                return Ranked(chunks, found.scores[0][met], scored, found)
        return self._both(query, asked, chunks, cosines, config, scope, scored, found)

    def _words(self, query: EmbeddedQuery, config: SearchConfig) -> Words:
        """What a walk by both signals is told of a query's words."""
        known, ends = self.image.lexical.query(query.text), np.zeros(2, np.int64)
        ends[1] = len(known.terms)
        index, signatures = self.image.lexical.index, self.image.signatures
        return Words(index, signatures, ends, known.terms, known.weights, self.bm25_weight(config))

    def asked(self, vectors: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, "depth m d"]:
        """Query embeddings as each level is compared with them, top first.

        Nodes: see `treemem.storage.levels.Spread`. Then come the rankers, where they are trained.
        """
        depth = self.image.tree.depth
        asked = self.image.asked(vectors, self.kernels)
        if self.hierarchy is not None:
            for level in range(1, depth + 1):
                asked[depth - level] = self.hierarchy.rank(level, asked[depth - level])
        return asked

    def node_scorer(self, query: str) -> Callable[[int, np.ndarray], float]:
        """How well a vector that stands at a level answers a text, as walks by vectors compare them."""
        vectors = self.embed([query])[0].vectors
        asked = self.asked(vectors) if len(vectors) else np.zeros((self.image.tree.depth, 1, 1), np.float32)
        return lambda level, vector: float((asked[-level] * vector).sum(-1).max())

    def _cosines(self, asked: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        return self.kernels.score_chunks(self.image.tree, asked[-1][None], chunks[None])[0]

    def bm25_weight(self, config: SearchConfig) -> float:
        """What BM25's best score is worth beside a cosine: what was asked for, else learned, else `BM25_WEIGHT`."""
        if config.bm25_weight is not None:
            return config.bm25_weight
        return BM25_WEIGHT if self.hierarchy is None else self.hierarchy.bm25_weight.item()

    @cached_property
    def _most_children(self) -> int:
        """How many chunks the largest node of level 2 has: at most the fanout."""
        return int(np.diff(self.image.tree.levels[-1].offsets).max(initial=0))

    def _bm25_best(self, query: LexicalQuery, k: int, scope: Scope | None) -> tuple[np.ndarray, np.ndarray]:
        lexical = self.image.lexical
        if scope is None or scope.wide:
            return lexical.best(query, min(k, self.image.chunks), None if scope is None else scope.masks[-1])
        chunks = scope.chunks
        scores = self.kernels.bm25_scores(lexical.index, query.terms, query.weights, chunks)
        found = _ranked(chunks[scores > 0], scores[scores > 0], 0)
        return found.chunks[:k], found.scores[:k]

    def _both(
        self,
        query: EmbeddedQuery,
        asked: np.ndarray,
        chunks: np.ndarray,
        cosines: np.ndarray,
        config: SearchConfig,
        scope: Scope | None,
        scored: int,
        walked: Found,
    ) -> Ranked:
        """Convex sum over `chunks` and BM25's best: `cosine + lambda * bm25 / best bm25 of this query`."""
        lexical = self.image.lexical
        words = lexical.query(query.text)
        best, best_scores = self._bm25_best(words, max(config.bm25_candidates, config.k), scope)
        if len(best) == 0:
            return _ranked(chunks, cosines, scored, walked)
        bm25 = self.kernels.bm25_scores(lexical.index, words.terms, words.weights, chunks)
        new = ~np.isin(best, chunks)
        if new.any():
            cosines = np.concatenate([cosines, self._cosines(asked, best[new])])
            chunks = np.concatenate([chunks, best[new]])
            bm25 = np.concatenate([bm25, best_scores[new]])
            scored += int(new.sum())
        return _ranked(chunks, cosines + self.bm25_weight(config) * bm25 / best_scores[0], scored, walked)

    # ---- the decoder

    def decoder_inputs(
        self, query: EmbeddedQuery, asked: np.ndarray, ranked: Ranked, config: SearchConfig
    ) -> DecoderInputs | None:
        """What a decoder is told of the best candidates, None where no chunk holds a word of the query."""
        chunks = ranked.chunks[:CANDIDATES]
        paths = np.zeros((len(chunks), 2), np.float32)
        for i, (_, cosines) in enumerate(self._ways(asked, ranked, len(chunks))[:2]):
            paths[:, i] = cosines
        return self._reader.inputs(
            query.text,
            asked[-1, 0],
            query.states,
            query.spans,
            chunks,
            self._cosines(asked, chunks),
            paths,
            self.bm25_weight(config),
            float(ranked.walked.best[0]) or None,
        )

    def _decoded(
        self, query: EmbeddedQuery, asked: np.ndarray, ranked: Ranked, config: SearchConfig, decoder: Decoder
    ) -> Ranked:
        """The best candidates as the decoder ranks them; the others follow after them."""
        inputs = self.decoder_inputs(query, asked, ranked, config)
        if inputs is None:
            return ranked
        top = ranked.chunks[:CANDIDATES]
        scores = ranked.scores.copy()
        scores[: len(top)] = decoder.scores(inputs, self.bm25_weight(config))[0, : len(top)]
        order = np.lexsort((top, -scores[: len(top)]))
        order = np.concatenate([order, np.arange(len(top), len(scores))])
        return Ranked(ranked.chunks[order], scores[order], ranked.scored, ranked.walked)

    # ---- level 0

    def _deepen(
        self, query: EmbeddedQuery, ranked: Ranked, config: SearchConfig
    ) -> tuple[Ranked, dict[int, tuple[TokenMatch, ...]]]:
        """Late interaction (Khattab and Zaharia 2020) over the best candidates' token states.

        Adds `mu * mean over query tokens of the best cosine among the tokens of the chunk and of its title`; the others
        follow after them. The matches that are told are those within the chunk. Where level 0 was trained, states are
        projected first and the mean is a weighted one.
        """
        encoder = self._require_encoder()
        own = query.states
        states = np.concatenate([part.states for part in own])
        spans = [(a + s, a + e) for (a, _), part in zip(query.spans, own, strict=True) for s, e in part.spans]
        if len(states) == 0:
            return ranked, {}
        mu = config.token_weight
        if self._scorer is None:
            weights = np.full(len(states), (TOKEN_WEIGHT if mu is None else mu) / len(states), np.float32)
        else:
            weighed = self._scorer.weigh(states, token_idf(self.image.lexical, query.text, spans))
            states, weights = weighed.tokens, weighed.weights
            if mu is not None:
                weights = weights * (mu / max(float(weights.sum()), 1e-12))
        top = ranked.chunks[: config.deep_candidates]
        scores = ranked.scores.copy()
        matches: dict[int, tuple[TokenMatch, ...]] = {}
        for i, (chunk, tokens) in enumerate(zip(top, self.token_states(top, encoder), strict=True)):
            title = sum(end <= 0 for _, end in tokens.spans)
            if len(tokens.spans) == title:
                continue
            own_states = tokens.states.astype(np.float32)
            if self._scorer is not None:
                own_states = self._scorer.project(own_states)
            similarities = states @ own_states.T  # (query tokens, title's and text's tokens)
            scores[i] += float(weights @ similarities.max(1))
            similarities, text_spans = similarities[:, title:], tokens.spans[title:]
            best = similarities.argmax(1)
            values = similarities[np.arange(len(best)), best]
            begin = int(self.image.spans[chunk, 0])
            matches[int(chunk)] = tuple(
                TokenMatch(span, (begin + text_spans[j][0], begin + text_spans[j][1]), float(value))
                for span, j, value in zip(spans, best, values, strict=True)
            )
        order = np.lexsort((top, -scores[: len(top)]))
        order = np.concatenate([order, np.arange(len(top), len(scores))])
        deepened = Ranked(ranked.chunks[order], scores[order], ranked.scored, ranked.walked)
        return deepened, matches

    def token_states(self, chunks: np.ndarray, encoder: Encoder) -> list[TokenStates]:
        """Token states of chunks in float16, from the cache where they are hot, else encoded from their texts.

        A chunk is read after its document's title, whose tokens come first; their spans, counted from the beginning of
        the chunk, end at 0 or before.
        """
        wanted = [int(chunk) for chunk in chunks]
        with self._states_lock:
            known = {chunk: self._states[chunk] for chunk in wanted if chunk in self._states}
        missing = [chunk for chunk in wanted if chunk not in known]
        titles = self._titles(missing, encoder)
        fresh = encoder.token_states(
            [title + self.image.chunk_text(chunk) for title, chunk in zip(titles, missing, strict=True)]
        )
        for chunk, title, tokens in zip(missing, titles, fresh, strict=True):
            spans = [(start - len(title), end - len(title)) for start, end in tokens.spans]
            # A token of the text may begin with the space before it, which here is the title's.
            spans = [(max(0, start) if end > 0 else start, end) for start, end in spans]
            # Rounded before they are used, so that a chunk scores the same whether it was in the cache or not.
            known[chunk] = TokenStates(tokens.states.astype(np.float16), spans)
        with self._states_lock:
            for chunk in wanted:
                self._states[chunk] = known[chunk]
                self._states.move_to_end(chunk)
            while len(self._states) > CACHED_CHUNKS:
                self._states.popitem(last=False)
        return [known[chunk] for chunk in wanted]

    def _titles(self, chunks: list[int], encoder: Encoder) -> list[str]:
        """What stands before each chunk: its document's title and a colon, or nothing."""
        room = min(TITLE_TOKENS, encoder.longest - self._chunk_tokens - 2)
        if room < 1:
            return [""] * len(chunks)
        documents = self.image.document_of(np.array(chunks, np.int64))
        titles = [_encodable(self.image.reference(int(document)).title).strip() for document in documents]
        spans = encoder.token_spans(titles)
        return [title[: own[:room][-1][1]] + ": " if own else "" for title, own in zip(titles, spans, strict=True)]

    # ---- results

    def _ways(self, asked: np.ndarray, ranked: Ranked, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The nodes above the first `count` chunks and their cosines, level 2 first, then upwards."""
        tree = self.image.tree
        chunks = ranked.chunks[:count]
        if tree.depth == 1 or len(chunks) == 0:
            return []
        first = tree.parents[-1][chunks]
        through = dict(zip(ranked.walked.chunks[0].tolist(), ranked.walked.parents[0].tolist(), strict=True))
        known = np.array([through.get(int(chunk), -1) for chunk in chunks])
        nodes = np.where(known >= 0, known, first)
        steps, scales = quantise_queries(asked[::-1])  # as in the kernels: the walk's scores
        out = []
        for level, blocks in enumerate(tree.levels[-2::-1], 2):
            dots = (blocks.rows[nodes].astype(np.float64) @ steps[level - 1].T).astype(np.float32)
            out.append((nodes, (scales[level - 1] * blocks.scales[nodes, None] * dots).max(1)))
            if level < tree.depth:
                nodes = tree.parents[tree.depth - level][nodes]
        return out

    def _paths(self, query: EmbeddedQuery, ranked: Ranked, count: int) -> list[tuple[PathStep, ...]]:
        """The way from the top to each of the first `count` chunks.

        Scores: the chunk's, and the nodes' as the walk ranked them; the cosine of a node that it did not keep.
        """
        chunks = ranked.chunks[:count]
        steps = [[PathStep(1, int(c), float(s))] for c, s in zip(chunks, ranked.scores, strict=False)]
        if len(query.vectors):
            walked = ranked.walked
            for level, (nodes, cosines) in enumerate(self._ways(self.asked(query.vectors), ranked, count), 2):
                kept: dict[int, float] = {}
                if walked is not _NO_WALK:
                    kept = dict(
                        zip(walked.nodes[1 - level, 0].tolist(), walked.node_scores[1 - level, 0].tolist(), strict=True)
                    )
                numbers = self.image.names(level)
                for i, (node, cosine) in enumerate(zip(nodes.tolist(), cosines.tolist(), strict=True)):
                    steps[i].append(PathStep(level, int(numbers[node]), kept.get(node, cosine)))
        return [tuple(way[::-1]) for way in steps]

    def _hits(
        self, query: EmbeddedQuery, ranked: Ranked, k: int, matches: dict[int, tuple[TokenMatch, ...]]
    ) -> tuple[Hit, ...]:
        chunks = ranked.chunks[:k]
        documents = self.image.document_of(chunks)
        paths = self._paths(query, ranked, len(chunks)) if len(chunks) else []
        return tuple(
            Hit(
                score=float(score),
                document=self.image.reference(int(document)),
                span=self.image.span(int(chunk)),
                text=self.image.chunk_text(int(chunk)),
                path=path,
                chunk=int(chunk),
                matches=matches.get(int(chunk), ()),
            )
            for chunk, score, document, path in zip(chunks, ranked.scores, documents, paths, strict=False)
        )

    def _gathered(self, ranked: Ranked, beam: int) -> tuple[GatheredLevel, ...]:
        """What the walk kept of every level, coarse to fine; nothing where no walk was made."""
        walked = ranked.walked
        if walked is _NO_WALK:
            return ()
        levels = []
        depth, sizes = self.image.tree.depth, self.image.sizes
        for index in range(depth - 1):
            numbers = self.image.names(depth - index)
            pairs = zip(walked.nodes[index, 0], walked.node_scores[index, 0], strict=True)
            nodes = tuple(GatheredNode(int(numbers[node]), float(score)) for node, score in pairs if node >= 0)
            levels.append(GatheredLevel(depth - index, sizes[index], nodes))
        best = zip(ranked.chunks[:beam], ranked.scores[:beam], strict=True)
        levels.append(GatheredLevel(1, sizes[-1], tuple(GatheredNode(int(c), float(s)) for c, s in best)))
        return tuple(levels)


def _encodable(text: str) -> str:
    """`text` with `?` for halves of surrogate pairs, which no tokenizer takes; characters keep their places."""
    return text.encode("utf-8", "replace").decode()


def subtree(
    image: Image, level: int, node: int, allowed: UInt8[np.ndarray, " chunks"] | None = None
) -> Int64[np.ndarray, " n"]:
    """The chunks below a node of level 2 or higher, each once, in order; hidden ones are left out.

    `allowed`: which chunks a search was restricted to, hidden ones not among them.
    """
    nodes = below(image, level, node)
    if allowed is None and image.hidden:
        allowed = image.visible
    return nodes if allowed is None else nodes[allowed[nodes] != 0]


def below(image: Image, level: int, node: int) -> Int64[np.ndarray, " chunks"]:
    """The chunks below a node of level 2 or higher, each once, in order, hidden ones too."""
    nodes = np.array([image.places(level)[node]])
    for blocks in image.tree.levels[image.tree.depth - level + 1 :]:
        nodes = np.unique(
            np.concatenate([blocks.ids[blocks.offsets[n] : blocks.offsets[n + 1]] for n in nodes])
        ).astype(np.int64)
    return nodes
