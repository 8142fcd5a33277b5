"""The feed alone: a level in, batches of (x, y) out, for whoever has no recipe."""

from __future__ import annotations

import re
import threading
import warnings
from dataclasses import replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forms import FORMS
from root import ROOT
from small_levels import drawn, flip
from torch import Tensor

from strata.pipeline.errors import BudgetError
from strata.pipeline.feed import level_feed as feeds
from strata.pipeline.feed.level_feed import LevelFeed, feed
from strata.pipeline.progress import Reporter
from strata.stages.features.calibrate import calibrate
from strata.stages.features.moments import Moments
from strata.stages.features.quantise import LEVELS, Floats, Quantiser
from strata.store.errors import LevelAbsent, LevelConflict, LevelDamaged
from strata.store.feature_store import open_level
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey
from strata.store.level.level import Level
from strata.store.read import order as orders
from strata.store.write.writer import LevelWriter

ROWS = 90
SHAPE = Geometry(ROWS, (3, 6, 6), "float16", chunk_rows=4, shard_rows=16)
LINEAGE = [{"depth": 0}, {"depth": 1}]


def values(view: int = 0, shape: Geometry = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(view)
    return rng.standard_normal((shape.rows, *shape.sample)).astype(np.float16)


def put(
    root: Path, depth: int, view: str, shape: Geometry, rows: np.ndarray, **arrays: Any
) -> Level:
    lineage = LINEAGE[: depth + 1]
    key = LevelKey(depth, fingerprint(lineage[-1]), "train", view)
    writer = LevelWriter(root, key, shape, lineage)
    writer.begin()
    for shard in range(shape.shards):
        writer.put(shard, rows[slice(*shape.shard_range(shard))])
    ids = np.random.default_rng(9).permutation(ROWS)
    return writer.commit(None, {"label": np.arange(ROWS) % 7, "sample_id": ids} | arrays)


@pytest.fixture(params=["raw", "zstd"])
def level(request: pytest.FixtureRequest, tmp_path: Path) -> Level:
    """Without the images that it was made from."""
    return put(tmp_path, 1, "v0", replace(SHAPE, profile=request.param), values())


def rows_of(x: Tensor, view: int = 0) -> list[int]:
    """Which rows these maps are: all are different."""
    known = {row.tobytes(): number for number, row in enumerate(values(view))}
    return [known[row.tobytes()] for row in x.numpy().astype(np.float16)]


def test_one_pass_is_every_row_with_its_own_label(level: Level) -> None:
    with feed(level, batch=16, ids=True) as batches:
        assert len(batches) == 6
        seen = []
        for x, y, ids in batches:
            assert (x.dtype, y.dtype, ids.dtype) == (torch.float32, torch.int64, torch.int64)
            assert x.is_contiguous(memory_format=torch.channels_last)
            rows = rows_of(x)
            seen += rows
            assert y.tolist() == [row % 7 for row in rows]
            assert ids.tolist() == level.array("sample_id")[rows].tolist()
        assert sorted(seen) == list(range(ROWS))


def order_of(batches: LevelFeed, epoch: int, start: int = 0) -> list[list[int]]:
    return [rows_of(x) for x, *_ in batches.epoch(epoch, start)]


def test_passes_are_epochs_and_the_order_is_a_function_of_seed_and_epoch(level: Level) -> None:
    with feed(level, batch=16) as one, feed(level, batch=16) as two:
        passes = [[rows_of(x) for x, _ in one] for _ in range(3)]
        assert passes == [order_of(two, epoch) for epoch in range(3)]
        assert passes[0] != passes[1]
    with feed(level, batch=16, seed=1) as other:
        assert order_of(other, 0) != passes[0]
    with feed(level, batch=16, shuffle=False, drop_last=True) as still:
        assert order_of(still, 0) == np.arange(80).reshape(5, 16).tolist()


@pytest.mark.filterwarnings("ignore:shuffle in blocks")
@pytest.mark.parametrize("tier", ["memory", "disk", "device"])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_tier_nor_threads_change_a_batch(
    level: Level, tier: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "mixing", lambda geometry: orders.Mixing(ROWS, 4, 20))
    monkeypatch.setattr("strata.pipeline.run.device.free_device_memory", lambda device: 1 << 30)
    with feed(level, batch=16, tier="disk", threads=2) as plain:
        expected = [(x.clone(), y) for x, y in plain]
    with feed(level, batch=16, tier=tier, threads=threads) as batches:
        assert batches.choice.tier == tier
        for (x, y), (x_, y_) in zip(batches, expected, strict=True):
            assert torch.equal(x, x_)
            assert torch.equal(y, y_)


def test_an_epoch_is_taken_up_in_its_middle_by_another_feed(level: Level) -> None:
    with feed(level, batch=16) as one:
        list(one)
        second = iter(one)
        next(second)
        next(second)
        state = one.state_dict()
        rest = [rows_of(x) for x, _ in second]
        third = [rows_of(x) for x, _ in one]
    with feed(level, batch=16, threads=1, tier="disk") as other:
        other.load_state_dict(state)
        assert other.state_dict() == state
        assert [rows_of(x) for x, _ in other] == rest
        assert [rows_of(x) for x, _ in other] == third
    with feed(level, batch=15) as different, pytest.raises(ValueError, match=r"size 16.* has 15"):
        different.load_state_dict(state)


def test_an_epoch_that_was_left_is_not_repeated(level: Level) -> None:
    with feed(level, batch=16) as batches:
        for _ in batches:
            break
        assert [rows_of(x) for x, _ in batches] == order_of(batches, 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_deliver_slices_of_the_same_batches(level: Level, ranks: int) -> None:
    with feed(level, batch=16) as whole:
        expected = order_of(whole, 0)
    parts = []
    for rank in range(ranks):
        with feed(level, batch=16, rank=rank, ranks=ranks) as own:
            parts.append(order_of(own, 0))
    assert len({len(part) for part in parts}) == 1
    joined = [[*chain(*slices)] for slices in zip(*parts, strict=True)]
    assert joined == expected
    assert {len(rows) for part in parts for rows in part[:-1]} == {16 // ranks}


def test_views_alternate_from_epoch_to_epoch(tmp_path: Path) -> None:
    views = [put(tmp_path, 1, f"v{v}", SHAPE, values(v)) for v in range(3)]
    known = {row.tobytes(): (v, i) for v in range(3) for i, row in enumerate(values(v))}
    used: dict[int, list[int]] = {}
    with feed(views, batch=16) as batches:
        for _ in range(3):
            for x, y in batches:
                for row, label in zip(x.numpy().astype(np.float16), y.tolist(), strict=True):
                    view, number = known[row.tobytes()]
                    used.setdefault(number, []).append(view)
                    assert label == number % 7
    assert sorted(used) == list(range(ROWS))
    assert all(sorted(views) == [0, 1, 2] for views in used.values())


def test_crops_are_windows_of_the_maps_and_change_from_epoch_to_epoch(level: Level) -> None:
    with feed(level, batch=16, crop=4, ids=True) as batches:
        places: list[list[tuple[int, int]]] = [[], []]
        sample_id = level.array("sample_id")
        row_of = np.argsort(sample_id)
        for epoch in range(2):
            for x, _, ids in batches:
                for window, sample in zip(x, ids.tolist(), strict=True):
                    whole = torch.from_numpy(values()[row_of[sample]].astype(np.float32))
                    at = [
                        (y, x0)
                        for y in range(3)
                        for x0 in range(3)
                        if torch.equal(whole[:, y : y + 4, x0 : x0 + 4], window)
                    ]
                    assert len(at) == 1
                    places[epoch] += at
    assert set(places[0]) == {(y, x) for y in range(3) for x in range(3)}
    assert places[0] != places[1]


def test_codes_become_values_or_stay_codes(tmp_path: Path) -> None:
    for precision in ("uint8", "uint4"):
        x = torch.from_numpy(values().astype(np.float32))
        scale = torch.tensor([0.02, 0.03, 0.5])
        quantiser = Quantiser(precision, scale, torch.tensor([7, 8, 9], dtype=torch.uint8))
        codes = quantiser.encode(x).numpy()
        arrays = {name: t.numpy() for name, t in quantiser.tensors().items()}
        shape = replace(SHAPE, precision=precision)
        level = put(tmp_path / precision, 1, "v0", shape, codes, **arrays)
        with feed(level, batch=ROWS, shuffle=False) as batches:
            assert torch.equal(next(iter(batches))[0], quantiser.rounded(x))
        with feed(level, batch=ROWS, shuffle=False, stored=True) as batches:
            assert np.array_equal(next(iter(batches))[0].numpy(), codes)


def of_form(root: Path, kind: str, precision: str, profile: str = "raw") -> tuple[Level, Tensor]:
    """A level of samples of some form, and their values as they are stored."""
    form, axis = FORMS[kind]
    x = form(torch.from_numpy(values().astype(np.float32)))
    codec = Floats(precision, axis)
    if precision in LEVELS:
        codec = calibrate([x], precision, 99.0, axis).quantiser
    rows = codec.encode(x).numpy()
    last = axis == -1
    shape = Geometry(ROWS, tuple(x.shape[1:]), precision, 4, 16, profile, features_last=last)
    arrays = {name: t.numpy() for name, t in codec.tensors().items()}
    return put(root, 1, "v0", shape, rows, **arrays), codec.rounded(x).float()


@pytest.mark.parametrize("kind", sorted(FORMS))
@pytest.mark.parametrize("profile", ["raw", "zstd", "lz4"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "uint8", "uint4"])
def test_samples_of_any_axes_are_delivered(
    tmp_path: Path, precision: str, profile: str, kind: str
) -> None:
    """In the order of their axes, of which the level says the names, in one piece of memory."""
    level, expected = of_form(tmp_path, kind, precision, profile)
    seen = []
    with feed(level, batch=16, ids=True) as batches:
        row_of = np.argsort(level.array("sample_id"))
        for x, y, ids in batches:
            rows = row_of[ids.numpy()]
            seen += rows.tolist()
            assert x.dtype == torch.float32
            assert x.is_contiguous()
            assert torch.equal(x, expected[rows])
            assert y.tolist() == [row % 7 for row in rows]
    assert sorted(seen) == list(range(ROWS))
    with feed(level, batch=ROWS, shuffle=False, stored=True, tier="disk") as batches:
        (x, _), *_ = batches
        assert x.numpy().tobytes() == np.ascontiguousarray(level.read(0, ROWS)).tobytes()


@pytest.mark.parametrize("kind", sorted(FORMS))
@pytest.mark.parametrize("precision", ["float16", "uint8", "uint4"])
def test_moments_are_those_of_the_channels_whatever_the_axes(
    tmp_path: Path, precision: str, kind: str
) -> None:
    level, expected = of_form(tmp_path, kind, precision)
    found = reduce(Moments.merged, map(feeds.moments_of(level), range(level.geometry.shards)))
    apart = expected.double().movedim(FORMS[kind][1], 0).flatten(1).numpy()
    assert len(found.mean) == 3
    np.testing.assert_allclose(found.mean, apart.mean(1), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.deviation, apart.std(1), rtol=1e-6)
    assert found.zeros.tolist() == (apart == 0).sum(1).tolist()


@pytest.mark.parametrize("kind", sorted(FORMS))
def test_a_crop_of_what_is_no_map_is_refused(tmp_path: Path, kind: str) -> None:
    level, _ = of_form(tmp_path, kind, "float16")
    named = re.escape(f"x_1 train.v0 is no map, but ({', '.join(level.geometry.axes)})")
    with pytest.raises(ValueError, match=f"crop is 4; {named}: leave it out"):
        feed(level, batch=16, crop=4)


@pytest.mark.parametrize("tier", ["memory", "device"])
def test_tokens_and_a_label_of_each_are_delivered(
    tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x_0 of a text: integers that stay what they are, and what comes after each."""
    monkeypatch.setattr("strata.pipeline.run.device.free_device_memory", lambda device: 1 << 30)
    shape = Geometry(ROWS, (5,), "int32", chunk_rows=4, shard_rows=16)
    tokens = np.random.default_rng(3).integers(0, 2**31, (ROWS, 5), np.int32)
    level = put(tmp_path, 0, "clean", shape, tokens, label=(tokens + 1).astype(np.int64))
    with feed(level, batch=16, tier=tier, ids=True) as batches:
        for x, y, ids in batches:
            rows = np.argsort(level.array("sample_id"))[ids.numpy()]
            assert (x.dtype, y.dtype) == (torch.int32, torch.int64)
            assert np.array_equal(x.numpy(), tokens[rows])
            assert np.array_equal(y.numpy(), (tokens[rows] + 1).astype(np.int64))
    with pytest.raises(ValueError, match=r"labels has shape \(3, 5\)"):
        feed(level, batch=16, labels=np.zeros((3, 5)))


def test_images_come_as_they_are_stored(tmp_path: Path) -> None:
    shape = Geometry(ROWS, (1, 6, 6), "uint8", chunk_rows=4, shard_rows=16)
    level = put(tmp_path, 0, "clean", shape, drawn(shape))
    with feed(level, batch=ROWS, shuffle=False) as batches:
        ((x, y),) = batches
    assert x.dtype == torch.uint8
    assert np.array_equal(x.numpy(), level.read(0, ROWS))
    assert y.tolist() == level.array("label").tolist()


def test_batches_can_be_kept_and_threads_end(level: Level) -> None:
    before = set(threading.enumerate())
    with feed(level, batch=7) as batches:
        kept = [(x, x.clone()) for x, _ in batches]
        for _ in batches:
            break
    assert set(threading.enumerate()) <= before
    assert all(torch.equal(x, copy) for x, copy in kept)


# --- what is said --------------------------------------------------------------------------------


def test_the_tier_and_its_reason_are_said(level: Level) -> None:
    class Listening(Reporter):
        def __init__(self) -> None:
            self.said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    report = Listening()
    with feed(level, batch=16, report=report) as batches:
        assert batches.choice.tier == "memory"
    assert len(report.said) == 1
    assert report.said[0].startswith("memory: x_1 ")
    assert "of memory are free" in report.said[0]


def test_a_shuffle_that_mixes_too_little_is_worth_a_warning(
    level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "mixing", lambda geometry: orders.Mixing(ROWS, 4, 20))
    with pytest.warns(UserWarning, match=r"14\.29 % of the pairs in a batch share a block, more"):
        feed(level, batch=16).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(level, batch=16, shuffle=False).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"batch": 0}, "batch is 0; x_1 train.v0 has 90 rows", id="no batch"),
        pytest.param({"batch": 91}, "batch is 91", id="more than there are"),
        pytest.param({"batch": 10, "ranks": 4}, "rank 0 of 4 .* batch of 10", id="uneven ranks"),
        pytest.param({"batch": 8, "ranks": 2, "rank": 2}, "rank 2 of 2", id="no such rank"),
        pytest.param({"batch": 8, "crop": 7}, "crop is 7; .* side of 6", id="too large a crop"),
        pytest.param({"batch": 8, "tier": "ram"}, "tier is 'ram'; .* disk", id="no such tier"),
        pytest.param({"batch": 8, "loader": "dali"}, "loader is 'dali'", id="no such loader"),
        pytest.param({"batch": 8, "labels": np.zeros(3)}, r"labels has shape \(3,\)", id="labels"),
    ],
)
def test_what_cannot_be_is_refused(level: Level, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feed(level, **options)


def test_a_tier_without_room_is_refused(level: Level) -> None:
    with pytest.raises(BudgetError, match=r"--tier device: x_1 .* is 19\.4 kB, 0 B of GPU memory"):
        feed(level, batch=8, tier="device")


def test_other_labels_can_be_given(level: Level) -> None:
    with feed(level, batch=16, labels=np.arange(ROWS), ids=True) as batches:
        for x, y, ids in batches:
            assert y.tolist() == rows_of(x)
            assert ids.tolist() == level.array("sample_id")[y].tolist()


def test_labels_that_are_damaged_are_named(level: Level) -> None:
    flip(level.directory / "label/c.0", 3)
    with pytest.raises(LevelDamaged, match=r"label/c\.0 is not the one that was committed"):
        feed(level, batch=16)


# --- a level by its directory --------------------------------------------------------------------


def test_a_level_is_opened_by_its_directory(level: Level, tmp_path: Path) -> None:
    assert open_level(str(level.directory)).key == level.key
    assert open_level(level.directory).content_root == level.content_root
    with pytest.raises(LevelAbsent, match="holds no level"):
        open_level(tmp_path / "none")
    moved = level.directory.with_name("train.v7")
    level.directory.rename(moved)
    with pytest.raises((LevelAbsent, LevelConflict)):
        open_level(moved)


def test_the_examples_of_the_page_run(level: Level) -> None:
    page = (ROOT / "docs/feed.md").read_text("utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    place = re.search(r'open_level\("(.*?)"\)', code)
    assert place is not None
    code = code.replace(place[1], str(level.directory)).replace('"cuda"', '"cpu"')
    names: dict[str, Any] = {}
    exec(code.replace("256", "16"), names)
    assert names["x"].shape == (ROWS % 16, 3, 6, 6)
    assert names["state"]["epoch"] == 10
    assert names["batches"].state_dict()["epoch"] == 11
