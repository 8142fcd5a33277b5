"""verify names every damaged file, and nobody reads what it names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import CLI, environment, strata
from runs import Place
from spoil import BYTES, SHARD, SIZES, STRUCTURE, Spoil, early_flip, in_level, named, params

from strata.pipeline.run.levels import keys_at
from strata.store.errors import StoreError
from strata.store.level.level import COMMIT, Level
from strata.store.write.verify import check_level


@pytest.mark.parametrize("spoil", params(STRUCTURE))
def test_structure_is_checked_without_reading_shards(place: Place, spoil: Spoil) -> None:
    paths = sorted(map(str, spoil(place)))
    said = place.do("verify", "--json")
    assert said.rc == 10
    assert named(said) == paths
    count = "1 file is damaged" if len(paths) == 1 else f"{len(paths)} files are damaged"
    assert count in said.error


@pytest.mark.parametrize("spoil", params(BYTES))
def test_only_deep_looks_into_shards(place: Place, spoil: Spoil) -> None:
    spoil(place)
    assert place.do("verify").rc == 0


@pytest.mark.parametrize("name", SIZES | BYTES)
def test_training_on_a_damaged_level_reads_no_poison(place: Place, sound: Place, name: str) -> None:
    paths = (SIZES | BYTES)[name](place)
    shutil.rmtree(place.run / "layer_2")
    said = place.do("train", "--layer", 2)
    if name in ("images", "one bit of the index"):  # which this training does not read
        assert said.rc == 0
        assert place.weights() == sound.weights()
    else:
        assert said.rc == 10
        assert any(str(path) in said.error for path in paths)
        assert not (place.run / "layer_2/layer.json").exists()


# ---- what it says -----------------------------------------------------------------------------


def test_a_sound_store_and_run(sound: Place) -> None:
    said = sound.do("verify", "--deep", "--json").json
    shards = list(sound.store.glob("x_*/*/x/c.*"))
    assert said["levels"] == 6
    assert said["bytes"] == sum(path.stat().st_size for path in shards)
    assert said["damaged"] == said["partial"] == said["mended"] == []
    assert "6 levels" in sound.do("verify").out


def test_a_layer_that_does_not_exist_is_not_all_well(sound: Place) -> None:
    assert sound.do("verify", "--layer", 9).rc == 2


def test_the_command_line_as_a_process(place: Place) -> None:
    fine = strata(place.root, "verify", *place.options, "--deep")
    assert (fine.rc, fine.err) == (0, "")
    (path,) = in_level(SHARD, early_flip)(place)
    said = strata(place.root, "verify", *place.options, "--deep")
    assert said.rc == 10
    assert said.error.startswith("Error: 1 file is damaged. `verify --deep --repair`")
    assert f"damaged: {path}: " in said.out


def test_it_needs_no_torch(place: Place) -> None:
    in_level(SHARD, early_flip)(place)
    code = (
        "import sys, cli\n"
        "assert cli.main(sys.argv[1:], standalone_mode=False) == 10\n"
        "assert not {'torch', 'zarr'} & set(sys.modules)\n"
    )
    words = [sys.executable, "-c", code, "verify", *map(str, place.options), "--deep"]
    done = subprocess.run(words, cwd=CLI.parent, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- at random ----------------------------------------------------------------------------------


def at_random(rng: np.random.Generator, path: Path, other: Path) -> str:
    """Spoil a file in one of seven ways; says which."""
    data = bytearray(path.read_bytes())
    at = int(rng.integers(len(data)))
    kind = str(rng.choice(["bit", "NULs", "cut", "empty", "longer", "missing", "exchange"]))
    match kind:
        case "bit":
            data[at] ^= 1 << int(rng.integers(8))
        case "NULs":
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        case "cut":
            data = data[:at]
        case "empty":
            data = bytearray()
        case "longer":
            data += bytes(int(rng.integers(1, 4096)))
        case "exchange":
            data = bytearray(other.read_bytes())
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{kind} in {path}"


def test_whatever_is_spoilt_is_named_and_never_read(place: Place) -> None:
    rng = np.random.default_rng(7)
    directories = [path.parent for path in sorted(place.store.glob(f"x_*/*/{COMMIT}"))]
    files = [p for d in directories for p in sorted(d.rglob("*")) if p.is_file()]
    rows = {d: whole(place, d) for d in directories}
    met = 0
    for _ in range(150):
        path, other = (files[int(i)] for i in rng.choice(len(files), 2, replace=False))
        directory = next(d for d in directories if path.is_relative_to(d))
        data = path.read_bytes()
        what = at_random(rng, path, other)
        spoilt = not path.exists() or path.read_bytes() != data
        found = [damage.path for damage in check_level(place.store, directory, deep=True)]
        if path.name == COMMIT and not path.exists():
            assert found == []  # a level that is not finished is not damaged
        elif path.name == COMMIT and spoilt:
            assert found, what  # of another level: the directory is what is misplaced
        else:
            assert found == [path] * spoilt, what
        met += spoilt
        try:
            assert np.array_equal(whole(place, directory), rows[directory]), what
        except StoreError:
            assert spoilt, what
        path.write_bytes(data)
        assert not check_level(place.store, directory, deep=True)
    assert met > 100


def whole(place: Place, directory: Path) -> np.ndarray:
    """Every row of a level, in one array of bytes, with the small arrays that lie beside it."""
    depth = int(directory.parent.name[2])
    key = next(k for k in keys_at(place.overview().existing(), depth) if k.name == directory.name)
    level = Level.open(place.store, key)
    arrays = [level.array(name) for name in level.arrays]
    parts = [level.read(0, len(level)), *arrays]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts])
