"""The README's figures of reading are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text("utf-8"))


FEED = result("feed")
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
    peak = max(FEED["parts"]["memory"]["peak_bytes"].values())
    return [
        "| a training step fed from cached features, against the same step on a tensor in memory "
        f"| {FEED['ratio_fed_to_memory']:.2f} |",
        f"| memory of an epoch, whatever the level's size | at most {peak / 1e6:.0f} MB |",
    ]


ROWS = [
    *map(raw_row, ("2KB", "32KB", "128KB", "1.6MB")),
    *map(packed_row, ("zstd", "lz4")),
    *single_rows(),
]


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_row_of_the_readme_is_what_the_result_files_say(number: int) -> None:
    assert ROWS[number] in README


def test_what_the_readme_says_is_missed_is_what_the_results_say() -> None:
    """The targets are in the benchmarks; none is missed in silence."""
    page = (ROOT / "docs/performance.md").read_text("utf-8")
    for target, holds in FEED["holds"].items():
        assert f"| feed | `{target}` | {'held' if holds else 'missed'} |" in page
