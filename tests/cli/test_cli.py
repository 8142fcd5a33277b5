"""The commands, one after another, on one tiny run: what they do, skip, say and leave on disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from command import Result, depths, environment, recipe, shards
from runs import inside

from strata import cli
from strata.pipeline.options import Options
from strata.pipeline.recipe.builtin import names

TODO = [
    "read images into x_0",
    "solve layer 1",
    "write x_1",
    "solve layer 2",
    "write x_2",
    "solve layer 3",
]
HEAVY = ("torch", "torchvision", "zarr", "dask", "matplotlib", "sklearn")


@dataclass
class Story:
    """Commands in one directory: what each said, and what lay on disk after it."""

    cwd: Path
    said: dict[str, Result] = field(default_factory=dict)
    depths: dict[str, list[str]] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)

    def do(self, name: str, command: str, *arguments: object) -> Result:
        self.said[name] = inside(self.cwd, command, *arguments)
        self.depths[name] = depths(self.cwd / "features")
        return self.said[name]


def life(cwd: Path) -> Story:
    """A run from its first command to its last."""
    story, tiny, store, run = Story(cwd), recipe(cwd), cwd / "features", cwd / "runs/tiny/0"
    do, seen = story.do, story.seen
    do("run", "run", tiny, "--json")
    do("run again", "run", tiny)
    do("status", "status", tiny, "--json")
    do("status for people", "status", tiny)
    do("plan", "plan", tiny, "--json")
    seen["shards"] = shards(store)
    do("report", "report", tiny)
    seen["page"] = (run / "report.html").read_text()
    seen["report"] = json.loads((run / "report.json").read_text())
    do("evaluate", "evaluate", tiny, "--json")
    do("x_3", "materialize", tiny, "--layer", 3, "--json")
    seen["x_3"] = shards(store, "x_3-*")
    do("x_3 again", "materialize", tiny, "--layer", 3)
    do("dry run again", "materialize", tiny, "--layer", 3, "--dry-run")
    do("clean x_2", "clean", tiny, "--layer", 2, "--features")
    do("x_3 without x_2", "materialize", tiny, "--layer", 3, "--json")
    do("clean x_3", "clean", tiny, "--layer", 3, "--features")
    do("x_3 anew", "materialize", tiny, "--layer", 3, "--json")
    seen["x_3 anew"] = shards(store, "x_3-*")
    do("other seed", "train", tiny, "--layer", 1, "--seed", 1, "--json")
    do("status of other seed", "status", tiny, "--seed", 1, "--json")
    do("clean, dry", "clean", tiny, "--yes", "--dry-run")
    do("clean, not confirmed", "clean", tiny)
    seen["not removed"] = (run / "layer_1/weights.safetensors").exists()
    do("clean", "clean", tiny, "--yes")
    seen["removed"] = not run.exists()
    return story


def thrift(cwd: Path) -> Story:
    """Nothing is made at first; then a run on a disk that cannot hold all of its levels."""
    story = Story(cwd)
    four = recipe(cwd, "four", network__layers=4, schedule__epochs=1)
    story.do("dry run", "materialize", four, "--layer", 3, "--dry-run")
    story.seen["after dry run"] = [path.name for path in cwd.iterdir()]
    plan = story.do("plan", "plan", four, "--json").json
    budget = (plan["peak_bytes"] + plan["total_bytes"]) // 2
    story.do("plan within", "plan", four, "--disk-budget", budget)
    story.do("run", "run", four, "--disk-budget", budget)
    story.do("run again", "run", four, "--disk-budget", budget, "--json")
    return story


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return life(tmp_path_factory.mktemp("life"))


@pytest.fixture(scope="module")
def thrifty(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return thrift(tmp_path_factory.mktemp("thrift"))


# ---- run, and what it need not do again ---------------------------------------------------------


def test_a_dry_run_in_an_empty_directory_lists_everything_and_makes_nothing(thrifty: Story) -> None:
    steps = [f"would {step}" for step in (*TODO, "write x_3")]
    assert thrifty.said["dry run"].out.splitlines() == steps
    assert thrifty.seen["after dry run"] == ["four.toml"]


def test_run_says_what_it_did(story: Story) -> None:
    assert story.said["run"].json["done"] == TODO
    assert story.said["run"].err == "", "--json is for machines: nothing on stderr"
    assert story.depths["run"] == ["x_0", "x_1", "x_2"], "x_3 is written only when asked for"


def test_a_second_run_does_nothing_and_says_so(story: Story) -> None:
    again = story.said["run again"]
    assert again.rc == 0
    assert again.out.splitlines()[0] == "nothing to do: everything is there"
    assert [f"layer {j}: solved already" for j in (1, 2, 3)] == again.err.splitlines()


def test_the_plan_is_what_lies_on_disk_afterwards(story: Story) -> None:
    plan = story.said["plan"].json
    planned = {f"x_{d['depth']}": d["levels"] for d in plan["depths"][:3]}
    found: dict[str, dict[str, int]] = {}
    for path, data in story.seen["shards"].items():
        directory, level, *_ = path.split("/")
        of_depth = found.setdefault(directory.split("-")[0], {})
        of_depth[level] = of_depth.get(level, 0) + len(data)
    assert planned == found
    assert plan["total_bytes"] == sum(map(len, story.seen["shards"].values()))
    assert plan["peak_bytes"] == plan["total_bytes"], "two neighbours are all of three layers"
    assert plan["todo"] == []


def test_the_plan_counts_as_by_hand(story: Story) -> None:
    one = story.said["plan"].json["depths"][1]
    assert one["shape"] == [8, 12, 12]
    assert one["bytes_one_view"] == 1437 * 8 * 8 * 8 * 4
    assert one["parameters"] == 9 * 8 + 2 * 8
    assert one["auxiliary_parameters"] == 9 * 8 * 8 + 2 * 8 + (2 * 2 * 8 + 1) * 10
    assert one["steps"] == 2 * (1437 // 64)
    forward = 64 * 9 * 8 + 64 * 9 * 8 * 8 + 2 * 2 * 8 * 10
    assert one["operations"] == 3 * forward * 2 * 1437


# ---- looking ------------------------------------------------------------------------------------


def test_status_has_the_fields_that_scripts_rely_on(story: Story) -> None:
    status = story.said["status"].json
    assert (status["recipe"], status["run"], status["store"]) == ("tiny", "runs/tiny/0", "features")
    assert status["exists"] is True
    assert status["seed"] == 0
    layer_keys = {"layer", "state", "trained", "test_accuracy", "ensemble_accuracy", "levels"}
    layer_keys |= {"test", "ensemble"}
    level_keys = {"split", "view", "level", "state", "rows", "bytes", "fingerprint"}
    assert [set(layer) for layer in status["layers"]] == [layer_keys] * 3
    levels = [*status["images"], *(lv for layer in status["layers"] for lv in layer["levels"])]
    assert [set(level) for level in levels] == [level_keys] * 8


def test_status_says_what_is_there(story: Story) -> None:
    status = story.said["status"].json
    assert [(layer["layer"], layer["state"], layer["trained"]) for layer in status["layers"]] == [
        (j, "solved", True) for j in (1, 2, 3)
    ]
    assert all(0.2 < layer["test_accuracy"] <= 1 for layer in status["layers"])
    assert all(0.2 < layer["ensemble_accuracy"] <= 1 for layer in status["layers"])
    per_depth = [status["images"], *(layer["levels"] for layer in status["layers"])]
    for levels, state in zip(per_depth, ["complete"] * 3 + ["absent"], strict=True):
        assert [level["state"] for level in levels] == [state] * 2
        assert [level["rows"] for level in levels] == (
            [1437, 360] if state == "complete" else [0, 0]
        )
    splits = [(level["split"], level["view"]) for level in per_depth[1]]
    assert splits == [("train", "plain"), ("test", "clean")]
    names = {path.split("/")[0] for path in story.seen["shards"]}
    told = {f"x_{d}-{lv['fingerprint'][:12]}" for d in range(3) for lv in per_depth[d]}
    assert told == names


def test_status_for_people_shows_the_same(story: Story) -> None:
    text = story.said["status for people"].out
    status = story.said["status"].json
    for layer in status["layers"]:
        assert f"{100 * layer['test_accuracy']:.2f} %" in text
        assert layer["levels"][0]["fingerprint"][:12] in text


def test_evaluate_agrees_with_status(story: Story) -> None:
    result, status = story.said["evaluate"].json, story.said["status"].json
    assert result["samples"] == 360
    for layer, known in zip(result["layers"], status["layers"], strict=True):
        assert layer["test"]["top1"] == known["test_accuracy"]
        assert layer["ensemble"]["probabilities"]["top1"] == known["ensemble_accuracy"]
        assert layer["test"]["top5"] >= layer["test"]["top1"]
    assert sum(map(sum, result["confusion"]["matrix"])) == 360


def test_the_report_is_one_file_that_needs_no_other(story: Story) -> None:
    assert story.said["report"].out.endswith("report: runs/tiny/0/report.html\n")
    assert "solve layer 1" in story.said["report"].out
    page = story.seen["page"]
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']*""", page) == []
    assert re.findall(r"@import|url\((?!#|data:)", page) == []
    assert "<svg" in page or "data:image" in page
    assert len(story.seen["report"]["layers"]) == 3
    assert [len(layer["epochs"]) for layer in story.seen["report"]["layers"]] == [2, 2, 2]


# ---- levels come and go -------------------------------------------------------------------------


def test_materialize_writes_the_one_level_that_is_missing(story: Story) -> None:
    assert story.said["x_3"].json["done"] == ["write x_3"]
    assert story.depths["x_3"] == ["x_0", "x_1", "x_2", "x_3"]


def test_materialize_again_says_that_there_is_nothing_to_do(story: Story) -> None:
    again = story.said["x_3 again"]
    assert again.out == "nothing to do: everything is there\n"
    assert "x_3: complete already" in again.err.splitlines()
    assert story.said["dry run again"].out == "x_3 is complete: nothing to do\n"


def test_a_level_that_nobody_needs_is_not_made_again(story: Story) -> None:
    assert story.said["clean x_2"].out.startswith("removed x_2-")
    assert story.depths["clean x_2"] == ["x_0", "x_1", "x_3"]
    assert story.said["x_3 without x_2"].json["done"] == []


def test_a_removed_level_comes_back_byte_for_byte_without_the_one_below(story: Story) -> None:
    assert story.depths["clean x_3"] == ["x_0", "x_1"]
    assert story.said["x_3 anew"].json["done"] == ["write x_3"]
    assert story.depths["x_3 anew"] == ["x_0", "x_1", "x_3"]
    assert len(story.seen["x_3"]) >= 5, "several shards"
    assert story.seen["x_3 anew"] == story.seen["x_3"]


def test_train_stops_at_the_layer_asked_for_and_seeds_share_the_images(story: Story) -> None:
    assert story.said["other seed"].json["done"][-1] == "solve layer 1"
    states = [layer["state"] for layer in story.said["status of other seed"].json["layers"]]
    assert states == ["solved", "absent", "absent"]
    assert story.depths["other seed"] == ["x_0", "x_1", "x_3"], "one x_0 for both"


def test_clean_asks_first_and_then_removes_the_run(story: Story) -> None:
    named = r"x_1-\w{12}, x_3-\w{12}, layer 1, layer 2, layer 3 \([\d.]+ MB\)"
    assert re.fullmatch(f"would remove {named}\n", story.said["clean, dry"].out)
    assert story.said["clean, not confirmed"].rc == 1
    assert story.seen["not removed"]
    assert re.fullmatch(f"removed {named}\n", story.said["clean"].out)
    assert story.seen["removed"]
    assert story.depths["clean"] == ["x_0"], "the images may be another run's"


def test_a_tight_disk_budget_removes_each_level_once_the_next_is_complete(thrifty: Story) -> None:
    plan, run = thrifty.said["plan"].json, thrifty.said["run"]
    assert plan["peak_bytes"] < plan["total_bytes"]
    told = "Within --disk-budget only if levels are removed once unneeded"
    assert told in thrifty.said["plan within"].out
    assert run.rc == 0, run.err
    assert run.err.index("wrote x_2 test") < run.err.index("removed x_1,")
    assert run.err.index("removed x_1,") < run.err.index("layer 3, epoch 1")
    assert thrifty.depths["run"] == ["x_0", "x_3"]
    assert thrifty.said["run again"].json["done"] == [], "what was removed is not wanted back"


# ---- built-in recipes ---------------------------------------------------------------------------


def test_recipes_lists_all_with_their_claims(tmp_path: Path) -> None:
    found = inside(tmp_path, "recipes", "--json").json
    assert list(found) == names()
    assert all(found.values())
    text = inside(tmp_path, "recipes").out
    assert [name for name in names() if f" {name} " not in text] == []


def test_the_plan_of_the_paper_needs_no_data(tmp_path: Path) -> None:
    plan = inside(tmp_path, "plan", "cifar10-k1")
    assert plan.rc == 0
    assert "x_1 is 26.2 GB at float16 for 50,000 images and one view" in plan.out
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_the_paper_is_shown_and_refused_on_a_small_disk(tmp_path: Path) -> None:
    told = inside(tmp_path, "plan", "cifar10-k1", "--disk-budget", "20GB")
    assert told.rc == 5
    assert told.err == told.error + "\n"
    assert ["20.0 GB" in told.error, "180.4 GB" in told.error] == [True, True]
    assert "256×40×40" in told.out


# ---- the surface --------------------------------------------------------------------------------

LIGHT = [["--help"], ["run", "--help"], ["recipes"], ["plan"], ["status"]]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_looking_does_not_wait_for_heavy_libraries(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        f"import json, sys; from strata import cli\n"
        f"try: cli.main({arguments})\n"
        f"finally: print(json.dumps([m for m in {HEAVY} if m in sys.modules]), file=sys.stderr)"
    )
    asked = [sys.executable, "-c", code]
    run = subprocess.run(asked, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout
    assert json.loads(run.stderr) == []


WHERE = {"--run", "--store", "--read-cache", "--seed", "--json"}
WORK = WHERE | {"--device", "--data", "--data-root", "--download", "--split", "--skip-broken"}
WORK |= {"--accept-data"}
MEMORY = {"--gpu-memory", "--memory-budget"}
WORK |= {"--tier", "--loader"} | MEMORY
LAYER = {"--layer", "-l"}
WORTH = {"--machine", "--problems"}
LOGS = {"--log-dir"}
SOLVING = WORTH | LOGS | {"--cache"}
NETWORK = {"--network", "--weights"}
CLUSTER = {"--workers", "--scheduler"}
OPTIONS = {
    "recipes": {"--json"},
    "init": NETWORK | {"--frozen", "--to", "--split", "--data-root", "--download", "--json"},
    "plan": WHERE | WORTH | MEMORY | {"--disk-budget", "--data", "--data-root", "--split"},
    "calibrate": WHERE | {"--device"},
    "status": WHERE,
    "train": WORK | SOLVING | LAYER,
    "materialize": WORK | SOLVING | LAYER | CLUSTER | {"--dry-run"},
    "run": WORK | SOLVING | CLUSTER | {"--disk-budget"},
    "sweep": WORK | SOLVING | LAYER | {"--vary", "--keep"},
    "final": WORK | SOLVING | {"--vary"},
    "baseline": WORK | LOGS | {"--checkpointing", "--micro-batch"},
    "probe": WORK | LAYER | {"--kind", "--p", "--of", "--transfer", "--materialize"},
    "statistics": WHERE | LAYER | CLUSTER | {"--split", "--channels"},
    "evaluate": WHERE,
    "export": WHERE | LAYER | {"--to", "--ensemble", "--features", "--final", "--onnx"},
    "report": WHERE,
    "clean": WHERE | LAYER | {"--features", "--sweeps", "--dry-run", "--yes"},
    "verify": WORK | LAYER | CLUSTER | {"--deep", "--repair"},
    "audit": WHERE
    | LAYER
    | NETWORK
    | {"--device", "--data", "--data-root", "--download", "--rows", "--draw", "--features"},
    "explain": WHERE | LAYER,
    "evict": WHERE | LAYER | {"--force"},
    "du": {"--store", "--json"},
    "gc": {"--store", "--delete", "--json"},
}
"""Every option there is: one more is a decision, to be made here."""


def test_no_command_or_option_comes_or_goes_unnoticed() -> None:
    found = {
        name: {flag for p in command.params if isinstance(p, click.Option) for flag in p.opts}
        for name, command in cli.main.commands.items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize("path", cli.COMMANDS)
def test_the_table_names_a_function_and_options_that_there_are(path: str) -> None:
    """A field of Options has the default that the command line gives it."""
    file, name = path.split(".")
    assert callable(getattr(import_module(f"strata.pipeline.commands.{file}"), name))
    command = cli.main.commands[name]
    required = [p for p in command.params if p.required]
    flags = [[p.opts[0]] * isinstance(p, click.Option) for p in required]
    words = [word for flag in flags for word in (*flag, "1")]
    given = command.make_context(name, words).params
    free = given.keys() - {p.name for p in required}
    assert {n: given[n] for n in free} == {n: getattr(Options(), n) for n in free}
