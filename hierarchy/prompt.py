"""What the language model is shown, and what is done with its reply: prompts, quotes, groundedness, citations.

Pure data in, data out: nothing here searches a memory or runs a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from sentencex import get_sentence_boundaries

from treemem.errors import InputError
from treemem.types import Citation, Context, GatheredLevel, Passage, Span

REFUSAL = "The memory does not hold the answer."
"""What `ask` says where nothing in the memory answers the question, and what the model is told to say then."""

GROUNDED_SHARE = 0.75
"""Least share of a reply's content words that must stand in the passages; set by measurement."""

OVERLAP_WEIGHT = 0.5
"""What a sentence that holds all content words of the question gains beside its cosine, in extractive answers."""

PASSAGE_WEIGHT = 0.6
"""What each point by which its passage's score lies below the best one costs a sentence, in extractive answers."""

PROSE_SHARE = 0.8
"""Least share of letters and blanks in a sentence that is quoted; below are code, tables and lists of numbers."""

BEARING_SENTENCES = 8
"""A reply must rest on one of so many sentences nearest to the question."""

MOST_SENTENCES = 64
"""How many sentences are embedded for one extractive answer."""

LONGEST_QUOTE = 400
"""Most characters of one quoted sentence; a longer one (a table, a list) is cut into pieces at words."""

MESSAGE_TOKENS = 8
"""Tokens reserved for what a chat template puts around each message."""

WELL_KNOWN_MARKERS: tuple[str, ...] = (
    # Openings shared by whole families: <|im_start|>, <|eot_id|>, <|endoftext|>, <|assistant|>, <｜User｜> …
    "<|",
    "<｜",
    "[|",
    "<seed:",
    "<<SYS>>",
    "<</SYS>>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "[gMASK]",
    "<sop>",
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Strings that common chat models read as control tokens; for models whose tokenizer is not at hand."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation with a language model."""

    role: Literal["system", "user", "assistant"]
    content: str


# ---------------------------------------------------------------------------------------------------------------------
# Text of documents is data


@lru_cache(maxsize=16)
def _marker_pattern(markers: tuple[str, ...]) -> re.Pattern[str] | None:
    # Blanks at a marker's ends are left out: its core is broken, and a marker of blanks alone controls nothing.
    cores = {marker.strip() for marker in markers} - {""}
    if not cores:
        return None
    return re.compile("|".join(re.escape(core) for core in sorted(cores, key=lambda core: (-len(core), core))))


def neutralise(text: str, markers: Iterable[str] = WELL_KNOWN_MARKERS) -> str:
    """Break every control token that stands in `text`, so that a model reads it as plain characters.

    A blank is put after the first character (`<|im_end|>` becomes `< |im_end|>`), again and again until no marker is
    left; a marker of a single character is replaced by a blank. Text without markers comes back unchanged.

    Args:
        text: anything, such as a passage or a question.
        markers: the control tokens, as they are written.
    """
    pattern = _marker_pattern(tuple(markers))
    if pattern is None:
        return text

    def broken(match: re.Match[str]) -> str:
        found = match.group()
        return f"{found[0]} {found[1:]}" if len(found) > 1 else " "

    # Ends: markers are finite, and each pass widens a gap inside one until it is wider than in any of them.
    while pattern.search(text):
        text = pattern.sub(broken, text)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The prompt


@dataclass(frozen=True)
class PromptExample:
    """A worked example, shown as earlier turns of the conversation."""

    question: str
    passages: tuple[str, ...]
    reply: str


SHORT_EXAMPLES = (
    PromptExample(
        question="How long is the Vell?",
        passages=(
            "Rivers of Norland: The Vell rises in the Harran hills and runs 212 km to the sea.",
            "Harran: The hills of Harran are known for their slate.",
        ),
        reply="212 km [1]",
    ),
    PromptExample(
        question="Why did the baker close her shop?",
        passages=(
            "The mill: The mill stood still all winter.",
            "The baker: There was no flour to be had, so the baker closed her shop until spring.",
        ),
        reply="because there was no flour to be had [2]",
    ),
    PromptExample(
        question="Where did the miller hide the key?",
        passages=(
            "The mill: The miller trusted nobody.",
            "The mill: Every evening he hid the key under the third stone of the bridge.",
            "Norland: Norland has four mills.",
        ),
        reply="under the third stone of the bridge [2]",
    ),
)
"""Small models copy the manner of examples better than they follow instructions."""


@dataclass(frozen=True)
class PromptStyle:
    """One way of asking, to be chosen by measurement."""

    system: str
    """Who the model is and what it must do; empty for no system message."""
    instruction: str = ""
    """What is said once more after the question, where small models heed it most."""
    map_labels: int = 3
    """Most labels shown of one level; 0 leaves the map out."""
    passages: int = 6
    """Most passages shown."""
    examples: tuple[PromptExample, ...] = ()


_SYSTEM = (
    "You answer questions from numbered passages. Use only what the passages say. Answer in one or two sentences and "
    f"put the passage's number after it, like [1]. If the passages do not answer the question, say: {REFUSAL}"
)
_SHORT = f"Answer from the passages in one sentence and cite the passage, like [1], or say: {REFUSAL}"

PROMPTS: dict[str, PromptStyle] = {
    "map": PromptStyle(_SYSTEM, _SHORT),
    "short with map": PromptStyle(
        "Answer the question with a short phrase from the passages and the number of its passage.",
        passages=4,
        examples=SHORT_EXAMPLES,
    ),
}
"""Named prompts: for models that follow instructions, and for small ones. `benchmarks/prompts.py` compares others."""

DEFAULT_PROMPT = "map"


@dataclass(frozen=True)
class Prompt:
    """Messages for a language model and what of the memory they show."""

    messages: tuple[Message, ...]
    context: Context


def one_line(text: str) -> str:
    """`text` with its blanks and line breaks made single blanks."""
    return " ".join(text.split())


_ROUND = str.maketrans("[]", "()")


def shown_text(text: str, markers: Sequence[str]) -> str:
    """`text` on one line, without control tokens and without bracketed numbers that would pass for citations."""
    # Those of code, `argv[1]` and `f()[1]`, stay.
    bare = re.sub(r"(?<![^\W\d])(?<![)\]])(?:\[\d{1,3}\])+", lambda m: m[0].translate(_ROUND), one_line(text))
    return neutralise(bare, markers)


def passage_line(number: int, title: str, text: str) -> str:
    """How a numbered passage is put before a model."""
    return f"[{number}] {title}: {text}" if title else f"[{number}] {text}"


def _map_lines(levels: Sequence[GatheredLevel], markers: Sequence[str]) -> list[str]:
    lines = []
    for level in levels:
        labels = "; ".join(shown_text(node.label, markers) for node in level.nodes)
        lines.append(f"Level {level.level}: {labels}")
    return lines


def _labelled(levels: Sequence[GatheredLevel], most: int) -> list[GatheredLevel]:
    """The levels with at most `most` labelled nodes each, coarse to fine; levels without labels are left out."""
    kept = []
    for level in sorted(levels, key=lambda level: -level.level):
        nodes = tuple(node for node in level.nodes if node.label.strip())[:most]
        if nodes:
            kept.append(GatheredLevel(level.level, level.size, nodes))
    return kept


def _smaller(levels: list[GatheredLevel]) -> list[GatheredLevel]:
    """The map without its least telling label: the last of the longest level, the finest of these."""
    longest = max(range(len(levels)), key=lambda i: (len(levels[i].nodes), i))
    nodes = levels[longest].nodes[:-1]
    shorter = [GatheredLevel(levels[longest].level, levels[longest].size, nodes)] if nodes else []
    return levels[:longest] + shorter + levels[longest + 1 :]


def _user_text(style: PromptStyle, question: str, map_lines: Sequence[str], passage_lines: Sequence[str]) -> str:
    parts = ["\n".join(["Map of the memory, from general to specific:", *map_lines])] if map_lines else []
    parts.append("\n".join(["Passages:", *passage_lines]))
    parts.append("\n".join(part for part in (f"Question: {question}", style.instruction) if part))
    return "\n\n".join(parts)


def _messages(
    style: PromptStyle, question: str, map_lines: Sequence[str], passage_lines: Sequence[str]
) -> tuple[Message, ...]:
    messages = [Message("system", style.system)] if style.system else []
    for example in style.examples:
        lines = [f"[{number}] {text}" for number, text in enumerate(example.passages, 1)]
        messages.append(Message("user", _user_text(style, example.question, (), lines)))
        messages.append(Message("assistant", example.reply))
    messages.append(Message("user", _user_text(style, question, map_lines, passage_lines)))
    return tuple(messages)


def _total(messages: Sequence[Message], count_tokens: Callable[[str], int]) -> int:
    return sum(count_tokens(message.content) + MESSAGE_TOKENS for message in messages)


def _word_ends(text: str) -> list[int]:
    """Where `text` may be cut: where words end, and inside long ones, as scripts without blanks have them."""
    return [match.end() for match in re.finditer(r"\S{1,24}", text)]


def _cut(text: str, fits: Callable[[str], bool]) -> str:
    """The longest run of words from the start of `text` that fits, by bisection."""
    if fits(text):
        return text
    ends = _word_ends(text)
    low, high = 0, len(ends)  # `low` words fit, `high` words do not
    while high - low > 1:
        middle = (low + high) // 2
        if fits(text[: ends[middle - 1]] + " …"):
            low = middle
        else:
            high = middle
    return text[: ends[low - 1]] + " …" if low else ""


def prompt_style(name: str) -> PromptStyle:
    """The prompt of this name.

    Raises:
        InputError: there is none.
    """
    try:
        return PROMPTS[name]
    except KeyError:
        raise InputError(f"prompt = {name!r}: it must be one of {', '.join(PROMPTS)}") from None


def build_prompt(
    question: str,
    levels: Sequence[GatheredLevel],
    passages: Sequence[Passage],
    count_tokens: Callable[[str], int],
    budget_tokens: int,
    *,
    style: PromptStyle | str = DEFAULT_PROMPT,
    markers: Sequence[str] = WELL_KNOWN_MARKERS,
) -> Prompt:
    """Put a question, the map of the memory and numbered passages before a language model.

    What does not fit is left out in this order: labels of the map, passages from the last, words of the only
    passage left. A question that takes more than half of the budget is cut first.

    Args:
        question: what the user asks.
        levels: gathered nodes, best first in each level; those without a label are not shown.
        passages: best first; their numbers are kept.
        count_tokens: tokens of a text in the model's tokenizer.
        budget_tokens: most tokens of all messages together, `MESSAGE_TOKENS` a message included.
        style: a name in `PROMPTS`, or a style.
        markers: control tokens of the model, broken in the question, the labels and the passages.

    Returns:
        The messages, and the levels and passages that they show; the text of a passage that was cut is cut there too.

    Raises:
        InputError: the budget does not hold even the instructions.
    """
    chosen = prompt_style(style) if isinstance(style, str) else style
    asked = neutralise(one_line(question), markers)
    asked = _cut(asked, lambda text: count_tokens(text) <= budget_tokens // 2)
    shown = _labelled(levels, chosen.map_labels) if chosen.map_labels else []
    kept = list(passages[: chosen.passages])
    lines = [passage_line(p.number, shown_text(p.document.title, markers), shown_text(p.text, markers)) for p in kept]

    def room(map_levels: Sequence[GatheredLevel], passage_lines: Sequence[str]) -> int:
        messages = _messages(chosen, asked, _map_lines(map_levels, markers), passage_lines)
        return budget_tokens - _total(messages, count_tokens)

    if room([], []) < 0:
        raise InputError(
            f"budget_tokens = {budget_tokens}: the instructions alone need {budget_tokens - room([], [])} tokens; "
            "take a model with a longer context or ask for a shorter reply"
        )
    while room(shown, lines) < 0 and (shown or len(lines) > 1):
        if shown:
            shown = _smaller(shown)
        else:
            kept.pop()
            lines.pop()
    if kept and room(shown, lines) < 0:
        kept, lines = _only_start(kept[0], lambda line: room([], [line]) >= 0, markers)
    messages = _messages(chosen, asked, _map_lines(shown, markers), lines)
    return Prompt(messages, Context(tuple(shown), tuple(kept)))


def _only_start(
    passage: Passage, fits: Callable[[str], bool], markers: Sequence[str]
) -> tuple[list[Passage], list[str]]:
    """As much of the start of a passage as fits, and its line; nothing where not even one word does."""
    title = shown_text(passage.document.title, markers)
    words = _word_ends(passage.text)
    low, high = 0, len(words) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(passage_line(passage.number, title, shown_text(passage.text[: words[middle - 1]], markers))):
            low = middle
        else:
            high = middle
    if not low:
        return [], []
    text = passage.text[: words[low - 1]]
    span = (passage.span[0], passage.span[0] + len(text))
    cut = Passage(passage.number, passage.document, span, text, passage.score)
    return [cut], [passage_line(passage.number, title, shown_text(text, markers))]


# ---------------------------------------------------------------------------------------------------------------------
# Words and sentences

_FUNCTION_WORD_LIST = """
    a about above after again all also although am an and any anything are as at be because been before being below
    between both but by can cannot could did do does doing done down during each either else ever every few for from
    further had has have having he her here hers herself him himself his how however i if in indeed into is it its
    itself just let like ll made make many may me might more most much must my myself neither no nor not now of off on
    once one only or other others our ours ourselves out over own per please quite rather re same shall she should
    since so some something still such t than that the their theirs them themselves then there thereby therefore these
    they this those through thus to too under until up upon us ve very via was we well were what whatever when where
    whether which while who whom whose why will with within without would yes yet you your yours yourself d m s
    according answer based given mentioned passage passages states text
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())
"""Words that carry no fact by themselves, and those with which models introduce an answer."""

# Scripts without blanks between words are taken character by character.
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
_MARK = re.compile(r"\[\s*(?:passages?\s*)?([1-9]\d{0,3}(?:\s*,\s*[1-9]\d{0,3})*)\s*\]", re.IGNORECASE)
_ENDING = re.compile(r"(?<=\w{3})(?:ies|ing|ed|es|(?<!s)s)$")
_HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
_LIST_NUMBER = re.compile(r"^\s*\d{1,3}[.)]\s", re.MULTILINE)


def _stem(word: str) -> str:
    """A word without its commonest English endings, so that plain inflections meet."""
    word = word.casefold()
    if word[0].isdigit():
        word = word.replace(",", "")
        whole, point, fraction = word.partition(".")
        fraction = fraction.rstrip("0")
        return (whole.lstrip("0") or "0") + (point + fraction if fraction else "")
    # "closed", "closing" and "close", "stopped" and "stop", "cities" and "city" then end alike.
    word = _ENDING.sub("", word)
    if len(word) > 3 and word[-1] in "ey":
        word = word[:-1]
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    return word


def content_words(text: str) -> list[str]:
    """Stems of the words that carry meaning, numbers included, in order; citation marks and list numbers left out."""
    bare = _LIST_NUMBER.sub(" ", _MARK.sub(" ", text))
    return [_stem(word) for word in _WORD.findall(bare) if word.casefold() not in _FUNCTION_WORDS]


def sentence_spans(text: str, language: str = "en") -> list[Span]:
    """Spans of the sentences of `text` without the blanks around them, in order; never across a line break pair.

    One that is longer than `LONGEST_QUOTE` comes in several pieces.
    """
    # Half surrogates cannot cross into the sentence splitter; the replacement has the same length.
    safe = re.sub("[\ud800-\udfff]", "\ufffd", text)
    spans = []
    for sentence in get_sentence_boundaries(language, safe):
        start, end = sentence["start_index"], sentence["end_index"]
        body = text[start:end]
        start += len(body) - len(body.lstrip())
        end = start + len(body.strip())
        while end - start > LONGEST_QUOTE:
            stop = start + _word_end(text[start : start + LONGEST_QUOTE + 1])
            spans.append((start, stop))
            start = end - len(text[stop:end].lstrip())
        if end > start:
            spans.append((start, end))
    return spans


def _word_end(text: str) -> int:
    """Where the last whole word within the first `LONGEST_QUOTE` characters ends."""
    ends = [match.end() for match in re.finditer(r"\S+", text) if match.end() <= LONGEST_QUOTE]
    return ends[-1] if ends else LONGEST_QUOTE


@dataclass(frozen=True)
class _Sentence:
    passage: Passage
    span: Span
    """Characters of the passage's text."""
    text: str
    words: frozenset[str]
    heading: str
    """The last heading line above it in its passage, without its marks; empty where there is none."""

    def cited(self) -> Citation:
        start = self.passage.span[0]
        span = (start + self.span[0], start + self.span[1])
        return Citation(self.passage.number, self.passage.document, span, self.text, self.passage.score)


def _sentences(passages: Iterable[Passage], language: str = "en") -> list[_Sentence]:
    found = []
    for passage in passages:
        for start, end in sentence_spans(passage.text, language):
            text = passage.text[start:end]
            headings = _HEADING.findall(passage.text, 0, start)
            heading = headings[-1].strip() if headings else ""
            found.append(_Sentence(passage, (start, end), text, frozenset(content_words(text)), heading))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Answering with quotes


@dataclass(frozen=True)
class Quote:
    """A sentence of a passage, and the heading that it stands under."""

    citation: Citation
    heading: str = ""
    prose: bool = True
    """Whether it says something on its own: no heading, scrap, code or table."""


def ranked_sentences(
    question: str,
    passages: Sequence[Passage],
    embed: Callable[[list[str]], np.ndarray],
    *,
    language: str = "en",
) -> list[Quote]:
    """The sentences of the passages, those nearest to the question first.

    A sentence's rank is its cosine with the question, plus `OVERLAP_WEIGHT` times the share of the question's content
    words that it holds, plus `PASSAGE_WEIGHT` times its passage's score. It is read together with the heading above it.

    Args:
        question: what the user asks.
        passages: best first.
        embed: gives unit vectors, float [n, d], of n texts.
        language: code of the language whose rules cut sentences.

    Returns:
        At most `MOST_SENTENCES`; sentences that read the same only once.
    """
    asked = frozenset(content_words(question))
    candidates = _distinct(_sentences(passages, language))
    if not candidates:
        return []
    known = [sentence.words.union(content_words(sentence.heading)) for sentence in candidates]
    overlap = [len(asked & words) / max(1, len(asked)) for words in known]
    if len(candidates) > MOST_SENTENCES:
        best = sorted(sorted(range(len(candidates)), key=lambda i: (-overlap[i], i))[:MOST_SENTENCES])
        candidates, overlap = [candidates[i] for i in best], [overlap[i] for i in best]
    texts = [one_line(f"{sentence.heading} {sentence.text}") for sentence in candidates]
    vectors = np.asarray(embed([question, *texts]), dtype=np.float32)
    scores = vectors[1:] @ vectors[0] + OVERLAP_WEIGHT * np.asarray(overlap, dtype=np.float32)
    scores += PASSAGE_WEIGHT * np.asarray([sentence.passage.score for sentence in candidates], dtype=np.float32)
    order = np.argsort(-scores, kind="stable")
    return [Quote(s.cited(), s.heading, _is_prose(s)) for s in (candidates[int(i)] for i in order)]


def prose(ranked: Sequence[Quote]) -> list[Quote]:
    """Headings, scraps and code say little: they are left out, unless there is nothing else."""
    return [quote for quote in ranked if quote.prose] or list(ranked)


def quoted(quotes: Sequence[Quote]) -> str:
    """Quotes as an answer, one `heading: "…" [n]` a line; the refusal where there are none."""
    lines = []
    for quote in quotes:
        heading = f"{one_line(quote.heading)}: " if quote.heading else ""
        lines.append(f'{heading}"{one_line(quote.citation.text)}" [{quote.citation.number}]')
    return "\n".join(lines) or REFUSAL


def _is_prose(sentence: _Sentence) -> bool:
    """Whether a sentence says something on its own: no heading, scrap, code or table."""
    text = sentence.text
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(sentence.words) >= 3 and not text.startswith("#") and letters >= PROSE_SHARE * len(text)


def _distinct(sentences: Iterable[_Sentence]) -> list[_Sentence]:
    """The first of each set of sentences that read the same."""
    first: dict[str, _Sentence] = {}
    for sentence in sentences:
        first.setdefault(_folded(sentence.text), sentence)
    return list(first.values())


def _folded(text: str) -> str:
    """Texts that read the same give the same."""
    return one_line(text).casefold()


# ---------------------------------------------------------------------------------------------------------------------
# Judging and citing a reply


def _new_words(reply: str, question: str) -> list[str]:
    """The reply's content words that the question did not bring; all of them where it brought every one."""
    words = content_words(reply)
    asked = frozenset(content_words(question))
    return [word for word in words if word not in asked] or words


def _passage_words(passages: Iterable[Passage]) -> set[str]:
    words: set[str] = set()
    for passage in passages:
        words.update(content_words(passage.text), content_words(passage.document.title))
    return words


def grounded_share(reply: str, question: str, passages: Sequence[Passage]) -> float:
    """Share of the reply's content words that stand in the passages or their titles, 0 to 1.

    Words of the question are left out, because repeating them proves nothing, unless the reply has no others. A reply
    without any content word has nothing that could be checked: 0.
    """
    words = _new_words(reply, question)
    known = _passage_words(passages)
    return sum(word in known for word in words) / len(words) if words else 0.0


def is_grounded(reply: str, question: str, passages: Sequence[Passage], share: float = GROUNDED_SHARE) -> bool:
    """Whether the passages bear the reply: enough of its content words, and every number, stand in them."""
    known = _passage_words(passages) | set(content_words(question))
    numbers = [word for word in content_words(reply) if word[0].isdigit()]
    return grounded_share(reply, question, passages) >= share and all(number in known for number in numbers)


_THOUGHTS = re.compile(
    r"\A.*(?:</think>|\[/THINK\])|\A\s*(?:<think>|\[THINK\]).*\Z",  # templates may have opened the block themselves
    re.DOTALL,
)
_SPEECH = re.compile(r"\"[^\"]*\"|“[^”]*”|„[^“]*“|«[^»]*»")
_UNKNOWING = re.compile(r"^\W*(?:sorry\W+)?(?:I|we) (?:don['’]t|do not) (?:\w+ )?know\b", re.IGNORECASE)
_REFUSING = re.compile(
    r"\b(?:memory|passages?|text|context|documents?)(?: (?:above|below|given|here|provided|shown|\d+))? "
    r"(?:do|does|did)(?: not|n['’]t) (?:\w+ly )?"
    r"(?:hold|contain|provide|mention|say|state|answer|specify|tell|explain|address|indicate)\b"
    r"|\b(?:I|we) (?:cannot|can['’]t|could not|couldn['’]t|am unable to|are unable to) (?:\w+ly )?"
    r"(?:answer|determine|tell|say|find (?:\w+ ){0,2}(?:answer|information|mention))\b"
    r"|\bnot (?:mentioned|stated|given|specified|provided|answered|found) (?:in|by) the "
    r"(?:\w+ )?(?:memory|passages?|text|context|documents?)\b",
    re.IGNORECASE,
)


def without_thoughts(reply: str) -> str:
    """A reply without what the model thought before it, also where it came to no end."""
    return _THOUGHTS.sub("", reply).strip()


def is_refusal(reply: str, *, borne: bool = False) -> bool:
    """Whether a reply's first sentence, quoted speech left out, says that the answer is not there.

    Args:
        reply: what the model said. A blank reply says nothing.
        borne: whether it is grounded and marked with a passage: then a sentence that tells what something does not
            hold or say is taken for an answer.
    """
    bare = one_line(_MARK.sub("", reply))
    if _folded(REFUSAL).rstrip(".") in _first_sentence(bare).casefold():
        return True
    first = _first_sentence(one_line(_SPEECH.sub(" ", bare)))
    return bool(_UNKNOWING.search(first) or (not borne and _REFUSING.search(first)))


def _first_sentence(text: str) -> str:
    spans = sentence_spans(text)
    return text[slice(*spans[0])] if spans else ""


def is_marked(reply: str, passages: Sequence[Passage]) -> bool:
    """Whether a reply cites a passage that there is."""
    return bool(_read_marks(reply, passages, "en")[1])


def bear_on(citations: Iterable[Citation], ranked: Sequence[Quote], nearest: int = BEARING_SENTENCES) -> bool:
    """Whether any cited sentence reads like one of the `nearest` to the question, of all or of those of prose.

    The words of a reply may stand in the passages, and the wrong sentence hold them.
    """
    near = {_folded(quote.citation.text) for quote in [*ranked[:nearest], *prose(ranked)[:nearest]]}
    return any(_folded(citation.text) in near for citation in citations)


def cite(reply: str, passages: Sequence[Passage], *, language: str = "en") -> tuple[str, tuple[Citation, ...]]:
    """Turn the `[n]` marks of a reply into citations; for replies that are grounded and no refusals.

    Each cited passage gives one citation: its sentence that shares most content words with what is marked with its
    number. A mark whose passage shares none of them gets the number of the passage that shares most. Marks of passages
    that do not exist are taken out; `[1, 2]` becomes `[1] [2]`. A reply without a mark that holds gets one at its end,
    of the passage that supports it best. Square brackets that are quoted from a passage, like `argv[1]`, are text.

    Args:
        reply: what the model said.
        passages: what it was shown.
        language: code of the language whose rules cut sentences.

    Returns:
        The reply with its final marks, and the citations in the order of their first marks.
    """
    text, claims = _read_marks(reply.strip(), passages, language)
    citations = []
    for number, claim in claims.items():
        best = _best_sentence(claim, _sentences([p for p in passages if p.number == number], language))
        if best is not None:
            citations.append(best.cited())
    if not citations:
        best = _best_sentence(frozenset(content_words(text)), _sentences(passages, language))
        if best is not None:
            return f"{text} [{best.passage.number}]", (best.cited(),)
    return text, tuple(citations)


def _is_quoted(reply: str, match: re.Match[str], passages: Iterable[Passage]) -> bool:
    """Whether these brackets belong to the name before them, and both stand in a passage."""
    word = re.search(r"[\w.]*[^\W\d]$", reply[: match.start()])
    return word is not None and any(word.group() + match.group() in passage.text for passage in passages)


def _read_marks(reply: str, passages: Sequence[Passage], language: str) -> tuple[str, dict[int, frozenset[str]]]:
    """The reply with only valid marks, each `[n]`, and the content words marked with each number."""
    sentences = _sentences(passages, language)
    known = {passage.number for passage in passages}
    spans = sentence_spans(reply, language)
    claims: dict[int, frozenset[str]] = {}
    written: list[str] = []
    done = 0
    for match in _MARK.finditer(reply):
        if _is_quoted(reply, match, passages):
            continue
        written.append(reply[done : match.start()])
        done = match.end()
        claim = frozenset(content_words(_marked(reply, match, spans)))
        given = (int(number) for number in re.findall(r"\d+", match.group(1)))
        numbers = list(dict.fromkeys(_bearing(n, claim, sentences) for n in given if n in known))
        if not numbers:
            written[-1] = written[-1].rstrip(" ")
        for number in numbers:
            claims[number] = claims.get(number, frozenset()) | claim
        written.append(" ".join(f"[{number}]" for number in numbers))
    written.append(reply[done:])
    return "".join(written).strip(), claims


def _bearing(number: int, claim: frozenset[str], sentences: Sequence[_Sentence]) -> int:
    """The number of a passage that shares a word with the claim: the given one, else the one with the best sentence."""
    if any(claim & sentence.words for sentence in sentences if sentence.passage.number == number):
        return number
    best = _best_sentence(claim, sentences)
    return best.passage.number if best is not None and claim & best.words else number


def _marked(reply: str, match: re.Match[str], spans: Sequence[Span]) -> str:
    """The sentence that a mark belongs to: the one it stands in, or the one before where it opens a sentence."""
    before = [span for span in spans if span[0] < match.start()]
    inside = before[-1] if before else (0, len(reply))
    if not content_words(reply[inside[0] : match.start()]) and len(before) > 1:
        inside = before[-2]
    return reply[inside[0] : inside[1]]


def _best_sentence(words: frozenset[str], sentences: Sequence[_Sentence]) -> _Sentence | None:
    """The sentence with most of these words for its length; None where there is none."""
    return max(sentences, key=lambda s: len(words & s.words) / math.sqrt(4 + len(s.words)), default=None)
