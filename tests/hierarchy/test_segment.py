"""Chunks: exact spans, everything covered, never too long, for any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treemem.hierarchy import segment
from treemem.hierarchy.embed import Encoder, load_encoder
from treemem.hierarchy.segment import cut, pieces, sentences

PROSE = "The cat sat on the mat. Dr. Smith, of the U.S. Army, paid 3.50 dollars! Why? Nobody knows. "

any_text = st.one_of(
    st.text(max_size=400),
    st.lists(
        st.sampled_from(
            [
                "Hello world. ",
                "Is it? ",
                "\n\n",
                "\n",
                "# Head\n",
                "x" * 200,
                "日本語です。",
                "a\u0301",
                "😀 ",
                "\t",
                "1.5 ",
            ]
        ),
        max_size=120,
    ).map("".join),
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder()


def check(text: str, encoder: Encoder, limit: int) -> list[tuple[int, int]]:
    spans = cut(text, encoder.token_spans, limit)
    covered = 0
    for start, end in spans:
        assert covered <= start < end <= len(text)
        assert not text[covered:start].strip(), "text between two chunks is lost"
        chunk = text[start:end]
        assert chunk == chunk.strip()
        assert len(encoder.token_spans([chunk])[0]) <= limit
        assert end - start <= limit * (segment.LONGEST_GAP + segment.LONGEST_TOKEN) + segment.LONGEST_GAP
        covered = end
    assert not text[covered:].strip(), "text after the last chunk is lost"
    return spans


@given(text=any_text, limit=st.sampled_from([8, 20, 126]))
@settings(max_examples=200, deadline=None)
def test_chunks_cover_any_text_in_order(text: str, limit: int, encoder: Encoder) -> None:
    check(text, encoder, limit)


@given(text=any_text, longest=st.integers(1, 50))
@settings(deadline=None)
def test_pieces_and_sentences_leave_no_gap(text: str, longest: int) -> None:
    spans = list(pieces(text, longest))
    assert "".join(text[a:b] for a, b in spans) == text
    assert all(0 < b - a <= longest for a, b in spans)
    assert "".join(text[a:b] for a, b in sentences(text)) == text


def test_chunks_end_at_sentence_ends(encoder: Encoder) -> None:
    text = PROSE * 40
    for start, end in check(text, encoder, 126):
        assert text[start:end].endswith((".", "?", "!"))
        assert not text[start:end].endswith(("Dr.", "U.S.")), "cut inside a sentence"


def test_chunks_are_as_full_as_sentences_allow(encoder: Encoder) -> None:
    text = PROSE * 40
    sizes = [len(tokens) for tokens in encoder.token_spans([text[a:b] for a, b in check(text, encoder, 126)])]
    assert min(sizes[:-1]) > 126 - 20


def test_a_heading_goes_with_the_text_below_it(encoder: Encoder) -> None:
    text = "Some words before it. " * 20 + "\n\n## A heading\n\nThe text that belongs to the heading. " + "More. " * 30
    for start, end in check(text, encoder, 60):
        assert not text[start:end].endswith("## A heading")


def test_long_sentences_are_cut_at_lines_then_words(encoder: Encoder) -> None:
    lines = "\n".join(f"speaker {i}: yes and then the thing with no full stop" for i in range(60))
    text_chunks = [lines[a:b] for a, b in check(lines, encoder, 60)]
    assert all(chunk.startswith("speaker") for chunk in text_chunks)
    words = "word " * 1000
    assert all(words[a:b].endswith("word") for a, b in check(words, encoder, 60))


def test_text_longer_than_a_piece(encoder: Encoder) -> None:
    text = PROSE * 3000
    assert len(text) > 200_000
    assert len(check(text, encoder, 126)) > 100


THAI = "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอนหรือวรรณยุกต์เช่นเดียวกับภาษาจีน"


@pytest.mark.parametrize(
    ("unit", "longest"),
    [
        ("a", 400),
        ("0123456789abcdef", 400),
        (THAI, 504),
        (THAI + " ", 1600),
        ("\u200b", 12_700),
        ("a" + " " * 5000, 12_700),
    ],
)
def test_what_the_encoder_does_not_know_is_cut_too(unit: str, longest: int, encoder: Encoder) -> None:
    text = unit * (60_000 // len(unit))
    spans = check(text, encoder, 126)
    assert max(end - start for start, end in spans) <= longest


def test_words_without_end_are_told_apart(encoder: Encoder) -> None:
    one, other, thai = encoder.encode(["a" * 300, "0123456789" * 30, THAI * 5], precise=True)
    assert one @ other < 0.9
    assert one @ thai < 0.9


@pytest.mark.parametrize("text", ["", " \n\t ", "\u200b", "\x07", "x" * 5000, "\ufeff"])
def test_odd_texts(text: str, encoder: Encoder) -> None:
    assert bool(check(text, encoder, 126)) == bool(text.strip())
