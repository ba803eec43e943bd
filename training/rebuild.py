"""From a vector back to its tokens: the decoder of an autoencoder.

The vector is a sum of what every place wrote (`VectorEncoder`). A place reads it with a matrix of its own, which at
first is the writing one transposed, a matched filter. What it reads is its token's code under the sum of all others'.
So every layer first writes what it takes all tokens to be, subtracts that from the vector, and lets each place read
the remainder: the cancelling of interference, as receivers do it for many senders at once, unrolled into layers between
which the places see each other. Tokens that are known already (given by the caller, or decided in an earlier round)
stand in the first layer's input and are subtracted with the rest.

All places are decoded at once. A further round is given those that were decided most clearly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from treemem.hierarchy.vector import Block, Norm, VectorConfig, VectorEncoder, lowered

UNKNOWN = -1
"""Stands for a token that is not known."""


class VectorDecoder(nn.Module):
    """States of all places from the vector and those tokens that are known; `AutoEncoder` makes tokens of them."""

    def __init__(self, config: VectorConfig, encoder: VectorEncoder) -> None:
        """Weights that fit those of a new encoder: what is read at first is what was written."""
        super().__init__()
        self.config = config
        width, words, code = config.decoder_width, config.encoder_width, config.code
        self.unknown = nn.Parameter(torch.randn(words))
        self.places = nn.Parameter(torch.randn(config.tokens, width) * 0.1)
        self.inwards, self.outwards = nn.Linear(words, width, bias=False), nn.Linear(width, words, bias=False)
        self.write = nn.Linear(config.tokens * code, config.total, bias=False)
        self.read = nn.Linear(config.total, config.tokens * code, bias=False)
        self.layers = nn.ModuleList(Block(width, config.head) for _ in range(config.decoder_layers))
        self.norms = nn.ModuleList(Norm(width) for _ in range(config.decoder_layers))
        self.down = nn.ModuleList(nn.Linear(width, code, bias=False) for _ in range(config.decoder_layers))
        self.up = nn.ModuleList(nn.Linear(code, width, bias=False) for _ in range(config.decoder_layers))
        self.norm = Norm(width)
        with torch.no_grad():
            wide, narrow = max(width, words), min(width, words)
            isometry = torch.linalg.qr(torch.randn(wide, narrow))[0]
            isometry = isometry if width >= words else isometry.T
            self.inwards.weight.copy_(isometry)
            self.outwards.weight.copy_(isometry.T)
            self.write.weight.copy_(encoder.write.weight)
            self.read.weight.copy_(encoder.write.weight.T)
            matched = isometry @ torch.linalg.pinv(encoder.code.weight) * 0.5
            for up, down in zip(self.up, self.down, strict=True):
                up.get_parameter("weight").copy_(matched)
                down.get_parameter("weight").mul_(0.1)

    def forward(
        self, vectors: Float[Tensor, "b total"], words: Float[Tensor, "b t words"], known: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t words"]:
        """States to compare with embeddings of tokens.

        Args:
            vectors: of the encoder.
            words: embeddings of tokens, anything where they are not known.
            known: which are.
        """
        config = self.config
        x = lowered(self.inwards(torch.where(known[:, :, None], words, self.unknown)) + self.places)
        scale = math.sqrt(config.total / (config.tokens * config.code))
        for layer, norm, down, up in zip(self.layers, self.norms, self.down, self.up, strict=True):
            rest = vectors - scale * self.write(down(norm(x)).flatten(1))
            x = layer(x + up(self.read(rest).unflatten(1, (config.tokens, config.code))))
        return self.outwards(self.norm(x))


class AutoEncoder(nn.Module):
    """Encoder and decoder, which share their embeddings of tokens."""

    def __init__(self, config: VectorConfig, frequencies: Int64[Tensor, " v"] | None = None) -> None:
        """Weights drawn at random.

        Args:
            config: shape.
            frequencies: of the tokens in what it will be trained on: the outputs' biases start with their logarithms.
        """
        super().__init__()
        self.config = config
        self.encoder = VectorEncoder(config)
        self.decoder = VectorDecoder(config, self.encoder)
        self.scale = nn.Parameter(torch.tensor(1 / math.sqrt(config.encoder_width)))
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        if frequencies is not None:
            with torch.no_grad():
                self.bias.copy_(((frequencies + 1) / (frequencies + 1).sum()).log())

    def states(self, vectors: Float[Tensor, "b total"], given: Int64[Tensor, "b t"]) -> Float[Tensor, "b t words"]:
        """The decoder's, from vectors and tokens (`UNKNOWN` where they are not known)."""
        return self.decoder(vectors, self.encoder.words(given.clamp_min(0)), given != UNKNOWN)

    def logits(self, states: Float[Tensor, "*rows words"]) -> Float[Tensor, "*rows v"]:
        """Of every token of the vocabulary."""
        return F.linear(states * self.scale, self.encoder.words.weight) + self.bias

    def loss(
        self, ids: Int64[Tensor, "b t"], given: Int64[Tensor, "b t"], scored: Int64[Tensor, " n"] | None = None
    ) -> Float[Tensor, ""]:
        """Cross entropy of the tokens.

        Args:
            ids: the tokens.
            given: what the decoder is told of them, which need not be true.
            scored: which of them count, as places in the flattened batch; all if None.
        """
        states = self.states(self.encoder(ids), given).flatten(0, 1)
        right = ids.flatten()
        if scored is not None:
            states, right = states[scored], right[scored]
        return F.cross_entropy(self.logits(states), right)

    @torch.no_grad()
    def rebuild(self, vectors: Float[Tensor, "b total"], rounds: int = 1) -> Int64[Tensor, "b t"]:
        """The tokens, from the vectors alone.

        Args:
            vectors: of the encoder.
            rounds: of decoding; before each but the first, the clearest tokens so far are taken as known, more from
                round to round.
        """
        tokens = self.config.tokens
        given = torch.full((len(vectors), tokens), UNKNOWN, dtype=torch.long, device=vectors.device)
        for done in range(1, rounds + 1):
            logits = self.logits(self.states(vectors, given)).float()
            best, found = logits.max(-1)
            if done == rounds:
                break
            clearness = best - logits.logsumexp(-1)
            clear = clearness.topk(tokens * done // rounds, 1).indices
            given = torch.full_like(given, UNKNOWN).scatter(1, clear, found.gather(1, clear))
        return found

    @torch.no_grad()
    def forced(self, ids: Int64[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Which tokens are right when each is decoded from the vector and the true tokens before it."""
        vectors = self.encoder(ids)
        right = torch.zeros_like(ids, dtype=torch.bool)
        for place in range(ids.shape[1]):
            given = ids.clone()
            given[:, place:] = UNKNOWN
            right[:, place] = self.logits(self.states(vectors, given)[:, place]).argmax(-1) == ids[:, place]
        return right


def corrupted(
    ids: Int64[Tensor, "b t"], whole: float, wrong: float, generator: torch.Generator
) -> Int64[Tensor, "b t"]:
    """What a decoder is told in training: of a part of the texts nothing, of each other a random share of the tokens.

    Args:
        ids: the tokens.
        whole: share of texts of which nothing is told.
        wrong: share of what is told that is a token of another text.
        generator: draws.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=ids.device)

    hidden = (draw(*ids.shape) < draw(len(ids), 1)) | (draw(len(ids), 1) < whole)
    others = ids.roll(1, 0)
    told = torch.where(draw(*ids.shape) < wrong, others, ids)
    return told.masked_fill(hidden, UNKNOWN)
