"""What status says of levels and layers: absent, partial, complete, stale, damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import open_run, tiny

from strata.pipeline.results.status import status
from strata.pipeline.run import levels, weights
from strata.pipeline.run.levels import inventory
from strata.pipeline.run.overview import Overview
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.store.files.publish import sealed
from strata.store.level.layout import LevelKey


@pytest.fixture
def session(tmp_path: Path) -> Session:
    opened = open_run(tmp_path, tiny(epochs=1, layers=2, flip="false"))
    algorithm.make(opened, write=2)
    return opened


def look(session: Session) -> dict[str, Any]:
    run = session.run
    return status(Overview("tiny", run.recipe, run.directory, run, session.store, ""))


def states(session: Session, depth: int) -> list[str]:
    found = look(session)
    where = found["layers"][depth - 1]["levels"] if depth else found["images"]
    return [level["state"] for level in where]


def change_one_weight_by_one_ulp(session: Session, j: int) -> None:
    """As if layer j had been trained a trifle differently."""
    path = session.run.layer_directory(j) / "weights.safetensors"
    tensors, _ = weights.read(path)
    kernel = tensors["convolution.weight"]
    kernel.view(-1)[0] = torch.nextafter(kernel.view(-1)[0], torch.tensor(torch.inf))
    weights.write(path, tensors)
    record = session.run.layer(j)
    assert record is not None
    changed = {**record, "weights": weights.digest(tensors)}
    session.run.write_layer(j, changed)


def test_everything_is_complete_with_rows_bytes_and_fingerprints(session: Session) -> None:
    found = look(session)
    assert [level["rows"] for level in found["images"]] == [1437, 360]
    for layer in found["layers"]:
        assert layer["trained"]
        assert layer["test_accuracy"] is not None
        for level in layer["levels"]:
            key = LevelKey(layer["layer"], level["fingerprint"], level["split"], level["view"])
            shards = list(key.directory(session.store.root).glob("x/c.*"))
            assert level["bytes"] == sum(shard.stat().st_size for shard in shards)


def test_one_ulp_in_one_weight_makes_all_above_it_stale(session: Session) -> None:
    before = [node.fingerprint for node in session.run.nodes()]
    change_one_weight_by_one_ulp(session, 1)
    after = [node.fingerprint for node in session.run.nodes()]
    assert after[0] == before[0]
    assert after[1] != before[1]
    found = look(session)
    assert [layer["state"] for layer in found["layers"]] == ["solved", "stale"]
    assert states(session, 1) == states(session, 2) == ["stale", "stale"]
    assert found["layers"][1]["test_accuracy"] is None
    assert inventory(session.run, session.store).solved == 1
    todo = algorithm.make(session, write=2)
    assert [str(step) for step in todo] == ["write x_1", "solve layer 2", "write x_2"]
    assert states(session, 2) == ["complete", "complete"]


def test_a_level_whose_parent_was_rewritten_with_other_values_is_stale(session: Session) -> None:
    """The same lineage on another machine may give other low bits; they are not mixed."""
    key = session.key(1, "train", "plain")
    rows = session.store.open(key).read(0, 1437)
    rows[0, 0, 0, 0] += np.float16(1)
    session.store.remove_level(key)
    geometry = session.geometry(1, "train")
    writer = session.store.writer(key, geometry, session.run.lineage(1))
    writer.begin()
    for shard in writer.missing():
        first, last = geometry.shard_range(shard)
        writer.put(shard, rows[first:last])
    images = session.store.open(session.key(0, "train", "clean"))
    writer.commit(levels.parent_of(images.key, images.content_root))
    assert states(session, 1) == ["complete", "complete"]
    assert states(session, 2) == ["stale", "complete"]
    assert [str(step) for step in algorithm.make(session, write=2)] == ["write x_2"]
    assert states(session, 2) == ["complete", "complete"]


def test_shards_without_a_commit_are_partial(session: Session) -> None:
    key = session.key(2, "train", "plain")
    (key.directory(session.store.root) / "COMMIT.json").unlink()
    assert states(session, 2) == ["partial", "complete"]
    assert look(session)["layers"][1]["levels"][0]["rows"] == 1437
    assert [str(step) for step in algorithm.make(session, write=2)] == ["write x_2"]


def test_a_damaged_commit_is_seen(session: Session) -> None:
    path = session.key(2, "test", "clean").directory(session.store.root) / "COMMIT.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 4', b'"format": 7'))
    assert states(session, 2) == ["complete", "damaged"]
    path.write_bytes(sealed({**json.loads(path.read_bytes())["body"], "format": 2}))
    assert states(session, 2) == ["complete", "stale"]


def test_an_unfinished_layer_is_partial(session: Session) -> None:
    directory = session.run.layer_directory(2)
    (directory / "layer.json").unlink()
    assert look(session)["layers"][1]["state"] == "absent"
    (directory / "checkpoint.safetensors").write_bytes(b"")
    assert look(session)["layers"][1]["state"] == "partial"
