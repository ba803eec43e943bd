"""Words: an inverted index by tantivy for the best chunks, and a forward index for the BM25 of any chunk.

Both give the same scores: tantivy's BM25 (Robertson and Zaragoza 2009, k1 = 1.2, b = 0.75) with its rounded lengths.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tantivy
from jaxtyping import Float32, Int32, UInt8, UInt64
from tantivy import Filter, Occur, Query, TextAnalyzer, TextAnalyzerBuilder, Tokenizer

from treemem.errors import DamagedMemory
from treemem.kernels import LexicalIndex, back_end
from treemem.storage.files import map_npy, save_npy, write_npy

K1 = 1.2
B = 0.75
MOST_WORDS = 1 << 20
"""More than any chunk has: a damaged length is told before tables of that size are made."""
MAX_QUERY_TERMS = 1024
"""A query keeps this many of its rarest terms."""
LONGEST_WORD = 40
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]+"
)
"""Runs of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""

_STEMMERS = {
    "ar": "arabic", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "fi": "finnish",
    "fr": "french", "hu": "hungarian", "it": "italian", "nl": "dutch", "no": "norwegian", "pt": "portuguese",
    "ro": "romanian", "ru": "russian", "sv": "swedish", "ta": "tamil", "tr": "turkish",
}  # fmt: skip
FILES = {
    "offsets": np.int64,  # [chunks + 1] where the entries of each chunk begin
    "terms": np.int32,  # [entries]
    "counts": np.uint16,  # [entries]
    "lengths": np.int32,  # [chunks] in words
    "vocabulary": np.uint64,  # [v] hashes of the terms, rising
    "tail": np.uint64,  # [t] hashes of the terms that edits added, numbered from v
    "frequencies": np.int64,  # [v] how many chunks hold each
    "changes": np.int32,  # [c, 2] term, and how many chunks more hold it
}
"""What lies in `words-NAME.npy`."""
_SCRATCH = {"hashed": np.uint64, "counted": np.uint16}
"""Terms' hashes and counts, chunk by chunk: what the forward index is made from."""
_TANTIVY_LOCK = ".tantivy-meta.lock"
_WRITER_BYTES = 64 << 20
_SAME_SCORE = 1e-5
"""Scores that differ by less, relatively, may differ by rounding alone."""


def analyzer(language: str) -> TextAnalyzer:
    """Splits at everything that is no letter or digit, folds case and accents, stems where a stemmer is known."""
    builder = TextAnalyzerBuilder(Tokenizer.simple()).filter(Filter.remove_long(LONGEST_WORD))
    builder = builder.filter(Filter.lowercase()).filter(Filter.ascii_fold())
    if language in _STEMMERS:
        builder = builder.filter(Filter.stemmer(_STEMMERS[language]))
    return builder.build()


def spaced(text: str) -> str:
    """`text` with what is written without spaces between words as pairs of neighbouring characters, which stand in for
    words there (Nie et al. 1999, "On the use of words and n-grams for Chinese information retrieval")."""
    return text if text.isascii() else _UNSPACED.sub(_pairs, text)


def _pairs(run: re.Match[str]) -> str:
    own = run[0]
    return f" {' '.join(own[i : i + 2] for i in range(max(1, len(own) - 1)))} "


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("chunk", fast=True, indexed=True)
    builder.add_text_field("text", tokenizer_name="treemem", index_option="freq")
    return builder.build()


def _length_table() -> Int32[np.ndarray, " 256"]:
    """Lengths that tantivy can store in one byte: exact to 40, then in ever wider steps (Lucene's SmallFloat)."""
    table = list(range(24))
    for code in range(256 - 24):
        bits, shift = code & 7, (code >> 3) - 1
        table.append(24 + (bits if shift < 0 else (bits | 8) << shift))
    return np.minimum(table, np.iinfo(np.int32).max).astype(np.int32)


class _Hashes:
    """64-bit hashes of terms, the most used ones remembered. Hashes need no dictionary that grows with the corpus."""

    def __init__(self, remembered: int = 200_000) -> None:
        self._known: dict[str, int] = {}
        self._remembered = remembered

    def __call__(self, term: str) -> int:
        found = self._known.get(term)
        if found is None:
            found = int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "little")
            if len(self._known) >= self._remembered:
                self._known.clear()
            self._known[term] = found
        return found


def build_lexical(folder: Path, texts: Iterable[str | None], chunks: int, language: str) -> int:
    """Write both indexes of the chunks' texts, given in order, into a folder. Returns how many words they have.

    None in place of a text stands for a chunk that was removed.
    """
    words = analyzer(language)
    (folder / "bm25").mkdir(parents=True)
    index = tantivy.Index(_schema(), str(folder / "bm25"))
    index.register_tokenizer("treemem", words)
    writer = index.writer(_WRITER_BYTES, 1)
    hashes = _Hashes()
    lengths = np.zeros(chunks, np.int64)
    offsets = np.zeros(chunks + 1, np.int64)
    with (folder / "hashed").open("wb") as hashed, (folder / "counted").open("wb") as counted:
        for chunk, own in enumerate(texts):
            text = "" if own is None else spaced(own)
            if own is not None:
                writer.add_document(tantivy.Document(chunk=chunk, text=text))
            terms = words.analyze(text)
            entries = sorted((hashes(term), count) for term, count in Counter(terms).items())
            lengths[chunk] = len(terms)
            offsets[chunk + 1] = offsets[chunk] + len(entries)
            hashed.write(np.fromiter((h for h, _ in entries), np.uint64, len(entries)).tobytes())
            counted.write(np.fromiter((min(c, 65535) for _, c in entries), np.uint16, len(entries)).tobytes())
    writer.commit()
    writer.wait_merging_threads()
    _write_forward(folder, offsets, lengths)
    return int(lengths.sum())


def update_index(folder: Path, language: str, texts: Sequence[str], first: int, gone: Sequence[int]) -> None:
    """Add chunks to an inverted index, and take others out.

    Args:
        folder: where it lies.
        language: of the texts.
        texts: of the new chunks.
        first: the number of the first of them.
        gone: the chunks that go.
    """
    index = tantivy.Index(_schema(), str(folder), reuse=True)
    index.register_tokenizer("treemem", analyzer(language))
    writer = index.writer(_WRITER_BYTES, 1)
    for chunk in gone:
        writer.delete_documents_by_term("chunk", chunk)
    for chunk, text in enumerate(texts, first):
        writer.add_document(tantivy.Document(chunk=chunk, text=spaced(text)))
    writer.commit()
    writer.wait_merging_threads()


def _write_forward(folder: Path, offsets: np.ndarray, lengths: np.ndarray) -> None:
    """Number the terms by the order of their hashes, so that terms rise within a chunk as their hashes do."""
    entries = int(offsets[-1])
    step = 1 << 22
    hashed, counted = (_mapped(folder / name, kind, entries) for name, kind in _SCRATCH.items())
    vocabulary = np.empty(0, np.uint64)
    for start in range(0, entries, step):
        vocabulary = np.union1d(vocabulary, hashed[start : start + step])
    frequencies = np.zeros(len(vocabulary), np.int64)

    def numbered() -> Iterator[np.ndarray]:
        for start in range(0, entries, step):
            terms = np.searchsorted(vocabulary, hashed[start : start + step]).astype(np.int32)
            np.add(frequencies, np.bincount(terms, minlength=len(vocabulary)), out=frequencies)
            yield terms

    write_npy(_file(folder, "terms"), np.dtype(np.int32), (entries,), numbered())
    arrays: dict[str, np.ndarray] = {
        "offsets": offsets,
        "counts": counted,
        "lengths": lengths,
        "vocabulary": vocabulary,
        "tail": np.empty(0),
        "frequencies": frequencies,
        "changes": np.empty((0, 2)),
    }
    for name, array in arrays.items():
        save_npy(_file(folder, name), array.astype(FILES[name]))
    del hashed, counted, arrays
    for name in _SCRATCH:
        (folder / name).unlink()


def _mapped(path: Path, kind: type, entries: int) -> np.ndarray:
    return np.memmap(path, kind, "r", shape=(entries,)) if entries else np.empty(0, kind)


def _file(folder: Path, name: str) -> Path:
    return folder / f"words-{name}.npy"


@dataclass(frozen=True)
class LexicalQuery:
    """The known terms of a query."""

    words: tuple[str, ...]
    terms: Int32[np.ndarray, " t"]
    """Numbers of the words in the forward index."""
    weights: Float32[np.ndarray, " t"]
    """Inverse document frequency times (k1 + 1) times how often the query has the term."""


class Lexical:
    """Both indexes of one snapshot, memory-mapped."""

    def __init__(
        self, folder: Path, language: str, chunks: int, words: int, rows: Mapping[str, int] | None = None
    ) -> None:
        """Open what `build_lexical` wrote.

        Args:
            folder: where it lies.
            language: of the texts.
            chunks: how many chunks have a document, removed ones left out.
            words: how many words these have.
            rows: how many rows of each array belong to it; by default all.
        """
        files = {name: _file(folder, name) for name in FILES}
        arrays = {name: map_npy(file, None if rows is None else rows.get(file.stem)) for name, file in files.items()}
        self.chunks = chunks
        if arrays["lengths"].min(initial=0) < 0 or arrays["lengths"].max(initial=0) > MOST_WORDS:
            raise _damaged(folder)
        norms = _norms(arrays["lengths"], words / chunks if words else 1.0)
        self.index = LexicalIndex(arrays["offsets"], arrays["terms"], arrays["counts"], norms)
        self.index.check()
        self._vocabulary: UInt64[np.ndarray, " v"] = arrays["vocabulary"]
        self._tail_order = np.argsort(arrays["tail"], kind="stable").astype(np.int32)
        self._tail = arrays["tail"][self._tail_order]
        self.frequencies: np.ndarray = arrays["frequencies"]
        """How many chunks hold each term."""
        if len(arrays["tail"]) or len(arrays["changes"]):
            self.frequencies = np.concatenate([self.frequencies, np.zeros(len(self._tail), np.int64)])
            np.add.at(self.frequencies, arrays["changes"][:, 0], arrays["changes"][:, 1])
        self._analyzer = analyzer(language)
        self._hash = _Hashes(10_000)
        self._schema = _schema()
        self._links = _links_where_read_only(folder / "bm25")
        with _as_damage(folder):
            place = self._links.name if self._links else str(folder / "bm25")
            inverted = tantivy.Index(self._schema, place, reuse=True)
            inverted.register_tokenizer("treemem", self._analyzer)
            self._searcher = inverted.searcher()
        self._folder = folder

    def analyze(self, text: str) -> list[str]:
        """The terms of a text, in order."""
        return list(self._analyzer.analyze(spaced(text)))

    def numbers(self, words: list[str]) -> Int32[np.ndarray, " words"]:
        """Numbers of terms, -1 for those that stand in no chunk."""
        hashes = np.fromiter((self._hash(word) for word in words), np.uint64, len(words))
        numbers = np.full(len(words), -1, np.int32)
        for known, order, first in ((self._vocabulary, None, 0), (self._tail, self._tail_order, len(self._vocabulary))):
            if len(known):
                places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
                found = known[places] == hashes
                numbers[found] = first + (places if order is None else order[places])[found]
        return numbers

    def entries(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """The terms of further chunks, as `FILES` has them: what is new of `tail`, and how many `entries` each has."""
        known = len(self._vocabulary) + len(self._tail)
        new: dict[str, int] = {}
        terms: list[int] = []
        counts: list[int] = []
        lengths: list[int] = []
        entries: list[int] = []
        for text in texts:
            words = self.analyze(text)
            counted = Counter(words)
            numbers = self.numbers(list(counted)).tolist()
            own = [new.setdefault(w, known + len(new)) if n < 0 else n for w, n in zip(counted, numbers, strict=True)]
            for number, count in sorted(zip(own, counted.values(), strict=True)):
                terms.append(number)
                counts.append(min(count, 65535))
            lengths.append(len(words))
            entries.append(len(counted))
        return {
            "terms": np.array(terms, np.int32),
            "counts": np.array(counts, np.uint16),
            "lengths": np.array(lengths, np.int32),
            "tail": np.array([self._hash(word) for word in new], np.uint64),
            "entries": np.array(entries, np.int64),
        }

    def idf(self, terms: Int32[np.ndarray, " t"]) -> np.ndarray:
        """Inverse document frequency of terms, as in tantivy: ln(1 + (N - n + 0.5) / (n + 0.5))."""
        found = self.frequencies[terms].astype(np.float64)
        return np.log1p((self.chunks - found + 0.5) / (found + 0.5))

    def all_idf(self) -> np.ndarray:
        """Inverse document frequencies by number; 0 for terms that no chunk holds any more."""
        return np.where(self.frequencies > 0, self.idf(np.arange(len(self.frequencies), dtype=np.int32)), 0)

    def query(self, text: str) -> LexicalQuery:
        """The terms of a query that stand in some chunk, rarest first, at most MAX_QUERY_TERMS."""
        counted = Counter(self.analyze(text))
        words = list(counted)
        numbers = self.numbers(words)
        known = np.flatnonzero(numbers >= 0)
        known = known[self.frequencies[numbers[known]] > 0]
        idf = self.idf(numbers[known])
        known = known[np.argsort(-idf, kind="stable")][:MAX_QUERY_TERMS]
        terms = numbers[known]
        times = np.array([counted[words[i]] for i in known], np.float64)
        weights = (self.idf(terms) * (K1 + 1) * times).astype(np.float32)
        return LexicalQuery(tuple(words[i] for i in known), terms, weights)

    def best(
        self, query: LexicalQuery, k: int, allowed: UInt8[np.ndarray, " chunks"] | None = None
    ) -> tuple[Int32[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
        """The k chunks with the highest BM25, best first, ties by the smaller chunk: from the inverted index.

        `allowed`: which chunks may be among them, 0 = not.
        """
        if not query.words or k < 1:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        idf = self.idf(query.terms) * (K1 + 1)
        clauses = [
            (Occur.Should, Query.boost_query(Query.term_query(self._schema, "text", word), float(weight / base)))
            for word, weight, base in zip(query.words, query.weights, idf, strict=True)
        ]
        asked = min(k + 32, self.index.size)
        # Until all that equal the k-th are there: which of them tantivy gives first depends on its files.
        while True:
            with _as_damage(self._folder):
                found = self._searcher.search(Query.boolean_query(clauses), asked, count=False).hits
                numbers = self._searcher.fast_field_values("chunk", [at for _, at in found])
            known = [own for own in numbers if isinstance(own, int) and 0 <= own < self.index.size]
            if len(known) < len(numbers):
                raise _damaged(self._folder)
            chunks = np.array(known, np.int32)
            kept = np.arange(len(chunks)) if allowed is None else np.flatnonzero(allowed[chunks])
            if len(found) < asked or asked == self.index.size:
                break
            if len(kept) >= k and found[-1][0] < found[kept[k - 1]][0] * (1 - _SAME_SCORE):
                break
            asked = min(2 * asked, self.index.size)
        # Scored again, since tantivy sums a query's terms in another order in each file.
        chunks = chunks[kept]
        scores = back_end().bm25_scores(self.index, query.terms, query.weights, chunks)
        order = np.lexsort((chunks, -scores))[:k]
        return chunks[order], scores[order]


@contextmanager
def _as_damage(folder: Path) -> Iterator[None]:
    """tantivy meets damaged files with ValueError or a panic, which is no ordinary exception; its class cannot be
    imported."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise _damaged(folder) from error


def _damaged(folder: Path) -> DamagedMemory:
    return DamagedMemory(f"{folder}: the index of words is damaged; delete the folder, it is made again")


def _norms(lengths: Int32[np.ndarray, " chunks"], mean: float) -> Float32[np.ndarray, " chunks"]:
    """`k1 * (1 - b + b * length / mean)`, with lengths as tantivy rounds them."""
    table = _length_table()
    longest = int(lengths.max(initial=0))
    stored = table[np.searchsorted(table, np.arange(longest + 1), side="right") - 1]
    return (K1 * (1 - B + B * stored / mean)).astype(np.float32)[lengths]


def _links_where_read_only(folder: Path) -> tempfile.TemporaryDirectory[str] | None:
    """A folder of links to an index that may not be written: tantivy writes a lock file even to read."""
    if os.access(folder, os.W_OK) and os.access(folder / _TANTIVY_LOCK, os.W_OK):
        return None
    links = tempfile.TemporaryDirectory(prefix="treemem-bm25-")
    for file in folder.iterdir():
        if not file.name.endswith(".lock"):
            Path(links.name, file.name).symlink_to(file.resolve())
    return links
