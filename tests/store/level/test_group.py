"""A level as a Zarr group: xarray, Dask and Zarr open it as README and docs/format.md type it.

Warnings are errors here, as in all tests.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import xarray as xr
import zarr
from root import ROOT
from shard_files import shard_path
from small_levels import KEY, SHAPES, SMALL, begin, contents, drawn

from strata.store.errors import LevelStale
from strata.store.feature_store import Store
from strata.store.files.publish import sealed, unseal
from strata.store.level.layout import PRECISIONS, Geometry, precision, shard_name
from strata.store.level.level import COMMIT, Level, receipt_path
from strata.store.write.contents import beside_levels
from strata.store.write.verify import check_level, forget_damage, level_directories

PROFILES = ["raw", "zstd", "lz4"]
FORMS = {
    f"{kind}-{name}-{profile}": replace(shape, precision=name, profile=profile)
    for kind, shape in SHAPES.items()
    for name in sorted(PRECISIONS)
    for profile in (PROFILES if kind == "map" else ["raw"])
}
EVERY_FORM = pytest.mark.parametrize("shape", FORMS.values(), ids=list(FORMS))
ARRAYS = {"label": np.arange(11) % 3, "sample_id": np.arange(11)[::-1].copy()}
SCALES = {"scale": np.array([0.5, 3], np.float32), "zero": np.array([7, 0], np.uint8)}


def documented(page: str, of: str) -> str:
    """The block of code of a page in which some text is."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)
    return next(block for block in blocks if of in block)


def full(root: Path, shape: Geometry, rows: np.ndarray | None = None) -> Level:
    """A level with all small arrays that its precision has."""
    scales = {}
    if shape.precision in ("uint8", "uint4"):
        scales = {name: np.resize(array, shape.features) for name, array in SCALES.items()}
    writer = begin(root, shape, drawn(shape) if rows is None else rows)
    return writer.commit(None, ARRAYS | scales)


def poisoned(shape: Geometry) -> np.ndarray:
    """Rows of which one is, value for value, what a hole reads as."""
    rows = drawn(shape).copy()
    rows[3] = precision(shape.precision).poison
    return rows


@EVERY_FORM
def test_the_documented_lines_open_it(tmp_path: Path, shape: Geometry) -> None:
    level = full(tmp_path, shape, poisoned(shape))
    names: dict[str, Any] = {"level": str(level.directory), "dask": dask, "xr": xr, "zarr": zarr}
    exec(documented("docs/format.md", "open_group(level"), names)
    stored, ds = level.read(0, len(level)), names["ds"]
    for x in (names["x"][:], ds.x.to_numpy(), names["lazy"].compute()):
        assert (x.dtype, x.shape) == (stored.dtype, stored.shape)
        assert x.tobytes() == stored.tobytes(), "no code is masked, no value is made a float"
    lengths = dict(zip(("sample", *shape.axes), (11, *shape.sample), strict=True))
    shared = {d for (d, n), own in zip(lengths.items(), ds.x.shape, strict=True) if own != n}
    assert [d.removesuffix("_pair") for d in ds.x.dims] == [*lengths]
    assert {f"{d}_pair" for d in shared} == {d for d in ds.x.dims if d.endswith("_pair")}
    assert bool(shared) == (shape.precision == "uint4")
    assert set(ds.data_vars) == {"x", *level.arrays}
    assert not ds.coords
    for name, array in ARRAYS.items():
        assert ds[name].dims == ("sample",)
        assert ds[name].dtype == np.int64
        assert ds[name].to_numpy().tolist() == array.tolist() == level.array(name).tolist()
    assert names["y"][:].tolist() == ARRAYS["label"].tolist()


def test_what_is_said_of_it(tmp_path: Path) -> None:
    level = full(tmp_path, replace(SMALL, precision="uint8"))
    ds = xr.open_zarr(level.directory)
    assert ds.attrs == {"level": KEY.label, **vars(KEY), "precision": "uint8"}
    assert ds.x.dims == ("sample", "channel", "height", "width")
    assert ds.scale.dims == ds.zero.dims == ("channel",)
    assert all("long_name" in ds[name].attrs for name in level.arrays)
    assert ds.isel(sample=4).label == 1, "one row with its label"


def test_scales_go_by_the_name_of_the_axis_that_has_them(tmp_path: Path) -> None:
    """So that the documented line, which multiplies by names, is right for tokens, too."""
    shape = replace(SHAPES["tokens"], precision="uint8")
    scales = {"scale": np.array([0.5, 3, 2], np.float32), "zero": np.array([7, 0, 1], np.uint8)}
    level = begin(tmp_path, shape, drawn(shape)).commit(None, ARRAYS | scales)
    ds = xr.open_zarr(level.directory)
    x = (ds.x.astype("float32") - ds.zero.astype("float32")) * ds.scale
    assert x.dims == ("sample", "token", "feature")
    expected = (level.read(0, 11).astype(np.float32) - scales["zero"]) * scales["scale"]
    assert np.array_equal(x.to_numpy(), expected)
    assert ds.scale.attrs["long_name"] == "step between the codes of the feature"


def test_every_token_may_have_a_label(tmp_path: Path) -> None:
    shape, labels = replace(SMALL, sample=(5,), precision="int32"), np.arange(55).reshape(11, 5)
    level = begin(tmp_path, shape, drawn(shape)).commit(None, {"label": labels})
    ds = xr.open_zarr(level.directory)
    assert (ds.label.dims, ds.x.dims) == (("sample", "token"), ("sample", "feature"))
    assert np.array_equal(ds.label.to_numpy(), labels)
    assert np.array_equal(Level.open(tmp_path, KEY).array("label"), labels)
    assert check_level(tmp_path, level.directory, deep=True) == []
    assert not beside_levels(tmp_path)[1], "every file of it belongs into a store"
    (level.directory / "label/c.0.0").unlink()
    (damage,) = check_level(tmp_path, level.directory)
    assert damage.path == level.directory / "label/c.0.0"
    assert (xr.open_zarr(level.directory).label == -1).all()


@pytest.mark.parametrize(
    ("damage", "reads"),
    [("label", -1), ("sample_id", -1), ("zero", 255), ("scale", np.nan)],
)
def test_a_small_array_that_is_gone_reads_as_poison(
    tmp_path: Path, damage: str, reads: float
) -> None:
    level = full(tmp_path, replace(SMALL, precision="uint8"))
    (level.directory / damage / "c.0").unlink()
    seen = xr.open_zarr(level.directory)[damage].to_numpy()
    np.testing.assert_array_equal(seen, np.full_like(seen, reads))


def test_its_metadata_is_that_of_its_arrays(tmp_path: Path) -> None:
    """What is consolidated is, for every array, what lies beside it; and zarr finds no other."""
    level = full(tmp_path, replace(SMALL, precision="uint4"))
    whole = json.loads((level.directory / "zarr.json").read_bytes())
    found = whole["consolidated_metadata"]["metadata"]
    assert [*found] == ["label", "sample_id", "scale", "x", "zero"]
    for name, metadata in found.items():
        own = json.loads((level.directory / name / "zarr.json").read_bytes())
        assert {**own, "storage_transformers": []} == {**metadata, "storage_transformers": []}


def test_arrays_of_the_other_byte_order_are_turned(tmp_path: Path) -> None:
    arrays = {name: array.astype(">i8") for name, array in ARRAYS.items()}
    level = begin(tmp_path, SMALL, drawn(SMALL)).commit(None, arrays)
    assert level.array("label").tolist() == ARRAYS["label"].tolist()
    assert xr.open_zarr(level.directory).sample_id.to_numpy().tolist() == [*range(10, -1, -1)]


# --- up to format 3 a level was an array ----------------------------------------------------------


def older(level: Level, *, commit: bool = True) -> Path:
    """Give a level the layout that it had: shards and small arrays in the level's directory."""
    directory = level.directory
    (directory / "zarr.json").write_bytes((directory / "x/zarr.json").read_bytes())
    for shard in range(level.geometry.shards):
        path = receipt_path(directory, shard)
        shard_path(directory, shard).rename(directory / shard_name(shard))
        path.write_bytes(sealed({**unseal(path), "key": shard_name(shard)}))
    for name in level.arrays:
        np.save(directory / f"{name}.npy", level.array(name))
        shutil.rmtree(directory / name)
    shutil.rmtree(directory / "x")
    np.save(directory / "labels.npy", ARRAYS["label"])
    body = {**unseal(directory / COMMIT), "format": 3}
    (directory / COMMIT).write_bytes(sealed(body)) if commit else (directory / COMMIT).unlink()
    return directory


@pytest.mark.parametrize("deep", [True, False])
def test_a_level_of_the_old_layout_is_named_and_written_anew(tmp_path: Path, deep: bool) -> None:
    level = full(tmp_path, SMALL).let_go()
    before = contents(tmp_path)
    directory = older(level)
    with pytest.raises(LevelStale, match=r"is stale: it has format 3, and this version reads 4"):
        Level.open(tmp_path, KEY)
    found = check_level(tmp_path, directory, deep=deep)
    assert [damage.path for damage in found] == [directory / COMMIT]
    assert level_directories(tmp_path) == [directory]
    forget_damage(tmp_path, directory)
    assert Store(tmp_path).state(KEY).state == "partial"
    assert full(tmp_path, SMALL).array("label").tolist() == ARRAYS["label"].tolist()
    assert contents(tmp_path) == before


def test_what_was_begun_in_the_old_layout_is_begun_again(tmp_path: Path) -> None:
    """Nobody finds damage in it, and no receipt of it vouches for a shard."""
    level = full(tmp_path, SMALL).let_go()
    before = contents(tmp_path)
    directory = older(level, commit=False)
    assert check_level(tmp_path, directory, deep=True) == []
    writer = begin(tmp_path, SMALL, drawn(SMALL), [])
    assert writer.missing() == [0, 1, 2]
    assert sorted(path.name for path in directory.iterdir()) == ["receipts", "x"]
    full(tmp_path, SMALL)
    assert contents(tmp_path) == before


def test_what_was_begun_stays_whatever_lies_beside(tmp_path: Path) -> None:
    """A writer that was killed just before its commit."""
    directory = full(tmp_path, SMALL).let_go().directory
    (directory / COMMIT).unlink()
    (directory / "zarr.json").write_bytes(b"half")
    before = shard_path(directory, 0).stat().st_ino
    assert begin(tmp_path, SMALL, drawn(SMALL), []).missing() == []
    assert shard_path(directory, 0).stat().st_ino == before


@pytest.mark.parametrize("remove", [Store.remove, Store.remove_level])
def test_it_is_removed_like_any_other(tmp_path: Path, remove: Callable[..., Any]) -> None:
    directory = older(full(tmp_path, SMALL).let_go())
    remove(Store(tmp_path), *((KEY.depth, KEY.fingerprint) if remove is Store.remove else (KEY,)))
    assert not directory.exists()


def test_an_array_that_no_level_has_is_named(tmp_path: Path) -> None:
    level = full(tmp_path, SMALL)
    with pytest.raises(KeyError, match="'labels' is no array of a level; there may be label, "):
        level.array("labels")
