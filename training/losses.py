"""What is minimised, and what is measured of probabilities."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def any_right(
    logits: Float[Tensor, "questions elements"],
    right: Bool[Tensor, "questions elements"],
    counts: Bool[Tensor, "questions elements"] | None = None,
) -> Float[Tensor, ""]:
    """Softmax cross-entropy with several right answers: minus the logarithm of the share that all right ones get.

    So a question about a whole document is free to choose which of its chunks it is about.

    Args:
        logits: scores.
        right: which elements are right; questions without any are left out.
        counts: which elements are looked at, all if None.

    Returns:
        The mean over the questions, 0 where none has a right element.
    """
    if counts is not None:
        logits = logits.masked_fill(~counts, -torch.inf)
        right = right & counts
    some = right.any(1)
    logits, right = logits[some], right[some]
    if len(logits) == 0:
        return logits.sum()
    return (logits.logsumexp(1) - logits.masked_fill(~right, -torch.inf).logsumexp(1)).mean()


def calibration_error(confidences: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3).

    Args:
        confidences: what probability was given to the first choice, 0 to 1.
        right: whether it was right.
        bins: of equal width.
    """
    if len(confidences) == 0:
        return 0.0
    places = np.minimum((confidences * bins).astype(int), bins - 1)
    error = 0.0
    for place in range(bins):
        own = places == place
        if own.any():
            error += own.mean() * abs(float(right[own].mean()) - float(confidences[own].mean()))
    return float(error)
