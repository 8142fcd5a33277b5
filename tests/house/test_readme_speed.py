"""Figures of reading and writing (docs/performance.md, README) are those of committed results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from root import ROOT

README = " ".join((ROOT / "README.md").read_text("utf-8").split())
PAGE = (ROOT / "docs/performance.md").read_text("utf-8")


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text("utf-8"))


FEED, WRITING, PRECISION = result("feed"), result("materialize"), result("precision")
RAW = ("native", "np.take", "ffcv", "ffcv parallel", "DataLoader over zarr-python")
PACKED = ("native", "native, memory tier", "decoding alone")
IN_ORDER = ("tensorstore in order", "zarrs in order", "zarr-python in order")


def raw_row(row: str) -> str:
    rates = FEED["parts"]["raw"][f"{row} uint8"]["gb_per_s"]
    return f"| {row[:-2]} {row[-2:]} | {cells(rates, RAW)} |"


def packed_row(profile: str) -> str:
    rates = FEED["parts"]["packed"][f"32KB uint8 {profile}"]["gb_per_s"]
    return f"| {profile} | {cells(rates, PACKED + IN_ORDER)} |"


def cells(rates: dict[str, float], names: tuple[str, ...]) -> str:
    return " | ".join(gb(rates[name]) for name in names)


def gb(rate: float) -> str:
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}" if rate >= 0.1 else f"{rate:.3f}"


def single_rows() -> list[str]:
    compute = WRITING["cifar10-k1 layer 2"]["ratio_materialize_to_forward"]["median"]
    through = WRITING["trivial"]["ratio_through_to_bare_write"]["median"]
    peaks = [max(FEED["parts"]["memory"]["peak_bytes"].values())]
    peaks.append(max(WRITING["memory"]["peak_bytes_by_images"].values()))
    shares, points = PRECISION["ratio_bytes_to_float32"], PRECISION["points_uint8_minus_float16"]
    return [
        "| a training step fed from cached features, against the same step on a tensor in memory "
        f"| {FEED['ratio_fed_to_memory']:.2f} |",
        "| samples/s from a cold disk, uint8 packed with the better of zstd and lz4, "
        "against ffcv's 16-bit .beton "
        f"| {FEED['ratio_cold_to_ffcv_16_bit']:.1f} or more |",
        "| writing x_2 of `cifar10-k1`, against the bare forward pass of layer 2 "
        f"| {compute:.2f} |",
        f"| writing where nothing is computed, against a bare write with fsync | {through:.2f} |",
        "| memory of an epoch, and of a level being written, whatever its size | at most "
        f"{peaks[0] / 1e6:.0f} MB, {peaks[1] / 1e6:.0f} MB |",
        "| bytes of trained `cifar10-small` features with zstd, against float32 | uint8 "
        f"1/{1 / shares['uint8']:.1f}, uint4 1/{1 / shares['uint4']:.1f} |",
        "| test accuracy of `cifar10-small`, uint8 minus float16, same seeds, "
        f"n = {len(points['of_each_seed'])} | {points['mean']:+.2f} points |",
    ]


ROWS = [
    *map(raw_row, ("2KB", "32KB", "128KB", "1.6MB")),
    *map(packed_row, ("zstd", "lz4")),
    *single_rows(),
]


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_row_of_the_page_is_what_the_result_files_say(number: int) -> None:
    assert ROWS[number] in PAGE.split("## What the machine can do")[0]


def test_what_the_readme_says_of_speed_is_what_the_result_files_say() -> None:
    fed, sweep = FEED["ratio_fed_to_memory"], result("sweep")
    packed = sweep["cases"]["packed"]["ratio_together_to_apart"]
    assert f"fed from cached features has {fed:.2f} of its speed on a tensor in memory" in README
    assert f"together take {packed['median']:.2f} of the time of eight alone" in README
    assert f"(n = {packed['n']}, two CPU cores, features packed with zstd" in README
    assert sweep["machine"]["cores"] == 2


def test_what_is_missed_is_said() -> None:
    """The targets are in the benchmarks; none is missed in silence."""
    for name, found in (("feed", FEED), ("materialize", WRITING), ("precision", PRECISION)):
        for target, holds in found["holds"].items():
            line = f"| {name} | `{target}` | {'held' if holds else 'missed'} |"
            assert line in PAGE
