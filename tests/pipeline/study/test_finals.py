"""Final classifiers on x_J, layer J frozen: trained, taken up, noticed, exported, told apart."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Place, made, tiny
from spoil import flip

from strata.pipeline.feed.problem_feed import ProblemFeed, clean_batches
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.recipe.variants import finals
from strata.pipeline.run import weights
from strata.pipeline.run.session import Session
from strata.pipeline.train import solving
from strata.stages.network.network import build
from strata.stages.network.spec import AuxiliarySpec
from strata.stages.solve.evaluate import ensemble, top_k

TEXT = tiny(layers=2, epochs=2)
FILES = ("auxiliary.safetensors", "test_logits.npy")
NAME = "k=2,aux_width=4"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Both layers are solved, and x_2 written."""
    return made(tmp_path_factory.mktemp("base") / "place", 2, TEXT)


@pytest.fixture(scope="module")
def trained(base: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Three classifiers: of width 4 and 12, and a linear one."""
    place = base.copy(tmp_path_factory.mktemp("trained") / "place")
    assert final(place, "auxiliary.k=1,2", "auxiliary.width=4,12").rc == 0
    return place


@pytest.fixture
def place(trained: Place, tmp_path: Path) -> Place:
    return trained.copy(tmp_path / "place")


def final(place: Place, *vary: str, options: tuple[Any, ...] = ()) -> Any:
    every = itertools.chain.from_iterable(("--vary", text) for text in vary)
    return place.do("final", *every, *options)


def one(place: Place, name: str) -> Path:
    return place.run / "sweep_final" / name


def solved(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in FILES]


def session(place: Place) -> Session:
    found = place.overview()
    assert found.run is not None
    return Session(found.run, found.store, torch.device("cpu"))


# ---- what is trained -----------------------------------------------------------------------------


def test_only_the_classifier_is_trained(base: Place, trained: Place) -> None:
    assert trained.weights() == base.weights(), "the layers, and their own classifiers, stay"
    found = sorted(path.name for path in one(trained, NAME).iterdir())
    assert found == ["auxiliary.safetensors", "epochs.jsonl", "result.json", "test_logits.npy"]
    assert len(list((trained.run / "sweep_final").iterdir())) == 3, "k = 1 has no width"


def test_logits_are_those_of_the_classifier_on_x_j(trained: Place) -> None:
    said = json.loads((one(trained, NAME) / "result.json").read_text())["body"]
    spec = AuxiliarySpec(**said["made_of"]["auxiliary"])
    assert (spec.channels, spec.width, spec.k) == (16, 4, 2)
    classifier = build([spec], None)[0].eval()
    classifier.load_state_dict(weights.read(one(trained, NAME) / "auxiliary.safetensors")[0])
    with torch.no_grad():
        z = torch.cat([classifier(x) for x in clean_batches(session(trained), 2)])
    np.testing.assert_allclose(z.numpy(), np.load(one(trained, NAME) / FILES[1]), atol=1e-5)
    assert said["parameters"] == 0
    assert said["auxiliary_parameters"] == spec.parameters


def test_it_reads_the_level_of_x_j(base: Place) -> None:
    at_work = session(base)
    with ProblemFeed(at_work, 2) as feed:
        assert feed.features.base == 2
        x, _ = next(iter(feed.epoch(0)))
    assert x.shape == (64, 16, 4, 4), "the crop, of a canvas of 6 × 6"


def test_what_is_through_is_not_trained_again(place: Place) -> None:
    again = final(place, "auxiliary.width=4,6", "auxiliary.k=2", options=("--json",))
    assert again.json["done"] == ["solve the final classifier with k=2,aux_width=6"]
    assert again.json["layer"] is None
    third = final(place, "auxiliary.width=4,6", "auxiliary.k=2", options=("--json",))
    assert third.json["done"] == []


def test_a_run_that_is_not_there_is_made(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(tiny(layers=1, downsample="[]", epochs=1, views=0))
    done = final(Place(tmp_path), "auxiliary.width=4", options=("--json",)).json["done"]
    steps = ["read images into x_0", "solve layer 1", "write x_1"]
    assert done == [*steps, "solve the final classifier with aux_width=4"]


# ---- stopped, damaged, stale ---------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a kill: nobody catches it."""


@pytest.mark.parametrize("count", [1, 30, 46])
def test_killed_it_ends_at_the_same_bytes(
    base: Place, trained: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    place, write, left = base.copy(tmp_path / "place"), weights.write, itertools.count(-count)

    def dying(path: Path, *rest: Any) -> None:
        if next(left) == 0:
            raise Killed
        write(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(solving, "CHECKPOINT_SECONDS", -1.0)
        patched.setattr(weights, "write", dying)
        with pytest.raises(Killed):
            final(place, "auxiliary.width=4", "auxiliary.k=2")
    assert place.do("status", "--json").json["finals"][0]["state"] == "partial"
    assert final(place, "auxiliary.width=4", "auxiliary.k=2").rc == 0
    assert solved(one(place, NAME)) == solved(one(trained, NAME))


def test_another_x_j_makes_it_stale_and_it_is_trained_again(place: Place, trained: Place) -> None:
    assert place.do("clean", "--layer", 2, "--yes").rc == 0
    lost = place.do("status", "--json").json["finals"]
    assert {each["state"] for each in lost} == {"stale"}
    done = place.do("sweep", "--layer", 2, "--vary", "seed=5", "--keep", "seed=5")
    assert done.rc == 0
    assert {each["state"] for each in place.do("status", "--json").json["finals"]} == {"stale"}
    assert place.do("evaluate", "--json").json["finals"] == []
    refused = place.do("export", "--to", place.root / "new", "--final", NAME)
    assert (refused.rc, "is stale" in refused.error) == (2, True)
    assert final(place, "auxiliary.width=4", "auxiliary.k=2").rc == 0
    assert solved(one(place, NAME)) != solved(one(trained, NAME))
    states = {each["name"]: each["state"] for each in place.do("status", "--json").json["finals"]}
    assert [name for name, state in states.items() if state == "solved"] == [NAME]


def test_the_same_layer_solved_again_leaves_it_good(place: Place) -> None:
    assert place.do("clean", "--layer", 2, "--yes").rc == 0
    assert place.do("train", "--layer", 2).rc == 0
    states = {each["state"] for each in place.do("status", "--json").json["finals"]}
    assert states == {"solved"}


def test_damage_is_named_and_trained_again(place: Place, trained: Place) -> None:
    flip(one(place, NAME) / "auxiliary.safetensors")
    found = place.do("verify")
    assert found.rc == 10
    assert "sweep_final" in found.out
    assert place.do("verify", "--repair").rc == 0
    assert not one(place, NAME).exists()
    assert final(place, "auxiliary.width=4", "auxiliary.k=2").rc == 0
    assert solved(one(place, NAME)) == solved(one(trained, NAME))


def test_clean_removes_it_with_the_sweeps(place: Place) -> None:
    said = place.do("clean", "--sweeps", "--dry-run", "--json").json
    assert said["would_remove"] == ["the sweep of the final classifier"]
    assert place.do("clean", "--sweeps", "--yes").rc == 0
    assert not (place.run / "sweep_final").exists()


# ---- shown and exported --------------------------------------------------------------------------


def test_evaluate_and_status_show_it(trained: Place) -> None:
    found = {each["name"]: each for each in trained.do("evaluate", "--json").json["finals"]}
    assert set(found) == {"k=1", NAME, "k=2,aux_width=12"}
    z = np.load(one(trained, NAME) / "test_logits.npy")
    labels = labels_of(trained)
    assert found[NAME]["test"]["top1"] == top_k(z, labels, 1)
    whole = ensemble([np.load(trained.run / "layer_1/test_logits.npy"), z])
    assert found[NAME]["ensemble"]["logits"]["top1"] == top_k(whole, labels, 1)
    assert f"2, final {NAME}" in trained.do("evaluate").out
    listed = {each["name"]: each for each in trained.do("status", "--json").json["finals"]}
    assert listed[NAME] == {
        "name": NAME,
        "state": "solved",
        "test": found[NAME]["test"],
        "test_accuracy": found[NAME]["test"]["top1"],
    }
    assert f"final {NAME}" in trained.do("status").out


def labels_of(place: Place) -> np.ndarray:
    at_work = session(place)
    return at_work.store.open(at_work.key(0, "test", "clean")).array("label")


@pytest.mark.parametrize("more", [(), ("--ensemble",)], ids=["alone", "ensemble"])
def test_it_is_exported(trained: Place, tmp_path: Path, more: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    done = trained.do("export", "--to", out, "--final", NAME, *more)
    assert done.rc == 0, done.err
    z = np.load(one(trained, NAME) / "test_logits.npy")
    expected = ensemble([np.load(trained.run / "layer_1/test_logits.npy"), z]) if more else z
    at_work = session(trained)
    images = at_work.store.open(at_work.key(0, "test", "clean")).read(0, 64)
    with torch.no_grad():
        program = torch.export.load(out / "model.pt2").module()
        found = program(torch.from_numpy(images.copy())).numpy()
    np.testing.assert_allclose(found, expected[:64], rtol=0, atol=1e-5)
    assert json.loads((out / "export.json").read_text())["trained"]["final"]["name"] == NAME


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--final", "k=3"), "is not there"),
        (("--final", NAME, "--layer", "1"), "it follows x_2"),
        (("--final", NAME, "--features"), "--features has no classifier"),
    ],
)
def test_exports_that_cannot_be(trained: Place, arguments: tuple[str, ...], said: str) -> None:
    done = trained.do("export", "--to", trained.root / "new", *arguments)
    assert (done.rc, said in done.error) == (2, True)


def test_the_layers_width_may_not_vary(trained: Place) -> None:
    done = final(trained, "width=4")
    assert (done.rc, "layer 2 is frozen" in done.error) == (2, True)


def test_x_j_that_has_no_centre_crop_is_refused(tmp_path: Path) -> None:
    """The border, 2 pixels, can be cut before layer 3, at scale 2, but not after it, at scale 4."""
    text = tiny(downsample="[1, 2]")
    assert finals(parse(text.replace("pad = 2", "pad = 4"), "tiny"), ["auxiliary.width=4"], 0)
    (tmp_path / "tiny.toml").write_text(text)
    done = final(Place(tmp_path), "auxiliary.width=4")
    assert (done.rc, "which 4 (2^downsamplings up to x_3) does not divide" in done.error) == (
        3,
        True,
    )


def test_memory_is_counted_without_a_layer(place: Place) -> None:
    done = final(place, "auxiliary.width=4,20000", options=("--gpu-memory", "20MB"))
    assert done.rc == 5
    assert "variants of the final classifier need" in done.error
