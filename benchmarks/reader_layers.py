"""How much the means of 16 token states tell of the words, by the layer of encoder 1 that they are taken from.

A ridge regression predicts the language model's token embeddings of a window, summed up, from the window's vector; what
is predicted is compared with every token of the vocabulary.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from common import arguments, save

from treemem.hierarchy import embed
from treemem.hierarchy.generate import LocalModel, load_language_model
from treemem.hierarchy.readers import ReadReport, read
from treemem.training.examples import Examples, text_examples

LOOKED_AT = 32
"""The tokens nearest to what is predicted: a window has some 20."""
RIDGE = 1e-2


def main() -> None:
    """Fit on some windows, judge on windows of other articles, for every layer."""
    parser = arguments(__doc__)
    parser.add_argument("--fitted", type=int, default=1600, help="chunks to fit on")
    parser.add_argument("--judged", type=int, default=300, help="chunks to judge by")
    options = parser.parse_args()
    encoder = embed.load_encoder("minilm")
    model = load_language_model("smollm2")
    assert isinstance(model, LocalModel)
    table = model.model.get_input_embeddings().weight.detach().float()
    table = table - table.mean(0)
    sets: list[Examples] = []
    for name, most in (("wiki-00", options.fitted), ("wiki-valid", options.judged)):
        documents = read([str(options.data / "prose" / f"{name}.jsonl.zst")], ReadReport())
        sets.append(text_examples(islice(documents, most), encoder, most=most))
    layers = encoder.model[0].auto_model.config.num_hidden_layers
    figures = {}
    for layer in range(layers + 1):
        embed.READER_LAYER = layer  # type: ignore[misc]
        given, wanted, tokens = [], [], []
        for own in sets:
            own.read(encoder)
            texts = [text[a:b] for text, pieces in zip(own.texts, own.pieces, strict=True) for a, b in pieces]
            ids = [torch.tensor(window) for window in model.encode_many(texts)]
            vectors = torch.from_numpy(np.asarray(own.windows)).float()
            given.append(torch.nn.functional.normalize(vectors, dim=1))
            wanted.append(torch.stack([table[window].sum(0) for window in ids]))
            tokens.append(ids)
        middle, usual = given[0].mean(0), wanted[0].mean(0)
        inputs = given[0] - middle
        gram = inputs.T @ inputs
        gram += torch.eye(len(gram)) * gram.trace() / len(gram) * RIDGE
        fitted = torch.linalg.solve(gram, inputs.T @ (wanted[0] - usual))
        predicted = (given[1] - middle) @ fitted
        cosine = torch.nn.functional.cosine_similarity(predicted, wanted[1] - usual, dim=1).mean()
        # The directions in which all sums vary tell little: they count less, by the inverse of their covariance.
        rest = wanted[0] - usual
        spread = rest.T @ rest / len(rest)
        spread += torch.eye(len(spread)) * spread.trace() / len(spread) * RIDGE
        nearest = (predicted @ torch.linalg.solve(spread, table.T)).topk(LOOKED_AT, dim=1).indices
        found = [torch.isin(own.unique(), near).float().mean() for own, near in zip(tokens[1], nearest, strict=True)]
        figures[f"layer {layer}"] = {
            "cosine": round(float(cosine), 4),
            f"share of tokens among {LOOKED_AT}": round(float(torch.stack(found).mean()), 4),
        }
        print(layer, figures[f"layer {layer}"], flush=True)
    windows = {"fitted": len(given[0]), "judged": len(given[1])}
    save("reader_layers", {"windows": windows, "layers": figures}, options)


if __name__ == "__main__":
    main()
