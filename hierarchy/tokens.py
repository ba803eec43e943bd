"""Level 0, trained: late interaction over projected token states, the query's tokens weighed against each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int8
from torch import Tensor, nn

from treemem.storage.lexical import LONGEST_WORD, Lexical
from treemem.types import Span

TOKEN_FEATURES = 7
UNKNOWN_IDF = 12.0
"""Inverse document frequency of a word that stands in no chunk."""
TOKEN_WEIGHT = 2.0
"""mu before training: what the mean of the tokens' best cosines is worth beside the convex sum."""
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class TokenHeadConfig:
    """The shape of a token head."""

    dimension: int
    """Of the encoder's token states."""
    width: int = 64
    """What they are projected to."""
    state_width: int = 16
    """What a query token's state is projected to, for its weight."""
    hidden: int = 32
    """Of the network that weighs the query's tokens."""
    dropout: float = 0.3
    """While it is trained."""


@dataclass(frozen=True)
class ProjectedTokens:
    """Projected token states of one chunk, its title's and its own, small enough to be stored."""

    rows: Int8[np.ndarray, "tokens width"]
    scales: Float32[np.ndarray, " tokens"]
    """Of each row: `rows * scales` are vectors of about length 1."""

    @classmethod
    def of(cls, vectors: Float32[np.ndarray, "tokens width"]) -> ProjectedTokens:
        """Quantise vectors, each by its largest coordinate."""
        scales = np.maximum(np.abs(vectors).max(1, initial=0), 1e-12).astype(np.float32) / 127
        return cls(np.rint(vectors / scales[:, None]).astype(np.int8), scales)

    def vectors(self) -> Float32[np.ndarray, "tokens width"]:
        """The tokens in float32."""
        return self.rows.astype(np.float32) * self.scales[:, None]


@dataclass(frozen=True)
class WeighedQuery:
    """A query's tokens as they are compared with those of chunks."""

    tokens: Float32[np.ndarray, "q width"]
    """Unit vectors."""
    weights: Float32[np.ndarray, " q"]
    """Their sum is mu."""


class TokenHead(nn.Module):
    """`mu * sum over query tokens of weight * best cosine among the chunk's tokens`, cosines of projected states.

    Late interaction (Khattab and Zaharia 2020, "ColBERT") in fewer dimensions (Santhanam et al. 2022, "ColBERTv2").
    Before training the weights are equal, so that their sum is the mean that untrained level 0 takes, and the
    projection keeps the first `width` dimensions. It is trained on coordinates in a basis whose first directions are
    the largest, where that loses little, and `unfolded` afterwards.
    """

    def __init__(self, config: TokenHeadConfig) -> None:
        """Make a head whose weights are equal."""
        super().__init__()
        self.config = config
        self.projection = nn.Parameter(torch.eye(config.width, config.dimension))
        self.states = nn.Linear(config.dimension, config.state_width, bias=False)
        self.inwards = nn.Linear(TOKEN_FEATURES + config.state_width, config.hidden)
        self.outwards = nn.Linear(config.hidden, 1, bias=False)
        nn.init.zeros_(self.outwards.weight)
        self.log_mu = nn.Parameter(torch.tensor(TOKEN_WEIGHT).log())
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        """A temperature: `exp(log_scale)` times a score is a log-odds. For the loss; ranks do not depend on it."""

    def project(self, states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch width"]:
        """Unit vectors of token states."""
        return F.normalize(states @ self.projection.T, dim=-1)

    def weights(
        self, states: Float[Tensor, "b q d"], features: Float[Tensor, "b q f"], present: Bool[Tensor, "b q"]
    ) -> Float[Tensor, "b q"]:
        """What each of a query's tokens is worth, together 1, and 0 where there is none.

        Args:
            states: unit vectors, anything finite where there is no token.
            features: `token_features` of each token.
            present: which tokens are there.
        """
        told = self.states(F.dropout(states, self.config.dropout, self.training))
        hidden = F.gelu(self.inwards(torch.cat([features, told], dim=2)))
        logits = self.outwards(F.dropout(hidden, self.config.dropout, self.training))[:, :, 0]
        weights = torch.exp(logits.clamp(-4, 4)) * present
        return weights / weights.sum(1, keepdim=True).clamp_min(1e-6)

    def forward(
        self,
        states: Float[Tensor, "b q d"],
        features: Float[Tensor, "b q f"],
        present: Bool[Tensor, "b q"],
        tokens: Float[Tensor, "b k c d"],
        has_token: Bool[Tensor, "b k c"],
    ) -> Float[Tensor, "b k"]:
        """What is added to the convex sum of each of a query's `k` chunks; 0 where a chunk has no tokens.

        Args:
            states: unit states of the query's tokens, anything finite where there is none.
            features: `token_features` of each.
            present: which are there.
            tokens: unit states of the tokens of each chunk and its title.
            has_token: which are there.
        """
        own = self.project(states)
        with torch.no_grad():  # which token is the best one has no gradient, and all but it are left out of the graph
            cosines = torch.einsum("bqd,bkcd->bkqc", own, self.project(tokens))
            best = cosines.masked_fill(~has_token[:, :, None], -torch.inf).argmax(3)
        met = torch.take_along_dim(tokens, best[:, :, :, None], 2)
        cosines = torch.einsum("bqd,bkqd->bkq", own, self.project(met))
        weighed = torch.einsum("bkq,bq->bk", cosines, self.weights(states, features, present))
        return self.log_mu.exp() * weighed * has_token.any(2)

    # ---- other forms

    def unfolded(self, basis: Float32[np.ndarray, "rank d"]) -> TokenHead:
        """This head, which reads coordinates in an orthonormal basis, as one that reads the states themselves."""
        made = TokenHead(replace(self.config, dimension=basis.shape[1]))
        turned = torch.from_numpy(basis)
        folded = ("projection", "states.weight")
        made.load_state_dict({k: v @ turned if k in folded else v for k, v in self.state_dict().items()})
        return made.train(self.training)

    def strengthened(self, strength: float) -> TokenHead:
        """A head, trained from its start in a basis, with only a share of what it learned: 0 gives the start."""
        made = TokenHead(self.config)
        start = made.state_dict()
        state = self.state_dict()
        for name in ("projection", "log_mu"):
            state[name] = start[name] + strength * (state[name] - start[name])
        state["outwards.weight"] = strength * state["outwards.weight"]
        made.load_state_dict(state)
        return made.train(self.training)


class TokenScorer:
    """A trained head over arrays, for one query at a time. Read-only, so safe to share between threads."""

    def __init__(self, head: TokenHead) -> None:
        """Take the weights of a head as they are now; it reads the encoder's states (`TokenHead.unfolded`)."""
        self._head = TokenHead(head.config)
        self._head.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
        self._head.eval().requires_grad_(False)
        self._projection = np.ascontiguousarray(self._head.projection.numpy().T)

    def project(self, states: Float[np.ndarray, "tokens d"]) -> Float32[np.ndarray, "tokens width"]:
        """Unit vectors of token states."""
        vectors = states.astype(np.float32) @ self._projection
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)

    def weigh(self, states: Float[np.ndarray, "q d"], idf: Float[np.ndarray, " q"]) -> WeighedQuery:
        """A query's tokens.

        Args:
            states: of the query's tokens, as the encoder gives them.
            idf: of the words that they are of, see `token_idf`.
        """
        with torch.inference_mode():
            own = torch.from_numpy(states.astype(np.float32))[None]
            features = torch.from_numpy(token_features(idf))[None]
            weights = self._head.weights(own, features, torch.ones(1, len(states), dtype=torch.bool))[0]
            weights = weights * self._head.log_mu.exp()
        return WeighedQuery(self.project(states), weights.numpy())

    def score(
        self, query: WeighedQuery, chunks: Sequence[ProjectedTokens | Float32[np.ndarray, "_ width"]]
    ) -> Float32[np.ndarray, " n"]:
        """What is added to the convex sum of each chunk; 0 for a chunk without tokens.

        Args:
            query: see `weigh`.
            chunks: projected tokens of each chunk and its title, stored or just made.
        """
        out = np.zeros(len(chunks), np.float32)
        for i, chunk in enumerate(chunks):
            vectors = chunk.vectors() if isinstance(chunk, ProjectedTokens) else chunk
            if len(vectors) and len(query.tokens):
                out[i] = query.weights @ (query.tokens @ vectors.T).max(1)
        return out


# ---- what a head is told


def token_idf(lexical: Lexical, text: str, spans: Sequence[Span]) -> Float32[np.ndarray, " tokens"]:
    """Inverse document frequency of the word that each token is of: 0 for a token of no word.

    Args:
        lexical: of the memory that is searched.
        text: of the query.
        spans: characters of its tokens.
    """
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    out = np.zeros(len(spans), np.float32)
    for word in _WORD.finditer(text):
        if len(word[0].encode()) >= LONGEST_WORD:
            continue
        terms = lexical.numbers(lexical.analyze(word[0]))
        known = terms[terms >= 0]
        if len(terms):
            rarity = float(lexical.idf(known).max()) if len(known) else UNKNOWN_IDF
            out[(starts < word.end()) & (ends > word.start())] = rarity
    return out


def token_features(idf: Float[np.ndarray, " tokens"]) -> Float32[np.ndarray, "tokens f"]:
    """`TOKEN_FEATURES` features of each token of a query: rarity, place, how many there are; about from -1 to 1."""
    count = len(idf)
    if count == 0:
        return np.empty((0, TOKEN_FEATURES), np.float32)
    places = np.arange(count)
    columns = (
        idf / 5 - 1,
        idf / max(float(idf.max()), 1e-6) - 0.5,
        idf == 0,
        places == 0,
        places / max(count - 1, 1) - 0.5,
        np.full(count, np.log(count) / 2 - 1),
        places == count - 1,
    )
    return np.stack(columns, axis=1).astype(np.float32)
