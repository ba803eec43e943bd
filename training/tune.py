"""Fine-tuning encoder 1 end to end with levels 1 and 2."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from treemem.errors import MissingPackage
from treemem.hierarchy.adapter import Adapter
from treemem.hierarchy.embed import Encoder
from treemem.hierarchy.weights import Hierarchy
from treemem.training.corpus import Corpus
from treemem.training.module import Batch, LevelPair, TrainConfig

_UNUSED = "pooler"
"""The head of BERT's first task, which sentence embeddings are made without."""


class TrainableEncoder:
    """A copy of encoder 1 whose weights, or low-rank differences of them, take gradients."""

    def __init__(self, encoder: Encoder, kind: str, rank: int) -> None:
        """Copy an encoder.

        Args:
            encoder: it stays as it is.
            kind: `lora` or `full`.
            rank: of LoRA's differences.

        Raises:
            MissingPackage: LoRA without peft.
        """
        self.kind = kind
        self.encoder = encoder.copy()
        self.model = self.encoder.model
        transformer: Any = self.model[0].auto_model
        if kind == "lora":
            try:
                from peft import LoraConfig, inject_adapter_in_model
            except ImportError as error:
                raise MissingPackage("LoRA needs peft; run: pip install 'treemem[train]'") from error
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="peft")
                settings = LoraConfig(
                    r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=f".*{_UNUSED}.*"
                )
                inject_adapter_in_model(settings, transformer)
        else:
            self._start = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(_UNUSED not in name)
        if getattr(transformer, "supports_gradient_checkpointing", False):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning)  # of a new name for it
                transformer.gradient_checkpointing_enable({"use_reentrant": False})

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Float[Tensor, "texts d"]:
        """Embeddings that take gradients, float32."""
        mixed = self.encoder.precision == "bfloat16"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=mixed):
            return self.encoder.differentiable(texts, query=query)

    def adapter(self) -> Adapter:
        """What was changed, as it will be stored: float16."""
        if self.kind == "full":
            now = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            return Adapter.of({name: (p.detach() - self._start[name].to(p)).half().float() for name, p in now.items()})
        differences = {}
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A"):
                b = module.lora_B["default"].weight.detach().cpu() * module.scaling["default"]
                differences[f"{name}.weight"] = (
                    b.half().float(),
                    module.lora_A["default"].weight.detach().cpu().half().float(),
                )
        return Adapter.of(differences)


class TunedPair(LevelPair):
    """Levels 1 and 2 together with encoder 1: a batch's questions and chunks are encoded with gradients.

    Documents, neighbours and other children of nodes stay as they were encoded before.
    """

    def __init__(
        self, hierarchy: Hierarchy, corpora: Sequence[Corpus], config: TrainConfig, encoder: TrainableEncoder
    ) -> None:
        """Train levels 1 and 2 of a hierarchy, which is changed, and an encoder."""
        small = replace(config, batch=config.tune_batch, negatives=2, node_questions=max(1, config.tune_batch // 2))
        super().__init__(hierarchy, corpora, 1, small)
        self.trained = encoder
        self.transformer = encoder.model

    def question_vectors(self, batch: Batch) -> Float[Tensor, "questions d"]:
        """Of the questions, by the encoder under training."""
        texts = self.corpora[batch.corpus].train.texts
        return self.trained.encode([texts[row] for row in batch.rows], query=True)

    def chunk_inputs(self, corpus: int, chunks: Int64[np.ndarray, " n"]) -> tuple[Tensor, ...]:
        """What the context gate reads, the chunks themselves as the encoder under training gives them."""
        _, *context = super().chunk_inputs(corpus, chunks)
        image = self.corpora[corpus].memory.image
        return (self.trained.encode([image.chunk_text(int(chunk)) for chunk in chunks]), *context)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The encoder learns more slowly than what starts from nothing."""
        groups = super().optimizer_groups()
        encoder = {id(parameter) for parameter in self.transformer.parameters()}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in encoder]
        tuned = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        rate = self.settings.lora_rate if self.trained.kind == "lora" else self.settings.full_rate
        return [*groups, {"params": tuned, "weight_decay": 0.01, "lr": rate}]
