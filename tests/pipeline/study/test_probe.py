"""Probes of a run: what they see, when they are believed, and that they go on where they were."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from command import environment, recipe, strata
from interrupted import signalled
from runs import Place, open_run, tiny
from spoil import TEXT, flip

from strata.pipeline.feed.problem_feed import ProblemFeed, clean_batches
from strata.pipeline.materialize.materialize import materialize
from strata.pipeline.train import algorithm
from strata.stages.network.featurize import pooled
from strata.stages.solve import probe as probing
from strata.store.files.publish import unseal
from strata.store.read.order import generator

KINDS = (("--kind", "linear"), ("--kind", "cnn"), ("--kind", "cnn", "--p", "2"))


@pytest.fixture(scope="module")
def probed(sound: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two layers, x_1 and x_2, each probed in three ways. Not to be changed."""
    place = sound.copy(tmp_path_factory.mktemp("probed") / "place")
    for kind in KINDS:
        assert place.do("probe", *kind).rc == 0
    return place


@pytest.fixture
def place(probed: Place, tmp_path: Path) -> Place:
    return probed.copy(tmp_path / "place")


def record(place: Place, j: int, name: str) -> dict[str, Any]:
    return unseal(place.run / f"probe_{j}" / name / "result.json")


# ---- what is trained, and on what ----------------------------------------------------------------


def test_every_depth_is_probed_in_every_way_and_shown(probed: Place) -> None:
    told = probed.do("probe", "--json").json
    assert told["of"] == "greedy"
    assert told["done"] == []
    found = {(one["layer"], one["kind"]): one for one in told["probes"]}
    assert list(found) == [(j, kind) for j in (1, 2) for kind in ("linear", "cnn-1", "cnn-2")]
    assert found[2, "linear"]["test"]["top1"] > 0.8
    table = probed.do("probe").out
    for one in found.values():
        for split in ("test", "train"):
            assert f"{100 * one[split]['top1']:.2f} %" in table
    classifier = found[1, "cnn-2"]["made_of"]["classifier"]
    assert (classifier["k"], classifier["channels"], classifier["width"]) == (3, 8, 8)
    assert found[2, "cnn-2"]["made_of"]["classifier"]["width"] == 8, "the same at every depth"


def test_a_linear_probe_is_that_of_the_maps_that_any_zarr_reader_sees(probed: Place) -> None:
    """The centre crop of 8 × 8 of whole canvases of 12 × 12; no downsampling before x_1."""

    def read(name: str) -> np.ndarray:
        maps: Any = zarr.open_array(probed.level(1, name) / "x", mode="r")
        return pooled(torch.from_numpy(maps[:])[:, :, 2:-2, 2:-2].float())

    labels = {n: np.fromfile(probed.level(0, n) / "label/c.0", "<i8") for n in ("train", "test")}
    rows = read("train.plain").astype(np.float64)
    shuffled = generator("probe rows", 0, 1).permutation(len(rows))
    order, first = probing.split(labels["train"], shuffled)
    fitted, known = probing.fit(rows[order], labels["train"][order], first, lambda done: None)
    found = record(probed, 1, "linear")
    assert found["held_out"] == known["held_out"]
    assert found["regularisation"] == known["regularisation"]
    assert found["train"]["top1"] == known["train"]["top1"]
    right = fitted.predict(read("test")) == labels["test"]
    assert found["test"]["top1"] == right.mean()


@pytest.mark.parametrize("views", ['"canvas"', "2", "0"], ids=["canvas", "fixed", "fresh"])
def test_probes_see_the_images_without_augmentation(tmp_path: Path, views: str) -> None:
    """The same values computed from the images, read from a level of whatever the mode stores, and
    read from the level that `--materialize` writes; and every epoch gives just them."""
    session = open_run(tmp_path, tiny(layers=2, epochs=1, views=views).replace("= 64", "= 479"))
    algorithm.make(session, solve=2)
    exact = torch.cat(list(clean_batches(session, 1, "train", cached=False)))
    assert torch.equal(exact, torch.cat(list(clean_batches(session, 1, "train"))))
    materialize(session, 1, clean=True)
    assert session.store.state(session.key(1, "train", "plain" if "c" in views else "clean")).rows
    assert torch.equal(exact, torch.cat(list(clean_batches(session, 1, "train"))))
    labels = session.images()["train"].array("label")
    with ProblemFeed(session, 1, augmented=False) as feed:
        orders = []
        for epoch in (0, 1):
            x, y = (torch.cat(list(part)) for part in zip(*feed.epoch(epoch), strict=True))
            rows = torch.cdist(x.flatten(1), exact.flatten(1)).argmin(1)
            assert torch.equal(x, exact[rows])
            assert (np.bincount(y, minlength=10) == np.bincount(labels)).all()
            orders.append(rows)
        assert not torch.equal(*orders), "shuffled, each epoch in its own way"


def test_probes_change_no_layer_and_no_level(sound: Place, probed: Place) -> None:
    assert probed.weights() == sound.weights()
    assert probed.files() == sound.files()


# ---- when it is believed -------------------------------------------------------------------------


def test_finding_nothing_to_do_takes_no_torch_and_no_scikit_learn(probed: Place) -> None:
    arguments = ["probe", *map(str, probed.options), "--kind", "cnn"]
    heavy = ("torch", "sklearn", "matplotlib", "zarr")
    code = (
        f"import sys; from strata import cli\n"
        f"try: cli.main({arguments})\n"
        f"finally: print([m for m in {heavy} if m in sys.modules])"
    )
    asked = [sys.executable, "-c", code]
    told = subprocess.run(asked, env=environment(), capture_output=True, text=True, check=True)
    assert told.stdout.startswith("nothing to do: everything is there\n")
    assert told.stdout.endswith("[]\n")


def test_only_what_rests_on_other_weights_is_probed_again(place: Place) -> None:
    before = record(place, 1, "linear")
    clean = place.do("clean", "--layer", 2, "--yes")
    assert clean.rc == 0
    told = place.do("probe", "--layer", 2)
    assert told.rc == 8
    assert "layer 2 is not solved" in told.error
    assert "train tiny --layer 2" in told.error
    assert [one["layer"] for one in place.do("probe", "--json").json["probes"]] == [1, 1, 1]

    assert place.do("train", "--layer", 2).rc == 0
    assert place.do("probe", "--json").json["done"] == [], "the same weights as before"

    assert place.do("clean", "--layer", 2, "--yes").rc == 0
    assert place.do("sweep", "--layer", 2, "--vary", "lr=0.3", "--keep", "best").rc == 0
    told = place.do("probe", "--json").json
    assert told["done"] == ["linear probe of x_2"]
    assert [(p["layer"], p["kind"]) for p in told["probes"]] == [
        *[(1, kind) for kind in ("linear", "cnn-1", "cnn-2")],
        (2, "linear"),
    ]
    assert record(place, 1, "linear") == before


def test_what_is_damaged_is_named_and_made_again_to_the_same_bytes(place: Place) -> None:
    for name in ("linear", "cnn-1"):
        weights = place.run / "probe_1" / name / "weights.safetensors"
        good = weights.read_bytes()
        flip(weights)
        told = place.do("verify")
        assert told.rc == 10
        assert f"{weights}: it is not what result.json says" in told.out
        kind = ("--kind", "cnn" if name == "cnn-1" else "linear")
        if name == "linear":  # whether it is repaired first or not
            mended = place.do("verify", "--repair")
            assert "removed, for `probe` to make again:" in mended.out
            assert not weights.parent.exists()
        assert place.do("probe", *kind, "--json").json["done"] == [f"{name} probe of x_1"]
        assert weights.read_bytes() == good
    assert place.do("verify", "--deep").rc == 0


def test_clean_says_that_probes_go_with_the_run(place: Place) -> None:
    assert "probe" not in place.do("clean", "--layer", 2, "--dry-run").out
    assert "6 probes (" in place.do("clean", "--dry-run").out


# ---- stopped and killed --------------------------------------------------------------------------

EPOCHS = 12
PLACE = Path("runs/tiny/0/probe_1/cnn-1")
ONE: dict[str, Any] = {"network__layers": 1, "network__downsample": [], "schedule__epochs": EPOCHS}
PROBE = ("probe", "tiny.toml", "--kind", "cnn")


def snapshot(cwd: Path) -> dict[str, Any]:
    """What must not depend on how often it was interrupted."""
    lines = [json.loads(line) for line in (cwd / PLACE / "epochs.jsonl").read_text().splitlines()]
    found = {k: v for k, v in unseal(cwd / PLACE / "result.json").items() if k != "seconds"}
    curve = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return {**found, "curve": curve, "weights": (cwd / PLACE / "weights.safetensors").read_bytes()}


def undisturbed(cwd: Path) -> dict[str, Any]:
    assert strata(cwd, "train", recipe(cwd, **ONE), "--layer", 1).rc == 0
    return {"last": strata(cwd, *PROBE), "snapshot": snapshot(cwd)}


def disturbed(cwd: Path) -> dict[str, Any]:
    """Stopped, then killed, each time in the middle."""
    assert strata(cwd, "train", recipe(cwd, **ONE), "--layer", 1).rc == 0
    first = signalled(cwd, signal.SIGINT, f"epoch 1 of {EPOCHS}", 0.1, *PROBE)
    kept = (cwd / PLACE / "checkpoint.safetensors").exists()
    second = signalled(cwd, signal.SIGKILL, "going on in epoch", 0.1, *PROBE)
    last = strata(cwd, *PROBE)
    left = [str(p) for p in (cwd / PLACE).rglob("*") if p.name.startswith((".tmp-", "checkpoint."))]
    found = {"first": first, "kept": kept, "second": second, "last": last, "left": left}
    return {**found, "snapshot": snapshot(cwd)}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    with ThreadPoolExecutor(2) as pool:
        told = (disturbed, undisturbed)
        yield {f.__name__: pool.submit(f, tmp_path_factory.mktemp(f.__name__)) for f in told}


@pytest.mark.slow
def test_stopped_and_killed_a_cnn_probe_ends_at_the_same_bytes(stories: dict[str, Future]) -> None:
    want, found = (stories[name].result() for name in ("undisturbed", "disturbed"))
    assert found["first"].rc == 130, found["first"].err
    assert found["kept"]
    assert found["second"].rc in (0, -signal.SIGKILL), "a quick machine ends first"
    assert found["last"].rc == 0, found["last"].err
    assert found["left"] == []
    assert found["snapshot"] == want["snapshot"]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--layer", "3"], 2, "layer 3 is out of range: recipe tiny has layers 1 … 2"),
        (["--p", "2"], 2, "--p 2 is of a CNN: add --kind cnn"),
        (["--of", "baseline"], 8, "no network trained end to end. Run: strata baseline tiny"),
        (["--transfer", "imagefolder:nowhere"], 4, "no directory or tar nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(
    probed: Place, arguments: list[str], code: int, words: str
) -> None:
    told = probed.do("probe", *arguments)
    assert told.rc == code
    assert words in told.error


def test_without_a_run_or_a_layer_there_is_nothing_to_probe(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    place = Place(tmp_path)
    told = place.do("probe")
    assert told.rc == 8
    assert "there is no run" in told.error
    assert not place.run.exists()


def test_rows_that_do_not_fit_into_memory_are_refused_with_both_numbers(place: Place) -> None:
    (place.run / "probe_2/linear/result.json").unlink()
    told = place.do("probe", "--layer", 2, "--memory-budget", "500kB")
    assert told.rc == 5
    assert "1,437 × 64 values in memory, 919.7 kB; --memory-budget is 500.0 kB" in told.error
