"""What this machine can do at most: memory, disk, and the arithmetic that a reader has to do.

Every function returns GB/s (1e9 bytes), the best of a few tries, because what else a shared machine
does only ever takes away. A cold file is one that was dropped from the page cache, which needs no
privilege, and that mincore says has gone; what the host of a virtual machine keeps in its own
memory is out of reach, so a cold rate may still be that of a cache.

    python benchmarks/feed_limits.py [DIRECTORY] [--bytes 300000000] [--row 131072]
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from google_crc32c import value as crc32c

TRIES = 5
BIG, SMALL = 256 << 20, 1 << 20
"""Bytes of a copy: far more than a cache holds, and what stays in one."""
CHUNK = 1 << 20
"""Bytes of an inner chunk, the unit of decoding."""
REQUEST = 8 << 20
"""Bytes of a request that reads in order."""
PROT_READ = 1


def best(work: Callable[[], int], before: Callable[[], object] = lambda: None) -> float:
    """GB/s of ``work``, which returns its bytes; ``before`` is called before the clock starts."""
    rates = []
    for _ in range(TRIES):
        before()
        begun = time.perf_counter()
        nbytes = work()
        rates.append(nbytes / (time.perf_counter() - begun) / 1e9)
    return max(rates)


def aligned(shape: int | tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """A buffer that begins where a page does, in huge pages, each touched.

    Rows in a file mostly begin there, too. numpy's own large arrays begin 16 bytes later, which is
    the worst place there is: copying to 1 to 16 bytes past the source's place in a page takes some
    processors (AMD Zen 3 among them) four times as long.
    """
    count = math.prod(np.atleast_1d(shape).tolist())
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, dtype, count)
    buffer[:] = 0
    return buffer.reshape(shape)


# ---- memory -------------------------------------------------------------------------------------


def copy_rate(nbytes: int, threads: int) -> float:
    """Bytes copied (each read once, written once) by threads that share ``BIG`` bytes.

    Args:
        nbytes: of the buffer that is copied into; ``BIG`` for memory, ``SMALL`` for the cache.
    """
    source = aligned(BIG)
    source[:] = 1
    targets = [aligned(nbytes // threads if nbytes == BIG else nbytes) for _ in range(threads)]
    share = BIG // threads

    def work(thread: int) -> int:
        target = targets[thread]
        for at in range(thread * share, (thread + 1) * share, len(target)):
            np.copyto(target, source[at : at + len(target)])
        return share

    with ThreadPoolExecutor(threads) as pool:
        return best(lambda: sum(pool.map(work, range(threads))))


# ---- disk ---------------------------------------------------------------------------------------


def drop_cache(paths: Iterable[Path]) -> float:
    """Drop files from the page cache; the share of them that is still there.

    What is not yet on the disk is written first. A page that any process maps stays.
    """
    there = total = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            pages = _resident(descriptor)
        finally:
            os.close(descriptor)
        there, total = there + int(pages.sum()), total + len(pages)
    return there / max(1, total)


def resident_share(path: Path) -> float:
    """Share of a file's pages that are in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return float(_resident(descriptor).mean())
    finally:
        os.close(descriptor)


def _resident(descriptor: int) -> np.ndarray:
    """bool for every page of a file, by mincore, of a map that is not touched."""
    libc, size = ctypes.CDLL(None, use_errno=True), os.fstat(descriptor).st_size
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    address = libc.mmap(None, size, PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    failed = libc.mincore(address, size, pages.ctypes.data)
    libc.munmap(address, size)
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return (pages & 1).astype(bool)


def write_rate(directory: Path, nbytes: int) -> float:
    """One new file, written in order and synced."""
    block, path = memoryview(_noise(REQUEST)), directory / "written"

    def work() -> int:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        for _ in range(nbytes // REQUEST):
            os.write(descriptor, block)
        os.fsync(descriptor)
        os.close(descriptor)
        return nbytes // REQUEST * REQUEST

    rate = best(work, before=lambda: path.unlink(missing_ok=True))
    path.unlink()
    return rate


def read_rate(
    path: Path, request: int, in_flight: int = 1, *, shuffled: bool = False, direct: bool = True
) -> float:
    """A cold file, read into buffers that are reused, by as many threads as requests in flight.

    Args:
        request: bytes of each; if direct, a multiple of the disk's blocks.
        shuffled: at random places instead of in order.
        direct: past the page cache, which is faster when there are several in flight.
    """
    offsets = np.arange(path.stat().st_size // request) * request
    if shuffled:
        offsets = np.random.default_rng(0).permutation(offsets)
    buffers = [aligned(request).data for _ in range(in_flight)]
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))

    def before() -> None:
        if left := drop_cache([path]):
            raise RuntimeError(f"{left:.1%} of {path} stays in the page cache")
        advice = os.POSIX_FADV_RANDOM if shuffled else os.POSIX_FADV_SEQUENTIAL
        os.posix_fadvise(descriptor, 0, 0, advice)

    def work(thread: int) -> int:
        mine = offsets[thread::in_flight].tolist()
        return sum(os.preadv(descriptor, [buffers[thread]], offset) for offset in mine)

    try:
        with ThreadPoolExecutor(in_flight) as pool:
            return best(lambda: sum(pool.map(work, range(in_flight))), before)
    finally:
        os.close(descriptor)


def _noise(nbytes: int) -> bytes:
    """What no disk can compress."""
    return np.random.default_rng(0).bytes(nbytes)


# ---- arithmetic, on one thread ------------------------------------------------------------------


def decode_rate(rows: np.ndarray, profile: str) -> float:
    """Bytes of rows that one thread decodes, a chunk at a time, into memory that it reuses.

    Args:
        rows: stored elements, as many as are to be decoded.
        profile: ``zstd`` or ``lz4``, packed as a level's chunks are.
    """
    data = rows.reshape(-1).view(np.uint8)
    if profile == "zstd":
        codec: Any = numcodecs.Zstd(level=1)
    else:
        codec = numcodecs.Blosc("lz4", clevel=5, shuffle=numcodecs.Blosc.NOSHUFFLE)
    numcodecs.blosc.use_threads = False
    chunks = [codec.encode(data[at : at + CHUNK]) for at in range(0, len(data) - CHUNK + 1, CHUNK)]
    out = aligned(CHUNK)

    def work() -> int:
        for chunk in chunks:
            codec.decode(chunk, out)
        return len(chunks) * CHUNK

    return best(work)


def digest_rate(rows: np.ndarray, digest: Callable[[Any], object]) -> float:
    """Bytes of rows, from memory, of which one thread takes a digest of each chunk."""
    data = rows.reshape(-1).view(np.uint8)
    starts = range(0, len(data) - CHUNK + 1, CHUNK)

    def work() -> int:
        for at in starts:
            digest(data[at : at + CHUNK])
        return len(starts) * CHUNK

    return best(work)


# ---- all of them --------------------------------------------------------------------------------


def memory_limits(threads: Iterable[int] = (1, 2)) -> dict[str, float]:
    """Copies into memory and into a cache."""
    found = {}
    for count in threads:
        found[f"copy 256 MiB, {count} threads"] = copy_rate(BIG, count)
        found[f"copy into 1 MiB, {count} threads"] = copy_rate(SMALL, count)
    return found


def disk_limits(directory: Path, nbytes: int, row: int) -> dict[str, float]:
    """Of one file of ``nbytes`` in this directory, removed in the end."""
    with tempfile.TemporaryDirectory(prefix="limits-", dir=directory) as place:
        found = {"write and fsync": write_rate(Path(place), nbytes)}
        path = Path(place) / "read"
        with path.open("wb") as file:
            block = _noise(REQUEST)
            for _ in range(nbytes // REQUEST):
                file.write(block)
        found["cold in order, through the page cache"] = read_rate(path, REQUEST, direct=False)
        for count in (1, 4, 16):
            name = f"{count} in flight"
            found[f"cold in order, {name}"] = read_rate(path, REQUEST, count)
            found[f"cold rows of {row}, {name}"] = read_rate(path, row, count, shuffled=True)
    return found


def arithmetic_limits(rows: np.ndarray) -> dict[str, float]:
    """Decoding and digests of these rows, of at least 1 MiB."""
    return {
        "zstd-1": decode_rate(rows, "zstd"),
        "blosc lz4": decode_rate(rows, "lz4"),
        "crc32c": digest_rate(rows, crc32c),
        "sha256": digest_rate(rows, hashlib.sha256),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path, nargs="?", default=Path())
    parser.add_argument("--bytes", type=int, default=300_000_000, help="of the file on the disk")
    parser.add_argument("--row", type=int, default=131_072, help="bytes read at random")
    options = parser.parse_args()
    found = memory_limits() | disk_limits(options.directory, options.bytes, options.row)
    print(json.dumps({name: round(rate, 2) for name, rate in found.items()}, indent=1))


if __name__ == "__main__":
    main()
