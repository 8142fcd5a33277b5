"""How the learning rate of SGD goes, and all else that decides the steps of a problem. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SGDSchedule:
    """SGD with momentum and a learning rate that depends on the step alone."""

    kind: str
    """``step``: lr · decay^⌊epoch / every⌋ (Sec. 4). ``one-cycle``: linear up, then down to 0."""
    epochs: int
    """Per problem."""
    batch: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: float = 0.2
    every: int = 15
    """Epochs between decays, for ``step``."""
    warmup: float = 0.25
    """Share of the steps on which the rate rises, for ``one-cycle``."""
    accumulate: int = 1
    """Micro-batches summed into one step; ``batch`` is the whole step's."""
    keep: str = "last"
    """``last`` iterate, or ``best``: the lowest training risk after an epoch (Prop. 3.1)."""
    nesterov: bool = False

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of step ``step`` (from 0, over the whole problem)."""
        if self.kind == "step":
            return self.lr * self.decay ** (step // steps_per_epoch // self.every)
        total = self.epochs * steps_per_epoch
        rise = max(1.0, self.warmup * total)
        return self.lr * min((step + 1) / rise, (total - step) / max(1.0, total - rise))
