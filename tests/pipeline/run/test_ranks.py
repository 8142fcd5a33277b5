"""Several ranks: the steps of one process, stopped and resumed with any number of them."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from axes import forms
from command import TIMEOUT, recipe, strata
from root import CLI
from safetensors.torch import load_file
from torchrun import steps, torchrun, with_ranks

from strata.pipeline.errors import OptionRange
from strata.pipeline.run import ranks
from strata.stages.errors import StageError
from strata.stages.solve.ranks import Ranks

RANK = Path(sys.modules[steps.__module__].__file__ or "")
EPOCHS = 3


# ---- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "accumulate", "choices"),
    [
        ("norm", 3, "none"),
        ("plain", 2, "choices"),
        *(
            pytest.param(*how, "none", marks=pytest.mark.slow)
            for how in (("norm", 1), ("plain", 2))
        ),
    ],
    ids=str,
)
def test_every_step_is_that_of_one_process(
    tmp_path: Path, norm: str, accumulate: int, choices: str
) -> None:
    """Weights, moments, running statistics, loss and hits; batch norm sees whole micro-batches, and
    rows are mixed with those of other ranks."""
    with torchrun(tmp_path, 2, RANK, tmp_path, norm, accumulate, choices) as process:
        _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    how = {"norm": norm == "norm", "accumulate": accumulate, "choices": choices == "choices"}
    alone = steps(Ranks(), **how)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for mine, other, theirs in zip(first, second, alone, strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], other[name]), name
            torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_a_norm_without_averages_is_named() -> None:
    network = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(2, affine=False))
    with pytest.raises(StageError, match=r"^1 is BatchNorm2d.*several ranks need"):
        Ranks(count=2).share_norms(network, torch.device("cpu"))


# ---- commands -----------------------------------------------------------------------------------


def small(cwd: Path) -> Path:
    """At a rate at which rounding does not decide where a run ends."""
    return Path(recipe(cwd, network__layers=2, schedule__epochs=EPOCHS, schedule__lr=0.01))


def layer(cwd: Path, j: int) -> dict[str, torch.Tensor]:
    return load_file(cwd / f"runs/tiny/0/layer_{j}/weights.safetensors")


def curve(cwd: Path, j: int) -> np.ndarray:
    lines = (cwd / f"runs/tiny/0/layer_{j}/epochs.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["train_loss"] for line in lines])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, solved by one process."""
    cwd = tmp_path_factory.mktemp("alone")
    assert strata(cwd, "run", small(cwd)).rc == 0
    return cwd


def close(cwd: Path, alone: Path) -> None:
    """The same run but for the order in which floats were added."""
    for j in (1, 2):
        np.testing.assert_allclose(curve(cwd, j), curve(alone, j), rtol=2e-3)
    for name, tensor in layer(alone, 1).items():
        torch.testing.assert_close(layer(cwd, 1)[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
def test_two_ranks_make_the_run_of_one(tmp_path: Path, alone: Path) -> None:
    rc, out, err = with_ranks(tmp_path, 2, "run", small(tmp_path), "--json")
    assert rc == 0, err
    done = json.loads(out)["done"]  # of one rank: the other says nothing
    assert done == ["read images into x_0", "solve layer 1", "write x_1", "solve layer 2"]
    close(tmp_path, alone)
    again = strata(tmp_path, "run", small(tmp_path), "--json")
    assert again.json["done"] == []


@pytest.mark.slow
def test_two_ranks_train_on_samples_of_any_axes(tmp_path: Path) -> None:
    """Tokens, a grid of them, a volume, a series; their levels are written by one rank. A batch
    norm of one or three dimensions sees whole batches, too."""
    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        place.mkdir()
        text = forms(place, "float32", views=2, epochs=EPOCHS)
        (place / "tiny.toml").write_text(text.replace("lr = 0.1", "lr = 0.01"))
    assert strata(one, "run", "tiny.toml").rc == 0
    rc, _, err = with_ranks(two, 2, "run", "tiny.toml")
    assert rc == 0, err
    for j in range(1, 6):
        np.testing.assert_allclose(curve(two, j), curve(one, j), rtol=2e-3)
        if j <= 3:
            assert curve(two, j)[0] == pytest.approx(curve(one, j)[0], rel=1e-6)


@pytest.mark.slow
def test_stopped_with_two_ranks_and_ended_by_one(tmp_path: Path, alone: Path) -> None:
    """torchrun passes Ctrl-C on; the leader saves after the batch that both have taken."""
    checkpoint = tmp_path / "runs/tiny/0/layer_1/checkpoint.safetensors"
    with torchrun(tmp_path, 2, CLI, "run", small(tmp_path)) as process:
        assert process.stderr
        for line in process.stderr:
            if "layer 1, epoch 1" in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT)
    assert checkpoint.exists()
    last = strata(tmp_path, "run", small(tmp_path))
    assert last.rc == 0
    assert "layer 1: going on in epoch" in last.err
    close(tmp_path, alone)


@pytest.mark.slow
def test_parts_that_cannot_be_equal_are_refused(tmp_path: Path) -> None:
    rc, _, err = with_ranks(tmp_path, 3, "train", small(tmp_path), "--layer", 1)
    assert rc == 1  # torchrun's own, whatever ours was
    assert "Error: rank 1: " in err
    assert "3 ranks cannot have equal parts of a batch of 64. Start a number of processes" in err


def test_the_bounds_of_parts() -> None:
    ranks.check_parts(64, 2, 4)
    ranks.check_parts(7, 3, 1)
    with pytest.raises(OptionRange, match=r"in 3 micro-batches.*that divides 21"):
        ranks.check_parts(64, 3, 2)


def test_a_command_for_one_process_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = strata(tmp_path, "sweep", small(tmp_path), "--layer", 1, "--vary", "lr=0.1")
    assert done.rc == 2
    assert "torchrun started 2 processes, and this command is for one" in done.err
