"""What a look at a data set finds, and how one without a test split is divided."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import Form, noise, pets, refusal
from PIL import Image

from strata.stages.data.images import survey
from strata.stages.data.look import Facts, look
from strata.stages.data.opening import open_source
from strata.stages.errors import DataError


def at(spec: str, **how: Any) -> Facts:
    return look(spec, root=Path("nowhere"), **how)


def arrays(path: Path, x: Any, y: Any) -> str:
    np.savez(path, x=x, y=y)
    return f"npz:{path}"


# ---- look ---------------------------------------------------------------------------------------


def test_images(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    Image.fromarray(noise(0, 30, 20, 3)).save(root / "train/dog/9.png")
    (root / "train/dog/notes.txt").write_text("x")
    found = at(f"imagefolder:{root}")
    assert (found.classes, found.names, found.labels) == (2, ("cat", "dog"), "classes")
    assert found.counts == {"train": 9, "test": 4}
    assert found.sizes == ((12, 12), (12, 12), (30, 20))
    assert (found.channels, found.shape, found.dtype) == (3, (), "uint8")
    assert found.mean == pytest.approx([0.5] * 3, abs=0.06)
    assert found.std == pytest.approx([0.29] * 3, abs=0.06)
    assert found.left_out == {"no image": (1, "train/dog/notes.txt")}


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    x = noise(3, 40, 10, 10, 3)
    found = at(arrays(tmp_path / "a.npz", x, np.arange(40) % 4))
    assert found.counts == {"train": 40}
    np.testing.assert_allclose(found.mean, (x / 255).mean((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(found.std, (x / 255).std((0, 1, 2)), rtol=1e-3)
    assert found.mean == tuple(float(f"{one:.4g}") for one in found.mean)
    grey = at(arrays(tmp_path / "b.npz", x[..., 0], np.arange(40) % 4))
    assert (grey.channels, grey.mean) == (1, (found.mean[0],))


def test_values_of_more_than_8_bits_are_of_the_scale_of_all(tmp_path: Path) -> None:
    x = noise(3, 8, 10, 10) / 255
    dark = x * np.array([0.5, 1] * 4)[:, None, None]
    found = at(arrays(tmp_path / "a.npz", (dark * 65535).astype(np.uint16), np.arange(8) % 2))
    np.testing.assert_allclose(found.mean, dark.mean(), rtol=3e-3)
    few = np.minimum((dark * 65535).astype(np.uint16), [[[1000]], [[65535]]] * 4)
    found = at(arrays(tmp_path / "b.npz", few, np.arange(8) % 2))
    np.testing.assert_allclose(found.mean, few.mean() / 65535, rtol=3e-3)


@pytest.mark.parametrize(
    ("array", "shape", "dtype"),
    [
        (np.full((8, 6, 6, 12), 7, np.uint16), (12, 6, 6), "uint16"),
        (np.full((8, 12, 6, 6), 7, np.float16), (12, 6, 6), "float16"),
        (np.full((8, 20), 0.5), (20,), "float32"),
        (np.full((8, 20), 3), (20,), "int32"),
        (np.full((8, 5, 30), -1.0, np.float32), (5, 30), "float32"),
        (np.full((8, 3, 9, 9), -1.5), (3, 9, 9), "float32"),
        (np.full((8, 4, 5, 6, 2), 1, np.uint8), (2, 4, 5, 6), "uint8"),
        (np.full((8, 2, 3), -4, np.int16), (2, 3), "float32"),
    ],
)
def test_arrays(tmp_path: Path, array: np.ndarray, shape: tuple[int, ...], dtype: str) -> None:
    spec = arrays(tmp_path / "a.npz", array, np.arange(8) / 8)
    found = at(spec)
    assert (found.shape, found.dtype, found.channels) == (shape, dtype, shape[0])
    assert (found.sizes, found.labels, found.classes) == ((), "numbers", 1)
    tokens = dtype == "int32"
    assert found.mean == (() if tokens else (float(array.flat[0]),) * shape[0])
    assert found.std == (() if tokens else (1.0,) * shape[0])  # it never changes
    with open_source(spec, root=tmp_path, form=Form(shape, dtype, split=0.25)) as source:
        survey(source, skip_broken=False)  # what was found is what a recipe may say


def test_broken_samples_are_passed_over(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    for file in sorted(root.rglob("*.png")):
        file.write_bytes(b"x")
    assert at(f"imagefolder:{root}").sizes[0] == (12, 12)
    for file in sorted(root.rglob("*.JPG")):
        file.write_bytes(b"x")
    with pytest.raises(DataError, match=r"all 8 samples looked at are broken.*train/cat/0\.JPG"):
        at(f"imagefolder:{root}")


def test_a_large_set_is_looked_at_in_part(tmp_path: Path) -> None:
    x = noise(0, 2000, 4, 5)
    x[1500:] = 0  # the sample is of all of it
    spec = arrays(tmp_path / "a.npz", x, np.zeros(2000, int))
    found = at(spec)
    assert found.counts == {"train": 2000}
    assert found.mean[0] == pytest.approx(0.375, abs=0.04)
    assert found.mean[0] != pytest.approx((x / 255).mean(), abs=1e-6)
    assert at(spec) == found


# ---- a split ------------------------------------------------------------------------------------


def names(spec: str, form: Form) -> dict[str, list[str]]:
    with open_source(spec, root=Path("nowhere"), form=form) as source:
        return {s: [source.name(s, i) for i in range(source.count(s))] for s in source.splits}


def test_every_class_gives_its_share(tmp_path: Path) -> None:
    y = np.repeat([0, 1, 2, 3], [50, 20, 2, 1])
    spec = arrays(tmp_path / "a.npz", noise(0, 73, 8, 8), y)
    with open_source(spec, root=tmp_path, form=Form((), "uint8", split=0.2)) as source:
        assert np.bincount(source.labels("test"), minlength=4).tolist() == [10, 4, 1, 0]
        assert np.bincount(source.labels("train")).tolist() == [40, 16, 1, 1]
        both = {source.name(s, i) for s in ("train", "test") for i in range(source.count(s))}
        assert both == {f"train/{i}" for i in range(73)}
        for i in range(source.count("test")):
            number = int(source.name("test", i).partition("/")[2])
            np.testing.assert_array_equal(source.image("test", i), noise(0, 73, 8, 8)[number])


def test_the_draw_is_of_the_seed_and_of_the_name_alone(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets") / "train"
    shutil.rmtree(tmp_path / "pets/test")
    spec, form = f"imagefolder:{tmp_path / 'pets'}", Form((), "uint8", split=0.3)
    before = names(spec, form)
    assert [len(before["train"]), len(before["test"])] == [6, 2]
    assert names(spec, form) == before
    seeds = [names(spec, Form((), "uint8", split=0.3, split_seed=seed)) for seed in range(8)]
    assert len({tuple(one["test"]) for one in seeds}) > 3
    for i in range(20):
        Image.fromarray(noise(i, 8, 8)).save(root / f"dog/more-{i}.png")
    cats = [[name for name in n["test"] if "cat" in name] for n in (before, names(spec, form))]
    assert cats[0] == cats[1]


def test_labels_that_are_no_classes_are_drawn_from_all(tmp_path: Path) -> None:
    spec = arrays(tmp_path / "a.npz", noise(0, 40, 8, 8), np.linspace(0, 1, 40))
    assert len(names(spec, Form((), "uint8", split=0.25))["test"]) == 10


def test_a_split_is_for_data_that_have_none(tmp_path: Path) -> None:
    told = "has a test split of 4 samples: leave out 'data.split' and --split"
    form = Form((), "uint8", split=0.2)
    with pytest.raises(DataError, match=told):
        at(spec := f"imagefolder:{pets(tmp_path / 'a')}", form=form)
    with open_source(spec, root=tmp_path, form=form) as source:
        assert source.count("train") == 8
    one = arrays(tmp_path / "a.npz", noise(0, 3, 8, 8), [0, 1, 2])
    with pytest.raises(DataError, match=r"the test split of .* has no images"):
        open_source(one, root=tmp_path, form=Form((), split=0.5))
    assert "a fifth of its 3 samples is drawn to test with" in refusal(tmp_path / "a.npz", "npz")


def test_the_signature_follows_the_split(tmp_path: Path) -> None:
    spec = arrays(tmp_path / "a.npz", noise(0, 40, 8, 8), np.arange(40) % 2)
    found = set()
    for form in (Form((), split=0.2), Form((), split=0.3), Form((), split=0.2, split_seed=1)):
        with open_source(spec, root=tmp_path, form=form) as source:
            found.add(source.signature())
    assert len(found) == 3
