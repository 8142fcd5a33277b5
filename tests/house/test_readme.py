"""The README tells the truth: commands run, numbers come from result files, the tree is whole."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command import CLI

ROOT = CLI.parent
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def commands() -> list[str]:
    """Every line of the ```sh blocks that calls the command line."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python cli.py")]


def test_the_readme_shows_the_commands_people_start_with() -> None:
    shown = " ".join(commands())
    for word in ("run digits", "materialize --layer 3", "status", "plan cifar10-k1", "report"):
        assert word in shown


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order(tmp_path: Path) -> None:
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


def row(mode: str) -> str:
    """The README's row for one mode of `cifar10-small`, from its result file."""
    result = json.loads((RESULTS / f"cifar10-small-{mode}-seed0.json").read_text("utf-8"))
    accuracies = [f"{100 * layer['test_top1']:.1f}" for layer in result["layers"]]
    ensemble = f"**{100 * result['layers'][-1]['ensemble_top1']:.1f}**"
    minutes = f"{result['wall_seconds'] / 60:.1f} min"
    features = f"{sum(layer['bytes'] for layer in result['layers']) / 1e9:.1f} GB"
    return f"| {mode} | {' | '.join(accuracies)} | {ensemble} | {minutes} | {features} |"


def test_the_first_minutes_are_as_long_as_the_readme_says() -> None:
    found = json.loads((RESULTS / "first-minutes.json").read_text("utf-8"))
    looking = [s for name, s in found["median_seconds"].items() if name != "import torch"]
    assert found["seconds_run_digits"] < 90
    assert max(looking) < 0.5
    assert found["digits_test_top1"][-1] >= 0.97
    assert f"takes {found['seconds_run_digits']:.0f} s on two CPU cores" in README
    assert f"reaches {100 * found['digits_test_top1'][-1]:.1f} %" in README
    assert f"take {max(looking):.1f} s, without importing torch" in README


DURABILITY = json.loads((RESULTS / "durability.json").read_text("utf-8"))


def durability_rows() -> list[str]:
    """The README's table of how the store was broken, from the result file."""
    crash, kills, corruption, cost = (
        DURABILITY[part] for part in ("crash", "kills", "corruption", "cost")
    )
    broken, cases = crash["broken"], corruption["cases"]
    ratios = [cost[f"{n} KB rows"]["ratio_committed_to_bare"] for n in (128, 8)]
    return [
        f"| {crash['trials']:,} simulated crashes | {broken['wrong read']} wrong reads, "
        f"{broken['lost commit']} lost commits; {len(crash['mutants'])} wrong protocols caught |",
        f"| {kills['kills']} runs killed with -9, and resumed | {kills['different']} of "
        f"{kills['stories']} with other bytes in a level or in the weights |",
        f"| {cases:,} damages: flipped bits, lost and swapped shards, … | "
        f"{cases - corruption['not named']:,} named, {cases - corruption['not mended']:,} mended "
        f"to the same bytes, {corruption['wrong rows read']} read as data |",
        "| bytes per second against a bare write with fsync | "
        f"{ratios[0]:.2f} (rows of 128 KB), {ratios[1]:.2f} (8 KB) |",
    ]


@pytest.mark.parametrize("number", range(4))
def test_the_table_of_durability_is_what_the_result_file_says(number: int) -> None:
    assert durability_rows()[number] in README


def test_the_committed_results_of_durability_hold_their_claim() -> None:
    assert [part for part, found in DURABILITY.items() if not found["holds"]] == []
    assert DURABILITY["crash"]["trials"] >= 20_000
    assert DURABILITY["kills"]["kills"] >= 200
    assert DURABILITY["corruption"]["cases"] >= 2_000


@pytest.mark.parametrize("mode", ["canvas", "fresh"])
def test_the_table_is_what_the_result_files_say(mode: str) -> None:
    assert row(mode) in README


def test_the_committed_result_holds_its_claim() -> None:
    """At least 74 %, each layer better than the one before, under 25 minutes, all images."""
    result = json.loads((RESULTS / "cifar10-small-canvas-seed0.json").read_text("utf-8"))
    accuracies = [layer["test_top1"] for layer in result["layers"]]
    assert len(accuracies) >= 3
    assert accuracies == sorted(set(accuracies))
    assert result["layers"][-1]["ensemble_top1"] >= 0.74
    assert result["wall_seconds"] < 25 * 60
    assert (result["data"]["train"], result["data"]["test"]) == (50_000, 10_000)


def test_the_fresh_recipe_differs_in_its_views_alone() -> None:
    from strata.pipeline.recipe.builtin import load
    from strata.pipeline.recipe.recipe import parse
    from strata.store.fingerprint import differences

    text = (ROOT / "benchmarks" / "cifar10-small-fresh.toml").read_text("utf-8")
    _, small = load("cifar10-small")
    found = differences(small.science(), parse(text, "fresh").science())
    assert found == ['augment.views: was "canvas", is 0']


def test_every_file_has_its_line_in_the_tree() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.j2"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    tree = README.split("## Every file")[1]
    missing = [f for f in listed if not f.endswith("__init__.py") and Path(f).name not in tree]
    assert missing == []
