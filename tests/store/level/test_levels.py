"""Levels on disk: what was written is what is read, by us and by others, or it is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import shard_path
from sizes import examples
from small_levels import (
    KEY,
    SHAPES,
    SMALL,
    begin,
    chop,
    contents,
    drawn,
    flip,
    samples,
    written,
)

from strata.store.errors import LevelAbsent, LevelConflict, LevelDamaged
from strata.store.feature_store import Store
from strata.store.fingerprint import fingerprint
from strata.store.level.codec import zarr_metadata
from strata.store.level.layout import (
    PRECISIONS,
    Geometry,
    LevelKey,
    precision,
    shard_name,
)
from strata.store.level.level import COMMIT, Level, receipt_path
from strata.store.write.verify import check_level

LABELS = np.arange(SMALL.rows) % 3
PROFILES = ["raw", "zstd", "lz4"]
STORED = {
    f"{kind}-{name}-{profile}": replace(shape, precision=name, profile=profile)
    for kind, shape in SHAPES.items()
    for name in sorted(PRECISIONS)
    for profile in PROFILES
}
EVERY_FORM = pytest.mark.parametrize("shape", STORED.values(), ids=list(STORED))
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
FEW = settings(max_examples=examples(20), deadline=None)


def names_damaged(level: Level, root: Path, *, deep: bool) -> list[str]:
    """File names that verification finds damaged."""
    return [damage.path.name for damage in check_level(root, level.directory, deep=deep)]


def shard_bytes(level: Level) -> dict[str, bytes]:
    found = contents(level.directory / "x")
    return {name: data for name, data in found.items() if name != "zarr.json"}


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    rows, chunk, chunks = (draw(st.integers(1, most)) for most in (23, 4, 3))
    sample, last = draw(samples())
    name, profile = draw(st.sampled_from(sorted(PRECISIONS))), draw(st.sampled_from(PROFILES))
    return Geometry(rows, sample, name, chunk, chunk * chunks, profile, last)


# --- what is written is what is read -------------------------------------------------------------


@FEW
@given(shape=geometries(), data=st.data())
def test_any_rows_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shape: Geometry, data: st.DataObject
) -> None:
    root, rows = tmp_path_factory.mktemp("store"), drawn(shape)
    written(root, shape, rows)
    level = Level.open(root, KEY)
    assert level.read(0, len(level)).tobytes() == rows.tobytes()
    asked = data.draw(st.lists(st.integers(0, shape.rows - 1), max_size=40).map(sorted))
    out = np.empty((len(asked), *shape.lying), shape.dtype)
    level.take(np.array(asked, np.int64), out)
    out = np.moveaxis(out, -1, shape.axis)
    assert out.tobytes() == rows[np.array(asked, np.int64)].tobytes()
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, shape.rows)] * 2)))
    assert level.read(first, last).tobytes() == rows[first:last].tobytes()


@pytest.mark.parametrize("name", sorted(PRECISIONS))
@pytest.mark.parametrize(
    "poisoned", [slice(0, 11), slice(2, 4), slice(4, 8), slice(10, 11)], ids=str
)
@pytest.mark.parametrize("poison", [True, False], ids=["poison", "zeros"])
def test_constant_rows_keep_the_stride(
    tmp_path: Path, name: str, poisoned: slice, poison: bool
) -> None:
    shape = replace(SMALL, precision=name)
    rows = drawn(shape).copy()
    rows[poisoned] = precision(name).poison if poison else 0
    level = written(tmp_path, shape, rows)
    for shard in range(shape.shards):
        raw = np.moveaxis(rows[slice(*shape.shard_range(shard))], 1, -1).tobytes()
        assert shard_path(level.directory, shard).read_bytes().startswith(raw)
    assert level.read(0, 11).tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([-1, 3], id="a row before the first"),
        pytest.param([3, 11], id="a row after the last"),
    ],
)
def test_rows_outside_are_refused(tmp_path: Path, rows: list[int]) -> None:
    with pytest.raises(IndexError, match=r"x_3 train\.v0, which has 11"):
        written(tmp_path).take(np.array(rows), np.empty((2, *SMALL.lying), SMALL.dtype))


@FEW
@given(shape=geometries())
def test_the_recorded_bytes_are_the_bytes_of_the_shards(
    tmp_path_factory: pytest.TempPathFactory, shape: Geometry
) -> None:
    level = written(tmp_path_factory.mktemp("store"), shape)
    files = shard_bytes(level)
    assert set(files) == {level.path(shard).name for shard in range(shape.shards)}
    assert {Path(entry["key"]).name: entry["nbytes"] for entry in level.shards} == {
        name: len(data) for name, data in files.items()
    }
    if shape.profile == "raw":
        assert shape.nbytes == sum(map(len, files.values()))


# --- other readers -------------------------------------------------------------------------------

PIPELINE = "zarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'}); "
READERS = {
    "zarr-python": "import zarr; read = lambda p: zarr.open_array(p, mode='r')[...]",
    "zarrs": f"import zarr; {PIPELINE} read = lambda p: zarr.open_array(p, mode='r')[...]",
    "tensorstore": "import tensorstore as ts; read = lambda p: ts.open({'driver': 'zarr3', "
    "'kvstore': {'driver': 'file', 'path': p}}, open=True).result().read().result()",
}
SAVE = "; import numpy, sys; [numpy.save(p + '.npy', read(p)) for p in sys.argv[1:]]"


@pytest.mark.parametrize("reader", sorted(READERS))
def test_others_read_the_same_bytes(tmp_path: Path, reader: str) -> None:
    """In a process of its own: a reader's threads and global settings stay there."""
    maps = {name: s for name, s in STORED.items() if s.is_map}
    others = {n: s for n, s in STORED.items() if n.endswith(("float16-raw", "uint4-zstd"))}
    levels = [written(tmp_path / name, s) for name, s in (maps | others).items()]
    command = [sys.executable, "-W", "error", "-c", READERS[reader] + SAVE]
    command += [str(level.directory / "x") for level in levels]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    for level in levels:
        theirs, ours = np.load(level.directory / "x.npy"), level.read(0, len(level))
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        assert theirs.tobytes() == ours.tobytes()


@EVERY_FORM
def test_zarr_writes_the_same_files(tmp_path: Path, shape: Geometry) -> None:
    """One assignment to a local array of zarr's own, against our shards put one by one."""
    level = written(tmp_path / "ours", shape)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/zarr.json").write_bytes((level.directory / "x/zarr.json").read_bytes())
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(tmp_path / "theirs", mode="r+")[...] = drawn(shape)
    theirs = contents(tmp_path / "theirs")
    theirs.pop("zarr.json")
    assert theirs == shard_bytes(level)


@pytest.mark.parametrize("name", sorted(PRECISIONS))
def test_a_hole_reads_as_poison_through_zarr(tmp_path: Path, name: str) -> None:
    shape = replace(SMALL, precision=name)
    directory = written(tmp_path, shape, np.zeros_like(drawn(shape))).directory
    shard_path(directory, 1).unlink()
    seen = np.asarray(zarr.open_array(directory / "x", mode="r")[...])
    np.testing.assert_array_equal(seen[4:8], np.full_like(seen[4:8], precision(name).poison))
    assert not seen[:4].any()
    assert not seen[8:].any()


CODES = "(code - zero[channel]) * scale[channel]; see the arrays scale and zero"


@pytest.mark.parametrize(
    ("name", "key", "more"),
    [
        ("float32", KEY, {}),
        ("bfloat16", KEY, {"logical_dtype": "bfloat16"}),
        ("uint8", KEY, {"values": CODES}),
        ("uint8", replace(KEY, depth=0), {}),
        (
            "uint4",
            KEY,
            {
                "values": CODES,
                "packing": "two channels per byte, the first in the low bits",
                "channels": 2,
            },
        ),
    ],
)
def test_the_metadata_tells_people_what_it_is(name: str, key: LevelKey, more: dict) -> None:
    shape = replace(SMALL, precision=name)
    metadata = json.loads(zarr_metadata(shape, key))
    channel = "channel" if name != "uint4" else "channel_pair"  # scales have one a channel
    assert metadata["dimension_names"] == ["sample", channel, "height", "width"]
    assert metadata["shape"] == [11, *shape.stored]
    said = {"level": key.label, "fingerprint": key.fingerprint, "precision": name}
    assert metadata["attributes"] == said | more


@pytest.mark.parametrize(
    ("kind", "axes", "more"),
    [
        ("vector", ["feature_pair"], {"features": 5}),
        ("series", ["channel_pair", "time"], {"channels": 3}),
        ("tokens", ["token", "feature_pair"], {"features": 3}),
        ("grid of tokens", ["height", "width", "channel_pair"], {"channels": 5}),
        ("volume", ["channel_pair", "depth", "height", "width"], {"channels": 3}),
        ("volume of tokens", ["depth", "height", "width", "channel_pair"], {"channels": 3}),
    ],
)
def test_axes_have_their_own_names(kind: str, axes: list[str], more: dict[str, int]) -> None:
    metadata = json.loads(zarr_metadata(replace(SHAPES[kind], precision="uint4"), KEY))
    assert metadata["dimension_names"] == ["sample", *axes]
    assert metadata["attributes"].items() >= more.items()
    feature = next(iter(more)).removesuffix("s")
    assert f"zero[{feature}]" in metadata["attributes"]["values"]
    assert f"two {feature}s per byte" in metadata["attributes"]["packing"]


@EVERY_SHAPE
def test_only_channels_that_come_first_are_moved(tmp_path: Path, shape: Geometry) -> None:
    """What lies in a shard is what a transformer, or a convolution, reads; zarr is told how."""
    level = written(tmp_path, shape)
    (sharding,) = json.loads((level.directory / "x/zarr.json").read_bytes())["codecs"]
    moved = [c for c in sharding["configuration"]["codecs"] if c["name"] == "transpose"]
    first = len(shape.sample) > 1 and not shape.features_last
    order = [0, *range(2, 1 + len(shape.sample)), 1]
    assert [codec["configuration"]["order"] for codec in moved] == [order] * first
    assert level.path(0).name == "c.0" + ".0" * len(shape.sample)
    rows = np.moveaxis(drawn(shape)[:4], shape.axis, -1)
    assert level.path(0).read_bytes().startswith(rows.tobytes())


@EVERY_FORM
def test_a_level_that_was_begun_says_its_shape(tmp_path: Path, shape: Geometry) -> None:
    """Without a commit, which says so as well."""
    writer = begin(tmp_path, shape, drawn(shape))
    assert Store(tmp_path).geometry(KEY) == shape
    writer.commit(None, {"label": LABELS})
    assert Store(tmp_path).geometry(KEY) == shape


def test_a_commit_of_a_map_says_nothing_new(tmp_path: Path) -> None:
    """So that levels of before are what they were, to the byte."""
    said = {
        kind: json.loads((written(tmp_path / kind, SHAPES[kind]).directory / COMMIT).read_bytes())
        for kind in ("map", "tokens")
    }
    assert "features_last" not in said["map"]["body"]["geometry"]
    assert said["tokens"]["body"]["geometry"]["features_last"] is True


@pytest.mark.parametrize("sample", [(), (1, 2, 3, 4, 5)])
def test_other_numbers_of_axes_are_refused(sample: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a sample is {sample}; it may have 1 to 4")):
        zarr_metadata(replace(SMALL, sample=sample), KEY)


# --- what is refused -----------------------------------------------------------------------------


def test_without_a_commit_there_is_no_level(tmp_path: Path) -> None:
    begin(tmp_path, SMALL, drawn(SMALL))
    with pytest.raises(LevelAbsent, match=r"x_3 train\.v0"):
        Level.open(tmp_path, KEY)


def test_a_flipped_bit_anywhere_in_the_commit_is_noticed(tmp_path: Path) -> None:
    commit = written(tmp_path).directory / COMMIT
    for offset in range(0, commit.stat().st_size, 11):
        flip(commit, offset)
        with pytest.raises(LevelDamaged, match=re.escape(str(commit))):
            Level.open(tmp_path, KEY)
        flip(commit, offset)
    Level.open(tmp_path, KEY)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(f"x/{shard_name(1)}", Path.unlink, id="a missing shard"),
        pytest.param(f"x/{shard_name(2)}", chop, id="a truncated shard"),
        pytest.param("x/zarr.json", flip, id="an edited zarr.json"),
        pytest.param(COMMIT, chop, id="a truncated commit"),
    ],
)
def test_damage_is_refused_by_name(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path = written(tmp_path).directory / name
    damage(path)
    with pytest.raises(LevelDamaged, match=re.escape(str(path))):
        Level.open(tmp_path, KEY)


def test_an_edited_array_is_refused_by_name(tmp_path: Path) -> None:
    level = written(tmp_path)
    np.testing.assert_array_equal(level.array("label"), LABELS)
    flip(level.directory / "label/c.0", -1)
    with pytest.raises(LevelDamaged, match=re.escape(str(level.directory / "label/c.0"))):
        Level.open(tmp_path, KEY).array("label")


@EVERY_FORM
def test_a_flipped_bit_of_a_row_is_refused_when_it_is_first_read(
    tmp_path: Path, shape: Geometry
) -> None:
    """Wherever in the shard's data it lies, and whatever the profile."""
    rows = drawn(shape)
    path = written(tmp_path, shape, rows).path(1)
    inner = path.stat().st_size - 2 * 16 - 4
    for offset in {0, inner // 3, inner - 1}:
        flip(path, offset)
        level = Level.open(tmp_path, KEY)
        with pytest.raises(LevelDamaged, match=re.escape(str(path))) as caught:
            level.read(0, len(level))
        if shape.profile == "raw":
            assert f"row {4 + offset // shape.row_bytes} is not" in str(caught.value)
        assert level.read(0, 4).tobytes() == rows[:4].tobytes()
        assert level.read(8, 11).tobytes() == rows[8:].tobytes()
        assert names_damaged(level, tmp_path, deep=True) == [path.name]
        assert names_damaged(level, tmp_path, deep=False) == []
        flip(path, offset)
    level = Level.open(tmp_path, KEY)
    assert level.read(0, len(level)).tobytes() == rows.tobytes()
    assert names_damaged(level, tmp_path, deep=True) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_a_flipped_bit_of_an_index_never_gives_other_rows(tmp_path: Path, profile: str) -> None:
    """Our reader needs no index for raw rows. Others do, so a deep verification finds it."""
    level = written(tmp_path, replace(SMALL, profile=profile))
    path = shard_path(level.directory, 1)
    flip(path, -4 - 16)  # the offset of its second inner chunk
    assert names_damaged(level, tmp_path, deep=True) == [path.name]
    level = Level.open(tmp_path, KEY)
    if profile == "raw":
        assert level.read(0, 11).tobytes() == drawn(SMALL).tobytes()
    else:
        with pytest.raises(LevelDamaged, match=f"{re.escape(str(path))}: its index"):
            level.read(4, 5)


@pytest.mark.parametrize("profile", PROFILES)
def test_two_shards_that_changed_places_are_refused(tmp_path: Path, profile: str) -> None:
    """They have the same size, and each is whole."""
    rows = drawn(SMALL).copy()
    rows[4:8] = -rows[:4]  # packs into as many bytes
    directory = written(tmp_path, replace(SMALL, profile=profile), rows).directory
    first, second = shard_path(directory, 0), shard_path(directory, 1)
    data = first.read_bytes()
    assert len(data) == second.stat().st_size
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    for row, path in ((0, first), (4, second)):
        with pytest.raises(LevelDamaged, match=f"{re.escape(str(path))}: row {row} is not"):
            Level.open(tmp_path, KEY).read(row, row + 1)


@pytest.mark.parametrize("damage", [flip, chop, Path.unlink], ids=["flipped", "short", "missing"])
def test_a_shard_is_not_read_without_its_receipt(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    level = written(tmp_path)
    path = receipt_path(level.directory, 1)
    damage(path)
    assert names_damaged(level, tmp_path, deep=False) == [path.name]
    level = Level.open(tmp_path, KEY)
    assert level.read(0, 4).tobytes() == drawn(SMALL)[:4].tobytes()
    with pytest.raises(LevelDamaged, match=re.escape(str(path))):
        level.read(4, 5)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(KEY, fingerprint=fingerprint("another")), id="another fingerprint"),
        pytest.param(replace(KEY, fingerprint=KEY.fingerprint[:12] + "0" * 52), id="same prefix"),
        pytest.param(replace(KEY, view="v1"), id="another view"),
        pytest.param(replace(KEY, split="test"), id="another split"),
        pytest.param(replace(KEY, depth=2), id="another depth"),
    ],
)
def test_a_level_under_another_name_is_refused(tmp_path: Path, other: LevelKey) -> None:
    here, there = written(tmp_path).directory, other.directory(tmp_path)
    there.parent.mkdir(exist_ok=True)
    here.rename(there)
    with pytest.raises(LevelConflict, match=re.escape(str(there))):
        Level.open(tmp_path, other)
    with pytest.raises(LevelConflict, match=re.escape(str(there))):
        Store(tmp_path).state(other)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(drawn(SMALL)[:3], id="a row too few"),
        pytest.param(drawn(SMALL)[:5], id="a row too many"),
        pytest.param(drawn(SMALL)[:4, :, :, :1], id="a column too few"),
        pytest.param(drawn(SMALL)[:4].reshape(4, 12), id="axes too few"),
        pytest.param(np.ones((4, 2, 3, 2)), id="float64"),
        pytest.param(np.ones((4, 2, 3, 2), ">f4"), id="the other byte order"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path: Path, rows: np.ndarray) -> None:
    writer = begin(tmp_path, SMALL, drawn(SMALL), [])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"shard 0 wants \(4, 2, 3, 2\) float32, got"):
        writer.put(0, rows)
    assert contents(tmp_path) == before


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    first = begin(tmp_path, SMALL, drawn(SMALL))
    before = contents(tmp_path)
    begin(tmp_path, SMALL, drawn(SMALL, seed=1))
    assert contents(tmp_path) == before
    assert first.missing() == []
