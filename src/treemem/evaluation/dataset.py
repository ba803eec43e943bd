"""Evaluation sets: documents, queries and judgements in BEIR's layout, with sections and evidence where known."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from treemem.errors import InputError
from treemem.hierarchy.readers import ReadReport, clean, read
from treemem.hierarchy.readers.jsonl import records
from treemem.hierarchy.readers.source import NotReadable, Source
from treemem.types import Document, Progress, Span, no_progress

JudgedBy = Literal["evidence", "sections", "documents"]
"""What makes a chunk right: the finest judgement that a query has."""

NO_SPLIT = "-"
"""The split of queries that name none."""

_PACKED = ("", ".zst", ".gz")


@dataclass(frozen=True)
class EvalQuery:
    """A query and what is right for it."""

    id: str
    text: str
    relevant: Mapping[str, int]
    """Grades, all above 0, of the relevant documents."""
    judged_by: JudgedBy
    spans: Mapping[str, tuple[Span, ...]]
    """By document, the characters that a right chunk overlaps; empty where judged by documents."""
    answers: tuple[str, ...] = ()
    source: str = ""
    """Where the query comes from, in sets put together from several."""
    split: str = NO_SPLIT


@dataclass(frozen=True)
class EvalSet:
    """Queries with their judgements, and the corpus that they ask about."""

    folder: Path
    corpus: Path
    split: str | None
    queries: tuple[EvalQuery, ...]
    without_qrels: int
    """Queries left out because no document is relevant to them."""
    documents: int
    """Documents with text in the corpus."""
    unreadable: int
    """Lines of the corpus that gave no document."""
    changed: int
    """Documents whose stored text differs from the file's, so that their spans were moved."""
    text_digests: Mapping[str, bytes]
    """Of the relevant documents that the corpus holds: what tells whether a memory holds the same texts."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @cached_property
    def missing(self) -> int:
        """Relevant documents that the corpus does not hold: no search can find them, and they count as not found."""
        return len({document for query in self.queries for document in query.relevant} - set(self.text_digests))

    def read_documents(self, report: ReadReport | None = None) -> Iterator[Document]:
        """The corpus, one document at a time, as `Memory.build` takes it."""
        for document in read(self.corpus, ReadReport() if report is None else report):
            # Not the path: a corpus that was moved is the same corpus.
            metadata = {key: value for key, value in document.metadata.items() if key != "source"}
            yield replace(document, metadata=metadata)

    def sample(self, most: int | None, seed: int) -> EvalSet:
        """The same set with at most so many queries, drawn without replacement, kept in order.

        Raises InputError where `most` is below 1.
        """
        if most is not None and most < 1:
            raise InputError(f"max_queries = {most}: it must be at least 1")
        if most is None or most >= len(self.queries):
            return self
        drawn = np.sort(np.random.default_rng(seed).choice(len(self.queries), most, replace=False))
        return replace(self, queries=tuple(self.queries[i] for i in drawn))

    def with_answers(self) -> EvalSet:
        """The same set with only the queries that have gold answers.

        Raises InputError where none has.
        """
        kept = tuple(query for query in self.queries if query.answers)
        if not kept:
            raise InputError(f'{self.folder}: no query has "answers" to compare replies with; name a set that has them')
        return replace(self, queries=kept)


def text_digest(text: str) -> bytes:
    """A short digest of a stored text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def load_set(folder: str | Path, split: str | None = None, progress: Progress = no_progress) -> EvalSet:
    """Read an evaluation set.

    Args:
        folder: holds `corpus.jsonl`, `queries.jsonl` (each plain, .gz or .zst) and `qrels.tsv`, or BEIR's
            `qrels/<split>.tsv`; `sections.jsonl` and `qrels_sections.tsv` where the set has sections.
        split: only queries of this split, or of several: `dev,test`; `-` = those without one.
        progress: told how many documents were read.

    Raises:
        InputError: a file is missing or cannot be used, there is no such split, or no query is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one with corpus.jsonl, queries.jsonl and qrels.tsv")
    corpus = _require(folder, "corpus.jsonl")
    wanted = None if split is None else {part.strip() for part in split.split(",")}
    relevant, splits = _qrels(folder, wanted)
    sections = _sections(folder)
    queries, without = [], 0
    met: set[str] = set()
    for where, record in _objects(_require(folder, "queries.jsonl")):
        identity = _identity(record, where)
        own_split = splits.get(identity) or str(record.get("split") or NO_SPLIT)
        met.add(own_split)
        if wanted is not None and own_split not in wanted:
            continue
        if identity not in relevant:
            without += 1
            continue
        queries.append(_query(identity, record, own_split, relevant[identity], sections.get(identity, {}), where))
    if wanted is not None and not wanted <= met:
        unknown = ", ".join(sorted(wanted - met))
        raise InputError(f"{folder}: no split {unknown}; there are {', '.join(sorted(met))}")
    if not queries:
        raise InputError(f"{folder}: no query with relevant documents ({without} without any); nothing to evaluate")
    return _with_corpus(folder, corpus, split, queries, without, progress)


# ---- files


def _find(folder: Path, name: str) -> Path | None:
    return next((path for end in _PACKED if (path := folder / f"{name}{end}").is_file()), None)


def _require(folder: Path, name: str) -> Path:
    path = _find(folder, name)
    if path is None:
        raise InputError(f"{folder}: no {name}, nor {name}.gz or .zst; an evaluation set needs one")
    return path


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(data)
        return _unpack(data) if path.suffix == ".zst" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: it cannot be read ({error})") from error


def _unpack(data: bytes) -> bytes:
    """Zstandard frames one after the other; a cut one is an error, not fewer queries."""
    import zstandard

    out = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            out.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if not frame.eof:
            raise EOFError("the compressed stream ends in the middle")
        data = frame.unused_data
    return b"".join(out)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Every line that is not blank, with where it stands."""
    # Not splitlines: JSON may hold U+2028 and its kind unescaped.
    for number, line in enumerate(_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, line.decode().rstrip("\r")
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 text") from error


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise InputError(f"{where}: not a JSON object")
        yield where, value


def _table(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Where a judgement stands, its query, what is judged, and the grade."""
    for number, (where, line) in enumerate(_lines(path)):
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) != 3:
            raise InputError(f"{where}: {len(parts)} columns; expected query-id, corpus-id and score between tabs")
        try:
            yield where, parts[0], parts[1], int(parts[2])
        except ValueError as error:
            if number:  # the first line may name the columns
                raise InputError(f"{where}: score {parts[2]!r} is no whole number") from error


# ---- judgements

_Graded = dict[str, dict[str, int]]
_Spans = dict[str, tuple[Span, ...]]


def _qrels(folder: Path, wanted: set[str] | None) -> tuple[_Graded, dict[str, str]]:
    """Positive grades by query, and, in BEIR's layout, each judged query's split."""
    plain = folder / "qrels.tsv"
    files = [plain] if plain.is_file() else sorted((folder / "qrels").glob("*.tsv"))
    if not files:
        raise InputError(f"{folder}: no qrels.tsv and no qrels/*.tsv; an evaluation set needs its judgements")
    by_file = files != [plain]
    names = [file.stem for file in files]
    if by_file and wanted is not None:
        if not wanted <= set(names):
            raise InputError(
                f"{folder}: no split {', '.join(sorted(wanted - set(names)))}; there are {', '.join(names)}"
            )
        files = [file for file in files if file.stem in wanted]
    relevant: _Graded = {}
    splits: dict[str, str] = {}
    for file in files:
        for _, query, document, grade in _table(file):
            if by_file:
                splits[query] = file.stem
            if grade > 0:
                relevant.setdefault(query, {})[document] = grade
    return relevant, splits


def _sections(folder: Path) -> dict[str, _Spans]:
    """By query, the spans of its relevant sections in their documents."""
    judgements = folder / "qrels_sections.tsv"
    if not judgements.is_file():
        return {}
    places: dict[str, tuple[str, Span]] = {}
    for where, record in _objects(_require(folder, "sections.jsonl")):
        places[_identity(record, where)] = _place(record, "parent", where)
    out: dict[str, dict[str, list[Span]]] = {}
    for where, query, section, grade in _table(judgements):
        if section not in places:
            raise InputError(f"{where}: section {section!r} is not in sections.jsonl")
        if grade > 0:
            document, span = places[section]
            out.setdefault(query, {}).setdefault(document, []).append(span)
    return {query: {document: tuple(spans) for document, spans in own.items()} for query, own in out.items()}


def _identity(record: Mapping[str, Any], where: str) -> str:
    value = record.get("id", record.get("_id"))
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f'{where}: no "id"')
    return str(value).strip()


def _place(record: Any, key: str, where: str) -> tuple[str, Span]:
    try:
        document, start, end = record[key], record["start"], record["end"]
    except (KeyError, TypeError) as error:
        raise InputError(f'{where}: a span needs "{key}", "start" and "end"') from error
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise InputError(f"{where}: start {start!r} and end {end!r} are no span of characters")
    return str(document).strip(), (start, end)


def _query(
    identity: str, record: Mapping[str, Any], split: str, relevant: dict[str, int], sections: _Spans, where: str
) -> EvalQuery:
    text, answers = record.get("text"), record.get("answers") or []
    if not isinstance(text, str):
        raise InputError(f'{where}: no "text"')
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f'{where}: "answers" is not a list of strings')
    evidence: dict[str, list[Span]] = {}
    for item in record.get("evidence") or []:
        document, span = _place(item, "doc", where)
        evidence.setdefault(document, []).append(span)
    judged_by: JudgedBy = "evidence" if evidence else "sections" if sections else "documents"
    spans = {document: tuple(own) for document, own in evidence.items()} if evidence else sections
    source = str(record.get("source") or "")
    return EvalQuery(identity, text, relevant, judged_by, spans, tuple(answers), source, split)


# ---- the corpus


def _with_corpus(
    folder: Path, corpus: Path, split: str | None, queries: list[EvalQuery], without: int, progress: Progress
) -> EvalSet:
    """Read the corpus once: count it, and bring every span into the stored form of its text."""
    wanted = {document for query in queries for document in (*query.relevant, *query.spans)}
    ends: dict[str, int] = {}
    for query in queries:
        for document, spans in query.spans.items():
            ends[document] = max(ends.get(document, 0), *(end for _, end in spans))
    digests: dict[str, bytes] = {}
    moved: dict[str, str] = {}
    documents = unreadable = 0
    for draft in _drafts(corpus):
        stored = "" if isinstance(draft, NotReadable) else clean(draft.text)
        if not stored.strip():
            unreadable += 1
            continue
        documents += 1
        if documents % 1000 == 0:
            progress("reading the corpus", documents, None)
        if draft.id not in wanted or draft.id in digests:
            continue
        if ends.get(draft.id, 0) > len(draft.text):
            raise InputError(f"{folder}: a span ends at {ends[draft.id]}, past document {draft.id!r}; wrong corpus?")
        digests[draft.id] = text_digest(stored)
        if stored != draft.text and draft.id in ends:
            moved[draft.id] = draft.text
    if moved:
        queries = [replace(query, spans=_moved(query.spans, moved)) for query in queries]
    return EvalSet(folder, corpus, split, tuple(queries), without, documents, unreadable, len(moved), digests)


def _drafts(corpus: Path) -> Iterator[Any]:
    try:
        yield from records(Source(corpus, corpus.name, str(corpus)))
    except (OSError, NotReadable) as error:
        raise InputError(f"{corpus}: it cannot be read ({error})") from error


def _moved(spans: Mapping[str, tuple[Span, ...]], texts: Mapping[str, str]) -> _Spans:
    """Spans of the files' texts as spans of the stored ones: a place is where the cleaned text before it ends."""

    def place(text: str, offset: int) -> int:
        return len(clean(text[:offset]))

    return {
        document: tuple((place(texts[document], a), place(texts[document], b)) for a, b in own)
        if document in texts
        else own
        for document, own in spans.items()
    }
