"""Where questions come from and which chunks are right for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.fakes import FakeEncoder

from treemem.config import TreeConfig
from treemem.errors import InputError
from treemem.evaluation.questions import training_questions
from treemem.hierarchy.memory import Memory
from treemem.hierarchy.prompt import Message
from treemem.training.questions import Question, read_pairs, resolve, split_by_document
from treemem.training.sources import distilled, headings, sentences, written
from treemem.types import Document

TEXTS = {
    "bees": "# Honey\n\nBees make honey of clover. They store it in wax.\n\n## Winter\n\nIn winter a hive eats it.",
    "ships": "Ships carry grain over the sea. A captain steers by the stars.\n\n## Winter\n\nIce closes the harbour.",
    "bread": "Bread is baked from flour and water.\n\n## Winter\n\nOvens warm the bakery. ##no heading\n\n## Empty\n",
}


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    documents = [Document(name, text, f"About {name}") for name, text in TEXTS.items()]
    path = tmp_path_factory.mktemp("questions") / "m"
    return Memory.build(documents, path, encoder=FakeEncoder(), config=TreeConfig(chunk_tokens=10, fanout=4))


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), "utf-8")
    return path


def test_pairs_are_read(tmp_path: Path) -> None:
    read = read_pairs(
        lines(
            tmp_path / "pairs.jsonl",
            {"query": "who?", "document": "bees"},
            "",
            {"query": "where?", "document": "ships", "start": 3, "end": 9},
            {"query": "when?", "evidence": [{"doc": "a", "start": 0, "end": 2}, {"doc": "a", "start": 5, "end": 6}]},
            {"query": "why?", "evidence": [{"doc": "a", "start": 0, "end": 2}, {"doc": "b"}]},
        )
    )
    assert [question.text for question in read] == ["who?", "where?", "when?", "why?"]
    assert [dict(question.targets) for question in read] == [
        {"bees": None},
        {"ships": ((3, 9),)},
        {"a": ((0, 2), (5, 6))},
        {"a": ((0, 2),), "b": None},
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[]", 'no "query"'),
        ({"query": 3, "document": "a"}, 'no "query"'),
        ({"query": "x"}, 'no "document"'),
        ({"query": "x", "document": "a", "start": 5}, "no span"),
        ({"query": "x", "document": "a", "start": 5, "end": 5}, "no span"),
        ({"query": "x", "evidence": []}, "evidence"),
        ({"query": "x", "evidence": [{"start": 1, "end": 2}]}, 'no "document"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, says: str) -> None:
    path = lines(tmp_path / "pairs.jsonl", {"query": "fine", "document": "a"}, line)
    with pytest.raises(InputError, match=f"line 2.*{says}"):
        read_pairs(path)


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no questions"):
        read_pairs(lines(tmp_path / "empty.jsonl", ""))


def test_right_chunks_overlap_the_answer(memory: Memory) -> None:
    start = TEXTS["bees"].index("They")
    pool = resolve(
        memory.searcher,
        [
            Question("where is honey stored?", {"bees": ((start, start + 4),)}),
            Question("what about ships?", {"ships": None, "no such document": None}),
            Question("unknown?", {"no such document": None}),
            Question("  ", {"bees": None}),
        ],
    )
    assert pool.texts == ("where is honey stored?", "what about ships?")
    texts = [memory.image.chunk_text(int(chunk)) for chunk in pool.right_of(0)]
    assert len(texts) == 1
    assert "They" in texts[0]
    number = memory.image.number_of("ships")
    assert number is not None
    assert pool.right_of(1).tolist() == list(memory.image.chunks_of(number))
    assert pool.right_documents[1] == {number}
    words = memory.image.lexical.query("what about ships?")
    best, scores = memory.image.lexical.best(words, 1)
    assert pool.bm25_chunks[1, 0] == best[0]
    assert pool.bm25_best[1] == scores[0]
    assert pool.bm25_scores[1].max() == 1
    taken = pool.take(np.array([1], np.int64))
    assert taken.texts == ("what about ships?",)
    assert taken.right_of(0).tolist() == pool.right_of(1).tolist()


def test_questions_about_other_documents_are_an_error(memory: Memory) -> None:
    with pytest.raises(InputError, match="none of 1 questions"):
        resolve(memory.searcher, [Question("x?", {"nowhere": None})])


def test_held_out_questions_share_no_document(memory: Memory) -> None:
    names = list(TEXTS)
    questions = [Question(f"question {i}", {names[i % 3]: None}) for i in range(30)]
    questions += [Question("both", {"bees": None, "ships": None})]
    pool = resolve(memory.searcher, questions)
    train, held_out = split_by_document(pool, 0.2, 100, seed=0)
    assert len(train)
    assert len(held_out)
    of_train = set().union(*(pool.right_documents[row] for row in train))
    of_held_out = set().union(*(pool.right_documents[row] for row in held_out))
    assert not of_train & of_held_out
    again = split_by_document(pool, 0.2, 100, seed=0)
    assert again[0].tolist() == train.tolist()
    assert len(split_by_document(pool, 0.9, 1, seed=0)[1]) <= 21


def test_headings(memory: Memory) -> None:
    found = {question.text: question for question in headings(memory.image)}
    assert set(found) == {
        "About bees", "About ships", "About bread", "Honey",
        "About bees: Winter", "About ships: Winter", "About bread: Winter",
    }  # fmt: skip
    assert found["About ships"].targets == {"ships": None}
    ((start, end),) = found["About ships: Winter"].targets["ships"] or ()
    assert TEXTS["ships"][start:end].strip() == "Ice closes the harbour."
    ((start, end),) = found["Honey"].targets["bees"] or ()  # with what stands below it
    assert TEXTS["bees"][start:end].strip().endswith("In winter a hive eats it.")
    assert len(headings(memory.image, most=3)) == 3
    assert headings(memory.image, most=3, seed=1) == headings(memory.image, most=3, seed=1)


def test_distilled_questions_repeat_exact_search(memory: Memory) -> None:
    (question,) = distilled(memory.searcher, ["ice in the harbour", " "])
    assert question.source == "distilled"
    pool = resolve(memory.searcher, [question])
    best = memory.search("ice in the harbour", mode="exact", k=10)
    assert set(pool.right_of(0).tolist()) == {hit.chunk for hit in best.hits}


def test_sentences(memory: Memory) -> None:
    drawn = sentences(memory.image, 3, seed=1)
    assert len(drawn) == 3
    assert drawn == sentences(memory.image, 3, seed=1)
    assert all(text and "\n" not in text for text in drawn)


class Writer:
    """A language model that says what it is told to."""

    name, context_tokens, control_markers, small = "writer", 100, (), False

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.prompts: list[str] = []

    def count_tokens(self, text: str) -> int:
        return len(text)

    def stream(self, messages: list[Message], max_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        self.prompts.append(messages[-1].content)
        return list(self.replies[(len(self.prompts) - 1) % len(self.replies)])


@pytest.mark.usefixtures("unchecked_types")
def test_written_questions_must_lead_back(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treemem.training.sources._ROUND_TRIP", 1)
    writer = Writer("Where is bread baked?\nBecause.")
    found = written(memory.searcher, writer, memory.image.chunks)  # type: ignore[arg-type]
    assert len(writer.prompts) == memory.image.chunks
    assert "About bees" in writer.prompts[0]
    (question,) = found
    assert (question.text, question.source) == ("Where is bread baked?", "written")
    ((start, end),) = question.targets["bread"] or ()
    assert "Bread is baked" in TEXTS["bread"][start:end]
    assert written(memory.searcher, Writer("No question here."), 3) == []  # type: ignore[arg-type]


# ---- data sets


def data_set(folder: Path, splits: dict[str, str]) -> Path:
    folder.mkdir()
    records = [{"id": name, "title": "", "text": text} for name, text in TEXTS.items()]
    lines(folder / "corpus.jsonl", *records)
    lines(folder / "queries.jsonl", *({"id": q, "text": f"ask {q}", "split": split} for q, split in splits.items()))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\tbees\t1\n" for q in splits))
    return folder


def test_only_the_training_split_is_trained_on(tmp_path: Path) -> None:
    train, held_out = training_questions(data_set(tmp_path / "s", {"a": "train", "b": "dev", "c": "test"}))
    assert [question.text for question in train] == ["ask a"]
    assert held_out is not None
    assert [question.text for question in held_out] == ["ask b"]
    train, held_out = training_questions(data_set(tmp_path / "t", {"a": "train", "c": "test"}))
    assert ([question.text for question in train], held_out) == (["ask a"], None)
    train, held_out = training_questions(data_set(tmp_path / "u", {"a": "-", "b": "-"}))
    assert (len(train), held_out) == (2, None)
    with pytest.raises(InputError, match="none to train on"):
        training_questions(data_set(tmp_path / "v", {"a": "test", "b": "-"}))
