"""The command `statistics`: what it says of levels is what their rows hold, whoever looked."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from clusters import Cluster, cluster, session_of
from runs import Place
from spoil import flip

from strata.pipeline.feed.level_feed import LevelFeed
from strata.store.level.level import COMMIT


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("dask") / "cluster") as found:
        yield found


def test_every_level_that_is_there(place: Place) -> None:
    said = place.do("statistics", "--json")
    assert said.rc == 0, said.err
    found = json.loads(said.out)["levels"]
    names = [one["level"] for one in found]
    assert names[:2] == ["x_0 train", "x_0 test"]
    assert {"x_1 train.plain", "x_1 test", "x_2 train.plain", "x_2 test"} <= set(names)


@pytest.mark.parametrize("name", ["x_1 train.plain", "x_2 test"])
def test_figures_are_those_of_the_values(place: Place, name: str) -> None:
    depth, view = int(name[2]), name[4:]
    said = place.do("statistics", "--json", "--layer", depth)
    (told,) = (one for one in json.loads(said.out)["levels"] if one["level"] == name)
    session = session_of(place)
    split, _, shown = view.partition(".")
    level = session.store.open(session.key(depth, split, shown or "clean"))
    with LevelFeed(level, batch=64, shuffle=False) as feed:
        x = np.concatenate([x.numpy() for x, _ in feed]).astype(np.float64)
    for channel, figures in enumerate(told["channels"]):
        values = x[:, channel]
        assert figures["mean"] == pytest.approx(values.mean(), rel=1e-9)
        assert figures["deviation"] == pytest.approx(values.std(), rel=1e-9)
        assert (figures["minimum"], figures["maximum"]) == (values.min(), values.max())
        assert figures["zeros"] == pytest.approx((values == 0).mean())
    assert told["all"]["mean"] == pytest.approx(x.mean(), rel=1e-9)
    assert told["all"]["deviation"] == pytest.approx(x.std(), rel=1e-9)
    assert told["dead"] == sum((x[:, c] == 0).all() for c in range(x.shape[1]))


def test_workers_find_the_same_digits(dask: Cluster, place: Place) -> None:
    alone = place.do("statistics", "--json")
    shared = place.do("statistics", "--json", "--scheduler", dask.address)
    assert shared.rc == 0, shared.err
    assert shared.out == alone.out
    said = place.do("statistics", "--layer", 1, "--scheduler", dask.address)
    assert "2 workers at" in said.err


def test_people_see_a_line_for_every_level_or_channel(place: Place) -> None:
    levels = place.do("statistics", "--layer", 1, "--split", "test")
    assert levels.out.count("x_1 test") == 1
    channels = place.do("statistics", "--layer", 1, "--split", "test", "--channels")
    assert channels.out.count("x_1 test") == 8


@pytest.mark.parametrize("by_workers", [False, True])
def test_a_damaged_row_is_named(dask: Cluster, place: Place, by_workers: bool) -> None:
    spoiled = place.level(1, "train.plain") / "x/c.2.0.0.0"
    flip(spoiled, 100)
    words = ("--scheduler", dask.address) if by_workers else ()
    said = place.do("statistics", "--layer", 1, *words)
    assert said.rc == 10
    assert "c.2.0.0.0" in said.error


def test_a_level_that_is_not_there_is_asked_for(place: Place) -> None:
    assert place.do("evict", "--layer", 2, "--force").rc == 0
    said = place.do("statistics", "--layer", 2, "--split", "train")
    assert said.rc == 8
    assert said.error.startswith("Error: there is no level x_2 train in ")
    assert said.error.endswith("Run: strata materialize tiny --layer 2")
    assert place.do("statistics", "--layer", 9).rc == 2
    assert place.do("statistics").rc == 0, "what is there is looked at"


def test_what_is_stale_or_partial_is_left_out_and_named(place: Place) -> None:
    commit = place.level(1, "test") / COMMIT
    commit.unlink()
    said = place.do("statistics", "--layer", 1)
    assert said.rc == 0
    assert "x_1 test is partial, and left out" in said.err
    assert "x_1 test" not in said.out
