"""A run from Python: the same as the commands have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import torch
from command import recipe
from runs import Place, here, inside, tiny

import strata
from strata.pipeline.errors import LayerRange, NotThereYet, OptionRange, RecipeError, RunConflict
from strata.store.errors import LevelAbsent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> strata.Run:
    """A run done from Python."""
    root = tmp_path_factory.mktemp("finished")
    name = recipe(root, network__layers=2, schedule__epochs=1)
    return strata.run(
        root / name, directory=root / "run", store=root / "store", device="cpu", progress=False
    )


def test_a_run_is_that_of_the_command(finished: strata.Run, tmp_path: Path) -> None:
    shutil.copy(finished.directory.parent / "tiny.toml", tmp_path)
    said = inside(tmp_path, "run", "tiny.toml", "--device", "cpu", "--json")
    assert said.rc == 0
    other = strata.open_run(tmp_path / "runs/tiny/0", tmp_path / "features")
    own = finished.records
    for name in ("data", "evaluation"):
        assert other.records[name] == own[name]
    assert [one["weights"] for one in other.records["layers"]] == [
        one["weights"] for one in own["layers"]
    ]
    assert repr(finished) == f"<Run tiny, 2 of 2 layers, in {finished.directory}>"


def test_records_have_the_curve_of_every_layer(finished: strata.Run) -> None:
    found = finished.records
    assert found["run"]["seed"] == 0
    assert found["data"]["train"] == 1437
    assert [one["layer"] for one in found["layers"]] == [1, 2]
    (line,) = found["layers"][0]["curve"]
    assert line["epoch"] == 1
    assert 0 < line["test_top1"] <= 1
    assert found["evaluation"]["layers"][1]["test"] == found["layers"][1]["test"]


def test_the_network_gives_the_logits_that_the_run_has(finished: strata.Run) -> None:
    images = finished.features(0, "test")
    with torch.no_grad():
        logits = finished.network()(images[:])
    kept = np.load(finished.directory / "layer_2/test_logits.npy")
    rows = np.argsort(np.argsort(images.levels[0].array("sample_id")))
    assert np.allclose(logits.numpy()[rows], kept, atol=1e-4)
    guessed = (logits.argmax(1) == images.labels).float().mean()
    assert float(guessed) == pytest.approx(finished.records["layers"][1]["test"]["top1"])


def test_a_layer_makes_its_features_from_those_below(finished: strata.Run) -> None:
    layer, first = finished.network(1), finished.features(1, "test")
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    images = finished.features(0, "test")[:20].float() / 255
    canvas = torch.nn.functional.pad(images, (2, 2, 2, 2))
    with torch.no_grad():
        made = layer((canvas - 0.306) / 0.376)
    assert torch.allclose(made, first[:20], atol=1e-5)


def test_features_of_all_views_and_splits(finished: strata.Run) -> None:
    train = finished.features(1)
    assert [level.key.view for level in train.levels] == ["plain"]
    assert train.shape == (1437, 8, 12, 12)
    assert finished.features(1, "test").labels.shape == (360,)


def test_what_is_not_there_is_named_with_the_command(finished: strata.Run, tmp_path: Path) -> None:
    with pytest.raises(NotThereYet, match="there is no run in"):
        strata.open_run(tmp_path)
    with pytest.raises(LayerRange, match="layer 3 is out of range: tiny has 1 … 2"):
        finished.network(3)
    with pytest.raises(LayerRange, match="layer -1 is out of range"):
        finished.features(-1)
    with pytest.raises(OptionRange, match="split is 'val'; it may be train or test"):
        finished.features(1, "val")
    with pytest.raises(LevelAbsent, match=r"x_2 train\.plain .* is not in the store") as raised:
        finished.features(2)
    (note,) = raised.value.__notes__
    command, words = note.removeprefix("Run: strata ").split(" ", 1)
    assert command == "materialize"
    assert here("materialize", *words.split(), "--dry-run").out == "would write x_2\n"


def test_a_run_that_is_not_finished(base: Place) -> None:
    run = strata.open_run(base.run, base.store)
    assert len(run.records["layers"]) == 1
    assert run.features(1).shape[0] == 1437
    with pytest.raises(NotThereYet, match="1 of 2 layers are solved"):
        run.network()
    with pytest.raises(NotThereYet, match="layer 2 is not solved"):
        run.network(2)


def test_errors_are_those_of_the_command(finished: strata.Run, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'digitz'. Did you mean 'digits'"):
        strata.run("digitz")
    with pytest.raises(TypeError, match="sede"):
        strata.run("digits", sede=3)
    (tmp_path / "other.toml").write_text(tiny(epochs=9))
    with pytest.raises(RunConflict, match="was made with another recipe"):
        strata.run(
            tmp_path / "other.toml", directory=finished.directory, store=tmp_path, progress=False
        )


def test_progress_goes_to_stderr_and_can_be_turned_off(
    finished: strata.Run, capfd: pytest.CaptureFixture[str]
) -> None:
    where = finished.directory.parent
    how: Any = {"directory": finished.directory, "store": where / "store"}
    strata.run(where / "tiny.toml", **how, progress=False)
    assert capfd.readouterr() == ("", "")
    strata.run(where / "tiny.toml", **how)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == "layer 1: solved already\nlayer 2: solved already\n"


def test_a_run_of_tokens_has_labels_of_each(tmp_path: Path) -> None:
    texts.written(tmp_path, train=64, test=32, depth=2, epochs=1)
    place = Place(tmp_path)
    assert place.do("run").rc == 0
    run = strata.open_run(place.run, place.store)
    tokens, features = run.features(0, "test"), run.features(1, "test")
    assert tokens.dtype == torch.int32 == tokens[:2].dtype
    assert features.shape == (32, 32, 32)
    assert features.labels.shape == (32, 32)
    with torch.no_grad():
        made = run.network(1)(tokens[:4])
    assert torch.allclose(made, features[:4], atol=1e-2)
    with pytest.raises(OptionRange, match="for images alone: name a layer"):
        run.network()
    (x, y) = next(iter(torch.utils.data.DataLoader(features.dataset(), 8, generator=own())))
    assert (x.shape, y.shape) == ((8, 32, 32), (8, 32))


def own() -> torch.Generator:
    return torch.Generator()
