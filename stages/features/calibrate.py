"""Choosing scales: from a sample of a layer's outputs to a quantiser, and how good it is.

Per channel, and for its positive and negative values apart:

1. Take the ``percentile`` of the values that are not 0. Zeros are exact whatever the scale, and
   there may be any number of them: a percentile over all values of a channel that fires on one
   pixel in a thousand would clip a tenth of all that it says.
2. If the largest value is at most ``HEADROOM`` times that, the codes reach to the largest, and
   nothing is clipped. If it lies further out, the codes end at the percentile, and what lies beyond
   becomes the last code. The mean squared error would not do as a criterion: one outlier of 10⁴
   weighs more in it than all that it would ruin.

A channel without any value is dead for now and may wake up on other images; it gets the widest
scale of the others, so that what it then says is coarse and not clipped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from strata.stages.errors import NotFinite
from strata.stages.features.quantise import (
    LEVELS,
    Quantiser,
    refuse_not_finite,
    unclipped_codes,
)

HEADROOM = {"uint8": 2.0, "uint4": 1.0}
"""How many times the percentile a largest value may be for the codes to reach to it. Reaching twice
as far costs one of the eight bits at worst, and clipping costs more; of four bits there is none to
spare, and clipping costs less (both measured, docs/log.md)."""
VALUES_PER_ROW = 16_384
"""Values of a row that are looked at, over all channels, so that 4,096 rows take 256 MiB."""


@dataclass(frozen=True)
class Channel:
    """What calibration found in one channel."""

    minimum: float
    """The least of all values and 0; the maximum likewise."""
    maximum: float
    low: float
    """The percentile of the negative values; 0 if there are none."""
    high: float
    """The percentile of the positive values; 0 if there are none."""
    values: int
    """Values that are not 0, among those looked at."""
    clipped: int
    """How many of them lie beyond the first or the last code."""
    snr_db: float | None
    """10 · log10(Σ x² / Σ (x − x̂)²), to 0.01; None without a signal, or without an error."""
    dead: bool
    """Not one value that is not 0."""


@dataclass(frozen=True)
class Calibration:
    """A quantiser, and what is known of its quality."""

    quantiser: Quantiser
    channels: tuple[Channel, ...]

    def as_json(self) -> list[dict]:
        """One table per channel."""
        return [asdict(channel) for channel in self.channels]

    def summary(self) -> dict:
        """The worst channel (counted from 0) with its signal-to-noise ratio in dB, the median over
        channels, the clipped share of all values that are not 0, and how many channels are dead.
        What no channel can tell is None."""
        ratios = ((channel.snr_db, c) for c, channel in enumerate(self.channels))
        known = [(ratio, c) for ratio, c in ratios if ratio is not None]
        worst_ratio, worst = min(known, default=(None, None))
        values = sum(channel.values for channel in self.channels)
        return {
            "median_snr_db": round(statistics.median(r for r, _ in known), 2) if known else None,
            "worst_channel": worst,
            "worst_snr_db": worst_ratio,
            "clipped": sum(channel.clipped for channel in self.channels) / max(1, values),
            "dead": sum(channel.dead for channel in self.channels),
            "channels": len(self.channels),
        }

    @property
    def text(self) -> str:
        """The summary on one line."""
        s, ratio = self.summary(), "without a measurable error"
        if s["worst_channel"] is not None:
            worst = f"worst channel {s['worst_channel']}: {s['worst_snr_db']:.1f} dB"
            ratio = f"signal-to-noise {s['median_snr_db']:.1f} dB ({worst})"
        return (
            f"{self.quantiser.precision}: {ratio}, {100 * s['clipped']:.3f} % clipped, "
            f"{s['dead']} dead channels of {s['channels']}"
        )


@torch.inference_mode()
def calibrate(
    batches: Iterable[Float[Tensor, "_ ..."]], precision: str, percentile: float, axis: int = 1
) -> Calibration:
    """Choose a quantiser for features like these, and measure it on them.

    How the rows are cut into batches does not matter. Of a large map a fixed pattern of pixels is
    looked at, another one in each row; smallest and largest values are over all pixels. The tokens
    of a sample, or its points in time, are looked at as pixels are; a vector has one.

    Args:
        batches: float32 on any device.
        precision: ``uint8`` or ``uint4``.
        percentile: above 0, at most 100; 100 clips nothing.
        axis: of the channels in a batch, 1 or -1.

    Returns:
        The calibration, its quantiser on the CPU.

    Raises:
        NotFinite: a value is NaN or infinite; its sample is counted over all batches.
        ValueError: there is not one row.
    """
    parts, extremes, device = _gather(batches, precision, axis)

    def channel(c: int) -> Tensor:
        """What was looked at of one channel, (n,), on the batches' device."""
        return torch.cat([part[:, c].flatten() for part in parts]).to(device)

    channels = range(len(extremes))
    typical = np.array([_typical(channel(c), extremes[c], percentile) for c in channels])
    # How far the codes of each channel reach below and above 0.
    near = extremes <= HEADROOM[precision] * typical
    reach = np.where(near, extremes, typical)
    quantiser = _quantiser(precision, reach, axis)
    there = quantiser.to(device)
    found = (
        Channel(
            minimum=-float(extremes[c, 0]),
            maximum=float(extremes[c, 1]),
            low=-float(typical[c, 0]),
            high=float(typical[c, 1]),
            **_quality(channel(c), there, c),
            dead=not reach[c].any(),
        )
        for c in channels
    )
    return Calibration(quantiser, tuple(found))


def _gather(
    batches: Iterable[Tensor], precision: str, axis: int
) -> tuple[list[Tensor], np.ndarray, torch.device]:
    """Pixels that are looked at, (B, C, P) each and on the CPU; how far all values reach below and
    above 0, float64 (C, 2); the batches' device."""
    parts, lows, highs, row, device = [], [], [], 0, torch.device("cpu")
    for x in batches:
        device = x.device
        try:
            refuse_not_finite(x, x, precision, axis)
        except NotFinite as error:
            error.sample += row
            raise
        pixels = x.movedim(axis, 1).reshape(len(x), x.shape[axis], -1)
        parts.append(_thinned(pixels, row).cpu())
        lows.append(pixels.amin((0, 2)).cpu())
        highs.append(pixels.amax((0, 2)).cpu())
        row += len(x)
    if not row:
        raise ValueError("there is nothing to calibrate on")
    smallest = torch.stack(lows).amin(0).clamp(max=0)
    largest = torch.stack(highs).amax(0).clamp(min=0)
    return parts, torch.stack([-smallest, largest], 1).double().numpy(), device


def _thinned(x: Tensor, first: int) -> Tensor:
    """(B, C, P) of all pixels (B, C, N): P of them evenly apart, one further on in each row."""
    _, channels, pixels = x.shape
    wanted = min(pixels, max(1, VALUES_PER_ROW // channels))
    rows = torch.arange(first, first + len(x), device=x.device)
    pattern = torch.arange(wanted, device=x.device) * pixels // wanted
    index = (rows[:, None] + pattern) % pixels
    return x.gather(2, index[:, None].expand(-1, channels, -1))


def _typical(values: Tensor, extremes: np.ndarray, percentile: float) -> list[float]:
    """Percentiles of the magnitudes below and above 0.

    Each is one of the values, rounded down: below 100 it is never the largest of several, so that
    even in a channel of a few values one outlier is seen as one.
    """
    found = []
    for magnitudes, largest in zip((-values, values), extremes.tolist(), strict=True):
        above = magnitudes[magnitudes > 0]
        index = int(percentile / 100 * (len(above) - 1))
        # Without any: 0, or a value on a pixel that was not looked at.
        found.append(above.kthvalue(index + 1).values.item() if len(above) else largest)
    return found


def _quantiser(precision: str, reach: np.ndarray, axis: int) -> Quantiser:
    """Scales and zero points for how far each channel's codes reach, (C, 2). Dead channels get the
    widest one's, and scale 1 if there is nothing to go by."""
    width, top, bounds = reach.sum(1), LEVELS[precision], torch.finfo(torch.float32)
    reach = np.where(width[:, None] > 0, reach, reach[width.argmax()])
    width = reach.sum(1)
    # So that neither the scale is subnormal nor a decoded value infinite.
    scale = (width / top).clip(bounds.tiny, bounds.max / (top + 2))
    scale[width == 0] = 1.0
    zero = (reach[:, 0] / scale).round().clip(max=top)
    tensors = torch.from_numpy(scale).float(), torch.from_numpy(zero).byte()
    return Quantiser(precision, *tensors, axis)


def _quality(values: Tensor, quantiser: Quantiser, c: int) -> dict[str, Any]:
    """How channel c fares in a quantiser."""
    x = values.view(1, 1, 1, -1)
    alone = Quantiser(quantiser.precision, quantiser.scale[c : c + 1], quantiser.zero[c : c + 1])
    codes = unclipped_codes(x, alone.scale, alone.zero)
    signal = x.double().square().sum().item()
    error = (x - alone.rounded(x)).double().square().sum().item()
    return {
        "values": int((x != 0).sum()),
        "clipped": int(((codes < 0) | (codes > alone.levels)).sum()),
        "snr_db": round(10 * math.log10(signal / error), 2) if signal and error else None,
    }
