"""A level as a Zarr group: xarray, Dask and Zarr open it as README and docs/format.md type it.

Warnings are errors here, as in all tests.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import xarray as xr
import zarr
from root import ROOT
from small_levels import KEY, SMALL, begin, drawn

from strata.store.level.layout import PRECISIONS, Geometry, precision
from strata.store.level.level import Level

PROFILES = ["raw", "zstd", "lz4"]
FORMS = [replace(SMALL, precision=p, profile=q) for p in sorted(PRECISIONS) for q in PROFILES]
EVERY_FORM = pytest.mark.parametrize("shape", FORMS, ids=lambda s: f"{s.precision}-{s.profile}")
ARRAYS = {"label": np.arange(11) % 3, "sample_id": np.arange(11)[::-1].copy()}
SCALES = {"scale": np.array([0.5, 3], np.float32), "zero": np.array([7, 0], np.uint8)}


def documented(page: str, of: str) -> str:
    """The block of code of a page in which some text is."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)
    return next(block for block in blocks if of in block)


def full(root: Path, shape: Geometry, rows: np.ndarray | None = None) -> Level:
    """A level with all small arrays that its precision has."""
    scales = SCALES if shape.precision in ("uint8", "uint4") else {}
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
    assert ds.x.dims[:2] == ("sample", "channel") or shape.precision == "uint4"
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
