"""What is compared with what: for each kind of level the readers of it, and the files they need."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from feed_levels import Features, make_level, write_beton, write_flat
from feed_limits import drop_cache
from feed_native import DecodeOnly, Native, TakeInPlace
from feed_rivals import DataLoader, Ffcv, Rival, Take, Tensorstore, zarr_python, zarrs
from feed_worker import Timed, Worker

import checkout  # noqa: F401
from strata.store.level.level import Level

THREADS = len(os.sched_getaffinity(0))
BATCHES_OF_DATALOADER = 4
"""Of an epoch; all of them would take minutes."""
SMALL_ROW = 4096
"""Bytes; a read for each such row takes minutes, and nobody would choose it."""
PARTIAL = ("DataLoader over zarr-python",)
"""Who does not deliver whole epochs."""

Rivals = Mapping[str, Callable[[], Rival]]


def batch_of(row: str) -> int:
    return 32 if row == "1.6MB" else 128


def raw(place: Path, level: Level, batch: int) -> Rivals:
    """Readers of the same bytes, all of them in the page cache."""
    flat, beton, here = write_flat(level, place / "flat"), place / "x.beton", level.directory
    write_beton(flat, beton)
    return {
        "native": partial(Native, here, batch, THREADS),
        "np.take": partial(TakeInPlace, here, batch, THREADS),
        "np.take, buffers in turn": partial(TakeInPlace, here, batch, THREADS, each=2),
        "np.take, 1 thread": partial(TakeInPlace, here, batch, 1),
        "np.take from a copy": partial(Take, flat, batch, THREADS),
        "ffcv": partial(Ffcv, beton, batch, THREADS),
        "ffcv parallel": partial(Ffcv, beton, batch, THREADS, parallel=True),
        "ffcv parallel, ring kept": partial(Ffcv, beton, batch, THREADS, parallel=True, kept=True),
        "native --loader ffcv": partial(Native, here, batch, THREADS, loader="ffcv"),
        PARTIAL[0]: partial(DataLoader, here, batch, THREADS, BATCHES_OF_DATALOADER),
        "zarr-python in order": partial(zarr_python, here),
        "zarrs in order": partial(zarrs, here, THREADS),
        "tensorstore in order": partial(Tensorstore, here, THREADS),
    }


def packed(level: Level, batch: int) -> Rivals:
    """Shuffled batches, against the same chunks in file order."""
    here = level.directory
    return {
        "native": partial(Native, here, batch, THREADS, tier="disk"),
        "native, memory tier": partial(Native, here, batch, THREADS, tier="memory"),
        "decoding alone": partial(DecodeOnly, here, THREADS),
        "zarr-python in order": partial(zarr_python, here),
        "zarrs in order": partial(zarrs, here, THREADS),
        "tensorstore in order": partial(Tensorstore, here, THREADS),
    }


def cold(place: Path, codes: Features, halves: Features, batch: int, nbytes: int) -> Rivals:
    """The same number of values in uint8 and in 16 bits, none of it in the page cache."""
    ours, lz4 = (
        make_level(place / "store", codes, profile, nbytes).directory for profile in ("zstd", "lz4")
    )
    narrow = make_level(place / "store", codes, "raw", nbytes)
    wide = make_level(place / "store", halves, "raw", 2 * nbytes)
    betons = {}
    for name, level in (("uint8", narrow), ("16-bit", wide)):
        flat, betons[name] = write_flat(level, place / "flat"), place / f"{name}.beton"
        write_beton(flat, betons[name])
        flat.path.unlink()
    ffcv = partial(Ffcv, batch=batch, workers=THREADS, parallel=True)
    native = partial(Native, batch=batch, threads=THREADS, tier="disk", outgrown=True)
    read = {"native raw uint8": partial(native, narrow.directory)}
    return {
        "native zstd uint8": partial(native, ours),
        "native lz4 uint8": partial(native, lz4),
        **(read if codes.rows[0].nbytes > SMALL_ROW else {}),
        "native raw uint8, mapped": partial(Native, narrow.directory, batch, THREADS),
        "ffcv 16-bit": partial(ffcv, betons["16-bit"]),
        "ffcv 16-bit, os_cache off": partial(ffcv, betons["16-bit"], os_cache=False),
        "ffcv uint8": partial(ffcv, betons["uint8"]),
        "zarrs zstd uint8 in order": partial(zarrs, ours, THREADS),
        "tensorstore zstd uint8 in order": partial(Tensorstore, ours, THREADS, mapped=False),
    }


@contextmanager
def working(rivals: Rivals) -> Iterator[dict[str, Worker]]:
    with ExitStack() as stack, ThreadPoolExecutor(THREADS) as pool:  # they start slowly
        workers = list(pool.map(Worker, rivals.values()))
        yield dict(zip(rivals, map(stack.enter_context, workers), strict=True))


def race(
    workers: Mapping[str, Worker], epochs: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[Timed]]:
    """Epochs of all in turn, each time beginning with another; the first of each is not counted.

    Args:
        before: called before every epoch.
    """
    found: dict[str, list[Timed]] = {name: [] for name in workers}
    names = list(workers)
    for epoch in range(epochs + 1):
        for name in names[epoch % len(names) :] + names[: epoch % len(names)]:
            before()
            timed = workers[name].epoch(epoch)
            found[name] += [timed] if epoch else []
    return found


def check(workers: Mapping[str, Worker]) -> None:
    """Every row once, and the same rows from all. Raises RuntimeError if they are not."""
    digests = {name: worker.digest(0) for name, worker in workers.items() if name not in PARTIAL}
    if len(set(digests.values())) != 1:
        raise RuntimeError(f"not the same rows: {digests}")


def forget(workers: Mapping[str, Worker], place: Path) -> None:
    """Nothing of any file stays in the page cache. Raises RuntimeError if something does."""
    gc.collect()  # maps of our own
    for worker in workers.values():
        worker.forget()
    if left := drop_cache(path for path in place.rglob("*") if path.is_file() and _size(path)):
        raise RuntimeError(f"{left:.1%} of the files stay in the page cache")


def _size(path: Path) -> int:
    return path.stat().st_size


def rates(found: Mapping[str, list[Timed]]) -> dict[str, Any]:
    """By reader, GB/s of rows in every epoch."""
    return {name: [timed.rate for timed in times] for name, times in found.items()}
