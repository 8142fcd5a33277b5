"""A million shards, a thousand million rows: what does one process need? A simulated petabyte.

Claim: a level of 10^6 shards of 1 GB (10^9 rows of 1 MB) opens in under 10 s and 2 GB of memory;
what is missing of one is known from names alone, in the same bounds, however many bytes there are.

Method: a level as the writer would leave it, in real files: every shard a hole of its size, every
receipt real, with a checksum for each of its rows; nothing is synced, since nothing has to last.
Then each step is a process of its own, whose seconds and peak resident memory are taken: a plan for
10^9 images, resume with HOLES shards missing, commit (every receipt is read once), open, state, and
the check of verify (every receipt is hashed; shards by size). n = 1; the page cache is warm. An
epoch's order is measured for a tenth of the rows. Not simulated: the bytes of the shards.

    python benchmarks/scale.py [--shards 1000000] [--place DIR] [--out FILE]

DIR is left there, and taken up: making two million files takes longer than all that is measured.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, keep

import checkout  # noqa: F401
from strata.pipeline.plan import plan
from strata.pipeline.recipe.builtin import load
from strata.store.feature_store import Store
from strata.store.files.publish import sealed
from strata.store.fingerprint import fingerprint
from strata.store.level.codec import CHECKSUM
from strata.store.level.layout import VALUES, Geometry, LevelKey, shard_name
from strata.store.level.level import CHECKSUMS, COMMIT, RECEIPTS, receipt_name
from strata.store.read.order import mixing
from strata.store.write.shard import forget_shard
from strata.store.write.verify import check_level
from strata.store.write.writer import LevelWriter

LINEAGE = [{"simulated": True}]
KEY = LevelKey(1, fingerprint(LINEAGE[-1]), "train", "clean")
ROWS_PER_SHARD = 1000
SAMPLE = (256, 64, 64)
"""1 MiB of uint8."""
HOLES = 1000
"""Shards that are missing when the level is resumed."""
SECONDS, GB = 10.0, 2.0


def shape(shards: int) -> Geometry:
    return Geometry(shards * ROWS_PER_SHARD, SAMPLE, "uint8", 1, ROWS_PER_SHARD)


def writer(place: Path, shards: int) -> LevelWriter:
    return LevelWriter(place, KEY, shape(shards), LINEAGE)


def build(place: Path, shards: int) -> None:
    """What there is not yet; and no commit."""
    made = writer(place, shards)
    made.begin()
    (made.directory / COMMIT).unlink(missing_ok=True)
    there = set(made.files.names(made.directory / RECEIPTS))
    random, size = np.random.default_rng(0), made.geometry.nbytes // shards
    for shard in range(shards):
        if receipt_name(shard) not in there:
            put(made, shard, size, random)


def punch(place: Path, shards: int) -> None:
    """Remove every shards/HOLES-th shard."""
    made = writer(place, shards)
    for shard in holes(shards):
        forget_shard(made.path(shard), shard)


def holes(shards: int) -> range:
    return range(0, shards, max(1, shards // HOLES))


def put(made: LevelWriter, shard: int, size: int, random: np.random.Generator) -> None:
    """A hole and its receipt."""
    path = made.path(shard)
    path.touch()
    os.truncate(path, size)
    rows = random.integers(0, 1 << 32, ROWS_PER_SHARD, dtype=np.uint32).astype(CHECKSUM)
    receipt = {
        "shard": shard,
        "key": f"{VALUES}/{shard_name(shard)}",
        "rows": list(made.geometry.shard_range(shard)),
        "nbytes": size,
        "sha256": random.bytes(32).hex(),
        CHECKSUMS: base64.b64encode(rows.tobytes()).decode(),
    }
    (made.directory / RECEIPTS / receipt_name(shard)).write_bytes(sealed(receipt))


# ---- steps, each in a process of its own --------------------------------------------------------


def resume(place: Path, shards: int) -> dict[str, Any]:
    """Which shards are missing? The last ones are not hashed: they are holes."""
    from strata.store.write.unfinished import unfinished

    made = writer(place, shards)
    missing, _ = unfinished(made.directory, made.geometry, made.files, lambda shard: True)
    return {"missing": len(missing), "of": shards}


def commit(place: Path, shards: int) -> dict[str, Any]:
    return {"shards": len(writer(place, shards).commit(None).shards)}


def open_level(place: Path, shards: int) -> dict[str, Any]:
    level = Store(place).open(KEY)
    return {"rows": len(level), "bytes": level.nbytes}


def state(place: Path, shards: int) -> dict[str, Any]:
    return {"state": Store(place).state(KEY).state}


def verify(place: Path, shards: int) -> dict[str, Any]:
    return {"damaged": len(check_level(place, KEY.directory(place)))}


def planned(place: Path, shards: int) -> dict[str, Any]:
    """The paper's ImageNet network for so many images."""
    _, recipe = load("imagenet-k3")
    many = replace(recipe, data=replace(recipe.data, train=shards * ROWS_PER_SHARD))
    return {"bytes": plan.make_plan(many, None).as_json()["total_bytes"]}


def order(place: Path, shards: int) -> dict[str, Any]:
    rows = len(mixing(shape(max(1, shards // 10))).order(0, 1, 0))
    return {"rows": rows}


STEPS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "plan": planned,
    "resume": resume,
    "commit": commit,
    "open": open_level,
    "state": state,
    "verify": verify,
    "order": order,
}
"""In this order; what is missing for ``resume`` is made again for ``commit``."""
BOUNDED = ("plan", "resume", "open", "state")


def step(name: str, place: Path, shards: int) -> dict[str, Any]:
    begun = time.perf_counter()
    found = STEPS[name](place, shards)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": round(seconds, 2), "peak_gb": round(peak / 1e9, 3), **found}


def apart(name: str, place: Path, shards: int) -> dict[str, Any]:
    line = [sys.executable, __file__, "--step", name, "--place", place, "--shards", shards]
    done = subprocess.run([str(word) for word in line], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-2000:])
    return json.loads(done.stdout)


def holds(found: dict[str, Any]) -> dict[str, bool]:
    return {
        name: found[name]["seconds"] < SECONDS and found[name]["peak_gb"] < GB for name in BOUNDED
    } | {"missing": found["resume"]["missing"] == found["holes"]}


def table(found: dict[str, Any]) -> list[str]:
    """Rows of docs/scale.md."""
    return [
        f"| {name} | {found[name]['seconds']:.1f} s | {found[name]['peak_gb']:.1f} GB |"
        for name in STEPS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--place", type=Path, default="scale", help="on a disk with 10 GB free")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(options.step, options.place, options.shards)))
        return
    begun = time.perf_counter()
    build(options.place, options.shards)
    print(f"built in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    found = measured(options.place, options.shards)
    keep(found | {"holds": holds(found)}, options.out, show=True)


def measured(place: Path, shards: int) -> dict[str, Any]:
    found: dict[str, Any] = {"shards": shards, "rows": shards * ROWS_PER_SHARD}
    found["holes"] = len(holes(shards))
    punch(place, shards)
    for name in STEPS:
        if name == "commit":
            build(place, shards)
        found[name] = apart(name, place, shards)
        print(name, found[name], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
