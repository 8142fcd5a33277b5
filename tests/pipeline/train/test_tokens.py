"""Networks of tokens: a language model on int32 with a label for each token, and a small ViT."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import torch
from command import strata
from interrupted import leftovers, signalled, snapshot
from networks import beside, named
from runs import Place, curve, open_run

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.train import algorithm
from strata.pipeline.train.train import solve
from strata.stages.solve import evaluate
from strata.store.feature_store import Store
from strata.store.level.layout import LevelKey

SMALL: dict[str, Any] = {"train": 320, "test": 64, "depth": 2, "epochs": 2}
"""Two blocks on a few rows, a second each."""
LEAST = 0.007
"""Nats by which the loss falls with every block, at least: half of the least of three seeds and
three steps each (benchmarks/tokens.py)."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A language model of four blocks. Not to be changed."""
    place = Place(tmp_path_factory.mktemp("text") / "place")
    texts.written(place.root)
    assert place.do("run").rc == 0
    return place


# ---- a language model ----------------------------------------------------------------------------


def test_loss_falls_with_every_block(model: Place) -> None:
    found = model.do("evaluate", "--json").json["layers"]
    losses = [one["test"]["loss"] for one in found]
    steps = -np.diff(losses)
    assert (steps > LEAST).all(), losses
    assert losses[-1] < 2.4  # of 4.85 for a guess
    assert found[-1]["test"]["top1"] > found[0]["test"]["top1"] > 0.3


def test_a_token_that_the_embedding_has_not_is_one_line(tmp_path: Path) -> None:
    place = Place(tmp_path)
    texts.written(tmp_path, **SMALL)
    with np.load(tmp_path / "text.npz") as arrays:
        found = dict(arrays)
    found["x_train"][7, 3] = 128
    np.savez(tmp_path / "text.npz", **found)  # pyright: ignore
    refused = place.do("train", "--layer", 1)
    assert refused.rc == 4
    assert "a token is not in the network's embedding" in refused.error


def test_levels_are_tokens(model: Place) -> None:
    store, run = Store(model.store), model.overview().existing()
    keys = (LevelKey(j, run.nodes()[j].fingerprint, "train", "clean") for j in (0, 1))
    zero, one = map(store.open, keys)
    assert (zero.geometry.sample, zero.geometry.precision) == ((32,), "int32")
    assert (one.geometry.sample, one.geometry.axes) == ((32, 32), ("token", "feature"))
    arrays = np.load(model.root / "text.npz")
    ids = zero.array("sample_id")
    np.testing.assert_array_equal(zero.read(0, len(zero)), arrays["x_train"][ids])
    for level in (zero, one):
        np.testing.assert_array_equal(level.array("label"), arrays["y_train"][ids])
        assert level.key.name == "train"


def test_test_loss_is_in_curve_and_record_and_is_that_of_the_logits(model: Place) -> None:
    run = model.overview().existing()
    test = LevelKey(0, run.nodes()[0].fingerprint, "test", "clean")
    labels = Store(model.store).open(test).array("label")
    lines = (model.run / "layer_2/epochs.jsonl").read_text().splitlines()
    record, last = run.layer(2), json.loads(lines[-1])
    assert record is not None
    z = torch.from_numpy(np.load(model.run / "layer_2/test_logits.npy"))
    assert z.shape == (320, 32, 128)
    y = torch.from_numpy(labels)
    loss = torch.nn.functional.cross_entropy(z.flatten(0, 1).double(), y.flatten()).item()
    assert record["test"]["loss"] == pytest.approx(loss, rel=1e-9)
    assert record["test"]["top1"] == pytest.approx((z.argmax(-1) == y).double().mean().item())
    assert (last["test_loss"], last["test_top1"]) == (
        record["test"]["loss"],
        record["test"]["top1"],
    )


def test_commands_take_it(model: Place) -> None:
    """What is planned is what is there; levels are verified, audited and counted."""
    plan = model.do("plan", "--json").json
    assert [depth["shape"] for depth in plan["depths"]] == [[32], *[[32, 32]] * 4]
    assert model.do("verify").rc == 0
    assert all(
        level["state"] == "complete" for level in model.do("status", "--json").json["images"]
    )
    audited = model.do("audit", "--json").json["levels"]
    assert len(audited) == 8
    assert not any(one["different"] or one["beside"] for one in audited)
    counted = model.do("statistics", "--json").json["levels"]
    (tokens,) = [one for one in counted if one["level"] == "x_1 train"]
    assert len(tokens["channels"]) == 32


@pytest.mark.parametrize("precision", ["float16", "uint8"])
def test_cache_equals_recompute(tmp_path: Path, precision: str) -> None:
    text = texts.written(tmp_path / "here", precision=precision, **SMALL)
    places = [beside(tmp_path / name, texts.CODE, "transformer.py") for name in ("a", "b")]
    cached, recomputed = (open_run(place, text) for place in places)
    algorithm.make(cached, solve=2)
    for j in (1, 2):
        solve(recomputed, j, cached=False)
    with ProblemFeed(cached, 1) as one, ProblemFeed(recomputed, 1, cached=False) as other:
        assert (one.features.base, other.features.base) == (1, 0)
        for (x, y), (again, labels) in zip(one.epoch(3), other.epoch(3), strict=True):
            assert torch.equal(x, again)
            assert torch.equal(y, labels)
            assert y.shape == (16, 32)
    assert curve(cached, 2) == curve(recomputed, 2)
    for j in (1, 2):
        mine, theirs = cached.run.layer(j) or {}, recomputed.run.layer(j) or {}
        for name in ("weights", "auxiliary", "scales", "train", "test"):
            assert mine[name] == theirs[name], (j, name)


def test_micro_batches_add_up(tmp_path: Path) -> None:
    """The loss is a mean over rows of means over tokens, so that a divided step is the same one."""
    text = texts.written(tmp_path / "here", **SMALL)
    losses = []
    for name, more in (("whole", ""), ("divided", "accumulate = 4\n")):
        divided = text.replace('precision = "float32"\n', f'precision = "float32"\n{more}')
        session = open_run(beside(tmp_path / name, texts.CODE, "transformer.py"), divided)
        solve(session, 1)
        losses.append(curve(session, 1)[-1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]  # sums in another order: it was divided


def test_killed_and_resumed(tmp_path: Path) -> None:
    """At random moments, four times; the weights and levels are those of a run left alone."""
    found, moments = [], random.Random(3)
    for name, words in (("whole", ()), ("killed", ("layer 1", "layer 1, epoch 1", "layer 2"))):
        cwd = tmp_path / name
        texts.written(cwd, **{**SMALL, "epochs": 4})
        for line in words:
            delay = moments.uniform(0, 0.3)
            assert signalled(cwd, signal.SIGKILL, line, delay, "run", "tiny.toml").rc == -9
        assert strata(cwd, "run", "tiny.toml").rc == 0
        assert not leftovers(cwd)
        found.append(snapshot(cwd))
    assert {"layer_1/weights.safetensors", "layer_2/test_logits.npy"} <= {
        name.removeprefix("runs/tiny/0/") for name in found[0]
    }
    assert found[0] == found[1]


def test_too_many_logits_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 64 * 32 * 128 * 4 - 1)
    place = Place(tmp_path / "place")
    texts.written(place.root, **SMALL)
    said = place.do("run")
    assert "test_by_sample.npy has loss and top-1 of every test sample" in said.err + said.out
    assert not list(place.run.rglob("test_logits.npy"))
    by_sample = np.load(place.run / "layer_2/test_by_sample.npy")
    found = place.do("evaluate", "--json").json
    assert by_sample.shape == (64, 2)
    means = [found["layers"][1]["test"][name] for name in ("loss", "top1")]
    np.testing.assert_allclose(by_sample.mean(0), means, rtol=1e-5)
    assert found["layers"][1]["ensemble"]["logits"]["top1"] is None
    assert found["confusion"] is None
    assert place.do("report").rc == 0


# ---- a small vision transformer ------------------------------------------------------------------


VIT = '{ name = "transformer.py:images", arguments = { depth = 2 } }'


def test_vit_of_digits(tmp_path: Path) -> None:
    """Tokens of images, from caches and from the images: the same to the bit."""
    text = named(VIT, views="2", flip="false", epochs=4)
    text = text.replace("lr = 0.1", "lr = 0.03").replace("batch = 64", "batch = 16")
    text = text.replace("k = 2\nwidth = 8\n", "k = 1\n")
    places = [beside(tmp_path / name, texts.CODE, "transformer.py") for name in ("a", "b")]
    cached, recomputed = (open_run(place, text) for place in places)
    algorithm.make(cached, solve=2)
    for j in (1, 2):
        solve(recomputed, j, cached=False)
        mine, theirs = cached.run.layer(j) or {}, recomputed.run.layer(j) or {}
        for name in ("weights", "auxiliary", "train", "test"):
            assert mine[name] == theirs[name], (j, name)
    first, second = ((cached.run.layer(j) or {})["test"] for j in (1, 2))
    assert second["loss"] < first["loss"] < 2.2
    assert cached.geometry(1, "train").axes == ("token", "feature")
