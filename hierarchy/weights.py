"""A trained hierarchy: everything that was learned about levels, as a folder that can be shared, and as arrays at work.

Its weights belong to an encoder 1, not to a corpus: a memory of other documents can be grown with them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor, nn

from treemem.errors import InputError, ModelError
from treemem.hierarchy.adapter import Adapter, AdapterConfig
from treemem.hierarchy.decoder import Decoder, DecoderConfig
from treemem.hierarchy.embed import Encoder, EncoderInfo
from treemem.hierarchy.encoder import ContextGate, ContextGateConfig, LevelEncoder, LevelEncoderConfig
from treemem.hierarchy.ranker import Ranker, RankerConfig
from treemem.hierarchy.tokens import TokenHead, TokenHeadConfig
from treemem.storage.levels import Gate, Residual, unit

WEIGHTS_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
BM25_WEIGHT = 0.4
"""lambda before training: what the best BM25 score of a query is worth beside a cosine."""
DEFAULT_HIERARCHY = "default"
DEFAULT_FOLDER = Path(__file__).parent / "default"
"""The packaged hierarchy; its card is `README.md` there."""
NODES_AT_ONCE = 256
"""Nodes whose children a level encoder reads together."""


@dataclass(frozen=True)
class HierarchyConfig:
    """The shape of a hierarchy."""

    encoder: EncoderInfo
    """Encoder 1 that it was trained on."""
    levels: int = 4
    """Highest level that has an encoder and a ranker; above it nodes are means and queries stay as they are."""
    gate_width: int = 256
    ranker_width: int = 256
    encoder_width: int = 128
    encoder_layers: int = 1
    """Of level 2. Each level has one layer more than the one below, at most 3: its input is so much smaller."""
    alpha: float = 0.25
    dropout: float = 0.3
    decoder: DecoderConfig | None = None
    """Of the decoder, None where there is none."""
    tokens: TokenHeadConfig | None = None
    """Of the head of level 0, None where it is untrained."""
    adapter: AdapterConfig | None = None
    """Of what was changed of encoder 1, None where it is as the memory records it."""

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise InputError(f"levels = {self.levels}: a hierarchy has at least levels 1 and 2")


class Hierarchy(nn.Module):
    """Context gate, level encoders and rankers of all levels; decoder, level 0 and encoder 1 where they are trained.

    The weight of BM25 is fitted, not learned.
    """

    def __init__(self, config: HierarchyConfig, card: Mapping[str, Any] | None = None) -> None:
        """Make an untrained hierarchy; `load` reads a trained one."""
        super().__init__()
        self.config = config
        self.card: dict[str, Any] = dict(card or {})
        """What it was trained on, with which settings, and what came of it."""
        d = config.encoder.dimension
        self.gate = ContextGate(ContextGateConfig(d, config.gate_width, config.alpha, config.dropout))
        self.encoders = nn.ModuleDict(
            {
                str(level): LevelEncoder(
                    LevelEncoderConfig(d, config.encoder_width, layers=min(3, config.encoder_layers + level - 2))
                )
                for level in range(2, config.levels + 1)
            }
        )
        self.rankers = nn.ModuleDict(
            {
                str(level): Ranker(RankerConfig(d, config.ranker_width, config.dropout))
                for level in range(1, config.levels + 1)
            }
        )
        self.decoder = None if config.decoder is None else Decoder(config.decoder)
        self.tokens = None if config.tokens is None else TokenHead(config.tokens)
        self.adapter = None if config.adapter is None else Adapter(config.adapter)
        self.precision = torch.float64
        """Arithmetic at work: in float64 nothing depends on how many chunks or nodes come together."""
        self.bm25_weight: Tensor
        self.register_buffer("bm25_weight", torch.tensor(BM25_WEIGHT))

    # ---- files

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` (float16), `config.json` and a card, `README.md`.

        Raises InputError where the folder cannot be written.
        """
        from treemem.hierarchy.card import card_text

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in {
                WEIGHTS_FILE: self.weights_bytes(),
                CONFIG_FILE: self.config_bytes(),
                CARD_FILE: card_text(self).encode(),
            }.items():
                work = folder / f".{name}.part"
                work.write_bytes(data)
                os.replace(work, folder / name)
        except OSError as error:
            raise InputError(f"{folder}: the hierarchy cannot be saved ({error.strerror or error})") from error

    def weights_bytes(self) -> bytes:
        """The weights as a safetensors file: float16, single numbers float32."""
        from safetensors.torch import save

        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        # One key: several would come in any order.
        return save({n: t.half() if t.ndim else t.float() for n, t in state.items()}, {"format": "pt"})

    def config_bytes(self) -> bytes:
        """Version, shape and card as JSON."""
        document = {"version": WEIGHTS_VERSION, "config": asdict(self.config), "card": self.card}
        return (json.dumps(document, indent=1, sort_keys=True, default=str) + "\n").encode()

    @classmethod
    def load(cls, name: str | Path) -> Hierarchy:
        """Read a trained hierarchy from its folder.

        Raises InputError where there is none, ModelError where it cannot be used.
        """
        folder = Path(name).expanduser()
        if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
            raise InputError(
                f"hierarchy {str(name)!r}: no such folder with {CONFIG_FILE} and {WEIGHTS_FILE}; "
                "give one that `treemem train --save` wrote"
            )
        try:
            return cls.from_bytes((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())
        except (OSError, ModelError) as error:
            raise ModelError(f"hierarchy {str(name)!r}: {error}") from error

    @classmethod
    def from_bytes(cls, config: bytes, weights: bytes) -> Hierarchy:
        """A hierarchy from what `config_bytes` and `weights_bytes` gave.

        Raises ModelError where it cannot be used.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            document = json.loads(config)
            version = document["version"]
            if version > WEIGHTS_VERSION:
                raise ModelError(f"written in version {version}, this treemem reads up to {WEIGHTS_VERSION}; upgrade")
            fields = document["config"]
            decoder = None if fields["decoder"] is None else DecoderConfig(**fields["decoder"])
            tokens = None if fields["tokens"] is None else TokenHeadConfig(**fields["tokens"])
            adapter = None if fields["adapter"] is None else AdapterConfig(**fields["adapter"])
            encoder = EncoderInfo(**fields["encoder"])
            fields = {**fields, "encoder": encoder, "decoder": decoder, "tokens": tokens, "adapter": adapter}
            made = cls(HierarchyConfig(**fields), document["card"])
            state = {name: tensor.float() for name, tensor in load(weights).items()}
            made.load_state_dict(state)
        except (ValueError, KeyError, TypeError, RuntimeError, RecursionError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"it cannot be read ({reason}); train it again or get another copy") from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
            raise ModelError("its weights are not finite; train it again or get another copy")
        return made.eval()

    def rounded(self) -> Hierarchy:
        """A copy as it is when it has been saved and loaded again."""
        return self.from_bytes(self.config_bytes(), self.weights_bytes())

    def with_decoder(self, decoder: Decoder | None) -> Hierarchy:
        """A copy with this decoder."""
        return self._with("decoder", decoder, replace(self.config, decoder=None if decoder is None else decoder.config))

    def with_tokens(self, tokens: TokenHead | None) -> Hierarchy:
        """A copy with this head of level 0."""
        return self._with("tokens", tokens, replace(self.config, tokens=None if tokens is None else tokens.config))

    def with_adapter(self, adapter: Adapter | None) -> Hierarchy:
        """A copy with this adapter of encoder 1."""
        return self._with("adapter", adapter, replace(self.config, adapter=None if adapter is None else adapter.config))

    def _with(self, name: str, part: nn.Module | None, config: HierarchyConfig) -> Hierarchy:
        made = Hierarchy(config, self.card)
        state = {key: value for key, value in self.state_dict().items() if not key.startswith(f"{name}.")}
        if part is not None:
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        made.load_state_dict(state)
        return made.eval()

    def digest(self, level: int) -> bytes:
        """A digest of what makes the vectors of a level from those below it."""
        digest = hashlib.sha256()
        for tensor in self.encoder(level).state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.digest()

    def fits(self, encoder: EncoderInfo) -> bool:
        """Whether this was trained on the same encoder 1."""
        own = self.config.encoder
        return (own.weights, own.dimension) == (encoder.weights, encoder.dimension)

    def require_encoder(self, encoder: EncoderInfo) -> None:
        """Raise ModelError unless this was trained on the same encoder 1."""
        own = self.config.encoder
        if not self.fits(encoder):
            raise ModelError(
                f"this hierarchy was trained on encoder {own.name!r} (weights {own.weights}), not on {encoder.name!r} "
                f"(weights {encoder.weights}); build with the first, or train one"
            )

    def tuned(self, encoder: Encoder) -> Encoder:
        """Encoder 1 as this hierarchy wants it: a copy where it was fine-tuned, else the one given.

        Args:
            encoder: the one that it was trained on.

        Raises:
            ModelError: the encoder is another.
        """
        return encoder if self.adapter is None else self.adapter.applied(encoder)

    def scale(self, level: int) -> Tensor:
        """What a level's cosines are multiplied by to be logits: one over its temperature."""
        ranker = self.rankers[str(level)]
        assert isinstance(ranker, Ranker)
        return ranker.log_scale.exp()

    def set_scale(self, level: int, scale: float) -> None:
        """Set a level's temperature to one over `scale`."""
        ranker = self.rankers[str(level)]
        assert isinstance(ranker, Ranker)
        ranker.log_scale.data.fill_(math.log(scale))

    def encoder(self, level: int) -> ContextGate | LevelEncoder:
        """What makes the vectors of a level."""
        encoder = self.gate if level == 1 else self.encoders[str(level)]
        assert isinstance(encoder, ContextGate | LevelEncoder)
        return encoder

    # ---- at work

    @cached_property
    def context(self) -> Gate | None:
        """The context gate over arrays; None where nothing is learned: documents are added with the memory's alpha."""
        if not _learned(self.gate):
            return None
        gate = copy.deepcopy(self.gate).to(self.precision).eval()

        def parts(*rows: Float64[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
            with torch.inference_mode():
                gates, residuals = gate.parts(*(torch.from_numpy(part).to(self.precision) for part in rows))
            return gates.double().numpy(), residuals.double().numpy()

        return parts

    @cached_property
    def residuals(self) -> dict[int, Residual]:
        """The level encoders over arrays, by level; without those that add nothing to means."""
        learned = {int(level): encoder for level, encoder in self.encoders.items() if _learned(encoder)}
        return {level: _residual(encoder, self.precision) for level, encoder in learned.items()}

    @cached_property
    def _shifts(self) -> dict[int, Callable[[np.ndarray], np.ndarray] | None]:
        return {int(level): _shift(ranker) for level, ranker in self.rankers.items()}

    def rank(self, level: int, queries: Float32[np.ndarray, "m d"]) -> Float32[np.ndarray, "m d"]:
        """Queries as a level's ranker compares them, unit vectors; unchanged where there is nothing learned."""
        shift = self._shifts.get(level)
        return queries if shift is None else unit(queries + shift(queries)).astype(np.float32)


def load_hierarchy(name: str | Path) -> Hierarchy | None:
    """A hierarchy by name: a folder, `default` (the packaged one), or `none`, which gives None.

    Raises InputError where there is no such folder, ModelError where it cannot be used.
    """
    if name == "none":
        return None
    return Hierarchy.load(DEFAULT_FOLDER if name == DEFAULT_HIERARCHY else name)


def _learned(part: nn.Module) -> bool:
    """Whether a part's last layer, zero before training, gives anything."""
    outwards = part.get_submodule("outwards")
    return any(bool(parameter.any()) for parameter in outwards.parameters())


def _residual(encoder: nn.Module, precision: torch.dtype) -> Residual:
    encoder = copy.deepcopy(encoder).to(precision).eval()
    assert isinstance(encoder, LevelEncoder)

    def residual(
        children: Float64[np.ndarray, "nodes fanout d"], present: Bool[np.ndarray, "nodes fanout"]
    ) -> Float64[np.ndarray, "nodes d"]:
        out = np.empty((len(children), children.shape[2]))
        with torch.inference_mode():
            for start in range(0, len(children), NODES_AT_ONCE):
                rows = slice(start, start + NODES_AT_ONCE)
                below = torch.from_numpy(children[rows]).to(precision)
                out[rows] = encoder.residual(below, torch.from_numpy(present[rows])).double().numpy()
        return out

    return residual


def _shift(ranker: nn.Module) -> Callable[[np.ndarray], np.ndarray] | None:
    """A ranker's part that is added to queries, over arrays; None where it adds nothing."""
    assert isinstance(ranker, Ranker)
    if not _learned(ranker):
        return None
    layers = (ranker.inwards, ranker.outwards)
    (w1, b1), (w2, b2) = ((_array(layer.weight), _array(layer.bias)) for layer in layers)

    def shift(queries: np.ndarray) -> np.ndarray:
        hidden = queries @ w1.T + b1
        return np.asarray((hidden / (1 + np.exp(-hidden))) @ w2.T + b2)

    return shift


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), np.float32)
