"""A record that matches its own hash, and of which a field has another type, is damage."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Place, here, tiny

from strata.store.files.publish import sealed, unseal

TEXT = tiny(flip="false", layers=2, downsample="[]", epochs=1, precision="uint8")
MADE = (
    ("run",),
    ("materialize", "--layer", 2),
    ("probe",),
    ("baseline",),
    ("final", "--vary", "schedule.lr=0.1"),
)
RECORDS = (
    *("run.json", "data.json", "evaluation.json", "layer_2/layer.json", "layer_2/features.json"),
    *("layer_1/quantiser.json", "probe_2/linear/result.json", "baseline/plain/result.json"),
    *("sweep_final/lr=0.1/result.json", "../store/runs/*.json", "../store/sources/*.json"),
    *(f"../store/x_{j}-*/{name}" for j in (0, 2) for name in ("intent.json", "test/COMMIT.json")),
    "../store/x_2-*/test/receipts/000000.json",
)
"""One of every kind, by its place in the run."""
OTHERS = (..., None, True, 7, 1.5, "x", [], {})
"""What a field may hold instead; ``...``: it is gone."""
COMMANDS = (
    *(("status",), ("plan",), ("report",), ("evaluate",), ("verify", "--deep"), ("statistics",)),
    *(("explain", "--layer", 1), ("explain", "--layer", 2), ("clean", "--dry-run"), ("run",)),
    *(("probe",), ("final", "--vary", "schedule.lr=0.1"), ("baseline",), ("audit", "--rows", 5)),
    *(("materialize", "--layer", 2), ("evict", "--layer", 2), ("export", "--to", "exported")),
    *(("du",), ("gc",), ("gc", "--delete")),
)
DRAWN = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that has a record of every kind. Not to be changed."""
    place = Place(tmp_path_factory.mktemp("sound") / "place")
    place.root.mkdir()
    (place.root / "tiny.toml").write_text(TEXT)
    for words in MADE:
        assert place.do(*words).rc == 0  # pyright: ignore[reportArgumentType]
    return place


def fields(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value has parts; of a list the first entry stands for all."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, one in inside:
        yield (*at, key)
        if isinstance(one, dict | list):
            yield from fields(one, (*at, key))


def changed(body: Any, at: tuple[Any, ...], new: Any) -> Any:
    """The body with another value in a field."""
    if not at:
        return new
    one = body.copy()
    one[at[0]] = changed(one[at[0]], at[1:], new)
    if one[at[0]] is ...:
        del one[at[0]]
    return one


def forgeries(place: Place) -> list[tuple[str, tuple[Any, ...], Any]]:
    """Every record with every field of every other type: its pattern, the field, and the value."""
    found = []
    for pattern in RECORDS:
        body = unseal(next(place.run.glob(pattern)))
        for at, new in itertools.product(fields(body), OTHERS):
            was = body
            for key in at:
                was = was[key]
            if type(was) is not type(new):
                found.append((pattern, at, new))
    return found


def test_commands_end_in_one_line_whatever_type_a_field_has(sound: Place, tmp_path: Path) -> None:
    draw = random.Random(0)
    for n, (pattern, at, new) in enumerate(draw.sample(forgeries(sound), DRAWN)):
        place = sound.copy(tmp_path / str(n))
        path = next(place.run.glob(pattern))
        path.write_bytes(sealed(changed(unseal(path), at, new)))
        for command, *more in draw.sample(COMMANDS, 3):
            own = ("--store", place.store) if command in ("du", "gc") else place.options
            said = here(command, *own, *(place.root / "to" if w == "exported" else w for w in more))
            lines = [line for line in said.err.splitlines() if line.startswith("Error: ")]
            assert len(lines) == bool(said.rc), (path, at, new, command, said.err)
