"""A bucket has no locks: who writes, reads or removes a level puts a sign, and others are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from command import environment
from root import PYTHONPATH
from s3_server import connect
from small_levels import INTENT, KEY

from strata.store.errors import LevelBusy, StoreRefused
from strata.store.feature_store import Store
from strata.store.level.layout import Geometry
from strata.store.level.level import COMMIT, Level
from strata.store.s3.signs import READS

SHAPE = Geometry(5, (1, 2, 2), "float32", chunk_rows=1, shard_rows=2)
ROWS = np.arange(20, dtype=np.float32).reshape(5, 1, 2, 2)


def write(store: Store) -> None:
    writer = store.writer(KEY, SHAPE, [INTENT])
    with writer.locked():
        writer.fill((k, ROWS[slice(*SHAPE.shard_range(k))]) for k in writer.missing())
        writer.commit(None)


def remove(store: Store) -> int:
    return store.remove(KEY.depth, KEY.fingerprint)


def signs(store: Store) -> list[str]:
    return [name for name in store.files.listed(store.root / "locks") if "/" in name]


def test_what_is_read_or_written_stays_and_who_removes_is_told(bucket: str) -> None:
    one, other = connect(bucket), connect(bucket)
    write(one)
    assert signs(one) == [], "signs go with what they speak of"
    level = one.open(KEY)
    with pytest.raises(LevelBusy, match=rf"process {os.getpid()} on .* reads x_3-") as busy:
        remove(other)
    (name,) = signs(other)
    assert str(busy.value).endswith(f"remove s3://{bucket}/store/locks/{name}")
    assert level.read(0, 5).tobytes() == ROWS.tobytes()
    del level
    with one.writer(KEY, SHAPE, [INTENT]).lock():  # noqa: SIM117
        with pytest.raises(LevelBusy, match="writes x_3-"):
            _in_a_thread(lambda: remove(other))
    assert remove(other) > 0
    assert signs(one) == []


def _in_a_thread(work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_what_is_being_removed_is_neither_read_nor_written(bucket: str) -> None:
    one, other = connect(bucket), connect(bucket)
    write(one)
    with one.files.alone([KEY.directory(one.root) / COMMIT], "x_3", None):
        with pytest.raises(LevelBusy, match="removes x_3-"):
            other.open(KEY)
        with (
            pytest.raises(LevelBusy, match="removes x_3-"),
            other.writer(KEY, SHAPE, [INTENT]).lock(),
        ):
            pass
        with pytest.raises(LevelBusy):
            remove(other)
    assert other.open(KEY).read(0, 5).tobytes() == ROWS.tobytes()


def test_a_repair_waits_for_readers(bucket: str) -> None:
    one, other = connect(bucket), connect(bucket)
    write(one)
    level, said = [one.open(KEY)], list[str]()

    def waiting(who: str) -> None:
        said.append(who)
        level.clear()

    with other.files.alone([KEY.directory(other.root) / COMMIT], "x_3", waiting):
        pass
    assert len(said) == 1
    assert " reads x_3-" in said[0]


def test_two_writers_do_not_wait_for_each_other(bucket: str) -> None:
    one, other = connect(bucket), connect(bucket)
    with one.writer(KEY, SHAPE, [INTENT]).lock(), other.writer(KEY, SHAPE, [INTENT]).lock():
        assert len(signs(one)) == 2


def test_a_killed_process_of_this_machine_is_passed_over(bucket: str) -> None:
    store = connect(bucket)
    write(store)
    code = (
        "import os, sys; from s3_server import connect; from small_levels import KEY\n"
        "level = connect(sys.argv[1]).open(KEY); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, bucket]
    how = {"env": {**environment(), "PYTHONPATH": PYTHONPATH}, "text": True}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, **how) as process:  # pyright: ignore
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        with pytest.raises(LevelBusy, match=f"process {process.pid} "):
            remove(store)
        process.send_signal(signal.SIGKILL)
    assert len(signs(store)) == 1
    assert remove(store) > 0
    assert signs(store) == []


def test_a_process_of_another_machine_is_believed_until_its_sign_is_removed(bucket: str) -> None:
    store = connect(bucket)
    write(store)
    place = KEY.directory(store.root).parent.name
    sign = {"who": "process 1 on far", "machine": "far", "process": 2**22 + 1, "thread": 1}
    path = store.root / "locks" / place / f"{READS}-1"
    store.files.put(path, json.dumps(sign).encode())  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(LevelBusy, match="process 1 on far reads"):
        remove(store)
    store.files.unlink(path)
    assert remove(store) > 0


def test_who_may_not_write_reads_all_the_same(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = connect(bucket)
    write(store)

    def denied(path: object, data: bytes) -> None:
        raise StoreRefused(f"s3://bucket: {path}: access is denied")

    monkeypatch.setattr(store.files, "put", denied)
    level = Level.open(store.root, KEY, store.files)
    assert level.read(0, 5).tobytes() == ROWS.tobytes()
    assert signs(store) == []
