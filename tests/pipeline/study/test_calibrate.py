"""`calibrate`: this machine's rates, measured, kept in the store, and used."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import texts
from command import Result, noise, recipe
from ffcv_levels import skip_unless_it_imports
from root import MACHINES
from runs import inside

from strata.pipeline.errors import LoaderError
from strata.pipeline.plan import hardware
from strata.pipeline.plan.caching import guesses
from strata.pipeline.plan.costs import PROFILES
from strata.pipeline.plan.machine import LayerRate, Machine, RowRate, as_toml, load
from strata.pipeline.plan.worth import PRECISIONS
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.study.row_rates import decode_jpeg


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    cwd = tmp_path_factory.mktemp("calibrate")
    recipe(cwd, network__layers=3)
    return cwd, inside(cwd, "calibrate", "tiny.toml")


def test_the_figures_are_kept_in_the_store_and_nothing_else(
    calibrated: tuple[Path, Result],
) -> None:
    cwd, said = calibrated
    assert said.rc == 0, said.err
    assert "uint4 zstd" in said.out
    assert "parts" in said.err
    assert [path.name for path in (cwd / "features").iterdir()] == ["machine.toml"]
    found = load(cwd / "features/machine.toml")
    assert found.hardware == hardware.described()
    assert len(found.layers) == 3
    assert found.source.startswith("measured 20")


def test_rates_are_those_of_a_machine(calibrated: tuple[Path, Result]) -> None:
    """What must be faster is, on any machine; none is off by a thousand."""
    found = load(calibrated[0] / "features/machine.toml")
    assert 1 < found.ratio_lz4 < found.ratio_zstd < 8
    assert found.row_rate("lz4", "bfloat16").ratio == found.ratio_lz4
    every = itertools.product(PROFILES, PRECISIONS)
    assert {(rate.profile, rate.precision) for rate in found.rows} == set(every)
    for rate in found.rows:
        assert (rate.ratio == 1) == (rate.profile == "raw")
        assert 1e4 < rate.decode < 1e12
        assert 1e4 < rate.encode < 1e12
    assert 1e4 < found.gather < 1e12
    assert 1 <= found.gatherers <= max(1, hardware.cores() - 1)
    assert 1e-6 <= found.publish_shard < 10
    assert 1e-6 <= found.publish_level < 10
    assert found.device_memory is None
    assert found.decode_jpeg is None, "no JPEG in this recipe"
    assert 1e6 < found.disk_write < 1e11
    assert 1e6 < found.disk_read < 1e11
    for rate in found.layers:
        assert 1e5 < rate.train < 1e13
        assert 1e5 < rate.forward < 1e13


def test_plan_and_auto_use_them(calibrated: tuple[Path, Result]) -> None:
    cwd, _ = calibrated
    plan = inside(cwd, "plan", "tiny.toml", "--json").json
    assert plan["economics"]["source"] == load(cwd / "features/machine.toml").source
    done = inside(cwd, "train", "tiny.toml", "--layer", 2, "--cache", "auto")
    assert done.rc == 0, done.err
    assert "on this machine" in done.err
    for command in (["verify"], ["verify", "--deep"], ["du"], ["gc"]):
        where = ["--store", cwd / "features"] if command[0] in ("du", "gc") else ["tiny.toml"]
        assert inside(cwd, *command, *where).rc == 0


@pytest.mark.slow
def test_packing_is_measured_on_features_once_there_are_images(
    calibrated: tuple[Path, Result], tmp_path: Path
) -> None:
    before = load(calibrated[0] / "features/machine.toml")
    assert before.sample == "noise: there are no images yet"
    recipe(tmp_path, network__layers=3)
    assert inside(tmp_path, "train", "tiny.toml", "--layer", 1).rc == 0
    assert inside(tmp_path, "calibrate", "tiny.toml").rc == 0
    found = load(tmp_path / "features/machine.toml")
    assert found.sample == "features of x_1"
    packed = recipe(tmp_path, network__layers=3, cache__profile="zstd")
    assert "A guess" not in inside(tmp_path, "plan", packed, "--run", "other").out
    assert inside(tmp_path, "materialize", packed, "--layer", 1, "--run", "packed").rc == 0
    (outcome,) = (
        o
        for o in inside(tmp_path, "report", packed, "--run", "packed", "--json").json["outcomes"]
        if o["step"] == "write x_1"
    )
    assert outcome["expected"]["bytes"] == pytest.approx(outcome["measured"]["bytes"], rel=0.2)
    other = recipe(tmp_path, network__width=12, cache__profile="zstd", cache__precision="uint8")
    said = inside(tmp_path, "plan", other, "--run", "third").out
    assert "A guess: how" not in said, "it was measured, too"
    assert "rates of layers" in said
    other = recipe(tmp_path, cache__profile="auto", cache__precision="bfloat16")
    said = inside(tmp_path, "plan", other, "--run", "fourth").out
    assert "A guess: how bfloat16 features pack was not measured." in said


def test_tokens_with_a_label_each_are_measured(tmp_path: Path) -> None:
    texts.written(tmp_path)
    said = inside(tmp_path, "calibrate", "tiny.toml")
    assert said.rc == 0, said.err
    found = inside(tmp_path, "plan", "tiny.toml", "--json").json["economics"]
    assert found["source"].startswith("measured 20")


def test_figures_of_another_machine_are_noticed(
    calibrated: tuple[Path, Result], tmp_path: Path
) -> None:
    recipe(tmp_path)
    path = tmp_path / "features/machine.toml"
    path.parent.mkdir()
    other = replace(load(calibrated[0] / "features/machine.toml"), hardware="Z80, 1 cores, 64 kB")
    path.write_text(as_toml(other), "utf-8")
    refused = inside(tmp_path, "train", "tiny.toml", "--layer", 2, "--cache", "auto")
    assert refused.rc == 8
    assert "measured on another machine (Z80, 1 cores, 64 kB)" in refused.error
    assert "Run `calibrate`" in refused.error
    plan = inside(tmp_path, "plan", "tiny.toml")
    assert plan.rc == 0, "it says all the rest"
    assert "measured on another machine" in plan.out
    named = inside(tmp_path, "plan", "tiny.toml", "--machine", path)
    assert named.rc == 0, "whoever names a file means it"


def test_a_file_says_what_was_measured(tmp_path: Path) -> None:
    rates: dict[str, Any] = {f.name: 1.5e9 for f in fields(Machine) if f.type == "float"}
    layers = (LayerRate("3 to 4 at 8x8, k 1 of 0", 2e9, 3e9), LayerRate('odd "kind"', 1.0, 1e30))
    rows = (RowRate("raw", "uint4", 1.0, 2.0, 1.0), RowRate("zstd", "uint4", 3.0, 4.0, 5.0))
    machine = Machine("é", "a test", "cuda", layers=layers, rows=rows, **rates)
    assert machine.device_memory is None
    path = tmp_path / "machine.toml"
    path.write_text(as_toml(machine), "utf-8")
    assert load(path) == machine
    assert load(path).rates("3 to 4 at 8x8, k 1 of 0").train == 3e9
    assert load(path).rates("unknown").train == machine.train
    assert load(path).row_rate("zstd", "uint4") == rows[1]
    assert load(path).row_rate("zstd", "uint8").decode == machine.decode_zstd
    more = replace(machine, device_memory=8e9, decode_jpeg=2e9)
    path.write_text(as_toml(more), "utf-8")
    assert load(path) == more


@pytest.mark.slow
def test_decoding_jpeg_is_measured_where_a_recipe_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"data__channels": 3, "data__mean": [0.5] * 3, "data__std": [0.25] * 3}
    recipe(tmp_path, "plain", **names)
    recipe(tmp_path, "jpeg", data__jpeg=90, **names)
    plain, jpeg = (
        parse((tmp_path / f"{name}.toml").read_text("utf-8"), name) for name in ("plain", "jpeg")
    )
    images = noise(0, 40, 3, 8, 8)
    assert decode_jpeg(plain, images, tmp_path) is None
    skip_unless_it_imports()
    found = decode_jpeg(jpeg, images, tmp_path)
    assert found is not None
    assert 1e4 < found < 1e11

    def missing() -> None:
        raise LoaderError("no ffcv")

    monkeypatch.setattr("strata.pipeline.feed.ffcv.beton.ffcv", missing)
    assert decode_jpeg(jpeg, images, tmp_path / "other") is None
    there = replace(load(MACHINES / "laptop.toml"), decode_jpeg=None)
    assert guesses(jpeg, there)[0] == "A guess: images are decoded from JPEG at 1.0 GB/s."
    assert guesses(jpeg, load(MACHINES / "laptop.toml")) == []
