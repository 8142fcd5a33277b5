"""The store's protocol on a real S3 server: one winner, lost answers, two writers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import obstore
import pytest
import zarr
from s3_server import (
    INTENT,
    KEY,
    ROWS,
    TOOL,
    VALUES,
    Road,
    connect,
    contents,
    road,
    shape,
    use,
    write,
)
from shard_files import shard_path
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from strata.store.errors import LevelAbsent, LevelDamaged, StoreRefused
from strata.store.feature_store import Store, open_level
from strata.store.files.publish import put_exclusive, unseal
from strata.store.level.codec import channels_last
from strata.store.level.level import Level, receipt_path
from strata.store.read.descriptors import ReadRows
from strata.store.read.order import cut
from strata.store.read.packed import LoadedRows
from strata.store.read.pool import Pool
from strata.store.read.rows import Rows, RowSource, TakenRows
from strata.store.s3.s3 import key_of
from strata.store.write.verify import check_level, forget_damage


@pytest.fixture
def way(server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Road]:
    """The road to the same server, which this process takes from here on."""
    with road(server) as found:
        use(monkeypatch, found.url)
        yield found


def flip(store: Store, path: Path) -> None:
    data = bytearray(store.files.read(path))
    data[100] ^= 4
    store.files.put(path, bytes(data))  # pyright: ignore


# ---- one object ---------------------------------------------------------------------------------


def test_one_of_many_racers_wins(bucket: str) -> None:
    store = connect(bucket)

    def put(i: int) -> bool:
        return put_exclusive(store.root, "name", str(i).encode(), store.files)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(put, range(8)))
    assert sum(won) == 1
    assert store.files.read(store.root / "name") == str(won.index(True)).encode()


def test_a_lost_answer_to_a_create_is_a_success(bucket: str, way: Road) -> None:
    store = connect(bucket)
    way.lost.append("PUT .*/name")
    assert put_exclusive(store.root, "name", b"mine", store.files)
    assert not way.lost
    assert store.files.read(store.root / "name") == b"mine"


def test_a_lost_answer_to_a_loser_is_no_success(bucket: str, way: Road) -> None:
    store = connect(bucket)
    assert put_exclusive(store.root, "name", b"theirs", store.files)
    way.lost.append("PUT .*/name")
    assert not put_exclusive(store.root, "name", b"mine", store.files)
    assert not way.lost
    assert store.files.read(store.root / "name") == b"theirs"


def test_answers_that_are_lost_all_the_time_are_given_up(bucket: str, way: Road) -> None:
    store = connect(bucket)
    assert store.files.names(store.root) == []
    way.lost += [".*/name"] * 50
    begun = time.monotonic()
    with pytest.raises(StoreRefused, match=f"{bucket} at {way.url}: it cannot be reached"):
        put_exclusive(store.root, "name", b"mine", store.files)
    assert time.monotonic() - begun < 20


def test_a_directory_is_renamed_with_its_commit_last(bucket: str, way: Road) -> None:
    store = connect(bucket)
    before = contents_below(store, write(store).directory)
    way.seen.clear()
    store.files.rename(KEY.directory(store.root), store.root / "elsewhere")
    assert contents_below(store, store.root / "elsewhere") == before
    assert not store.files.exists(KEY.directory(store.root))
    copied = [line for line in way.seen if line.startswith("PUT")]
    assert copied[-1].endswith("COMMIT.json")
    removed = next(i for i, line in enumerate(way.seen) if line.startswith("POST"))
    assert removed > way.seen.index(copied[-1])


def contents_below(store: Store, directory: Path) -> dict[str, bytes]:
    return {name: store.files.read(directory / name) for name in store.files.listed(directory)}  # pyright: ignore


# ---- refusals -----------------------------------------------------------------------------------


def test_no_such_bucket(bucket: str) -> None:
    for look in (lambda s: s.state(KEY), lambda s: s.files.names(s.root), write):
        with pytest.raises(StoreRefused, match=r"s3://absent at .*: there is no such bucket"):
            look(connect("absent"))


def test_nobody_there(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(StoreRefused, match=r"http://127\.0\.0\.1:9: it cannot be reached"):
        connect(bucket).state(KEY)


def test_a_server_that_wants_fewer_requests_is_waited_for_and_then_given_up(
    bucket: str, way: Road
) -> None:
    store = connect(bucket)
    way.busy = ["PUT .*/name"]
    assert put_exclusive(store.root, "name", b"mine", store.files)
    assert not way.busy
    way.busy = [".*/name"] * 50
    with pytest.raises(StoreRefused, match="it asks for fewer requests, also after waiting"):
        store.files.read(store.root / "name")
    assert len(way.busy) == 48


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # which machines in AWS ask
    with pytest.raises(StoreRefused, match="no credentials: set AWS_ACCESS_KEY_ID"):
        connect(bucket).state(KEY)


def test_a_server_that_overwrites_gets_one_writer(bucket: str, way: Road) -> None:
    way.stripped = ("if-none-match",)
    with pytest.raises(StoreRefused, match=r"several writers are refused.*writers=1"):
        write(connect(bucket))
    alone = connect(bucket, conditional=False)
    assert contents(alone) == {}
    assert write(alone).read(0, ROWS).tobytes() == VALUES.tobytes()


# ---- a level ------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["raw", "zstd", "lz4"])
def test_a_level_has_the_bytes_of_a_local_one(bucket: str, tmp_path: Path, profile: str) -> None:
    store, local = connect(bucket, tmp_path / "cache"), Store(tmp_path / "store")
    level, there = write(store, profile=profile), write(local, profile=profile)
    files = (path for path in local.root.rglob("*") if path.is_file())
    names = {str(p.relative_to(local.root)): p.read_bytes() for p in files}
    assert contents(store) == {n: b for n, b in names.items() if not n.startswith("locks/")}
    assert level.content_root == there.content_root
    assert np.array_equal(level.array("label"), np.arange(ROWS))


def test_zarr_reads_it(bucket: str) -> None:
    level, found = write(connect(bucket)), {}
    client = level.files._store  # pyright: ignore
    prefix = key_of(level.directory)
    for facts in (facts for batch in obstore.list(client, prefix) for facts in batch):
        name = facts["path"].removeprefix(f"{prefix}/")
        data = obstore.get(client, facts["path"]).bytes().to_bytes()
        found[name] = default_buffer_prototype().buffer.from_bytes(data)
    group: Any = zarr.open_group(MemoryStore(found), mode="r")
    assert np.array_equal(group["x"][:], VALUES)
    assert np.array_equal(group["label"][:], np.arange(ROWS))


def rows(kind: str, level: Level) -> RowSource:
    if level.geometry.profile == "raw":
        return {"read": ReadRows, "taken": TakenRows}[kind]([level])
    if kind == "loaded":
        return LoadedRows([level], 2)
    return Pool([level], mapped=kind == "mapped pool") if "pool" in kind else TakenRows([level])


KINDS = [("raw", "read"), ("raw", "taken")]
KINDS += [("zstd", kind) for kind in ("loaded", "pool", "mapped pool", "taken")]


@pytest.mark.parametrize("shards", [100, 2, 0])
@pytest.mark.parametrize(("profile", "kind"), KINDS)
def test_rows_are_the_same_with_any_cache(
    bucket: str, tmp_path: Path, profile: str, kind: str, shards: int
) -> None:
    there = write(connect(bucket), profile=profile)
    budget = shards * max(facts["nbytes"] for facts in there.shards)
    level = connect(bucket, tmp_path / "cache", budget).open(KEY)
    order = np.random.default_rng(1).permutation(ROWS)
    every, lengths = Rows.of(order), cut(ROWS, 50)
    source, out = rows(kind, level), np.empty((ROWS, level.geometry.row_bytes), np.uint8)
    source.ready()
    decoding = source.begin(every, lengths) if isinstance(source, Pool) else None
    for i, length in enumerate(lengths):
        part = slice(50 * i, 50 * i + length)
        if decoding is None:
            source.take(every[part], out[part])
            continue
        for task in decoding.tasks(i):
            task()
        decoding.take(i, part, out[part])
    assert (decoding is not None) == ("pool" in kind)
    if decoding is not None:
        decoding.close()
    source.close()
    assert out.tobytes() == channels_last(VALUES[order]).tobytes()
    copies = [p.stat().st_size for p in (tmp_path / "cache").glob("*")]
    assert sum(copies) <= budget
    assert (len(copies) > 1) == (budget > 0)


def all_rows(kind: str, level: Level) -> np.ndarray:
    source, out = rows(kind, level), np.empty((ROWS, level.geometry.row_bytes), np.uint8)
    source.take(Rows.of(np.arange(ROWS)), out)
    source.close()
    return out


def test_a_level_is_opened_by_its_name_alone(bucket: str) -> None:
    level = write(connect(bucket))
    again = open_level(level.directory, connect(bucket).files)
    assert again.read(0, ROWS).tobytes() == VALUES.tobytes()
    with pytest.raises(LevelAbsent):
        open_level(level.directory.parent / "none", level.files)


def test_a_shard_that_is_gone_or_changed_is_named(bucket: str, tmp_path: Path) -> None:
    store = connect(bucket, tmp_path / "cache")
    level = write(store)
    flip(store, level.path(1))
    for kind in ("pool", "loaded", "taken"):
        with pytest.raises(LevelDamaged, match=str(level.path(1))):
            all_rows(kind, store.open(KEY))
    store.files.unlink(level.path(1))
    with pytest.raises(LevelDamaged, match=f"{level.path(1)} is missing"):
        store.open(KEY)
    with pytest.raises(LevelDamaged, match=f"{level.path(1)} is missing"):
        level.check_sizes()


def test_damage_is_found_and_mended(bucket: str) -> None:
    store = connect(bucket)
    level = write(store).let_go()
    before = contents(store)
    broken = [level.path(1), receipt_path(level.directory, 2), level.directory / "label/c.0"]
    for path in broken:
        flip(store, path)
    writer = store.writer(KEY, shape(), [INTENT])
    with writer.lock():
        found = forget_damage(store.root, level.directory, store.files)
        assert {damage.path for damage in found} == set(broken)
        writer.begin()
        todo = writer.missing()
        assert todo == [1]
        writer.fill((k, VALUES[slice(*shape().shard_range(k))]) for k in todo)
        writer.commit(None, {"label": np.arange(ROWS)}, TOOL)
    assert contents(store) == before
    assert check_level(store.root, level.directory, deep=True, files=store.files) == []


# ---- two writers --------------------------------------------------------------------------------


def test_two_writers_of_other_low_bits_end_with_one_level(bucket: str) -> None:
    """Each takes the shards that the other was first with."""
    others = [connect(bucket) for _ in range(3)]
    values, together = [VALUES + np.float32(i) for i in range(3)], Barrier(3, timeout=60)

    def work(i: int) -> Level:
        writer = others[i].writer(KEY, shape(), [INTENT])
        with writer.locked():
            together.wait()
            every = range(writer.geometry.shards)
            writer.fill((k, values[i][slice(*shape().shard_range(k))]) for k in every)
            return writer.commit(None, {"label": np.arange(ROWS)}, TOOL)

    with ThreadPoolExecutor(3) as pool:
        levels = list(pool.map(work, range(3)))
    assert len({level.content_root for level in levels}) == 1
    read = [level.read(0, ROWS) for level in levels]
    assert read[0].tobytes() == read[1].tobytes() == read[2].tobytes()
    for k in range(shape().shards):
        part = slice(*shape().shard_range(k))
        assert any(np.array_equal(read[0][part], v[part]) for v in values)
    assert check_level(others[0].root, levels[0].directory, deep=True, files=others[0].files) == []


def test_the_shard_that_was_there_first_stays_and_its_receipt_speaks_of_it(bucket: str) -> None:
    first, second = connect(bucket), connect(bucket)
    writers = [s.writer(KEY, shape(), [INTENT]) for s in (first, second)]
    rows_ = VALUES[slice(*shape().shard_range(0))]
    writers[0].begin()
    writers[0].put(0, rows_)
    path = receipt_path(writers[0].directory, 0)
    receipt = unseal(path, first.files)
    first.files.unlink(path)  # as if it were not written yet
    writers[1].put(0, rows_ + 1)
    assert unseal(path, second.files) == receipt


def test_finished_shards_are_not_written_again(bucket: str, way: Road) -> None:
    """Not one whose writer was killed before its receipt, either."""
    store = connect(bucket)
    writer = store.writer(KEY, shape(), [INTENT])
    with writer.locked():
        for k in (0, 1, 3):
            writer.put(k, VALUES[slice(*shape().shard_range(k))])
    store.files.unlink(receipt_path(writer.directory, 1))
    store.files.unlink(shard_path(writer.directory, 3))  # and a receipt of nothing
    way.seen.clear()
    again = connect(bucket).writer(KEY, shape(), [INTENT])
    with again.locked():
        assert again.missing() == [k for k in range(shape().shards) if k not in (0, 1)]
    assert way.count(r"PUT .*/c\.") == 0
    level = write(connect(bucket))
    assert level.read(0, ROWS).tobytes() == VALUES.tobytes()
    assert way.count(r"PUT .*/c\.[01]\.") == 0


def test_a_commit_does_not_vouch_for_a_shard_that_is_gone(bucket: str) -> None:
    store = connect(bucket)
    writer = store.writer(KEY, shape(), [INTENT])
    writer.begin()
    writer.fill((k, VALUES[slice(*shape().shard_range(k))]) for k in range(shape().shards))
    store.files.unlink(shard_path(writer.directory, 1))
    with pytest.raises(LevelDamaged, match="is missing"):
        writer.commit(None)
    assert not writer.committed()
