"""A report's text, table and chart say one thing of what was written, and of what is on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import Place, tiny

from strata.pipeline.progress import size

TEXT = tiny(flip="false", layers=3, downsample="[]", epochs=1)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "tiny.toml").write_text(TEXT)
    assert Place(tmp_path).do("run").rc == 0
    return Place(tmp_path)


def reported(place: Place) -> tuple[dict[str, Any], str, list[int]]:
    """The report, its page, and bytes written of x_1 and x_2; all that is written agrees."""
    assert place.do("report").rc == 0
    report = json.loads((place.run / "report.json").read_text())
    page = " ".join((place.run / "report.html").read_text().split())
    written = [sum(v["written"] or 0 for v in one["levels"]) for one in report["layers"]]
    bars = {one["step"]: one["bytes"] for one in report["steps"] if one["bytes"]}
    assert bars == {f"write x_{j}": n for j, n in enumerate(written, 1) if n}
    assert f"<dt>Features written</dt><dd>{size(sum(written))}</dd>" in page
    for level in (level for one in report["layers"] for level in one["levels"]):
        wrote = "—" if level["written"] is None else size(level["written"])
        assert f"<td>{size(level['bytes'])}</td><td>{wrote}</td>" in page
    return report, page, written[:2]


def on_disk(report: dict[str, Any]) -> list[int]:
    return [sum(level["bytes"] for level in one["levels"]) for one in report["layers"]][:2]


def test_what_a_run_wrote_is_what_is_on_disk(place: Place) -> None:
    report, page, written = reported(place)
    assert written == on_disk(report)
    assert min(written) > 0
    assert f"<dt>Features on disk now</dt><dd>{size(sum(written))}</dd>" in page


def test_what_was_removed_since_was_written(place: Place) -> None:
    written = reported(place)[2]
    assert place.do("clean", "--layer", 2, "--features").rc == 0
    report, page, still = reported(place)
    assert still == written
    assert on_disk(report) == [written[0], 0]
    assert f"<dt>Features on disk now</dt><dd>{size(written[0])}</dd>" in page


def test_what_was_found_in_the_store_was_not_written(place: Place) -> None:
    other = Place(place.root, "other")
    assert other.do("run").rc == 0
    report, page, written = reported(other)
    assert written == [0, 0]
    assert on_disk(report) == on_disk(reported(place)[0])
    assert "<dt>Features written</dt><dd>0 B</dd>" in page
