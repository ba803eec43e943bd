from __future__ import annotations

import pytest
from tests.evaluation.sets import write_set

from treemem.evaluation import EvalQuery, EvalSet, evaluate_answers, load_set
from treemem.evaluation.answers import without_marks
from treemem.types import Answer, Citation, Context, DocumentRef, Passage


@pytest.fixture(scope="module")
def countries(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    return load_set(write_set(tmp_path_factory.mktemp("sets") / "countries"))


def answer(text: str, document: str = "x", span: tuple[int, int] = (0, 1), *, found: bool = True) -> Answer:
    place = DocumentRef(document, document)
    citations = (Citation(1, place, span, "…", 1.0),) if found else ()
    passages = tuple(Passage(number, place, span, "…", 1.0) for number in (1, 2))
    return Answer(text, citations, Context((), passages), grounded=found, extractive=False, found=found)


def test_figures_by_hand(countries: EvalSet) -> None:
    """Capitals are answered right and cited, rivers in a sentence with a wrong place, every other one not at all."""
    asked: list[str] = []

    def ask(query: EvalQuery) -> Answer:
        asked.append(query.id)
        country, kind = query.id.split("-")
        if len(asked) % 4 == 0:
            return answer("The memory does not hold the answer.", found=False)
        if kind == "capital":
            return answer(f"The {query.answers[0]}. [1]", country, query.spans[country][0])
        return answer(f"It is called {query.answers[0]} [1, 2].", country, (0, 5))

    figures = evaluate_answers(countries, ask)
    kinds = [identity.split("-")[1] for number, identity in enumerate(asked, 1) if number % 4]
    capitals, rivers = kinds.count("capital") / 60, kinds.count("river") / 60
    assert figures.queries == len(asked) == 60
    assert figures.exact_match == pytest.approx(capitals)
    assert figures.contained == pytest.approx(capitals + rivers)
    assert figures.cited == pytest.approx(capitals)
    assert figures.grounded == pytest.approx(0.75)
    assert figures.refused == pytest.approx(0.25)
    assert figures.extractive == 0
    # A river of one word in a reply of four: 2 * 1 / (4 + 1); only the Rio Grande has two.
    golds = {query.id: query.answers[0] for query in countries.queries if query.answers}
    rivers_f1 = [
        2 * len(golds[identity].split()) / (3 + 2 * len(golds[identity].split()))
        for number, identity in enumerate(asked, 1)
        if number % 4 and identity.endswith("river")
    ]
    assert figures.f1 == pytest.approx(capitals + sum(rivers_f1) / 60)
    assert figures.seconds >= 0


def test_a_document_is_cited_right_where_nothing_finer_is_known(countries: EvalSet) -> None:
    dishes = [query for query in countries.queries if query.judged_by == "documents"]
    answered = [EvalQuery(q.id, q.text, q.relevant, q.judged_by, q.spans, ("bread",)) for q in dishes]
    own = EvalSet(**{**countries.__dict__, "queries": tuple(answered)})
    assert evaluate_answers(own, lambda query: answer("?", query.id.split("-")[0])).cited == 1
    assert evaluate_answers(own, lambda query: answer("?", "norway")).cited == pytest.approx(1 / 30)


def test_marks_are_no_words_of_a_reply() -> None:
    bare = without_marks(answer("Oslo [1], or so [1, 2] they say [3] in [1984]."))
    assert " ".join(bare.split()) == "Oslo , or so they say [3] in [1984]."


def test_only_a_sample_is_asked(countries: EvalSet) -> None:
    asked: list[EvalQuery] = []

    def ask(query: EvalQuery) -> Answer:
        asked.append(query)
        return answer("x")

    assert evaluate_answers(countries, ask, max_queries=7, seed=1).queries == 7
    assert all(query.answers for query in asked)
    again = [query.id for query in asked]
    asked.clear()
    evaluate_answers(countries, ask, max_queries=7, seed=1)
    assert [query.id for query in asked] == again
