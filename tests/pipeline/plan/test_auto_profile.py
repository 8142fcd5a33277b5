"""``cache.profile = "auto"``: the profile changes time and bytes, and nothing that is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from root import MACHINES
from runs import Place, here, open_run, tiny

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.materialize.materialize import materialize
from strata.pipeline.options import Options
from strata.pipeline.plan.caching import caching
from strata.pipeline.plan.plan import make_plan
from strata.pipeline.progress import Reporter
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.run import levels
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.pipeline.train.train import solve
from strata.store.errors import LevelDamaged
from strata.store.level.codec import geometry_of_zarr

AUTO = 'profile = "auto"\n'


def text(**changes: object) -> str:
    return tiny(**{"layers": 3, "epochs": 1, **changes}) + AUTO


def machine(place: Path, **rates: float) -> Path:
    """The laptop's file with other rates."""
    lines = (MACHINES / "laptop.toml").read_text("utf-8").splitlines()
    kept = [line for line in lines if line.split(" ")[0] not in rates]
    path = place / "there.toml"
    path.write_text("\n".join([*kept, *(f"{k} = {v!r}" for k, v in rates.items())]), "utf-8")
    return path


def session(place: Path, **profiles: str) -> Session:
    """A run whose x_1 and x_2 are stored as said."""
    chosen = {int(name.removeprefix("x_")): profile for name, profile in profiles.items()}
    return replace(open_run(place, text()), profiles=chosen)


def stored(session: Session) -> list[str | None]:
    return [levels.profile_at(session.run, session.store, j) for j in (1, 2)]


def test_weights_are_the_same_in_whatever_profile_levels_are(tmp_path: Path) -> None:
    made = {
        "raw": session(tmp_path / "raw"),
        "mixed": session(tmp_path / "mixed", x_1="zstd", x_2="lz4"),
        "never": session(tmp_path / "never"),
    }
    for name, one in made.items():
        algorithm.make(one, solve=3, cached=() if name == "never" else None)
    found = {name: stored(one) for name, one in made.items()}
    assert found == {"raw": ["raw", "raw"], "mixed": ["zstd", "lz4"], "never": [None, None]}
    weights = {n: Place(tmp_path / n).weights() for n in made}
    assert weights["mixed"] == weights["raw"]
    assert weights["never"] == weights["raw"]
    assert [n.fingerprint for n in made["mixed"].run.nodes()] == [
        n.fingerprint for n in made["raw"].run.nodes()
    ]
    expected = made["mixed"].run.features(1)
    assert expected is not None
    assert expected["outcome"]["expected"]["bytes"] is None, "no ratio is known, none made up"


def test_the_order_is_that_of_packed_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strata.store.read.order.POOL_BYTES", 200_000)
    windows = []
    for name, profile in (("a", "raw"), ("b", "zstd")):
        one = session(tmp_path / name, x_1=profile)
        algorithm.make(one, solve=1, write=1)
        with ProblemFeed(one, 1) as feed:
            windows.append(feed.mixing)
    assert windows[0] == windows[1]
    assert windows[0].windows > 1


def test_a_level_that_was_begun_goes_on_as_it_was(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Once(Reporter):
        def say(self, text: str) -> None:
            if text.startswith("wrote x_1 train.plain"):
                raise Stopped

    begun = session(tmp_path, x_1="zstd")
    solve(begun, 1)
    with pytest.raises(Stopped):
        materialize(replace(begun, report=Once()), 1)
    other = session(tmp_path, x_1="raw")
    assert other.geometry(1, "train").profile == "zstd"
    assert other.geometry(2, "train").profile == "raw"
    materialize(other, 1)
    profiles = {
        other.store.geometry(key).profile  # pyright: ignore
        for key in levels.keys_at(other.run, 1)
    }
    assert profiles == {"zstd"}
    other.store.remove(1, other.run.nodes()[1].fingerprint)
    materialize(other, 1)
    assert stored(other) == ["raw", None]


def test_run_writes_what_is_cheapest_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(text())
    place = Place(tmp_path)
    slow = machine(tmp_path, disk_read=1e4, disk_write=1e4, memory=1e5)
    said = place.do("train", "--layer", 2, "--machine", slow)
    assert "'cache.profile' is auto: x_1 zstd, x_2 zstd" in said.err
    assert (
        geometry_of_zarr((place.level(1, "train.plain") / "x/zarr.json").read_bytes()).profile
        == "zstd"
    )
    fast = place.do("run", "--machine", MACHINES / "card-8gb.toml")
    assert fast.rc == 0, fast.err
    assert geometry_of_zarr((place.level(1, "test") / "x/zarr.json").read_bytes()).profile == "zstd"


def test_without_rates_it_is_raw_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(text())
    place = Place(tmp_path)
    said = place.do("materialize", "--layer", 1)
    assert said.rc == 0, said.err
    assert "'cache.profile' is auto, and that means raw: nothing is known" in said.err
    assert "Run `calibrate`" in said.err
    assert geometry_of_zarr((place.level(1, "test") / "x/zarr.json").read_bytes()).profile == "raw"
    assert "Which levels" in here("plan", *place.options).out


@pytest.mark.parametrize("cache", ["always", "never", "auto"])
def test_every_depth_has_a_profile_whatever_is_cached(tmp_path: Path, cache: str) -> None:
    """Also those that are not written on the way: somebody may ask for them."""
    recipe = parse(text(layers=4), "tiny")
    slow = machine(tmp_path, disk_read=1e4, disk_write=1e4, memory=1e5)
    options = Options(cache=cache, machine=slow, store=tmp_path)
    found = caching(recipe, make_plan(recipe), options)
    assert found.profiles == {1: "zstd", 2: "zstd", 3: "zstd"}
    by_ffcv = replace(options, loader="ffcv")
    assert caching(recipe, make_plan(recipe), by_ffcv).profiles[1] == "raw"
    fresh = parse(text(views="0"), "tiny")
    assert caching(fresh, make_plan(fresh), options).profiles == {}


@pytest.mark.parametrize("data", [b"", b"{}", b'{"codecs": [1, 2]}', b'{"codecs": [{}]}'])
def test_what_is_no_zarr_has_no_profile(data: bytes) -> None:
    with pytest.raises(LevelDamaged, match=r"zarr\.json is none of a level"):
        geometry_of_zarr(data)
