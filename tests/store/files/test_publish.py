"""Publishing: a file is there whole or not at all, and a level grows by whole files."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier

import pytest
from shard_files import shard_path
from small_levels import INTENT, KEY, SMALL, begin, chop, contents, drawn, flip, written

from strata.store.errors import DiskFull, LevelAbsent, LevelConflict, StoreRefused
from strata.store.feature_store import Store, used_bytes
from strata.store.files import files as files_module
from strata.store.files import publish as publish_module
from strata.store.files.files import DISK, Files
from strata.store.files.publish import TEMPORARY, make_directory, put_exclusive
from strata.store.files.publish import replace as publish_replacing
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import BEGUN, Geometry, shard_name
from strata.store.level.level import COMMIT, Level, receipt_path
from strata.store.write.writer import RECEIPTS, LevelWriter

# --- one file ------------------------------------------------------------------------------------

Publish = Callable[[Path, str, bytes], object]
BOTH = pytest.mark.parametrize("publish", [put_exclusive, publish_replacing])


def test_a_name_is_published_once(tmp_path: Path) -> None:
    assert put_exclusive(tmp_path, "a", b"first") is True
    assert put_exclusive(tmp_path, "a", b"second") is False
    assert contents(tmp_path) == {"a": b"first"}


class Started(Files):
    """Notes what the disk is told to begin with, and takes a few bytes at a time."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def write(self, descriptor: int, data: memoryview) -> int:
        return super().write(descriptor, data[:7])

    def start_writing(self, descriptor: int, begin: int, nbytes: int) -> None:
        assert begin + nbytes <= os.fstat(descriptor).st_size, "what is there to begin with?"
        self.calls.append((begin, nbytes))
        super().start_writing(descriptor, begin, nbytes)


def test_the_disk_begins_while_we_copy_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stretch is named once, as soon as it is long enough; the sync takes the rest."""
    monkeypatch.setattr(publish_module, "START_BYTES", 10)
    disk, parts = Started(), [b"abcdefghij", b"k" * 15, b"l" * 6]
    put_exclusive(tmp_path, "a", parts, disk)
    assert (tmp_path / "a").read_bytes() == b"".join(parts)
    assert disk.calls == [(0, 10), (10, 14)]


def test_a_system_without_that_call_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_module, "START_BYTES", 10)
    monkeypatch.setattr(files_module, "START_WRITING", None)
    put_exclusive(tmp_path, "a", b"x" * 100)
    assert (tmp_path / "a").read_bytes() == b"x" * 100


def test_replacing_replaces(tmp_path: Path) -> None:
    for data in (b"first", b"", b"third"):
        publish_replacing(tmp_path, "a", data)
        assert contents(tmp_path) == {"a": data}


@BOTH
@pytest.mark.parametrize(
    ("code", "raised"),
    [(errno.EIO, StoreRefused), (errno.EDQUOT, DiskFull)],
    ids=["a disk that fails", "a quota that is used up"],
)
def test_a_failed_sync_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: Publish, code: int, raised: type
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    put_exclusive(tmp_path, "old", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    for name in ("old", "new"):
        with pytest.raises(raised) as caught:
            publish(tmp_path, name, b"data")
        assert caught.type is raised
    assert contents(tmp_path) == {"old": b"old"}


@BOTH
def test_what_is_named_is_already_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publish: Publish
) -> None:
    calls: list[str] = []
    record(monkeypatch, "link", lambda source, target: calls.append("name"))
    record(monkeypatch, "replace", lambda source, target: calls.append("name"))
    record(monkeypatch, "fsync", lambda descriptor: calls.append(f"sync {kind(descriptor)}"))
    publish(tmp_path, "a", b"data")
    assert calls == ["sync file", "name", "sync directory"]


def record(monkeypatch: pytest.MonkeyPatch, name: str, seen: Callable[..., None]) -> None:
    real = getattr(os, name)
    monkeypatch.setattr(os, name, lambda *arguments: (seen(*arguments), real(*arguments))[1])


def kind(descriptor: int) -> str:
    return "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"


def test_of_many_threads_one_publishes(tmp_path: Path) -> None:
    threads = 16
    start = Barrier(threads)

    def race(thread: int, name: str) -> bool:
        start.wait(timeout=60)
        return put_exclusive(tmp_path, name, bytes([thread]) * 1000)

    with ThreadPoolExecutor(threads) as pool:
        for name in ("a", "b", "c"):
            won = list(pool.map(race, range(threads), [name] * threads))
            assert won.count(True) == 1
            assert (tmp_path / name).read_bytes() == bytes([won.index(True)]) * 1000
    assert sorted(contents(tmp_path)) == ["a", "b", "c"]


def test_new_directories_are_made_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    record(monkeypatch, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    path = tmp_path / "a" / "b" / "c"
    assert make_directory(path) == path
    # And the name of the last one that was there: a killed process may have made it.
    assert synced == {parent.stat().st_ino for parent in path.parents[:4]}
    (path / "file").write_bytes(b"kept")
    synced.clear()
    assert make_directory(path) == path
    assert synced == {path.parent.stat().st_ino}
    assert contents(path) == {"file": b"kept"}


# --- a level, file by file -----------------------------------------------------------------------


def test_a_commit_is_named_last_and_a_receipt_after_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[Path] = []
    record(monkeypatch, "link", lambda source, target: named.append(Path(target)))
    directory = written(tmp_path).directory
    shards = [of(directory, k) for k in range(3) for of in (shard_path, receipt_path)]
    beside = [directory / name for name in ("label/c.0", "label/zarr.json", "zarr.json", COMMIT)]
    assert named == [directory.parent / "intent.json", directory / BEGUN, *shards, *beside]


@pytest.mark.parametrize("done", range(SMALL.shards + 1))
def test_a_killed_writer_is_taken_up(tmp_path: Path, done: int) -> None:
    directory = begin(tmp_path / "b", SMALL, drawn(SMALL), range(done)).directory
    for leftover in (directory, directory / RECEIPTS, directory / "x"):
        (leftover / f"{TEMPORARY}of a killed writer").write_bytes(b"half a sh")
    again = LevelWriter(tmp_path / "b", KEY, SMALL, [INTENT])
    assert again.missing() == list(range(done, SMALL.shards))
    assert not list(directory.rglob(f"{TEMPORARY}*"))
    for shard in again.missing():
        again.put(shard, drawn(SMALL)[slice(*SMALL.shard_range(shard))])
    again.commit(None, {"label": written(tmp_path / "a").array("label")})
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(f"x/{shard_name(1)}", flip, id="a flipped bit in the shard"),
        pytest.param(f"x/{shard_name(1)}", chop, id="a truncated shard"),
        pytest.param(f"x/{shard_name(1)}", Path.unlink, id="no shard"),
        pytest.param(f"{RECEIPTS}/000001.json", flip, id="a flipped bit in the receipt"),
        pytest.param(f"{RECEIPTS}/000001.json", chop, id="a truncated receipt"),
        pytest.param(f"{RECEIPTS}/000001.json", Path.unlink, id="no receipt"),
    ],
)
def test_a_damaged_shard_is_written_again(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    writer = begin(tmp_path, SMALL, drawn(SMALL))
    whole = contents(tmp_path)
    damage(writer.directory / name)
    assert writer.missing() == [1]
    gone = {path for path in whole if path.endswith((shard_name(1), "000001.json"))}
    assert contents(tmp_path) == {p: data for p, data in whole.items() if p not in gone}
    writer.put(1, drawn(SMALL)[4:8])
    assert writer.missing() == []
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("shape", "intent"),
    [
        pytest.param(replace(SMALL, rows=12), INTENT, id="more rows"),
        pytest.param(replace(SMALL, chunk_rows=4), INTENT, id="other chunks"),
        pytest.param(replace(SMALL, precision="float16"), INTENT, id="another precision"),
        pytest.param(SMALL, {"recipe": "another lineage"}, id="another intent"),
    ],
)
def test_another_level_is_not_written_over(
    tmp_path: Path, shape: Geometry, intent: dict[str, object]
) -> None:
    written(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(LevelConflict, match="was begun for another level"):
        LevelWriter(tmp_path, KEY, shape, [intent]).begin()
    assert contents(tmp_path) == before


def test_a_damaged_intent_is_no_other_level(tmp_path: Path) -> None:
    """Other levels of the depth may be whole: removing them would be the wrong advice."""
    written(tmp_path)
    whole = contents(tmp_path)
    for damage in (flip, chop):
        damage(KEY.directory(tmp_path).parent / "intent.json")
        begin(tmp_path, SMALL, drawn(SMALL), [])
        assert contents(tmp_path) == whole


def test_two_writers_of_one_level_agree(tmp_path: Path) -> None:
    start, rows = Barrier(2), drawn(SMALL)
    writers = [LevelWriter(tmp_path / "b", KEY, SMALL, [INTENT]) for _ in range(2)]

    def write(writer: LevelWriter) -> list[int]:
        start.wait(timeout=60)
        writer.begin()
        every = range(SMALL.shards)
        return [writer.put(k, rows[slice(*SMALL.shard_range(k))]).nbytes for k in every]

    with ThreadPoolExecutor(2) as pool:
        assert sum(map(sum, pool.map(write, writers))) == 2 * SMALL.nbytes
    labels = written(tmp_path / "a").array("label")
    for writer in writers:
        assert writer.commit(None, {"label": labels}).read(0, 11).tobytes() == rows.tobytes()
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


# --- a store of levels ---------------------------------------------------------------------------


def test_state_goes_from_absent_to_complete(tmp_path: Path) -> None:
    store, rows = Store(tmp_path), drawn(SMALL)
    assert (store.state(KEY).state, store.state(KEY).nbytes) == ("absent", 0)
    begin(tmp_path, SMALL, rows, [])
    assert (store.state(KEY).state, store.state(KEY).nbytes) == ("absent", 0)
    writer = begin(tmp_path, SMALL, rows, [0, 1])
    found = store.state(KEY)
    sizes = [shard_path(writer.directory, shard).stat().st_size for shard in (0, 1)]
    assert (found.state, found.nbytes, found.content_root) == ("partial", sum(sizes), None)
    writer.put(2, rows[8:])
    below = {**asdict(replace(KEY, depth=2)), "content_root": "0" * 64}
    level = writer.commit(below)
    found = store.state(KEY)
    assert (found.state, found.rows, found.nbytes) == ("complete", 11, SMALL.nbytes)
    assert (found.content_root, found.parent) == (level.content_root, below)


def test_remove_frees_one_lineage_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    store, other = Store(tmp_path), replace(KEY, fingerprint=fingerprint("another"))
    before = used_bytes(written(tmp_path).directory.parent)
    writer = store.writer(other, replace(SMALL, rows=4), ["another"])  # pyright: ignore
    writer.begin()
    writer.put(0, drawn(SMALL)[:4])
    kept = writer.commit(None)
    assert store.remove(KEY.depth, KEY.fingerprint) == before > SMALL.nbytes
    kept_names = [kept.directory.parent.name, "locks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept_names)
    assert store.state(KEY).state == "absent"
    with pytest.raises(LevelAbsent):
        store.open(KEY)
    assert store.open(other).read(0, 4).tobytes() == drawn(SMALL)[:4].tobytes()
    assert store.remove(KEY.depth, KEY.fingerprint) == 0


def test_remove_level_leaves_the_other_views(tmp_path: Path) -> None:
    store, other = Store(tmp_path), replace(KEY, view="v1")
    written(tmp_path)
    writer = store.writer(other, SMALL, [INTENT])
    with writer.locked():
        writer.put(0, drawn(SMALL)[:4])
    store.remove_level(KEY)
    assert (store.state(KEY).state, store.state(other).state) == ("absent", "partial")
    assert not KEY.directory(tmp_path).exists()


@pytest.mark.parametrize(
    "remove",
    [lambda store: store.remove(3, KEY.fingerprint), lambda store: store.remove_level(KEY)],
    ids=["of a lineage", "of a level"],
)
def test_a_removal_cut_short_leaves_no_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remove: Callable[[Store], object]
) -> None:
    written(tmp_path)
    monkeypatch.setattr(Store, "_remove_tree", lambda *_: None)
    remove(Store(tmp_path))
    with pytest.raises(LevelAbsent):
        Level.open(tmp_path, KEY)
    assert Store(tmp_path).state(KEY).state == "partial"


# --- a disk that is full -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, which only root can make."""
    disk = make_directory(tmp_path / "disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk, and not everywhere")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@BOTH
def test_a_full_disk_keeps_what_was_published(small_disk: Path, publish: Publish) -> None:
    put_exclusive(small_disk, "old", b"old" * 20_000)
    for name in ("new", "old"):
        with pytest.raises(DiskFull, match=f"{name} needs 400,000 bytes") as caught:
            publish(small_disk, name, bytes(400_000))
        assert caught.value.needed == 400_000
        assert 0 <= caught.value.free <= 256 * 1024 - 60_000
        assert contents(small_disk) == {"old": b"old" * 20_000}
    publish(small_disk, "new", bytes(100_000))
    assert contents(small_disk) == {"old": b"old" * 20_000, "new": bytes(100_000)}


@pytest.mark.parametrize("profile", ["raw", "zstd"])
def test_a_full_disk_keeps_every_finished_shard(small_disk: Path, profile: str) -> None:
    shape = Geometry(40, (4, 25, 25), "float32", chunk_rows=10, shard_rows=10, profile=profile)
    rows = drawn(shape)
    with pytest.raises(DiskFull, match=re.escape(shard_name(2))) as caught:
        begin(small_disk, shape, rows)
    assert caught.value.needed > 0.9 * shape.nbytes / 4  # random bits do not get smaller
    assert not list(small_disk.rglob(f"{TEMPORARY}*"))
    writer = LevelWriter(small_disk, KEY, shape, [INTENT])
    writer.begin()
    assert writer.missing() == [2, 3]
    with pytest.raises(DiskFull):  # still
        writer.put(2, rows[20:30])
    assert writer.missing() == [2, 3]
    command = ["mount", "-o", "remount,size=2m", str(small_disk)]
    subprocess.run(command, check=True)
    for shard in writer.missing():
        writer.put(shard, rows[slice(*shape.shard_range(shard))])
    writer.commit(None)
    assert Level.open(small_disk, KEY).read(0, 40).tobytes() == rows.tobytes()
    assert not list(small_disk.rglob(f"{TEMPORARY}*"))


def test_a_file_that_goes_while_sizes_are_taken_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One name that vanished must not make the others absent: their shards would look damaged."""
    for name in ("goes", "stays"):
        (tmp_path / name).write_bytes(b"12")
    scan = os.scandir

    @contextmanager
    def scanned(directory: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scan(directory) as entries:
            found = list(entries)
        (tmp_path / "goes").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", scanned)
    assert DISK.sizes(tmp_path) == {"stays": 2}
