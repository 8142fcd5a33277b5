"""Data sets that are not class folders: arrays, digits and torchvision's."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from drawn import noise, opened, pixels, refusal, save
from PIL import Image

from strata.stages.data import zoo
from strata.stages.data.images import check_labels, survey
from strata.stages.data.opening import open_source
from strata.stages.errors import BrokenImage, DataError


def arrays(path: Path, **changes: np.ndarray | None) -> Path:
    """An .npz of six grey images to train on and three to test with, with `changes`."""
    held: dict[str, np.ndarray | None] = {
        "x_train": noise(7, 6, 8, 8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": noise(8, 3, 8, 8),
        "y_test": np.array([[0], [1], [2]], np.uint8),
    }
    held |= changes
    np.savez(path, **{key: value for key, value in held.items() if value is not None})  # type: ignore[arg-type]
    return path


def test_npz(tmp_path: Path) -> None:
    with opened(arrays(tmp_path / "a.npz"), "npz") as source:
        assert source.classes == ("0", "1", "2")
        assert source.labels("test").tolist() == [0, 1, 2]
        assert source.labels("test").dtype == np.int64
        np.testing.assert_array_equal(
            pixels(source.image("train", 2), 8, 1)[0], noise(7, 6, 8, 8)[2]
        )
        check_labels(source, 3)
        before = source.signature()
        os.utime(tmp_path / "a.npz", ns=(1, 1))
        assert source.signature() != before


def test_npz_channels_first_or_last(tmp_path: Path) -> None:
    digests = set()
    colour = noise(9, 6, 8, 8, 3)
    for array in (colour, colour.transpose(0, 3, 1, 2)):
        with opened(arrays(tmp_path / "a.npz", x_train=array), "npz") as source:
            np.testing.assert_array_equal(np.asarray(source.image("train", 1)), colour[1])
            digests.add(survey(source, skip_broken=False).digest)
    assert len(digests) == 1
    assert "first or last" in refusal(
        arrays(tmp_path / "a.npz", x_train=noise(1, 6, 3, 8, 3)), "npz"
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"y_train": None},
            "holds x_train (6, 8, 8), x_test (3, 8, 8), y_test (3, 1): samples",
        ),
        ({"x_train": np.full((6, 8, 8), "a")}, "x_train in"),
        ({"y_train": np.zeros((6, 2), int)}, "labels of a sample are 2 in y_train in"),
        ({"y_train": np.zeros((6, 2, 2), int)}, "labels must be (N,) or (N, number)"),
        ({"y_train": np.full(6, "a")}, "labels must all be numbers, or all words"),
        ({"y_train": np.full(6, np.nan)}, "has label nan at 0, which is no finite number"),
        ({"y_train": np.arange(5)}, "6 samples but 5 labels in y_train in"),
        ({"y_test": np.array([0, -1, 1])}, "has label -1 at 1, must be 0..65535"),
        ({"y_test": np.array([0, 2**40, 1])}, "has label 1099511627776 at 1"),
        ({"x_train": noise(1, 6, 8)}, "train/0: it has shape (8,), an image must be (H,W)"),
        ({"x_train": noise(1, 6, 8, 8, 5)}, "it has shape (8, 8, 5), an image must be (H,W)"),
        ({"y_train": np.array([None] * 6)}, "cannot be read as an .npz"),
        ({"x_test": noise(1, 0, 8, 8), "y_test": np.zeros(0, int)}, "the test split of"),
    ],
)
def test_npz_refused(tmp_path: Path, changes: dict[str, np.ndarray | None], told: str) -> None:
    assert told in refusal(arrays(tmp_path / "a.npz", **changes), "npz")


def test_npz_missing_or_something_else(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "gone.npz", "npz")
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert "holds one array: give the folder" in refusal(tmp_path / "a.npy", "npz")
    (tmp_path / "a.txt").write_text("x")
    assert "is not an .npz file" in refusal(tmp_path / "a.txt", "npz")
    path = arrays(tmp_path / "a.npz")
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    assert "cannot be read as an .npz" in refusal(path, "npz")


def test_labels_out_of_range_name_the_sample(tmp_path: Path) -> None:
    path = arrays(tmp_path / "a.npz", y_test=np.array([0, 12, 1]))
    with opened(path, "npz") as source, pytest.raises(DataError) as caught:
        check_labels(source, 3)
    assert str(caught.value) == (
        "test sample test/1 has label 12, outside 0..2; "
        "the data set has 13 classes, the recipe says 3"
    )


def test_another_number_of_classes(tmp_path: Path) -> None:
    with (
        opened(arrays(tmp_path / "a.npz"), "npz") as source,
        pytest.raises(DataError, match=r"^the data set has 3 classes, the recipe says 10$"),
    ):
        check_labels(source, 10)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("digit", "Did you mean digits?"),
        ("imagefoldr:x", "Did you mean imagefolder?"),
        ("npz", "must be digits, torchvision:NAME, imagefolder:PATH, npz:PATH, csv:FILE"),
        ("torchvision:CIFAR01", "Did you mean CIFAR10?"),
        ("torchvision:cifar10", "Did you mean CIFAR10?"),
        ("torchvision:flowers12", "Did you mean Flowers102?"),
        ("torchvision:EuroSAT", "EuroSAT has no train and test split"),
        ("torchvision:EMNIST", "EMNIST needs more than a split: split"),
    ],
)
def test_unknown_sources(tmp_path: Path, spec: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(spec, root=tmp_path)
    assert told in str(caught.value)


def test_digits() -> None:
    with open_source("digits", root=Path("nowhere")) as source:
        assert (source.count("train"), source.count("test")) == (1437, 360)
        assert source.classes == tuple("0123456789")
        images = np.stack([pixels(source.image("train", i), 8, 1) for i in range(100)])
        assert images.shape == (100, 1, 8, 8)
        assert (images.min(), images.max()) == (0, 255)
        check_labels(source, 10)
        assert survey(source, skip_broken=False).digest == survey(source, skip_broken=False).digest
        assert len(source.signature()) == 64


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of two images a batch, in the layout of its makers."""
    from torchvision.datasets import CIFAR10

    place = tmp_path / CIFAR10.base_folder
    place.mkdir()
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for number, batch in enumerate(batches):
        held = {"data": noise(number, 2, 3072), "labels": [number, number + 1]}
        (place / batch).write_bytes(pickle.dumps(held))
    names = {"label_names": [f"kind{i}" for i in range(10)]}
    (place / "batches.meta").write_bytes(pickle.dumps(names))
    # torchvision knows the sums of the real files; None stands for any.
    monkeypatch.setattr(CIFAR10, "train_list", [[batch, None] for batch in batches[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    return tmp_path


def test_torchvision_from_local_files(cifar: Path) -> None:
    with open_source("torchvision:CIFAR10", root=cifar) as source:
        assert source.classes[3] == "kind3"
        assert source.labels("train").tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
        assert source.labels("test").tolist() == [5, 6]
        want = noise(1, 2, 3072)[1].reshape(3, 32, 32)
        np.testing.assert_array_equal(pixels(source.image("train", 3), 32, 3), want)
        found = survey(source, skip_broken=False)
        assert len(found.kept["train"]) == 10
        check_labels(source, 10)
        before = source.signature()
        os.utime(cifar / "cifar-10-batches-py/test_batch", ns=(1, 1))
        assert source.signature() != before


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "SVHN", "OxfordIIITPet", "FGVCAircraft"])
def test_torchvision_without_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(f"torchvision:{name}", root=tmp_path)
    assert f"the data set {name} is not under {tmp_path}" in str(caught.value)
    assert "--download fetches it" in str(caught.value)


@pytest.mark.parametrize("name", zoo._SETS)
def test_every_data_set_of_the_table_takes_its_arguments(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"is not under|needs a package"):
        open_source(f"torchvision:{name}", root=tmp_path)


def test_torchvision_that_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="torchvision cannot download it"):
        open_source("torchvision:FER2013", root=tmp_path)


def test_torchvision_over_files_of_images(tmp_path: Path) -> None:
    """GTSRB keeps paths: its content is the file, and its second split is called test."""
    for i in range(2):
        array = noise(i, 9, 11, 3)
        save(tmp_path / f"gtsrb/GTSRB/Training/0000{i}/a.ppm", Image.fromarray(array))
        save(tmp_path / f"gtsrb/GTSRB/Final_Test/Images/{i}.ppm", Image.fromarray(array))
    rows = "Filename;ClassId\n0.ppm;1\n1.ppm;0\n"
    (tmp_path / "gtsrb/GT-final_test.csv").write_text(rows)
    with open_source("torchvision:GTSRB", root=tmp_path) as source:
        assert source.classes == ("0", "1")
        assert source.labels("test").tolist() == [1, 0]
        assert source.name("train", 1) == "gtsrb/GTSRB/Training/00001/a.ppm"
        with Image.open(io.BytesIO(source.decoded("train", 1)[0])) as image:
            np.testing.assert_array_equal(np.asarray(image), noise(1, 9, 11, 3))
        before = source.signature()
        (tmp_path / "gtsrb/GTSRB/Training/00001/a.ppm").write_bytes(b"P6 9")
        assert source.signature() != before
        with pytest.raises(BrokenImage, match=r"Training/00001/a\.ppm"):
            source.image("train", 1)
