"""Runs of network files: what they print, what they read, and two recipes of one name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import recipe, strata
from networks import beside, named
from runs import inside
from torch import nn

PRINTS = """
import os
from torch import nn
print("hello")
os.system("echo from a process")
class Chatty(nn.Conv2d):
    def forward(self, x):
        print("at work")
        return super().forward(x)
def blocks(): return [Chatty(1, 4, 3, padding=1)]
"""
READS = """
import torch
from torch import nn
def blocks():
    one, two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    one.load_state_dict(torch.load("one.pt"))
    return [one, two]
"""
LATER = """
from torch import nn
class Later(nn.Conv2d):
    def forward(self, x):
        if type(x).__name__ == "Tensor" and len(x) > 2:
            raise RuntimeError("too late")
        return super().forward(x)
def blocks(): return [Later(1, 4, 3, padding=1)]
"""


def text(**changes: object) -> str:
    return named('"net.py:blocks"', **{"views": "0", "epochs": 1, **changes})


def place(folder: Path, code: str) -> Path:
    beside(folder, code, "net.py")
    (folder / "tiny.toml").write_text(text())
    return folder


def weights(path: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.save(nn.Conv2d(1, 4, 3, padding=1).state_dict(), path)


def test_what_a_network_prints_is_no_answer(tmp_path: Path) -> None:
    done = strata(place(tmp_path, PRINTS), "plan", "tiny.toml", "--json")
    assert done.json["blocks"][0]["name"] == "blocks[0] (Chatty)"
    assert {"hello", "from a process", "at work"} <= set(done.err.splitlines())


def test_reading_blocks_is_told(tmp_path: Path) -> None:
    done = inside(place(tmp_path, LATER), "plan", "tiny.toml")
    assert done.rc == 0
    assert "reading the blocks of net.py:blocks" in done.err


def test_what_fails_in_training_names_the_file_and_line(tmp_path: Path) -> None:
    done = inside(place(tmp_path, LATER), "run", "tiny.toml")
    assert (done.rc, done.error) == (
        3,
        "Error: the network's own code failed: net.py, line 6, RuntimeError: too late",
    )


def test_weights_that_a_file_loads_belong_to_the_run(tmp_path: Path) -> None:
    """Other ones are another network; without them the run goes on, here and elsewhere."""
    place(tmp_path, READS)
    weights(tmp_path / "one.pt", 1)
    assert inside(tmp_path, "train", "tiny.toml", "--layer", "1").rc == 0
    kept = json.loads((tmp_path / "runs/tiny/0/network.json").read_text())
    assert "one.pt" in str(kept)
    weights(tmp_path / "one.pt", 2)
    done = inside(tmp_path, "run", "tiny.toml")
    assert done.rc == 8
    assert f"{tmp_path / 'one.pt'} is another" in done.error
    assert "--run runs/tiny/0-2" in done.error
    (tmp_path / "one.pt").unlink()
    assert inside(tmp_path, "run", "tiny.toml").rc == 0
    assert inside(tmp_path, "materialize", "tiny.toml", "--layer", "2").rc == 0
    elsewhere = shutil.copytree(tmp_path / "runs/tiny/0", tmp_path / "moved")
    done = inside(tmp_path, "materialize", elsewhere / "recipe.toml", "--run", elsewhere, "-l", "1")
    assert done.rc == 0


def test_two_recipes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    small = {"network__layers": 1, "network__downsample": [], "schedule__epochs": 1}
    one, two = (f"{n}/{recipe(tmp_path / n, **small)}" for n in ("a", "b"))
    assert inside(tmp_path, "run", one).rc == 0
    recipe(tmp_path / "b", **{**small, "schedule__batch": 32})
    done = inside(tmp_path, "run", two)
    assert done.rc == 8
    assert "runs/tiny/0/recipe.toml" in done.error
    assert "for b/tiny.toml for example --run runs/tiny/0-2" in done.error
    assert inside(tmp_path, "run", two, "--run", "runs/tiny/0-2").rc == 0


def test_what_no_step_needs_is_not_to_be_written(tmp_path: Path) -> None:
    name = recipe(tmp_path, schedule__epochs=1)
    before = inside(tmp_path, "plan", name, "--json").json
    assert before["needed_bytes"] == before["total_bytes"]
    assert inside(tmp_path, "run", name).rc == 0
    assert inside(tmp_path, "clean", name, "--layer", "2", "--features").rc == 0
    after = inside(tmp_path, "plan", name, "--json").json
    assert (after["todo"], after["needed_bytes"]) == ([], 0)


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("schedule__lr", "inf"), ("data__mean", "[nan]"), ("data__std", "[inf]")],
)
def test_plan_refuses_what_run_refuses(tmp_path: Path, command: str, key: str, value: str) -> None:
    name = recipe(tmp_path)
    path = tmp_path / name
    key = key.replace("__", ".")
    lines = path.read_text().splitlines()
    (at,) = (n for n, line in enumerate(lines) if line.startswith(f"{key.partition('.')[2]} ="))
    lines[at] = f"{key.partition('.')[2]} = {value}"
    path.write_text("\n".join(lines))
    done = inside(tmp_path, command, name)
    assert done.rc == 3
    assert f"recipe tiny.toml: line {at + 1}: '{key}" in done.error
    assert "it must be finite" in done.error
