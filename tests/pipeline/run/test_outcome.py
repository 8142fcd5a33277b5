"""What a step was expected to take stands beside what it took, and says when it means nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from root import ROOT
from runs import here, tiny

MACHINE = ROOT / "docs/machines/laptop.toml"


def do(place: Path, command: str, *more: object) -> None:
    where = ("--run", place / "run", "--store", place / "store")
    done = here(command, place / "tiny.toml", *where, *more)
    assert done.rc == 0, done.err


def outcomes(place: Path) -> dict[str, dict[str, Any]]:
    do(place, "report")
    found = json.loads((place / "run" / "report.json").read_text("utf-8"))["outcomes"]
    return {outcome.pop("step"): outcome for outcome in found}


@pytest.mark.parametrize(
    ("precision", "views", "cache"),
    [("float16", '"canvas"', "always"), ("uint8", 2, "always"), ("float16", '"canvas"', "never")],
)
def test_bytes_and_peaks_are_as_expected(
    tmp_path: Path, precision: str, views: object, cache: str
) -> None:
    (tmp_path / "tiny.toml").write_text(tiny(precision=precision, views=views), "utf-8")
    do(tmp_path, "run", "--cache", cache)
    do(tmp_path, "materialize", "--layer", 3)
    found = outcomes(tmp_path)
    written = [1, 2, 3] if cache == "always" else [1, 2, 3][-1:]
    assert set(found) >= {f"solve layer {j}" for j in (1, 2, 3)} | {f"write x_{j}" for j in written}
    for step, outcome in found.items():
        expected, measured = outcome["expected"], outcome["measured"]
        assert outcome["whole"]
        assert expected["seconds"] is None, "nothing is known of this machine"
        assert measured["seconds"] > 0
        assert expected["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.15), step
        if step.startswith("write"):
            assert expected["bytes"] == pytest.approx(measured["bytes"], rel=0.02), step


@pytest.mark.parametrize(("precision", "views"), [("float16", '"canvas"'), ("uint8", 2)])
def test_a_divided_step_computes_its_features_meanwhile(
    tmp_path: Path, precision: str, views: object
) -> None:
    """Frozen layers are in memory too, where a micro-batch is computed inside the step."""
    text = tiny(precision=precision, views=views)
    divided = text.replace("batch = 64", "batch = 64\naccumulate = 4")
    (tmp_path / "tiny.toml").write_text(divided, "utf-8")
    do(tmp_path, "run", "--cache", "never")
    for step, outcome in outcomes(tmp_path).items():
        expected, measured = outcome["expected"]["peak_bytes"], outcome["measured"]["peak_bytes"]
        assert expected == pytest.approx(measured, rel=0.15), step


def test_seconds_are_expected_where_rates_are_known(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(tiny(layers=2), "utf-8")
    do(tmp_path, "run", "--machine", MACHINE)
    for outcome in outcomes(tmp_path).values():
        assert outcome["expected"]["seconds"] > 0
        assert outcome["rates"] == "data sheets"


def test_what_was_taken_up_is_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process did not do all of it, so its seconds are not compared."""
    (tmp_path / "tiny.toml").write_text(tiny(layers=2, epochs=3), "utf-8")
    with monkeypatch.context() as patched:
        patched.setattr("strata.pipeline.train.solving.CHECKPOINT_SECONDS", 0.0)
        patched.setattr("strata.pipeline.train.train.conclude", _killed)
        with pytest.raises(ZeroDivisionError):
            do(tmp_path, "train", "--layer", 1)
    do(tmp_path, "train", "--layer", 1)
    (outcome,) = outcomes(tmp_path).values()
    assert not outcome["whole"]
    assert outcome["measured"]["seconds"] > 0


def _killed(*_: object) -> None:
    raise ZeroDivisionError
