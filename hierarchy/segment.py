"""Cuts documents into chunks: runs of whole sentences that fit the encoder, with exact character spans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sentencex import get_sentence_boundaries

from treemem.types import Span

PIECE_CHARACTERS = 100_000
"""Longest stretch that is split into sentences at once, so that a book needs no more memory than a page."""
LONGEST_TOKEN = 24
"""A token of more characters is no word but something that the encoder does not know, and counts as several, …"""
UNKNOWN_CHARACTERS = 4
"""… one for so many characters."""
LONGEST_GAP = 100
"""Characters that no token holds (white space, control characters) count as a token for so many."""

Tokenize = Callable[[list[str]], list[list[Span]]]
"""Encoder tokens of texts: for each text the (start, end) characters of its tokens, special tokens left out."""


@dataclass(frozen=True)
class Segment:
    """A stretch of text that is kept together, with its number of tokens."""

    start: int
    end: int
    tokens: int


def pieces(text: str, longest: int = PIECE_CHARACTERS) -> Iterator[Span]:
    """Spans that cover `text`, in order, each of at most `longest` characters, cut at a paragraph, line or word."""
    start = 0
    while len(text) - start > longest:
        limit = start + longest
        end = limit
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + longest // 2, limit)
            if found >= 0:
                end = found + len(mark)
                break
        yield start, end
        start = end
    if start < len(text):
        yield start, len(text)


def sentences(text: str, language: str = "en") -> list[Span]:
    """Spans of the sentences of `text`, in order, without gaps; a heading line goes with what follows it."""
    ends: list[int] = []
    heading = False
    for sentence in get_sentence_boundaries(language, text):
        start, end = sentence["start_index"], sentence["end_index"]
        body = text[start:end]
        # A blank stretch or a heading on its own is no sentence: it joins what comes next.
        if ends and heading:
            ends[-1] = end
        else:
            ends.append(end)
        heading = (heading and not body.strip()) or (body.lstrip().startswith("#") and "\n" not in body.strip())
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _lines(text: str, start: int, end: int) -> list[Span]:
    spans = []
    while start < end:
        cut = text.find("\n", start, end)
        stop = end if cut < 0 else cut + 1
        spans.append((start, stop))
        start = stop
    return spans


def _words(text: str, start: int, end: int, tokens: list[Span], limit: int) -> list[Segment]:
    """Cut a stretch that is too long at the last white space before each `limit` tokens, else between two tokens."""
    out = []
    first = 0
    while first < len(tokens):
        last = min(first + limit, len(tokens))
        cut = last
        if last < len(tokens):
            while cut > first + 1 and not text[tokens[cut][0] - 1].isspace():
                cut -= 1
            if cut == first + 1 and not text[tokens[cut][0] - 1].isspace():
                cut = last
        stop = end if cut == len(tokens) else tokens[cut][0]
        out.append(Segment(start, stop, cut - first))
        start, first = stop, cut
    return out or [Segment(start, end, 0)]


def _counted(tokenize: Tokenize) -> Tokenize:
    """Tokens such that a number of them bounds the number of characters, for any text and encoder."""

    def counted(texts: list[str]) -> list[list[Span]]:
        return [_divided(spans, len(text)) for text, spans in zip(texts, tokenize(texts), strict=True)]

    return counted


def _divided(tokens: list[Span], length: int) -> list[Span]:
    out: list[Span] = []
    done = 0
    for start, end in tokens:
        if start - done > LONGEST_GAP:
            out.extend(_parts(done, start, LONGEST_GAP))
        if end - start > LONGEST_TOKEN:
            out.extend(_parts(start, end, UNKNOWN_CHARACTERS))
        else:
            out.append((start, end))
        done = end
    if length - done > LONGEST_GAP:
        out.extend(_parts(done, length, LONGEST_GAP))
    return out


def _parts(start: int, end: int, size: int) -> list[Span]:
    return [(at, min(at + size, end)) for at in range(start, end, size)]


def _segments(text: str, spans: list[Span], tokenize: Tokenize, limit: int) -> list[Segment]:
    """Sentences that fit `limit`; those that don't are cut into lines, and lines into words."""
    out: list[Segment] = []
    for (start, end), tokens in zip(spans, tokenize([text[a:b] for a, b in spans]), strict=True):
        if len(tokens) <= limit:
            out.append(Segment(start, end, len(tokens)))
            continue
        lines = _lines(text, start, end)
        if len(lines) > 1:
            out.extend(_segments(text, lines, tokenize, limit))
        else:
            out.extend(_words(text, start, end, [(start + a, start + b) for a, b in tokens], limit))
    return out


def _stripped(text: str, start: int, end: int) -> Span | None:
    body = text[start:end]
    left = len(body) - len(body.lstrip())
    right = len(body.rstrip())
    return (start + left, start + right) if left < right else None


def _pack(segments: list[Segment], limit: int) -> Iterator[Span]:
    start = end = tokens = 0
    for segment in segments:
        if tokens + segment.tokens > limit and end > start:
            yield start, end
            start, tokens = segment.start, 0
        end = segment.end
        tokens += segment.tokens
    if end > start:
        yield start, end


def cut(text: str, tokenize: Tokenize, limit: int, language: str = "en") -> list[Span]:
    """Chunks of a text.

    Args:
        text: any Unicode text.
        tokenize: the encoder's tokens of a list of texts, as character spans.
        limit: most tokens in a chunk.
        language: ISO 639-1 code, for the sentence ends.

    Returns:
        Character spans in order. Together they cover all text that is not white space; each holds at most `limit`
        tokens when tokenized on its own, also of a text that the encoder has no words for (see `LONGEST_TOKEN`), ends
        at a sentence end where the sentence fits, and neither begins nor ends with white space.
    """
    tokenize = _counted(tokenize)
    chunks: list[Span] = []
    for begin, stop in pieces(text):
        piece = text[begin:stop]
        segments = _segments(piece, sentences(piece, language), tokenize, limit)
        spans = [span for a, b in _pack(segments, limit) if (span := _stripped(piece, a, b))]
        chunks.extend((begin + a, begin + b) for a, b in _fitting(piece, spans, tokenize, limit))
    return chunks


def _fitting(text: str, spans: list[Span], tokenize: Tokenize, limit: int) -> list[Span]:
    """Tokens of a whole may be more than the sum of its parts (byte-pair encoders): halve what became too long."""
    if not spans:
        return []
    out: list[Span] = []
    for (start, end), tokens in zip(spans, tokenize([text[a:b] for a, b in spans]), strict=True):
        if len(tokens) <= limit or end - start < 2:
            out.append((start, end))
            continue
        halves = _words(text, start, end, [(start + a, start + b) for a, b in tokens], max(1, limit // 2))
        if len(halves) < 2:
            out.append((start, end))
            continue
        parts = [span for half in halves if (span := _stripped(text, half.start, half.end))]
        out.extend(_fitting(text, parts, tokenize, limit))
    return out
