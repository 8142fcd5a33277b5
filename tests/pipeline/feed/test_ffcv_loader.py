"""``--loader ffcv``: the same run by another reader, JPEG images, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import PETS, Result, pets, recipe, strata
from ffcv_levels import NEEDS_FFCV, images, python, skip_unless_it_imports

from strata.pipeline.feed.ffcv.write import write_images

pytestmark = [*NEEDS_FFCV, pytest.mark.slow]

STOCK = """
import sys, warnings
import numpy as np
from ffcv.fields.decoders import NDArrayDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
decoder = {"rgb": SimpleRGBImageDecoder, "grey": NDArrayDecoder}[sys.argv[2]]
loader = Loader(sys.argv[1], 16, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=True,
                drop_last=False, pipelines={"image": [decoder()], "label": None, "row": None,
                                            "crc32c": None})
np.save(sys.argv[3], np.concatenate([batch.copy() for batch, *_ in loader]))
"""


@pytest.fixture(scope="module", autouse=True)
def _importable() -> None:
    skip_unless_it_imports()


@pytest.mark.parametrize(("kind", "channels"), [("rgb", 3), ("grey", 1)])
def test_a_stock_loader_reads_the_pixels_of_the_level(
    tmp_path: Path, kind: str, channels: int
) -> None:
    """Nothing of ours is in that process."""
    level, path, out = images(tmp_path, 70, channels, 12), tmp_path / "x.beton", tmp_path / "x.npy"
    write_images(path, level)
    result = python(STOCK, str(path), kind, str(out))
    assert result.returncode == 0, result.stderr
    pixels = np.load(out)
    found = pixels.transpose(0, 3, 1, 2) if kind == "rgb" else pixels.reshape(70, channels, 12, 12)
    assert np.array_equal(found, level.read(0, 70))


def succeed(cwd: Path, *arguments: object) -> Result:
    result = strata(cwd, *arguments)
    assert result.rc == 0, result.err
    return result


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by either loader."""
    cwd = tmp_path_factory.mktemp("loaders")
    for loader in ("native", "ffcv"):
        tiny = recipe(cwd, network__layers=2)
        where = ["--run", cwd / f"run-{loader}", "--store", cwd / f"store-{loader}"]
        succeed(cwd, "run", tiny, "--loader", loader, *where)
    return cwd


def test_runs_by_either_loader_end_at_the_same_weights(both: Path) -> None:
    for name in ("layer_1", "layer_2"):
        one, other = (
            json.loads((both / f"run-{loader}" / name / "layer.json").read_text())["body"]
            for loader in ("native", "ffcv")
        )
        assert one["weights"] == other["weights"]
    curves = [
        [json.loads(line)["train_loss"] for line in path.read_text().splitlines()]
        for path in sorted(both.glob("run-*/layer_2/epochs.jsonl"))
    ]
    assert len(curves) == 2
    assert curves[0] == curves[1]


def test_the_images_lie_beside_x_0_once(both: Path) -> None:
    assert not list(both.glob("store-native/**/*.beton"))
    names = sorted(path.name for path in both.glob("store-ffcv/x_0-*/*.beton"))
    assert names == ["test.raw.beton", "train.raw.beton"]


def test_du_names_the_copies(both: Path) -> None:
    store = both / "store-ffcv"
    found = json.loads(succeed(both, "du", "--store", store, "--json").out)
    assert found["beton_bytes"] == sum(p.stat().st_size for p in store.glob("**/*.beton")) > 0
    assert "in copies for ffcv" in succeed(both, "du", "--store", store).out


def test_jpeg_images_are_another_data_set(tmp_path: Path) -> None:
    """They are read by ffcv alone, and what is trained on them has a name of its own."""
    pets(tmp_path / "pets")
    plain, jpeg = recipe(tmp_path, **PETS), recipe(tmp_path, "jpeg", **PETS, data__jpeg=70)
    succeed(tmp_path, "materialize", plain, "--layer", 1)
    refused = strata(tmp_path, "run", jpeg)
    assert refused.rc == 7
    assert "'data.jpeg' is 70" in refused.error
    assert "--loader ffcv" in refused.error
    succeed(tmp_path, "materialize", jpeg, "--layer", 1, "--loader", "ffcv")
    store = tmp_path / "features"
    assert len(list(store.glob("x_1-*"))) == 2
    assert list(store.glob("x_0-*/train.jpeg70.beton"))


def test_what_ffcv_cannot_do_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny, packed = recipe(tmp_path), recipe(tmp_path, "packed", cache__profile="zstd")
    tier = strata(tmp_path, "train", tiny, "--layer", 1, "--loader", "ffcv", "--tier", "memory")
    assert tier.rc == 7
    assert "--tier memory is for --loader native" in tier.error
    rows = strata(tmp_path, "train", packed, "--layer", 2, "--loader", "ffcv")
    assert rows.rc == 7
    assert "packed with zstd. Use --loader native" in rows.error


def test_a_damaged_copy_of_the_images_is_written_again(both: Path) -> None:
    (path,) = both.glob("store-ffcv/x_0-*/train.raw.beton")
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    where = ["--run", both / "run-again", "--store", both / "store-ffcv"]
    again = succeed(both, "train", "tiny.toml", "--layer", 1, "--loader", "ffcv", *where)
    assert "It is written again" in again.err


def test_a_store_with_a_beton_in_it_can_be_verified_and_emptied(both: Path) -> None:
    store = both / "store-ffcv"
    succeed(both, "verify", "tiny.toml", "--run", both / "run-ffcv", "--store", store)
    for run in both.glob("run-*"):
        succeed(both, "clean", "tiny.toml", "--run", run, "--store", store, "--yes")
    succeed(both, "gc", "--store", store, "--delete")
    assert not list(store.glob("x_*"))
