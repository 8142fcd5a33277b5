"""A machine in a few rates, from a TOML file: what a plan needs to know of it, here or elsewhere.

    name = "laptop"
    source = "data sheets"
    device = "cpu"
    forward = 6e10

`calibrate` measures a machine and writes the same file. No torch here: planning answers at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from strata.pipeline.errors import RecipeError
from strata.pipeline.recipe import strict

DEVICES = ("cpu", "cuda")
JPEG_GUESS = 1e9
"""Bytes of pixels per second: four cores at 80 megapixels of three bytes."""


@dataclass(frozen=True)
class _Rates:
    """Figures that are all above 0. Raises RecipeError: one is not."""

    def __post_init__(self) -> None:
        said = ", ".join(value for value in vars(self).values() if value and isinstance(value, str))
        for name, value in vars(self).items():
            if isinstance(value, float) and not value > 0:
                raise RecipeError(f"'{name}' is {value}; it must be above 0 ({said})")


@dataclass(frozen=True)
class LayerRate(_Rates):
    """Multiply-adds per second of one kind of layer and its auxiliary classifier."""

    kind: str
    forward: float
    """Rate of the frozen layer."""
    train: float
    """Rate of a step that trains it."""


@dataclass(frozen=True)
class RowRate(_Rates):
    """Bytes of rows per second, by all cores, of one profile and precision."""

    profile: str
    precision: str
    encode: float
    """Packed and hashed, ready for the disk; on a CPU also laid out as they are stored."""
    decode: float
    """From the page cache: unpacked or copied, held to their checksums; on a CPU made float32."""
    ratio: float
    """Bytes of the rows over bytes on disk."""


@dataclass(frozen=True)
class Machine(_Rates):
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
    """Bytes that are not in the page cache, several rows in flight."""
    disk_write: float
    """Bytes, with fsync."""
    gather: float
    """Bytes of rows that were read before, gathered from memory."""
    decode_lz4: float
    """Bytes of rows, decoded, by all cores; this and the next three, and the ratios, of precisions
    that ``rows`` does not have."""
    decode_zstd: float
    encode_lz4: float
    encode_zstd: float
    memory: float
    """What levels may take of the page cache."""
    device_memory: float | None = None
    """Memory of a GPU, for rows and the problem; without one none is held there."""
    copy: float = 1e12
    """Bytes from the host to the device, while it computes."""
    decode_jpeg: float | None = None
    """Bytes of images decoded from JPEG by ffcv, by all cores; without it, a guess."""
    publish_shard: float = 2e-3
    """Seconds of a shard and its receipt beyond their bytes: synced, linked, directories synced. A
    guess where nothing was measured, as the next."""
    publish_level: float = 5e-3
    """Seconds of a level beyond its shards: directories, lock, metadata, commit."""
    ratio_lz4: float = 1.5
    """Bytes of the rows over bytes on disk. A guess, where nothing was measured: of features after
    a ReLU (benchmarks/feed.py)."""
    ratio_zstd: float = 1.9
    gatherers: int = 0
    """Threads that gather rows, beside the one that waits for a batch: the fewest that reach the
    rate ``gather``. 0: not measured."""
    layers: tuple[LayerRate, ...] = ()
    """What was measured; other kinds of layers have the rates above."""
    rows: tuple[RowRate, ...] = ()
    """What was measured; rows in other profiles and precisions have the rates above."""
    sample: str = ""
    """What ``rows`` were measured on: features, or noise; empty where nothing was."""
    hardware: str = ""
    """What it was measured on; empty for machines that are not here."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise RecipeError(f"'device' is {self.device!r}; it is one of {', '.join(DEVICES)}")
        super().__post_init__()

    def row_rate(self, profile: str, precision: str) -> RowRate:
        """The rates of rows stored in a profile and precision."""
        raw = {"encode": self.gather, "decode": self.gather, "ratio": 1.0}
        rates = {name: getattr(self, f"{name}_{profile}", rate) for name, rate in raw.items()}
        named = (r for r in self.rows if (r.profile, r.precision) == (profile, precision))
        return next(named, RowRate(profile, precision, **rates))

    @property
    def jpeg(self) -> float:
        """Bytes of images decoded from JPEG per second: measured, or a guess."""
        return JPEG_GUESS if self.decode_jpeg is None else self.decode_jpeg

    def rates(self, kind: str) -> LayerRate:
        """The rates of a kind of layer, as ``costs.kind`` names it."""
        found = (rate for rate in self.layers if rate.kind == kind)
        return next(found, LayerRate(kind, self.forward, self.train))

    def seconds(self, *, compute: float, host: float, disk: float, copy: float = 0.0) -> float:
        """Seconds of something whose parts overlap: as long as its longest part. On a CPU, what
        the host does and what is computed share the cores.

        Args:
            compute, host, disk, copy: seconds of each part alone.
        """
        if self.device == "cpu":
            return max(compute + host, disk)
        return max(compute, host, disk, copy)


def as_toml(machine: Machine) -> str:
    """A file that :func:`load` reads: a line per value that is known, a table per rate."""
    lines = list[str]()
    for table, entries in ("", (machine,)), ("layers", machine.layers), ("rows", machine.rows):
        for entry in entries:
            lines += ["", f"[[{table}]]"] if table else []
            known = {n: v for n, v in vars(entry).items() if isinstance(v, str | int | float)}
            for name, value in known.items():
                text = f"{value:.4e}" if isinstance(value, float) else json.dumps(value)
                lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"


def load(path: Path) -> Machine:
    """Read a machine's file.

    Raises:
        RecipeError: no such file, no TOML, or not what a machine's file says; names it.
    """
    text = strict.read_text(path)
    try:
        return strict.read(Machine, strict.tables(text))
    except RecipeError as error:
        raise RecipeError(f"{path}: {strict.located(text, error)}") from error
