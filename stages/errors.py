"""What the stages refuse, each as one clear line.

StageError
├── DataError
│   └── BrokenImage
├── DeviceError
├── Diverged
├── NotFinite
├── TemporaryFull
└── UnusableNetwork
"""

from __future__ import annotations


class StageError(Exception):
    """Base of what the stages refuse."""


class DataError(StageError):
    """The images or labels cannot be used as they are."""


class BrokenImage(DataError):
    """One image cannot be decoded.

    `name` is the sample's name as its source gives it, `reason` a few words on what is wrong.
    """

    def __init__(self, name: str, reason: str) -> None:
        # Both go to the base as they are, so that the exception survives pickling.
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"broken image {self.name} ({self.reason})"


class DeviceError(StageError):
    """The device asked for is not there."""


class Diverged(StageError):
    """The loss is not finite.

    `epoch` is the epoch in which it happened, `last_good` the last finite loss, None if there
    was none.
    """

    def __init__(self, epoch: int, last_good: float | None) -> None:
        super().__init__(epoch, last_good)
        self.epoch, self.last_good = epoch, last_good

    def __str__(self) -> str:
        known = "there was no finite loss before it"
        if self.last_good is not None:
            known = f"the last finite loss was {self.last_good:.6g}"
        return f"the loss is not finite in epoch {self.epoch}; {known}"


class NotFinite(StageError):
    """A feature is not finite, or its stored precision cannot hold it.

    `sample` is its row in the batch, `channel` its channel, `value` what it is.
    """

    def __init__(self, sample: int, channel: int, value: float, precision: str) -> None:
        super().__init__(sample, channel, value, precision)
        self.sample, self.channel = sample, channel
        self.value, self.precision = value, precision

    def __str__(self) -> str:
        return (
            f"sample {self.sample} of the batch has the feature {self.value:.6g} in channel "
            f"{self.channel}, which {self.precision} cannot hold"
        )


class TemporaryFull(StageError):
    """The temporary directory has no room for what must be unpacked."""


class UnusableNetwork(StageError):
    """A network that a recipe names cannot be had, or its blocks cannot be trained one by one."""
