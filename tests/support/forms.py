"""Maps in the form of samples of every number of axes: one oracle for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FORMS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "vector": (lambda x: x[:, :, 0, 0], 1),
    "series": (lambda x: x.flatten(2), 1),
    "tokens": (lambda x: x.flatten(2).movedim(1, -1), -1),
    "grid of tokens": (lambda x: x.movedim(1, -1), -1),
    "volume": (lambda x: x[:, :, :, None], 1),
    "volume of tokens": (lambda x: x[:, :, :, None].movedim(1, -1), -1),
}
"""What makes a tensor of another form of (B, C, H, W), of a vector one of a single pixel; and which
axis of it is the channel."""
