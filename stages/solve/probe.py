"""Linear separability of features that do not change (paper Sec. 4.2): one class against the rest.

    s_c(x) = w_c · (A x - μ) / σ + b_c            the class of x is argmax_c s_c(x)
    (w_c, b_c) = argmin |w|² / 2 + C Σ_n log(1 + exp(-y_n s_c(x_n))),  y_n = 1 for class c, else -1

A averages over the four spatial quadrants, as in an auxiliary classifier. μ and σ are those of the
training rows, so that C means the same at every depth. The fits are scikit-learn's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from strata.stages.errors import DataError

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C that are tried, the strongest regularisation first."""
HELD_OUT = 5
"""One in so many training rows of each class is held out to choose C, and at least one."""
MOST_ITERATIONS = 200
"""Bound on L-BFGS, per class and C; a fit that would take more is said not to have converged."""
BLOCK = 4096
"""Rows that are standardised or judged at a time."""

_Tick = Callable[[int], None]


def bytes_of_fit(rows: int, columns: int) -> int:
    """Most that a fit holds: the rows in float64, and what is as long as they are: labels, scores
    and L-BFGS's intermediate vectors."""
    return 8 * rows * (columns + 16)


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of pooled features."""

    classes: np.ndarray
    """int64 (k,): labels that there were to learn, ascending."""
    weight: np.ndarray
    """float64 (k, columns)"""
    bias: np.ndarray
    """float64 (k,)"""
    mean: np.ndarray
    """float64 (columns,): μ"""
    scale: np.ndarray
    """float64 (columns,): σ, 1 where a column does not vary."""

    def predict(self, features: np.ndarray) -> np.ndarray:
        """int64 (n,) labels of pooled features (n, columns)."""
        scores = (features - self.mean) / self.scale @ self.weight.T + self.bias
        return self.classes[scores.argmax(1)]


def split(labels: np.ndarray, shuffled: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows so ordered that those to fit on come first and those held out last, and how many the
    first are.

    Of each class the first fifth in ``shuffled``, a permutation of the rows, is held out, at least
    one row where there are two. Raises DataError where no class has two.
    """
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = shuffled[labels[shuffled] == label]
        held[own[: max(len(own) // HELD_OUT, int(len(own) > 1))]] = True
    if not held.any():
        raise DataError("every class has a single training image: none can be held out to choose C")
    return np.concatenate([np.flatnonzero(~held), np.flatnonzero(held)]), int((~held).sum())


def fit(
    rows: np.ndarray, labels: np.ndarray, fitted_on: int, tick: _Tick
) -> tuple[LinearProbe, dict[str, Any]]:
    """Choose C by the accuracy on rows held out, the smaller of two as good, and fit all rows.

    Args:
        rows: float64 (n, columns), pooled; standardised in place, so that they are held once.
        labels: int64 (n,)
        fitted_on: the first so many rows are fitted when C is chosen; the others are held out.
        tick: called after every fit of one class, with 1; may raise to stop.

    Returns:
        The probe, and how it came about: ``train``, its ``top1`` on all rows, ``regularisation``,
        the C that was chosen, ``held_out``, the accuracy on the rows held out by C, and
        ``converged``: did every fit with that C end before :data:`MOST_ITERATIONS`?

    Raises:
        DataError: there are fewer than two classes.
    """
    if len(classes := np.unique(labels)) < 2:
        raise DataError("the training images are all of one class: there is nothing to tell apart")
    mean, scale = _standardise(rows)
    with warnings.catch_warnings():
        from sklearn.exceptions import ConvergenceWarning

        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the result
        held_out, fits = {}, _fits(len(classes))
        for c in GRID:
            part, _ = _one_against_rest(fits, c, rows[:fitted_on], labels[:fitted_on], tick)
            held_out[c] = _accuracy(part, rows[fitted_on:], labels[fitted_on:])
        best = max(GRID, key=lambda c: (held_out[c], -c))
        whole, most = _one_against_rest(_fits(len(classes)), best, rows, labels, tick)
    return replace(whole, mean=mean, scale=scale), {
        "train": {"top1": _accuracy(whole, rows, labels)},
        "regularisation": best,
        "held_out": {f"{c:g}": accuracy for c, accuracy in held_out.items()},
        "converged": most < MOST_ITERATIONS,
    }


def fits_of(classes: int) -> int:
    """How often :func:`fit` ticks."""
    return classes * (len(GRID) + 1)


def _standardise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In place, a block at a time; returns μ and σ."""
    from sklearn.preprocessing import StandardScaler

    scaler: Any = StandardScaler(copy=False)
    blocks = [rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK)]
    for block in blocks:
        scaler.partial_fit(block)
    for block in blocks:
        block[:] = scaler.transform(block)
    return scaler.mean_, scaler.scale_


def _fits(classes: int) -> list[Any]:
    """One per class; each begins where it ended with a smaller C."""
    from sklearn.linear_model import LogisticRegression

    return [LogisticRegression(warm_start=True, max_iter=MOST_ITERATIONS) for _ in range(classes)]


def _one_against_rest(
    fits: list[Any], c: float, rows: np.ndarray, labels: np.ndarray, tick: _Tick
) -> tuple[LinearProbe, int]:
    """A probe of standardised rows, and the most iterations that one of the fits took."""
    classes = np.unique(labels)
    for label, one in zip(classes, fits, strict=True):
        one.set_params(C=c).fit(rows, labels == label)
        tick(1)
    weight = np.concatenate([one.coef_ for one in fits])
    bias = np.concatenate([one.intercept_ for one in fits])
    most = max(int(one.n_iter_.max()) for one in fits)
    return LinearProbe(classes, weight, bias, np.zeros(()), np.ones(())), most


def _accuracy(probe: LinearProbe, rows: np.ndarray, labels: np.ndarray) -> float:
    right = 0
    for first in range(0, len(rows), BLOCK):
        part = slice(first, first + BLOCK)
        right += int((probe.predict(rows[part]) == labels[part]).sum())
    return right / len(rows)
