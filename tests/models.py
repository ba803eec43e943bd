"""Tiny language models of random weights, of several kinds, with tokenizers made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from treemem.hierarchy.generate import Decoding, LocalModel

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KINDS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}


def tiny_tokenizer(texts: Sequence[str] = (), size: int = 260) -> Any:
    """Bytes, and the pieces of words that are common in the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    start, end = SPECIAL[1:]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, pad_token=end, unk_token=SPECIAL[0]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def tiny_model(
    kind: str = "llama",
    texts: tuple[str, ...] = (),
    *,
    vocabulary: int = 260,
    width: int = 32,
    layers: int = 2,
    context: int = 1024,
    spread: float = 0.5,
    seed: int = 0,
) -> LocalModel:
    """A random model, made once.

    Args:
        kind: of `KINDS`.
        texts: its tokenizer knows their words.
        vocabulary: most tokens.
        width: of the states.
        layers: how many.
        context: most tokens of prompt and reply.
        spread: of the weights; wide enough for replies that vary.
        seed: of the weights.
    """
    import torch
    import transformers

    tokenizer = tiny_tokenizer(texts, vocabulary)
    made, model = (getattr(transformers, name) for name in KINDS[kind])
    config = made(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=context,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
        initializer_range=spread,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    weights = model(config).eval()
    torch.random.set_rng_state(state)
    return LocalModel(f"tiny {kind}", weights, tokenizer, decoding=Decoding())


def saved_model(folder: Path, texts: tuple[str, ...] = ()) -> Path:
    """A tiny language model in a folder, as others would have theirs on their disk."""
    model = tiny_model("llama", texts, vocabulary=500, context=4096)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder
