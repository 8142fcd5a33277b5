"""Metrics on logits: top-1, top-5, cross-entropy, 2^j-weighted ensemble, confusion matrix.

Logits are (n, classes) and labels int64 (n,); or, of tokens, (n, token, classes) and (n, token):
what is said of a sample is then the mean over its tokens, which all have the same weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOGIT_BYTES = 100 << 20
"""Most logits of tokens that are kept."""


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of labels that are among the k highest of any monotone scores. Ties count for the lower
    class index."""
    return float(hits(scores, labels, k).mean())


def hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Is a sample's label among the k highest? bool (n,); of tokens the share, float64 (n,)."""
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    found = (best == labels[..., None]).any(-1)
    return found if found.ndim == 1 else found.mean(1)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log softmax(logits)[label], in nats."""
    return float(losses(logits, labels).mean())


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
    top1: np.ndarray
    """As :func:`hits` has it."""
    top5: np.ndarray | None
    """None where there are no more than five classes."""
    logits: np.ndarray | None
    """float32; None where they are of tokens and too many to keep."""

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, samples: int) -> Judged:
        """Those of a batch, out of so many samples in all."""
        kept = labels.ndim == 1 or logits[0].nbytes * samples <= LOGIT_BYTES
        top5 = hits(logits, labels, 5) if logits.shape[-1] > 5 else None
        top1, loss = hits(logits, labels, 1), losses(logits, labels)
        return cls(loss, top1, top5, logits if kept else None)

    @classmethod
    def joined(cls, parts: Sequence[Judged]) -> Judged:
        """Several batches as one."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        joined: list[Any] = [None if c[0] is None else np.concatenate(c) for c in columns]
        return cls(*joined)

    def figures(self) -> dict[str, Any]:
        """Means: ``loss``, ``top1`` and ``top5``."""
        means = {name: getattr(self, name) for name in ("loss", "top1", "top5")}
        return {n: None if values is None else float(values.mean()) for n, values in means.items()}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64, in the shape of the logits."""
    wide = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return wide / wide.sum(-1, keepdims=True)


def ensemble(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Z = Σ_j 2^j z_j over layers j = 1 … J (paper Sec. 4), divided by Σ_j 2^j."""
    weights = 2.0 ** np.arange(1, len(scores) + 1)
    return np.tensordot(weights / weights.sum(), np.stack(scores).astype(np.float64), axes=1)


def accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """``top1``, and ``top5`` where there are more than five classes to choose from."""
    top5 = top_k(scores, labels, 5) if scores.shape[-1] > 5 else None
    return {"top1": top_k(scores, labels, 1), "top5": top5}


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes) counts; row = true class, column = predicted class."""
    classes = scores.shape[-1]
    pairs = labels * classes + scores.argmax(-1)
    return np.bincount(pairs.ravel(), minlength=classes * classes).reshape(classes, classes)
