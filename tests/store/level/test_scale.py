"""What a level of a million shards asks for: columns in its commit, names when it is resumed."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_files import shard_path

from strata.store.errors import LevelDamaged, LevelStale
from strata.store.files.files import DISK
from strata.store.files.publish import sealed, unseal
from strata.store.fingerprint import canonical, sha256
from strata.store.level.layout import Geometry, LevelKey, shard_name
from strata.store.level.level import COMMIT, RECEIPTS, Level, receipt_name
from strata.store.level.shard_table import Entry, ShardTable
from strata.store.parallel import WAITING, map_in_threads
from strata.store.write.unfinished import unfinished
from strata.store.write.verify import check_level, forget_damage
from strata.store.write.writer import LevelWriter

SHAPE = Geometry(10, (1, 2, 2), "float32", chunk_rows=1, shard_rows=2)
KEY = LevelKey(1, hashlib.sha256(b"lineage").hexdigest(), "train", "clean")


def digest(word: object) -> str:
    return hashlib.sha256(str(word).encode()).hexdigest()


def entries(sizes: list[int]) -> list[Entry]:
    return [Entry(size, digest(n), digest(-n)) for n, size in enumerate(sizes)]


def written(root: Path, shape: Geometry = SHAPE) -> LevelWriter:
    """A level, not committed."""
    writer = LevelWriter(root, KEY, shape, [{"lineage": 1}])
    rows = np.arange(shape.rows * 4, dtype=np.float32).reshape(-1, 1, 2, 2)
    with writer.locked():
        for shard in range(shape.shards):
            writer.put(shard, rows[slice(*shape.shard_range(shard))])
    return writer


# ---- columns ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=40))
def test_columns_are_what_entries_were(sizes: list[int]) -> None:
    """Through JSON and back, for runs of equal sizes of any length, and for none."""
    shape = Geometry(2 * len(sizes), (1, 2, 2), "float32", 1, 2)
    shards = ShardTable.of(shape, entries(sizes))
    again = ShardTable.from_json(shape, json.loads(json.dumps(shards.as_json())))
    assert again[:] == shards[:] == list(shards)
    assert [one["nbytes"] for one in again] == sizes
    assert again.nbytes == sum(sizes)
    for number, one in enumerate(again):
        assert one["key"] == f"x/{shard_name(number)}"
        assert one["rows"] == [2 * number, 2 * number + 2]
        assert (one["sha256"], one["receipt"]) == (digest(number), digest(-number))
    assert again.content_root == sha256(canonical([digest(n) for n in range(len(sizes))]))


def test_a_commit_of_format_2_is_stale_and_written_anew(tmp_path: Path) -> None:
    """It had an entry for every shard. The shards stay: their receipts vouch for them."""
    writer = written(tmp_path)
    level = writer.commit(None).let_go()
    path, now = level.directory / COMMIT, (level.directory / COMMIT).read_bytes()
    path.write_bytes(sealed({**unseal(path), "format": 2, "shards": list(level.shards)}))
    with pytest.raises(LevelStale, match=r"is stale: it has format 2, and this version reads 4"):
        Level.open(tmp_path, KEY)
    damage = check_level(tmp_path, level.directory)[0]
    assert damage.path == path
    assert damage.what.startswith("is stale: it has format 2")
    forget_damage(tmp_path, level.directory)
    with writer.locked():
        assert writer.missing() == []
        writer.commit(None)
    assert path.read_bytes() == now


def test_bytes_of_a_commit_for_each_shard() -> None:
    """Two digests in hexadecimal: a million shards are a commit of some 130 MB."""
    many = ShardTable.of(SHAPE, entries([7] * 1000))
    assert len(json.dumps(many.as_json())) < 1000 * 130 + 200


# ---- resuming -----------------------------------------------------------------------------------


def asked_of(writer: LevelWriter) -> list[int]:
    """The shards that are hashed."""
    asked: list[int] = []

    def is_whole(shard: int) -> bool:
        asked.append(shard)
        return writer.is_whole(shard)

    unfinished(writer.directory, writer.geometry, DISK, is_whole)
    return sorted(asked)


def test_the_last_shards_are_hashed_and_no_more_than_so_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = written(tmp_path)
    assert asked_of(writer) == [0, 1, 2, 3, 4]
    size = shard_path(writer.directory, 0).stat().st_size
    monkeypatch.setattr("strata.store.write.unfinished.RECHECKED", 2 * size)
    assert asked_of(writer) == [3, 4]
    monkeypatch.setattr("strata.store.write.unfinished.RECHECKED", 1)
    assert asked_of(writer) == [4]


@pytest.mark.parametrize("bound", [1, 1 << 30])
def test_what_is_not_there_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    """By names, whether or not shards are hashed; a receipt without a shard goes with it."""
    monkeypatch.setattr("strata.store.write.unfinished.RECHECKED", bound)
    writer = written(tmp_path)
    shard_path(writer.directory, 0).unlink()
    (writer.directory / RECEIPTS / receipt_name(1)).unlink()
    assert writer.missing() == [0, 1]
    left = sorted(path.name for path in (writer.directory / RECEIPTS).iterdir())
    assert left == [receipt_name(n) for n in (2, 3, 4)]
    assert not shard_path(writer.directory, 1).exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"x/{shard_name(1)}", r"c\.1\.0\.0\.0 has \d+ bytes; its"),
        (f"{RECEIPTS}/{receipt_name(1)}", r"000001\.json is damaged"),
    ],
)
def test_what_was_not_hashed_is_met_by_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    """A shard of another size than vouched for, a torn receipt: removed, and then made again."""
    monkeypatch.setattr("strata.store.write.unfinished.RECHECKED", 1)
    writer = written(tmp_path)
    path = writer.directory / name
    path.write_bytes(path.read_bytes()[:-1])
    assert writer.missing() == []
    with pytest.raises(LevelDamaged, match=said):
        writer.commit(None)
    assert not writer.committed()
    assert writer.missing() == [1]
    written(tmp_path).commit(None)


# ---- several at a time --------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_few_items_are_taken_ahead(threads: int) -> None:
    taken, most, lock = 0, 0, threading.Lock()

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(500):
            taken += 1
            yield item

    def work(item: int) -> int:
        with lock:
            return item * item

    for given_back, result in enumerate(map_in_threads(work, items(), threads)):
        assert result == given_back**2
        most = max(most, taken - given_back)
    assert taken == 500
    assert most <= WAITING * threads + 2


def test_an_error_of_one_item_is_raised_in_its_place() -> None:
    found = map_in_threads(lambda item: 1 // item, [2, 1, 0, 3], 2)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
