"""benchmarks/paper_tables.py: the paper's figures as printed there, ours where runs are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from root import ROOT
from runs import Place

from strata.pipeline.recipe import builtin

sys.path.insert(0, str(ROOT / "benchmarks"))

import paper_tables as paper
from paper_tables import METRICS, System


def beside(runs: Path) -> dict:
    return paper.report_paper(runs)[0]


def test_every_recipe_it_names_is_built_in() -> None:
    assert set(paper._names()) <= set(builtin.names())


def test_its_figures_are_those_that_recipes_claim() -> None:
    checked = 0
    for system in paper.systems():
        claim = builtin.load(system.recipe)[1].claim
        if system.of == "greedy" and system.top1:
            assert (claim.last, claim.ensemble) == (system.top1, system.ensemble_top1)
            checked += 1
    assert checked >= 7


def test_cifar_sums_logits_and_imagenet_probabilities() -> None:
    """Z of Sec. 3, and the authors' code."""
    kinds = {system.recipe: system.ensemble for system in paper.systems() if system.ensemble_top1}
    assert kinds["cifar10-k3"] == "logits"
    assert kinds["imagenet-k3"] == kinds["vgg11"] == "probabilities"


def test_without_runs_every_cell_of_ours_is_empty(tmp_path: Path) -> None:
    value = beside(tmp_path)
    assert len(value["rows"]) >= len(paper.systems())
    assert all(set(row["ours"].values()) == {None} for row in value["rows"])
    assert all(row["seeds"] == [] and row["date"] is None for row in value["rows"])
    assert value["figure_2"] == value["figure_3"] == value["left_out"] == []
    command = [sys.executable, str(ROOT / "benchmarks/paper_tables.py"), "--runs", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "88.3 (88.4)" in said
    assert "69.7 (71.6)" in said


def test_networks_that_a_gpu_trained_stand_beside_the_paper_s() -> None:
    """The committed result: a row for each way and number of epochs, and what it lacks is empty."""
    known = json.loads(paper.TRAINED.read_text("utf-8"))["runs"]
    rows = paper.report_paper(ROOT / "nowhere", paper.TRAINED)[0]["rows"]
    found = {row["data"]: row for row in rows if row["recipe"] == "cifar10-k1" and row["data"]}
    canvas = found["CIFAR-10 (JPEG), canvas, 8 epochs"]
    top1 = known["k1-canvas, 8 epochs, seed 0"]["layers"][-1]["top1"]
    assert canvas["ours"]["top1"] == {"mean": round(100 * top1, 2), "deviation": None}
    assert canvas["paper"]["top1"] == 88.3
    assert found["CIFAR-10 (JPEG), end-to-end, 8 epochs"]["of"] == "baseline"


@pytest.fixture
def runs(sound: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds of a recipe that the paper's tables then have, and it alone."""
    text = (sound.root / "tiny.toml").read_text("utf-8")
    monkeypatch.setattr(paper, "systems", lambda: [System("Table 9", "tiny", "tiny", top1=50.0)])
    monkeypatch.setattr(paper, "PROGRESS", ("tiny",))
    monkeypatch.setattr(builtin, "text_of", lambda name: (name, text, sound.root))
    for seed in (0, 1):
        shutil.copytree(sound.run, tmp_path / "tiny" / str(seed))
    return tmp_path


def test_ours_is_the_mean_over_seeds_of_the_evaluation(runs: Path, sound: Place) -> None:
    (row,) = beside(runs)["rows"]
    report = sound.do("evaluate", "--json").json["layers"]
    assert row["ours"]["top1"] == {
        "mean": round(100 * report[-1]["test"]["top1"], 2),
        "deviation": 0.0,
    }
    joint = report[-1]["ensemble"]["probabilities"]["top1"]
    assert row["ours"]["ensemble_top1"]["mean"] == pytest.approx(100 * joint, abs=0.005)
    assert row["paper"] == dict.fromkeys(METRICS) | {"top1": 50.0}
    (figure,) = beside(runs)["figure_2"]
    wanted = [layer["test"]["top5"] for layer in report]
    assert figure["top5"] == [None if v is None else round(100 * v, 2) for v in wanted]


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_an_ensemble_sums_what_the_system_names(
    runs: Path, sound: Place, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    system = System("Table 9", "tiny", "tiny", ensemble=kind)
    monkeypatch.setattr(paper, "systems", lambda: [system])
    (row,) = beside(runs)["rows"]
    joint = sound.do("evaluate", "--json").json["layers"][-1]["ensemble"][kind]["top1"]
    assert row["ours"]["ensemble_top1"]["mean"] == pytest.approx(100 * joint, abs=0.005)


def test_another_recipe_of_that_name_is_left_out_and_named(runs: Path) -> None:
    path = runs / "tiny/1/recipe.toml"
    path.write_text(path.read_text("utf-8").replace("epochs = ", "epochs = 1"), "utf-8")
    value = beside(runs)
    assert value["rows"][0]["seeds"] == [0]
    assert value["left_out"][0].startswith("tiny/1: ")
    assert "epochs" in value["left_out"][0]


def test_a_run_that_is_not_finished_does_not_count(runs: Path) -> None:
    for seed in (0, 1):
        (runs / f"tiny/{seed}/layer_2/layer.json").unlink()
    (row,) = beside(runs)["rows"]
    assert row["seeds"] == []
    assert row["ours"]["top1"] is None


def test_an_evaluation_of_other_weights_does_not_count(runs: Path) -> None:
    path = runs / "tiny/0/layer_2/layer.json"
    record = json.loads(path.read_text("utf-8"))
    assert record
    shutil.rmtree(runs / "tiny/1")
    run = next(iter(paper._runs(runs, "tiny", [])))
    run.write_layer(2, {**(run.layer(2) or {}), "weights": "0" * 64})
    (row,) = beside(runs)["rows"]
    assert row["seeds"] == []


def test_figure_3_is_what_was_probed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = place.do("probe", "--json").json["probes"]
    text = (place.root / "tiny.toml").read_text("utf-8")
    monkeypatch.setattr(paper, "systems", lambda: [])
    monkeypatch.setattr(paper, "PROGRESS", ())
    monkeypatch.setattr(builtin, "names", lambda: ["separability-tiny"])
    monkeypatch.setattr(builtin, "text_of", lambda name: (name, text, place.root))
    shutil.copytree(place.run, tmp_path / "runs/separability-tiny/0")
    (curve,) = beside(tmp_path / "runs")["figure_3"]
    assert (curve["recipe"], curve["kind"]) == ("separability-tiny", "linear")
    assert [p["test"] for p in curve["points"]] == [one["test"]["top1"] for one in probes]
