"""What x_j is rounded to, and the form in which it is stored.

The float precisions are casts. ``uint8`` and ``uint4`` keep, for every channel c, a scale and a
zero point of their own:

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
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from strata.stages.errors import NotFinite

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Precisions that a cast makes."""
LEVELS = {"uint8": 254, "uint4": 14}
"""Precisions that need scales, with their top code."""


def needs_scales(precision: str) -> bool:
    """Must values be seen before they can be stored in this precision?"""
    return precision in LEVELS


@dataclass(frozen=True)
class Floats:
    """A precision that a cast makes. bfloat16 is stored as its bits, in uint16."""

    precision: str

    def rounded(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """x as it is after having been stored, in the precision's own dtype.

        Raises NotFinite where a value is NaN or infinite, or too large for the precision.
        """
        held = x.to(FLOATS[self.precision])
        refuse_not_finite(x, held, self.precision)
        return held

    def encode(self, x: Float[Tensor, "b c h w"]) -> Shaped[Tensor, "b c h w"]:
        """The stored form of x: float32, float16, or uint16 for bfloat16. Raises as rounded."""
        held = self.rounded(x)
        return held.view(torch.uint16) if self.precision == "bfloat16" else held

    def unpacked(
        self, stored: Shaped[Tensor, "b c h w"], channels: int
    ) -> Float[Tensor, "b c h w"]:
        """One element per value of a stored form; ``channels`` is for packed codes alone."""
        return stored.view(FLOATS[self.precision])

    def values(
        self,
        unpacked: Float[Tensor, "b c h w"],
        out: Float[Tensor, "b c h w"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "b c h w"]:
        """Values of unpacked elements: in ``out``, of this dtype, or channels last; in new memory
        if the dtype is another."""
        return _in_dtype(unpacked, out, dtype)

    def decode(self, stored: Shaped[Tensor, "b c h w"], channels: int) -> Float[Tensor, "b c h w"]:
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

    @property
    def levels(self) -> int:
        """The top code."""
        return LEVELS[self.precision]

    def rounded(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """decode(encode(x)), without packing in between: float32."""
        return self._values(self._codes(x))

    def encode(self, x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c2 h w"]:
        """Codes, C2 = C; for ``uint4`` those of two channels in a byte, C2 = ⌈C / 2⌉.

        The first of a pair is in the low bits; the partner that an odd number lacks is 0. Raises
        NotFinite where a value is NaN or infinite.
        """
        codes = self._codes(x).to(torch.uint8)
        if self.precision == "uint8":
            return codes
        if codes.shape[1] % 2:
            codes = torch.cat([codes, torch.zeros_like(codes[:, :1])], dim=1)
        return codes[:, 0::2] | (codes[:, 1::2] << 4)

    def unpacked(
        self, stored: UInt8[Tensor, "b c2 h w"], channels: int
    ) -> UInt8[Tensor, "b c h w"]:
        """One code per value of a stored form; packed codes do not tell an odd C (``channels``)."""
        if self.precision == "uint8":
            return stored
        last = stored.movedim(1, -1)  # where the two of a pair lie side by side
        pairs = torch.stack([last & 15, last >> 4], dim=-1).flatten(-2)
        return pairs.movedim(-1, 1)[:, :channels]

    def values(
        self,
        unpacked: UInt8[Tensor, "b c h w"],
        out: Float[Tensor, "b c h w"] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "b c h w"]:
        """Values of codes: in ``out``, of this dtype, or in new memory, channels last. They are
        what a cast of the float32 values would be: a code less its zero point has at most 8 bits,
        which every float dtype holds, and the product is rounded once."""
        return self._values(_in_dtype(unpacked, out, dtype))

    def decode(self, stored: UInt8[Tensor, "b c2 h w"], channels: int) -> Float[Tensor, "b c h w"]:
        """Values of a stored form: float32, channels last."""
        return self.values(self.unpacked(stored, channels))

    def tensors(self) -> dict[str, Tensor]:
        """What must be kept to read the stored form: ``scale`` and ``zero``."""
        return {"scale": self.scale, "zero": self.zero}

    def to(self, device: torch.device) -> Quantiser:
        return Quantiser(self.precision, self.scale.to(device), self.zero.to(device))

    def _codes(self, x: Tensor) -> Tensor:
        refuse_not_finite(x, x, self.precision)
        return unclipped_codes(x, self.scale, self.zero).clamp(0, self.levels)

    def _values(self, codes: Tensor) -> Tensor:
        """In place, as new memory is dear: its pages are touched for the first time."""
        codes.sub_(_along(self.zero, codes))
        return torch.mul(codes, _along(self.scale, codes), out=codes)


Codec = Floats | Quantiser
"""What a layer's output is rounded to and stored as."""


def codec(precision: str, tensors: Mapping[str, Tensor]) -> Codec:
    """The codec that was kept as ``tensors``; the float precisions keep none."""
    if not needs_scales(precision):
        return Floats(precision)
    return Quantiser(precision, tensors["scale"], tensors["zero"])


def _in_dtype(x: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    if out is None:
        return x.to(dtype, memory_format=torch.channels_last)
    return out.copy_(x)


def unclipped_codes(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """round(x / scale) + zero in float32, ties to even, before clipping.

    x is (B, C, H, W), scale and zero are (C,).
    """
    # A division, and by a tensor of the same device: multiplying by 1 / scale, as torch does for
    # a plain number on a GPU, would round some ties the other way than a CPU does.
    return (x.to(torch.float32) / _along(scale, x)).round() + _along(zero, x)


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """(C,) as (C, 1, 1), float32, on x's device."""
    return channels.to(x.device, torch.float32).view(-1, 1, 1)


def refuse_not_finite(x: Tensor, held: Tensor, precision: str) -> None:
    """Raise NotFinite for the first value that is not finite once ``held`` in a precision."""
    # Extremes are found many times faster than each value is looked at; NaN is one of them.
    if x.numel() == 0 or torch.isfinite(torch.stack([x.amax(), x.amin()]).to(held.dtype)).all():
        return
    first = [int(i) for i in (~torch.isfinite(held)).nonzero()[0]]
    raise NotFinite(first[0], first[1], float(x[tuple(first)]), precision)
