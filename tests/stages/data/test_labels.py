"""Labels of every kind, as a level keeps them, or one line about what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from strata.stages.data.labels import labels_of
from strata.stages.errors import DataError

CALLED = {"train": "y", "test": "z"}


def kept(given: Any, targets: str = "sample") -> tuple[np.ndarray, list[str] | None]:
    labels, names = labels_of({"train": given}, CALLED, targets)
    return labels["train"], names


@pytest.mark.parametrize(
    "given",
    [
        [2, 0, 1],
        np.array([2, 0, 1], np.uint8),
        np.array([[2], [0], [1]]),
        torch.tensor([2, 0, 1]),
        [torch.tensor(2), torch.tensor(0), torch.tensor(1)],
        np.eye(3, dtype=int)[[2, 0, 1]],
        np.eye(3, dtype=bool)[[2, 0, 1]],
        np.eye(3, dtype=np.float32)[[2, 0, 1]],
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
    ],
)
def test_class_numbers_and_one_hot_rows(given: Any) -> None:
    labels, names = kept(given)
    np.testing.assert_array_equal(labels, np.array([2, 0, 1], np.int64), strict=True)
    assert names is None


def test_words_are_classes_in_alphabetical_order_over_all_splits() -> None:
    given = {"train": ["dog", "emu", "dog"], "test": np.array(["cat", "dog"], object)}
    labels, names = labels_of(given, CALLED)
    assert names == ["cat", "dog", "emu"]
    assert (labels["train"].tolist(), labels["test"].tolist()) == ([1, 2, 1], [0, 1])


@pytest.mark.parametrize(
    "given",
    [
        [0.5, 1.0, -2.0],
        np.array([0.5, 1, -2], np.float16),
        np.array([[0.5], [1], [-2]]),
        [torch.tensor(0.5), torch.tensor(1.0), torch.tensor(-2.0)],
    ],
)
def test_numbers(given: Any) -> None:
    np.testing.assert_array_equal(kept(given)[0], np.array([0.5, 1, -2], np.float32), strict=True)


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float64])
def test_several_at_once_are_numbers(dtype: type) -> None:
    given = np.array([[1, 1, 0], [0, 0, 0]], dtype)
    np.testing.assert_array_equal(kept(given)[0], given.astype(np.float32), strict=True)


def test_one_split_that_is_not_one_hot_decides_for_both() -> None:
    labels, _ = labels_of({"train": np.eye(3), "test": np.ones((2, 3))}, CALLED)
    assert {each.dtype for each in labels.values()} == {np.dtype(np.float32)}


def test_labels_of_tokens_stay_a_label_each() -> None:
    given = np.array([[1, 0], [0, 1]])
    for each in (given, given[:, :1]):
        np.testing.assert_array_equal(kept(each, "token")[0], each.astype(np.int64), strict=True)
    with pytest.raises(DataError, match=r"y is int64 \(2,\), labels of tokens must be integers"):
        kept([1, 0], "token")


def test_without_labels_there_is_one_class() -> None:
    np.testing.assert_array_equal(kept([None, None])[0], np.zeros(2, np.int64), strict=True)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([0, -1], "y has label -1 at 1, must be 0..65535"),
        ([0, 1 << 20], "y has label 1048576 at 1, must be"),
        ([0.0, float("nan")], "y has label nan at 1, which is no finite number"),
        ([[0.0, 1.5], [1e39, 0]], "y has label 1e+39 at 1, 0, which is no finite number"),
        ([[1, 2], [3]], "y cannot be read as labels"),
        ([1, None], "y is object: labels must be numbers or words"),
        (np.zeros((2, 2, 2)), "y has shape (2, 2, 2), labels must be (N,) or (N, number)"),
        ([["a", "b"], ["c", "d"]], "y is <U1: labels must be numbers or words"),
    ],
)
def test_what_is_no_label_is_said(given: Any, told: str) -> None:
    with pytest.raises(DataError) as refused:
        kept(given)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
