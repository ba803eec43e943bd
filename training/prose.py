"""Prose as tokens to train an autoencoder on, and what of held-out prose came through: words, names, numbers."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt16
from tokenizers import Tokenizer

from treemem.errors import InputError, UnknownModel
from treemem.hierarchy.embed import DEFAULT_ENCODER, packaged_minilm
from treemem.hierarchy.readers import ReadReport, read
from treemem.types import Progress, Span, no_progress

SUFFIX = ".tokens.xz"
"""Of files that `save_tokens` writes."""
ASIDE_EVERY = 50
"""Every so manieth document is kept apart where no held-out texts are named."""
_SENTENCE_ENDS = frozenset('.!?:;"“”\n')
_BATCH = 64


# ---- tokens


@dataclass(frozen=True)
class Tokens:
    """Documents as tokens, one after the other."""

    ids: UInt16[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " documents"]
    """Where each document begins."""


def load_tokenizer(name: str = DEFAULT_ENCODER) -> Tokenizer:
    """A tokenizer by name: `minilm` (packaged), or a folder with a `tokenizer.json`.

    It neither pads nor cuts and adds no special tokens. Raises UnknownModel where there is none.
    """
    folder = Path(packaged_minilm() if name == DEFAULT_ENCODER else name).expanduser()
    try:
        raw = (folder / "tokenizer.json").read_text("utf-8")
        document = json.loads(raw)
        document["post_processor"] = None
        tokenizer = Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises plain Exception
        raise UnknownModel(f"tokenizer {name!r}: no usable tokenizer.json in that folder ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.get_vocab_size() > 1 << 16:
        raise UnknownModel(f"tokenizer {name!r}: more than 65,536 tokens do not fit the token files")
    return tokenizer


def read_tokens(
    paths: Sequence[str], tokenizer: Tokenizer, progress: Progress = no_progress, *, aside: list[str] | None = None
) -> Tokens:
    """The tokens of documents, or of token files that were prepared before.

    Args:
        paths: files, folders and globs as `treemem build` reads them, and files that `save_tokens` wrote.
        tokenizer: see `load_tokenizer`.
        aside: gets the text of every 50th document that is no token file's, in place of the tokens.
        progress: told about tokens.

    Raises:
        InputError: a path does not exist, nothing could be read, or a token file is damaged or of another tokenizer.
    """
    prepared = [load_tokens(Path(path), tokenizer) for path in paths if path.endswith(SUFFIX)]
    plain = [path for path in paths if not path.endswith(SUFFIX)]
    parts = [own.ids for own in prepared]
    starts = [own.starts for own in prepared]
    if plain:
        ids, lengths, done = [], [], 0
        for texts in _batched(plain, aside):
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                ids.append(np.array(encoding.ids, np.uint16))
                lengths.append(len(encoding.ids))
                done += len(encoding.ids)
            progress("reading tokens", done, None)
        parts.append(np.concatenate(ids) if ids else np.empty(0, np.uint16))
        starts.append(np.cumsum([0, *lengths])[:-1])
    offsets = np.cumsum([0, *map(len, parts[:-1])])
    whole = [own + offset for own, offset in zip(starts, offsets, strict=True)]
    return Tokens(np.concatenate(parts), np.concatenate(whole).astype(np.int64))


def _batched(paths: Sequence[str], aside: list[str] | None) -> Iterator[list[str]]:
    texts: list[str] = []
    for number, document in enumerate(read(list(paths), ReadReport())):
        if aside is not None and number % ASIDE_EVERY == ASIDE_EVERY - 1:
            aside.append(document.text)
            continue
        texts.append(document.text)
        if len(texts) == _BATCH:
            yield texts
            texts = []
    if texts:
        yield texts


def save_tokens(tokens: Tokens, tokenizer: Tokenizer, path: Path) -> None:
    """Write tokens to a compressed file: a line of JSON, then little-endian uint16; about one byte a token."""
    head = {"vocabulary": tokenizer.get_vocab_size(), "starts": tokens.starts.tolist()}
    partial = path.with_name(path.name + ".part")
    with lzma.open(partial, "wb", preset=6) as file:
        file.write(json.dumps(head).encode() + b"\n")
        file.write(tokens.ids.astype("<u2").tobytes())
    partial.replace(path)


def load_tokens(path: Path, tokenizer: Tokenizer) -> Tokens:
    """Read what `save_tokens` wrote.

    Raises:
        InputError: there is no such file, it is damaged, or it was made with another tokenizer.
    """
    try:
        with lzma.open(path, "rb") as file:
            head = json.loads(file.readline())
            ids = np.frombuffer(file.read(), "<u2").astype(np.uint16)
        starts, vocabulary = np.array(head["starts"], np.int64), head["vocabulary"]
    except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no token file, or a damaged one ({error}); prepare it again") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if vocabulary != tokenizer.get_vocab_size():
        raise InputError(f"{path}: made with a tokenizer of {vocabulary:,} tokens; prepare it again with this one")
    return Tokens(ids, starts)


# ---- held-out windows


@dataclass(frozen=True)
class Window:
    """Some tokens of one document with the text that they were read from."""

    ids: Int64[np.ndarray, " tokens"]
    text: str
    names: frozenset[int]
    """Which of `words_of` its tokens are names: capitalised in the text, not at a sentence's start."""


def windows(texts: Sequence[str], tokenizer: Tokenizer, length: int, most: int, seed: int = 0) -> list[Window]:
    """Windows drawn at random from texts, at most a few from each; each begins with a word.

    Args:
        texts: of documents; those of fewer than `length` tokens give none.
        tokenizer: see `load_tokenizer`.
        length: tokens of a window.
        most: windows.
        seed: of the drawing.
    """
    draw = np.random.default_rng(seed)
    out: list[Window] = []
    each = -(-most // max(1, len(texts))) + 1
    for number in draw.permutation(len(texts)):
        text = texts[number]
        encoding = tokenizer.encode(text, add_special_tokens=False)
        pieces, offsets = encoding.tokens, encoding.offsets
        begins = [i for i in range(len(pieces) - length + 1) if not pieces[i].startswith("##")]
        for begin in sorted(draw.permutation(begins)[:each].tolist()):
            end = begin + length
            ids = np.array(encoding.ids[begin:end], np.int64)
            names = _names(pieces, offsets, text, begin, end)
            out.append(Window(ids, text[offsets[begin][0] : offsets[end - 1][1]], names))
            if len(out) == most:
                return out
    return out


def _names(pieces: Sequence[str], offsets: Sequence[Span], text: str, begin: int, end: int) -> frozenset[int]:
    found = set()
    for number, first in enumerate(_word_starts(pieces[begin:end])):
        at = offsets[begin + first][0]
        before = text[:at].rstrip(" \t")[-1:]
        length = len(_joined(pieces, begin + first, end))
        if text[at : at + 1].isupper() and length > 1 and before and before not in _SENTENCE_ENDS:
            found.add(number)
    return frozenset(found)


def _joined(pieces: Sequence[str], first: int, end: int) -> str:
    word = pieces[first]
    for piece in pieces[first + 1 : end]:
        if not piece.startswith("##"):
            break
        word += piece[2:]
    return word


def _word_starts(pieces: Sequence[str]) -> list[int]:
    """Where words begin: pieces that continue none and hold a letter or digit; unknown and special tokens are none."""
    return [
        i
        for i, piece in enumerate(pieces)
        if not (piece.startswith("##") and i) and piece[:1] != "[" and any(c.isalnum() for c in piece)
    ]


def words_of(pieces: Sequence[str]) -> list[str]:
    """The words that WordPiece tokens spell: runs of a token and those that continue it, without punctuation."""
    return [_joined(pieces, first, len(pieces)) for first in _word_starts(pieces)]


def pieces_of(ids: Iterable[Any], tokenizer: Tokenizer) -> list[str]:
    """Tokens by their numbers."""
    return [tokenizer.id_to_token(int(number)) or "[UNK]" for number in ids]


# ---- what came through


def aligned(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """A longest common subsequence, exactly: pairs of places in both, in order."""
    start = 0
    while start < min(len(first), len(second)) and first[start] == second[start]:
        start += 1
    a, b = first[start:], second[start:]
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) - 1, -1, -1):
        row, below, word = lengths[i], lengths[i + 1], a[i]
        for j in range(len(b) - 1, -1, -1):
            row[j] = below[j + 1] + 1 if word == b[j] else max(below[j], row[j + 1])
    pairs = [(i, i) for i in range(start)]
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            pairs.append((start + i, start + j))
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


@dataclass(frozen=True)
class Kept:
    """How much of some windows came through, as counts over all of them."""

    words: int
    words_aligned: int
    names: int
    names_exact: int
    numbers: int
    numbers_exact: int

    def shares(self) -> dict[str, float]:
        """`words aligned`, `names exact`, `numbers exact`, `names and numbers exact`; 0 where there are none."""
        exact, both = self.names_exact + self.numbers_exact, self.names + self.numbers
        return {
            "words aligned": self.words_aligned / max(1, self.words),
            "names exact": self.names_exact / max(1, self.names),
            "numbers exact": self.numbers_exact / max(1, self.numbers),
            "names and numbers exact": exact / max(1, both),
        }


def kept(originals: Sequence[Window], rebuilt: Sequence[Int64[np.ndarray, " tokens"]], tokenizer: Tokenizer) -> Kept:
    """Compare windows with what was rebuilt of them.

    - words aligned: those of the original's words that stand in the longest common subsequence of both texts' words;
    - names: words capitalised in the original, of more than one letter, not at a sentence's start; they are compared
      without case, since the tokenizer has none;
    - numbers: words with a digit, so that "1,234" are two;
    - exact: standing in that alignment.
    """
    counts = np.zeros(6, np.int64)
    for window, ids in zip(originals, rebuilt, strict=True):
        own = words_of(pieces_of(window.ids, tokenizer))
        met = {i for i, _ in aligned(own, words_of(pieces_of(ids, tokenizer)))}
        numbers = {i for i, word in enumerate(own) if any(c.isdigit() for c in word)}
        names = window.names - numbers
        counts += [len(own), len(met), len(names), len(names & met), len(numbers), len(numbers & met)]
    return Kept(*map(int, counts))
