"""`VectorEncoder` as a module of sentence-transformers, and the folder that it is loaded from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from treemem.hierarchy.vector import CONFIG_FILE, WEIGHTS_FILE, VectorConfig, VectorEncoder, save_module


class VectorModule(InputModule):
    """The one module of such a model: token states, and the vector as the sentence's embedding."""

    config_file_name = CONFIG_FILE

    def __init__(self, encoder: VectorEncoder, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = self._fast = tokenizer
        self.max_seq_length = encoder.config.tokens

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add `token_embeddings` (of the vector's width, filled up with zeros) and `sentence_embedding`."""
        ids, present = features["input_ids"], features["attention_mask"].bool()
        # A text without tokens has one place that is masked: attention over nothing would give NaN.
        seen = present | (~present.any(1, keepdim=True))
        states = self.encoder.states(ids, seen)
        features["sentence_embedding"] = self.encoder.pool(states, ids, present)
        total = self.encoder.config.total
        features["token_embeddings"] = F.pad(states, (0, max(0, total - states.shape[2])))[:, :, :total]
        return features

    def preprocess(self, inputs: Any, prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Texts as the model is given them."""
        texts = [(prompt or "") + text for text in inputs]
        given = self._fast(
            texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        return dict(given)

    def get_embedding_dimension(self) -> int:
        """Numbers in a sentence's embedding."""
        return self.encoder.config.total

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the module into a folder."""
        save_module(self.encoder, json.loads(self._fast.backend_tokenizer.to_str()), Path(output_path))

    @classmethod
    def load(  # type: ignore[override]  # what concerns downloads is in the rest
        cls, model_name_or_path: str, subfolder: str = "", **_: Any
    ) -> VectorModule:
        """Read what `save` wrote."""
        folder = Path(model_name_or_path) / subfolder
        config = VectorConfig(**json.loads((folder / CONFIG_FILE).read_text("utf-8")))
        encoder = VectorEncoder(config)
        encoder.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS_FILE).items()})
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]",
            model_max_length=config.tokens,
        )  # fmt: skip
        return cls(encoder.eval(), tokenizer)
