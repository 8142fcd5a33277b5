"""The README tells the truth: commands run, numbers come from result files, rooms are all there."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from root import CLI, ROOT

from strata import cli
from strata.pipeline.plan.plan import make_plan
from strata.pipeline.progress import size
from strata.pipeline.recipe.builtin import load

README = (ROOT / "README.md").read_text("utf-8")
PROSE = " ".join(README.split())
"""The same with every line break a space."""
TOUR = (ROOT / "docs/commands.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"
FLOORS = ("store", "stages", "pipeline")


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def section(title: str) -> str:
    """What the README has under a heading that begins so."""
    (text,) = re.findall(rf"^## {title}.*?\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    return text


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def commands() -> list[str]:
    """Every line of the sh blocks of README and docs/commands.md that calls the command line."""
    shown = "".join(block for page in (README, TOUR) for block in blocks(page, "sh"))
    lines = [line.split("  #")[0].strip() for line in shown.splitlines()]
    return [line for line in lines if line.startswith("python cli.py")]


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100] == []


def test_the_readme_shows_the_commands_people_start_with() -> None:
    shown = blocks(section("Five commands"), "sh")[0]
    for word in ("run digits", "materialize --layer 3", "status", "plan cifar10-k1", "report"):
        assert word in shown


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order(tmp_path: Path) -> None:
    """The commands of the tour after them."""
    for line in commands():
        words = shlex.split(line)
        result = subprocess.run(
            [sys.executable, str(CLI), *words[2:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, f"{line}\n{result.stderr}"
    digits = json.loads((tmp_path / "runs/digits/0/report.json").read_text("utf-8"))
    assert len(digits["layers"]) >= 3
    assert digits["layers"][-1]["ensemble"]["probabilities"]["top1"] >= 0.97


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.M))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.M)


def test_every_command_has_its_place() -> None:
    rows = [row for row in section("Commands").splitlines() if row.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert sorted(named) == sorted(cli.main.commands)


# ---- the figures ---------------------------------------------------------------------------------


def test_the_first_minutes_are_as_long_as_the_readme_says() -> None:
    found = result("first-minutes")
    looking = [s for name, s in found["median_seconds"].items() if name != "import torch"]
    assert found["seconds_run_digits"] < 90
    assert max(looking) < 0.5
    assert found["digits_test_top1"][-1] >= 0.97
    assert f"takes {found['seconds_run_digits']:.0f} s on two CPU cores" in PROSE
    assert f"reaches {100 * found['digits_test_top1'][-1]:.1f} %" in PROSE
    assert f"take {max(looking):.1f} s, without importing torch" in PROSE


def test_what_the_demo_prints_is_what_it_printed() -> None:
    shown = section("Install, and a first run")
    for layer, top1 in enumerate(result("first-minutes")["digits_test_top1"], 1):
        assert f"solved layer {layer}: test {100 * top1:.2f} %, …" in shown
    level = make_plan(load("digits")[1]).depths[1].levels["train.plain"]
    assert f"wrote x_1 train.plain: 1,437 of 1,437 rows, {size(level)}, …" in shown


def test_the_disk_of_the_largest_cifar_network_is_as_planned() -> None:
    total = make_plan(load("cifar10-k1")[1]).total
    assert f"`cifar10-k1` needs {total / 1e9:.0f} GB of disk" in PROSE


DURABILITY = result("durability")


def durability_rows() -> list[str]:
    """The README's table of how the store was broken, from the result file."""
    crash, kills, corruption, cost = (
        DURABILITY[part] for part in ("crash", "kills", "corruption", "cost")
    )
    broken, cases = crash["broken"], corruption["cases"]
    ratios = [cost[f"{n} KB rows"]["ratio_committed_to_bare"] for n in (128, 8)]
    return [
        f"| {crash['trials']:,} simulated power cuts | {broken['wrong read']} wrong reads, "
        f"{broken['lost commit']} lost commits; {len(crash['mutants'])} wrong protocols caught |",
        f"| {kills['stories']} runs, killed {kills['kills']} times with `kill -9` | "
        f"{kills['different']} ended with other bytes in levels or weights |",
        f"| {cases:,} damaged files: flipped bits, lost shards, … | "
        f"{cases - corruption['not named']:,} named, {cases - corruption['not mended']:,} "
        f"repaired, {corruption['wrong rows read']} read as data |",
        "| writing speed, against a bare write with fsync | "
        f"{ratios[0]:.2f} (rows of 128 KB), {ratios[1]:.2f} (rows of 8 KB) |",
    ]


@pytest.mark.parametrize("number", range(4))
def test_the_table_of_durability_is_what_the_result_file_says(number: int) -> None:
    assert durability_rows()[number] in README


def test_the_committed_results_of_durability_hold_their_claim() -> None:
    assert [part for part, found in DURABILITY.items() if not found["holds"]] == []
    assert DURABILITY["crash"]["trials"] >= 20_000
    assert DURABILITY["kills"]["kills"] >= 200
    assert DURABILITY["corruption"]["cases"] >= 2_000


def row(mode: str) -> str:
    """A row of docs/paper.md for one mode of `cifar10-small`, from its result file."""
    found = result(f"cifar10-small-{mode}-seed0")
    accuracies = [f"{100 * layer['test_top1']:.1f}" for layer in found["layers"]]
    ensemble = f"**{100 * found['layers'][-1]['ensemble_top1']:.1f}**"
    minutes = f"{found['wall_seconds'] / 60:.1f} min"
    features = f"{sum(layer['bytes'] for layer in found['layers']) / 1e9:.1f} GB"
    return f"| {mode} | {' | '.join(accuracies)} | {ensemble} | {minutes} | {features} |"


@pytest.mark.parametrize("mode", ["canvas", "fresh"])
def test_the_table_is_what_the_result_files_say(mode: str) -> None:
    assert row(mode) in (ROOT / "docs/paper.md").read_text("utf-8")


def test_the_readme_has_both_ways_of_the_small_network() -> None:
    last = [
        f"{100 * result(f'cifar10-small-{mode}-seed0')['layers'][-1]['test_top1']:.1f}"
        for mode in ("canvas", "fresh")
    ]
    assert f"| `cifar10-small` | 2 CPU cores, 5 a layer | 1 | {' | '.join(last)} | |" in README


def test_the_committed_result_holds_its_claim() -> None:
    """At least 74 %, each layer better than the one before, under 25 minutes, all images."""
    found = result("cifar10-small-canvas-seed0")
    accuracies = [layer["test_top1"] for layer in found["layers"]]
    assert len(accuracies) >= 3
    assert accuracies == sorted(set(accuracies))
    assert found["layers"][-1]["ensemble_top1"] >= 0.74
    assert found["wall_seconds"] < 25 * 60
    assert (found["data"]["train"], found["data"]["test"]) == (50_000, 10_000)


def test_the_fresh_recipe_differs_in_its_views_alone() -> None:
    from strata.pipeline.recipe.recipe import parse
    from strata.store.fingerprint import differences

    text = (ROOT / "benchmarks" / "cifar10-small-fresh.toml").read_text("utf-8")
    _, small = load("cifar10-small")
    found = differences(small.science(), parse(text, "fresh").science())
    assert found == ['augment.views: was "canvas", is 0']


# ---- the rooms -----------------------------------------------------------------------------------


def rooms() -> dict[str, str]:
    """Every folder of the code below a floor, and the first line of what its __init__ says."""
    found = {}
    for path in sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("__init__.py")):
        said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        found[path.parent.relative_to(ROOT).as_posix()] = said.splitlines()[0]
    return {room: said for room, said in found.items() if room not in FLOORS}


def words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


def test_every_room_has_its_line_in_the_map() -> None:
    """The first line of its docstring, or one that shares two words with it."""
    (tree,) = blocks(section("Rooms of the code"), "")
    shown = dict(line.split(maxsplit=1) for line in tree.splitlines())
    known = rooms()
    assert sorted(shown) == sorted(known)
    foreign = {
        room: known[room] for room in shown if len(words(shown[room]) & words(known[room])) < 2
    }
    assert foreign == {}
