"""Where a cache may pay or not: recipes, images, and how each is run. Parts of cache_or_recompute.

`mixed` on paper: 2,000 images, two epochs, float32, a disk of 25 MB/s, no level in memory but those
of 16 kB a row. Layers 2, 3 and 4 begin with P, so rows shrink from x_1 to x_4 while what lies below
grows; steps and forward passes at rates that two cores showed (in 10^9 multiply-adds a second: 25,
72, 38, 30, 15 forwards in layers 1 to 5, and in the step of layers 2 to 5 81, 99, 19, 12). What is
read comes while a step is computed, the longer of the two counts; what is computed adds to it.

    level     a row   read  computed  step above it  layer above, read  layer above, computed
    x_1      131 kB  5.2 ms  0.04 ms         0.7 ms               23 s                    3 s
    x_2       66 kB  2.6 ms  0.3 ms          0.6 ms               12 s                    4 s
    x_3       33 kB  1.3 ms  0.8 ms          3.1 ms               13 s                   16 s
    x_4       16 kB  0.7 ms  1.4 ms          2.4 ms               10 s                   16 s
    x_5       16 kB  0.7 ms  2.0 ms          2.4 ms               10 s                   19 s
    x_6       16 kB  0.7 ms  2.7 ms          2.4 ms               10 s                   21 s
    x_7       16 kB  0.7 ms  3.3 ms          2.4 ms               10 s                   24 s

With 1 to 3 s to write each level, and layer 1, `plan` makes of this 72 s with x_3 to x_7 cached,
101 s with all of them and 103 s with none: auto should be 29 % below the better of the two. By how
much depends on the machine's rates; that it is mixed hardly: reading x_1 costs a hundred times what
it saves, and computing x_4 again twice what reading it does, in all layers above.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checkout import ROOT


@dataclass(frozen=True)
class Scenario:
    """Changes of cifar10-small, and how it is run."""

    what: str
    changes: dict[str, str]
    """By table and key, as TOML."""
    images: int = 4_000
    problems: int = 0
    """More of them at each depth, one after another once the run is through."""
    loader: str = "native"
    slow_disk: bool = False


NARROW = {
    "network.layers": "8",
    "network.width": "32",
    "network.downsample": "[3]",
    "auxiliary.k": "1",
    "schedule.epochs": "4",
}
FEW = {
    "network.width": "32",
    "auxiliary.k": "1",
    "schedule.epochs": "2",
}
JPEG = {
    "data.size": "256",
    "data.jpeg": "90",
    "augment.pad": "0",
    "augment.crop": "224",
    "network.layers": "4",
    "network.width": "16",
    "network.downsample": "[1, 2]",
    "network.stem": "2",
    "auxiliary.k": "1",
    "schedule.epochs": "3",
}
MIXED = {
    "augment.pad": "0",
    "network.layers": "8",
    "network.width": "32",
    "network.downsample": "[1, 2, 3]",
    "network.stem": "0",
    "auxiliary.k": "1",
    "schedule.epochs": "2",
    "cache.precision": '"float32"',
    "schedule.batch": "64",  # with the next two, a process takes 650 MB
    "cache.shard_mb": "16",
    "cache.block": "64",
}
SCENARIOS = {
    "small": Scenario("three layers, k = 2, canvas", {}),
    "narrow": Scenario("eight narrow layers, k = 1, canvas", NARROW),
    "views": Scenario("eight narrow layers, four fixed views", NARROW | {"augment.views": "4"}),
    "two epochs": Scenario("eight narrow layers, read twice", NARROW | {"schedule.epochs": "2"}),
    "problems": Scenario("three narrow layers, nine problems each", FEW, 4_000, problems=8),
    "jpeg": Scenario("four narrow layers, JPEGs of 256×256", JPEG, 1_500, loader="ffcv"),
    "mixed": Scenario("eight layers, 25 MB/s, wide x_1", MIXED, 2_000, slow_disk=True),
}
WIDE = {
    "network.layers": "5",
    "network.width": "256",
    "network.downsample": "[2, 3]",
    "network.batch_norm": "true",
    "network.bias": "false",
    "auxiliary.k": "1",
    "schedule.epochs": "6",
}
ON_GPU = {"wide": Scenario("five layers of full width, k = 1, canvas", WIDE, 20_000)}
EVERY = SCENARIOS | ON_GPU


# ---- recipes -------------------------------------------------------------------------------------


def recipe(place: Path, name: str, count: int) -> Path:
    """The recipe of a scenario, for so many images: they decide about the choice too."""
    text = (ROOT / "pipeline/recipe/builtin/cifar10-small.toml").read_text("utf-8")
    counts = {"data.train": str(count), "data.test": str(count // 10)}
    for key, value in (counts | EVERY[name].changes).items():
        text = _changed(text, *key.split("."), value)
    path = place / f"{name.replace(' ', '-')}.toml"
    path.write_text(text, "utf-8")
    return path


def _changed(text: str, table: str, key: str, value: str) -> str:
    before, after = text.split(f"[{table}]\n")
    own, *others = re.split(r"(?m)^(?=\[)", after, maxsplit=1)
    own, count = re.subn(rf"(?m)^{key} = [^#\n]*", f"{key} = {value} ", own)
    return "".join((before, f"[{table}]\n", "" if count else f"{key} = {value}\n", own, *others))


# ---- the slow disk ------------------------------------------------------------------------------

READ_BYTES, MEMORY_BYTES = 25_000_000, 750_000_000
BUDGET = "150MB"
"""What of MEMORY_BYTES is left for rows."""
GROUPS = Path("/sys/fs/cgroup")
NAME = "strata-benchmark"


def make_groups() -> None:
    """What reads READ_BYTES a second and holds MEMORY_BYTES, page cache included: control groups of
    version 1, and root."""
    device = Path(tempfile.gettempdir()).stat().st_dev
    disk = f"{os.major(device)}:{os.minor(device)}"
    for kind, name, value in (
        ("blkio", "blkio.throttle.read_bps_device", f"{disk} {READ_BYTES}"),
        ("memory", "memory.limit_in_bytes", str(MEMORY_BYTES)),
    ):
        group = GROUPS / kind / NAME
        group.mkdir(exist_ok=True)
        (group / name).write_text(value, "ascii")


def enter_disk() -> None:
    """The slow disk, and all of the memory: calibrating takes some, and reads past the cache."""
    _enter("blkio")


def leave_disk() -> None:
    (GROUPS / "blkio" / "cgroup.procs").write_text(str(os.getpid()), "ascii")


def enter_group() -> None:
    _enter("blkio", "memory")


def _enter(*kinds: str) -> None:
    for kind in kinds:
        (GROUPS / kind / NAME / "cgroup.procs").write_text(str(os.getpid()), "ascii")


def read_from_disk() -> int:
    """Bytes that the group has read, past the page cache."""
    counts = (GROUPS / "blkio" / NAME / "blkio.throttle.io_service_bytes").read_text("ascii")
    return sum(int(found) for found in re.findall(r" Read (\d+)", counts))
