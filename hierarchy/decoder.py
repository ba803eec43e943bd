"""The decoder: ranks the last candidates of a search by both signals and by which terms of the query they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn

from treemem.types import Span

CANDIDATES = 64
"""How many of the best candidates are ranked anew."""
READ = 32
"""Of how many of them the text is read, for terms that stand near each other."""
TERMS = 24
"""How many terms of a query are looked at one by one: its rarest."""
WINDOW = 8
"""How many words apart two neighbouring terms of the query may stand to count as near each other."""
TERM_FEATURES = 8
CANDIDATE_FEATURES = 12
PARTS = ("bm25", "title", "near", "pair", "window", "holds")
"""What is known of a term in a candidate: its BM25 there, whether the title has it, its best BM25 in the two chunks
before and the two after, how often the query's next term follows it, how often the two are near each other, whether it
is there at all. All of the size of a term's share in the query's best BM25 score."""
_FIELDS = len(PARTS) - 1
_FIELD_SCALE = 2.5


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder."""

    dimension: int
    width: int = 32
    """Of the network over terms."""
    state_width: int = 16
    """What a term's state is projected to."""
    layers: int = 1
    """Transformer layers among the candidates; 0: only terms are weighted."""
    token_width: int = 32
    """Of these layers."""
    heads: int = 4
    dropout: float = 0.3
    """While it is trained."""
    repool: bool = True
    """Whether weighted terms also move the query's vector."""
    strength: float = 1.0
    """What it adds is multiplied by this when it is not in training: below 1 for corpora that it was not trained on."""


@dataclass(frozen=True)
class DecoderInputs:
    """What a decoder is told of `b` queries, `t` terms of each and its `k` best candidates, float32 but for the masks.

    Anything finite may stand where a mask is false.
    """

    query: Float[Tensor, "b d"]
    """Unit vectors: of a long query, the first embedding."""
    states: Float[Tensor, "b t d"]
    """The encoder's states of the query's terms, in the query's order like all of terms; zeros where unknown."""
    terms: Float[Tensor, "b t f"]
    """`TERM_FEATURES` features of each term, as `decoder_inputs` makes them."""
    has_term: Bool[Tensor, "b t"]
    vectors: Float[Tensor, "b k d"]
    """Unit vectors of the candidates."""
    cosines: Float[Tensor, "b k"]
    """As the search gave them: the best of several query embeddings."""
    bm25: Float[Tensor, "b k"]
    """All terms together, divided by the query's best score."""
    parts: Float[Tensor, "b k t p"]
    """`PARTS` of each term in each candidate, divided by the query's best BM25 score."""
    features: Float[Tensor, "b k c"]
    """`CANDIDATE_FEATURES` features of each candidate; read by the transformer layers alone."""
    has_candidate: Bool[Tensor, "b k"]

    def __len__(self) -> int:
        return len(self.query)


class Decoder(nn.Module):
    """What is added to the convex sum `cosine + lambda * bm25` of each candidate; zero before training.

    Each term of the query gets a weight, and a worth for each way of standing in a candidate (`PARTS`), from its
    rarity, its place and its state in the query: BM25 with learned term weights (Dai and Callan 2020, "Context-Aware
    Term Weighting For First Stage Passage Retrieval") and term dependence (Metzler and Croft 2005, "A Markov random
    field model for term dependencies"). The lexical scores are then scaled to the best BM25 they had, so that words are
    weighed against each other but not against the cosine: a balance learned on some corpora did harm on others. The
    same network weighs the terms' states, whose sum moves the query's vector. With `layers`, candidates also look at
    each other and at the query's terms.
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Make a decoder that adds nothing."""
        super().__init__()
        self.config = config
        self.states = nn.Linear(config.dimension, config.state_width, bias=False)
        self.inwards = nn.Linear(TERM_FEATURES + config.state_width, config.width)
        self.outwards = nn.Linear(config.width, 1 + _FIELDS + int(config.repool))
        self.worth = nn.Parameter(torch.zeros(_FIELDS))
        nn.init.zeros_(self.outwards.weight)
        nn.init.zeros_(self.outwards.bias)
        if config.layers:
            self.candidates = _Candidates(config)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        """A temperature: `exp(log_scale)` times a score is a log-odds. For the loss; ranks do not depend on it."""

    def forward(self, inputs: DecoderInputs, bm25_weight: float | Tensor = 0.4) -> Float[Tensor, "b k"]:
        """What is added to each candidate's convex sum.

        The order of the candidates makes no difference.

        Args:
            inputs: see `decoder_inputs`.
            bm25_weight: lambda of the convex sum.
        """
        present = inputs.has_term[:, :, None]
        states = self.states(F.dropout(inputs.states, self.config.dropout, self.training))
        terms = torch.cat([inputs.terms, states], dim=2) * present
        hidden = F.dropout(F.gelu(self.inwards(terms)), self.config.dropout, self.training)
        told = self.outwards(hidden) * present
        weights = torch.exp(told[:, :, 0].clamp(-3, 3)) * inputs.has_term
        worth = _FIELD_SCALE * weights[:, :, None] * (self.worth + told[:, :, 1 : 1 + _FIELDS])
        shares = torch.cat([(weights - 1 * inputs.has_term)[:, :, None], worth], dim=2)
        lexical = inputs.bm25 + torch.einsum("bktp,btp->bk", inputs.parts, shares)
        best = torch.where(inputs.has_candidate, lexical, 0).amax(1, keepdim=True).clamp_min(1e-6)
        before = torch.where(inputs.has_candidate, inputs.bm25, 0).amax(1, keepdim=True)
        out = bm25_weight * (lexical * (before / best).clamp_max(20.0) - inputs.bm25)
        if self.config.repool:
            more = (torch.exp(told[:, :, -1].clamp(-3, 3)) - 1) * inputs.has_term
            shift = torch.einsum("bt,btd->bd", more, inputs.states) / inputs.has_term.sum(1, keepdim=True).clamp_min(1)
            moved = F.normalize(inputs.query + shift, dim=1) - F.normalize(inputs.query, dim=1)
            out = out + torch.einsum("bd,bkd->bk", moved, inputs.vectors)
        if self.config.layers:
            out = out + self.candidates(inputs, terms)
        return out if self.training else self.config.strength * out

    @torch.inference_mode()
    def scores(self, inputs: DecoderInputs, bm25_weight: float = 0.4) -> Float32[np.ndarray, "b k"]:
        """Convex sums with what the decoder adds to them, while it is not trained; -inf where there is no candidate."""
        training = self.training
        if training:
            self.eval()
        sums = inputs.cosines + bm25_weight * inputs.bm25 + self(inputs, bm25_weight)
        if training:
            self.train()
        return sums.masked_fill(~inputs.has_candidate, -torch.inf).numpy()


class _Candidates(nn.Module):
    """Transformer layers: candidates attend to each other, then to the query and its terms."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.token_width
        self.dropout = config.dropout
        self.features = nn.Linear(CANDIDATE_FEATURES, width)
        self.vectors = nn.Linear(config.dimension, width, bias=False)
        self.pairs = nn.Linear(2 * width, width)
        self.query = nn.Linear(config.dimension, width)
        self.terms = nn.Linear(TERM_FEATURES + config.state_width, width)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                config.heads,
                2 * width,
                dropout=config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.outwards = nn.Linear(width, 1)
        nn.init.zeros_(self.outwards.weight)
        nn.init.zeros_(self.outwards.bias)

    def forward(self, inputs: DecoderInputs, terms: Float[Tensor, "b t e"]) -> Float[Tensor, "b k"]:
        query, vectors = 6 * self.vectors(inputs.query)[:, None], 6 * self.vectors(inputs.vectors)
        pairs = torch.cat([query * vectors, vectors - query], dim=2)
        states = self.features(inputs.features) + self.pairs(F.dropout(pairs, self.dropout, self.training))
        asked = torch.cat([self.query(5 * inputs.query)[:, None], self.terms(terms)], dim=1)
        unasked = F.pad(~inputs.has_term, (1, 0), value=False)
        for block in self.blocks:
            states = block(states, asked, tgt_key_padding_mask=~inputs.has_candidate, memory_key_padding_mask=unasked)
        out: Tensor = self.outwards(F.dropout(states, self.dropout, self.training))[:, :, 0]
        return 0.1 * out


# ---- what a decoder is told


def term_states(
    words: Sequence[Span], states: Float[np.ndarray, "tokens d"], tokens: Sequence[Span]
) -> Float32[np.ndarray, "words d"]:
    """The mean state of each word's tokens, zeros for a word without any.

    Args:
        words: characters of the words in the query.
        states: the encoder's states of the query's tokens.
        tokens: characters of the tokens.
    """
    starts, ends = np.array(tokens, np.int64).reshape(-1, 2).T
    out = np.zeros((len(words), states.shape[1]), np.float32)
    for i, (start, end) in enumerate(words):
        own = (starts < end) & (ends > start)
        if own.any():
            out[i] = states[own].mean(0)
    return out


def proximity(words: Int[np.ndarray, " n"], terms: int) -> tuple[np.ndarray, np.ndarray]:
    """How often terms that are neighbours in a query are neighbours in a text.

    Args:
        words: for each word of the text, which term of the query it is, counted in the query's order; -1 for others.
        terms: how many terms there are.

    Returns:
        For each term, how often the query's next term follows it at once; and how often the two stand at most `WINDOW`
        words apart in either order, each word paired with the nearest one before it.
    """
    follows, near = np.zeros(terms, np.float32), np.zeros(terms, np.float32)
    last = [-1 - WINDOW] * terms
    places = np.flatnonzero(words >= 0)
    for place, term in zip(places.tolist(), words[places].tolist(), strict=True):
        last[term] = place
        if term > 0:
            follows[term - 1] += last[term - 1] == place - 1
            near[term - 1] += place - last[term - 1] <= WINDOW
        if term + 1 < terms:
            near[term] += place - last[term + 1] <= WINDOW
    return follows, near


def decoder_inputs(
    *,
    query: Float[np.ndarray, " d"],
    states: Float[np.ndarray, "t d"],
    places: Int[np.ndarray, " t"],
    counts: Int[np.ndarray, " t"],
    idf: Float[np.ndarray, " t"],
    weights: Float[np.ndarray, " t"],
    best_bm25: float,
    vectors: Float[np.ndarray, "k d"],
    cosines: Float[np.ndarray, " k"],
    bm25: Float[np.ndarray, " k"],
    parts: Float[np.ndarray, "k t"],
    near: Float[np.ndarray, "k t"],
    in_title: Bool[np.ndarray, "k t"],
    titled: Bool[np.ndarray, " k"],
    words: Sequence[Int[np.ndarray, " _"]],
    paths: Float[np.ndarray, "k 2"],
    bm25_weight: float = 0.4,
) -> DecoderInputs:
    """Inputs for one query, padded to `TERMS` terms and `CANDIDATES` candidates.

    Args:
        query: its (first) embedding.
        states: see `term_states`. At most `TERMS` terms, the rarest, in the order of their first places in the query.
        places: which word of the query each term is first, from 0.
        counts: how often the query has it.
        idf: its inverse document frequency.
        weights: its BM25 weight, as `treemem.storage.lexical.LexicalQuery` has it.
        best_bm25: BM25 of the best chunk of the memory for this query, 0 where none holds a term.
        vectors: of the candidates, at most `CANDIDATES`.
        cosines: of query and candidates.
        bm25: of the candidates, from all terms of the query.
        parts: each term's part of it.
        near: the largest part of each term in the two chunks before and the two after, in the same document.
        in_title: whether the title of the candidate's document has the term.
        titled: whether the document has a title at all. One without is taken for the mean of the others: that a title
            is missing tells where a document comes from, not what it says.
        words: for each of the first `READ` candidates, which term each of its words is, -1 for others, in the order of
            the text. The candidates come best first by their convex sums.
        paths: scores of the candidate's nodes of levels 2 and 3, 0 where there is none.
        bm25_weight: lambda of the convex sum.
    """
    candidates, terms = parts.shape
    scale = 1 / max(best_bm25, 1e-6) if best_bm25 > 0 else 0.0
    share = weights.astype(np.float32) * np.float32(scale)
    following = np.append(share[1:], np.float32(0))
    pairs = np.zeros((2, candidates, terms), np.float32)
    for i, own in enumerate(words[:READ]):
        pairs[:, i] = proximity(own, terms)
    titles = in_title.astype(np.float32)
    if titled.any():
        titles[~titled] = titles[titled].mean(0)
    holds = parts > 0
    made = np.empty((candidates, terms, len(PARTS)), np.float32)
    made[:, :, 0] = parts * scale
    made[:, :, 1] = titles * (0.5 * share)
    made[:, :, 2] = near * scale
    made[:, :, 3:5] = (pairs / (pairs + 1)).transpose(1, 2, 0) * (0.5 * (share + following))[:, None]
    made[:, :, 5] = holds * (0.5 * share)
    normal = (bm25 * scale).astype(np.float32)
    sums = cosines + bm25_weight * normal
    return DecoderInputs(
        query=_padded(query[None], ()),
        states=_padded(states, (TERMS,)),
        terms=_padded(_term_features(places, counts, idf, share, holds), (TERMS,)),
        has_term=_mask(terms, TERMS),
        vectors=_padded(vectors, (CANDIDATES,)),
        cosines=_padded(cosines, (CANDIDATES,)),
        bm25=_padded(normal, (CANDIDATES,)),
        parts=_padded(made, (CANDIDATES, TERMS)),
        features=_padded(_candidate_features(cosines, normal, sums, holds, share, paths), (CANDIDATES,)),
        has_candidate=_mask(candidates, CANDIDATES),
    )


def stack(inputs: Sequence[DecoderInputs]) -> DecoderInputs:
    """Inputs of several queries as one batch."""
    return DecoderInputs(**{f.name: torch.cat([getattr(one, f.name) for one in inputs]) for f in fields(DecoderInputs)})


def _padded(array: np.ndarray, sizes: tuple[int, ...]) -> Tensor:
    """One query's array with zeros up to the given sizes; without sizes, as it is."""
    if not sizes:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))
    out = np.zeros((1, *sizes, *array.shape[len(sizes) :]), np.float32)
    own = [slice(0, length) for length in array.shape[: len(sizes)]]
    out[0][tuple(own)] = array
    return torch.from_numpy(out)


def _mask(count: int, size: int) -> Tensor:
    return torch.arange(size)[None] < count


def _term_features(
    places: np.ndarray, counts: np.ndarray, idf: np.ndarray, share: np.ndarray, holds: np.ndarray
) -> np.ndarray:
    """Rarity, place, how many terms there are, how many candidates hold it; each roughly from -1 to 1."""
    terms = len(idf)
    if terms == 0:
        return np.empty((0, TERM_FEATURES), np.float32)
    columns = (
        idf / 5 - 1,
        idf / max(float(idf.max()), 1e-6) - 0.5,
        counts > 1,
        places == 0,
        places / max(int(places.max()), 1) - 0.5,
        np.full(terms, np.log(terms) / 2 - 1),
        (holds.mean(0) if len(holds) else np.zeros(terms)) - 0.5,
        share / max(float(share.sum()), 1e-6) * terms - 1,
    )
    return np.stack(columns, axis=1).astype(np.float32)


def _candidate_features(
    cosines: np.ndarray, bm25: np.ndarray, sums: np.ndarray, holds: np.ndarray, share: np.ndarray, paths: np.ndarray
) -> np.ndarray:
    """Both signals and their sum below their best, logarithms of ranks, what of the query is held, the way's scores."""
    if len(cosines) == 0:
        return np.empty((0, CANDIDATE_FEATURES), np.float32)
    whole = max(float(share.sum()), 1e-6)
    lexical, dense = np.sort(bm25)[::-1], np.sort(cosines)[::-1]
    tenth = min(9, len(cosines) - 1)
    columns = (
        4 * (cosines - dense[0]),
        2 * bm25 - 1,
        2 * (holds @ share) / whole - 1,
        2 * holds.mean(1) - 1 if holds.shape[1] else np.zeros(len(cosines)),
        _log_ranks(cosines) / 2 - 1.5,
        _log_ranks(bm25) / 2 - 1.5,
        4 * (sums - sums.max()) + 1,
        _log_ranks(sums) / 2 - 1.5,
        np.full(len(cosines), 10 * (dense[0] - dense[tenth]) - 1),
        np.full(len(cosines), 4 * lexical[tenth] - 2),
        paths[:, 0],
        paths[:, 1],
    )
    return np.stack(columns, axis=1).astype(np.float32)


def _log_ranks(scores: np.ndarray) -> np.ndarray:
    """log(1 + rank), rank 0 for the best, equal scores sharing one."""
    return np.log1p(len(scores) - np.searchsorted(np.sort(scores), scores, side="right"))
