"""What a ranking or a reply is worth: pure functions over arrays and strings."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from treemem.types import Span

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

# ---- chunks


def right_chunks(
    documents: Int[np.ndarray, " n"],
    spans: Int[np.ndarray, "n 2"],
    relevant: Collection[int],
    evidence: Mapping[int, Sequence[Span]] | None,
) -> Bool[np.ndarray, " n"]:
    """Which chunks are right: those that overlap an evidence span, or stand in a relevant document.

    Args:
        documents: the number of each chunk's document.
        spans: each chunk's characters, half-open.
        relevant: numbers of the relevant documents; looked at only where there is no evidence.
        evidence: by document, the spans that hold the answer; None where the query is judged by documents.
    """
    if evidence is None:
        return np.array([int(document) in relevant for document in documents], bool)
    right = np.zeros(len(documents), bool)
    for i, (document, (start, end)) in enumerate(zip(documents, spans, strict=True)):
        right[i] = any(start < last and first < end for first, last in evidence.get(int(document), ()))
    return right


def hit_at_k(right: Bool[np.ndarray, " n"], k: int) -> float:
    """1 where a right chunk stands among the first k, else 0."""
    return float(right[:k].any())


# ---- documents


def document_ranking(documents: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Documents in the order of their best chunks, from the chunks' documents, best chunk first."""
    found, first = np.unique(documents, return_index=True)
    return found[np.argsort(first)]


def recall_at_k(ranking: Int[np.ndarray, " n"], relevant: Collection[int], total: int, k: int) -> float:
    """Share of the relevant documents among the first k.

    `total` is how many there are, those that the memory does not hold included; at least 1.
    """
    return sum(int(document) in relevant for document in ranking[:k]) / total


def ndcg_at_k(ranking: Int[np.ndarray, " n"], grades: Mapping[int, int], ideal: Iterable[int], k: int) -> float:
    """Normalised discounted cumulative gain (Järvelin and Kekäläinen 2002) as trec_eval and BEIR compute it.

    The gain is the grade itself, the discount log2(rank + 1).

    Args:
        ranking: documents, best first, each once.
        grades: grades of the relevant documents; others gain nothing.
        ideal: the positive grades of all relevant documents, those that the memory does not hold included.
        k: how many ranks count.
    """
    best = _discounted(sorted(ideal, reverse=True)[:k])
    return _discounted([grades.get(int(document), 0) for document in ranking[:k]]) / best


def _discounted(gains: Sequence[int]) -> float:
    return float(np.sum(np.asarray(gains, np.float64) / np.log2(np.arange(2, len(gains) + 2))))


# ---- replies


def normalise(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(reply: str, golds: Sequence[str]) -> float:
    """1 where the normalised reply is one of the normalised gold answers."""
    own = normalise(reply)
    return float(any(own == normalise(gold) for gold in golds))


def token_f1(reply: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of normalised tokens, best over the gold answers.

    Where either side has no tokens left, 1 if neither has, else 0 (SQuAD 2.0).
    """
    own = normalise(reply).split()
    return max((_f1(own, normalise(gold).split()) for gold in golds), default=0.0)


def _f1(own: list[str], gold: list[str]) -> float:
    if not own or not gold:
        return float(own == gold)
    common = (Counter(own) & Counter(gold)).total()
    return 2 * common / (len(own) + len(gold))


def contained(reply: str, golds: Sequence[str]) -> float:
    """1 where the normalised reply holds the words of a normalised gold answer side by side.

    Whole words, so that "no" does not stand in "not known"; an answer that normalises to nothing stands in no reply.
    """
    own = f" {normalise(reply)} "
    wanted = (normalise(gold) for gold in golds)
    return float(any(gold and f" {gold} " in own for gold in wanted))


# ---- times


def percentile(values: Sequence[float] | np.ndarray, share: float) -> float:
    """The value that `share` percent of all lie below, linear between neighbours; 0 where there are none."""
    return float(np.percentile(np.asarray(values, np.float64), share)) if len(values) else 0.0
