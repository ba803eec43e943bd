"""Asking: search, passages, prompt, reply, and the check that the passages bear it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from jaxtyping import UInt8

from treemem.config import SearchConfig
from treemem.errors import InputError
from treemem.hierarchy.context import GatheredVectors, PassageText, gather_vectors, labelled, passages
from treemem.hierarchy.embed import DEFAULT_ENCODER
from treemem.hierarchy.generate import LanguageModel
from treemem.hierarchy.prompt import (
    REFUSAL,
    Quote,
    bear_on,
    build_prompt,
    cite,
    is_grounded,
    is_marked,
    is_refusal,
    prose,
    quoted,
    ranked_sentences,
    without_thoughts,
)
from treemem.types import Answer, Attribution, Context, Passage, SearchResult

if TYPE_CHECKING:
    from treemem.hierarchy.memory import Memory
    from treemem.hierarchy.reader import How, ReaderPrompt, ReadingModel

Attribute = Literal["attention", "gradients"]
"""Where a model looked: by attention alone, or also by gradients, which take a pass backward for each token."""

DEFAULT_THRESHOLD = 1.7
"""Below this score of the best hit a memory does not hold the answer. Measured in mode `deep` with the default encoder
and an untrained tree by `benchmarks/threshold.py`: refuses 1% of a memory's own questions and 76% of foreign ones.
Trained weights change scores; their card may name a threshold of their own."""


@dataclass(frozen=True)
class AskConfig:
    """How a question is answered. The values are for models that follow instructions, and for quoting."""

    prompt: str = "map"
    """Name of the prompt: see `treemem.hierarchy.prompt.PROMPTS`."""
    passage_tokens: int = 900
    """What all passages together may take of the model's context."""
    neighbours: int = 1
    """How many chunks before and after a hit are shown with it."""
    labels: int = 5
    """How many nodes of each level get a label."""
    max_tokens: int = 160
    """Longest reply."""
    threshold: float | None = None
    """Least score of the best hit; below it the memory does not hold the answer. None: in mode `deep` what the card of
    the memory's hierarchy names, or `DEFAULT_THRESHOLD` with the default encoder and an untrained tree; else none."""
    quotes: int = 2
    """How many sentences an extractive answer quotes."""

    def __post_init__(self) -> None:
        least = {"passage_tokens": 1, "neighbours": 0, "labels": 0, "max_tokens": 1, "quotes": 1}
        for field, accepted in least.items():
            value = getattr(self, field)
            if value < accepted:
                raise InputError(f"{field} = {value!r}: it must be at least {accepted}")


READER = AskConfig(neighbours=0, max_tokens=48)
"""For models with a reader, which have learned to answer in a few words."""
SMALL_MODEL = AskConfig(prompt="short with map", passage_tokens=500, neighbours=0, max_tokens=64)
"""For models under a billion parameters: few passages, examples in place of instructions (`benchmarks/prompts.py`)."""


def config_for(model: LanguageModel | None, reading: object | None = None) -> AskConfig:
    """The settings that suit a model, with a reader or without."""
    if reading is not None:
        return READER
    return SMALL_MODEL if model is not None and model.small else AskConfig()


def ask(
    memory: Memory,
    question: str,
    model: LanguageModel | None,
    search: SearchConfig,
    config: AskConfig,
    within: Iterable[str] | None = None,
    on_text: Callable[[str], None] | None = None,
    reader: tuple[ReadingModel, How] | None = None,
    attribute: Attribute | None = None,
) -> Answer:
    """Answer a question from a memory.

    Args:
        memory: what is asked.
        question: any text.
        model: None answers with the passages' best sentences, quoted.
        search: how passages are found.
        config: how they are shown.
        within: ids of the documents to look in.
        on_text: is given the model's reply piece by piece as it comes, before it is checked.
        reader: reads the memory for the model, and how; None asks the model as it is.
        attribute: also tell where the model looked.

    Raises:
        ModelError: the model fails.
        InputError: an attribution of another kind is asked for, or one where no reader is.
    """
    if attribute not in (None, *get_args(Attribute)):
        raise InputError(f"attribute = {attribute!r}: it must be attention or gradients")
    if attribute is not None and reader is None:
        raise InputError(
            "attribution: it needs a language model on this machine and a reader for it, which makes the prompt; train "
            "one with treemem train-reader and name it with --reader"
        )
    _ = memory.searcher  # the encoder is loaded before the clock starts
    clock = _Clock()
    within = within if within is None or isinstance(within, str) else list(within)
    result = memory.search_many([question], search, within=within)[0]
    allowed = None if within is None else memory.searcher.scope(within).masks[-1]
    question = result.query  # as tokenizers take it
    clock.lap("search")
    threshold = _threshold(memory, search, config)
    if not result.hits or (threshold is not None and result.hits[0].score < threshold):
        return Answer(REFUSAL, (), Context(result.gathered, ()), True, False, False, clock.laps)
    count = model.count_tokens if model else lambda text: len(text) // 4
    found = passages(memory.image, result.hits, count, config.passage_tokens, config.neighbours)
    context = Context(labelled(memory.image, result.gathered, config.labels, allowed), found)
    clock.lap("context")
    if model is None:
        return _quoted(_ranked(memory, question, context), context, config, clock)
    trace: Callable[[], Attribution] | None = None
    if reader is None:
        budget = model.context_tokens - config.max_tokens
        prompt = build_prompt(
            question, context.levels, found, model.count_tokens, budget, style=config.prompt,
            markers=model.control_markers,
        )  # fmt: skip
        context = Context(context.levels, prompt.context.passages)
        stream = model.stream(prompt.messages, config.max_tokens)
    else:
        reading, how = reader
        read, given = _read(memory, reading, how, question, result, found, config, allowed)
        ids: list[int] = []
        stream = reading.stream(how, read, given, config.max_tokens, ids)
        if attribute is not None:
            trace = partial(_attribution, reading, how, read, given, ids, attribute)
    reply = without_thoughts(_generate(stream, on_text, clock))
    answer = _checked(memory, question, reply, context, config, clock)
    return answer if trace is None else replace(answer, attribution=trace())


def _checked(memory: Memory, question: str, reply: str, context: Context, config: AskConfig, clock: _Clock) -> Answer:
    """The reply where the passages bear it, else quotes."""
    grounded = is_grounded(reply, question, context.passages)
    if is_refusal(reply, borne=grounded and is_marked(reply, context.passages)):
        return Answer(REFUSAL, (), context, True, False, False, clock.laps)
    ranked = _ranked(memory, question, context)
    if grounded:
        text, citations = cite(reply, context.passages, language=memory.config.language)
        borne = bear_on(citations, ranked)
        clock.lap("cite")
        if borne:
            return Answer(text, citations, context, True, False, True, clock.laps)
    return _quoted(ranked, context, config, clock)


def _threshold(memory: Memory, search: SearchConfig, config: AskConfig) -> float | None:
    """The least score that applies, None for none."""
    if config.threshold is not None or search.mode != "deep":
        return config.threshold
    if memory.hierarchy is not None:
        named = memory.hierarchy.card.get("threshold")
        return float(named) if isinstance(named, int | float) else None
    return DEFAULT_THRESHOLD if memory.encoder_name == DEFAULT_ENCODER else None


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def _read(
    memory: Memory,
    reading: ReadingModel,
    how: How,
    question: str,
    result: SearchResult,
    found: Sequence[Passage],
    config: AskConfig,
    allowed: UInt8[np.ndarray, " chunks"] | None,
) -> tuple[ReaderPrompt, GatheredVectors | None]:
    """The prompt of a model that is given vectors, passages or both."""
    from treemem.hierarchy.reader import reader_prompt

    own = reading.reader.config
    given = None
    if how != "text":
        shape = (own.nodes, own.chunks, own.more)
        score = memory.searcher.node_scorer(question) if memory.image.hidden or allowed is not None else None
        of_search = (result.gathered, result.hits, shape, memory.stored_reader_vectors)
        given = gather_vectors(memory.image, memory.encoder, *of_search, allowed, score)
    texts = [PassageText(passage.document.title, passage.text) for passage in found[: own.chunks]]
    most = reading.model.context_tokens - config.max_tokens
    prompt = reader_prompt(
        reading.model, question, () if how == "vectors" else texts, 0 if given is None else len(given), most
    )
    return prompt, given


def _attribution(
    reading: ReadingModel,
    how: How,
    prompt: ReaderPrompt,
    given: GatheredVectors | None,
    ids: Sequence[int],
    what: Attribute,
) -> Attribution:
    from treemem.hierarchy.attribute import attribute

    return attribute(reading, how, prompt, given, ids, gradients=what == "gradients")


def _generate(stream: Iterator[str], on_text: Callable[[str], None] | None, clock: _Clock) -> str:
    begin = time.perf_counter()
    pieces: list[str] = []
    for piece in stream:
        if not pieces:
            clock.laps["first_token"] = time.perf_counter() - begin
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)
    clock.lap("generate")
    return "".join(pieces)


def _ranked(memory: Memory, question: str, context: Context) -> list[Quote]:
    """The passages' sentences, those nearest to the question first."""
    language = memory.config.language
    return ranked_sentences(
        question, context.passages, lambda texts: memory.encoder.encode(texts, precise=True), language=language
    )


def _quoted(ranked: Sequence[Quote], context: Context, config: AskConfig, clock: _Clock) -> Answer:
    """The passages' best sentences: what is said without a model, and instead of a reply that nothing bears."""
    quotes = prose(ranked)[: config.quotes]
    citations = tuple(quote.citation for quote in quotes)
    clock.lap("quote")
    return Answer(quoted(quotes), citations, context, True, True, bool(citations), clock.laps)
