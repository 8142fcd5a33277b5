"""Levels of tokens, grids, volumes, series and vectors in a run: all that is done with maps."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from axes import AXES, forms
from root import ROOT
from runs import Place, curve, made, open_run
from safetensors.torch import load_file
from spoil import flip

from strata.pipeline.run.session import Session
from strata.pipeline.study.audit import lines
from strata.pipeline.train import algorithm
from strata.pipeline.train.train import solve

sys.path[:0] = [str(ROOT / "benchmarks")]

import audit as forging  # noqa: E402


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("axes") / "place"
    root.mkdir()
    return made(root, 5, forms(root, "uint4"))


def session_of(place: Place) -> Session:
    return open_run(place.root, (place.root / "tiny.toml").read_text())


def test_levels_have_the_axes_of_their_samples(sound: Place) -> None:
    session = session_of(sound)
    for j, (sample, names) in AXES.items():
        level = session.store.open(session.key(j, "train", "v2"))
        assert (level.geometry.sample, level.geometry.axes) == (sample, names)
        ds = xr.open_zarr(level.directory)
        assert [name.removesuffix("_pair") for name in ds.x.dims] == ["sample", *names]
        assert ds.scale.dims == (level.geometry.feature,)
        assert len(ds.scale) == level.geometry.features


@pytest.mark.parametrize("name", ["uint8", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("views", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_cache_equals_recompute(tmp_path: Path, name: str, views: int) -> None:
    """Losses, weights and scales, to the bit; also where the layers' input is another form."""
    places = [tmp_path / "cached", tmp_path / "recomputed"]
    texts = [forms(place, name, views=views) for place in places]
    cached, recomputed = map(open_run, places, texts)
    algorithm.make(cached, solve=5)
    for j in AXES:
        solve(recomputed, j, cached=False)
        assert curve(cached, j) == curve(recomputed, j)
        one, other = cached.run.layer(j), recomputed.run.layer(j)
        assert one is not None
        assert other is not None
        assert (one["weights"], one["scales"]) == (other["weights"], other["scales"])


def test_every_level_is_what_the_images_give(sound: Place) -> None:
    said = sound.do("audit", "--json")
    assert said.rc == 0, said.err
    found = said.json["levels"]
    assert len(found) == 2 + 5 * 5
    assert not any(one["different"] or one["beside"] for one in found)


@pytest.mark.parametrize(
    ("j", "place"),
    [
        (1, "token 15, feature 11"),
        (2, "height 3, width 3, channel 8"),
        (3, "channel 5, depth 2, height 3, width 3"),
        (4, "channel 6, time 22"),
        (5, "feature 10"),
    ],
)
def test_a_value_that_is_not_is_named_by_its_axes(
    sound: Place, tmp_path: Path, j: int, place: str
) -> None:
    session = session_of(sound.copy(tmp_path / "copy"))
    key = session.key(j, "test", "clean")
    rows = forging.whole(session, key).copy()
    odd = AXES[j][0][-1 if j in (1, 2) else 0] % 2  # then the last channel is in the low bits
    rows[(7, *(-1,) * (rows.ndim - 1))] ^= 1 if odd else 16
    forging.forge(session, key, rows)
    found = forging.caught(session, key, 360, 0)
    assert found is not None
    assert found["different"] == [7]
    first, said = lines(found)
    assert "359 of 360 equal" in first
    assert re.search(rf"row 7 \(sample \d+, .*\), {place}: \d+, should be \d+$", said)


def test_damage_is_found_and_mended(sound: Place, tmp_path: Path) -> None:
    place = sound.copy(tmp_path / "copy")
    spoiled = [place.level(j, "train.v1") / "x" / f"c.0{'.0' * len(AXES[j][0])}" for j in AXES]
    for path in spoiled:
        flip(path, 50)
    assert place.do("verify").rc == 0, "they have their size"
    said = place.do("verify", "--deep")
    assert said.rc == 10
    assert all(str(path) in said.out + said.err for path in spoiled)
    mended = place.do("verify", "--deep", "--repair")
    assert mended.rc == 0, mended.err
    assert place.files() == sound.files()


def test_what_was_begun_goes_on(sound: Place, tmp_path: Path) -> None:
    """As a killed writer leaves it: without a commit, and one shard half done."""
    place = sound.copy(tmp_path / "copy")
    for j in AXES:
        level = place.level(j, "train.v0")
        (level / "COMMIT.json").unlink()
        (level / "receipts/000000.json").unlink()
    for j in AXES:
        said = place.do("materialize", "--layer", j)
        assert said.rc == 0, said.err
    assert place.files() == sound.files()


def test_statistics_are_of_channels(sound: Place) -> None:
    session = session_of(sound)
    said = sound.do("statistics", "--split", "test", "--channels", "--json")
    for one in said.json["levels"]:
        level = session.store.open(session.key(one["depth"], "test", "clean"))
        assert len(one["channels"]) == level.geometry.features
        if one["depth"] == 2:
            scales, zeros = level.array("scale"), level.array("zero")
            codes = np.stack([(raw := level.read(0, 360)) & 15, raw >> 4], -1).reshape(
                360, 4, 4, -1
            )
            values = (codes[..., :9] - zeros.astype(np.float32)) * scales
            means = [channel["mean"] for channel in one["channels"]]
            np.testing.assert_allclose(means, values.mean((0, 1, 2), dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("j", AXES)
def test_linear_probes_see_the_mean_of_all_places(sound: Place, j: int) -> None:
    said = sound.do("probe", "--layer", j, "--json")
    assert said.rc == 0, said.err
    found = load_file(sound.run / f"probe_{j}/linear/weights.safetensors")
    assert found["weight"].shape == (10, AXES[j][0][-1 if j in (1, 2) else 0])


@pytest.mark.parametrize("j", AXES)
def test_a_cnn_is_a_probe_of_maps(sound: Place, j: int) -> None:
    said = sound.do("probe", "--layer", j, "--kind", "cnn")
    assert said.rc == 2
    names = re.escape(", ".join(AXES[j][1]))
    assert re.search(
        rf"a CNN is a probe of maps, and x_{j} is \({names}\): use --kind linear", said.err
    )


def test_canvas_is_for_maps(tmp_path: Path) -> None:
    tmp_path.joinpath("tiny.toml").write_text(forms(tmp_path, "uint8", views='"canvas"'))
    said = Place(tmp_path).do("plan")
    assert said.rc == 3
    assert "'augment.views' is \"canvas\", but block 1, blocks[0] (Tokens), sees more" in said.err


@pytest.mark.parametrize("j", [2, 4, 5])
def test_features_are_exported(sound: Place, tmp_path: Path, j: int) -> None:
    said = sound.do("export", "--layer", j, "--features", "--to", tmp_path / "out", "--json")
    assert said.rc == 0, said.err
    assert said.json["compared"]["furthest"] < 1e-4
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    assert program(images).shape == (3, *AXES[j][0])
