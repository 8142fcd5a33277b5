"""Arrays of any usual name, order and dtype: understood, or refused by naming what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import Form, noise, opened, refusal

from strata.stages.data.images import read, survey
from strata.stages.data.opening import open_source, open_whole
from strata.stages.errors import DataError

X, Y = noise(0, 6, 8, 8, 3), np.arange(6) % 3
NAMED: list[dict[str, Any]] = [
    {"x_train": X, "y_train": Y, "x_test": X[:3], "y_test": Y[:3]},
    {"train_images": X, "train_labels": Y, "test_images": X[:3], "test_labels": Y[:3]},
    {"X_train": X, "y_train": Y, "X_val": X[:3], "y_val": Y[:3]},
    {"trainX": X, "trainY": Y, "testX": X[:3], "testY": Y[:3]},
    {"data": X, "target": Y, "test_data": X[:3], "test_target": Y[:3], "target_names": np.ones(9)},
]


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("named", NAMED, ids=lambda named: next(iter(named)))
def test_names(tmp_path: Path, named: dict[str, Any]) -> None:
    with opened(saved(tmp_path / "a.npz", **named), "npz") as source:
        assert (source.count("train"), source.count("test")) == (6, 3)
        assert source.labels("test").tolist() == [0, 1, 2]
        np.testing.assert_array_equal(np.asarray(source.image("train", 4)), X[4])


@pytest.mark.parametrize(
    "arrays", [{"x": X, "y": Y}, {"y": Y, "X": X}, {"images": X, "labels": Y}, {}], ids=str
)
def test_one_split(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays) if arrays else np.savez(path, X, Y)
    with open_whole(f"npz:{path}", root=tmp_path) as source:
        assert (source.splits, source.count("train")) == (("train",), 6)
    assert "has no test split. Pass --split 0.2" in refusal(path, "npz")


def test_a_folder_of_npy_files_is_mapped(tmp_path: Path) -> None:
    for name, array in NAMED[0].items():
        np.save(tmp_path / f"{name}.npy", array)
    whole = saved(tmp_path / "a.npz", **NAMED[0])
    with opened(tmp_path, "npz") as source, opened(whole, "npz") as other:
        digests = [survey(each, skip_broken=False).digest for each in (source, other)]
        assert digests[0] == digests[1]
        before = source.signature()
        np.save(tmp_path / "y_train.npy", Y[::-1])
        with opened(tmp_path, "npz") as again:
            assert again.signature() != before
    assert "give the folder" in refusal(tmp_path / "x_train.npy", "npz")


def test_arrays_that_are_not_needed_are_named_and_not_read(tmp_path: Path) -> None:
    more = {"names": np.array([None, 1]), "paths": np.zeros(2)}
    with opened(saved(tmp_path / "a.npz", **NAMED[0], **more), "npz") as source:
        assert source.left_out == {"another array": (2, "names")}
    with opened(saved(tmp_path / "b.npz", **NAMED[0], x_val=X, y_val=Y), "npz") as source:
        assert source.left_out == {"beside train and test": (6, "val")}


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"a": X, "b": Y}, "holds a, b: samples and labels must be called x_train, y_train,"),
        ({"x": X}, "holds x (6, 8, 8, 3): samples and labels must be called"),
        (
            {"x": X, "images": X, "y": Y},
            "holds x (6, 8, 8, 3), images (6, 8, 8, 3), y (6,): samples",
        ),
        ({"x_test": X, "y_test": Y}, "has the splits 'test'; they must be train, and"),
        ({"x": X, "y": Y[:5]}, "has 6 samples but 5 labels in y in"),
        ({"x": Y, "y": Y}, "x in {} is int64 (6,), must be numbers of (N, …)"),
    ],
)
def test_other_arrays_are_named(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    path = saved(tmp_path / "a.npz", **arrays)
    assert told.replace("{}", str(path)) in refusal(path, "npz")


# ---- values of images ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "scales"),
    [
        (X / 255, {"float": 1}),
        ((X / 255).astype(np.float16), {"float": 1}),
        (X.astype(np.float32), {"float": 255}),
        (X.astype(np.int64), {"integer": 255}),
        (X.astype(np.uint16) * 257, {"integer": 65535}),
        (X[..., 0] / 255, {"float": 1}),
        ((X / 255).transpose(0, 3, 1, 2), {"float": 1}),
    ],
)
def test_images_of_other_dtypes_are_scaled_as_files_are(
    tmp_path: Path, array: np.ndarray, scales: dict[str, int]
) -> None:
    arrays = NAMED[0] | {"x_train": array, "x_test": array[:3]}
    with opened(saved(tmp_path / "a.npz", **arrays), "npz") as source:
        found = survey(source, skip_broken=False)
        assert found.scales == scales
        flat, _ = read(source, "train", 1, found.scales)
        want = X[1] if array.ndim == 4 else X[1][..., 0]
        np.testing.assert_array_equal(np.asarray(flat), want)


def test_one_full_scale_for_both_splits(tmp_path: Path) -> None:
    arrays = NAMED[0] | {"x_train": X / 510, "x_test": X[:3] / 255}
    with opened(saved(tmp_path / "a.npz", **arrays), "npz") as source:
        flat, _ = read(source, "train", 0, survey(source, skip_broken=False).scales)
        assert abs(np.asarray(flat).astype(int) - X[0] // 2).max() <= 1


def test_values_beyond_every_scale_are_broken(tmp_path: Path) -> None:
    for x, told in (
        ((X - 100.0) / 50, "the first: train/0 (it has values below 0: leave normalising to"),
        (X > 100, "the first: train/0 (it is bool: make it uint8, 0 and 255)"),
    ):
        path = saved(tmp_path / "a.npz", **NAMED[0] | {"x_train": x})
        with opened(path, "npz") as source, pytest.raises(DataError) as refused:
            survey(source, skip_broken=False)
        assert f"6 broken images of 9, {told}" in str(refused.value)


# ---- what is no image ----------------------------------------------------------------------------


def test_channels_last_become_the_first_axis(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5, 7, 12))
    path = saved(tmp_path / "a.npz", x_train=x, y_train=Y, x_test=x[:3], y_test=Y[:3])
    with open_source(f"npz:{path}", root=tmp_path, form=Form((12, 5, 7), "float32")) as source:
        found, sound = read(source, "train", 3)
        np.testing.assert_array_equal(
            np.asarray(found), x[3].astype(np.float32).transpose(2, 0, 1), strict=True
        )
        assert sound.changes == ("channels made the first axis", "float64 as float32")


@pytest.mark.parametrize(
    ("given", "dtype", "held"),
    [
        (np.array([0, 65535], np.uint16), "uint16", True),
        (np.array([0, 65535], np.uint16), "float32", True),
        (np.array([0, 65535], np.uint16), "float16", False),
        (np.array([0, 2049], np.uint16), "float16", False),
        (np.array([0, 255], np.int64), "uint8", True),
        (np.array([0, 256], np.int64), "uint8", False),
        (np.array([-1, 5], np.int64), "int32", True),
        (np.array([0, 1 << 31], np.int64), "int32", False),
        (np.array([0.1, 2.0]), "float16", True),
        (np.array([0.1, 1e5]), "float16", False),
        (np.array([0.1, 1e300]), "float32", False),
        (np.array([0.0, 3.0]), "int32", True),
        (np.array([0.5, 3.0]), "int32", False),
    ],
)
def test_dtypes_that_hold_the_values(
    tmp_path: Path, given: np.ndarray, dtype: str, held: bool
) -> None:
    x = np.stack([given] * 3)
    path = saved(tmp_path / "a.npz", x_train=x, y_train=Y[:3], x_test=x, y_test=Y[:3])
    if not held:
        with pytest.raises(DataError, match=f"whose values 'data.dtype' {dtype} cannot hold"):
            open_source(f"npz:{path}", root=tmp_path, form=Form((2,), dtype))
        return
    with open_source(f"npz:{path}", root=tmp_path, form=Form((2,), dtype)) as source:
        found = np.asarray(read(source, "train", 0)[0])
        np.testing.assert_array_equal(found, given.astype(dtype), strict=True)


def test_grey_images_as_maps_of_one_channel(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", **NAMED[0] | {"x_train": X[..., 0], "x_test": X[:3, ..., 0]})
    with open_source(f"npz:{path}", root=tmp_path, form=Form((1, 8, 8), "uint8")) as source:
        np.testing.assert_array_equal(np.asarray(read(source, "train", 2)[0]), X[2:3, ..., 0])
