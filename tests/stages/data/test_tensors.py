"""Arrays that are no images, from an .npz: as they are, or one line about what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import Form

from strata.stages.data.images import check_labels, read, survey
from strata.stages.data.opening import open_source
from strata.stages.data.sources import Source
from strata.stages.errors import DataError

PLAIN = Form()
TOKENS = Form((4,), "int32", "token", 9)


def arrays(path: Path, form: Form = PLAIN, **changes: Any) -> Path:
    """Six samples to train on and three to test with."""
    draws, held = np.random.default_rng(0), dict[str, Any]()
    for split, count in (("train", 6), ("test", 3)):
        held[f"x_{split}"] = (9 * draws.random((count, *form.shape))).astype(form.dtype)
        wide = (count, 5) if form.targets == "token" else count
        held[f"y_{split}"] = np.arange(np.prod(wide)).reshape(wide) % 3
    np.savez(path, **held | changes)
    return path


def opened(path: Path, form: Form = PLAIN) -> Source:
    return open_source(f"npz:{path}", root=Path(), form=form)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32"])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4), (2, 3, 2, 2)])
def test_samples_are_as_they_are(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    form = Form(shape, dtype)
    with opened(arrays(path := tmp_path / "a.npz", form), form) as source:
        found, sound = read(source, "test", 2)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, np.load(path)["x_test"][2], strict=True)
        assert source.classes == ("0", "1", "2")
        check_labels(source, 3)
        assert (sound.kind, sound.changes, len(sound.digest)) == ("", (), 64)


def test_labels_of_tokens(tmp_path: Path) -> None:
    with opened(arrays(path := tmp_path / "a.npz", TOKENS), TOKENS) as source:
        assert source.labels("train").shape == (6, 5)
        np.testing.assert_array_equal(source.labels("train"), np.load(path)["y_train"])
        assert source.count("train") == 6
        assert len(source.classes) == 9  # those of the recipe, though no label is above 2
        check_labels(source, 9)
        with pytest.raises(DataError, match=r"sample train/0 has label 2, outside 0\.\.1"):
            check_labels(source, 2)


def test_the_digest_has_values_labels_dtype_and_shape(tmp_path: Path) -> None:
    path, found = tmp_path / "a.npz", set()
    x = np.zeros((6, 4), np.int32)
    labels = np.zeros((6, 5), np.int64)
    for array, own in ((x, labels), (x + 1, labels), (x, labels + (np.arange(5) == 4))):
        arrays(path, TOKENS, x_train=array, y_train=own)
        with opened(path, TOKENS) as source:
            found.add(survey(source, skip_broken=False).digest)
    form = Form((4,), "uint8", "token", 9)
    with opened(arrays(path, form, x_train=x.astype(np.uint8), y_train=labels), form) as source:
        found.add(survey(source, skip_broken=False).digest)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        (
            Form(dtype="uint8"),
            {"x_train": np.full((6, 4, 3), 0.5)},
            "{}: train/0: it is float64, whose values 'data.dtype' uint8 cannot hold",
        ),
        (
            Form(),
            {"x_train": np.zeros((6, 3, 4), np.float32)},
            "{}: train/0: it has shape [3, 4], 'data.shape' is [4, 3]",
        ),
        (Form(), {"y_train": np.arange(5)}, "{} has 6 samples but 5 labels in y_train in"),
        (Form(), {"y_train": np.zeros((6, 5), int)}, "are 5 in y_train in {}, and 1 in y_test in"),
        (TOKENS, {"y_train": np.zeros(6, int)}, "labels of a sample are 1 in y_train in"),
        (
            TOKENS,
            {"y_test": np.zeros((3, 4), int)},
            "are 5 in y_train in {}, and 4 in y_test in {}",
        ),
        (
            TOKENS,
            {"y_test": -np.eye(3, 5, dtype=int)},
            "y_test in {} has label -1 at 0, 0, must be",
        ),
    ],
)
def test_what_differs_is_said(
    tmp_path: Path, form: Form, changes: dict[str, Any], words: str
) -> None:
    path = arrays(tmp_path / "a.npz", form, **changes)
    with pytest.raises(DataError) as refused:
        opened(path, form)
    assert words.replace("{}", str(path)) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("float32", np.nan, "train/1 (it holds NaN or infinity)"),
        ("float16", np.inf, "train/1 (it holds NaN or infinity)"),
        ("int32", -(2**31), "train/1 (it holds -2147483648, which stands for what is missing)"),
    ],
)
def test_values_that_no_level_holds_are_broken(
    tmp_path: Path, dtype: str, value: float, words: str
) -> None:
    form, x = Form((4,), dtype), np.zeros((6, 4), dtype)
    x[1, 2] = value
    with opened(arrays(tmp_path / "a.npz", form, x_train=x), form) as source:
        with pytest.raises(DataError) as refused:
            survey(source, skip_broken=False)
        assert words in str(refused.value)
        assert survey(source, skip_broken=True).kept["train"].tolist() == [0, 2, 3, 4, 5]


def test_images_have_no_shape() -> None:
    with pytest.raises(DataError, match=r"digits holds images; 'data\.shape' is"):
        open_source("digits", root=Path(), form=Form())
