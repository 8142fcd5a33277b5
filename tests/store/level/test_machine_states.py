"""Any order of writing, crashing, damaging, verifying, mending and removing, against a dictionary.

The store lies on a simulated disk. The model knows of every level which rows were put, whether its
commit was acknowledged, and which of its files somebody damaged since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from crash import inline
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from shard_files import shard_path
from simulated_disk import PowerCut, SimulatedDisk
from sizes import sized

from strata.store.errors import LevelAbsent, LevelConflict, LevelDamaged
from strata.store.feature_store import Store
from strata.store.files.publish import TEMPORARY
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey
from strata.store.level.level import COMMIT, Level, receipt_path
from strata.store.write.verify import check_level, forget_damage, level_directories, put_back
from strata.store.write.writer import INTENT, ZARR, LevelWriter

ROOT = Path("/store")
LINEAGE = [{"depth": 0, "data": "drawn"}]
KEYS = [LevelKey(0, fingerprint(LINEAGE[0]), "train", view) for view in ("v0", "v1")]
SHAPES = {
    KEYS[0]: Geometry(5, (1, 2, 2), "float32", chunk_rows=1, shard_rows=2),
    KEYS[1]: Geometry(4, (2, 2), "uint8", 1, 2, profile="zstd", features_last=True),
}
"""Whole shards of a level that have the same size, so that two can change places unseen."""
DRAWN = np.random.default_rng(5)
ROWS = {
    key: DRAWN.integers(0, 256, (s.rows, s.row_bytes), np.uint8)
    .view(s.dtype)
    .reshape(s.rows, *s.stored)
    for key, s in SHAPES.items()
}


@dataclass
class Model:
    """What must be true of one level."""

    acknowledged: bool = False
    """commit() has returned, and nobody has begun to remove it."""
    damaged: set[Path] = field(default_factory=set)
    """Files of it that somebody damaged."""
    whole: dict[str, bytes] | None = None
    """Its files when it was first committed."""


keys = st.sampled_from(KEYS)
seeds = st.integers(0, 2**16)


class Levels(RuleBasedStateMachine):
    """Two levels of one depth, which share intent.json."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = SimulatedDisk(Random(0))
        self.model = {key: Model() for key in KEYS}
        self.threads = inline()
        self.threads.__enter__()
        self.elsewhere: dict[LevelKey, Path] = {}
        """Levels whose directory somebody renamed, and where they are."""
        self.spoiled: set[str] = set()
        """Names of files that were ever damaged: of a level without a commit some may be there."""

    def teardown(self) -> None:
        self.threads.__exit__(None, None, None)

    # ---- writing --------------------------------------------------------------------------------

    def writer(self, key: LevelKey) -> LevelWriter:
        return LevelWriter(ROOT, key, SHAPES[key], LINEAGE, self.disk)

    def damaged(self, key: LevelKey) -> set[Path]:
        """Of a level or of what it shares with the other."""
        shared = {p for m in self.model.values() for p in m.damaged if p.name == INTENT}
        return self.model[key].damaged | shared

    def fill(self, key: LevelKey, most: int, commit: bool) -> None:
        writer = self.writer(key)
        with writer.lock():
            writer.begin()
            for shard in writer.missing()[:most]:
                writer.put(shard, ROWS[key][slice(*SHAPES[key].shard_range(shard))])
            if commit:
                writer.commit(None, {"label": np.arange(SHAPES[key].rows)})
        if commit:
            self.committed(key)

    def committed(self, key: LevelKey) -> None:
        model = self.model[key]
        model.acknowledged, model.damaged = True, set()
        files = self.files(key)
        assert not any(TEMPORARY in name for name in files)
        assert model.whole in (None, files)
        model.whole = files

    def files(self, key: LevelKey) -> dict[str, bytes]:
        return self.disk.contents(key.directory(ROOT))

    def untouched(self, key: LevelKey) -> bool:
        return not self.damaged(key) and not self.elsewhere

    @rule(key=keys, most=st.integers(0, 3))
    def put_some(self, key: LevelKey, most: int) -> None:
        if self.untouched(key) and not self.model[key].acknowledged:
            self.fill(key, most, commit=False)

    @rule(key=keys)
    def complete(self, key: LevelKey) -> None:
        if self.untouched(key):
            self.fill(key, 9, commit=True)

    @rule(key=keys, calls=st.integers(1, 70), seed=seeds, power=st.booleans())
    def crash_while_writing(self, key: LevelKey, calls: int, seed: int, power: bool) -> None:
        if self.untouched(key):
            self.stopped(lambda: self.fill(key, 9, commit=True), calls, seed, power)

    def stopped(self, work: Callable[[], None], calls: int, seed: int, power: bool) -> None:
        self.disk.random.seed(seed)
        self.disk.cut_at = self.disk.calls + calls
        with contextlib.suppress(PowerCut):
            work()
        (self.disk.power_cut if power else self.disk.kill)()

    @rule(seed=seeds)
    def power_cut(self, seed: int) -> None:
        self.disk.random.seed(seed)
        self.disk.power_cut()

    # ---- damage ---------------------------------------------------------------------------------

    def acknowledged(self) -> list[LevelKey]:
        return [key for key in KEYS if self.model[key].acknowledged and self.untouched(key)]

    @precondition(lambda self: self.acknowledged())
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "empty", "zeros", "remove"]))
    def damage_a_file(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(self.acknowledged()))
        directory, shards = key.directory(ROOT), range(SHAPES[key].shards)
        names = [ZARR, "x/zarr.json", "label/c.0", "label/zarr.json"]
        if how != "remove":  # without its commit a level is not damaged: it is not there
            names.append(COMMIT)
        paths = [directory / name for name in names]
        paths += [shard_path(directory, shard, len(SHAPES[key].sample)) for shard in shards]
        paths += [receipt_path(directory, shard) for shard in shards]
        path = data.draw(st.sampled_from([*paths, directory.parent / INTENT]))
        self.disk.settle()
        content = self.disk.read(path)
        at = data.draw(st.integers(0, len(content) - 1))
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        other = {"flip": flipped, "cut": content[:at], "empty": b"", "zeros": bytes(len(content))}
        if how == "remove":
            self.disk.unlink(path)
            self.disk.settle()
        else:
            self.disk.overwrite(path, other[how])
        self.model[key].damaged.add(path)
        self.spoiled.add(path.name)

    @precondition(lambda self: self.acknowledged())
    @rule(data=st.data())
    def exchange_two_shards(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.acknowledged()))
        axes, directory = len(SHAPES[key].sample), key.directory(ROOT)
        first, second = (shard_path(directory, shard, axes) for shard in (0, 1))
        self.spoiled |= {first.name, second.name}
        self.disk.settle()
        one, other = self.disk.read(first), self.disk.read(second)
        self.disk.overwrite(first, other)
        self.disk.overwrite(second, one)
        self.model[key].damaged |= {first, second}

    @precondition(lambda self: self.acknowledged())
    @rule(data=st.data())
    def rename_a_level(self, data: st.DataObject) -> None:
        """To the place of a level that there is not."""
        key = data.draw(st.sampled_from(self.acknowledged()))
        place = key.directory(ROOT).with_name("test")
        self.disk.rename(key.directory(ROOT), place)
        self.disk.settle()
        self.elsewhere[key] = place

    # ---- verifying and mending ------------------------------------------------------------------

    @rule()
    def verify(self) -> None:
        """Names exactly the damaged files."""
        for directory in level_directories(ROOT, self.disk):
            found = check_level(ROOT, directory, deep=True, files=self.disk)
            moved = [key for key, place in self.elsewhere.items() if place == directory]
            if moved:
                assert [(d.path, d.belongs) for d in found] == [(directory, moved[0])]
                continue
            key = next(key for key in KEYS if key.directory(ROOT) == directory)
            if self.disk.exists(directory / COMMIT):
                assert {d.path for d in found} == self.damaged(key)
            else:
                assert {d.path.name for d in found} <= self.spoiled

    def mend(self, key: LevelKey) -> None:
        writer = self.writer(key)
        with writer.lock():
            forget_damage(ROOT, writer.directory, self.disk)
        self.fill(key, 9, commit=True)
        for model in self.model.values():
            model.damaged = {path for path in model.damaged if path.name != INTENT}

    def put_back(self) -> None:
        found = [
            damage
            for directory in level_directories(ROOT, self.disk)
            for damage in check_level(ROOT, directory, files=self.disk)
        ]
        put_back(ROOT, found, self.disk)
        self.elsewhere.clear()

    @precondition(lambda self: self.elsewhere or any(map(self.damaged, KEYS)))
    @rule()
    def repair(self) -> None:
        """Everything is as it was, byte for byte; ``committed`` compares."""
        self.put_back()
        for key in KEYS:
            if self.damaged(key):
                self.mend(key)
        self.verify()

    @precondition(lambda self: not self.elsewhere and any(map(self.damaged, KEYS)))
    @rule(data=st.data(), calls=st.integers(1, 70), seed=seeds, power=st.booleans())
    def crash_while_mending(self, data: st.DataObject, calls: int, seed: int, power: bool) -> None:
        """Who mends a level has it removed from the readers' sight; nobody is promised it yet."""
        key = data.draw(st.sampled_from([key for key in KEYS if self.damaged(key)]))
        self.model[key].acknowledged = False
        self.stopped(lambda: self.mend(key), calls, seed, power)
        self.mend(key)

    # ---- removing -------------------------------------------------------------------------------

    def remove(self) -> None:
        for model in self.model.values():
            model.acknowledged = False
        Store(ROOT, self.disk).remove(KEYS[0].depth, KEYS[0].fingerprint)
        for model in self.model.values():
            model.damaged = set()
        if self.elsewhere:  # else parts of it may come back, in a place that is no level's here
            self.disk.settle()
            self.elsewhere.clear()

    @rule()
    def evict(self) -> None:
        self.remove()
        assert level_directories(ROOT, self.disk) == []

    @rule(calls=st.integers(1, 30), seed=seeds, power=st.booleans())
    def crash_while_removing(self, calls: int, seed: int, power: bool) -> None:
        if all(map(self.untouched, KEYS)):
            self.stopped(self.remove, calls, seed, power)

    # ---- reading --------------------------------------------------------------------------------

    @invariant()
    def never_wrong_and_never_lost(self) -> None:
        for key in KEYS:
            model, refused = self.model[key], None
            try:
                level = Level.open(ROOT, key, self.disk)
                rows, labels = level.read(0, len(level)), level.array("label")
            except (LevelAbsent, LevelDamaged, LevelConflict) as error:
                refused = error
            else:
                assert rows.tobytes() == ROWS[key].tobytes()
                assert labels.tolist() == list(range(len(level)))
            if isinstance(refused, LevelAbsent):
                assert not model.acknowledged or key in self.elsewhere
            else:
                assert refused is None or model.damaged, refused


Levels.TestCase.settings = settings(
    max_examples=sized(50, 500),
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)
TestLevels = Levels.TestCase
