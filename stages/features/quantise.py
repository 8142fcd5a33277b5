"""What x_j is rounded to, and the form in which it is stored.

The float precisions are casts. ``uint8`` and ``uint4`` keep, for every channel c, a scale and a
zero point of their own. Channels are axis 1 of a batch, or its last: then they are what tokens have
for features.

    code = round(x / scale_c) + zero_c, clipped to 0 … levels        x̂ = (code − zero_c) · scale_c

0 is always exact, because zero points are codes: most values of a map after a ReLU are 0. Values
beyond the ends become the first or the last code and never wrap. The code above ``levels`` is left
free: all ones is the poison that a hole in a level reads as.

Everything works on one value at a time, so a value has one code whatever batch it is in. And
rounding what is rounded changes nothing, to the bit: x̂ / scale_c is within 2⁻²² of the integer that
it was made from. So a level holds exactly the values that the next layer was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from strata.stages.errors import NotFinite

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Precisions that a cast makes."""
LEVELS = {"uint8": 254, "uint4": 14}
"""Precisions that need scales, with their top code."""
Batch = Float[Tensor, "b ..."]
"""Values of samples of one to four axes, of which one is the channel: (B, C, H, W), (B, T, C), …"""
Codes = UInt8[Tensor, "b ..."]
"""The same as codes; where two share a byte, with half as many channels."""


def needs_scales(precision: str) -> bool:
    """Must values be seen before they can be stored in this precision?"""
    return precision in LEVELS


@dataclass(frozen=True)
class Floats:
    """A precision that a cast makes. bfloat16 is stored as its bits, in uint16."""

    precision: str
    axis: int = 1
    """Which axis of a batch is the channel: 1 or -1."""

    def rounded(self, x: Batch) -> Batch:
        """x as it is after having been stored, in the precision's own dtype.

        Raises NotFinite where a value is NaN or infinite, or too large for the precision.
        """
        held = x.to(FLOATS[self.precision])
        refuse_not_finite(x, held, self.precision, self.axis)
        return held

    def encode(self, x: Batch) -> Shaped[Tensor, "b ..."]:
        """The stored form of x: float32, float16, or uint16 for bfloat16. Raises as rounded."""
        held = self.rounded(x)
        return held.view(torch.uint16) if self.precision == "bfloat16" else held

    def unpacked(self, stored: Shaped[Tensor, "b ..."], channels: int) -> Batch:
        """One element per value of a stored form; ``channels`` is for packed codes alone."""
        return stored.view(FLOATS[self.precision])

    def values(
        self,
        unpacked: Batch,
        out: Batch | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """Values of unpacked elements: in ``out``, of this dtype, or laid out as
        :func:`memory_format` says; in new memory if the dtype is another."""
        return _in_dtype(unpacked, out, dtype, self.axis)

    def decode(self, stored: Shaped[Tensor, "b ..."], channels: int) -> Batch:
        """Values of a stored form: float32, channels last."""
        return self.values(self.unpacked(stored, channels))

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept to read the stored form: nothing."""
        return {}

    def to(self, device: torch.device) -> Floats:
        return self


@dataclass(frozen=True, eq=False)
class Quantiser:
    """Codes with one scale and one zero point per channel; ``uint4`` packs two codes in a byte."""

    precision: str
    """``uint8`` or ``uint4``."""
    scale: Float[Tensor, " c"]
    """float32, above 0: the step from one code to the next."""
    zero: UInt8[Tensor, " c"]
    """The code of 0; 0 for a channel that has no negative values."""
    axis: int = 1
    """Which axis of a batch is the channel: 1 or -1."""

    @property
    def levels(self) -> int:
        """The top code."""
        return LEVELS[self.precision]

    def rounded(self, x: Batch) -> Batch:
        """decode(encode(x)), without packing in between: float32."""
        return self._values(self._codes(x))

    def encode(self, x: Batch) -> Codes:
        """Codes; for ``uint4`` those of two channels in a byte, so that there are ⌈C / 2⌉.

        The first of a pair is in the low bits; the partner that an odd number lacks is 0. Raises
        NotFinite where a value is NaN or infinite.
        """
        codes = self._codes(x).to(torch.uint8)
        if self.precision == "uint8":
            return codes
        last = codes.movedim(self.axis, -1)
        if last.shape[-1] % 2:
            last = torch.cat([last, torch.zeros_like(last[..., :1])], dim=-1)
        return (last[..., 0::2] | (last[..., 1::2] << 4)).movedim(-1, self.axis)

    def unpacked(self, stored: Codes, channels: int) -> Codes:
        """One code per value of a stored form; packed codes do not tell an odd C (``channels``)."""
        if self.precision == "uint8":
            return stored
        last = stored.movedim(self.axis, -1)  # where the two of a pair lie side by side
        pairs = torch.stack([last & 15, last >> 4], dim=-1).flatten(-2)
        return pairs[..., :channels].movedim(-1, self.axis)

    def values(
        self,
        unpacked: Codes,
        out: Batch | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """Values of codes: in ``out``, of this dtype, or in new memory, laid out as
        :func:`memory_format` says. They are what a cast of the float32 values would be: a code less
        its zero point has at most 8 bits, which every float dtype holds, and the product is rounded
        once."""
        return self._values(_in_dtype(unpacked, out, dtype, self.axis))

    def decode(self, stored: Codes, channels: int) -> Batch:
        """Values of a stored form: float32, channels last."""
        return self.values(self.unpacked(stored, channels))

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept to read the stored form: ``scale`` and ``zero``."""
        return {"scale": self.scale, "zero": self.zero}

    def to(self, device: torch.device) -> Quantiser:
        return replace(self, scale=self.scale.to(device), zero=self.zero.to(device))

    def _codes(self, x: Tensor) -> Tensor:
        refuse_not_finite(x, x, self.precision, self.axis)
        codes = unclipped_codes(x, *self._along(x))
        return codes.clamp(0, self.levels)

    def _values(self, codes: Tensor) -> Tensor:
        """In place, as new memory is dear: its pages are touched for the first time."""
        scale, zero = self._along(codes)
        codes.sub_(zero)
        return torch.mul(codes, scale, out=codes)

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero as they apply to x, float32, on its device: (C, 1, 1) for a map."""
        shape = (-1, *(1,) * (x.ndim - 1 - self.axis % x.ndim))
        scale, zero = self.scale.to(x.device), self.zero.to(x.device, torch.float32)
        return scale.view(shape), zero.view(shape)


Codec = Floats | Quantiser
"""What a layer's output is rounded to and stored as."""


def codec(precision: str, tensors: Mapping[str, Tensor], axis: int = 1) -> Codec:
    """The codec that was kept as ``tensors``; the float precisions keep none.

    Args:
        axis: of the channels in a batch, 1 or -1.
    """
    if not needs_scales(precision):
        return Floats(precision, axis)
    return Quantiser(precision, tensors["scale"], tensors["zero"], axis)


def memory_format(x: Tensor, axis: int = 1) -> torch.memory_format:
    """How a batch is laid out for layers: maps (B, C, H, W) with channels last, as convolutions
    read them fastest, all else as its axes are ordered.

    Args:
        axis: of the channels, 1 or -1.
    """
    is_map = x.ndim == 4 and axis == 1
    return torch.channels_last if is_map else torch.contiguous_format


def _in_dtype(x: Tensor, out: Tensor | None, dtype: torch.dtype, axis: int) -> Tensor:
    if out is None:
        form = memory_format(x, axis)
        # The second is for axes in another order, which torch's conversion leaves as they are.
        return x.to(dtype, memory_format=form).contiguous(memory_format=form)
    return out.copy_(x)


def unclipped_codes(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """round(x / scale) + zero in float32, ties to even, before clipping.

    scale and zero are float32, broadcast along x.
    """
    # A division, and by a tensor of the same device: multiplying by 1 / scale, as torch does for
    # a plain number on a GPU, would round some ties the other way than a CPU does.
    return (x.to(torch.float32) / scale).round() + zero


def refuse_not_finite(x: Tensor, held: Tensor, precision: str, axis: int = 1) -> None:
    """Raise NotFinite for the first value that is not finite once ``held`` in a precision.

    Args:
        axis: of the channels, 1 or -1.
    """
    # Extremes are found many times faster than each value is looked at; NaN is one of them.
    if x.numel() == 0 or torch.isfinite(torch.stack([x.amax(), x.amin()]).to(held.dtype)).all():
        return
    first = [int(i) for i in (~torch.isfinite(held)).nonzero()[0]]
    raise NotFinite(first[0], first[axis], float(x[tuple(first)]), precision)
