"""Chunks per second of a whole build beside sentence-transformers' `encode` alone on the same chunks."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import arguments, peak_gb, save

from treemem import Memory
from treemem.hierarchy.embed import load_encoder


def main() -> None:
    """Alternate builds and plain encoding, report the median ratio of neighbours."""
    parser = arguments(__doc__)
    parser.add_argument("--set", default="scifact")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--name", default="building", help="of the result")
    options = parser.parse_args()
    from itertools import islice

    from treemem.hierarchy.readers import ReadReport, read

    corpus = [str(options.data / options.set / "corpus.jsonl.zst")]
    documents = list(islice(read(corpus, ReadReport()), options.documents))
    encoder = load_encoder()
    device = encoder.model.device.type
    encoder.encode(["warm up"] * 8)
    rounds = []
    for _ in range(options.rounds):
        scratch = Path(tempfile.mkdtemp())
        begin = time.perf_counter()
        memory = Memory.build(documents, scratch / "memory", encoder=encoder)
        whole = time.perf_counter() - begin
        texts = [memory.image.chunk_text(chunk) for chunk in range(memory.image.chunks)]
        begin = time.perf_counter()
        encoder.model.encode(texts, batch_size=32, show_progress_bar=False)
        single = time.perf_counter() - begin
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=encoder.precision == "bfloat16"):
            encoder.model.encode(texts, batch_size=32, show_progress_bar=False)
        same = time.perf_counter() - begin
        shutil.rmtree(scratch)
        rounds.append({
            "build": len(texts) / whole,
            "encode float32": len(texts) / single,
            f"encode {encoder.precision}": len(texts) / same,
            "ratio to encode as it comes": single / whole,
            "ratio to encode in the same precision": same / whole,
        })  # fmt: skip
        print(rounds[-1], flush=True)
    medians = {key: round(statistics.median(r[key] for r in rounds), 3) for key in rounds[0]}
    own = {}
    if device != "cpu":  # what is computed there must be what a CPU computes
        some = texts[:: max(1, len(texts) // 512)]
        given = encoder.encode(some)
        other = load_encoder(device="cpu").encode(some)
        own = {
            "device": torch.cuda.get_device_name(),
            "largest difference from the CPU": round(float(abs(given - other).max()), 5),
            "least cosine with the CPU's": round(float((given * other).sum(1).min()), 6),
        }
    save(
        options.name,
        {
            **own,
            "set": options.set, "documents": len(documents), "chunks": len(texts), "precision": encoder.precision,
            "unit": "chunks per second, ratios of the whole build's", "median": medians, "rounds": rounds,
            "peak_gb": peak_gb(),
        },
        options,
    )  # fmt: skip


if __name__ == "__main__":
    main()
