"""What the decoder is told of a query and its best candidates, read from the serving image."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from treemem.hierarchy.decoder import CANDIDATES, READ, TERMS, DecoderInputs, decoder_inputs, term_states
from treemem.hierarchy.embed import TokenStates
from treemem.kernels import BackEnd
from treemem.storage.image import Image
from treemem.storage.lexical import LONGEST_WORD
from treemem.types import Span

_WORD = re.compile(r"[^\W_]+")
_TITLES_KEPT = 4096


class CandidateReader:
    """Gathers decoder inputs. Safe to share between threads: its only state is a cache under a lock."""

    def __init__(self, image: Image, kernels: BackEnd) -> None:
        """Read from an image."""
        self.image = image
        self.kernels = kernels
        self._titles: OrderedDict[int, frozenset[str]] = OrderedDict()
        self._lock = threading.Lock()

    def inputs(
        self,
        text: str,
        vector: Float[np.ndarray, " d"],
        states: Sequence[TokenStates],
        spans: Sequence[Span],
        chunks: Int32[np.ndarray, " k"],
        cosines: Float32[np.ndarray, " k"],
        paths: Float[np.ndarray, "k 2"],
        bm25_weight: float,
        best: float | None = None,
    ) -> DecoderInputs | None:
        """Inputs for one query, None where no chunk holds a term of it.

        Args:
            text: of the query.
            vector: its first embedding as level 1 is compared with it.
            states: the encoder's token states of its pieces.
            spans: the characters of these pieces.
            chunks: the best candidates, best first; at most `CANDIDATES` are looked at.
            cosines: theirs.
            paths: scores of their nodes of levels 2 and 3.
            bm25_weight: lambda of the convex sum.
            best: the largest BM25 that the search met; looked up where it is not known.
        """
        image, lexical = self.image, self.image.lexical
        words = lexical.query(text)
        if best is None:
            found = lexical.best(words, 1)[1]
            if len(found) == 0:
                return None
            best = float(found[0])
        chunks, cosines, paths = chunks[:CANDIDATES], cosines[:CANDIDATES], paths[:CANDIDATES]
        said = lexical.analyze(text)
        kept = sorted(range(min(TERMS, len(words.words))), key=lambda i: said.index(words.words[i]))
        own_words = [words.words[i] for i in kept]
        terms, weights = words.terms[kept], words.weights[kept]
        places = np.array([said.index(word) for word in own_words])
        documents = image.document_of(chunks)
        first, last = image.bounds(documents)
        beside = chunks[:, None] + np.array([-2, -1, 1, 2], np.int32)
        beside = np.where((beside >= first[:, None]) & (beside < last[:, None]), beside, -1).astype(np.int32)
        together = np.concatenate([chunks, beside.ravel()])
        parts = np.stack(
            [
                self.kernels.bm25_scores(lexical.index, terms[i : i + 1], weights[i : i + 1], together)
                for i in range(len(terms))
            ],
            axis=1,
        )
        of_title = [self._title(document) for document in documents.tolist()]
        blocks = image.tree.levels[-1]
        return decoder_inputs(
            query=vector,
            states=self._states(text, len(said), places, states, spans, len(vector)),
            places=places,
            counts=np.array([said.count(word) for word in own_words]),
            idf=lexical.idf(terms),
            weights=weights,
            best_bm25=best,
            vectors=blocks.rows[chunks].astype(np.float32) * blocks.scales[chunks, None],
            cosines=cosines,
            bm25=self.kernels.bm25_scores(lexical.index, words.terms, words.weights, chunks),
            parts=parts[: len(chunks)],
            near=parts[len(chunks) :].reshape(len(chunks), 4, -1).max(1),
            in_title=np.array([[word in own for word in own_words] for own in of_title]),
            titled=np.array([len(own) > 0 for own in of_title]),
            words=[self._places(chunk, own_words) for chunk in chunks[:READ].tolist()],
            paths=paths,
            bm25_weight=bm25_weight,
        )

    def _states(
        self,
        text: str,
        terms: int,
        places: np.ndarray,
        states: Sequence[TokenStates],
        spans: Sequence[Span],
        dimension: int,
    ) -> Float32[np.ndarray, "t d"]:
        """The encoder's state of each term in the query; zeros where terms and words cannot be told to be the same."""
        found = [word.span() for word in _WORD.finditer(text) if len(word[0].encode()) < LONGEST_WORD]
        if len(found) != terms or not states:
            return np.zeros((len(places), dimension), np.float32)
        tokens = [(a + s, a + e) for (a, _), own in zip(spans, states, strict=True) for s, e in own.spans]
        stacked = np.concatenate([own.states for own in states]).astype(np.float32)
        return term_states([found[place] for place in places], stacked, tokens)

    def _places(self, chunk: int, words: list[str]) -> Int64[np.ndarray, " n"]:
        """For each word of a chunk, which of the query's it is, -1 for others."""
        number = {word: i for i, word in enumerate(words)}.get
        return np.array([number(word, -1) for word in self.image.lexical.analyze(self.image.chunk_text(chunk))], int)

    def _title(self, document: int) -> frozenset[str]:
        """The terms of a document's title."""
        with self._lock:
            known = self._titles.get(document)
        if known is None:
            known = frozenset(self.image.lexical.analyze(self.image.reference(document).title))
            with self._lock:
                self._titles[document] = known
                while len(self._titles) > _TITLES_KEPT:
                    self._titles.popitem(last=False)
        return known
