"""A record is believed if it, what it was made of, and the files beside it are what they were."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import Place
from spoil import flip

from strata.pipeline.run import record, weights
from strata.store.errors import LevelDamaged, StoreRefused
from strata.store.files.publish import replace, sealed, unseal

MADE_OF = {"made_of": {"input": "x", "layers": (1, 2)}}
COPY = {"input": "", "weights": "", "scales": None, "origin": "", "files": {"weights": "0"}}
"""The record of a layer that is a copy."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record that vouches for two files; a curve and a checkpoint lie beside it."""
    for name in (
        "weights.safetensors",
        "test_logits.npy",
        "epochs.jsonl",
        "checkpoint.safetensors",
    ):
        (tmp_path / name).write_bytes(name.encode())
    record.vouch(tmp_path / "kept.json", {**MADE_OF, "top1": 0.5})
    return tmp_path / "kept.json"


def test_it_is_sealed_and_has_the_hashes_of_the_files_beside_it(path: Path) -> None:
    body = unseal(path)
    assert list(body) == ["made_of", "top1", "files"]
    assert sorted(body["files"]) == ["test_logits.npy", "weights.safetensors"]
    assert record.believed(path, MADE_OF) == body == record.read(path)
    assert not list(record.damage(path))
    assert not (path.parent / "checkpoint.safetensors").exists(), "it is through"


@pytest.mark.parametrize(
    "other",
    [{"made_of": {"input": "y", "layers": [1, 2]}}, {"made_of": None}, {**MADE_OF, "origin": "z"}],
)
def test_it_is_not_believed_of_anything_else(path: Path, other: dict[str, Any]) -> None:
    assert record.believed(path, other) is None
    assert record.believed(path, {}) is not None


def test_what_is_damaged_is_named(path: Path) -> None:
    flip(path.parent / "weights.safetensors", 0)
    (path.parent / "test_logits.npy").unlink()
    assert dict(record.damage(path)) == {
        path.parent / "weights.safetensors": "it is not what kept.json says: its sha256 differs",
        path.parent / "test_logits.npy": "it is missing",
    }
    assert record.whole(path) is None
    assert record.believed(path, MADE_OF) is None
    flip(path)
    assert list(record.damage(path)) == [(path, "its content does not match its own sha256")]
    assert record.believed(path, MADE_OF) is None
    with pytest.raises(LevelDamaged):
        record.read(path)


def test_where_there_is_none_nothing_is_believed(tmp_path: Path) -> None:
    assert record.read(tmp_path / "kept.json") is None
    assert record.believed(tmp_path / "kept.json", MADE_OF) is None


def test_a_run_looks_at_every_record_and_at_those_of_runs_inside_it(
    sound: Place, tmp_path: Path
) -> None:
    """And a place that is asked for is looked at alone."""
    place = sound.copy(tmp_path / "place")
    run = place.overview().existing()
    inside = run.directory / "transfer/other"
    shutil.copytree(run.directory / "layer_1", inside / "layer_1")
    for name in ("sweep_2/lr=1", "sweep_final/k=1", "probe_1/linear", "baseline/plain"):
        (run.directory / name).mkdir(parents=True)
        replace(run.directory / name, "layer.json", sealed(COPY))
    flip(inside / "layer_1/weights.safetensors")
    flip(run.directory / "data.json")
    found = [str(path.relative_to(run.directory)) for path, _ in run.damaged()]
    assert found == [
        "data.json",
        "sweep_2/lr=1/weights",
        "sweep_final/k=1/weights",
        "probe_1/linear/weights",
        "baseline/plain/weights",
        "transfer/other/layer_1/weights.safetensors",
    ]
    assert len(list(run.damaged("layer_2", "sweep_2/*"))) == 1


def test_a_folder_in_place_of_weights_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").mkdir()
    with pytest.raises(StoreRefused, match=r"refuses .*weights\.safetensors"):
        weights.read(tmp_path / "weights.safetensors")
