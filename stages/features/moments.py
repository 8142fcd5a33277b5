"""Mean, deviation, extremes and zeros of every channel, of rows that are seen a part at a time.

Parts are merged as in Chan, Golub and LeVeque (1979), *Updating formulae and a pairwise algorithm
for computing sample variances*: nothing cancels, however far a mean is from 0. All sums are float64
and of one thread, so the same parts merged in the same order give the same digits anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of each of C channels, over all rows, and their pixels or tokens, that were seen."""

    count: int
    """Values of one channel."""
    mean: Float64[np.ndarray, " c"]
    squares: Float64[np.ndarray, " c"]
    """Σ (x − mean)²."""
    minimum: Float64[np.ndarray, " c"]
    maximum: Float64[np.ndarray, " c"]
    zeros: Int64[np.ndarray, " c"]
    """Values that are exactly 0."""

    @classmethod
    def of(cls, x: Shaped[Tensor, "b ..."], axis: int = 1) -> Moments:
        """Moments of some rows, at least one; floats or, as x_0 may be, uint8 or int32; on a CPU.
        ``axis`` is that of the channels, 1 or -1. NCHW is fastest."""
        wide = torch.float64 if x.dtype == torch.int32 else torch.float32  # each holds them exactly
        values = x.movedim(axis, 0).flatten(1).to(wide).numpy()
        mean = values.mean(1, dtype=np.float64)
        apart = values - mean[:, None]
        return cls(
            values.shape[1],
            mean,
            np.einsum("cn,cn->c", apart, apart),
            values.min(1).astype(np.float64),
            values.max(1).astype(np.float64),
            values.shape[1] - np.count_nonzero(values, 1),
        )

    def merged(self, other: Moments) -> Moments:
        """Moments of what both have seen, ``other`` after self."""
        count = self.count + other.count
        apart, share = other.mean - self.mean, other.count / count
        return Moments(
            count,
            self.mean + apart * share,
            self.squares + other.squares + np.square(apart) * (self.count * share),
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.zeros + other.zeros,
        )

    @property
    def deviation(self) -> Float64[np.ndarray, " c"]:
        """Standard deviation, of all values and not of a sample of them: √(squares / count)."""
        return np.sqrt(self.squares / self.count)

    @property
    def dead(self) -> int:
        """Channels without a value other than 0."""
        return int((self.zeros == self.count).sum())

    def together(self) -> Moments:
        """Moments of all channels as if they were one."""
        mean = self.mean.mean()
        squares = self.squares.sum() + self.count * np.square(self.mean - mean).sum()
        return Moments(
            self.count * len(self.mean),
            np.array([mean]),
            np.array([squares]),
            np.array([self.minimum.min()]),
            np.array([self.maximum.max()]),
            np.array([self.zeros.sum()]),
        )
