"""Where the rows of some levels are held while a problem reads them, and why. Pure arithmetic.

    device   all of them, as stored, in the memory of the GPU: gathered there
    memory   the page cache (raw), or decoded once into RAM (packed): gathered by threads
    disk     read when they are wanted (raw), or decoded chunk by chunk into a pool (packed)

The order of an epoch does not depend on the tier, so a run on another machine sees the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

from strata.pipeline.errors import BudgetError
from strata.pipeline.progress import size

TIERS = ("auto", "device", "memory", "disk")
DEVICE_SHARE = 0.6
"""Share of the GPU's free memory that rows may take; the rest is for the problem."""
CACHE_SHARE = 0.7
"""Share of the free memory that raw rows may take: page cache, which the kernel can take back."""
MEMORY_SHARE = 0.5
"""Share of the free memory that decoded rows may take, which the kernel cannot take back."""


@dataclass(frozen=True)
class TierChoice:
    """A tier, and the reason for it."""

    tier: str
    reason: str


def choose_tier(
    asked: str, what: str, nbytes: int, *, packed: bool, device_free: int, memory_free: int
) -> TierChoice:
    """Choose a tier by bytes.

    Args:
        asked: ``auto`` or a tier.
        what: name of what is to be read, for messages: ``x_1``.
        packed: its rows are compressed on disk.
        nbytes: bytes of its rows, uncompressed.
        device_free: bytes free on the GPU; 0 without one.
        memory_free: bytes of RAM that can be used.

    Raises:
        BudgetError: the tier asked for has no room; gives both numbers.
    """
    kind, room = "unpacked" if packed else "raw", ""
    rooms = {
        "device": (DEVICE_SHARE, device_free, "GPU memory"),
        "memory": (MEMORY_SHARE if packed else CACHE_SHARE, memory_free, "memory"),
    }
    for tier, (share, free, name) in rooms.items():
        room = f"{what} {kind} is {size(nbytes)}, {size(free)} of {name} are free"
        if nbytes <= share * free and asked in ("auto", tier):
            return TierChoice(tier, room)
        if asked == tier:
            raise BudgetError(
                f"--tier {tier}: {room}, of which {100 * share:.0f} % may be used. Use --tier auto"
            )
    how = "chunks are decoded as they are wanted" if packed else "rows are read as they are wanted"
    why = "--tier disk" if asked == "disk" else room
    return TierChoice("disk", f"{why}: {how}")
