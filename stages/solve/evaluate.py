"""Metrics on logits: top-1, top-5, cross-entropy, 2^j-weighted ensemble, confusion matrix."""

from collections.abc import Sequence

import numpy as np


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of samples whose label, int64 (n,), is among the k highest of any monotone scores,
    (n, classes). Ties count for the lower class index."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log softmax(logits)[label], in nats."""
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    log_sum = np.log(np.exp(wide).sum(1))
    return float((log_sum - wide[np.arange(len(labels)), labels]).mean())


def softmax(logits: np.ndarray) -> np.ndarray:
    """(n, classes) probabilities, float64."""
    wide = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return wide / wide.sum(1, keepdims=True)


def ensemble(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Z = Σ_j 2^j z_j over layers j = 1 … J (paper Sec. 4), divided by Σ_j 2^j."""
    weights = 2.0 ** np.arange(1, len(scores) + 1)
    return np.tensordot(weights / weights.sum(), np.stack(scores).astype(np.float64), axes=1)


def accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """``top1``, and ``top5`` where there are more than five classes to choose from."""
    top5 = top_k(scores, labels, 5) if scores.shape[1] > 5 else None
    return {"top1": top_k(scores, labels, 1), "top5": top5}


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes) counts; row = true class, column = predicted class."""
    classes = scores.shape[1]
    pairs = labels * classes + scores.argmax(1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
