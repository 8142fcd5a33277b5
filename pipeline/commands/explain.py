"""Why is a level of x_j not there, or not to be used? Field by field: what was, and what is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strata.pipeline.run.levels import keys_at, state_of
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.rundir import Run
from strata.store.errors import LevelDamaged
from strata.store.feature_store import Store
from strata.store.files.publish import unseal
from strata.store.fingerprint import differences
from strata.store.level.layout import LevelKey, depth_directory
from strata.store.write.verify import level_directories
from strata.store.write.writer import INTENT, LINEAGE

Lineage = Sequence[dict[str, Any]]
"""What made x_0 … x_j, field by field."""


@dataclass(frozen=True)
class Explanation:
    """The state of one level, or of the layer it waits for, and the reasons."""

    level: str
    state: str
    why: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"level": self.level, "state": self.state, "why": list(self.why)}


def explain(overview: Overview, j: int) -> list[Explanation]:
    """Every level of x_j: is it there and current, and if not, which field says so.

    A level that is absent is compared with the one that the run wrote last, or with what the store
    has of x_j that is nearest to it.
    """
    run = overview.existing()
    if j:
        overview.check_layer(j)
    keys = keys_at(run, j)
    if keys:
        return [_level(run, overview.store, key) for key in keys]
    return [_layer(run, j)]


def _layer(run: Run, j: int) -> Explanation:
    """Of the first layer below j that is not solved on what is there today."""
    if run.data() is None:
        return Explanation("x_0", "absent", ("the images were not read yet",))
    i = run.solved() + 1
    record = run.layer(i)
    if record is None:
        return Explanation(f"layer {i}", "absent", (f"it is not solved, so x_{j} has no name yet",))
    why = compare(record["lineage"], run.lineage(i - 1))
    return Explanation(f"layer {i}", "stale", (f"it was solved on another x_{i - 1}:", *why))


def _level(run: Run, store: Store, key: LevelKey) -> Explanation:
    try:
        state = state_of(store, key)
    except LevelDamaged as error:
        return Explanation(key.label, "damaged", (str(error),))
    match state.state:
        case "complete":
            return Explanation(key.label, "complete", ())
        case "stale":
            return Explanation(key.label, "stale", _rewritten(store, key, state.parent or {}))
        case "partial":
            return Explanation(key.label, "partial", (f"{state.rows:,} rows are written",))
    if _written(run, key):
        gone = "it was written, and removed since; `materialize` makes it again"
        return Explanation(key.label, "absent", (gone,))
    other = _nearest(run, store, key)
    if other is None:
        return Explanation(key.label, "absent", ("it was never written",))
    name, was = other
    why = compare(was, run.lineage(key.depth))
    return Explanation(key.label, "stale", (f"{name} is there, but was made otherwise:", *why))


def _written(run: Run, key: LevelKey) -> bool:
    """Did the run write this very level, the last time it wrote that depth?"""
    record = run.features(key.depth) if key.depth else None
    if record is None or record["fingerprint"] != key.fingerprint:
        return False
    return key.name in record["levels"]


def _rewritten(store: Store, key: LevelKey, parent: dict[str, Any]) -> tuple[str, ...]:
    """The level below has the same name and other values, for example of another device."""
    below = LevelKey(**{name: parent[name] for name in ("depth", "fingerprint", "split", "view")})
    now = store.state(below).content_root
    return (
        f"{below.label} was written again with other values:",
        *differences({"content_root": parent["content_root"]}, {"content_root": now}),
    )


def _nearest(run: Run, store: Store, key: LevelKey) -> tuple[str, Lineage] | None:
    """The lineage in the store, of the same depth, split and view, that differs least."""
    now = run.lineage(key.depth)
    record = run.features(key.depth) if key.depth else None
    last = record and depth_directory(store.root, key.depth, record["fingerprint"]).name
    found = []
    for directory in level_directories(store.root, store.files):
        name = directory.parent.name
        if directory.name != key.name or not name.startswith(f"x_{key.depth}-"):
            continue
        try:
            was = unseal(directory.parent / INTENT, store.files, LINEAGE)[LINEAGE]
        except (FileNotFoundError, LevelDamaged):
            continue
        found.append((name != last, len(compare(was, now)), name, was))
    return min(found, key=lambda entry: entry[:3])[2:] if found else None


def compare(was: Lineage, now: Lineage) -> tuple[str, ...]:
    """Where two lineages differ: ``"x_1 weights: was …, is …"``. That a parent has another name is
    a consequence, not a reason."""
    lines = []
    for depth, (before, after) in enumerate(zip(was, now, strict=False)):
        found = differences(before | {"parent": None}, after | {"parent": None})
        lines += [f"x_{depth} {line}" for line in found]
    return tuple(lines)
