"""What all runs of Lightning share."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch

from treemem.errors import InputError


def accelerator(device: str) -> dict[str, Any]:
    """Options of `lightning.Trainer` for a device: `auto`, `cpu` or `cuda`; bfloat16 where a GPU has it.

    Raises InputError for others, and where there is no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device = {device!r}: it must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda': torch finds no CUDA device here; use auto or cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return {"accelerator": "cpu", "devices": 1}
    return {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed" if torch.cuda.is_bf16_supported() else 32}


def fit(trainer: lightning.Trainer, *args: Any, **options: Any) -> None:
    """`trainer.fit`, which ends by SystemExit on Ctrl-C and leaves the next Ctrl-C without effect; this does neither.

    Raises KeyboardInterrupt where it was interrupted.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    try:
        trainer.fit(*args, **options)
    except SystemExit:
        if not trainer.interrupted:
            raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
    if trainer.interrupted:
        raise KeyboardInterrupt


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's advice is for those who write modules, not for those who run this."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero_level = rank_zero.level
    rank_zero.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
        rank_zero.setLevel(rank_zero_level)
