"""Metrics on logits: top-1, top-5, cross-entropy, mean average precision, R²; 2^j-weighted
ensemble, confusion matrix.

Logits are (n, classes) and labels int64 (n,); or, of tokens, (n, token, classes) and (n, token):
what is said of a sample is then the mean over its tokens, which all have the same weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOGIT_BYTES = 100 << 20
"""Most logits of tokens that are kept."""
NAMES = {"top1": "top-1", "top5": "top-5", "map": "mAP", "r2": "R²", "rmse": "RMSE", "loss": "loss"}
"""Figures that tell how good logits are, and what people call them."""
SHARES = ("top1", "top5", "map")
"""Figures that people read in percent."""
CHIEF = ("top1", "map", "r2", "loss")
"""Of these the first that is there stands for all: what is shown where there is room for one."""


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of labels that are among the k highest of any monotone scores. Ties count for the lower
    class index."""
    return float(hits(scores, labels, k).mean())


def hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Is a sample's label among the k highest? bool (n,); of tokens the share, float64 (n,)."""
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    found = (best == labels[..., None]).any(-1)
    return found if found.ndim == 1 else found.mean(1)


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[label] of every sample, in nats, float64 (n,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    log_sum = np.log(np.exp(wide).sum(-1))
    found = log_sum - np.take_along_axis(wide, labels[..., None], -1)[..., 0]
    return found if found.ndim == 1 else found.mean(1)


@dataclass(frozen=True)
class Judged:
    """How good logits are, sample by sample."""

    loss: np.ndarray
    """float64 (n,), in nats."""
    top1: np.ndarray | None
    """What :func:`hits` says; None where labels are no classes."""
    top5: np.ndarray | None
    """None where there are no more than five classes."""
    logits: np.ndarray | None
    """float32; None where they are of tokens and too many to keep."""

    @classmethod
    def of(
        cls, logits: np.ndarray, labels: np.ndarray, samples: int, loss: np.ndarray | None = None
    ) -> Judged:
        """Those of a batch, out of so many samples in all; ``loss`` if it is no cross-entropy."""
        loss = losses(logits, labels) if loss is None else loss
        if labels.dtype.kind == "f":
            return cls(loss, None, None, logits)
        kept = labels.ndim == 1 or logits[0].nbytes * samples <= LOGIT_BYTES
        top5 = hits(logits, labels, 5) if logits.shape[-1] > 5 else None
        return cls(loss, hits(logits, labels, 1), top5, logits if kept else None)

    @classmethod
    def joined(cls, parts: Sequence[Judged]) -> Judged:
        """Several batches as one."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        joined: list[Any] = [None if c[0] is None else np.concatenate(c) for c in columns]
        return cls(*joined)

    def figures(self, loss: str, labels: np.ndarray) -> dict[str, Any]:
        """Means: ``loss``, ``top1`` and ``top5``; and what else :func:`metrics` has."""
        means = {name: getattr(self, name) for name in ("loss", "top1", "top5")}
        found = {n: None if own is None else float(own.mean()) for n, own in means.items()}
        if self.top1 is not None or self.logits is None:
            return found
        return metrics(loss, self.logits, labels) | found


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, in the shape of the logits."""
    wide = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return wide / wide.sum(-1, keepdims=True)


def ensemble(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Z = Σ_j 2^j z_j over layers j = 1 … J (paper Sec. 4), divided by Σ_j 2^j."""
    weights = 2.0 ** np.arange(1, len(scores) + 1)
    return np.tensordot(weights / weights.sum(), np.stack(scores).astype(np.float64), axes=1)


def metrics(loss: str, scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """The metrics that belong to a loss (``cross-entropy``, ``bce``, ``mse``, ``own``) and to
    labels: those of :func:`accuracies`, None where labels are no classes, then with ``map``, mean
    average precision, or ``r2`` and ``rmse``. Scores are (n, classes), monotone or, of ``mse``, the
    numbers that are predicted."""
    if labels.dtype.kind != "f":
        return accuracies(scores, labels)
    more = {"bce": mean_average_precision, "mse": regression}.get(loss)
    found: dict[str, float | None] = {"top1": None, "top5": None}
    if more is None or not np.isfinite(scores).all():
        return found
    return found | more(scores, labels.reshape(scores.shape))


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """``map``: the mean of the average precision over the classes that a sample has, a label of 0.5
    being one; None if there are none. Average precision is scikit-learn's, not interpolated."""
    from sklearn.metrics import average_precision_score

    pairs = zip(labels.T >= 0.5, scores.T, strict=True)
    found = [average_precision_score(has, of) for has, of in pairs if has.any()]
    return {"map": float(np.mean(found)) if found else None}


def regression(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """``rmse``, the root of the mean squared error over all outputs, and ``r2``, the mean over the
    outputs of 1 - squared error / squared deviation of the labels; None if none of them varies."""
    wide = labels.astype(np.float64)
    errors = np.square(scores - wide).sum(0)
    spread = np.square(wide - wide.mean(0)).sum(0)
    varies = spread > 0
    r2 = float(np.mean(1 - errors[varies] / spread[varies])) if varies.any() else None
    return {"r2": r2, "rmse": float(np.sqrt(errors.sum() / labels.size))}


def probabilities(loss: str, logits: np.ndarray) -> np.ndarray:
    """What a loss takes logits for, float64 in their shape: softmax; of ``bce`` the sigmoid of
    each; of ``mse`` the numbers themselves."""
    if loss == "bce":
        return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return logits.astype(np.float64) if loss == "mse" else softmax(logits)


def metrics_in(every: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics that tables show: both of class labels, those that are there of others,
    and always the chief one first, if it is not the loss."""
    there = {name for found in every for name, value in found.items() if value is not None}
    if "top1" in there:
        return ["top1", "top5"]
    return [name for name in NAMES if name in there - {"loss"}]


def chief(found: Mapping[str, Any]) -> str:
    """The name of the figure that stands for all; see :data:`CHIEF`."""
    return next((name for name in CHIEF if found.get(name) is not None), "loss")


def rank(found: Mapping[str, Any]) -> float:
    """By how much one is better: the chief figure; the loss counts downwards."""
    name = chief(found)
    return -found[name] if name == "loss" else found[name]


def figure(name: str, value: float | None) -> str:
    """A figure for people: shares in percent; empty where there is none."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if name in SHARES else f"{value:.4f}"


def said(found: Mapping[str, Any]) -> str:
    """The chief figure for people, by its name if it is no top-1: ``93.27 %``, ``mAP 71.20 %``."""
    name = chief(found)
    text = figure(name, found.get(name))
    return text if name == "top1" else f"{NAMES[name]} {text}"


def accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """``top1``, and ``top5`` where there are more than five classes to choose from."""
    top5 = top_k(scores, labels, 5) if scores.shape[-1] > 5 else None
    return {"top1": top_k(scores, labels, 1), "top5": top5}


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes) counts; row = true class, column = predicted class."""
    classes = scores.shape[-1]
    pairs = labels * classes + scores.argmax(-1)
    return np.bincount(pairs.ravel(), minlength=classes * classes).reshape(classes, classes)
