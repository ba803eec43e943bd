"""An encoder 1 whose vector is a sum of position's own linear maps, so that the text can be rebuilt from it.

Mean pooling forgets where a token stood. Here each place of the text has a matrix of its own: it writes a short code of
its token into the vector, and the codes of all places lie upon each other like the users of one radio band. What
belongs to one place can be read again with its matrix, as far as the others are known
(`treemem.training.rebuild.VectorDecoder`).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from treemem.errors import InputError

CONFIG_FILE = "vector_config.json"
WEIGHTS_FILE = "model.safetensors"
MODULE = "treemem.hierarchy.vector_module.VectorModule"
"""What sentence-transformers loads such a folder with."""


@dataclass(frozen=True, kw_only=True)
class VectorConfig:
    """Shape of an encoder to vectors and of its decoder."""

    vocabulary: int
    width: int = 512
    """Of one vector."""
    vectors: int = 1
    tokens: int = 128
    """Most in a text."""
    code: int = 128
    """Numbers that a place writes about its token."""
    encoder_width: int = 384
    encoder_layers: int = 4
    decoder_width: int = 512
    decoder_layers: int = 6
    head: int = 64
    """Width of an attention head."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (0 if name.endswith("layers") else 1):
                raise InputError(f"{name} = {value}: it must be at least 1")
        for name in ("encoder_width", "decoder_width"):
            if getattr(self, name) % self.head:
                raise InputError(f"{name} = {getattr(self, name)}: it must be a multiple of head = {self.head}")

    @property
    def total(self) -> int:
        """Numbers in all vectors of a text together."""
        return self.width * self.vectors

    def to_json(self) -> dict[str, Any]:
        """As the constructor takes it."""
        return asdict(self)


def normed(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Rows with mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])


def lowered(x: Tensor) -> Tensor:
    """In the precision of autocast, where that is on: what layers add to one another stays in it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Norm(nn.LayerNorm):
    """Layer norm in the precision of what it is given: autocast would make float32 of it, and then bfloat16 again."""

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Rows normed, scaled and shifted."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """A transformer's layer, normed first, in which every place sees every other."""

    def __init__(self, width: int, head: int) -> None:
        """Weights drawn at random; what is added at first is small."""
        super().__init__()
        self.heads = width // head
        self.attention_norm, self.norm = Norm(width), Norm(width)
        self.inwards, self.outwards = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        with torch.no_grad():
            self.outwards.weight *= 0.3
            self.down.weight *= 0.3

    def forward(
        self, x: Float[Tensor, "b t d"], present: Bool[Tensor, "b one place t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """States after the layer; `present` says which places there are."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.inwards(self.attention_norm(x)).chunk(3, -1)
        )
        x = x + self.outwards(F.scaled_dot_product_attention(q, k, v, attn_mask=present).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


def place_maps(config: VectorConfig) -> Float[Tensor, "total places_code"]:
    """Orthonormal columns for each place, drawn at random (scaled to the same length where there are too many)."""
    total, code = config.total, config.code
    parts = []
    for _ in range(config.tokens):
        if code <= total:
            parts.append(torch.linalg.qr(torch.randn(total, code))[0])
        else:
            parts.append(torch.randn(total, code) / math.sqrt(total))
    return torch.cat(parts, 1)


class VectorEncoder(nn.Module):
    """Tokens to one vector of length `sqrt(total)`: a transformer, then a map of each place's own, summed."""

    def __init__(self, config: VectorConfig) -> None:
        """Weights drawn at random."""
        super().__init__()
        self.config = config
        width = config.encoder_width
        self.words = nn.Embedding(config.vocabulary, width)
        self.places = nn.Parameter(torch.randn(config.tokens, width) * 0.1)
        self.layers = nn.ModuleList(Block(width, config.head) for _ in range(config.encoder_layers))
        self.code = nn.Linear(width, config.code, bias=False)
        self.write = nn.Linear(config.tokens * config.code, config.total, bias=False)
        with torch.no_grad():
            self.write.weight.copy_(place_maps(config))

    def states(self, ids: Int64[Tensor, "b t"], present: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b t d"]:
        """Contextual states of tokens; `present` says which there are, where not all."""
        x = lowered(self.words(ids) + self.places[: ids.shape[1]])
        mask = None if present is None else present[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return normed(x)

    def pool(
        self, states: Float[Tensor, "b t d"], ids: Int64[Tensor, "b t"], present: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b total"]:
        """The vector of contextual states and the tokens themselves."""
        codes = self.code(self.words(ids) + states)
        if present is not None:
            codes = codes * present[:, :, None]
        total = self.write(F.pad(codes, (0, 0, 0, self.config.tokens - ids.shape[1])).flatten(1)).float()
        return F.normalize(total, dim=1) * math.sqrt(self.config.total)

    def forward(
        self, ids: Int64[Tensor, "b t"], present: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b total"]:
        """The vector, or all vectors of a text one behind the other."""
        return self.pool(self.states(ids, present), ids, present)


def save_module(encoder: VectorEncoder, tokenizer: dict[str, Any], folder: Path) -> None:
    """Write an encoder and its tokenizer (as JSON, without special tokens), weights in float16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in encoder.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(encoder.config.to_json(), indent=1) + "\n", "utf-8")
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}), "utf-8")


def save_encoder(encoder: VectorEncoder, tokenizer: dict[str, Any], folder: Path) -> None:
    """Write a folder that `treemem.hierarchy.embed.load_encoder` takes."""
    save_module(encoder, tokenizer, folder)
    module = {"idx": 0, "name": "0", "path": "", "type": MODULE}
    (folder / "modules.json").write_text(json.dumps([module], indent=1) + "\n", "utf-8")
    settings: dict[str, Any] = {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
