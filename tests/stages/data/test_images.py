"""Pixels of images of every kind, and the checking pass over a data set."""

from __future__ import annotations

import pickle
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn import SIZE, facts, noise, opened, pack, pets, pixels, save
from PIL import Image

from strata.stages.data.images import SPLITS, check_labels, survey
from strata.stages.errors import BrokenImage, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pets(tmp_path / "pets")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_gives_bytes_of_the_shape_asked_for(mode: str, channels: int) -> None:
    image = Image.fromarray(noise(1, 9, 17, 3)).convert("L" if mode == "LA" else "RGB")
    array = pixels(image.convert(mode), SIZE, channels, {"float": 255})
    assert array.shape == (channels, SIZE, SIZE)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert array.std() > 5


@pytest.mark.parametrize(("channels", "shape"), [(1, (SIZE, SIZE)), (3, (SIZE, SIZE, 3))])
def test_an_image_of_the_size_keeps_its_pixels(channels: int, shape: tuple[int, ...]) -> None:
    array = noise(2, *shape)
    want = array.reshape(SIZE, SIZE, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(Image.fromarray(array), SIZE, channels), want)


def test_grey_is_repeated_and_opaque_alpha_changes_nothing() -> None:
    grey = noise(3, SIZE, SIZE)
    np.testing.assert_array_equal(pixels(Image.fromarray(grey), SIZE, 3), np.stack([grey] * 3))
    colour = Image.fromarray(noise(4, SIZE, SIZE, 3))
    opaque = colour.convert("RGBA")
    np.testing.assert_array_equal(pixels(opaque, SIZE, 3), pixels(colour, SIZE, 3))


def test_transparency_is_white_in_rgba_and_palette(tmp_path: Path) -> None:
    assert (pixels(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), 4, 3) == 255).all()
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 20])
    image.putpixel((0, 0), 0)
    path = save(tmp_path / "p.png", image, transparency=b"\x00\xff")
    with Image.open(path) as read:
        array = pixels(read, 4, 3)
    assert array[:, 0, 0].tolist() == [255, 255, 255]
    assert array[:, 1, 1].tolist() == [200, 10, 20]


def test_exif_turns_the_image(tmp_path: Path) -> None:
    array = np.zeros((8, 16), np.uint8)
    array[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the right of the file is the bottom
    path = save(tmp_path / "turned.jpg", Image.fromarray(array), exif=exif, quality=95)
    with Image.open(path) as image:
        turned = pixels(image, 8, 1)[0]
    assert turned[0].max() < 10
    assert turned[-1].min() > 245


def test_a_damaged_exif_block_is_passed_over() -> None:
    image = Image.fromarray(noise(5, SIZE, SIZE))
    image.info["exif"] = b"Exif\0\0MM\0nonsense"
    np.testing.assert_array_equal(pixels(image, SIZE, 1)[0], np.asarray(image))


@pytest.mark.parametrize("shape", [(16, 9), (9, 16), (31, 50), (5, 4), (SIZE, 15), (1, 40), (1, 1)])
def test_resizing_is_the_shorter_side_then_the_centre(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(6, *shape, 3))
    scale = SIZE / min(image.size)
    whole = image.resize(
        (max(SIZE, round(image.width * scale)), max(SIZE, round(image.height * scale))),
        Image.Resampling.BILINEAR,
    )
    left, top = (whole.width - SIZE) // 2, (whole.height - SIZE) // 2
    want = np.asarray(whole.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1)
    got = pixels(image, SIZE, 3)
    assert np.abs(got.astype(int) - want).max() <= 1


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(DataError, match="2 channels"):
        pixels(Image.new("L", (2, 2)), 2, 2)


def test_digest_follows_content_and_not_place(folder: Path) -> None:
    def digest(path: Path) -> str:
        with opened(path) as source:
            return survey(source, skip_broken=False).digest

    before = digest(folder)
    moved = folder.rename(folder.with_name("animals"))
    assert digest(moved) == before
    path = moved / "train/dog/1.png"
    with Image.open(path) as image:
        array = np.array(image)
    array[3, 4, 0] ^= 1
    save(path, Image.fromarray(array))
    changed = digest(moved)
    assert changed != before
    path.rename(path.with_name("9.png"))
    assert digest(moved) not in (before, changed)


def spoil(folder: Path) -> None:
    """Four images broken, each in its own way."""
    whole = (folder / "train/cat/0.JPG").read_bytes()
    (folder / "train/cat/0.JPG").write_bytes(whole[: len(whole) - 20])
    (folder / "train/dog/0.JPG").write_bytes(b"")
    (folder / "train/dog/1.png").write_text("not an image")
    whole = (folder / "test/dog/1.png").read_bytes()
    (folder / "test/dog/1.png").write_bytes(whole[:60] + bytes(20) + whole[80:])


def test_broken_images_are_named_and_counted(folder: Path) -> None:
    spoil(folder)
    done: list[int] = []
    with opened(folder) as source, pytest.raises(DataError) as caught:
        survey(source, skip_broken=False, tick=done.append)
    assert sum(done) == 12
    text = str(caught.value)
    assert text.startswith("4 broken images of 12, the first: train/cat/0.JPG (")
    assert "truncated" in text
    assert "train/dog/0.JPG (the file is empty)" in text
    assert "train/dog/1.png (not an image in a known format)" in text
    assert "test/dog/1.png" not in text


def test_broken_images_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    whole = facts(opened(folder))[-1]
    spoil(folder)
    for path in (folder, pack(folder, tmp_path / "a.tar.gz", "w:gz")):
        with opened(path) as source:
            found = survey(source, skip_broken=True)
        assert found.kept["train"].tolist() == [1, 2, 3, 6, 7]
        assert found.kept["test"].tolist() == [0, 1, 2]
        assert found.kept["test"].dtype == np.int64
        assert [one.name for one in found.broken][-1] == "test/dog/1.png"
        assert found.digest != whole


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [("train/cat", "all images of class cat in the train split"), ("test", "all 4 images of the")],
)
def test_leaving_out_must_leave_something(folder: Path, spoilt: str, told: str) -> None:
    for path in (folder / spoilt).rglob("*.*"):
        path.write_bytes(b"broken")
    with opened(folder) as source, pytest.raises(DataError, match=told):
        survey(source, skip_broken=True)


def test_a_bomb_is_a_broken_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    save(folder / "train/cat/0.JPG", Image.new("L", (25, 20)))  # Pillow only warns of this one
    save(folder / "train/cat/1.png", Image.new("L", (100, 100)))
    with warnings.catch_warnings(record=True) as told, opened(folder) as source:
        warnings.simplefilter("always")
        found = survey(source, skip_broken=True)
        with pytest.raises(BrokenImage) as caught:
            source.image("train", 0)
    assert not told
    assert [one.name for one in found.broken] == ["train/cat/0.JPG", "train/cat/1.png"]
    assert caught.value.reason == "25 x 20 pixels, the bound is 400 in all"


def test_a_warning_of_pillow_is_neither_shown_nor_an_error(folder: Path) -> None:
    image = Image.new("P", (5, 5))
    image.putpalette([0, 0, 0, 9, 9, 9])
    path = save(folder / "train/cat/0.png", image, transparency=b"\0\xff")
    data = path.read_bytes()
    # A frame count of an animation without frames, which Pillow warns of and then passes over.
    chunk = b"acTL" + bytes(8)
    chunk = (8).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    path.write_bytes(data[:33] + chunk + data[33:])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Image.open(path).close()
        assert len(told) == 1
        with opened(folder) as source:
            survey(source, skip_broken=False)
        assert len(told) == 1


def test_a_file_gone_since_opening_is_broken(folder: Path) -> None:
    with opened(folder) as source:
        (folder / "train/cat/0.JPG").unlink()
        with pytest.raises(BrokenImage, match=r"0\.JPG \(No such file or directory\)$"):
            source.image("train", 0)


def test_broken_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BrokenImage("a.jpg", "empty")))
    assert (error.name, error.reason, str(error)) == (
        "a.jpg",
        "empty",
        "broken image a.jpg (empty)",
    )


def test_the_real_cifar(test_data: Path) -> None:
    path = test_data / "cifar10-jpeg.tar.xz"
    with opened(path) as source:
        assert (source.count("train"), source.count("test")) == (50_000, 10_000)
        check_labels(source, 10)
        assert (np.bincount(source.labels("train")) == 5000).all()
        for i in np.random.default_rng(0).integers(0, 10_000, 20).tolist():
            for split in SPLITS:
                image = source.image(split, i)
                assert image.size == (32, 32)
                array = pixels(image, 32, 3)
                np.testing.assert_array_equal(array.transpose(1, 2, 0), np.asarray(image))
