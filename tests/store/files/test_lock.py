"""Locks of writers, of readers and of those who remove; and what a group shares."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_levels import INTENT, KEY
from together import holding, reading

from strata.store.errors import LevelBusy, StoreRefused
from strata.store.feature_store import Store, open_level
from strata.store.files.files import DISK
from strata.store.files.lock import alone, hold
from strata.store.level.layout import Geometry
from strata.store.level.level import COMMIT
from strata.store.write.verify import forget_damage
from strata.store.write.writer import LevelWriter

SHAPE = Geometry(5, (1, 2, 2), "float32", chunk_rows=1, shard_rows=2)
ROWS = np.arange(20, dtype=np.float32).reshape(5, 1, 2, 2)
ALICE, BOB, STRANGER, GROUP, OTHER = 61001, 61002, 61003, 61010, 61020
"""Three users, the group of two of them, and another group, which is everybody's first one."""


def write(root: Path) -> Path:
    """Write the level, or what is missing of it; returns its directory."""
    writer = LevelWriter(root, KEY, SHAPE, [INTENT])
    with writer.locked():
        writer.fill((k, ROWS[slice(*SHAPE.shard_range(k))]) for k in writer.missing())
        writer.commit(None, {"label": np.arange(5)})
    return writer.directory


def remove(root: Path) -> int:
    return Store(root).remove(KEY.depth, KEY.fingerprint)


# ---- readers -------------------------------------------------------------------------------------


def test_what_another_process_reads_is_not_removed_until_it_ends(tmp_path: Path) -> None:
    directory = write(tmp_path)
    with reading(directory) as one, reading(directory) as two:
        with pytest.raises(LevelBusy, match=r"x_\d-\w+ is being read by process") as busy:
            remove(tmp_path)
        for process in (one, two):
            since = r" since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(-c "
            assert re.search(
                f"process {process.pid} on {socket.gethostname()}{since}", str(busy.value)
            )
        one.send_signal(signal.SIGKILL)
        one.wait()
        assert open_level(directory).read(0, 5).tobytes() == ROWS.tobytes()
        two.kill()
    assert remove(tmp_path) > 0
    assert not directory.parent.exists()


def test_threads_of_one_process_are_told_apart(tmp_path: Path) -> None:
    directory = write(tmp_path)
    opened, done, read = threading.Event(), threading.Event(), list[bytes]()

    def reader() -> None:
        level = open_level(directory)
        opened.set()
        done.wait(60)
        read.append(level.read(0, 5).tobytes())

    thread = threading.Thread(target=reader)
    thread.start()
    opened.wait(60)
    with pytest.raises(LevelBusy, match=f"is being read by process {os.getpid()} "):
        remove(tmp_path)
    done.set()
    thread.join()
    assert read == [ROWS.tobytes()]
    assert remove(tmp_path) > 0


def test_a_level_is_held_as_long_as_it_lives_and_no_longer(tmp_path: Path) -> None:
    level = open_level(write(tmp_path))
    level.read(0, 5)  # keeps maps and checks
    with pytest.raises(LevelBusy):
        remove(tmp_path)
    free = level.let_go()
    del level
    assert remove(tmp_path) > 0
    assert free.held is None


def test_one_view_that_is_read_keeps_the_others(tmp_path: Path) -> None:
    """All or nothing: a removal that is told has removed no level of x_j."""
    other = KEY.__class__(KEY.depth, KEY.fingerprint, "test", "clean")
    directory = write(tmp_path)
    writer = LevelWriter(tmp_path, other, SHAPE, [INTENT])
    with writer.locked():
        writer.fill((k, ROWS[slice(*SHAPE.shard_range(k))]) for k in writer.missing())
        level = writer.commit(None)
    with pytest.raises(LevelBusy):
        remove(tmp_path)
    assert (directory / COMMIT).exists()
    assert level.read(0, 5).tobytes() == ROWS.tobytes()


def test_a_repair_waits_for_readers_and_can_be_stopped(tmp_path: Path) -> None:
    directory = write(tmp_path)
    (directory / "x/c.1.0.0.0").unlink()
    said = list[str]()

    def waiting(who: str) -> None:
        said.append(who)
        raise KeyboardInterrupt

    held = DISK.share(directory / COMMIT)
    with pytest.raises(KeyboardInterrupt):
        forget_damage(tmp_path, directory, waiting=waiting)
    assert "is being read by process" in said[0]
    assert (directory / COMMIT).exists()
    del held
    assert [d.path.name for d in forget_damage(tmp_path, directory)] == ["c.1.0.0.0"]


def test_a_reader_that_comes_while_it_goes_finds_nothing(tmp_path: Path) -> None:
    commit = write(tmp_path) / COMMIT
    found = list[object]()
    thread = threading.Thread(target=lambda: found.append(DISK.share(commit)))
    with alone([commit], "it"):
        thread.start()
        time.sleep(0.3)
        assert not found
        commit.unlink()
    thread.join()
    assert found == [None]


# ---- lock files ----------------------------------------------------------------------------------


def test_a_lock_file_may_go_with_its_directory(tmp_path: Path) -> None:
    """Who waited has the lock of the file that has the name then, and no two have it."""
    path, order = tmp_path / "run" / "LOCK", list[str]()

    def second() -> None:
        with hold(path, "it", lambda who: order.append(who)):
            order.append("second")
            with pytest.raises(LevelBusy), hold(path, "it"):
                pass

    with hold(path, "it"):
        thread = threading.Thread(target=second)
        thread.start()
        while not order:
            time.sleep(0.01)
        path.unlink()
        path.parent.rmdir()
    thread.join()
    assert order[-1] == "second"
    assert f"it is being written by process {os.getpid()} " in order[0]


def test_who_holds_a_lock_is_said_with_its_command(tmp_path: Path) -> None:
    with holding(tmp_path / "LOCK") as process, pytest.raises(LevelBusy) as busy:  # noqa: SIM117
        with hold(tmp_path / "LOCK", "the run r"):
            pass
    name = f"the run r is being written by process {process.pid} on {socket.gethostname()} since "
    assert str(busy.value).startswith(name)
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(-c ", str(busy.value))


# ---- a group -------------------------------------------------------------------------------------


def as_user(user: int, group: int, work: Callable[[], object]) -> str:
    """What a user's process raised, whose umask is 022; empty: it did its work."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        said = b""
        try:
            os.close(out)
            os.setgroups([group])
            os.setgid(OTHER)
            os.setuid(user)
            os.umask(0o022)
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}".encode()
        os.write(into, said or b" ")
        os._exit(0)
    os.close(into)
    os.waitpid(pid, 0)
    with os.fdopen(out, "rb") as pipe:
        return pipe.read().decode().strip()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that every user may look into."""
    if os.geteuid():
        pytest.skip("only root can be two users")
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(0o755)
    return tmp_path


def shared(place: Path, mode: int) -> Path:
    store = place / "store"
    store.mkdir()
    os.chown(store, ALICE, GROUP)
    store.chmod(mode)
    return store


def test_a_group_shares_a_store_under_umask_022(place: Path) -> None:
    """What one has begun the other finishes, mends, reads and removes, and the first again."""
    store = shared(place, 0o2775)
    level, users = KEY.directory(store), (ALICE, BOB, ALICE)

    def begin() -> None:
        writer = LevelWriter(store, KEY, SHAPE, [INTENT])
        with writer.locked():
            writer.put(0, ROWS[:2])

    def mend() -> None:
        (level / "x/c.1.0.0.0").unlink()
        with LevelWriter(store, KEY, SHAPE, [INTENT]).lock():
            forget_damage(store, level)
        write(store)

    for one, other in itertools.pairwise(users):
        assert as_user(one, GROUP, begin) == ""
        assert as_user(other, GROUP, lambda: write(store)) == ""
        assert as_user(one, GROUP, mend) == ""
        assert as_user(other, GROUP, lambda: open_level(level).read(0, 5)) == ""
        assert as_user(other, GROUP, lambda: remove(store)) == ""
        assert not level.exists()


def test_who_is_not_of_the_group_reads_and_holds_what_it_reads(place: Path) -> None:
    store = shared(place, 0o2775)
    assert as_user(ALICE, GROUP, lambda: write(store)) == ""
    level = KEY.directory(store)
    out, into = os.pipe()

    def read() -> None:
        opened = open_level(level)
        opened.read(0, 5)
        os.write(into, str(os.getpid()).encode())
        time.sleep(60)

    thread = threading.Thread(target=lambda: as_user(STRANGER, OTHER, read))
    thread.start()
    reader = int(os.read(out, 100))
    said = as_user(BOB, GROUP, lambda: remove(store))
    os.kill(reader, signal.SIGKILL)
    thread.join()
    assert said.startswith("LevelBusy")
    assert f"is being read by process {reader} " in said
    assert as_user(BOB, GROUP, lambda: remove(store)) == ""


def test_a_store_that_is_not_shared_says_how_to_share_it(place: Path) -> None:
    store = shared(place, 0o755)
    assert as_user(ALICE, GROUP, lambda: write(store)) == ""
    assert as_user(BOB, GROUP, lambda: open_level(KEY.directory(store)).read(0, 5)) == ""
    said = as_user(BOB, GROUP, lambda: remove(store))
    assert said.startswith("StoreRefused: the file system refuses")
    for words in ("permission denied", str(ALICE), "chmod g+rwxs", "chgrp"):
        assert words in said


def test_a_store_of_before_is_shared_by_what_the_message_says(place: Path) -> None:
    """Its lock files are of somebody else, and not to be written by us."""
    store = shared(place, 0o755)
    assert as_user(ALICE, GROUP, lambda: write(store)) == ""
    (lock,) = (store / "locks").iterdir()
    for path in (store, *store.rglob("*")):
        os.chown(path, ALICE, GROUP)
        if path.is_dir():
            path.chmod(0o2775)
    lock.chmod(0o644)
    assert as_user(BOB, GROUP, lambda: remove(store)) == ""
    assert as_user(BOB, GROUP, lambda: write(store)) == ""
    assert as_user(ALICE, GROUP, lambda: remove(store)) == ""
    assert lock.stat().st_uid == BOB


def test_nothing_is_opened_to_a_group_that_does_not_share(place: Path) -> None:
    store = shared(place, 0o755)
    assert as_user(ALICE, GROUP, lambda: write(store)) == ""
    modes = {path.stat().st_mode & 0o7022 for path in store.rglob("*")}
    assert modes == {0}


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreRefused, match="not a directory"),
        hold(tmp_path / "file" / "LOCK", "it"),
    ):
        pass


def test_a_directory_that_cannot_be_made_is_refused_at_once() -> None:
    with pytest.raises(StoreRefused, match="/proc/x/LOCK"), hold(Path("/proc/x/LOCK"), "x"):
        pass
