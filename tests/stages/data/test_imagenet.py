"""A folder like ImageNet's: large images of any kind, read in bounded memory, solved, evaluated."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from drawn import noise, save
from PIL import Image, ImageOps
from runs import Place, here, open_run

from strata.pipeline.recipe.builtin import text_of
from strata.stages.data.opening import open_source
from strata.store.feature_store import open_level

NAME = "imagenet-small"
KINDS = [f"n{n:08}" for n in range(10)]


def tiny(train: int = 31, test: int = 10) -> str:
    """imagenet-small for a few images: one epoch, narrow."""
    text = text_of(NAME)[1].replace("width = 16", "width = 4").replace("width = 32", "width = 4")
    text = text.replace("train = 9469", f"train = {train}").replace("test = 3925", f"test = {test}")
    return text.replace("epochs = 3", "epochs = 1").replace("batch = 64", "batch = 16")


def photo(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Large and smooth, so that what is left of it after resizing can be compared."""
    small = Image.fromarray(noise(seed, 3, 4, 3))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def odd(root: Path) -> Path:
    """Ten classes; the first has what ImageNet has, and worse."""
    for number, kind in enumerate(KINDS):
        for split, count in (("train", 2), ("val", 1)):
            for i in range(count):
                place = root / split / kind / f"{kind}_{i}.JPEG"
                save(place, photo(31 * number + i, 200 + 10 * i, 150))
    first, exif = root / "train" / KINDS[0], Image.Exif()
    exif[0x0112] = 6
    save(first / "grey.JPEG", photo(1, 1500, 900, "L"))
    save(first / "cmyk.JPEG", photo(2, 1200, 1600, "CMYK"))
    save(first / "turned.JPEG", photo(3, 1600, 1200), exif=exif)
    save(first / "png.JPEG", photo(4, 900, 1300), format="PNG")
    save(first / "clear.JPEG", photo(5, 640, 480, "RGBA"), format="PNG")
    save(first / "jpeg.png", photo(6, 500, 375), format="JPEG")
    save(first / "long.JPEG", photo(7, 3000, 97))
    save(first / "tiny.JPEG", photo(8, 17, 23))
    whole = (first / "grey.JPEG").read_bytes()
    (first / "short.JPEG").write_bytes(whole[: len(whole) // 2])
    (first / "empty.JPEG").write_bytes(b"")
    (first / "text.JPEG").write_text("not an image")
    return root


BROKEN = ["short.JPEG", "empty.JPEG", "text.JPEG"]
ODD = {
    "grey.JPEG": photo(1, 1500, 900, "L"),
    "cmyk.JPEG": photo(2, 1200, 1600),
    "turned.JPEG": photo(3, 1600, 1200).transpose(Image.Transpose.ROTATE_270),
    "png.JPEG": photo(4, 900, 1300),
    "clear.JPEG": photo(5, 640, 480),
    "jpeg.png": photo(6, 500, 375),
    "long.JPEG": photo(7, 3000, 97),
    "tiny.JPEG": photo(8, 17, 23),
}
"""What each is a picture of, upright and in colour."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A finished run on them, without the broken ones."""
    root = tmp_path_factory.mktemp("imagenet")
    images = f"imagefolder:{odd(root / 'images')}"
    (root / "tiny.toml").write_text(tiny())
    place = Place(root)
    refused = place.do("run", "--data", images)
    assert refused.rc == 4
    assert f"3 broken images of {30 + len(ODD) + len(BROKEN)}" in refused.error
    said = place.do("run", "--data", images, "--skip-broken")
    assert said.rc == 0, said.err
    assert "left out 3 broken images" in said.err
    assert "wrote x_0 train: 28 of 28 rows" in said.err
    return place


def test_an_image_of_any_kind_is_its_centre_upright_and_in_colour(place: Place) -> None:
    """The shorter side is resized to that of the canvas, and the centre is cut out."""
    level = open_level(place.level(0, "train"))
    rows, ids = level.read(0, len(level)), level.array("sample_id")
    with open_source(f"imagefolder:{place.root / 'images'}", root=Path()) as source:
        names = [Path(source.name("train", int(i))).name for i in ids]
    assert set(ODD) < set(names)
    assert not set(BROKEN) & set(names)
    for name, picture in ODD.items():
        want = np.asarray(ImageOps.fit(picture, (96, 96)).convert("RGB")).transpose(2, 0, 1)
        off = np.abs(rows[names.index(name)].astype(int) - want)
        assert off.mean() < 6, name


def test_it_is_evaluated_by_top_5_as_well(place: Place) -> None:
    layers = place.do("evaluate", "--json").json["layers"]
    assert len(layers) == 8
    for layer in layers:
        for found in (layer["test"], *layer["ensemble"].values()):
            assert 0 <= found["top1"] <= found["top5"] <= 1
    best = f"{100 * layers[-1]['ensemble']['probabilities']['top5']:.2f} %"
    told = place.do("evaluate").out
    assert "top-5" in told
    assert best in told


def test_fresh_crops_are_cut_from_the_same_images(place: Place) -> None:
    """The paper's way: nothing of the training images is cached but the canvas itself."""
    (place.root / "fresh.toml").write_text(tiny().replace('views = "canvas"', "views = 0"))
    images = f"imagefolder:{place.root / 'images'}"
    options = ("--run", place.root / "fresh", "--store", place.store, "--data", images)
    said = here("run", place.root / "fresh.toml", *options, "--skip-broken", "--json")
    assert said.rc == 0, said.err
    (only,) = place.store.glob("x_0-*")
    assert len(list(only.glob("*/COMMIT.json"))) == 2


def test_images_are_read_in_the_memory_of_a_few_shards(tmp_path: Path) -> None:
    """However many there are: x_0 is written shard by shard, as images come."""
    for number, kind in enumerate(KINDS):
        for split, count in (("train", 80), ("val", 4)):
            for i in range(count):
                image = photo(number, 110, 100)
                save(tmp_path / "images" / split / kind / f"{i}.JPEG", image)
    text = tiny(800, 40).replace("imagefolder:imagenette", f"imagefolder:{tmp_path / 'images'}")
    text = text.replace("[cache]", "[cache]\nshard_mb = 1")
    open_run(tmp_path / "before", text)  # whatever is imported on the way is there then
    tracemalloc.start()
    try:
        session = open_run(tmp_path, text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    level = session.images()["train"]
    assert len(level) == 800
    assert peak < 8 << 20
    assert level.nbytes > 2.5 * peak
