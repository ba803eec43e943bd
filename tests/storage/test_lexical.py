"""Both indexes of words: the forward index gives tantivy's own scores."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tantivy
from tantivy import Occur, Query

from treemem.kernels.reference import bm25_all, bm25_scores
from treemem.storage import lexical
from treemem.storage.lexical import MAX_QUERY_TERMS, Lexical, LexicalQuery, analyzer, build_lexical

WORDS = [f"word{n}" for n in range(400)]


def built(folder: Path, texts: list[str], language: str = "en") -> Lexical:
    words = build_lexical(folder, iter(texts), len(texts), language)
    return Lexical(folder, language, len(texts), words)


def random_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Texts whose words are as uneven as in a language, of very different lengths."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, len(WORDS) + 1)
    lengths = generator.integers(0, longest, count)
    return [" ".join(generator.choice(WORDS, length, p=shares / shares.sum())) for length in lengths]


def real_texts() -> list[str]:
    """Paragraphs of the licence that comes with every Python, and of some modules of its library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [library / name for name in ("argparse.py", "asyncio/events.py", "decimal.py", "heapq.py", "os.py")]
    text = "\n\n".join(path.read_text("utf-8") for path in sources if path.exists())
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def scores_of_all(index: Lexical, query: LexicalQuery) -> np.ndarray:
    return bm25_all(index.index, query.terms, query.weights)


def check_against_tantivy(index: Lexical, text: str, k: int = 256) -> None:
    query = index.query(text)
    ids, scores = index.best(query, k)
    own = scores_of_all(index, query)
    assert len(ids) == min(k, int((own > 0).sum()))
    assert len(set(ids.tolist())) == len(ids)
    np.testing.assert_allclose(scores, own[ids], rtol=2e-5)
    if len(ids):  # nothing that was left out is better
        left_out = np.delete(own, ids)
        assert left_out.size == 0 or left_out.max() <= scores.min() * (1 + 2e-5)
        assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("longest", [8, 60, 400])
def test_the_forward_index_scores_as_tantivy_does(tmp_path: Path, longest: int) -> None:
    """Lengths beyond 40 words are rounded in the inverted index, so they must be in the forward one."""
    index = built(tmp_path, random_texts(700, longest))
    generator = np.random.default_rng(1)
    for size in (1, 2, 5, 20, 100):
        check_against_tantivy(index, " ".join(generator.choice(WORDS, size)))


def test_real_text(tmp_path: Path) -> None:
    texts = real_texts()
    assert len(texts) > 300
    index = built(tmp_path, texts)
    for text in (
        "Return the smallest item",
        "How do I register a callback on the event loop?",
        "decimal rounding ROUND_HALF_EVEN, precision of a context",
        "the the the of",
        texts[100],
    ):
        check_against_tantivy(index, text)


def test_tantivy_itself_agrees(tmp_path: Path) -> None:
    """An index and a query made without the code under test."""
    texts = random_texts(300, 120, seed=5)
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("chunk", fast=True)
    builder.add_text_field("text", tokenizer_name="en_stem")
    schema = builder.build()
    plain = tantivy.Index(schema)
    writer = plain.writer(30_000_000, 1)
    for chunk, text in enumerate(texts):
        writer.add_document(tantivy.Document(chunk=chunk, text=text))
    writer.commit()
    plain.reload()
    words = ["word3", "word17", "word200"]
    query = Query.boolean_query([(Occur.Should, Query.term_query(schema, "text", word)) for word in words])
    hits = plain.searcher().search(query, 300).hits
    index = built(tmp_path, texts)
    own = scores_of_all(index, index.query(" ".join(words)))
    chunks = plain.searcher().fast_field_values("chunk", [at for _, at in hits])
    assert len(hits) == int((own > 0).sum()) > 50
    np.testing.assert_allclose(own[chunks], [score for score, _ in hits], rtol=2e-5)


def test_the_formula(tmp_path: Path) -> None:
    """BM25 written out, for lengths that are stored exactly."""
    texts = ["apple apple pear", "apple", "plum cherry fig", "pear pear pear pear quince"]
    index = built(tmp_path, texts)
    tokens = [text.split() for text in texts]
    mean = np.mean([len(t) for t in tokens])
    expected = []
    for own in tokens:
        score = 0.0
        for word in ("apple", "pear"):
            containing = sum(word in t for t in tokens)
            idf = np.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
            times = own.count(word)
            score += idf * 2.2 * times / (times + 1.2 * (1 - 0.75 + 0.75 * len(own) / mean))
        expected.append(score)
    np.testing.assert_allclose(scores_of_all(index, index.query("apple pear")), expected, rtol=1e-5)


def test_a_word_said_twice_counts_twice(tmp_path: Path) -> None:
    index = built(tmp_path, ["apple pear", "pear plum", "fig"])
    once, twice = index.query("pear apple"), index.query("pear apple pear")
    weight = dict(zip(once.words, once.weights, strict=True))["pear"]
    assert dict(zip(twice.words, twice.weights, strict=True))["pear"] == pytest.approx(2 * weight)
    check_against_tantivy(index, "pear apple pear")


def test_given_chunks_score_the_same(tmp_path: Path) -> None:
    index = built(tmp_path, random_texts(200, 50))
    query = index.query("word1 word5 word50 word5")
    ids = np.array([199, 3, 50, 3], np.int32)
    np.testing.assert_allclose(
        bm25_scores(index.index, query.terms, query.weights, ids), scores_of_all(index, query)[ids], rtol=1e-6
    )


def test_rarest_terms_of_a_long_query_are_kept(tmp_path: Path) -> None:
    # Term n stands in n % 7 + 1 chunks: many more terms than a query keeps, of seven degrees of rarity.
    texts = [" ".join(f"t{n}x" for n in range(3000) if n % 7 >= chunk) for chunk in range(7)]
    index = built(tmp_path, texts)
    query = index.query(" ".join(f"t{n}x" for n in range(3000)))
    assert len(query.words) == len(query.terms) == len(query.weights) == MAX_QUERY_TERMS
    frequencies = index.frequencies[query.terms]
    assert (np.diff(frequencies) >= 0).all(), "not the rarest first"
    assert frequencies.max() <= np.sort(index.frequencies)[MAX_QUERY_TERMS]
    check_against_tantivy(index, " ".join(f"t{n}x" for n in range(3000)))


@pytest.mark.parametrize("query", ["", "   ", "?!…", "unheard-of", "\0", "😀", "x" * 500])
def test_a_query_without_known_words_finds_nothing(tmp_path: Path, query: str) -> None:
    index = built(tmp_path, ["some words", "other words"])
    known = index.query(query)
    assert known.words == ()
    ids, scores = index.best(known, 10)
    assert len(ids) == len(scores) == 0
    assert not scores_of_all(index, known).any()


@pytest.mark.parametrize("texts", [[], ["", "  ", "…"]])
def test_no_chunks_and_no_words(tmp_path: Path, texts: list[str]) -> None:
    index = built(tmp_path, texts)
    assert index.index.size == len(texts)
    ids, _ = index.best(index.query("anything"), 5)
    assert len(ids) == 0
    assert scores_of_all(index, index.query("anything")).tolist() == [0.0] * len(texts)


def test_fewer_than_asked_and_none(tmp_path: Path) -> None:
    index = built(tmp_path, ["apple", "pear", "apple pear"])
    query = index.query("apple")
    assert index.best(query, 100)[0].tolist() == [0, 2]
    assert len(index.best(query, 0)[0]) == 0


def test_ties_go_to_the_smaller_chunk(tmp_path: Path) -> None:
    index = built(tmp_path, ["plum"] * 9 + ["apple"] * 5)
    assert index.best(index.query("apple"), 5)[0].tolist() == [9, 10, 11, 12, 13]


def test_ties_across_files_go_to_the_smaller_chunk(tmp_path: Path) -> None:
    """Files of the inverted index lie in any order, so more of it is asked for than is given."""
    texts = ["pear fig", "apple and pear", "apple and plum"] * 200
    folder = tmp_path / "several"
    (folder / "bm25").mkdir(parents=True)
    written = tantivy.Index(lexical._schema(), str(folder / "bm25"))
    written.register_tokenizer("treemem", analyzer("en"))
    for start in (450, 0, 300, 150):  # four commits make four files, the last chunks first
        writer = written.writer(lexical._WRITER_BYTES, 1)
        for chunk in range(start, start + 150):
            writer.add_document(tantivy.Document(chunk=chunk, text=texts[chunk]))
        writer.commit()
        writer.wait_merging_threads()
    built(tmp_path / "one", texts)
    for name in lexical.FILES:
        shutil.copy(lexical._file(tmp_path / "one", name), folder)
    words = sum(len(text.split()) for text in texts)
    several, one = (Lexical(own, "en", len(texts), words) for own in (folder, tmp_path / "one"))
    assert several._searcher.num_segments > 1
    for text in ("apple", "apple pear", "plum and apple"):
        for k in (1, 5, 150, 201):
            found, scores = several.best(several.query(text), k)
            again, same = one.best(one.query(text), k)
            assert found.tolist() == again.tolist()
            assert scores.tolist() == same.tolist()
            own = scores_of_all(one, one.query(text))
            assert found.tolist() == np.lexsort((np.arange(len(own)), -own))[:k].tolist()


def test_case_accents_and_stems(tmp_path: Path) -> None:
    index = built(tmp_path, ["The Café's bakers were BAKING", "nothing of that"])
    assert index.best(index.query("cafe"), 5)[0].tolist() == [0]
    assert index.best(index.query("baked"), 5)[0].tolist() == [0]


@pytest.mark.parametrize("language", ["ja", "zz", "cs"])
def test_languages_without_a_stemmer(tmp_path: Path, language: str) -> None:
    assert language not in lexical._STEMMERS
    index = built(tmp_path, ["bakers baking", "baker"], language)
    assert index.best(index.query("baker"), 5)[0].tolist() == [1]


@pytest.mark.parametrize("language", sorted(lexical._STEMMERS))
def test_every_stemmer_exists(language: str) -> None:
    assert analyzer(language).analyze("Words, 2 of them") != []


def test_very_long_words_are_left_out_of_both(tmp_path: Path) -> None:
    index = built(tmp_path, ["a" * 39 + " short", "b" * 41 + " short"])
    assert index.query("b" * 41).words == ()
    assert len(index.query("a" * 39).words) == 1
    check_against_tantivy(index, "short")


def test_a_word_repeated_very_often(tmp_path: Path) -> None:
    """Counts are kept in 16 bits; beyond that a score no longer changes."""
    index = built(tmp_path, ["spam " * 70_000, "spam egg", "egg"])
    assert int(np.max(np.asarray(index.index.counts))) == 65_535
    check_against_tantivy(index, "spam egg")


def test_stored_lengths_are_tantivys() -> None:
    table = lexical._length_table()
    assert len(table) == 256
    assert table[:41].tolist() == list(range(41))
    assert (np.diff(table) > 0).all()
    # The ends of Lucene's SmallFloat codes after the exact ones: in steps of 2, 4, 8, …
    assert table[40:58].tolist() == [40, 42, 44, 46, 48, 50, 52, 54, 56, 60, 64, 68, 72, 76, 80, 84, 88, 96]


def test_nothing_else_is_left(tmp_path: Path) -> None:
    built(tmp_path, random_texts(50, 20))
    assert {path.name for path in tmp_path.iterdir()} == {"bm25", *(f"words-{name}.npy" for name in lexical.FILES)}


# ---- scripts without spaces between words

CHINESE = ["人工智能与机器学习是计算机科学的分支。", "今天天气很好，我们去公园散步。", "机器人在工厂里工作。"]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_chinese_words_are_found(tmp_path: Path, language: str) -> None:
    index = built(tmp_path, CHINESE, language)
    assert index.best(index.query("机器学习"), 5)[0].tolist() == [0, 2]
    assert index.best(index.query("天气"), 5)[0].tolist() == [1]
    for text in ("机器学习", "公园散步", *CHINESE):
        check_against_tantivy(index, text)


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("国立図書館で新しいデータベースを公開しました。", "データベース"),
        ("ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน", "ระดับเสียง"),
        ("我们用Python写程序", "python"),
        ("𠮷野家の牛丼", "牛丼"),
    ],
)
def test_words_inside_a_clause_are_found(tmp_path: Path, text: str, query: str) -> None:
    index = built(tmp_path, ["Nothing of that.", text])
    assert index.best(index.query(query), 5)[0].tolist() == [1]
    check_against_tantivy(index, query)


def test_pairs_of_characters() -> None:
    words = analyzer("zh")
    assert words.analyze(lexical.spaced("学习AI，中")) == ["学习", "ai", "中"]
    assert lexical.spaced("plain words, 3 of them") == "plain words, 3 of them"
    assert lexical.spaced("naïve café") == "naïve café"
