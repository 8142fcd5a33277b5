"""A machine in a few rates, from a TOML file: what a plan needs to know of it, here or elsewhere.

    name = "laptop"
    source = "data sheets"
    device = "cpu"
    forward = 6e10

`calibrate` measures a machine and writes the same file. No torch here: planning answers at once.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline import strict
from pipeline.errors import RecipeError

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class LayerRate:
    """Multiply-adds per second of one kind of layer and its auxiliary classifier."""

    kind: str
    forward: float
    """Of the frozen layer."""
    train: float
    """Of a step that trains it."""

    def __post_init__(self) -> None:
        _above_0(f"forward of {self.kind}", self.forward)
        _above_0(f"train of {self.kind}", self.train)


def _above_0(name: str, value: float) -> None:
    if not value > 0:
        raise RecipeError(f"'{name}' is {value}; it must be above 0")


@dataclass(frozen=True)
class Machine:
    """Rates are in multiply-adds or bytes per second, sizes in bytes; all are above 0."""

    name: str
    source: str
    """Where the figures are from: ``measured 2026-11-24``, ``data sheets``, ``guess``."""
    device: str
    """What computes, ``cpu`` or ``cuda``: a CPU also gathers and decodes, a GPU does not."""
    forward: float
    """Multiply-adds of frozen layers, of kinds that ``layers`` does not have."""
    train: float
    """Multiply-adds of a training step, of which there are three times those of its forward
    pass; as above."""
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
    ratio_lz4: float = 1.5
    """Bytes of the rows over bytes on disk. A guess, where nothing was measured: of features after
    a ReLU (benchmarks/feed.py)."""
    ratio_zstd: float = 1.9
    layers: tuple[LayerRate, ...] = ()
    """What was measured; other kinds of layers have the rates above."""
    packed: str = ""
    """What packing was measured on: precision, and features or noise; empty where it was not."""
    hardware: str = ""
    """What it was measured on; empty for machines that are not here."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise RecipeError(f"'device' is {self.device!r}; it is one of {', '.join(DEVICES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                _above_0(field.name, value)

    def decode(self, profile: str) -> float:
        return {"raw": self.gather, "lz4": self.decode_lz4, "zstd": self.decode_zstd}[profile]

    def encode(self, profile: str) -> float:
        return {"raw": self.gather, "lz4": self.encode_lz4, "zstd": self.encode_zstd}[profile]

    def ratio(self, profile: str) -> float:
        return {"raw": 1.0, "lz4": self.ratio_lz4, "zstd": self.ratio_zstd}[profile]

    def rates(self, kind: str) -> LayerRate:
        """Of a kind of layer, as :func:`pipeline.economics.kind` names it."""
        found = (rate for rate in self.layers if rate.kind == kind)
        return next(found, LayerRate(kind, self.forward, self.train))

    def seconds(self, *, compute: float, host: float, disk: float, copy: float = 0.0) -> float:
        """Of something whose parts overlap: as long as its longest part. On a CPU, what the host
        does and what is computed share the cores.

        Args:
            compute, host, disk, copy: seconds of each part alone.
        """
        if self.device == "cpu":
            return max(compute + host, disk)
        return max(compute, host, disk, copy)


def as_toml(machine: Machine) -> str:
    """A file that :func:`load` reads."""
    values = {f.name: getattr(machine, f.name) for f in fields(machine) if f.name != "layers"}
    lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
    for rate in machine.layers:
        lines += ["", "[[layers]]", *(f"{n} = {_toml(v)}" for n, v in vars(rate).items())]
    return "\n".join(lines) + "\n"


def _toml(value: str | float) -> str:
    return json.dumps(value) if isinstance(value, str) else f"{value:.4e}"


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
