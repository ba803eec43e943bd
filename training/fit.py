"""Training what ranks a question's last candidates, on several sets of questions in turn: the decoder and level 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from treemem.errors import InputError
from treemem.types import Progress, no_progress


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """For how long, and with how much at a time."""

    steps: int = 800
    batch: int
    """Questions a step, all of one set."""
    rate: float = 2e-3
    """Highest learning rate, of one cycle."""
    weight_decay: float
    """Of matrices."""
    balance: float = 0.5
    """A set of n questions is drawn in proportion to n ** balance."""
    seed: int = 0


def fit(
    module: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    sets: Sequence[tuple[Bool[Tensor, "n k"], Bool[Tensor, "n k"]]],
    loss: Callable[[int, Int64[Tensor, " b"]], Float[Tensor, ""]],
    config: FitConfig,
    what: str,
    progress: Progress = no_progress,
) -> list[float]:
    """Train a module in place by AdamW on the questions that have both right and wrong candidates.

    The same seed, sets, module and number of threads give the same weights.

    Args:
        module: it is left in the mode for use.
        groups: of its parameters, as the optimizer takes them; `lr` in place of the configuration's.
        sets: of each, which candidates of its questions are right, and which places hold a candidate.
        loss: of some questions (rows) of a set (its number).
        config: how.
        what: is trained, for messages.
        progress: told about steps.

    Returns:
        The loss of each step.

    Raises:
        InputError: there are no such questions.
    """
    used = []
    for number, (right, present) in enumerate(sets):
        rows = torch.nonzero(right.any(1) & (present & ~right).any(1))[:, 0].numpy()
        if len(rows):
            used.append((number, rows))
    if not used:
        raise InputError(f"no question has both right and wrong candidates: there is nothing to train {what} on")
    shares = np.array([len(rows) ** config.balance for _, rows in used])
    optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=config.rate)
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=config.steps)
    draw = np.random.default_rng(config.seed)
    losses = []
    module.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # of dropout
        for step in range(config.steps):
            number, rows = used[draw.choice(len(used), p=shares / shares.sum())]
            chosen = torch.from_numpy(draw.choice(rows, min(config.batch, len(rows)), replace=False))
            value = loss(number, chosen)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            cycle.step()
            losses.append(value.item())
            progress(f"training {what}", step + 1, config.steps)
    module.eval()
    return losses


def hit_rates(ranked: Iterable[tuple[Float[Tensor, "b k"], Bool[Tensor, "b k"]]], ks: Iterable[int]) -> list[float]:
    """hit@k of questions from the scores of their candidates (-inf where there is none) and which are right."""
    found = []
    for scores, right in ranked:
        ordered = right.gather(1, scores.argsort(dim=1, descending=True, stable=True))
        found.append(torch.stack([ordered[:, :k].any(1) for k in ks], 1))
    means: list[float] = torch.cat(found).double().mean(0).tolist()
    return means


def reciprocal_rank(ranked: Iterable[tuple[Float[Tensor, "b k"], Bool[Tensor, "b k"]]]) -> float:
    """MRR@10 of the same."""
    found = hit_rates(ranked, range(1, 11))
    # A right chunk first at rank k counts 1/k: the steps of hit@k, weighed by it.
    return float(sum((now - before) / k for k, now, before in zip(range(1, 11), found, (0.0, *found), strict=False)))
