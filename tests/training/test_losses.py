"""The loss and the calibration error against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from treemem.training.losses import any_right, calibration_error
from treemem.training.measure import first_choices, fitted_scale


def test_any_right_is_the_share_that_all_right_ones_get() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [5.0, 1.0, 1.0]])
    right = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    shares = logits.softmax(1)
    expected = -((shares[0, 0] + shares[0, 2]).log() + shares[1, 1].log()) / 2
    torch.testing.assert_close(any_right(logits, right), expected)


def test_what_does_not_count_has_no_part() -> None:
    logits = torch.tensor([[1.0, 2.0, 30.0]], requires_grad=True)
    right, counts = torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]])
    loss = any_right(logits, right, counts)
    torch.testing.assert_close(loss, -torch.tensor([1.0, 2.0]).log_softmax(0)[0])
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 2] == 0


def test_nothing_right_is_no_loss() -> None:
    loss = any_right(torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()


def test_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.random(200_000)
    honest = rng.random(200_000) < confidences
    assert calibration_error(confidences, honest) < 0.01
    assert calibration_error(np.full(1000, 0.95), np.arange(1000) < 500) == pytest.approx(0.45)
    assert calibration_error(np.array([0.25, 1.0]), np.array([False, True])) == pytest.approx(0.125)
    assert calibration_error(np.empty(0), np.empty(0, bool)) == 0.0


def test_a_fitted_scale_makes_probabilities_honest() -> None:
    rng = np.random.default_rng(0)
    scores = np.where(rng.random((4000, 12)) < 0.1, -np.inf, rng.normal(0, 0.1, (4000, 12))).astype(np.float32)
    scores[0] = -np.inf  # a question that met nothing
    shares = np.exp(20.0 * scores)
    shares[1:] /= shares[1:].sum(1, keepdims=True)
    drawn = (shares.cumsum(1) < rng.random((4000, 1))).sum(1)
    right = drawn[:, None] == np.arange(12)
    assert calibration_error(*first_choices(scores, right, 100.0)) > 0.2
    fitted = fitted_scale([(scores[:2000], right[:2000]), (scores[2000:], right[2000:])], 100.0)
    assert fitted == pytest.approx(20, rel=0.25)
    assert calibration_error(*first_choices(scores, right, fitted)) < 0.04
    assert fitted_scale([(scores[:1], right[:1])], 3.0) == 3.0
