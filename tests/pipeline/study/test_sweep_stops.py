"""A sweep that is stopped or killed, anywhere, goes on to the same bits."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
from command import recipe, strata
from interrupted import signalled
from runs import Place
from sweeps import solved, sweep, variant

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.run import weights
from strata.pipeline.train import solving


@pytest.fixture
def place(base: Place, tmp_path: Path) -> Place:
    return base.copy(tmp_path / "place")


class Killed(BaseException):
    """As sudden as a kill: nobody catches it."""


EIGHT = ("lr=0.1,0.3", "epochs=1,2", "keep=last,best", "k=2")
"""Eight variants, of one epoch and of two."""


def killed_at(monkeypatch: pytest.MonkeyPatch, count: int, place: Place, *vary: str) -> None:
    """Checkpoints after every batch; after ``count`` files, no more is written."""
    write, left = weights.write, itertools.count(-count)

    def dying(path: Path, *rest: Any) -> None:
        if next(left) == 0:
            raise Killed
        write(path, *rest)

    monkeypatch.setattr(solving, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(weights, "write", dying)
    try:
        done = sweep(place, *vary)
    except Killed:
        monkeypatch.undo()
        return
    pytest.fail(f"it ended before, with {done.rc}: {done.err}")


@pytest.mark.parametrize("counts", [(5, 3, 170), (187, 1), (203, 2, 90)])
def test_killed_between_any_two_checkpoints(
    swept: Place, place: Place, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]
) -> None:
    """The variants are then at different batches, and some are through."""
    for count in counts:
        killed_at(monkeypatch, count, place, *EIGHT)
    last = sweep(place, *EIGHT)
    assert last.rc == 0
    assert "going on in epoch" in last.err
    for path in sorted((place.run / "sweep_2").iterdir()):
        assert solved(path) == solved(variant(swept, path.name)), path.name
    assert len(list((place.run / "sweep_2").iterdir())) == 8
    assert not list(place.run.rglob("checkpoint.safetensors"))


def test_a_batch_goes_only_to_those_that_have_not_seen_it(
    swept: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variant added to others that are half way begins at its beginning."""
    few = ("lr=0.1", "epochs=2", "keep=last", "k=2")
    killed_at(monkeypatch, 30, place, *few)
    starts: list[tuple[int, int]] = []
    epoch = ProblemFeed.epoch

    def seen(self: ProblemFeed, number: int, start: int = 0) -> Any:
        starts.append((number, start))
        return epoch(self, number, start)

    monkeypatch.setattr(ProblemFeed, "epoch", seen)
    assert sweep(place, "lr=0.1,0.3", *few[1:]).rc == 0
    assert starts == [(0, 0), (1, 0)]
    for rate in ("0.1", "0.3"):
        name = f"lr={rate},epochs=2,keep=last,k=2"
        assert solved(variant(place, name)) == solved(variant(swept, name))


COMMAND = ("--layer", 1, "--vary", "lr=0.1,0.2", "--vary", "seed=0,1", "--vary", "epochs=8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cwd = tmp_path_factory.mktemp("undisturbed")
    assert strata(cwd, "sweep", recipe(cwd), *COMMAND).rc == 0
    return left_by(cwd)


def left_by(cwd: Path) -> dict[str, Any]:
    return {path.name: solved(path) for path in (cwd / "runs/tiny/0/sweep_1").iterdir()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
@pytest.mark.slow
def test_a_process_that_is_stopped_goes_on(
    undisturbed: dict[str, Any], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = ("sweep", recipe(tmp_path), *COMMAND)
    first = signalled(tmp_path, number, "layer 1, epoch 1, 4 variants", 0.05, *command)
    assert first.rc == code, first.err
    last = strata(tmp_path, *command)
    assert last.rc == 0, last.err
    if number == signal.SIGINT:
        assert "lr=0.1,epochs=8,seed=0: going on in epoch" in last.err
    assert len(undisturbed) == 4
    assert left_by(tmp_path) == undisturbed
