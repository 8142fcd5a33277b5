"""Damaged files, many of them: what passes the survey is read, and all else is named."""

from __future__ import annotations

import io
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from drawn import noise, opened, pets
from PIL import Image
from tiffs import tiff

from strata.stages.data.images import read, square, survey

_EACH = 40


def files() -> dict[str, bytes]:
    """A small file of each format and of several modes."""
    grey, colour = Image.fromarray(noise(1, 9, 11)), Image.fromarray(noise(2, 9, 11, 3))
    clear = Image.fromarray(noise(3, 9, 11, 4))
    drawn = {
        "a.jpg": (colour, "JPEG", {}),
        "b.jpg": (grey, "JPEG", {"progressive": True}),
        "c.jpg": (colour.convert("CMYK"), "JPEG", {}),
        "a.png": (colour, "PNG", {}),
        "b.png": (clear, "PNG", {}),
        "c.png": (colour.quantize(8), "PNG", {"transparency": 2}),
        "d.png": (Image.fromarray(noise(4, 9, 11).astype(np.uint16) * 257), "PNG", {}),
        "a.tif": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "b.tif": (clear.convert("LA"), "TIFF", {}),
        "a.webp": (colour, "WEBP", {}),
        "b.webp": (clear, "WEBP", {"lossless": True}),
        "a.gif": (colour, "GIF", {"save_all": True, "append_images": [clear]}),
        "b.gif": (grey, "GIF", {}),
        "a.bmp": (colour, "BMP", {}),
        "b.bmp": (grey.convert("1"), "BMP", {}),
    }
    found = {}
    for name, (image, kind, options) in drawn.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    deep = struct.pack(">99H", *range(0, 9900, 100))
    found["a.pgm"], found["b.pgm"] = b"P5 11 9 255\n" + deep[:99], b"P5 11 9 9999\n" + deep
    found["c.tif"] = tiff(noise(5, 9, 11).astype(np.float32) / 255)
    found["d.tif"] = tiff(noise(6, 9, 11).astype(np.uint16) * 16, order=">")
    return found


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, most of them near the start, or a part cut out, or the end."""
    body = bytearray(data)
    how = rng.integers(5)
    if how == 0:
        return bytes(body[: rng.integers(len(body))])
    if how == 1:
        start = rng.integers(len(body))
        del body[start : start + rng.integers(1, 20)]
        return bytes(body)
    reach = len(body) if how == 2 else min(len(body), 80)
    for place in rng.integers(reach, size=rng.integers(1, 6)).tolist():
        body[place] = rng.choice([0, 1, 127, 128, 255, *rng.integers(256, size=3)])
    return bytes(body)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_passes_the_survey_is_read_whatever_the_damage(tmp_path: Path, seed: int) -> None:
    rng, root = np.random.default_rng(seed), pets(tmp_path / "pets")
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    for name, data in files().items():
        for i in range(_EACH):
            (root / "train/cat" / f"{i}-{name}").write_bytes(damaged(data, rng))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opened(root) as source:
            found = survey(source, skip_broken=True)
            assert all(one.reason and "\n" not in one.reason for one in found.broken)
            kept = found.kept["train"].tolist()
            for i in kept:
                image, seen = read(source, "train", i, found.scales)
                assert not isinstance(image, np.ndarray)
                assert int(seen.digest[:8], 16) == found.sums["train"][kept.index(i)]
                for channels, size in ((1, 8), (3, 8), (3, 12)):
                    array = square(image, size, channels)
                    assert array.shape == (channels, size, size)
                    assert array.dtype == np.uint8
    left = source.count("train") - len(kept)
    assert left == len(found.broken)
    assert left > 200
    assert len(kept) > 100
