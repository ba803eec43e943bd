"""What the elements of the tree are made of: chunks in their documents, nodes of their children. Untrained: means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class ContextGateConfig:
    """The shape of a context gate."""

    dimension: int
    width: int = 256
    alpha: float = 0.25
    """How much of its document's vector a chunk takes before training."""
    dropout: float = 0.3
    """While it is trained."""


class ContextGate(nn.Module):
    """Encoder of level 1: a chunk's encoding in its document gives the chunk's vector.

    `unit(encoding + gate * document + residual)`, where gate and residual are a small function of the chunk, its
    document and its two neighbours. Before training the gate is alpha and the residual zero.
    """

    def __init__(self, config: ContextGateConfig) -> None:
        """Make a gate that takes alpha of every document."""
        super().__init__()
        self.config = config
        self.inwards = nn.Linear(4 * config.dimension, config.width)
        self.outwards = nn.Linear(config.width, config.dimension + 1)
        nn.init.zeros_(self.outwards.weight)
        nn.init.zeros_(self.outwards.bias)

    def parts(
        self,
        chunks: Float[Tensor, "n d"],
        documents: Float[Tensor, "n d"],
        before: Float[Tensor, "n d"],
        after: Float[Tensor, "n d"],
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
        """How much of its document each chunk takes, and what else is added.

        Args:
            chunks: what encoder 1 gave.
            documents: unit vectors of their documents.
            before: encodings of the chunks before them in their documents; zeros for the first.
            after: encodings of the chunks after them; zeros for the last.
        """
        hidden = F.silu(self.inwards(torch.cat([chunks, documents, before, after], dim=1)))
        out = self.outwards(F.dropout(hidden, self.config.dropout, self.training))
        return self.config.alpha * torch.exp(out[:, -1]), out[:, :-1]

    def forward(
        self,
        chunks: Float[Tensor, "n d"],
        documents: Float[Tensor, "n d"],
        before: Float[Tensor, "n d"],
        after: Float[Tensor, "n d"],
    ) -> Float[Tensor, "n d"]:
        """Unit vectors of level 1; arguments as for `parts`."""
        gates, residuals = self.parts(chunks, documents, before, after)
        return F.normalize(chunks + gates[:, None] * documents + residuals, dim=1)


@dataclass(frozen=True)
class LevelEncoderConfig:
    """The shape of a level encoder."""

    dimension: int
    width: int = 128
    heads: int = 4
    layers: int = 1
    dropout: float = 0.1
    """While it is trained."""


class LevelEncoder(nn.Module):
    """Encoder of a level of nodes: `unit(mean(children) + residual(children))`, the residual zero before training.

    BERT-like blocks without positions (children are a set), then one learned query that looks at all of them (pooling
    by multi-head attention: Lee et al. 2019, "Set Transformer", section 3.2).
    """

    def __init__(self, config: LevelEncoderConfig) -> None:
        """Make an encoder whose nodes are the means of their children."""
        super().__init__()
        self.config = config
        self.inwards = nn.Linear(config.dimension, config.width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width,
                config.heads,
                2 * config.width,
                dropout=config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.query = nn.Parameter(torch.randn(1, 1, config.width) * config.width**-0.5)
        self.pool = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.outwards = nn.Linear(config.width, config.dimension)
        nn.init.zeros_(self.outwards.weight)
        nn.init.zeros_(self.outwards.bias)

    def residual(
        self, children: Float[Tensor, "nodes fanout d"], present: Bool[Tensor, "nodes fanout"]
    ) -> Float[Tensor, "nodes d"]:
        """What is added to the mean; the order of the children makes no difference.

        Args:
            children: unit vectors, anything finite where none is present.
            present: which children are there, at least one of each node.
        """
        states = self.inwards(children)
        for block in self.blocks:
            states = block(states, src_key_padding_mask=~present)
        query = self.query.expand(len(states), -1, -1)
        pooled, _ = self.pool(query, states, states, key_padding_mask=~present, need_weights=False)
        out: Tensor = self.outwards(pooled[:, 0])
        return out

    def forward(
        self, children: Float[Tensor, "nodes fanout d"], present: Bool[Tensor, "nodes fanout"]
    ) -> Float[Tensor, "nodes d"]:
        """Unit vectors of nodes from their children; arguments as for `residual`."""
        counts = present.sum(1, keepdim=True)
        mean = (children * present[:, :, None]).sum(1) / counts
        return F.normalize(mean + self.residual(children, present), dim=1)
