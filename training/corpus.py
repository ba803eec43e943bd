"""A memory as training sees it: its vectors under weights that change, and what a walk meets under them."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int32, Int64
from torch import Tensor

from treemem.hierarchy.build import ENCODE_CHUNKS, contextual_file
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.walk import Searcher
from treemem.hierarchy.weights import Hierarchy
from treemem.storage.image import read_tree, write_tree
from treemem.storage.levels import Level, Spread, node_vectors, unit
from treemem.training.questions import EMBED_BATCH, Pool
from treemem.types import Progress, no_progress

WALK_BATCH = 256


@dataclass(frozen=True)
class Served:
    """A memory under one state of the weights."""

    searcher: Searcher
    vectors: tuple[np.ndarray, ...]
    """Of every level, level 1 first, float16."""


@dataclass(frozen=True)
class Met:
    """What walks and BM25 met for some questions: where wrong elements are taken from."""

    nodes: tuple[Int32[np.ndarray, "rows beam"], ...]
    """The nodes that each level kept, level 2 first, best first, -1 where there are fewer."""
    node_scores: tuple[Float32[np.ndarray, "rows beam"], ...]
    """Their cosines, -inf where there is none."""
    chunks: Int32[np.ndarray, "rows kept"]
    """The best chunks of the walk (or of all), then BM25's that are not among them; -1 where there are fewer."""
    cosines: Float32[np.ndarray, "rows kept"]
    """-inf where there is no chunk."""
    bm25: Float32[np.ndarray, "rows kept"]
    """BM25 scores as shares of the question's best."""


@dataclass(frozen=True)
class Encoded:
    """What one state of encoder 1 gives for a memory and its questions."""

    searcher: Searcher
    chunks: Float16[np.ndarray, "n d"]
    train: Float32[np.ndarray, "_ d"]
    held_out: Float32[np.ndarray, "_ d"]


class Corpus:
    """The arrays of a memory that training reads, and its questions."""

    def __init__(self, name: str, memory: Memory, train: Pool, held_out: Pool, scratch: Path) -> None:
        """Read a memory.

        Args:
            name: what messages and logs call it.
            memory: finished; it is not changed.
            train: questions to train on.
            held_out: questions that decide.
            scratch: a folder for the vectors of the current weights, twice the size of the memory's own.
        """
        self.name = name
        self.memory = memory
        self.train, self.held_out = train, held_out
        self.scratch = scratch
        store = memory.store
        ends = store.read("documents/chunk_ends")
        counts = np.diff(ends, prepend=0)
        self._document_of = np.repeat(np.arange(len(ends)), counts)
        self._first, self._last = np.repeat(ends - counts, counts), np.repeat(ends, counts) - 1
        self._begins = ends - counts
        self.levels: list[Level] = store.levels()
        self.depth = len(self.levels) + 1
        self.sizes = (memory.image.chunks, *(len(level.vectors) for level in self.levels))
        self._parents = [_parents(level, size) for level, size in zip(self.levels, self.sizes, strict=False)]
        self._numbers = range(1, self.depth + 1)
        self._served: Served | None = None
        self._served_keys: list[bytes] = []
        self._made = 0
        self.encoded = Encoded(memory.searcher, store.read("chunks/encodings"), train.vectors, held_out.vectors)
        self._right = {id(pool.right): self._keys(pool) for pool in (train, held_out)}
        self.target_weights = self._target_weights(train)

    # ---- what encoder 1 gives

    @property
    def encoded(self) -> Encoded:
        """Encodings of chunks and questions; another state of encoder 1 is set by assigning what `encode` gave."""
        return self._encoded

    @encoded.setter
    def encoded(self, encoded: Encoded) -> None:
        self._encoded = encoded
        self.train = replace(self.train, vectors=encoded.train)
        self.held_out = replace(self.held_out, vectors=encoded.held_out)
        full = np.flatnonzero(np.diff(self._begins, append=len(encoded.chunks)) > 0)
        self._documents = np.zeros((len(self._begins), encoded.chunks.shape[1]), np.float16)
        self._documents[full] = unit(np.add.reduceat(encoded.chunks.astype(np.float32), self._begins[full], axis=0))
        self._served = None

    @property
    def encodings(self) -> Float16[np.ndarray, "n d"]:
        """What encoder 1 gives for the chunks."""
        return self._encoded.chunks

    @property
    def searcher(self) -> Searcher:
        """Embeds questions and reads tokens, by encoder 1; searches the memory as it was before training."""
        return self._encoded.searcher

    def encode(self, encoder: Encoder, progress: Progress = no_progress) -> Encoded:
        """What another encoder 1 gives. Nothing here changes by it."""
        config, image = self.memory.config, self.memory.image
        searcher = Searcher(image, encoder, config.chunk_tokens, config.language)
        chunks = np.empty((image.chunks, encoder.dimension), np.float16)
        for start in range(0, len(chunks), ENCODE_CHUNKS):
            progress("encoding", start, len(chunks))
            stop = min(start + ENCODE_CHUNKS, len(chunks))
            chunks[start:stop] = encoder.encode([image.chunk_text(chunk) for chunk in range(start, stop)])
        pools = []
        for pool in (self.train, self.held_out):
            vectors = np.empty_like(pool.vectors)
            for start in range(0, len(pool), EMBED_BATCH):
                progress("encoding questions", start, len(pool))
                embedded = searcher.embed(pool.texts[start : start + EMBED_BATCH], fast=True)
                for row, query in enumerate(embedded, start):
                    vectors[row] = query.vectors[0]
            pools.append(vectors)
        return Encoded(searcher, chunks, *pools)

    # ---- inputs of the encoders

    def chunk_inputs(self, chunks: Int64[np.ndarray, " n"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the context gate reads of chunks: encodings, documents, encodings before and after, float32."""
        before, after = np.maximum(chunks - 1, 0), np.minimum(chunks + 1, len(self.encodings) - 1)
        rows = [
            self.encodings[chunks],
            self._documents[self._document_of[chunks]],
            self.encodings[before] * (chunks > self._first[chunks])[:, None],
            self.encodings[after] * (chunks < self._last[chunks])[:, None],
        ]
        chunk, document, previous, following = (torch.from_numpy(part.astype(np.float32)) for part in rows)
        return chunk, document, previous, following

    def children(self, level: int, nodes: Int64[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """The children of nodes, int64 [n, most], 0 where there are fewer, and which places are filled."""
        offsets, children = self.levels[level - 2].offsets, self.levels[level - 2].children
        counts = offsets[nodes + 1] - offsets[nodes]
        present = np.arange(counts.max(initial=1)) < counts[:, None]
        places = np.where(present, offsets[nodes][:, None] + np.arange(present.shape[1]), 0)
        return np.where(present, children[places], 0).astype(np.int64), present

    def ancestors(self, level: int, chunks: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " nodes"]:
        """The nodes of a level above some chunks, each once."""
        elements = chunks
        for begins, parents in self._parents[: level - 1]:
            elements = np.unique(np.concatenate([parents[begins[e] : begins[e + 1]] for e in elements]))
        return elements

    # ---- right and wrong

    def _keys(self, pool: Pool) -> list[Int64[np.ndarray, " keys"]]:
        """Of each level, level 1 first: sorted keys `question * size + element` of right chunks and their ancestors."""
        questions = np.repeat(np.arange(len(pool)), np.diff(pool.right_ends, prepend=0))
        keys = [np.unique(questions * self.sizes[0] + pool.right)]
        for level, (begins, parents) in enumerate(self._parents):
            question, element = np.divmod(keys[-1], self.sizes[level])
            counts = begins[element + 1] - begins[element]
            places = np.repeat(begins[element] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            keys.append(np.unique(np.repeat(question, counts) * self.sizes[level + 1] + parents[places]))
        return keys

    def is_right(self, pool: Pool, level: int, questions: np.ndarray, elements: np.ndarray) -> Bool[np.ndarray, ...]:
        """Whether elements of a level are right for questions, or lead to what is; shapes are broadcast."""
        keys, wanted = (
            self._right[id(pool.right)][level - 1],
            questions.astype(np.int64) * self.sizes[level - 1] + elements,
        )
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return (keys[places] == wanted) & (elements >= 0)

    def _target_weights(self, pool: Pool) -> Float32[np.ndarray, " right"]:
        """Of each right chunk: how likely it is the one meant. Where a whole document is right, most of it is not."""
        weights = np.empty(len(pool.right), np.float32)
        begin = 0
        for question, end in enumerate(pool.right_ends):
            chunks = pool.right[begin:end]
            scores = self.encodings[chunks].astype(np.float32) @ pool.vectors[question]
            bm25 = dict(zip(pool.bm25_chunks[question].tolist(), pool.bm25_scores[question].tolist(), strict=True))
            scores += 0.4 * np.array([bm25.get(int(chunk), 0.0) for chunk in chunks], np.float32)
            likely = np.exp(20 * (scores - scores.max()))
            weights[begin:end] = likely / likely.sum()
            begin = int(end)
        return weights

    # ---- under the current weights

    def serve(self, hierarchy: Hierarchy | None) -> Served:
        """The memory as it would be searched with these weights. What was served before is gone then.

        Levels whose weights, and those below, are as they were the last time are not made again. Arithmetic is float32,
        so the last bit of a vector can differ from that of the memory that is made in the end.
        """
        if hierarchy is not None:
            hierarchy.precision = torch.float32
        gate = None if hierarchy is None else hierarchy.context
        residuals = {} if hierarchy is None else hierarchy.residuals
        keys = [b"" if hierarchy is None or k not in (1, *residuals) else hierarchy.digest(k) for k in self._numbers]
        same = 0
        while self._served is not None and same < self.depth and keys[same] == self._served_keys[same]:
            same += 1
        if self._served is not None and same == self.depth:
            return self._searched(self._served, hierarchy)
        vectors = [] if self._served is None else list(self._served.vectors[:same])
        if not vectors:
            self.scratch.mkdir(parents=True, exist_ok=True)
            # Beside the file before, which may be mapped still.
            file = self.scratch / f"level-1-{self._made % 2}"
            vectors.append(
                contextual_file(self.memory.store, self.memory.config.alpha, file, gate=gate, encodings=self.encodings)
            )
        for number in range(len(vectors) + 1, self.depth + 1):
            level = self.levels[number - 2]
            vectors.append(node_vectors(vectors[-1], level.offsets, level.children, residuals.get(number)))
        self._made += 1
        tree = self.scratch / f"tree-{self._made % 2}"
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir()
        levels = [Level(own.offsets, own.children, rows) for own, rows in zip(self.levels, vectors[1:], strict=True)]
        write_tree(tree, vectors[0], levels)
        image = copy.copy(self.memory.image)
        image.tree = read_tree(tree, self.sizes[::-1])
        if same == 0 or self._served is None:
            image.query_map = Spread.of(vectors[0]).map_queries()
        else:
            image.query_map = self._served.searcher.image.query_map
        config = self.memory.config
        searcher = Searcher(image, None, config.chunk_tokens, config.language, hierarchy)
        self._served, self._served_keys = Served(searcher, tuple(vectors)), keys
        return self._served

    def _searched(self, served: Served, hierarchy: Hierarchy | None) -> Served:
        """The same vectors with other rankers."""
        config = self.memory.config
        image = served.searcher.image
        return Served(Searcher(image, None, config.chunk_tokens, config.language, hierarchy), served.vectors)

    def meet(
        self, served: Served, pool: Pool, rows: Int64[np.ndarray, " rows"], beam: int, kept: int, *, exact: bool = False
    ) -> Met:
        """Walk for some questions, and ask BM25.

        Args:
            served: the memory under the current weights.
            pool: the questions.
            rows: which of them.
            beam: how many nodes a walk keeps.
            kept: how many of the walk's best chunks are looked at.
            exact: take the best of all chunks in place of the walk's.
        """
        searcher = served.searcher
        tree, kernels = searcher.image.tree, searcher.kernels
        nodes = [np.full((len(rows), beam), -1, np.int32) for _ in self.levels]
        scores = [np.full((len(rows), beam), -np.inf, np.float32) for _ in self.levels]
        chunks = np.full((len(rows), kept + pool.bm25_chunks.shape[1]), -1, np.int32)
        bm25 = np.zeros(chunks.shape, np.float32)
        cosines = np.full(chunks.shape, -np.inf, np.float32)
        for start in range(0, len(rows), WALK_BATCH):
            part = slice(start, start + WALK_BATCH)
            asked = searcher.asked(pool.vectors[rows[part]])
            walked = kernels.search(tree, asked[:, :, None], beam, kept)
            for level in range(len(self.levels)):
                nodes[level][part], scores[level][part] = walked.nodes[-1 - level], walked.node_scores[-1 - level]
            best = kernels.exact(tree, asked[-1][:, None], kept)[0] if exact else walked.chunks
            width = min(kept, best.shape[1])
            chunks[part, :width] = best[:, :width]
            others = pool.bm25_chunks[rows[part]]
            known = (others[:, :, None] == chunks[part, None, :kept]).any(2)
            chunks[part, kept:] = np.where(known, -1, others)
            cosines[part] = kernels.score_chunks(tree, asked[-1][:, None], chunks[part])
        bm25[:, kept:] = pool.bm25_scores[rows]
        lexical = searcher.image.lexical
        for i, row in enumerate(rows):
            if pool.bm25_best[row] > 0:
                words = lexical.query(pool.texts[row])
                found = kernels.bm25_scores(lexical.index, words.terms, words.weights, chunks[i, :kept])
                bm25[i, :kept] = found / pool.bm25_best[row]
        return Met(tuple(nodes), tuple(scores), chunks, cosines, bm25)


def _parents(level: Level, size: int) -> tuple[Int64[np.ndarray, " size_and_one"], Int64[np.ndarray, " edges"]]:
    """Of every element below a level where its parents begin, and the parents."""
    above = np.repeat(np.arange(len(level.offsets) - 1), np.diff(level.offsets))
    begins = np.concatenate([[0], np.cumsum(np.bincount(level.children, minlength=size))])
    return begins, above[np.argsort(level.children, kind="stable")]
