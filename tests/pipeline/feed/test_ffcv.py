"""The optional ffcv reads what Level.take reads: every row, in the order asked for, to the bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ffcv_levels import NEEDS_FFCV, images, skip_unless_it_imports
from rows_of import divided, equal, stored, views, written
from runs import open_run, tiny
from small_levels import SHAPES, drawn
from spoil import flip

from strata.pipeline.errors import LoaderError
from strata.pipeline.feed.ffcv.beton import ffcv, read_beton
from strata.pipeline.feed.ffcv.rows import FfcvBeton, FfcvLevels, image_file
from strata.pipeline.feed.ffcv.write import write_images
from strata.pipeline.feed.prefetch import Reader
from strata.store.errors import LevelDamaged
from strata.store.level.layout import PRECISIONS, Geometry
from strata.store.level.level import Level
from strata.store.read.rows import Rows

pytestmark = NEEDS_FFCV
BATCH = 7
RGB, GREY, JPEG = "rgb.beton", "grey.beton", "jpeg.beton"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> None:
    skip_unless_it_imports()


def parts_of(rows: int, seed: int = 0, batch: int = BATCH) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(rows)
    return [order[at : at + batch] for at in range(0, rows, batch)]


def of_one(parts: list[np.ndarray]) -> tuple[Rows, list[int]]:
    """Rows of a level that is alone."""
    return Rows.of(np.concatenate(parts)), [len(part) for part in parts]


# ---- raw levels, in place -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_rows_of_several_views_and_shards_are_those_of_take(
    tmp_path: Path, precision: str, kind: str
) -> None:
    """A ragged last shard, rows of an odd number of bytes, a second epoch in another order."""
    shape = replace(SHAPES[kind], rows=45, precision=precision, shard_rows=8)
    levels = views(tmp_path, replace(shape, sample=(3, 5, 3)) if kind == "map" else shape)
    with Reader(FfcvLevels(levels), 2) as rows:
        for seed in (0, 1):
            parts = parts_of(90, seed)
            found = list(rows.batches(*divided(levels[0].geometry, parts)))
            assert [len(batch) for batch in found] == [len(part) for part in parts]
            assert equal(np.concatenate(found), stored(levels, np.concatenate(parts)))


def test_one_view_more_than_one_page_per_row(tmp_path: Path) -> None:
    shape = Geometry(20, (16, 33, 33), "float32", chunk_rows=3, shard_rows=6)
    levels = views(tmp_path, shape, 1)
    with Reader(FfcvLevels(levels), 1) as rows:
        parts = parts_of(20)
        found = np.concatenate(list(rows.batches(*of_one(parts))))
        assert equal(found, stored(levels, np.concatenate(parts)))


def test_any_row_any_number_of_times(tmp_path: Path) -> None:
    levels = views(tmp_path, Geometry(9, (1, 2, 2), "uint8", chunk_rows=2, shard_rows=4), 1)
    asked = np.array([8, 0, 0, 8, 3])
    with Reader(FfcvLevels(levels), 2) as rows:
        (found,) = rows.batches(Rows.of(asked), [5])
        assert equal(found, stored(levels, asked))
        assert list(rows.batches(Rows.of(asked[:0]), [])) == []
        for wrong in (Rows.of(np.array([-1])), Rows.of(np.array([9])), Rows.of(asked, view=1)):
            with pytest.raises(IndexError, match=r"of [19]$"):
                list(rows.batches(wrong, [len(wrong)]))


@pytest.mark.parametrize("lengths", [[1, 2, 1], [4, 4, 3, 4, 4, 3, 0, 2], [0, 0, 5], [3, 2, 1]])
def test_parts_of_any_lengths(tmp_path: Path, lengths: list[int]) -> None:
    """Blocks within shards, and ranks whose part of a last batch is empty."""
    levels = views(tmp_path, Geometry(40, (2, 3, 2), "float16", chunk_rows=2, shard_rows=8), 1)
    ends = np.cumsum(lengths)
    parts = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    with Reader(FfcvLevels(levels), 2) as rows:
        found = list(rows.batches(*of_one(parts)))
    assert [batch.shape for batch in found] == [(length, 3, 2, 2) for length in lengths]
    assert equal(np.concatenate(found), stored(levels, np.arange(ends[-1])))


def test_a_batch_is_memory_of_its_own(tmp_path: Path) -> None:
    """It can be kept, written to, and outlives the reader."""
    levels = views(tmp_path, Geometry(40, (2, 3, 2), "float16", chunk_rows=2, shard_rows=8))
    parts = divided(levels[0].geometry, parts_of(80))
    with Reader(FfcvLevels(levels), 2) as rows:
        kept = []
        for batch in rows.batches(*parts):
            kept.append((batch, batch.copy()))
            batch.flags.writeable = True
    assert all(equal(batch, copy) for batch, copy in kept)
    assert not np.shares_memory(kept[0][0], kept[-1][0])


@pytest.mark.parametrize("at", [100, -40], ids=["a row", "the last row"])
def test_a_flipped_bit_is_an_error_and_names_the_row(tmp_path: Path, at: int) -> None:
    shape = Geometry(16, (2, 8, 8), "float16", chunk_rows=1, shard_rows=4)
    levels = views(tmp_path, shape)
    flip(levels[1].directory / "x/c.2.0.0.0", at if at > 0 else 4 * shape.row_bytes + at)
    row = 8 if at > 0 else 11
    with (
        Reader(FfcvLevels(levels), 2) as rows,
        pytest.raises(LevelDamaged, match=rf"train\.v1/x/c\.2\.0\.0\.0: row {row} is not"),
    ):
        list(rows.batches(*divided(shape, parts_of(32))))


def test_a_packed_level_is_refused(tmp_path: Path) -> None:
    shape = Geometry(5, (1, 2, 2), "uint8", chunk_rows=2, shard_rows=4, profile="zstd")
    with pytest.raises(LoaderError, match=r"x_1 train\.v0 is packed with zstd"):
        FfcvLevels(views(tmp_path, shape, 1))


def test_views_of_different_geometry_are_refused(tmp_path: Path) -> None:
    one = views(tmp_path / "a", Geometry(5, (1, 2, 2), "uint8", chunk_rows=2, shard_rows=4), 1)
    other = views(tmp_path / "b", Geometry(6, (1, 2, 2), "uint8", chunk_rows=2, shard_rows=4), 1)
    with pytest.raises(ValueError, match="geometry"):
        FfcvLevels([*one, *other])


# ---- x_0 as a .beton ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Level]]:
    """Raw colours, raw grey, and JPEG, with the level of each."""
    root = tmp_path_factory.mktemp("betons")
    rgb, grey = images(root / "rgb", 150, 3, 64), images(root / "grey", 150, 1, 9)
    told: list[int] = []
    wanted = [(RGB, rgb, None), (GREY, grey, None), (JPEG, rgb, 90)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(lambda w: write_images(root / w[0], w[1], w[2], told.append), wanted))
    assert sum(told) == 3 * 150
    assert sorted(p.name for p in root.iterdir() if p.is_file() and p.name[0] != ".") == sorted(
        name for name, _, _ in wanted
    )
    return {name: (root / name, level) for name, level, _ in wanted}


@pytest.mark.parametrize("name", [RGB, GREY])
def test_a_raw_beton_has_the_same_pixels_as_the_level(
    betons: dict[str, tuple[Path, Level]], name: str
) -> None:
    path, level = betons[name]
    parts = parts_of(150, batch=40)
    with Reader(FfcvBeton(path, level), 2) as rows, Reader(FfcvLevels([level]), 2) as in_place:
        for part, ours, theirs in zip(
            parts, rows.batches(*of_one(parts)), in_place.batches(*of_one(parts)), strict=True
        ):
            assert equal(ours, stored([level], part))
            assert equal(ours, theirs)


def test_a_jpeg_beton_is_close_and_small(betons: dict[str, tuple[Path, Level]]) -> None:
    path, level = betons[JPEG]
    parts = parts_of(150)
    with Reader(FfcvBeton(path, level), 2) as rows:
        found = np.concatenate(list(rows.batches(*of_one(parts))))
    error = found.astype(float) - stored([level], np.concatenate(parts))
    assert 20 * np.log10(255 / np.sqrt((error**2).mean())) > 30  # dB
    sizes = [read_beton(betons[n][0], level).alloc_table["size"].sum() for n in (RGB, JPEG)]
    assert sizes[1] < sizes[0] / 5


def test_any_ffcv_finds_labels_and_row_numbers_in_it(
    betons: dict[str, tuple[Path, Level]],
) -> None:
    for path, level in betons.values():
        reader = ffcv().Reader(str(path))
        assert reader.field_names == ["image", "label", "row", "crc32c"]
        assert np.array_equal(reader.metadata["f1"], level.array("label"))
        assert np.array_equal(reader.metadata["f2"], np.arange(len(level)))


def test_a_beton_of_other_images_is_never_read(
    betons: dict[str, tuple[Path, Level]], tmp_path: Path
) -> None:
    path, level = betons[RGB]
    pixels = level.read(0, len(level))
    pixels[3, 0, 0, 0] ^= 1
    changed = written(tmp_path, level.geometry, pixels, depth=0, view="clean")
    with pytest.raises(LoaderError, match="from other rows than x_0 train has now"):
        FfcvBeton(path, changed)


def byte_of_row(path: Path, row: int) -> int:
    table = ffcv().Reader(str(path)).alloc_table
    return int(table["ptr"][table["sample_id"] == row][0]) + 5


@pytest.mark.parametrize("name", [RGB, GREY, JPEG])
def test_a_flipped_bit_of_an_image_is_an_error(
    betons: dict[str, tuple[Path, Level]], tmp_path: Path, name: str
) -> None:
    path, level = betons[name]
    copy = tmp_path / name
    copy.write_bytes(path.read_bytes())
    flip(copy, byte_of_row(copy, 17))
    with (
        Reader(FfcvBeton(copy, level), 2) as rows,
        pytest.raises(LoaderError, match=f"{name}: row 17 is not the one that was written"),
    ):
        list(rows.batches(*of_one(parts_of(150))))


def test_a_beton_that_is_damaged_anywhere_else_is_refused(
    betons: dict[str, tuple[Path, Level]], tmp_path: Path
) -> None:
    path, level = betons[GREY]
    whole, copy = path.read_bytes(), tmp_path / "copy.beton"
    fields, one = ffcv().types.HeaderType.itemsize, ffcv().types.FieldDescType.itemsize
    record, rows = fields + 2 * one + 30, fields + 4 * one
    damages = [whole[:0], whole[:1000], whole[:-24], whole + whole[-24:]]
    for at in (0, 8, 16, fields, fields + 17, fields + one + 50, record, rows + 3, len(whole) - 5):
        damages.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for damage in damages:
        copy.write_bytes(damage)
        with pytest.raises(LoaderError, match=r"copy\.beton.*Remove it, and write it again"):
            FfcvBeton(copy, level)
    with pytest.raises(LoaderError, match="there is no"):
        FfcvBeton(tmp_path / "none.beton", level)


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        (Geometry(9, (5,), "int32", 2, 4), r"\(feature\) of int32"),
        (
            Geometry(9, (4, 3), "float16", 2, 4, features_last=True),
            r"\(token, feature\) of float16",
        ),
        (Geometry(9, (3, 4, 4), "float32", 2, 4), r"\(channel, height, width\) of float32"),
    ],
)
def test_an_x_0_that_is_no_images_is_refused(tmp_path: Path, shape: Geometry, what: str) -> None:
    session = open_run(tmp_path, tiny())
    session = replace(session, options=replace(session.options, loader="ffcv"))
    level = written(tmp_path / "other", shape, drawn(shape), depth=0, view="clean")
    with pytest.raises(LoaderError, match=f"ffcv reads images; x_0 train is {what}.*native"):
        image_file(session, level)
