"""A machine in a few rates, from a TOML file: what a plan needs to know of it, here or elsewhere.

    name = "laptop"
    source = "data sheets"
    device = "cpu"
    forward = 6e10

Whoever measures a machine writes the same file. No torch here, so that planning answers at once.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline import strict
from pipeline.errors import RecipeError

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Machine:
    """Rates are in multiply-adds or bytes per second, sizes in bytes; all are above 0."""

    name: str
    source: str
    """Where the figures are from: ``measured 2026-11-24``, ``data sheets``, ``guess``."""
    device: str
    """What computes, ``cpu`` or ``cuda``: a CPU also gathers and decodes, a GPU does not."""
    forward: float
    """Multiply-adds of frozen layers."""
    train: float
    """Multiply-adds of a training step, of which there are three times those of its forward
    pass."""
    disk_read: float
    """Bytes, several rows in flight."""
    disk_write: float
    """Bytes, with fsync."""
    gather: float
    """Bytes of rows gathered from memory, by all cores."""
    decode_lz4: float
    """Bytes of rows, decoded, by all cores."""
    decode_zstd: float
    encode_lz4: float
    encode_zstd: float
    memory: float
    """What levels may take of the page cache."""
    copy: float = 1e12
    """Bytes from the host to the device, while it computes."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise RecipeError(f"'device' is {self.device!r}; it is one of {', '.join(DEVICES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not value > 0:
                raise RecipeError(f"'{field.name}' is {value}; it must be above 0")

    def decode(self, profile: str) -> float:
        return {"raw": self.gather, "lz4": self.decode_lz4, "zstd": self.decode_zstd}[profile]

    def encode(self, profile: str) -> float:
        return {"raw": self.gather, "lz4": self.encode_lz4, "zstd": self.encode_zstd}[profile]

    def seconds(self, *, compute: float, host: float, disk: float, copy: float = 0.0) -> float:
        """Of something whose parts overlap: as long as its longest part. On a CPU, what the host
        does and what is computed share the cores.

        Args:
            compute, host, disk, copy: seconds of each part alone.
        """
        if self.device == "cpu":
            return max(compute + host, disk)
        return max(compute, host, disk, copy)


def load(path: Path) -> Machine:
    """
    Raises:
        RecipeError: no such file, no TOML, or not what a machine's file says; names it.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no TOML: {error}") from error
    try:
        return strict.read(Machine, table)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
