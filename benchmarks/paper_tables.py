"""The paper's tables and figures, with what our runs gave beside them. Nothing is filled in.

    python benchmarks/paper_tables.py [--runs runs] [--gpu FILE] [--json]

A run counts if its recipe is the built-in one, all of it is solved, and its evaluation is of what
is solved today. Beside them stand the results of gpu/train_gpu.py, each way of augmenting and
number of epochs for itself. What the paper reports is in paper.toml.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkout import ROOT
from strata.pipeline.options import Options
from strata.pipeline.recipe import builtin, strict
from strata.pipeline.results import separability
from strata.pipeline.run import overview, rundir
from strata.pipeline.run.probe_results import source_name
from strata.pipeline.run.rundir import EVALUATION, RESULT, Run
from strata.store.errors import readable

METRICS = ("top1", "ensemble_top1", "top5", "ensemble_top5")
PROGRESS = "imagenet-k1", "imagenet-small"
"""Recipes of which Figure 2 shows the accuracy of every layer."""
TRAINED = ROOT / "benchmarks/results/train_gpu.json"
STUDY = "separability-"
"""How the names of recipes begin of which Figure 3 shows how separable every x_j is."""


@dataclass(frozen=True)
class System:
    """A row of the paper's tables; accuracies in percent, None where the paper has none."""

    place: str
    what: str
    recipe: str
    small: str | None = None
    """Recipe of this system at a size for two CPU cores."""
    of: str = "greedy"
    """How the network was trained: ``greedy``, or ``baseline``, end to end."""
    ensemble: str = "probabilities"
    """What is summed, with weights 2^j: these, or ``logits`` (Z of Sec. 3)."""
    top1: float | None = None
    ensemble_top1: float | None = None
    top5: float | None = None
    ensemble_top5: float | None = None


@dataclass(frozen=True)
class Found:
    """Figures of one run, in percent."""

    data: str
    seed: int
    date: str
    values: Mapping[str, float | None]
    layers: Sequence[Mapping[str, float | None]] = ()
    """``values`` of every layer."""


def systems() -> list[System]:
    """What the paper reports, in the order of paper.toml."""
    text = Path(__file__).with_name("paper.toml").read_text("utf-8")
    return [strict.read(System, table) for table in tomllib.loads(text)["systems"]]


def report_paper(
    runs: Path, trained: Path | None = None
) -> tuple[dict[str, Any], list[Table | str]]:
    """The paper's Tables 1, 2, 3 and Figures 2, 3, with what our runs gave.

    Args:
        runs: run directories lie there as RECIPE/SEED.
        trained: result of gpu/train_gpu.py; None: none.

    Returns:
        The figures as JSON, and the tables and lines that show them.
    """
    left_out: list[str] = []
    known = {name: list(_runs(runs, name, left_out)) for name in _names()}
    on_gpu = json.loads(trained.read_text("utf-8")) if trained and trained.exists() else {}
    rows = [row for system in systems() for row in _rows(system, known, on_gpu)]
    progress = [figure for name in PROGRESS for figure in _progress(name, known.get(name, []))]
    probed = [curve for name in _studies() for curve in _separability(name, known[name])]
    value = {"rows": rows, "figure_2": progress, "figure_3": probed, "left_out": left_out}
    shown = [_accuracies(rows), _figure_2(progress), _figure_3(probed)]
    return value, [*shown, *(f"left out: {why}" for why in left_out)]


def _names() -> list[str]:
    named = [name for s in systems() for name in (s.recipe, s.small) if name]
    return sorted({*named, *PROGRESS, *_studies()})


def _studies() -> list[str]:
    return [name for name in builtin.names() if name.startswith(STUDY)]


# ---- our runs -----------------------------------------------------------------------------------


def _runs(root: Path, name: str, left_out: list[str]) -> list[Run]:
    """Runs of a built-in recipe; why another one is left out is added to ``left_out``."""
    wrong = list[str]()

    def read(directory: Path) -> Run | None:
        run = rundir.find(directory)
        if run is not None:
            overview.find(Options(name, run_dir=directory, seed=run.seed))
            run.evaluation()
        return run

    paths = sorted(path.parent for path in (root / name).glob(f"*/{rundir.RUN}"))
    found = [run for run in readable(paths, read, wrong) if run is not None]
    left_out += [why.replace(f"{root}/", "") for why in wrong]
    return found


def _greedy(run: Run, ensemble: str = "probabilities") -> Found | None:
    evaluation = run.evaluation()
    solved = [(run.layer(j) or {}).get("weights") for j in range(1, run.solved() + 1)]
    if evaluation is None or len(solved) < run.layers or evaluation["solved"] != solved:
        return None
    layers = [_in_percent(layer, ensemble) for layer in evaluation["layers"]]
    return _found(run, run.directory / EVALUATION, layers[-1], layers)


def _baseline(run: Run, ensemble: str) -> Found | None:
    if (record := run.baseline("plain")) is None:
        return None
    path = run.baseline_directory("plain") / RESULT
    return _found(run, path, _in_percent(record, ensemble))


def _found(run: Run, record: Path, values: dict[str, float | None], layers: Any = ()) -> Found:
    date = datetime.fromtimestamp(record.stat().st_mtime, UTC).strftime("%Y-%m-%d")
    what = f"{source_name(run.source)}, {(run.data() or {})['train']:,} images"
    return Found(what, run.seed, date, values, layers)


def _in_percent(record: Mapping[str, Any], ensemble: str) -> dict[str, float | None]:
    joint = record.get("ensemble", {}).get(ensemble, {})
    found = {k: record["test"].get(k) for k in ("top1", "top5")}
    found |= {f"ensemble_{k}": joint.get(k) for k in ("top1", "top5")}
    return {k: None if v is None else round(100 * v, 2) for k, v in found.items()}


# ---- beside the paper's -------------------------------------------------------------------------


def _on_gpu(system: System, recipe: str, result: Mapping[str, Any]) -> Iterator[Found]:
    """What gpu/train_gpu.py has of a system: ``k1-canvas, 50 epochs, seed 0`` is one run of
    cifar10-k1, from canvases."""
    for name, run in result.get("runs", {}).items():
        k, way = re.fullmatch(r"k(\d)-([^,]+), .*", name).groups()  # pyright: ignore
        of = "baseline" if way == "end-to-end" else "greedy"
        if (f"cifar10-k{k}", of) != (recipe, system.of):
            continue
        data = f"CIFAR-10 (JPEG), {way}, {run['epochs']} epochs"
        yield Found(
            data, run["seed"], result["created"], _in_percent(_record(run), system.ensemble)
        )


def _record(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run of gpu/train_gpu.py as a record of an evaluation; of ensembles it may lack one."""
    if "layers" not in run:
        return run
    joint = {"probabilities": "ensembles", "logits": "ensembles_of_logits"}
    ensemble = {of: run[name][-1] for of, name in joint.items() if name in run}
    return {"test": run["layers"][-1], "ensemble": ensemble}


def _rows(
    system: System, known: Mapping[str, Sequence[Run]], on_gpu: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row per recipe and set of images; a row without ours where there is no run."""
    paper = {metric: getattr(system, metric) for metric in METRICS}
    figures_of = _baseline if system.of == "baseline" else _greedy
    for name in filter(None, (system.recipe, system.small)):
        found = [one for run in known[name] if (one := figures_of(run, system.ensemble))]
        found += _on_gpu(system, name, on_gpu)
        for data in sorted({one.data for one in found}) or [None]:
            same = [one for one in found if one.data == data]
            yield {
                "place": system.place,
                "what": system.what,
                "recipe": name,
                "of": system.of,
                "paper": paper if name == system.recipe else dict.fromkeys(METRICS),
                "data": data,
                "ours": {m: _over_seeds([one.values[m] for one in same]) for m in METRICS},
                **_runs_of(same),
            }


def _runs_of(found: Sequence[Found]) -> dict[str, Any]:
    """Seeds of some runs, and the date of the last."""
    return {
        "seeds": sorted(one.seed for one in found),
        "date": max((one.date for one in found), default=None),
    }


def _over_seeds(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """Mean and standard deviation, in percent; the latter is None of one seed."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = round(statistics.stdev(known), 2) if len(known) > 1 else None
    return {"mean": round(statistics.mean(known), 2), "deviation": deviation}


def _progress(name: str, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Figure 2: top-5 of every layer, the mean over seeds."""
    found = [one for one in map(_greedy, runs) if one]
    for data in sorted({one.data for one in found}):
        same = [one for one in found if one.data == data]
        depths = zip(*(one.layers for one in same), strict=True)
        top5 = [_over_seeds([layer["top5"] for layer in layers]) for layers in depths]
        means = [depth and depth["mean"] for depth in top5]
        yield {"recipe": name, "data": data, **_runs_of(same), "top5": means}


def _separability(name: str, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Figure 3: test accuracy of probes against depth, the mean over seeds."""
    for curve in separability.curves(runs[0], []) if runs else ():
        if curve["images"] is None:
            yield {"recipe": name, **curve}


# ---- as tables ----------------------------------------------------------------------------------


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> Table:
    heads = ("", "system", "recipe", "top-1, paper", "ours", "top-5, paper", "ours")
    title = "accuracy in percent, the ensemble's in brackets; mean ± deviation"
    table = Table(*heads, "images", "seeds", "date", title=title)
    for row in rows:
        sides = [(row[side], metric) for metric in ("top1", "top5") for side in ("paper", "ours")]
        head = (row["place"], row["what"], row["recipe"], *(_cell(*side) for side in sides))
        table.add_row(*head, row["data"] or "", _seeds(row), row["date"] or "")
    return table


def _cell(values: Mapping[str, Any], metric: str) -> str:
    one, ensemble = _text(values[metric]), _text(values[f"ensemble_{metric}"])
    return f"{one} ({ensemble})" if ensemble else one


def _text(value: Mapping[str, float | None] | float | None) -> str:
    if isinstance(value, Mapping):
        spread = f" ± {value['deviation']:.1f}" if value["deviation"] is not None else ""
        return f"{value['mean']:.1f}{spread}"
    return "" if value is None else f"{value:.1f}"


def _seeds(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row["seeds"]))


def _figure_2(progress: Sequence[Mapping[str, Any]]) -> Table:
    title = "Figure 2: top-5 in percent, layer by layer; the paper's k = 1: 23 … 80"
    table = Table("recipe", "images", "seeds", "date", "layers 1 …", title=title)
    for one in progress:
        layers = ", ".join(map(_text, one["top5"]))
        table.add_row(one["recipe"], one["data"], _seeds(one), one["date"], layers)
    return table


def _figure_3(probed: Sequence[Mapping[str, Any]]) -> Table:
    title = "Figure 3: separability in percent, of x_1, x_2, … (the paper draws curves)"
    table = Table("recipe", "of", "probe", "runs", "test accuracy", title=title)
    for one in probed:
        points = ", ".join(_text(100 * point["test"]) for point in one["points"])
        runs = str(max(point["runs"] for point in one["points"]))
        table.add_row(one["recipe"], one["of"], one["kind"], runs, points)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables, with our figures beside them")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="RECIPE/SEED in it")
    parser.add_argument("--gpu", type=Path, default=TRAINED, help="result of gpu/train_gpu.py")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    value, shown = report_paper(options.runs, options.gpu)
    if options.json:
        print(json.dumps(value, indent=1))
        return
    for part in shown:
        Console(width=200, highlight=False).print(part)


if __name__ == "__main__":
    main()
