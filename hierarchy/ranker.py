"""Rankers: how the elements of a level are scored for a query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class RankerConfig:
    """The shape of a ranker."""

    dimension: int
    width: int = 256
    dropout: float = 0.3
    """While it is trained."""


class Ranker(nn.Module):
    """One level's ranker, in the factorised form that the kernels run: `scale * <unit(query + mlp(query)), vector>`.

    Before training `mlp` gives zero, so scores are cosines times a constant. What depends on the query alone is
    computed once per query; the scale (a temperature) makes scores log-odds, comparable across branches.
    """

    def __init__(self, config: RankerConfig) -> None:
        """Make a ranker that leaves queries as they are."""
        super().__init__()
        self.config = config
        self.inwards = nn.Linear(config.dimension, config.width)
        self.outwards = nn.Linear(config.width, config.dimension)
        nn.init.zeros_(self.outwards.weight)
        nn.init.zeros_(self.outwards.bias)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    def shift(self, queries: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What is added to unit query vectors."""
        hidden = F.dropout(F.silu(self.inwards(queries)), self.config.dropout, self.training)
        out: Tensor = self.outwards(hidden)
        return out

    def forward(self, queries: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Unit vectors whose inner products with a level's vectors are its cosines."""
        return F.normalize(queries + self.shift(queries), dim=-1)
