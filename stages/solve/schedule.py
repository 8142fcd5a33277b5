"""How the learning rate goes, and all else that decides the steps of a problem. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

KINDS = ("step", "one-cycle", "cosine")
OPTIMISERS = ("sgd", "adamw")


@dataclass(frozen=True)
class SGDSchedule:
    """An optimiser, and a learning rate that depends on the step alone."""

    kind: str
    """``step``: lr · decay^⌊epoch / every⌋ (Sec. 4). ``one-cycle``: linear up, then down to 0.
    ``cosine``: linear up, then half a cosine down to 0."""
    epochs: int
    """Per problem."""
    batch: int
    """Samples of a step."""
    lr: float
    """The highest rate."""
    momentum: float = 0.9
    """Of SGD; of AdamW it is β1, and β2 is 0.999."""
    weight_decay: float = 0.0
    """Decay of weights, biases and norms alike."""
    decay: float = 0.2
    """What the rate is multiplied by, for ``step``."""
    every: int = 15
    """Epochs between decays, for ``step``."""
    warmup: float = 0.25
    """Share of the steps on which the rate rises, for ``one-cycle`` and ``cosine``."""
    accumulate: int = 1
    """Micro-batches summed into one step; ``batch`` is the whole step's."""
    keep: str = "last"
    """``last`` iterate, or ``best``: the lowest training risk after an epoch (Prop. 3.1)."""
    nesterov: bool = False
    """Nesterov's momentum, of SGD."""
    optimizer: str = "sgd"
    """``sgd``, with momentum; or ``adamw``, whose weight decay is decoupled from the gradient."""
    label_smoothing: float = 0.0
    """Share of every label that is spread over all classes, of ``cross-entropy``, in training."""
    mixup: float = 0.0
    """α of mixup: x_{j-1} and the loss of a sample are mixed with those of another of the
    (micro-)batch, in shares λ and 1 - λ, λ from Beta(α, α), one for each step. 0: none."""

    @property
    def moments(self) -> int:
        """Values that the optimiser keeps of every weight."""
        return 2 if self.optimizer == "adamw" else 1

    def goes_straight(self, compute: str) -> bool:
        """May large gradients go into the momentum as they come? Nesterov's step, AdamW's, and the
        scaler of float16, the dtype of convolutions, want them whole."""
        return self.optimizer == "sgd" and not self.nesterov and compute != "float16"

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of step ``step`` (from 0, over the whole problem)."""
        if self.kind == "step":
            return self.lr * self.decay ** (step // steps_per_epoch // self.every)
        total = self.epochs * steps_per_epoch
        rise = max(1.0, self.warmup * total)
        if self.kind == "cosine" and step + 1 > rise:
            return self.lr * (1 + cos(pi * (step + 1 - rise) / (total + 1 - rise))) / 2
        return self.lr * min((step + 1) / rise, (total - step) / max(1.0, total - rise))
