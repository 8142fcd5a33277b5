"""Local copies of shards: within their budget, sound, and safe for several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from strata.store.errors import LevelDamaged
from strata.store.fingerprint import sha256
from strata.store.s3.read_cache import ReadCache

DATA = [bytes([i]) * 1000 for i in range(8)]


class Server:
    """Gives bytes away, and counts how often."""

    def __init__(self, data: bytes) -> None:
        self.data, self.asked = data, 0

    def __call__(self) -> Iterator[bytes]:
        self.asked += 1
        yield from (self.data[i : i + 300] for i in range(0, len(self.data), 300))


def get(cache: ReadCache, server: Server, name: bytes | None = None) -> int | None:
    data = name or server.data
    return cache.open(sha256(data), len(data), server, "s3://b/c.0")


def read(cache: ReadCache, server: Server) -> bytes | None:
    """Open, read, close."""
    descriptor = get(cache, server)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def used(cache: ReadCache) -> int:
    return sum(path.stat().st_size for path in cache.directory.iterdir())


def test_what_is_there_is_not_asked_for_again(tmp_path: Path) -> None:
    server = Server(DATA[1])
    for _ in range(2):
        assert read(ReadCache(tmp_path / "new" / "cache", 1000), server) == DATA[1]
    assert server.asked == 1


def test_what_was_not_opened_for_longest_goes_first(tmp_path: Path) -> None:
    cache, servers = ReadCache(tmp_path, 3000), [Server(data) for data in DATA]
    for i in (0, 1, 2, 0, 3):  # 1 goes
        assert read(cache, servers[i]) == DATA[i]
        time.sleep(0.01)
        assert used(cache) <= 3000
    for i in (0, 2, 3):
        read(cache, servers[i])
    assert [server.asked for server in servers[:4]] == [1, 1, 1, 1]
    assert read(cache, servers[1]) == DATA[1]
    assert servers[1].asked == 2


def test_what_is_open_stays_and_then_there_is_no_room(tmp_path: Path) -> None:
    cache, servers = ReadCache(tmp_path, 2000), [Server(data) for data in DATA]
    held = [get(cache, servers[i]) for i in (0, 1)]
    assert read(ReadCache(tmp_path, 2000), servers[2]) is None
    assert servers[2].asked == 0
    assert used(cache) == 2000
    assert held[0] is not None
    os.close(held[0])
    assert read(cache, servers[2]) == DATA[2]
    assert used(cache) == 2000
    assert held[1] is not None
    assert os.pread(held[1], 1000, 0) == DATA[1]
    os.close(held[1])


def test_more_than_the_budget_is_not_kept(tmp_path: Path) -> None:
    assert read(ReadCache(tmp_path / "cache", 999), Server(DATA[0])) is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("bad", [DATA[1][:-1] + b"x", DATA[1][:-1], DATA[1] + b"x", b""])
def test_bytes_that_are_not_those_committed_are_damage(tmp_path: Path, bad: bytes) -> None:
    cache = ReadCache(tmp_path, 5000)
    with pytest.raises(LevelDamaged, match=r"s3://b/c\.0 is not what was written"):
        get(cache, Server(bad), DATA[1])
    assert used(cache) == 0


@pytest.mark.parametrize("bad", [DATA[1][:-1] + b"x", DATA[1][:-1], b""])
def test_a_copy_that_was_damaged_is_fetched_again(tmp_path: Path, bad: bytes) -> None:
    server = Server(DATA[1])
    read(ReadCache(tmp_path, 5000), server)
    copy = tmp_path / sha256(DATA[1])
    copy.chmod(0o644)
    copy.write_bytes(bad)
    copy.chmod(0o444)
    assert read(ReadCache(tmp_path, 5000), server) == DATA[1]
    assert server.asked == 2


@pytest.mark.parametrize("left", [0, 900, 1000])
def test_what_a_killed_process_left_half_done_is_no_copy_and_takes_no_room(
    tmp_path: Path, left: int
) -> None:
    for data in DATA[:2]:
        (tmp_path / sha256(data)).write_bytes(bytes(left))
    cache = ReadCache(tmp_path, 1000)
    assert read(cache, Server(DATA[1])) == DATA[1]
    kept = [path.name for path in tmp_path.iterdir() if path.stat().st_size]
    assert kept == [sha256(DATA[1])]


def test_a_disk_that_is_full_is_no_room(tmp_path: Path) -> None:
    def full() -> Iterator[bytes]:
        yield DATA[1][:300]
        raise OSError(28, "No space left on device")

    cache = ReadCache(tmp_path, 5000)
    assert cache.open(sha256(DATA[1]), 1000, full, "s3://b/c.0") is None
    assert used(cache) == 0


def test_threads_that_want_one_shard_fetch_it_once(tmp_path: Path) -> None:
    cache, server = ReadCache(tmp_path, 5000), Server(DATA[1])
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: read(cache, server), range(32))) == {DATA[1]}
    assert server.asked == 1


OTHER = """
import os, random, sys
from pathlib import Path
from strata.store.fingerprint import sha256
from strata.store.s3.read_cache import ReadCache
cache, random = ReadCache(Path(sys.argv[1]), 100_000), random.Random(int(sys.argv[2]))
most = 0
for _ in range(200):
    data = bytes([random.randrange(12)]) * 20_000
    held = cache.open(sha256(data), len(data), lambda: [data[:7000], data[7000:]], "")
    if held is not None:
        assert os.pread(held, 20_000, 0) == data
        os.close(held)
    sizes = []
    for path in cache.directory.iterdir():
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            pass
    most = max(most, len(sizes))
print(most)
"""


def test_processes_share_one_budget(tmp_path: Path) -> None:
    """Twelve shards, room for five: every read is right, and the sum of copies is bounded. A
    listing sees a copy under two names at most while it gets its own."""
    words = [sys.executable, "-c", OTHER, str(tmp_path)]
    others = [
        subprocess.Popen([*words, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)
    ]
    try:
        said = [process.communicate(timeout=60)[0] for process in others]
    finally:
        for process in others:
            process.kill()
    assert [process.returncode for process in others] == [0, 0, 0]
    assert max(int(most) for most in said) <= 5 + 3 + 1
    assert used(ReadCache(tmp_path, 100_000)) <= 100_000
