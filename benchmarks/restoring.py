"""What a reader gives back of a text from its vectors alone: right vectors beside those of another text."""

from __future__ import annotations

import statistics

import torch
from common import arguments, save

from treemem.evaluation.metrics import token_f1
from treemem.hierarchy.context import joined
from treemem.hierarchy.embed import load_encoder
from treemem.hierarchy.generate import LocalModel, load_language_model
from treemem.hierarchy.reader import ReadingModel, generate_many, load_reader, reader_prompt
from treemem.hierarchy.readers import ReadReport, read
from treemem.training.examples import text_examples
from treemem.training.reader import INSTRUCTIONS


def main() -> None:
    """Give back the first window, and all windows, of held-out chunks."""
    parser = arguments(__doc__)
    parser.add_argument("--reader", required=True)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, default=2000)
    options = parser.parse_args()
    encoder = load_encoder("minilm")
    model = load_language_model("smollm2")
    reader = load_reader(options.reader)
    assert isinstance(model, LocalModel)
    assert reader is not None
    reading = ReadingModel(model, reader)
    documents = read([str(options.data / "prose" / "wiki-valid.jsonl.zst")], ReadReport())
    chosen = text_examples(documents, encoder, most=8 * options.texts)
    held = text_examples([], encoder)
    held.texts, held.follows = chosen.texts[::8], chosen.follows[::8]
    held.read(encoder)
    whole = [i for i, pieces in enumerate(held.pieces) if len(pieces) == 8]
    figures = {}
    samples = {}
    for count in (1, 8):
        ends = [held.pieces[i][count - 1][1] for i in whole]
        texts = [held.texts[i][:end] for i, end in zip(whole, ends, strict=True)]
        for name, shift in (("right", 0), ("another's", len(whole) // 2)):
            sources = [whole[(place + shift) % len(whole)] for place in range(len(whole))]
            given = [joined(held.parts(i, 0.5, 0)[:count], encoder.dimension) for i in sources]
            prompts = [reader_prompt(model, INSTRUCTIONS["restore"], (), len(own)) for own in given]
            said = generate_many(
                reading.model_for("vectors"), reading.projection, prompts, list(given), 20 * count, options.batch_tokens
            )
            f1 = [token_f1(reply, [text]) for reply, text in zip(said, texts, strict=True)]
            figures[f"{count} windows, {name} vectors"] = round(statistics.mean(f1), 4)
            samples[f"{count} windows, {name} vectors"] = [[texts[i], said[i]] for i in range(3)]
            print(count, name, figures[f"{count} windows, {name} vectors"], samples[f"{count} windows, {name} vectors"])
    device = torch.cuda.get_device_name() if model.model.device.type == "cuda" else "cpu"
    save("restoring", {"texts": len(whole), "device": device, "token F1": figures, "samples": samples}, options)


if __name__ == "__main__":
    main()
