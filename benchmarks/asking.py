"""Time to first token and tokens per second of `ask`'s generation beside transformers' own `generate`, same prompt."""

from __future__ import annotations

import statistics
import threading
import time

import torch
from common import arguments, save
from transformers import TextIteratorStreamer

from treemem.hierarchy.generate import Decoding, LocalModel, load_language_model
from treemem.hierarchy.prompt import Message

TEXT = "The quick brown fox jumps over the lazy dog while the river runs past the old mill. "


def own(model: LocalModel, messages: list[Message], tokens: int) -> tuple[float, float]:
    """Seconds to the first piece, and pieces' tokens per second after it."""
    begin = time.perf_counter()
    first = 0.0
    text = ""
    for piece in model.stream(messages, tokens):
        first = first or time.perf_counter() - begin
        text += piece
    rest = time.perf_counter() - begin - first
    return first, (model.count_tokens(text) - 1) / rest


def plain(model: LocalModel, messages: list[Message], tokens: int) -> tuple[float, float]:
    """The same through transformers' generate and its streamer, in a thread as its documentation does."""
    ids = torch.tensor([model.prompt_ids(messages)], device=model.model.device)
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True)
    begin = time.perf_counter()
    thread = threading.Thread(
        target=model.model.generate,
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": tokens,
                "do_sample": False, "streamer": streamer, "pad_token_id": model.tokenizer.eos_token_id},
    )  # fmt: skip
    thread.start()
    first = 0.0
    text = ""
    for piece in streamer:
        if piece and not first:
            first = time.perf_counter() - begin
        text += piece
    rest = time.perf_counter() - begin - first
    thread.join()
    return first, (model.count_tokens(text) - 1) / rest


def main() -> None:
    """Alternate both, report medians."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--name", default="asking", help="of the result")
    options = parser.parse_args()
    model = load_language_model("smollm2", decoding=Decoding())
    assert isinstance(model, LocalModel)
    rows = {}
    for words in (200, 1200):
        prompt = (TEXT * 100).split()[:words]
        messages = [Message("user", " ".join(prompt) + "\nTell a long story about the fox.")]
        results: dict[str, list[tuple[float, float]]] = {"treemem": [], "generate": []}
        own(model, messages, 4), plain(model, messages, 4)
        for _ in range(options.rounds):
            results["treemem"].append(own(model, messages, options.tokens))
            results["generate"].append(plain(model, messages, options.tokens))
        rows[f"{len(model.prompt_ids(messages))} prompt tokens"] = {
            name: {
                "first_token_s": round(statistics.median(first for first, _ in values), 3),
                "tokens_per_s": round(statistics.median(rate for _, rate in values), 2),
            }
            for name, values in results.items()
        }
        print(rows, flush=True)
    device = torch.cuda.get_device_name() if model.model.device.type == "cuda" else "cpu"
    save(options.name, {"model": model.name, "device": device, "rows": rows}, options)


if __name__ == "__main__":
    main()
