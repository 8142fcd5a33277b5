"""Values of every kind of image: kept, by one full scale for a data set, or refused by name."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from drawn import SIZE, noise, opened, pack, pets
from PIL import Image
from tiffs import tiff

from strata.stages.data.images import SPLITS, Survey, examine, read, spans, survey
from strata.stages.data.values import plain
from strata.stages.errors import BrokenImage, DataError


def folder(root: Path, **files: bytes | np.ndarray) -> Path:
    """Class folders with pets, and beside them `train_cat_NAME` …, bytes or an array as a TIFF."""
    pets(root)
    for name, data in files.items():
        split, kind, rest = name.split("_", 2)
        body = data if isinstance(data, bytes) else tiff(data)
        (root / split / kind / f"{rest}.tif").write_bytes(body)
    return root


def surveyed(root: Path) -> Survey:
    with opened(root) as source:
        return survey(source, skip_broken=True)


def read_all(root: Path, found: Survey) -> dict[str, np.ndarray]:
    """What the reading makes of the good samples, by name."""
    with opened(root) as source:
        return {
            source.name(split, i): np.asarray(read(source, split, i, found.scales)[0])
            for split in SPLITS
            for i in found.kept[split].tolist()
        }


def reasons(found: Survey) -> dict[str, str]:
    return {one.name: one.reason for one in found.broken}


def png(depth: int, colour: int, *rows: bytes, clear: bytes = b"") -> bytes:
    """A PNG of rows of the same length; `clear` is its tRNS chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    width = 8 * len(rows[0]) // depth // channels
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + (chunk(b"tRNS", clear) if clear else b"")
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


# ---- TIFF, against what is in it ----------------------------------------------------------------

_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8")


def drawn(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values over half the range of a dtype, from 0; floats up to 1."""
    rng = np.random.default_rng(1)
    if dtype[0] == "f":
        return rng.random(shape).astype(dtype)
    return rng.integers(0, min(np.iinfo(dtype).max, 65535), shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("channels", [0, 2, 3, 4])
def test_a_tiff_is_read_as_it_was_written_or_refused(dtype: str, channels: int) -> None:
    values = drawn(dtype, (5, 7, *[channels] * bool(channels)))
    if channels in (2, 4):
        values[..., -1] = 255 if dtype == "u1" else np.iinfo(dtype).max if dtype[0] != "f" else 1
    read = 0
    for order, packed, planar, white in product("<>", (False, True), (False, True), (False, True)):
        if (planar and not channels) or (white and channels):
            continue
        tags = {262: [0]} if white else {}
        data = tiff(values, order=order, packed=packed, planar=planar, tags=tags)  # pyright: ignore
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            flat, _, _, scale = plain(image)
        except (ValueError, OSError):
            continue
        read += 1
        want = values if dtype[-1] == "1" else np.rint(values * (255 / (scale or 1)))
        if channels > 2 and dtype == "u2":
            want = values >> 8
        want = 255 - want if white else want
        got = np.asarray(flat).astype(int)
        want = want[..., : got.shape[2] if got.ndim == 3 else 1] if channels else want
        if channels == 2:
            want = np.repeat(want[..., :1], 3, -1)
        np.testing.assert_array_equal(got, want, f"{dtype} {channels} {order} {packed} {planar}")
    expected = {
        ("u1", 0): 8, ("u1", 2): 4, ("u1", 3): 8, ("u1", 4): 8, ("i1", 0): 4,
        ("u2", 0): 4, ("u2", 3): 6, ("u2", 4): 6, ("i2", 0): 3, ("u4", 0): 2, ("i4", 0): 3,
        ("f4", 0): 3,
    }  # fmt: skip
    assert read == expected.get((dtype, channels), 0)


def test_what_pillow_misreads_is_refused_with_a_way_out() -> None:
    deep, floats = drawn("u2", (5, 7)), drawn("f4", (5, 7))
    colours = Image.new("P", (5, 7), 1)
    colours.putpalette([0, 0, 0, 9, 9, 9])
    buffer = io.BytesIO()
    colours.save(buffer, "TIFF")
    dark = buffer.getvalue().replace(struct.pack("<H", 9 * 256), struct.pack("<H", 9))
    refused = {
        tiff(deep, tags={262: [0]}): "0 is white",
        tiff(drawn("u2", (5, 7, 3)), planar=True): "one after the other",
        tiff(drawn("u1", (5, 7, 2)), planar=True, packed=True): "one after the other",
        tiff(floats, order=">", packed=True): "big-endian and compressed",
        tiff(np.array([[-1, 4]], np.int8)): "negative",
        dark: "its colours end at 9,",
    }
    for data, told in refused.items():
        image = Image.open(io.BytesIO(data))
        image.load()
        with pytest.raises(ValueError, match=told):
            plain(image)


def test_an_image_without_area_is_refused() -> None:
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="it has no pixels"):
            plain(Image.new("L", size))


# ---- one scale for a data set ------------------------------------------------------------------


def test_sixteen_bits_are_divided_by_257_and_rounded() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for image in (Image.fromarray(every), Image.fromarray(every.astype(np.int32))):
        flat = plain(image, {"integer": 65535})[0]
        np.testing.assert_array_equal(np.asarray(flat), (every.astype(int) + 128) // 257)


def floats(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 16, dtype=np.float32).reshape(4, 4)


def test_floats_of_0_to_1_are_multiplied(tmp_path: Path) -> None:
    root = folder(tmp_path, train_cat_a=floats(0, 1), test_dog_b=floats(0.2, 0.4))
    found = surveyed(root)
    assert not found.broken
    assert found.scales == {"float": 1}
    assert found.converted["float of 0…1, value × 255"] == 2
    values = read_all(root, found)
    np.testing.assert_array_equal(values["train/cat/a.tif"], np.arange(16).reshape(4, 4) * 17)
    np.testing.assert_array_equal(
        values["test/dog/b.tif"], np.rint(floats(0.2, 0.4) * 255).astype(int)
    )


def test_a_dark_image_among_floats_of_0_to_255_stays_dark(tmp_path: Path) -> None:
    dark, bright, black = floats(0, 5), floats(0, 255), floats(0, 0)
    root = folder(tmp_path, train_cat_a=dark, test_dog_b=bright, train_dog_c=black)
    found = surveyed(root)
    assert not found.broken
    assert found.scales == {"float": 255}
    assert found.converted["float of 0…255, rounded"] == 3
    values = read_all(root, found)
    assert values["train/cat/a.tif"].max() == 5
    np.testing.assert_array_equal(values["test/dog/b.tif"], np.arange(16).reshape(4, 4) * 17)
    assert not values["train/dog/c.tif"].any()


def test_what_cannot_be_decided_is_refused_by_name(tmp_path: Path) -> None:
    root = folder(
        tmp_path,
        train_cat_a=floats(0, 0.9),  # black, or as bright as the others?
        train_cat_b=floats(0, 200),
        train_cat_c=floats(0, 1.01),
        train_cat_d=floats(-1, 1),
        train_cat_e=floats(0, 300),
        train_cat_f=np.array([[0, np.nan]], np.float32),
        train_cat_g=np.array([[0, np.inf]], np.float32),
        train_dog_h=np.array([[-1, 9]], np.int16),
        train_dog_i=np.array([[0, 65536]], np.uint32),
    )
    found = surveyed(root)
    assert reasons(found) == {
        "train/cat/a.tif": "its floats are of 0…1, those of other images of 0…255: make them alike",
        "train/cat/c.tif": "its float values go from 0 to 1.01, must be 0…1 or 0…255",
        "train/cat/d.tif": "its float values go from -1 to 1, must be 0…1 or 0…255",
        "train/cat/e.tif": "its float values go from 0 to 300, must be 0…1 or 0…255",
        "train/cat/f.tif": "it holds NaN or infinity",
        "train/cat/g.tif": "it holds NaN or infinity",
        "train/dog/h.tif": "its integer values go from -1 to 9, must be 0…65535",
        "train/dog/i.tif": "its integer values go from 0 to 65536, must be 0…65535",
    }
    with opened(root) as source, pytest.raises(DataError, match="8 broken images of 21, the first"):
        survey(source, skip_broken=False)


@pytest.mark.parametrize("largest", [200, 1000, 4095, 16383, 65535])
@pytest.mark.parametrize("dtype", ["u2", "i4"])
def test_integers_have_the_full_scale_of_the_whole_data_set(
    tmp_path: Path, largest: int, dtype: str
) -> None:
    """12 bits in 16 do not become black, and no image is brighter than it was beside another."""
    bright, dark = np.array([[0, largest]]).astype(dtype), np.array([[7, largest // 2]], dtype)
    root = folder(tmp_path, train_cat_a=dark, test_dog_b=bright)
    found = surveyed(root)
    scale = {200: 255, 1000: 1023}.get(largest, largest)
    assert found.scales == {"integer": scale}
    values = read_all(root, found)
    for name, held in (("train/cat/a.tif", dark), ("test/dog/b.tif", bright)):
        np.testing.assert_array_equal(values[name], np.rint(held * (255 / scale)))
    told = {255: "integers of 0…255, as they are", 65535: "16-bit, value / 257"}
    assert found.converted[told.get(scale, f"integers of 0…{scale}, × 255 / {scale}")] == 2


def test_a_pgm_says_its_own_scale(tmp_path: Path) -> None:
    pgm = b"P5 2 2 4095\n" + struct.pack(">4H", 0, 1000, 2000, 4095)
    root = folder(tmp_path, train_cat_a=np.array([[0, 1023]], np.uint16))
    (root / "train/cat/b.pgm").write_bytes(pgm)
    found = surveyed(root)
    assert found.scales == {"integer": 1023, "16-bit": 65535}
    assert read_all(root, found)["train/cat/b.pgm"].tolist() == [[0, 62], [125, 255]]


def test_values_without_a_scale_are_not_guessed(tmp_path: Path) -> None:
    with (
        opened(folder(tmp_path, train_cat_0a=floats(0, 1))) as source,
        pytest.raises(BrokenImage, match=r"0a\.tif \(no survey has chosen the full scale"),
    ):
        read(source, "train", 1, {})


def test_sixteen_bit_colour_is_its_high_byte_unless_that_is_nothing(tmp_path: Path) -> None:
    deep = drawn("u2", (5, 7, 3))
    root = folder(tmp_path, train_cat_a=deep, train_cat_b=deep >> 4)
    found = surveyed(root)
    assert found.converted["16-bit colour, the high byte"] == 2
    np.testing.assert_array_equal(read_all(root, found)["train/cat/a.tif"], deep >> 8)
    (root / "train/cat/a.tif").unlink()
    assert reasons(surveyed(root)) == {
        "train/cat/b.tif": "16-bit colour of 0…4095, of which Pillow reads the high byte: save it "
        "as 8 bits"
    }


def test_the_digest_of_what_is_read_as_ever_is_what_it_was(tmp_path: Path) -> None:
    deep, colour = np.array([[0, 65535]], np.uint16), drawn("u2", (5, 7, 3))
    root = folder(tmp_path, train_cat_a=deep, train_dog_b=colour)
    with opened(root) as source:
        lines = [
            f"{split}\0{source.labels(split)[i]}\0{(name := source.name(split, i))}\0"
            f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}\n".encode()
            for split in SPLITS
            for i in range(source.count(split))
        ]
    before = surveyed(root).digest
    assert before == hashlib.sha256(b"".join(sorted(lines))).hexdigest()
    # The same files beside others are read at another scale, so they are other images.
    (root / "train/cat/a.tif").write_bytes(tiff(np.array([[0, 4095]], np.uint16)))
    assert surveyed(root).scales["integer"] == 4095
    assert surveyed(root).digest != before


# ---- alpha, colours, frames --------------------------------------------------------------------


def test_alpha_of_any_kind_is_over_white(tmp_path: Path) -> None:
    half = np.array([[[60, 255], [60, 0]]], np.uint8)
    straight = io.BytesIO()
    Image.fromarray(half, "LA").convert("RGBA").save(straight, "PNG")
    wide = struct.pack(">4H", 60 << 8, 65535, 60 << 8, 0)
    root = folder(tmp_path, train_cat_a=half)
    files = {
        "b.tif": tiff(np.array([[[60, 255], [0, 0]]], np.uint8), tags={338: [1]}),  # premultiplied
        "c.png": straight.getvalue(),
        "d.png": png(16, 4, wide),
        "e.png": png(16, 0, struct.pack(">2H", 60 * 257, 9), clear=struct.pack(">H", 9)),
        "f.png": png(8, 0, bytes([60, 9]), clear=struct.pack(">H", 9)),
        "g.png": png(8, 2, bytes([60, 60, 60, 1, 2, 3]), clear=struct.pack(">3H", 1, 2, 3)),
    }
    for name, data in files.items():
        (root / "train/cat" / name).write_bytes(data)
    # Of this one Pillow knows neither the low byte nor, so, which pixels are meant.
    low = png(16, 2, struct.pack(">3H", 1, 2, 3), clear=struct.pack(">3H", 1, 2, 4))
    (root / "train/cat/h.png").write_bytes(low)
    (root / "train/dog/i.tif").write_bytes(tiff(np.array([[0, 65535]], np.uint16)))
    found = surveyed(root)
    assert reasons(found) == {
        "train/cat/h.png": "one of its 16-bit colours is transparent: save it with alpha"
    }
    assert found.converted["transparent to white"] == 7
    values = read_all(root, found)
    for name in ("a.tif", *files):
        array = values[f"train/cat/{name}"]
        assert array.reshape(1, 2, -1)[0, :, 0].tolist() == [60, 255], name


def test_premultiplied_arrays_are_divided_by_their_alpha() -> None:
    image = Image.new("RGBA", (2, 2), (100, 50, 0, 255)).convert("RGBa")
    assert np.asarray(plain(image)[0])[0, 0].tolist() == [100, 50, 0]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colours_become_rgb_and_are_counted(tmp_path: Path, mode: str) -> None:
    buffer = io.BytesIO(tiff(np.array([[[128, 0, 0]]], np.uint8), tags={262: [8]}))  # grey, in LAB
    if mode != "LAB":
        Image.new("RGB", (SIZE, SIZE), (119, 119, 119)).convert(mode).save(buffer, "TIFF")
    root = folder(tmp_path, train_cat_a=buffer.getvalue())
    found = surveyed(root)
    assert found.converted[f"{mode} to RGB"] == 1
    assert np.abs(read_all(root, found)["train/cat/a.tif"].astype(int) - 119).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_frames_is_read_and_counted(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), (200, 0, 0)), Image.new("RGB", (SIZE, SIZE), "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    root = folder(tmp_path, train_cat_a=buffer.getvalue())
    found = surveyed(root)
    assert found.converted["the first of several frames"] == 1
    red = read_all(root, found)["train/cat/a.tif"].mean((0, 1))
    assert np.abs(red - [200, 0, 0]).max() < 3


def test_bits_below_eight_fill_the_scale(tmp_path: Path) -> None:
    for depth, step in ((1, 255), (2, 85), (4, 17)):
        data = png(depth, 0, bytes([0b10000001]))
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            found = np.asarray(plain(image)[0].convert("L"))[0]
        bits = np.unpackbits(np.array([0b10000001], np.uint8)).reshape(-1, depth)
        want = (bits * (2 ** np.arange(depth)[::-1])).sum(1) * step
        np.testing.assert_array_equal(found, want)


def test_turned_images_of_many_bits(tmp_path: Path) -> None:
    deep = np.array([[0, 65535, 0], [0, 0, 0]], np.uint16)
    image = Image.fromarray(deep)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    root = folder(tmp_path, train_cat_a=buffer.getvalue())
    values = read_all(root, surveyed(root))["train/cat/a.tif"]
    np.testing.assert_array_equal(values, np.rot90(deep, -1) // 257)


# ---- read once, by one function ----------------------------------------------------------------


def test_the_survey_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(folder(tmp_path)) as source:
        names: list[str] = []
        whole = type(source)._read  # pyright: ignore

        def counted(self: object, file: str) -> bytes:
            names.append(file)
            return whole(self, file)

        monkeypatch.setattr(type(source), "_read", counted)
        for span in spans(source):
            examine(source, *span)
    assert len(names) == len(set(names)) == 12


_RAISED = (
    *(OSError(5, "I/O"), SyntaxError("x"), struct.error("y"), zlib.error("z"), AssertionError()),
    *(RecursionError("deep"), MemoryError(), SystemError("s")),
)


@pytest.mark.parametrize("error", _RAISED)
def test_whatever_a_conversion_raises_is_a_broken_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    root = folder(
        tmp_path,
        train_cat_a=np.array([[1, 2]], np.uint8),
        train_cat_b=np.array([[[1, 2]]], np.uint8),
    )

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image, "alpha_composite", fail)
    found = surveyed(root)
    assert list(reasons(found)) == ["train/cat/b.tif"]
    assert reasons(found)["train/cat/b.tif"]


def test_a_tar_gives_the_same(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", train_cat_a=floats(0, 1), train_dog_b=noise(1, 4, 4, 4))
    packed = pack(root, tmp_path / "a.tar", "w")
    assert str(surveyed(root)) == str(surveyed(packed))
