"""How good iterates of one auxiliary problem are, several of them on one read of the features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from strata.pipeline.feed.problem_feed import ProblemFeed, clean_batches
from strata.pipeline.plan.costs import RISK_ROWS
from strata.pipeline.run.session import Session
from strata.stages.solve.evaluate import cross_entropy
from strata.stages.solve.solve import logits_of
from strata.store.read.order import generator


def logits_on_test(session: Session, j: int, problems: Sequence[nn.Module]) -> list[np.ndarray]:
    """z_j of the test images, float32 (n, classes), of every problem."""
    parts: list[list[np.ndarray]] = [[] for _ in problems]
    for x in clean_batches(session, j - 1):
        _judge(session, x, problems, parts)
    return [np.concatenate(own) for own in parts]


def labels_of_test(session: Session) -> np.ndarray:
    """int64 (n,)"""
    return session.images()["test"].array("labels")


def risks(session: Session, feed: ProblemFeed, problems: Sequence[nn.Module]) -> list[float]:
    """Empirical risk of the present iterates on a fixed part of the un-augmented training set."""
    rows = generator("risk rows", session.run.seed).permutation(len(feed.ids))[:RISK_ROWS]
    parts: list[list[np.ndarray]] = [[] for _ in problems]
    labels = []
    for x, y in feed.fixed(np.sort(rows)):
        _judge(session, x, problems, parts)
        labels.append(y.cpu().numpy())
    return [cross_entropy(np.concatenate(own), np.concatenate(labels)) for own in parts]


def _judge(
    session: Session, x: Tensor, problems: Sequence[nn.Module], parts: list[list[np.ndarray]]
) -> None:
    for own, problem in zip(parts, problems, strict=True):
        own.append(logits_of(problem, [x], session.device, session.compute).numpy())
