"""The command `explain`: why a level of x_j is not there, or not to be used, field by field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strata.pipeline.commands import lifecycle
from strata.pipeline.commands.lifecycle import Answer
from strata.pipeline.options import Options
from strata.pipeline.run.levels import keys_at, state_of
from strata.pipeline.run.rundir import Run
from strata.store.errors import LevelDamaged, readable
from strata.store.feature_store import Store
from strata.store.fingerprint import differences
from strata.store.level.layout import LevelKey, depth_directory
from strata.store.write.verify import level_directories
from strata.store.write.writer import read_lineage

Lineage = Sequence[dict[str, Any]]
"""What made x_0 … x_j, field by field."""


def explain(options: Options) -> Answer:
    """Every level of x_j: is it there and current, and if not, which field says so.

    A level that is absent is compared with the one that the run wrote last, or with what the store
    has of x_j that is nearest to it.
    """
    overview, j = lifecycle.find(options), options.j
    run, store, left_out = overview.existing(), overview.store, list[str]()
    if j:
        overview.check_layer(j)
    levels = [(key.label, *_level(run, store, key, left_out)) for key in keys_at(run, j)]
    place = {"store": str(store.root)}
    found = levels or [_layer(run, j)]
    value = [{"level": level, "state": state, "why": why, **place} for level, state, why in found]
    lines = []
    for level, state, why in found:
        lines += [f"{level}: {state}", *(f"  {reason}" for reason in why)]
    lines.append(f"looked in the store {store.root}")
    return Answer(value, tuple(lines), left_out=list(dict.fromkeys(left_out)))


def _layer(run: Run, j: int) -> tuple[str, str, list[str]]:
    """The first layer below j that is not solved on what is there today, its state, and why."""
    if run.data() is None:
        return "x_0", "absent", ["the images were not read yet"]
    i = run.solved() + 1
    record = run.layer(i)
    if record is None:
        what = "taken" if i <= run.recipe.given else "solved"
        return f"layer {i}", "absent", [f"it is not {what}, so x_{j} has no name yet"]
    why = compare(record["lineage"], run.lineage(i - 1))
    return f"layer {i}", "stale", [f"it was solved on another x_{i - 1}:", *why]


def _level(run: Run, store: Store, key: LevelKey, left_out: list[str]) -> tuple[str, list[str]]:
    """The state of a level, and why; neighbours that cannot be read are added to ``left_out``."""
    try:
        state = state_of(store, key)
    except LevelDamaged as error:
        return "damaged", [str(error)]
    match state.state:
        case "complete":
            return "complete", []
        case "stale":
            # The level below has the same name and other values, for example of another device.
            parent = state.parent or {}
            below = LevelKey(**{k: parent[k] for k in ("depth", "fingerprint", "split", "view")})
            now = {"content_root": store.state(below).content_root}
            changed = differences({"content_root": parent["content_root"]}, now)
            return "stale", [f"{below.label} was written again with other values:", *changed]
        case "partial":
            return "partial", [f"{state.rows:,} rows are written"]
    last = run.features(key.depth) if key.depth else None
    if last and last["fingerprint"] == key.fingerprint and key.name in last["levels"]:
        return "absent", ["it was written, and removed since; `materialize` makes it again"]
    now = run.lineage(key.depth)
    other = _nearest(store, key, now, last["fingerprint"] if last else None, left_out)
    if other is None:
        return "absent", ["it was never written"]
    name, was = other
    return "stale", [f"{name} is there, but was made otherwise:", *compare(was, now)]


def _nearest(
    store: Store, key: LevelKey, now: Lineage, last: str | None, left_out: list[str]
) -> tuple[str, Lineage] | None:
    """The directory and lineage in the store, of the same depth, split and view, that the run wrote
    last (``last``: its fingerprint), or else that differs least from ``now``."""
    last = last and depth_directory(store.root, key.depth, last).name

    def entry(directory: Path) -> tuple[bool, int, str, Lineage]:
        was = read_lineage(directory.parent, store.files)
        name = directory.parent.name
        return name != last, len(compare(was, now)), name, was

    there = level_directories(store.root, store.files, left_out)
    same = (one for one in there if one.match(f"x_{key.depth}-*/{key.name}"))
    found = list(readable(same, entry, left_out))
    return min(found, key=lambda entry: entry[:3])[2:] if found else None


def compare(was: Lineage, now: Lineage) -> list[str]:
    """Where two lineages differ: ``"x_1 weights: was …, is …"``. That a parent has another name is
    a consequence, not a reason."""
    lines = []
    for depth, (before, after) in enumerate(zip(was, now, strict=False)):
        found = differences(before | {"parent": None}, after | {"parent": None})
        lines += [f"x_{depth} {line}" for line in found]
    return lines
