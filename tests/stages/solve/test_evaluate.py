"""Metrics against scikit-learn and the paper's ensemble rule."""

import numpy as np
import pytest
from sklearn import metrics

from strata.stages.solve import evaluate

RNG = np.random.default_rng(0)
LOGITS = [RNG.normal(size=(300, 10)).astype(np.float32) for _ in range(3)]
LABELS = RNG.integers(0, 10, 300)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_scikit_learns(k: int) -> None:
    expected = metrics.top_k_accuracy_score(LABELS, LOGITS[0], k=k)
    assert evaluate.top_k(LOGITS[0], LABELS, k) == pytest.approx(float(expected))


def test_cross_entropy_is_scikit_learns() -> None:
    expected = metrics.log_loss(LABELS, evaluate.softmax(LOGITS[0]))
    assert evaluate.losses(LOGITS[0], LABELS).mean() == pytest.approx(float(expected))


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    assert np.isfinite(evaluate.losses(LOGITS[0] * 1e4, LABELS)).all()


def test_confusion_is_scikit_learns() -> None:
    expected = metrics.confusion_matrix(LABELS, LOGITS[0].argmax(1))
    np.testing.assert_array_equal(evaluate.confusion(LOGITS[0], LABELS), expected)


def test_ensemble_weighs_layer_j_by_two_to_the_j() -> None:
    """Z = Σ_j 2^j z_j (Sec. 4): weights 2, 4, 8, here divided by their sum."""
    z1, z2, z3 = (z.astype(np.float64) for z in LOGITS)
    expected = (2 * z1 + 4 * z2 + 8 * z3) / 14
    np.testing.assert_allclose(evaluate.ensemble(LOGITS), expected, rtol=1e-6)


def test_top5_is_left_out_where_it_says_nothing() -> None:
    assert evaluate.accuracies(LOGITS[0][:, :5], LABELS % 5)["top5"] is None
    assert evaluate.accuracies(LOGITS[0], LABELS)["top5"] is not None
