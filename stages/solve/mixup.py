"""Mixup of features (Zhang et al. 2018; Verma et al. 2019): x_a ← λ x_a + (1 - λ) x_b, b another
sample of the same (micro-)batch; the loss is λ of that with y_a, and 1 - λ of that with y_b."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from strata.stages.errors import DataError
from strata.stages.solve.ranks import Ranks


def mixed(
    x: Tensor, y: Tensor, alpha: float, draw: np.random.Generator, ranks: Ranks
) -> tuple[Tensor, Tensor, float]:
    """Mixtures of a (micro-)batch: x in its dtype and layout, the labels y_b, and λ.

    Args:
        x: float (B, …), this rank's part.
        y: its labels, (B, …), on the same device.
        alpha: λ is from Beta(α, α).
        draw: says λ and who is mixed with whom, over all ranks; in the same state on each.

    Raises DataError: x is integers, such as tokens.
    """
    if not x.is_floating_point():
        raise DataError(f"'schedule.mixup' mixes numbers, and the rows here are {x.dtype} tokens")
    share, own = float(draw.beta(alpha, alpha)), len(y)
    order = torch.from_numpy(draw.permutation(own * ranks.count))
    others = order[ranks.rank * own :][:own].to(x.device)
    found = torch.index_select(ranks.gather(x), 0, others, out=torch.empty_like(x))
    return found.mul_(1 - share).add_(x, alpha=share), ranks.gather(y)[others], share
