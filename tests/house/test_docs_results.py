"""Figures of the pages in docs/, without those of the planner and of memory: as measured."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from root import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/gpu")]

import audit  # noqa: E402
import beyond  # noqa: E402
import compression  # noqa: E402
import dask_materialize  # noqa: E402
import depth_figure  # noqa: E402
import paper_small  # noqa: E402
import scale  # noqa: E402
import separability  # noqa: E402
import several_machines  # noqa: E402
import train_gpu  # noqa: E402
from augmentation import interval, summary, table  # noqa: E402


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))


RESULT = result("augmentation")
CASES = ("packed", "recomputed", "disk", "raw")
"""As docs/sweep.md has them; nothing is claimed of the last one."""


def test_the_table_is_that_of_the_runs() -> None:
    page = (ROOT / "docs/augmentation.md").read_text("utf-8")
    rows = table(summary(RESULT["runs"]))
    assert len(rows) == 20
    assert [row for row in rows if row not in page] == []


def test_what_is_claimed_held() -> None:
    assert RESULT["holds"] == {"accuracy": True, "bytes": True}
    assert RESULT["ways"] == summary(RESULT["runs"])
    assert all(one["layers"][0]["n"] == 5 for one in RESULT["ways"])


def test_an_interval_is_that_of_student() -> None:
    """t for 4 degrees of freedom is 2.776; the deviation of 1 … 5 is √2.5."""
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0
    assert found["plus_minus"] == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, abs=0.01)


def test_what_eight_problems_on_one_read_save() -> None:
    page = (ROOT / "docs/sweep.md").read_text("utf-8")
    section = page.split("## What it saves")[1].split("##")[0].splitlines()
    cases = result("sweep")["cases"]
    shown = [line.split(" | ")[1].rstrip(" |") for line in section if line.startswith("| ")]
    found = [cases[name]["ratio_together_to_apart"] for name in CASES]
    assert shown[1:] == [
        f"{r['median']:.2f} ({r['quartiles'][0]:.2f} … {r['quartiles'][1]:.2f})" for r in found
    ]
    assert all(cases[name]["same_bits"] for name in CASES)
    assert all(cases[name]["holds"] for name in CASES[:3])


def test_an_audit_finds_what_it_says() -> None:
    found, page = result("audit"), (ROOT / "docs/durability.md").read_text("utf-8").splitlines()
    mutants, seconds = found["mutants"], found["seconds"]
    assert mutants["mutants"] >= 1000
    assert set(mutants["by_kind"]) == {*audit.MUTANTS, "a label changed"}
    assert all(one["holds"] for one in mutants["by_share"])
    assert all(mutants["by_kind"][kind]["holds"] for kind in audit.MUTANTS)
    assert mutants["by_kind"]["a label changed"]["caught"] == 1.0
    assert [row for row in audit.table(mutants) if row not in page] == []
    said = [one["seconds"] for one in seconds.values() if isinstance(one, dict)]
    assert f"{min(said):.0f} to {max(said):.0f} seconds" in "\n".join(page)


def test_how_separable_depths_are() -> None:
    found = result("separability")
    rows = (ROOT / "docs/probes.md").read_text("utf-8").splitlines()
    assert [row for row in separability.table(found["curves"]) if row not in rows] == []
    assert found["holds"] == {
        "linear rises for k = 1": False,
        "last layers of k = 2 and 3 above k = 1 for CNN-2": True,
    }
    assert (ROOT / "docs/separability.svg").read_text("utf-8").startswith("<svg")


def test_what_workers_cost_and_give() -> None:
    found = result("dask_materialize")
    rows = (ROOT / "docs/cluster.md").read_text("utf-8").splitlines()
    assert [row for row in dask_materialize.table(found) if row not in rows] == []
    assert found["holds"] == {"one_to_alone": True, "two_to_one": False}


def test_what_a_million_shards_take() -> None:
    found = result("scale")
    rows = (ROOT / "docs/scale.md").read_text("utf-8").splitlines()
    assert [row for row in scale.table(found) if row not in rows] == []
    assert found["holds"] == scale.holds(found)
    assert found["shards"] == 10**6
    assert all(found["holds"].values())


def test_what_small_networks_show_of_the_paper() -> None:
    found = result("paper_small")
    page = (ROOT / "docs/paper.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| k = ")]
    shown = paper_small.summary(found["runs"])
    assert rows == [*paper_small.table(shown), *paper_small.told(shown)]
    readme = (ROOT / "README.md").read_text("utf-8")
    last = [shown["networks"][f"k = {k}"]["layers"][-1] for k in paper_small.KS]
    said = "end at {:.1f}, {:.1f} and {:.1f} %, in the paper's order".format(
        *(one["mean"] for one in last)
    )
    assert said in " ".join(readme.split())
    for k, one in zip(paper_small.KS, last, strict=True):
        cells = f"{one['n']} | {one['mean']:.1f} ± {one['plus_minus']:.1f} | | |"
        assert f"| `cifar10-k{k}-small` | 2 CPU cores, 6 a layer | {cells}" in readme
    assert "over n = 5 seeds" in readme
    assert {one["n"] for one in last} == {5}
    assert found["machine"]["cores"] == 2
    assert found["holds"] == {
        "order": True,
        "ensemble of logits": False,
        "ensemble of probabilities": False,
        "linear separability rises": True,
    }


def test_the_figure_of_the_readme_is_drawn_from_its_runs() -> None:
    drawn = (ROOT / "docs/depth.svg").read_text("utf-8")
    assert depth_figure.label(result("paper_small")["networks"]) in drawn
    assert drawn.startswith("<svg")


def test_machines_that_vanish_cost_no_byte() -> None:
    found = result("several_machines")
    rows = (ROOT / "docs/cluster.md").read_text("utf-8").splitlines()
    assert [row for row in several_machines.table(found) if row not in rows] == []
    assert set(found["cases"]) == set(several_machines.SAID)
    assert all(one["same"] and one["codes"][-1] == 0 for one in found["cases"].values())


def test_what_full_width_on_a_gpu_showed() -> None:
    found = result("train_gpu")
    page = (ROOT / "docs/paper.md").read_text("utf-8").split("## At full width")[1]
    rows = [line for line in page.splitlines() if line.startswith("| k")]
    assert rows == train_gpu.table(found["runs"])
    gaps = train_gpu.gaps(found["runs"], 8, 0)
    assert set(gaps) == {"k1", "k2", "k3"}
    assert all(abs(last) <= 1 for last, _ in gaps.values()), "as the page claims"
    assert found["machine"]["gpu"] == "NVIDIA H200"
    readme = (ROOT / "README.md").read_text("utf-8")
    for k in ("k1", "k2", "k3"):
        ways = ("canvas", "fresh", "end-to-end")
        runs = {way: found["runs"][f"{k}-{way}, 8 epochs, seed 0"] for way in ways}
        *greedy, whole = runs.values()
        shown = [train_gpu.percent(run["layers"][-1]) for run in greedy]
        shown.append(train_gpu.percent(whole["test"]))
        assert f"| `cifar10-{k}` | one H200, 8 a layer | 1 | {' | '.join(shown)} |" in readme


def test_what_a_gpu_takes_and_is_fed() -> None:
    memory, feed = result("memory-gpu"), result("feed-gpu")
    page = (ROOT / "docs/memory.md").read_text("utf-8").split("## The same on a GPU")[1]
    found = [*[*memory["cases"].values()][:4], *memory["greedy"].values()]
    shown = [line.strip("| *") for line in page.split("## ")[0].splitlines() if "| " in line]
    told = [line.split(" | ")[1].strip("*") for line in shown if " | " in line and "MB" not in line]
    assert told == [f"{case['tensor_bytes'] / 1e6:,.0f}" for case in found]
    page = (ROOT / "docs/performance.md").read_text("utf-8").split("## Feeding a GPU")[1]
    names = ("ratio_memory_to_copies", "ratio_device_to_copies")
    of_steps = [
        feed[f"training from {tier}"]["ratio_fed_to_memory"] for tier in ("memory", "device")
    ]
    for ratio in (*(feed[name] for name in names), *of_steps):
        low, high = ratio["quartiles"]
        text = f"{ratio['median']:.2f} (quartiles {low:.2f} to {high:.2f}, n = {ratio['n']})"
        assert text in page


def test_what_compression_costs_and_saves() -> None:
    """The rows are those of the runs; where none were made, the page has none."""
    page = (ROOT / "docs/compression.md").read_text("utf-8")
    section = page.split("| way |")[1].split("\n\n")[0]
    shown = [line for line in section.splitlines()[2:] if line.startswith("| ")]
    if not (ROOT / "benchmarks/results/compression.json").exists():
        assert shown == []
        return
    found = result("compression")
    assert shown == compression.table(compression.summary(found["runs"]))
    assert found["holds"] == compression.summary(found["runs"])["holds"]
    assert found["holds"] == {"accuracy": True, "bytes": True}


def test_compression_is_compared_seed_by_seed() -> None:
    """Made-up runs: 10 points between seeds, half a point between the ways; one level too large."""
    runs = {}
    for seed in range(3):
        for way, points, nbytes in (
            ("compressed", 0.0, 50),
            ("whole", 0.5, 100),
            ("longer", 2, 100),
        ):
            top1 = 60.0 + 10 * seed + points
            facts = {"layers": [50.0, top1], "ensemble": top1, "parameters": 9, "seconds": 1.0}
            runs[f"{way} {seed}"] = {**facts, "bytes": [nbytes], "as_planned": True}
    runs["whole 3"] = runs["whole 2"]
    found = compression.summary(runs)
    assert found["points"]["against whole"] == interval([-0.5] * 3)
    assert found["points"]["against longer"]["mean"] == -2.0
    assert found["bytes_ratio"] == [0.5]
    assert found["holds"] == {"accuracy": True, "bytes": True}
    assert len(compression.table(found)) == 3
    runs["longer 1"] = runs["longer 1"] | {"as_planned": False}
    for seed in range(3):
        runs[f"whole {seed}"]["layers"] = [50.0, 62.0 + 10 * seed]
    assert compression.summary(runs)["holds"] == {"accuracy": False, "bytes": False}
    assert compression.summary({"whole 0": runs["whole 0"]}) == {}


def test_a_given_network_costs_what_was_measured() -> None:
    page, found = (ROOT / "docs/pretrained.md").read_text("utf-8"), result("given")["lite0"]
    cached, again = found["heads"]["always"], found["heads"]["never"]
    probes = [f"{100 * one['test_top1']:.1f} %" for one in found["probes"].values()]
    nbytes = list(found["probes"].values())[-1]["bytes"]
    for row in (
        f"| an epoch of a head on x_18 | {cached['epoch_seconds']:.2f} s "
        f"| {again['epoch_seconds']:.1f} s |",
        "| written once, before the first epoch "
        f"| {found['write_seconds']:.0f} s, {nbytes / 1e6:.0f} MB | |",
        "| test accuracy of the head, 10 epochs "
        f"| {100 * cached['test_top1']:.1f} % | {100 * again['test_top1']:.1f} % |",
        f"| epochs from which the cache pays | {found['epochs']['measured']:.2f} "
        f"(`plan` said {found['epochs']['planned']:.2f}) | |",
        f"| linear probes of x_6, x_12, x_18 | {', '.join(probes)} | |",
    ):
        assert row in page
    assert found["same_weights"]
    halves, prose = result("given")["halves"], " ".join(page.split())
    assert halves["points"] == 0.0
    heads, five = halves["heads"], halves["five_heads"]
    assert (
        f"pays from {heads['measured']:.2f} heads on; `plan` said {heads['planned']:.2f}" in prose
    )
    assert f"take {five['cache']:.0f} s with a cache, its writing included, and" in prose
    assert f"and {five['again']:.0f} s without" in prose


def test_what_is_seen_beyond_the_paper() -> None:
    """The table, and the claim: kept or missed."""
    page, found = (ROOT / "docs/beyond.md").read_text("utf-8"), result("beyond")
    assert found["ways"] == beyond.summary(found["runs"])
    shown = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row for row in beyond.table(found["ways"]) if row not in shown] == []
    for what, holds in found["holds"].items():
        assert f"{what}: {'kept' if holds else 'missed'}" in " ".join(page.split())


def test_what_five_lines_of_python_save() -> None:
    page, found = (ROOT / "docs/api.md").read_text("utf-8"), result("cache_api")
    assert all(found["holds"].values())
    seconds, prose = found["total"], " ".join(page.split())
    assert f"take {seconds['feed']:.1f} s" in prose
    assert f"{seconds['forward']:.0f} s with a forward pass in each epoch" in prose
    assert f"{seconds['numpy']:.1f} s with np.save and np.load" in prose
    assert f"second call takes {found['second_call']:.2f} s" in prose
