from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.evaluation.sets import COUNTRIES, corpus, sentences, write_jsonl, write_set, write_table

from treemem.errors import InputError
from treemem.evaluation import load_set
from treemem.hierarchy.readers import ReadReport

EVIDENCE = b'{"id": "norway-dish", "text": "?", "evidence": [%s]}\n'


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_reads_the_whole_layout(tmp_path: Path, packed: str) -> None:
    found = load_set(write_set(tmp_path / "countries", packed))
    assert found.name == "countries"
    assert (found.documents, len(found.queries), found.without_qrels) == (30, 90, 1)
    assert (found.unreadable, found.changed, found.missing) == (0, 0, 0)
    capital, river, dish = found.queries[:3]
    assert (capital.judged_by, river.judged_by, dish.judged_by) == ("evidence", "sections", "documents")
    assert capital.relevant == {"norway": 1}
    text = corpus()[0]["text"]
    first, second, _ = sentences(*COUNTRIES[0])
    assert [text[a:b] for a, b in capital.spans["norway"]] == [first[-19:]]
    assert "Oslo" in first[-19:]
    assert [text[a:b] for a, b in river.spans["norway"]] == [second]
    assert dish.spans == {}
    assert (capital.answers, dish.answers) == (("Oslo",), ())
    assert (capital.source, capital.split, dish.split) == ("capitals", "test", "-")
    documents = list(found.read_documents())
    assert [(d.id, d.title, d.text) for d in documents] == [(r["id"], r["title"], r["text"]) for r in corpus()]
    assert documents[0].metadata == {}  # nothing of where the files lie


def test_splits(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    dev, test = load_set(folder, "dev"), load_set(folder, "test")
    assert (len(dev.queries), len(test.queries), dev.without_qrels, test.without_qrels) == (40, 20, 1, 0)
    assert len(load_set(folder, "dev, test").queries) == 60
    assert {query.source for query in load_set(folder, "-").queries} == {"dishes"}
    with pytest.raises(InputError, match="no split train; there are -, dev, test"):
        load_set(folder, "train")


def test_beir_layout(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", beir=True)
    whole = load_set(folder)
    assert (len(whole.queries), whole.without_qrels) == (90, 1)
    assert {query.judged_by for query in whole.queries} == {"documents"}
    assert len(load_set(folder, "train").queries) == 60
    test = load_set(folder, "test")
    assert (len(test.queries), test.without_qrels) == (30, 1)  # judged, and nothing relevant
    assert whole.queries[0].split == "train"
    with pytest.raises(InputError, match="no split dev; there are test, train"):
        load_set(folder, "dev")


def test_grades_and_documents_that_are_missing(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    rows = [("norway-dish", "norway", 3), ("norway-dish", "sweden", 0), ("norway-dish", "atlantis", 1)]
    write_table(folder / "qrels.tsv", rows)
    found = load_set(folder)
    assert [query.relevant for query in found.queries] == [{"norway": 3, "atlantis": 1}]
    assert (found.without_qrels, found.missing) == (90, 1)


def test_a_header_is_no_judgement_and_need_not_be_there(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / "qrels.tsv").write_bytes(b"norway-dish\tnorway\t1\r\nsweden-dish\tsweden\t1\r\n")
    assert [query.relevant for query in load_set(folder).queries] == [{"norway": 1}, {"sweden": 1}]


def test_spans_follow_a_text_that_is_cleaned(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    records = corpus()
    raw = "\ufeffFirst line.\r\nSecond \0 line.\rThe capital is Oslo \ud83d here.\r\n"
    records[0]["text"] = raw
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    place = {"doc": "norway", "start": raw.index("Oslo"), "end": raw.index("Oslo") + 4}
    query = {"id": "norway-dish", "text": "?", "evidence": [place]}
    write_jsonl(folder, "queries", [query], "")
    found = load_set(folder)
    assert found.changed == 1
    stored = next(found.read_documents()).text
    assert stored != raw
    assert [stored[a:b] for a, b in found.queries[0].spans["norway"]] == ["Oslo"]


def test_lines_without_text_are_counted(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"id": "blank", "text": " "}\nnot JSON\n')
    found = load_set(folder)
    assert (found.documents, found.unreadable) == (30, 2)
    report = ReadReport()
    assert len(list(found.read_documents(report))) == 30
    assert report.failures == 2


def test_sample_is_drawn_by_its_seed(tmp_path: Path) -> None:
    whole = load_set(write_set(tmp_path / "set"))
    drawn = whole.sample(20, seed=1)
    ids = [query.id for query in drawn.queries]
    order = [query.id for query in whole.queries]
    assert len(set(ids)) == 20
    assert ids == sorted(ids, key=order.index)
    assert ids != order[:20]
    assert ids == [query.id for query in whole.sample(20, seed=1).queries]
    assert ids != [query.id for query in whole.sample(20, seed=2).queries]
    assert whole.sample(None, 0) is whole
    assert whole.sample(1000, 0) is whole
    with pytest.raises(InputError, match="max_queries = 0"):
        whole.sample(0, 0)
    assert {query.source for query in whole.with_answers().queries} == {"capitals", "rivers"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qrels.tsv", None, "no qrels.tsv and no qrels"),
        ("corpus.jsonl", None, "no corpus.jsonl, nor"),
        ("queries.jsonl", None, "no queries.jsonl, nor"),
        ("sections.jsonl", None, "no sections.jsonl, nor"),
        ("qrels.tsv", b"query-id\tcorpus-id\tscore\n", "no query with relevant documents"),
        ("qrels.tsv", b"query-id\tcorpus-id\tscore\na\tb\tmany\n", r"qrels.tsv, line 2: score 'many'"),
        ("qrels.tsv", b"q 0 d 1\n", "line 1: 1 columns"),
        ("queries.jsonl", b'{"id": "a"}\n{"id"', "queries.jsonl, line 2: not JSON"),
        ("queries.jsonl", b"[]\n", "line 1: not a JSON object"),
        ("queries.jsonl", b'{"text": "?"}\n', 'line 1: no "id"'),
        ("queries.jsonl", b'{"id": "norway-dish"}\n', 'line 1: no "text"'),
        ("queries.jsonl", b'{"id": "norway-dish", "text": "?", "answers": "x"}\n', '"answers" is not a list'),
        ("queries.jsonl", EVIDENCE % b'{"doc": "norway"}', 'a span needs "doc"'),
        ("queries.jsonl", EVIDENCE % b'{"doc": "norway", "start": 5, "end": 5}',
         "start 5 and end 5 are no span"),
        ("queries.jsonl", EVIDENCE % b'{"doc": "norway", "start": 5, "end": 9999}',
         "past document 'norway'"),
        ("queries.jsonl", b"\xff\xfe\xff\n", "line 1: not UTF-8"),
        ("qrels_sections.tsv", b"norway-river\tnowhere\t1\n", "section 'nowhere' is not in"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    folder = write_set(tmp_path / "set")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_set(folder)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_file_cut_short_is_no_smaller_set(tmp_path: Path, packed: str) -> None:
    folder = write_set(tmp_path / "set", packed)
    path = folder / f"queries.jsonl{packed}"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"queries.jsonl.* cannot be read"):
        load_set(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_set(tmp_path / "nothing")
