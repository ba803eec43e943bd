"""Attribution: how much of each token of a reply comes from each part of what the model was given.

Two answers to that. Attention: the weights of the state that predicts a token, mean over heads and layers; it says
where a model looked (Jain and Wallace 2019 on why that explains less than it seems to). Gradient times input: the
derivative of the token's logarithm of probability along each input embedding (Simonyan et al. 2014; Shrikumar et al.
2017).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from treemem.errors import ModelError
from treemem.hierarchy.context import GatheredVectors
from treemem.hierarchy.generate import LocalModel
from treemem.hierarchy.reader import How, ReaderPrompt, ReadingModel
from treemem.types import Attribution, Source


def attribute(
    reading: ReadingModel,
    how: How,
    prompt: ReaderPrompt,
    given: GatheredVectors | None,
    ids: Sequence[int],
    *,
    gradients: bool = False,
) -> Attribution:
    """Attribute a reply to what its prompt was made of.

    Args:
        reading: what replied.
        how: in which way it read.
        prompt: of `reader_prompt`.
        given: the vectors in it, None where there are none.
        ids: the reply's tokens; end marks are left out.
        gradients: gradient times input too: one pass backward for each token, over the whole prompt.

    Raises ModelError where the model does not tell its attention, or fails.
    """
    model = reading.model_for(how)
    while ids and model.controls(ids[-1:]):
        ids = ids[:-1]
    pieces = tuple(model.tokenizer.decode([token]) for token in ids)
    text = model.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    sources, columns = _sources(prompt, given)
    columns = np.concatenate([columns, np.full(len(ids), len(sources) - 1)])  # the reply is the last source
    if not ids:
        return Attribution("", (), sources, (), () if gradients else None)
    embeds = reading.embedded(how, prompt, given).detach()
    try:
        found = {"attention": attention(model, embeds, ids)}
        if gradients:
            found["gradients"] = gradient_times_input(model, embeds, ids)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # of kinds without plain attention; out of memory
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"language model {model.name!r}: where it looked cannot be told ({reason})") from error
    shares = {}
    for name, places in found.items():
        folded = np.zeros((len(sources), len(ids)))
        np.add.at(folded, columns[: places.shape[1]], places.T.astype(np.float64))
        folded /= np.maximum(folded.sum(0), 1e-30)
        shares[name] = tuple(tuple(row) for row in folded.T.tolist())
    return Attribution(text.strip(), pieces, sources, shares["attention"], shares.get("gradients"))


def _sources(prompt: ReaderPrompt, given: GatheredVectors | None) -> tuple[tuple[Source, ...], Int64[np.ndarray, " n"]]:
    """What a prompt is made of, and to which of these each of its tokens belongs."""
    sources: list[Source] = []
    columns = np.empty(len(prompt.ids), np.int64)
    for segment in prompt.segments:
        places = slice(segment.begin, segment.end)
        if segment.kind == "vectors":
            assert given is not None
            columns[places] = np.arange(len(sources), len(sources) + len(given))
            parts = zip(given.levels.tolist(), given.elements.tolist(), given.places.tolist(), strict=True)
            sources += [Source("vectors", level, element, place) for level, element, place in parts]
            continue
        own = Source(segment.kind, number=segment.number or None)
        if own not in sources:
            sources.append(own)
        columns[places] = sources.index(own)
    return (*sources, Source("reply")), columns


def _with_reply(own: Any, embeds: Float[Tensor, "1 n width"], ids: Sequence[int]) -> Float[Tensor, "1 m width"]:
    """Prompt and reply as input embeddings; the last token is predicted, not read."""
    told = own.get_input_embeddings()(torch.tensor([list(ids[:-1])], dtype=torch.long, device=embeds.device))
    return torch.cat([embeds, told.to(embeds.dtype)], 1)


@contextmanager
def _telling(model: Any) -> Iterator[None]:
    """The model with attention that can be looked at; fused kernels do not give it away."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention(
    model: LocalModel, embeds: Float[Tensor, "1 n width"], ids: Sequence[int]
) -> Float32[np.ndarray, "tokens places"]:
    """Attention of the states that predict a reply's tokens, mean over heads and layers.

    Args:
        model: what replied.
        embeds: the prompt.
        ids: the reply's tokens, at least one.

    Returns:
        For each token the weights of the n places of the prompt, then of the tokens before it; rows sum to 1.

    Raises ModelError where the model does not tell it.
    """
    own = model.model
    with model.turn, torch.inference_mode():
        # Only the rows of the reply are looked at: the prompt before its last place is read with the fused kernel.
        past = None
        if embeds.shape[1] > 1:
            past = own(inputs_embeds=embeds[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        with _telling(own):
            given = own(
                inputs_embeds=_with_reply(own, embeds, ids)[:, embeds.shape[1] - 1 :],
                past_key_values=past,
                use_cache=True,
                output_attentions=True,
            )
    layers = [layer for layer in given.attentions or () if layer is not None]
    if not layers:
        raise ModelError(f"language model {model.name!r}: it does not tell its attention; ask another one")
    out = torch.zeros((len(ids), embeds.shape[1] + len(ids) - 1))
    for layer in layers:  # of sliding windows only the last places are there
        weights = layer[0].float().mean(0).cpu()
        out[:, out.shape[1] - weights.shape[1] :] += weights
    return (out / len(layers)).numpy()


def gradient_times_input(
    model: LocalModel, embeds: Float[Tensor, "1 n width"], ids: Sequence[int]
) -> Float32[np.ndarray, "tokens places"]:
    """How far the logarithm of each token's probability hangs on each input embedding.

    Args:
        model: what replied.
        embeds: the prompt.
        ids: the reply's tokens, at least one.

    Returns:
        For each token the absolute value of gradient times input, at the n places of the prompt and at the tokens
        before it.
    """
    own = model.model
    with model.turn, torch.enable_grad():
        inputs = _with_reply(own, embeds, ids).detach().clone().requires_grad_()
        logits = own(inputs_embeds=inputs, use_cache=False, logits_to_keep=len(ids)).logits[0]
        wanted = torch.tensor(list(ids), device=logits.device)
        logs = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        rows = []
        for number in range(len(ids)):
            (gradient,) = torch.autograd.grad(logs[number], inputs, retain_graph=number + 1 < len(ids))
            rows.append((gradient[0].float() * inputs[0].detach().float()).sum(-1).abs().cpu())
    return torch.stack(rows).numpy()
