"""The cache is invisible: training from it is training from recomputed features, bit by bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from runs import curve, open_run, tiny
from torch import Tensor

from strata.pipeline.feed.features import features, image_views, level_draws
from strata.pipeline.feed.problem_feed import ProblemFeed, clean_batches
from strata.pipeline.materialize.materialize import materialize
from strata.pipeline.recipe import augmentation as views
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.run import levels
from strata.pipeline.run.levels import inventory
from strata.pipeline.train import algorithm
from strata.pipeline.train.evaluation import evaluate
from strata.pipeline.train.train import solve
from strata.stages.features.quantise import Floats
from strata.stages.network.featurize import Frozen, featurize
from strata.stages.network.network import build_problem

MODES = [
    pytest.param('"canvas"', id="canvas"),
    pytest.param("3", id="three fixed views"),
    pytest.param("0", id="fresh"),
]
PRECISIONS = ["float32", "float16", "bfloat16", "uint8", "uint4"]


def crossed(precisions: list[str]) -> list[ParameterSet]:
    """Every precision with every mode; most of those with views are left to `make test-all`."""
    return [
        pytest.param(
            precision,
            *mode.values,
            id=f"{precision}-{mode.id}",
            marks=() if mode is MODES[0] or precision == "uint8" else pytest.mark.slow,
        )
        for precision in precisions
        for mode in MODES
    ]


@pytest.mark.parametrize(("precision", "views"), crossed(PRECISIONS))
def test_cache_equals_recompute(tmp_path: Path, views: str, precision: str) -> None:
    """Same draws: losses, accuracies, weights and scales of layers 1 … 3 are bit-identical."""
    text = tiny(views=views, precision=precision)
    cached, recomputed = (open_run(tmp_path / name, text) for name in ("cached", "recomputed"))
    algorithm.make(cached, solve=cached.run.layers)
    for j in (1, 2, 3):
        solve(recomputed, j, cached=False)
        assert not inventory(recomputed.run, recomputed.store).written
    for j in (1, 2, 3):
        assert curve(cached, j) == curve(recomputed, j)
        one, other = cached.run.layer(j), recomputed.run.layer(j)
        assert one is not None
        assert other is not None
        clock = {"seconds", "outcome"}
        assert {k: one[k] for k in one if k not in clock} == {
            k: other[k] for k in other if k not in clock
        }


@pytest.mark.parametrize(("precision", "views"), crossed(PRECISIONS[1:]))
def test_every_batch_from_the_cache_is_the_recomputed_batch(
    tmp_path: Path, views: str, precision: str
) -> None:
    session = open_run(tmp_path, tiny(views=views, epochs=1, precision=precision))
    algorithm.make(session, write=2)
    with ProblemFeed(session, 2) as cached, ProblemFeed(session, 2, cached=False) as recomputed:
        assert (cached.features.base, recomputed.features.base) == (2 if views != "0" else 0, 0)
        pairs = zip(cached.epoch(5), recomputed.epoch(5), strict=True)
        for (x, y), (x_again, y_again) in pairs:
            assert torch.equal(x, x_again)
            assert torch.equal(y, y_again)


def test_layer_by_layer_equals_the_assembled_network(tmp_path: Path) -> None:
    """x_3 written step by step is x_3 of one pass through all three layers, in every view."""
    session = open_run(tmp_path, tiny(epochs=1, precision="float32"))
    algorithm.make(session, solve=session.run.layers)
    materialize(session, 3)
    recipe, run = session.run.recipe, session.run
    ids = session.images()["train"].array("sample_id")
    x0 = torch.from_numpy(session.images()["train"].read(0, 64))
    layers = features(session, 3, "train", base=0).layers
    for view in views.train_views(recipe):
        level = session.store.open(session.key(3, "train", view))
        draws = level_draws(recipe, run.seed, view, len(ids))
        x: Tensor = image_views(recipe, x0, draws.of(ids[np.arange(64)]))
        with torch.inference_mode():
            for frozen in layers:
                x = frozen.layer(x.contiguous(memory_format=torch.channels_last))
        assert np.array_equal(level.read(0, 64), x.numpy())


def test_block_size_and_neighbours_do_not_change_a_row() -> None:
    """A row has one value, alone or among others, in any place of the block."""
    recipe = parse(tiny(), "tiny")
    layer = build_problem(recipe.layers[0], recipe.auxiliaries[0], 1).layer.eval()
    layers = [Frozen(layer, Floats("float32"))]
    x = torch.randn(100, 1, 12, 12, generator=torch.Generator().manual_seed(0))

    def through(part: Tensor) -> Tensor:
        return featurize(layers, part, block=32, compute=torch.float32)

    whole = through(x)
    assert torch.equal(whole[70:71], through(x[70:71]))
    assert torch.equal(whole[10:53], through(x[10:53]))


@pytest.mark.parametrize("precision", ["float16", "uint8", "uint4"])
def test_a_level_computed_from_two_below_is_the_same_level(tmp_path: Path, precision: str) -> None:
    """x_2 removed, x_3 is written from x_1 through layers 2 and 3: same bytes, x_2 stays away."""
    session = open_run(tmp_path, tiny(epochs=1, precision=precision))
    algorithm.make(session, write=3)
    before = {key: session.store.open(key).content_root for key in levels.keys_at(session.run, 3)}
    for depth in (2, 3):
        session.store.remove(depth, session.run.nodes()[depth].fingerprint)
    assert [str(step) for step in algorithm.make(session, write=3)] == ["write x_3"]
    after = {key: session.store.open(key).content_root for key in levels.keys_at(session.run, 3)}
    assert after == before
    assert levels.missing_at(session.run, session.store, 2)


def test_frozen_layers_stay_frozen(tmp_path: Path) -> None:
    """The digest of a layer, buffers included, is the same after every later step."""
    from strata.pipeline.run import weights

    session = open_run(tmp_path, tiny(epochs=1))
    solve(session, 1)
    path = session.run.layer_directory(1) / "weights.safetensors"
    before = path.read_bytes()
    algorithm.make(session, solve=session.run.layers)
    assert path.read_bytes() == before
    record = session.run.layer(1)
    assert record is not None
    frozen = features(session, 1, "train", base=0).layers[0].layer
    for _ in ProblemFeed(session, 1, cached=False).epoch(0):
        pass
    assert weights.digest(frozen.state_dict()) == record["weights"]


def test_ensembles_and_accuracies_follow_from_the_logits(tmp_path: Path) -> None:
    """Recomputing z_j from the test features gives the logits that were kept."""
    session = open_run(tmp_path, tiny(epochs=1))
    algorithm.make(session, solve=session.run.layers)
    result = evaluate(session.run, session.store)
    labels = session.images()["test"].array("label")
    for j in (1, 2, 3):
        kept = np.load(session.run.layer_directory(j) / "test_logits.npy")
        assert result["layers"][j - 1]["test"]["top1"] == (kept.argmax(1) == labels).mean()
    z = [np.load(session.run.layer_directory(j) / "test_logits.npy") for j in (1, 2, 3)]
    expected = ((2 * z[0] + 4 * z[1] + 8 * z[2]).argmax(1) == labels).mean()
    assert result["layers"][2]["ensemble"]["logits"]["top1"] == pytest.approx(expected)
    assert np.sum(result["confusion"]["matrix"]) == len(labels)


def test_best_iterate_is_kept_by_training_risk(tmp_path: Path) -> None:
    session = open_run(tmp_path, tiny(epochs=3, layers=2, keep="best"))
    solve(session, 1)
    lines = (session.run.layer_directory(1) / "epochs.jsonl").read_text().splitlines()
    risks = [json.loads(line)["risk"] for line in lines]
    record = session.run.layer(1)
    assert record is not None
    assert record["kept_epoch"] == int(np.argmin(risks)) + 1


def test_test_images_go_through_their_canvas(tmp_path: Path) -> None:
    """In canvas mode a test feature is the centre of the whole canvas's feature."""
    session = open_run(tmp_path, tiny(epochs=1))
    algorithm.make(session, write=1)
    level = session.store.open(session.key(1, "test", "clean"))
    first = next(iter(clean_batches(session, 1)))
    expected = level.read(0, len(first))[:, :, 2:10, 2:10].astype(np.float32)
    assert np.array_equal(first.numpy(), expected)
