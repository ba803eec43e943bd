"""Write an encoder that is MiniLM without its layers: with it, large memories to time are built in minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch.nn import ModuleList

from treemem.hierarchy.embed import load_encoder


def main() -> None:
    """Keep the token embeddings and the mean of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="gets the encoder: treemem build MEMORY PATH… --encoder FOLDER")
    parser.add_argument("--layers", type=int, default=0, help="how many layers it keeps")
    options = parser.parse_args()
    model = load_encoder().model
    bert: Any = model[0].auto_model
    bert.encoder.layer = ModuleList(bert.encoder.layer[: options.layers])
    bert.config.num_hidden_layers = options.layers
    model.save_pretrained(str(options.folder))
    print(f"written: {options.folder}")


if __name__ == "__main__":
    main()
