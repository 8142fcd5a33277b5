"""The benchmark of memory counts tensors without content: they are as large as real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from root import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import memory_cases as m

from strata.pipeline.recipe.network import AuxiliaryTable, NetworkTable

CPU = torch.device("cpu")
PAGE = (ROOT / "docs/memory.md").read_text("utf-8")


def small(*, batch_norm: bool, k: int) -> m.Net:
    layers = NetworkTable(3, 8, downsample=(1,), batch_norm=batch_norm).specs((3, m.SIDE, m.SIDE))
    auxiliary = AuxiliaryTable(k=k, width=8, batch_norm=batch_norm)
    return m.Net(layers, auxiliary.specs(layers, classes=10, side=m.SIDE // 2), canvas=40)


CASES = [
    *(m.Case(None, how, 8, micro) for how in (False, True) for micro in (8, 2, 1)),
    *(m.Case(j, False, 8, micro) for j in (1, 2, 3) for micro in (8, 1)),
]


@pytest.mark.global_rng
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("batch_norm", "k"), [(False, 1), (True, 2)])
def test_tensors_without_content_count_the_same(case: m.Case, batch_norm: bool, k: int) -> None:
    net = small(batch_norm=batch_norm, k=k)
    real, fake = (m.peak(net, case, device=CPU, fake=fake) for fake in (False, True))
    assert real == fake


@pytest.mark.global_rng
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_micro_batches_have_the_peak_of_all(case: m.Case) -> None:
    """But for the labels of the other rows, int64."""
    net = small(batch_norm=False, k=2)
    two, all_of_them = (
        m.peak(net, case, device=CPU, fake=True, micro_batches=count) for count in (2, 8)
    )
    assert two <= all_of_them <= two + 8 * case.batch


def test_the_largest_that_fits_is_found_by_halving() -> None:
    for limit in range(40):
        asked: list[int] = []

        def fits(size: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(size)
            return size <= limit

        assert m.largest(fits, 30) == min(limit, 30)
        assert len(asked) < 12


@pytest.mark.global_rng
def test_equal_layers_are_asked_for_once() -> None:
    net, asked = m.Family((3, 3), k=1).net(1), []

    def measure(net: m.Net, case: m.Case) -> int:
        asked.append(case.layer)
        return net.layers[(case.layer or 1) - 1].parameters

    highest, layer = m.greedy_peak(net, m.Case(None, False, 4, 1), measure)
    assert asked == [1, 2, 4, 5]
    assert (highest, layer) == (net.layers[3].parameters, 4)


def test_a_family_grows_in_width_or_in_depth() -> None:
    wider, deeper = m.Family((2, 1, 2), k=1), m.Family((1, 1), k=1, width=16)
    assert [spec.width for spec in wider.net(32).layers] == [256, 256, 512, 1024, 1024]
    assert [spec.downsamplings for spec in wider.net(1).layers] == [0, 0, 1, 1, 0]
    assert [spec.width for spec in deeper.net(3).layers] == [16] * 3 + [32] * 3
    net = deeper.net(2)
    assert net.parameters == sum(s.parameters for s in net.layers) + net.auxiliaries[-1].parameters


@pytest.mark.slow
def test_the_twin_for_a_gpu_runs_without_one(tmp_path: Path) -> None:
    script = ROOT / "benchmarks/gpu/memory_gpu.py"
    line = [sys.executable, str(script), "--device", "cpu", "--quick", "--parts", "largest"]
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(run.stdout)["largest"].values()
    for way in ("end to end", "greedy"):
        assert found["sizes"][way] >= 1
        assert 0 < found[way]["tensor_bytes"] <= 20e6


# ---- what the page says --------------------------------------------------------------------------

RESULT = json.loads((ROOT / "benchmarks/results/memory.json").read_text("utf-8"))


def mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f}"


def case_row(title: str, name: str) -> str:
    case = RESULT["cases"][name]
    sizes = f"{mb(case['tensor_bytes'])} | {mb(case['process_bytes'])}"
    return f"| {title} | {sizes} | {case['images_per_s']:.1f} |"


def greedy_row(micro: str) -> str:
    greedy = RESULT["greedy"][micro]
    names = [
        n for n in RESULT["cases"] if n.startswith("greedy") and n.endswith(f" {micro} of 128")
    ]
    process = max(RESULT["cases"][name]["process_bytes"] for name in names)
    return (
        f"| **greedy, {micro} at a time** | **{mb(greedy['tensor_bytes'])}** | {mb(process)} | "
        f"{greedy['images_per_s']:.1f} |"
    )


def recipe_row(title: str) -> str:
    found = RESULT["recipes"][title]
    batch = title.split()[-1]
    ways = [f"end to end, {batch} of {batch}", f"end to end, checkpointing, 16 of {batch}"]
    greedy = [found[f"greedy, {micro} of {batch}"]["tensor_bytes"] for micro in (batch, 16)]
    cells = [mb(found[way]) for way in ways] + [mb(nbytes) for nbytes in greedy]
    return f"| `{title.split(',')[0]}`, batch {batch} | {' | '.join(cells)} |"


def family_row(name: str) -> str:
    found = RESULT["largest"][name]
    cells = []
    for way in ("end to end", "greedy"):
        net = found[way]
        form = f"{net['layers']} layers from {net['first_width']}"
        cells.append(f"{mb(net['parameters'])} ({form}; {mb(net['tensor_bytes'])} MB)")
    return f"| {name} | {' | '.join(cells)} | {found['ratio_parameters']:.2f} |"


ENDS = {
    "end to end, plain": "end to end, 128 of 128",
    "end to end, checkpointing": "end to end, checkpointing, 128 of 128",
    "end to end, 16 at a time": "end to end, 16 of 128",
    "end to end, checkpointing, 16 at a time": "end to end, checkpointing, 16 of 128",
}
ROWS = [
    *(case_row(title, name) for title, name in ENDS.items()),
    *map(greedy_row, ("128", "16")),
    *map(recipe_row, RESULT["recipes"]),
    *map(family_row, RESULT["largest"]),
]


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_row_of_the_page_is_what_the_results_say(number: int) -> None:
    assert ROWS[number] in PAGE


@pytest.mark.parametrize("target", RESULT["holds"])
def test_no_target_is_missed_in_silence(target: str) -> None:
    said = "held" if RESULT["holds"][target] else "missed"
    assert f"| `{target}` | {said} |" in PAGE


def test_what_is_counted_is_what_a_run_takes() -> None:
    """`recipes` counts without content what `cases` measured, fed by a run's own feed."""
    counted, measured = RESULT["recipes"]["cifar10-k1, batch 128"], RESULT["cases"]
    for name, nbytes in counted.items():
        if name.startswith("greedy"):
            where = f"greedy, layer {nbytes['layer']}, {name.removeprefix('greedy, ')}"
            real = measured[where]["tensor_bytes"]
            assert nbytes["tensor_bytes"] == pytest.approx(real, rel=0.001)
        else:
            assert nbytes == pytest.approx(measured[name]["tensor_bytes"], rel=0.004)


def test_real_tensors_were_as_large_as_those_without_content() -> None:
    for found in RESULT["largest"].values():
        for way in ("end to end", "greedy"):
            assert found[way]["tensor_bytes"] == found[way]["tensor_bytes_in_truth"]
