"""Reading features: is it ever what a training step waits for while the hardware could go faster?

Claim, on two cores: raw rows in random order from the page cache at 1.4 times the rate of ffcv on
the same bytes, 1.05 times with its decoder made parallel, and 0.9 of np.take by as many threads;
packed levels, shuffled, at 3, 1.3 and 1.1 times the rate at which zarr-python, zarrs and
tensorstore read them in order; a training step at 0.9 of the rate that a tensor in memory allows;
no more than 512 MB of memory, whatever the level's size. `holds` says which of it is true.

Method: features of real images (feed_levels.py), written by the real writer; each reader at the
best setting found for it (feed_rivals.py) and in a process of its own (feed_worker.py), of which
one works at a time. Epochs are interleaved, the first of each is not counted; a ratio is the median
over the rounds of the two rates of a round. Whoever delivers in order has less to do than whoever
shuffles. What the machine can do at most is measured, too (feed_limits.py). A part, or some sizes
of rows, can be run again alone; what else the result file has stays.

    python benchmarks/feed.py [raw] [packed] [cold] [training] [memory] [limits]
                              [--rows 2KB 32KB 128KB 1.6MB] [--data cifar10.tar.xz]
                              [--quick] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import feed_cases as cases
import numpy as np
from feed_levels import MAPS, PRECISIONS, Features, compression, features, load_images, make_level
from feed_limits import arithmetic_limits, disk_limits, memory_limits
from feed_training import fed_against_memory
from measuring import RESULTS, Peak, keep, ratio

import checkout  # noqa: F401
from strata.pipeline.feed.level_feed import feed
from strata.store.feature_store import open_level

PACKED = {"uint8": tuple(MAPS), "float16": ("32KB", "128KB")}
"""Rows of packed levels; those of float16 tell nothing new at other sizes."""
AT_LEAST = {
    "ratio_raw_to_ffcv": 1.4,
    "ratio_raw_to_ffcv_parallel": 1.05,
    "ratio_raw_to_take": 0.9,
    "ratio_2KB_to_ffcv": 1.0,
    "ratio_raw_to_dataloader": 100,
    "ratio_packed_to_zarr_python": 3,
    "ratio_packed_to_zarrs": 1.3,
    "ratio_packed_to_tensorstore": 1.1,
    "ratio_cold_to_ffcv_16_bit": 3,
    "ratio_fed_to_memory": 0.9,
}
MOST_MEMORY = 512e6
OPTIONAL = {"raw": ("ffcv", "zarrs", "tensorstore"), "packed": ("zarrs", "tensorstore")}
OPTIONAL["cold"] = OPTIONAL["raw"]
"""Libraries that are no part of Strata, by the part of the result that compares with them."""


Part = Iterator[tuple[str, Any]]
"""Cases by name."""


class Measuring:
    """Images, sizes and counts of one run; every method is a part of the result, case by case."""

    def __init__(self, data: Path | None, rows: Sequence[str], *, quick: bool) -> None:
        self.rows, self.quick, self.epochs = rows, quick, 1 if quick else 5
        self.bytes = 100_000_000 if quick else 500_000_000
        self._images = cache(lambda: load_images(data, 2_000 if quick else 20_000))

    def features(self, row: str, precision: str, **how: bool) -> Features:
        return features(self._images(), row, precision, **how)

    def raw(self) -> Part:
        """An epoch of 500 MB would be over before anything has settled."""
        nbytes = 2 * self.bytes
        for row in self.rows:
            for precision in PRECISIONS:
                with directory() as place:
                    source = self.features(row, precision)
                    level = make_level(place / "store", source, "raw", nbytes)
                    rivals = cases.raw(place, level, cases.batch_of(row))
                    yield f"{row} {precision}", {"bytes": nbytes, **self._race(rivals)}

    def packed(self) -> Part:
        for precision, rows in PACKED.items():
            for row in (row for row in rows if row in self.rows):
                source = self.features(row, precision)
                for profile in ("zstd", "lz4"):
                    with directory() as place:
                        level = make_level(place / "store", source, profile, self.bytes)
                        case = self._race(cases.packed(level, cases.batch_of(row)))
                        case["compression"] = round(compression(level), 3)
                        yield f"{row} {precision} {profile}", case

    def cold(self) -> Part:
        """Samples per second count here, since rows have different sizes."""
        for row in self.rows:
            with directory() as place:
                codes = self.features(row, "uint8")
                halves = self.features(row, "float16", as_many_values=True)
                rivals = cases.cold(place, codes, halves, cases.batch_of(row), self.bytes // 2)
                del codes, halves
                yield row, self._cold_race(rivals, place)

    def training(self) -> Part:
        with directory() as place:
            images, rounds, steps = (2_048, 2, 8) if self.quick else (16_384, 9, 48)
            yield from fed_against_memory(place, images, rounds, steps).items()

    def memory(self) -> Part:
        """Peaks of an epoch in a process that has done nothing before. What a tier holds is not in
        it: a raw level lies in the page cache, which the kernel takes back when it wants to."""
        found: dict[str, Any] = {}
        source = self.features("32KB", "float16")
        for nbytes in (self.bytes, 4 * self.bytes):
            for profile, tier in (("raw", "memory"), ("raw", "disk"), ("zstd", "disk")):
                with directory() as place:
                    level = make_level(place, source, profile, nbytes)
                    with multiprocessing.get_context("spawn").Pool(1) as fresh:
                        peak = fresh.apply(peak_of, (level.directory, tier))
                    found[f"{profile}, {tier} tier, {len(level):,} rows"] = peak
        yield "peak_bytes", found

    def limits(self) -> Part:
        """GB/s."""
        rows = self.features("32KB", "uint8").rows
        found = memory_limits() | disk_limits(Path.cwd(), self.bytes, 32_768)
        found |= arithmetic_limits(rows[: len(rows) // 4])
        yield from ((name, round(rate, 3)) for name, rate in found.items())

    def _race(self, rivals: cases.Rivals) -> dict[str, Any]:
        with cases.working(rivals) as workers:
            if self.quick:
                cases.check(workers)
            return summary(cases.rates(cases.race(workers, self.epochs)))

    def _cold_race(self, rivals: cases.Rivals, place: Path) -> dict[str, Any]:
        with cases.working(rivals) as workers:
            found = cases.race(workers, self.epochs, lambda: cases.forget(workers, place))
        samples = {k: [t.rows / t.seconds for t in times] for k, times in found.items()}
        best = [max(pair) for pair in zip(*(samples[k] for k in FFCV_16_BIT), strict=True)]
        return {
            "samples_per_s": {k: round(statistics.median(v)) for k, v in samples.items()},
            "gb_per_s": {k: median([t.rate for t in times]) for k, times in found.items()},
            "ratio_to_the_faster_ffcv_16_bit": {k: ratio(v, best) for k, v in samples.items()},
        }


FFCV_16_BIT = ("ffcv 16-bit", "ffcv 16-bit, os_cache off")
OURS_PACKED = ("native zstd uint8", "native lz4 uint8")


@contextmanager
def directory() -> Iterator[Path]:
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="feed-", dir=Path.cwd()) as place:
        yield Path(place)


def median(rates: list[float]) -> float:
    return round(statistics.median(rates), 4)


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    ours = rates["native"]
    return {
        "gb_per_s": {name: median(found) for name, found in rates.items()},
        "ratio_native_to": {k: ratio(ours, v) for k, v in rates.items() if k != "native"},
    }


def peak_of(directory: Path, tier: str) -> int:
    level = open_level(directory)
    labels = np.arange(len(level))
    with Peak() as peak, feed(level, batch=128, labels=labels, tier=tier) as batches:
        for _ in batches:
            pass
    return peak.nbytes


# ---- the claim ----------------------------------------------------------------------------------


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Of each part that was measured, the lowest over the cases that the claim speaks of."""
    raw, packed, cold = (found.get(part, {}) for part in ("raw", "packed", "cold"))
    large = [case for name, case in raw.items() if name.startswith(("32KB", "128KB"))]
    small = [case for name, case in raw.items() if name.startswith("2KB")]

    def lowest(cases: Any, other: str) -> float | None:
        return min((c["ratio_native_to"][other]["median"] for c in cases), default=None)

    training = found.get("training", {}).get("ratio_fed_to_memory", {}).get("median")
    every = [
        max(case["ratio_to_the_faster_ffcv_16_bit"][name]["median"] for name in OURS_PACKED)
        for case in cold.values()
    ]
    named = {
        "ratio_raw_to_ffcv": lowest(large, "ffcv"),
        "ratio_raw_to_ffcv_parallel": lowest(large, "ffcv parallel"),
        "ratio_raw_to_take": lowest(large, "np.take"),
        "ratio_raw_to_take_with_buffers_in_turn": lowest(large, "np.take, buffers in turn"),
        "ratio_2KB_to_ffcv": lowest(small, "ffcv"),
        "ratio_raw_to_dataloader": lowest(raw.values(), cases.PARTIAL[0]),
        "ratio_packed_to_zarr_python": lowest(packed.values(), "zarr-python in order"),
        "ratio_packed_to_zarrs": lowest(packed.values(), "zarrs in order"),
        "ratio_packed_to_tensorstore": lowest(packed.values(), "tensorstore in order"),
        "ratio_packed_to_decoding_alone": lowest(packed.values(), "decoding alone"),
        "ratio_cold_to_ffcv_16_bit": min(every, default=None),
        "ratio_fed_to_memory": training,
    }
    return {name: value for name, value in named.items() if value is not None}


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    reached = ratios(found)
    holds = {name: reached[name] >= least for name, least in AT_LEAST.items() if name in reached}
    if "memory" in found:
        holds["memory"] = max(found["memory"]["peak_bytes"].values()) <= MOST_MEMORY
    return {**reached, "holds": holds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parts = ("limits", "raw", "packed", "cold", "training", "memory")
    parser.add_argument("parts", nargs="*", help=f"default: all of {', '.join(parts)}")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as class folders; default: noise")
    parser.add_argument("--quick", action="store_true", help="small, once: does it run?")
    parser.add_argument("--json", action="store_true", help="the result on stdout")
    parser.add_argument("--out", type=Path, help="default: the committed result, if not --quick")
    parser.add_argument("--rows", nargs="*", choices=list(MAPS), help="default: all sizes")
    options = parser.parse_args()
    wanted = options.parts or parts
    if unknown := set(wanted) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    for part, names in OPTIONAL.items():
        if part in wanted and (missing := [name for name in names if find_spec(name) is None]):
            print(f"{part} is left out: {', '.join(missing)} not installed", file=sys.stderr)
            wanted = [other for other in wanted if other != part]
    measuring = Measuring(options.data, options.rows or list(MAPS), quick=options.quick)
    out = options.out or (None if options.quick else RESULTS / "feed.json")
    found = json.loads(out.read_text("utf-8"))["parts"] if out and out.exists() else {}
    facts = {"images": options.data.name if options.data else "noise", "epochs": measuring.epochs}
    for part in wanted:
        for name, case in getattr(measuring, part)():
            found.setdefault(part, {})[name] = case
            print(f"{time.strftime('%H:%M:%S')} {part}, {name}", file=sys.stderr, flush=True)
            if out:  # whoever stops it keeps what there is
                keep({**verdict(found), **facts, "parts": found}, out, show=False)
    if options.json or not out:
        keep({**verdict(found), **facts, "parts": found}, None, show=True)


if __name__ == "__main__":
    main()
