"""Stopped or killed at any moment, a run goes on and ends in the very same bytes."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command import recipe, strata
from interrupted import RUN, leftovers, signalled, snapshot

KILLS = 4
EPOCHS = 12
"""Of a tenth of a second: enough to be met in the middle of a layer."""


# ---- the same run, four times --------------------------------------------------------------------


def command(cwd: Path) -> list[str]:
    return ["run", recipe(cwd, schedule__epochs=EPOCHS)]


def undisturbed(cwd: Path) -> dict[str, Any]:
    result = strata(cwd, *command(cwd))
    return {"last": result, "snapshot": snapshot(cwd)}


def stopped(number: signal.Signals) -> Callable[[Path], dict[str, Any]]:
    def story(cwd: Path) -> dict[str, Any]:
        words = f"layer 2, epoch 1 of {EPOCHS}"
        first = signalled(cwd, number, words, 0.0, *command(cwd))
        checkpoint = (cwd / RUN / "layer_2/checkpoint.safetensors").exists()
        status = strata(cwd, "status", "tiny.toml", "--json")
        last = strata(cwd, *command(cwd))
        return {
            "first": first,
            "checkpoint": checkpoint,
            "status": status,
            "last": last,
            "left": leftovers(cwd),
            "snapshot": snapshot(cwd),
        }

    return story


def killed(cwd: Path) -> dict[str, Any]:
    moments = random.Random(20)
    codes, broken = [], []
    for words in ("convolutions in", "layer 1, epoch 1", "solved layer 1", "layer 2, epoch 1 of"):
        delay = moments.uniform(0.0, 0.25)  # a quick machine ends the run within a second
        codes.append(signalled(cwd, signal.SIGKILL, words, delay, *command(cwd)).rc)
        broken.append(strata(cwd, "status", "tiny.toml", "--json").rc)
    last = strata(cwd, *command(cwd))
    return {
        "codes": codes,
        "status codes": broken,
        "last": last,
        "left": leftovers(cwd),
        "snapshot": snapshot(cwd),
    }


STORIES = {
    "undisturbed": undisturbed,
    "SIGINT": stopped(signal.SIGINT),
    "SIGTERM": stopped(signal.SIGTERM),
    "SIGKILL": killed,
}


Told = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What came of one of them, which begins when somebody asks for it first."""
    return cache(lambda name: STORIES[name](tmp_path_factory.mktemp(name)))


def test_an_undisturbed_run_is_there_to_compare_with(told: Told) -> None:
    story = told("undisturbed")
    assert story["last"].rc == 0, story["last"].err
    names = list(story["snapshot"])
    assert len([name for name in names if name.startswith("shard x_")]) >= 10
    assert len([name for name in names if name.endswith("weights.safetensors")]) == 3
    assert len([name for name in names if name.endswith("auxiliary.safetensors")]) == 3
    assert len([name for name in names if name.endswith("COMMIT.json")]) == 6
    lines = story["snapshot"]["layer_3/epochs.jsonl"]
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


SIGNALS = [
    pytest.param("SIGINT", id="Ctrl-C"),
    pytest.param("SIGTERM", id="a polite kill", marks=pytest.mark.slow),
]
EVERY = [*SIGNALS, pytest.param("SIGKILL", id="four kills", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_stop_in_the_middle_of_a_layer_keeps_it(told: Told, name: str) -> None:
    story = told(name)
    assert story["first"].rc == 130, story["first"].err
    assert "the same command goes on from there" in story["first"].error
    assert story["checkpoint"]
    states = [layer["state"] for layer in story["status"].json["layers"]]
    assert states == ["solved", "partial", "absent"]


@pytest.mark.parametrize("name", SIGNALS)
def test_the_same_command_goes_on(told: Told, name: str) -> None:
    last = told(name)["last"]
    assert last.rc == 0, last.err
    lines = last.err.splitlines()
    assert "layer 1: solved already" in lines
    assert [line for line in lines if line.startswith("layer 2: going on in epoch")], last.err
    assert f"layer 2, epoch 1 of {EPOCHS}" not in last.err


@pytest.mark.slow
def test_kills_land_and_leave_a_run_that_can_be_looked_at(told: Told) -> None:
    story = told("SIGKILL")
    assert story["codes"].count(-signal.SIGKILL) >= 3, story["codes"]
    assert set(story["codes"]) <= {0, -signal.SIGKILL}
    assert story["status codes"] == [0] * KILLS
    assert story["last"].rc == 0, story["last"].err


@pytest.mark.parametrize("name", EVERY)
def test_the_end_is_the_same_to_the_byte(told: Told, name: str) -> None:
    want, found = (told(which)["snapshot"] for which in ("undisturbed", name))
    assert list(found) == list(want)
    assert [path for path in want if found[path] != want[path]] == []


@pytest.mark.parametrize("name", EVERY)
def test_nothing_half_done_is_left_behind(told: Told, name: str) -> None:
    story = told(name)
    assert story["left"] == []
