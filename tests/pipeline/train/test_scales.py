"""Scales in a run: chosen on what a level holds, kept, named, checked, and readable without us."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from root import ROOT
from runs import open_run, tiny

from strata.pipeline.errors import exit_code, one_line
from strata.pipeline.feed.features import features, frozen_layer, level_draws
from strata.pipeline.materialize.materialize import materialize
from strata.pipeline.progress import Reporter
from strata.pipeline.run import weights
from strata.pipeline.run.levels import inventory
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm, scales
from strata.pipeline.train.evaluation import evaluate
from strata.pipeline.train.train import solve
from strata.stages.errors import NotFinite
from strata.stages.features.quantise import Quantiser
from strata.store.errors import LevelDamaged
from strata.store.read.order import generator
from strata.store.read.rows import Rows

CODES = ["uint4", "uint8"]
MODES = [
    pytest.param('"canvas"', id="canvas"),
    pytest.param("3", id="three fixed views"),
    pytest.param("0", id="fresh"),
]


class Heard(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def solved(place: Path, **changes: object) -> Session:
    """A session whose layer 1 is solved."""
    session = open_run(place, tiny(**{"layers": 2, "epochs": 1, **changes}))
    solve(session, 1)
    return session


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kept")
    solved(place, precision="uint8")
    return place


@pytest.fixture
def session(kept: Path, tmp_path: Path) -> Session:
    """Layer 1 solved in uint8, in a copy of the test's own."""
    shutil.copytree(kept, tmp_path / "own")
    return open_run(tmp_path / "own", tiny(layers=2, epochs=1, precision="uint8"))


def record_of(session: Session) -> dict[str, Any]:
    record = session.run.layer(1)
    assert record is not None
    return record


def change_weights(session: Session, factor: float) -> None:
    """As if layer 1 had been solved to these weights, with a fitting record."""
    path = session.run.layer_directory(1) / "weights.safetensors"
    tensors, _ = weights.read(path)
    tensors["norm.weight"] *= factor
    tensors["norm.bias"] *= factor
    weights.write(path, tensors)
    changed = {**record_of(session), "weights": weights.digest(tensors)}
    session.run.write_layer(1, changed)


# --- a run in every precision --------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", *CODES])
def test_a_run_learns_in_every_precision_and_says_how_good_it_is(
    tmp_path: Path, precision: str
) -> None:
    session = open_run(tmp_path, tiny(epochs=6, precision=precision))
    session = replace(session, report=Heard())
    algorithm.make(session, solve=3, write=3)
    assert inventory(session.run, session.store).written == {1, 2, 3}
    assert evaluate(session.run, session.store)["layers"][-1]["test"]["top1"] > 0.85
    assert isinstance(session.report, Heard)
    said = [line for line in session.report.lines if "signal-to-noise" in line]
    files = sorted(path.parent.name for path in session.run.directory.rglob("quantiser.*"))
    record = record_of(session)
    if precision not in CODES:
        assert (said, files) == ([], [])
        assert record["scales"] is record["quantiser"] is None
        return
    assert files == [f"layer_{j}" for j in (1, 1, 2, 2, 3, 3)]
    pattern = (
        rf"x_1 as {precision}: signal-to-noise \d+\.\d dB \(worst channel \d: \d+\.\d dB\), "
        r"0\.\d{3} % clipped, \d dead channels of 8"
    )
    assert len(said) == 3
    assert re.fullmatch(pattern, said[0])
    assert record["quantiser"]["median_snr_db"] > {"uint8": 38, "uint4": 14}[precision]
    assert record["quantiser"]["clipped"] < 1e-3


# --- what they are chosen on ---------------------------------------------------------------------


@pytest.mark.parametrize("views", MODES)
@pytest.mark.parametrize("precision", CODES)
def test_scales_are_chosen_on_what_the_first_view_holds(
    tmp_path: Path, views: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded, the maps are those of the level: whole canvases, first views, or centre crops."""
    monkeypatch.setattr(scales, "SCALE_ROWS", 100)
    session = solved(tmp_path, views=views, precision=precision)
    materialize(session, 1)
    layer = frozen_layer(session.run, 1, session.device)
    maps = scales._maps(session, layer.layer, features(session, 0, "train"), None)
    rounded = torch.cat([layer.stored.rounded(x) for x in maps])
    chosen = generator("calibration rows", 0).permutation(1437)[:100]
    rows, view = np.sort(chosen), {'"canvas"': "plain", "3": "v0", "0": "clean"}[views]
    source = features(session, 1, "train", base=0 if views == "0" else None)
    assert source.base == (0 if views == "0" else 1)
    ids = session.images()["train"].array("sample_id")
    draws = level_draws(session.run.recipe, 0, view, len(ids)).of(ids[rows])
    with source.delivery([view]) as delivery:
        (stored,) = delivery.batches(Rows.of(rows), [len(rows)])
        assert torch.equal(source.values(stored, draws).float(), rounded.float())
    assert rounded.shape == (100, 8, *((12, 12) if view == "plain" else (8, 8)))


def test_the_same_layer_has_the_same_scales(session: Session) -> None:
    record, layer = record_of(session), frozen_layer(session.run, 1, session.device)
    again = scales.keep(session, 1, layer.layer, features(session, 0, "train"))
    assert again == {key: record[key] for key in ("scales", "quantiser")}


def test_the_percentile_is_the_recipes(tmp_path: Path) -> None:
    clipped = []
    for percentile in (90.0, 100.0):
        text = tiny(layers=2, epochs=1, precision="uint4") + f"percentile = {percentile}\n"
        session = open_run(tmp_path / str(percentile), text)
        solve(session, 1)
        clipped.append(record_of(session)["quantiser"]["clipped"])
    assert 0.02 < clipped[0] < 0.1
    assert clipped[1] == 0


# --- kept, named and checked ---------------------------------------------------------------------


def test_another_scale_is_another_feature(session: Session) -> None:
    before = session.run.nodes()
    path = session.run.layer_directory(1) / "quantiser.safetensors"
    tensors, _ = weights.read(path)
    tensors["scale"][0] = torch.nextafter(tensors["scale"][0], torch.tensor(torch.inf))
    weights.write(path, tensors)
    changed = {**record_of(session), "scales": weights.digest(tensors)}
    session.run.write_layer(1, changed)
    after = session.run.nodes()
    assert after[0].fingerprint == before[0].fingerprint
    assert after[1].fingerprint != before[1].fingerprint
    assert after[1].intent["scales"] == weights.digest(tensors)


@pytest.mark.parametrize("name", ["quantiser.safetensors", "weights.safetensors"])
def test_a_flipped_byte_is_refused_by_name(session: Session, name: str) -> None:
    path = session.run.layer_directory(1) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LevelDamaged, match=re.escape(str(path))) as caught:
        materialize(session, 1)
    assert exit_code(caught.value) == 10


def test_a_flipped_byte_beside_a_level_is_refused_by_name(session: Session) -> None:
    materialize(session, 1)
    path = session.store.open(session.key(1, "train", "plain")).directory / "scale/c.0"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LevelDamaged, match=re.escape(str(path))):
        features(session, 1, "train")


def test_a_level_that_was_removed_is_made_again_with_the_same_scales(session: Session) -> None:
    key = session.key(1, "train", "plain")
    materialize(session, 1)
    before = session.store.open(key).let_go()
    session.store.remove(1, key.fingerprint)
    materialize(session, 1)
    after = session.store.open(key)
    assert (after.content_root, after.arrays) == (before.content_root, before.arrays)
    layer = frozen_layer(session.run, 1, session.device)
    assert isinstance(layer.stored, Quantiser)
    assert np.array_equal(after.array("scale"), layer.stored.scale)
    assert np.array_equal(after.array("zero"), layer.stored.zero)


# --- read without us -----------------------------------------------------------------------------


def documented(precision: str) -> str:
    """The lines of docs/format.md that turn a level into values."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/format.md").read_text("utf-8"), re.S)
    return next(block for block in blocks if block.rstrip().endswith(f"# {precision}"))


@pytest.mark.parametrize("precision", ["bfloat16", *CODES])
@pytest.mark.parametrize(("crop", "pad"), [(8, 2), (7, 1)])
def test_plain_zarr_and_the_documented_lines_give_our_values(
    tmp_path: Path, precision: str, crop: int, pad: int
) -> None:
    """Also for lines of seven values, which four bits pack into four bytes."""
    text = tiny(layers=1, epochs=1, precision=precision, downsample="[]", views="2")
    text = text.replace("crop = 8", f"crop = {crop}").replace("pad = 2", f"pad = {pad}")
    session = open_run(tmp_path, text)
    algorithm.make(session, write=1)
    source = features(session, 1, "train")
    level = source.levels["v1"]
    found: dict[str, Any] = {"level": str(level.directory), "np": np, "zarr": zarr, "xr": xr}
    exec(documented(precision), found)
    with source.delivery(["v1"]) as delivery:
        (stored,) = delivery.batches(Rows.of(np.arange(1437)), [1437])
        ours = source.values(stored, None)
    assert source.base == 1
    assert found["x"].dtype == np.float32
    assert found["x"].shape == (1437, 8, crop, crop)
    np.testing.assert_array_equal(found["x"], ours.float().numpy())
    assert found["x"].any()


# --- what cannot be stored -----------------------------------------------------------------------


def test_float16_overflow_names_row_and_sample_and_what_to_do(tmp_path: Path) -> None:
    session = solved(tmp_path, precision="float16")
    change_weights(session, 1e5)
    with pytest.raises(NotFinite) as caught:
        materialize(session, 1)
    line = one_line(caught.value)
    pattern = (
        r"sample \d+ of the batch has the feature [\d.e+]+ in channel \d, which float16 cannot "
        r"hold. x_1 train\.plain, row (\d+), sample (\d+) of train. Set 'cache.precision' to .*32"
    )
    match = re.fullmatch(pattern, line)
    assert match, line
    ids = session.images()["train"].array("sample_id")
    assert ids[int(match[1])] == int(match[2])
    assert exit_code(caught.value) == 9


@pytest.mark.parametrize("precision", CODES)
def test_nan_is_refused_when_scales_are_chosen_and_when_levels_are_written(
    tmp_path: Path, precision: str
) -> None:
    session = solved(tmp_path, precision=precision)
    change_weights(session, float("nan"))
    layer = frozen_layer(session.run, 1, session.device).layer
    rows = np.sort(generator("calibration rows", 0).permutation(1437))
    ids = session.images()["train"].array("sample_id")
    named = f"x_1 train.plain, row {rows[0]}, sample {ids[rows[0]]} of train"
    with pytest.raises(NotFinite, match="feature nan in channel 0") as caught:
        scales.keep(session, 1, layer, features(session, 0, "train"))
    assert named in one_line(caught.value)
    with pytest.raises(NotFinite, match=f"nan in channel 0, which {precision}") as caught:
        materialize(session, 1)
    assert "x_1 train.plain, row 0" in one_line(caught.value)
    assert not inventory(session.run, session.store).written
