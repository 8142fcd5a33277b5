"""Every call that changes the disk fails once: it is said, nothing is half done, and it goes on.

On the real disk, through a file system that fails at one call and notes what it was asked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from shard_files import shard_path
from small_levels import INTENT, KEY, chop, contents, drawn, flip

from strata.store.errors import DiskFull, LevelAbsent, StoreRefused
from strata.store.feature_store import Store
from strata.store.files.files import Files
from strata.store.files.publish import TEMPORARY, make_directory
from strata.store.level.layout import BEGUN, Geometry
from strata.store.level.level import COMMIT, RECEIPTS, Level, receipt_path
from strata.store.write.verify import QUARANTINE, forget_damage
from strata.store.write.writer import ZARR, LevelWriter

TINY = Geometry(5, (1, 2, 2), "float32", chunk_rows=1, shard_rows=2)
PACKED = Geometry(3, (1, 2, 2), "float32", chunk_rows=1, shard_rows=2, profile="zstd")
LABELS = {"label": np.arange(5) % 3}
ERRORS = {errno.ENOSPC: DiskFull, errno.EIO: StoreRefused, errno.EINTR: StoreRefused}


@dataclass(frozen=True)
class Call:
    what: str
    path: Path
    """What is changed; for a link or rename its new name, for a file the name it was made under."""
    descriptor: int = -1
    source: Path = Path()


class FaultyFiles(Files):
    """The real disk, whose n-th changing call fails, and whose writes may take less than asked.

    It notes an fsync and does not do it: these tests cut no power, and would wait for little else.
    """

    def __init__(self, fail_at: int = 0, code: int = errno.EIO, most: int | None = None) -> None:
        self.fail_at, self.code, self.most = fail_at, code, most
        self.log: list[Call] = []
        self.paths: dict[int, Path] = {}
        self.failed: Call | None = None

    def _note(self, call: Call) -> None:
        self.log.append(call)
        if len(self.log) == self.fail_at:
            self.failed = call
            raise OSError(self.code, os.strerror(self.code), str(call.path))

    def create(self, path: Path) -> int:
        self._note(Call("create", path))
        descriptor = super().create(path)
        self.paths[descriptor] = path
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        self._note(Call("write", self.paths[descriptor], descriptor))
        return super().write(descriptor, data[: self.most])

    def sync(self, descriptor: int) -> None:
        os.fstat(descriptor)
        self._note(Call("sync", self.paths[descriptor], descriptor))

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._note(Call("close", self.paths[descriptor], descriptor))

    def link(self, source: Path, target: Path) -> None:
        self._note(Call("link", target, source=source))
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._note(Call("rename", target, source=source))
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._note(Call("unlink", path))
        super().unlink(path)

    def make_directory(self, path: Path) -> None:
        self._note(Call("make_directory", path))
        super().make_directory(path)

    def remove_directory(self, path: Path) -> None:
        self._note(Call("remove_directory", path))
        super().remove_directory(path)

    def sync_directory(self, path: Path) -> None:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        self._note(Call("sync_directory", path))


class NoLinks(FaultyFiles):
    """A file system without hard links."""

    def link(self, source: Path, target: Path) -> None:
        raise OSError(self.code, os.strerror(self.code), str(target))


# ---- what is done to a level --------------------------------------------------------------------


def write(root: Path, files: Files, shape: Geometry = TINY) -> Level:
    """Begin or take up, put what is missing, commit."""
    writer = LevelWriter(root, KEY, shape, [INTENT], files)
    with writer.locked():
        for shard in writer.missing():
            writer.put(shard, drawn(shape)[slice(*shape.shard_range(shard))])
        return writer.commit(None, {"label": LABELS["label"][: shape.rows]})


def repair(root: Path, files: Files) -> None:
    """As ``write``, of a level that may be damaged."""
    writer = LevelWriter(root, KEY, TINY, [INTENT], files)
    with writer.lock():
        forget_damage(root, writer.directory, files)
    write(root, files)


def damage(root: Path) -> None:
    """A shard, a receipt, another shard's all, x/zarr.json and the labels."""
    directory = KEY.directory(root)
    flip(shard_path(directory, 0), 3)
    chop(receipt_path(directory, 1))
    shard_path(directory, 2).unlink()
    flip(directory / BEGUN)
    flip(directory / "label/c.0", -1)


def remove(root: Path, files: Files) -> None:
    Store(root, files).remove(KEY.depth, KEY.fingerprint)


def level_files(root: Path) -> dict[str, bytes]:
    """Without the lock, in which a process signs, and without what mending set aside."""
    return {k: v for k, v in contents(root).items() if k.split("/")[0] not in ("locks", QUARANTINE)}


def seen(root: Path) -> bytes | None:
    """The rows that a reader has; None: there is no level."""
    try:
        level = Level.open(root, KEY)
    except LevelAbsent:
        return None
    return level.read(0, len(level)).tobytes()


def each_fault(
    root: Path, work: Callable[[Path, Files], object], prepare: Callable[[Path], object], code: int
) -> Iterator[tuple[Path, FaultyFiles]]:
    """Run ``work`` in a fresh store once for every call that it makes, which fails; what is raised
    and what is left behind is checked."""
    for fail_at in range(1, 1000):
        store = root / f"{fail_at}" / "store"
        prepare(store)
        files = FaultyFiles(fail_at, code)
        try:
            work(store, files)
        except StoreRefused as error:
            raised = type(error)
        else:
            raised = ERRORS[code]
            if files.failed is None:
                return  # one past the last call
            # The file that was published has its name, and the temporary one waits for the next
            # writer: the one failure that nobody needs to hear of.
            assert files.failed.what == "unlink"
            assert TEMPORARY in files.failed.path.name
        assert raised is ERRORS[code]
        assert files.failed is not None
        left = {name for name in level_files(store) if TEMPORARY in name}
        expected = files.failed.path.name if files.failed.what == "unlink" else ""
        assert {Path(name).name for name in left} <= {expected}
        yield store, files
    raise AssertionError("the work never ends")


BOTH_SHAPES = pytest.mark.parametrize("shape", [TINY, PACKED], ids=["raw", "packed"])
EACH = pytest.mark.parametrize("code", sorted(ERRORS), ids=lambda code: errno.errorcode[code])


@EACH
@BOTH_SHAPES
def test_writing_survives_any_failing_call(tmp_path: Path, code: int, shape: Geometry) -> None:
    write(tmp_path / "whole", FaultyFiles(), shape)
    whole, rows = level_files(tmp_path / "whole"), drawn(shape).tobytes()
    faults = 0
    for store, _ in each_fault(tmp_path, lambda s, f: write(s, f, shape), lambda s: None, code):
        assert seen(store) in (None, rows)
        assert write(store, FaultyFiles(), shape).read(0, shape.rows).tobytes() == rows
        assert level_files(store) == whole
        faults += 1
    assert faults > 60


@EACH
def test_mending_survives_any_failing_call(tmp_path: Path, code: int) -> None:
    write(tmp_path / "whole", FaultyFiles())
    whole, rows = level_files(tmp_path / "whole"), drawn(TINY).tobytes()

    def prepare(store: Path) -> None:
        write(store, FaultyFiles())
        damage(store)

    faults = 0
    for store, files in each_fault(tmp_path, repair, prepare, code):
        if not (KEY.directory(store) / COMMIT).exists():
            assert seen(store) is None
        repair(store, FaultyFiles())
        assert seen(store) == rows, files.failed
        assert level_files(store) == whole, files.failed
        faults += 1
    assert faults > 60


@EACH
def test_removing_survives_any_failing_call(tmp_path: Path, code: int) -> None:
    write(tmp_path / "whole", FaultyFiles())
    rows, faults = drawn(TINY).tobytes(), 0
    for store, _ in each_fault(tmp_path, remove, lambda s: write(s, FaultyFiles()), code):
        assert seen(store) in (None, rows)
        remove(store, FaultyFiles())
        assert level_files(store) == {}
        write(store, FaultyFiles())
        assert level_files(store) == level_files(tmp_path / "whole")
        faults += 1
    assert faults > 12


@pytest.mark.parametrize("most", [1, 7])
@BOTH_SHAPES
def test_short_writes_are_invisible(tmp_path: Path, most: int, shape: Geometry) -> None:
    write(tmp_path / "whole", FaultyFiles(), shape)
    files = FaultyFiles(most=most)
    write(tmp_path / "short", files, shape)
    assert level_files(tmp_path / "short") == level_files(tmp_path / "whole")
    assert sum(call.what == "write" for call in files.log) > 1000 / most


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP], ids=["EPERM", "EOPNOTSUPP"])
def test_a_file_system_without_links_will_do(tmp_path: Path, code: int) -> None:
    write(tmp_path / "whole", Files())
    whole = level_files(tmp_path / "whole")
    files = NoLinks(code=code)
    write(tmp_path / "store", files)
    assert level_files(tmp_path / "store") == whole
    assert any(call.what == "rename" for call in files.log)
    damage(tmp_path / "store")
    repair(tmp_path / "store", NoLinks(code=code))
    assert level_files(tmp_path / "store") == whole


# ---- what was called, and in which order --------------------------------------------------------


def test_a_failed_fsync_is_not_tried_again(tmp_path: Path) -> None:
    """The kernel may have dropped the pages, and a second fsync would say that all is well."""
    syncs = 0
    for _, files in each_fault(tmp_path, write, lambda s: None, errno.EIO):
        assert files.failed is not None
        if files.failed.what == "sync":
            after = [c.what for c in files.log[files.fail_at :] if c.path == files.failed.path]
            assert after == ["close", "unlink"]
            assert not any(call.source == files.failed.path for call in files.log)
            syncs += 1
    assert syncs == 2 + 2 * TINY.shards + 2 * len(LABELS) + 2


def test_every_file_is_durable_before_what_relies_on_it(tmp_path: Path) -> None:
    files = FaultyFiles()
    write(tmp_path / "store", files)
    done: dict[Path, int] = {}
    for at, link in enumerate(files.log):
        if link.what != "link":
            continue
        of_file = [n for n, call in enumerate(files.log) if call.path == link.source]
        assert files.log[of_file[0]].what == "create"
        written = [n for n in of_file if files.log[n].what == "write"]
        synced = [n for n in of_file if files.log[n].what == "sync"]
        assert max(written) < min(synced) <= max(synced) < at
        named = Call("sync_directory", link.path.parent)
        done[link.path] = files.log.index(named, at)
    directory = KEY.directory(tmp_path / "store")
    order = [of(directory, k) for k in range(TINY.shards) for of in (shard_path, receipt_path)]
    beside = [directory / name for name in ("label/c.0", "label/zarr.json", ZARR, COMMIT)]
    assert list(done) == [directory.parent / "intent.json", directory / BEGUN, *order, *beside]
    begun = [n for n, call in enumerate(files.log) if call.what == "create"]
    for before, begin_next in zip(list(done.values())[:-1], begun[1:], strict=True):
        assert before < begin_next
    last = [call.path for call in files.log[done[directory / ZARR] + 1 : begun[-1]]]
    inside = [directory / name for name in ("label", "x", RECEIPTS)]
    assert last == [*inside, directory, directory.parent]


def test_a_closed_directory_above_the_store_is_no_obstacle(tmp_path: Path) -> None:
    """A home may lie in a directory that only the system reads; we made no name there."""

    class Closed(Files):
        def sync_directory(self, path: Path) -> None:
            if path == tmp_path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            super().sync_directory(path)

    (tmp_path / "home").mkdir()
    make_directory(tmp_path / "home" / "features", Closed())
    make_directory(tmp_path / "home", Closed())
    with pytest.raises(StoreRefused, match="permission denied"):
        make_directory(tmp_path / "ours", Closed())
