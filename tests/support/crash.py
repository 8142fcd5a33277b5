"""Crash trials: the real writer on a simulated disk, stopped anywhere, again and again.

A trial writes, mends or removes a small level. It is stopped at random calls by a power cut, a kill
or a full disk, up to three times in a row, and goes on with the real code each time. After every
stop and at the end it is counted when one of the store's promises is broken; see ``PROMISES``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import mutants
import numpy as np
from shard_files import shard_path
from simulated_disk import PowerCut, SimulatedDisk

from strata.store import parallel
from strata.store.errors import DiskFull, LevelAbsent, LevelDamaged, StoreError
from strata.store.feature_store import Store
from strata.store.files.publish import TEMPORARY, unseal
from strata.store.fingerprint import fingerprint, sha256
from strata.store.level import codec
from strata.store.level.layout import BEGUN, Geometry, LevelKey
from strata.store.level.level import COMMIT, Level, receipt_path
from strata.store.write import shard as shard_module
from strata.store.write.verify import QUARANTINE, forget_damage
from strata.store.write.writer import INTENT, ZARR, LevelWriter

PROMISES = {
    "wrong read": "a level opened and gave other rows than were written",
    "torn level": "a level that nobody damaged opened in part: a commit outlived what it names",
    "lost commit": "a level whose commit() had returned was gone or damaged after a power cut",
    "empty receipt": "a receipt was there and its shard was not, or another",
    "not resumed": "taking up again, on a sound disk, raised an error",
    "other bytes": "after taking up again a file differed from that of an undisturbed run",
    "temporary left": "a temporary file was there after a run that had completed",
}
"""What is counted. The real protocol must have none of it."""

ROOT = Path("/data/of/store")
"""Neither of its parents exists at first."""
LINEAGE = [{"depth": 0, "data": "drawn"}, {"depth": 1, "layer": "a convolution"}]
KEY = LevelKey(1, fingerprint(LINEAGE[-1]), "train", "v0")


@dataclass(frozen=True)
class Case:
    """A level that trials write."""

    geometry: Geometry
    rows: np.ndarray
    arrays: dict[str, np.ndarray]


class Inline:
    """In place of a pool of threads, which a trial would mostly wait for: they only read and hash,
    and what a disk is asked to change is asked by one thread anyway."""

    def __init__(self, threads: int, initializer: object = None) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    map = staticmethod(map)

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


@cache
def cases() -> list[Case]:
    """Maps, tokens and vectors in profiles and precisions; one to four shards, whole and short;
    with and without labels."""
    shapes = [
        Geometry(5, (1, 2, 3), "float32", chunk_rows=1, shard_rows=2),
        Geometry(7, (4, 2), "float16", 2, 4, profile="zstd", features_last=True),
        Geometry(4, (1, 3, 3), "uint8", chunk_rows=1, shard_rows=1, profile="lz4"),
        Geometry(3, (16,), "uint4", chunk_rows=3, shard_rows=3),
    ]
    random = np.random.default_rng(0)
    made = []
    for number, shape in enumerate(shapes):
        rows = random.integers(0, 255, (shape.rows, shape.row_bytes), np.uint8).view(shape.dtype)
        arrays = {"label": np.arange(shape.rows)} if number % 2 == 0 else {}
        made.append(Case(shape, rows.reshape(-1, *shape.stored), arrays))
    return made


@cache
def undisturbed(number: int) -> tuple[dict[str, bytes], int]:
    """Files of a run that nothing stops, and how many calls it makes."""
    trial = Trial(number, SimulatedDisk(Random(0)))
    trial.write()
    return trial.files(), trial.disk.calls


@dataclass
class Trial:
    """One level on one disk, and what went wrong with it."""

    number: int
    """Of the case."""
    disk: SimulatedDisk
    writer: type[LevelWriter] = LevelWriter
    counts: Counter[str] = field(default_factory=Counter)
    acknowledged: bool = False
    """Has commit() returned, and has nobody damaged or begun to remove the level since?"""
    damaged: bool = False
    """Has somebody damaged the level, and no mending completed since?"""
    removed: bool = False
    """Has a removal begun, and nobody completed the level since?"""

    @property
    def case(self) -> Case:
        return cases()[self.number]

    @property
    def directory(self) -> Path:
        return KEY.directory(ROOT)

    def files(self) -> dict[str, bytes]:
        """All files but those that are meant to differ: what mending put into quarantine."""
        found = self.disk.contents(ROOT)
        return {name: data for name, data in found.items() if not name.startswith(QUARANTINE)}

    # ---- what the pipeline does -----------------------------------------------------------------

    def write(self) -> bool:
        """Write, or take up, or find nothing to do, as False says. A damaged level is mended."""
        shape = self.case.geometry
        writer = self.writer(ROOT, KEY, shape, LINEAGE, self.disk)
        with writer.lock():
            damaged = forget_damage(ROOT, self.directory, self.disk)
            if not damaged and writer.committed() and self.disk.random.random() < 0.5:
                return False  # somebody finished it; the other half of the time we look closer
            writer.begin()
            for shard in writer.missing():
                writer.put(shard, self.case.rows[slice(*shape.shard_range(shard))])
            writer.commit(None, self.case.arrays, {"strata": "tried"})
        self.acknowledged, self.damaged, self.removed = True, False, False
        return True

    def remove(self) -> None:
        self.acknowledged, self.removed = False, True
        Store(ROOT, self.disk).remove(KEY.depth, KEY.fingerprint)

    # ---- what may not happen --------------------------------------------------------------------

    def look(self) -> str:
        """``absent``, ``damaged``, ``right`` or ``wrong``."""
        try:
            level = Level.open(ROOT, KEY, self.disk)
            rows = level.read(0, len(level))
            arrays = {name: level.array(name) for name in self.case.arrays}
        except LevelAbsent:
            return "absent"
        except LevelDamaged:
            return "damaged"
        same = [np.array_equal(arrays[name], kept) for name, kept in self.case.arrays.items()]
        right = rows.tobytes() == self.case.rows.tobytes() and all(same)
        return "right" if right else "wrong"

    def check(self) -> None:
        """After a stop."""
        seen = self.look()
        self.counts["wrong read"] += seen == "wrong"
        if self.damaged:
            return
        self.counts["torn level"] += seen == "damaged"
        self.counts["lost commit"] += self.acknowledged and seen != "right"
        for shard in () if self.removed else range(self.case.geometry.shards):
            receipt = receipt_path(self.directory, shard)
            if self.disk.exists(receipt):
                with contextlib.suppress(FileNotFoundError, LevelDamaged):
                    axes = len(self.case.geometry.sample)
                    data = self.disk.read(shard_path(self.directory, shard, axes))
                    if sha256(data) == unseal(receipt, self.disk)["sha256"]:
                        continue
                self.counts["empty receipt"] += 1

    def finish(self) -> None:
        """Take up for the last time on a sound disk, and cut the power once more."""
        try:
            completed = self.write()
        except (StoreError, OSError):
            self.counts["not resumed"] += 1
            return
        files = self.files()
        if completed:  # else there was nothing to do, and nobody tidied
            self.counts["temporary left"] += any(TEMPORARY in name for name in files)
        whole = {name: data for name, data in files.items() if TEMPORARY not in name}
        self.counts["other bytes"] += whole != undisturbed(self.number)[0]
        self.disk.power_cut()
        self.check()


@contextlib.contextmanager
def inline() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (codec, parallel, shard_module):
            stack.enter_context(patch.object(module, "ThreadPoolExecutor", Inline))
        yield


# ---- one trial ----------------------------------------------------------------------------------


def disturb(trial: Trial, work: Callable[[], object]) -> None:
    """Stop ``work`` up to three times, each time in another way and place."""
    disk, random = trial.disk, trial.disk.random
    files, calls = undisturbed(trial.number)
    for _ in range(random.randint(1, 3)):
        how = random.choice(("power", "power", "kill", "kill", "full"))
        # Often among the first or last calls: there is what a single one decides.
        first, last = random.choice(((1, 20), (1, calls + 4), (calls - 16, calls + 4)))
        disk.cut_at = disk.calls + random.randint(first, last)
        if how == "full":
            disk.capacity = disk.used() + random.randint(0, sum(map(len, files.values())))
            disk.cut_at = None
        try:
            work()
            trial.counts["stopped when done"] += 1
        except PowerCut:
            pass
        except DiskFull:
            trial.counts["not resumed"] += how != "full"
        except (StoreError, OSError):
            trial.counts["not resumed"] += 1
        trial.counts[how] += 1
        disk.capacity = None
        if how == "power" or (how == "full" and random.random() < 0.5):
            disk.power_cut()
        else:
            disk.kill()
        trial.check()


def write(trial: Trial) -> None:
    disturb(trial, trial.write)


def repair(trial: Trial) -> None:
    """Damage one or two files of a whole level and stop its mending."""
    trial.write()
    disk, random = trial.disk, trial.disk.random
    disk.settle()  # damage of a level at rest; other trials cut the power right after a commit
    for path in random.sample(committed_files(trial), random.randint(1, 2)):
        damage(disk, path)
    trial.acknowledged, trial.damaged = False, True
    trial.check()
    disturb(trial, trial.write)


def remove(trial: Trial) -> None:
    trial.write()
    disturb(trial, trial.remove)
    trial.remove()
    trial.counts["not resumed"] += trial.look() != "absent"
    trial.check()


def committed_files(trial: Trial) -> list[Path]:
    """The files of a level, but no damaged commit together with a damaged x/zarr.json: then nothing
    says any more which of the two geometries is right, and the level must be removed."""
    directory, shards = trial.directory, range(trial.case.geometry.shards)
    either = trial.disk.random.choice((directory / COMMIT, directory / BEGUN))
    arrays = [directory / name / of for name in trial.case.arrays for of in ("c.0", ZARR)]
    files = [shard_path(directory, s, len(trial.case.geometry.sample)) for s in shards]
    receipts = [receipt_path(directory, s) for s in shards]
    return [either, directory / ZARR, directory.parent / INTENT, *arrays, *files, *receipts]


def damage(disk: SimulatedDisk, path: Path) -> None:
    """Flip a bit, cut short, empty, fill with zeros, or remove."""
    data, random = disk.read(path), disk.random
    at = random.randrange(len(data))
    flipped = data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    other = random.choice((flipped, flipped, data[:at], b"", bytes(len(data)), None))
    if path.name == COMMIT and other is None:
        other = b""  # without a commit the level is not damaged: it was never finished
    if other is not None:
        disk.overwrite(path, other)
    else:
        disk.unlink(path)
        disk.settle()


def run_trial(seed: int, mutant: mutants.Mutant = mutants.REAL) -> Counter[str]:
    """One trial, a function of its seed alone; what it counted."""
    random = Random(seed)
    trial = Trial(random.randrange(len(cases())), mutant.disk(random), mutant.writer)
    with inline(), mutant.patched():
        random.choice((write, write, write, repair, remove))(trial)
        trial.finish()
    trial.counts["trials"] += 1
    return trial.counts


def run_trials(n: int, seed: int, mutant: mutants.Mutant = mutants.REAL) -> Counter[str]:
    """What n trials counted; a promise that was always kept counts 0."""
    undisturbed_first()
    total = Counter(dict.fromkeys(PROMISES, 0))
    for number in range(n):
        total.update(run_trial(seed * 1_000_003 + number, mutant))
    return total


def caught_after(mutant: mutants.Mutant, seed: int, limit: int) -> tuple[int, str] | None:
    """How many trials until a mutant breaks a promise, and which; None: not within ``limit``."""
    undisturbed_first()
    for number in range(limit):
        counts = run_trial(seed * 1_000_003 + number, mutant)
        broken = [name for name in PROMISES if counts[name]]
        if broken:
            return number + 1, broken[0]
    return None


def undisturbed_first() -> None:
    """Before any mutant is in place."""
    for number in range(len(cases())):
        undisturbed(number)
