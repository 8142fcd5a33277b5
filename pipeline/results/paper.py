"""The paper's tables and figures, with what our runs gave beside them. Nothing is filled in.

A run counts if its recipe is the built-in one, all of it is solved, and its evaluation is of what
is solved today. What the paper reports is in paper.toml.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table

from strata.pipeline.errors import RunConflict
from strata.pipeline.recipe import builtin, strict
from strata.pipeline.results import separability
from strata.pipeline.run import rundir
from strata.pipeline.run.baselines import current
from strata.pipeline.run.rundir import EVALUATION, RESULT, Run
from strata.store.errors import LevelDamaged

METRICS = ("top1", "ensemble_top1", "top5", "ensemble_top5")
PROGRESS = "imagenet-k1", "imagenet-small"
"""Of which Figure 2 shows the accuracy of every layer."""
STUDY = "separability-"


@dataclass(frozen=True)
class System:
    """A row of the paper's tables; accuracies in percent, None where the paper has none."""

    place: str
    what: str
    recipe: str
    small: str | None = None
    """The same system for two CPU cores."""
    of: str = "greedy"
    """Or ``baseline``: the same network trained end to end."""
    ensemble: str = "probabilities"
    """What is summed, with weights 2^j: these, or ``logits`` (Z of Sec. 3)."""
    top1: float | None = None
    ensemble_top1: float | None = None
    top5: float | None = None
    ensemble_top5: float | None = None


@dataclass(frozen=True)
class Found:
    """One run's figures, in percent."""

    data: str
    seed: int
    date: str
    values: Mapping[str, float | None]
    layers: Sequence[Mapping[str, float | None]] = ()
    """The same of every layer."""


def systems() -> list[System]:
    text = (resources.files(__package__ or "pipeline") / "paper.toml").read_text("utf-8")
    return [strict.read(System, table) for table in tomllib.loads(text)["systems"]]


def report_paper(runs: Path) -> tuple[dict[str, Any], list[Table | str]]:
    """Tables 1, 2, 3 and Figures 2, 3.

    Args:
        runs: run directories lie there as RECIPE/SEED.

    Returns:
        The figures as JSON, and the tables and lines that show them.
    """
    left_out: list[str] = []
    known = {name: list(_runs(runs, name, left_out)) for name in _names()}
    rows = [row for system in systems() for row in _rows(system, known)]
    progress = [figure for name in PROGRESS for figure in _progress(name, known.get(name, []))]
    probed = [curve for name in _studies() for curve in _separability(name, known[name])]
    value = {"rows": rows, "figure_2": progress, "figure_3": probed, "left_out": left_out}
    shown = [_table(rows), _figure_2(progress), _figure_3(probed)]
    return value, [*shown, *(f"left out: {why}" for why in left_out)]


def _names() -> list[str]:
    named = [name for s in systems() for name in (s.recipe, s.small) if name]
    return sorted({*named, *PROGRESS, *_studies()})


def _studies() -> list[str]:
    """Recipes of which Figure 3 shows how separable every x_j is."""
    return [name for name in builtin.names() if name.startswith(STUDY)]


# ---- our runs -----------------------------------------------------------------------------------


def _runs(root: Path, name: str, left_out: list[str]) -> Iterator[Run]:
    """Runs of a built-in recipe; why another one is left out is added to ``left_out``."""
    wanted = builtin.load(name)[1]
    for path in sorted((root / name).glob(f"*/{rundir.RUN}")):
        place, seed = path.parent, path.parent.name
        try:
            run = rundir.find(place)
            if run is not None:
                rundir.find_matching(place, wanted, run.seed)
                yield run
        except (RunConflict, LevelDamaged) as error:
            left_out.append(f"{name}/{seed}: {error}")


def _greedy(run: Run, ensemble: str = "probabilities") -> Found | None:
    evaluation = run.evaluation()
    solved = [(run.layer(j) or {}).get("weights") for j in range(1, run.solved() + 1)]
    if evaluation is None or len(solved) < run.layers or evaluation["solved"] != solved:
        return None
    layers = [_percent(layer, ensemble) for layer in evaluation["layers"]]
    return _found(run, run.directory / EVALUATION, layers[-1], layers)


def _baseline(run: Run, ensemble: str) -> Found | None:
    record = current(run, "plain")
    if record is None:
        return None
    return _found(run, run.baseline_directory("plain") / RESULT, _percent(record, ensemble))


def _found(run: Run, record: Path, values: dict[str, float | None], layers: Any = ()) -> Found:
    data, source = run.data() or {}, run.source.partition(":")
    date = datetime.fromtimestamp(record.stat().st_mtime, UTC).strftime("%Y-%m-%d")
    what = f"{source[0]}{source[1]}{Path(source[2]).name}, {data['train']:,} images"
    return Found(what, run.seed, date, values, layers)


def _percent(record: Mapping[str, Any], ensemble: str) -> dict[str, float | None]:
    joint = record.get("ensemble", {}).get(ensemble, {})
    found = {k: record["test"].get(k) for k in ("top1", "top5")}
    found |= {f"ensemble_{k}": joint.get(k) for k in ("top1", "top5")}
    return {k: None if v is None else round(100 * v, 2) for k, v in found.items()}


# ---- beside the paper's -------------------------------------------------------------------------


def _rows(system: System, known: Mapping[str, Sequence[Run]]) -> Iterator[dict[str, Any]]:
    """One row per recipe and set of images; a row without ours where there is no run."""
    paper = {metric: getattr(system, metric) for metric in METRICS}
    look = _baseline if system.of == "baseline" else _greedy
    for name in filter(None, (system.recipe, system.small)):
        found = [one for run in known[name] if (one := look(run, system.ensemble))]
        head: dict[str, Any] = {
            "place": system.place,
            "what": system.what,
            "recipe": name,
            "of": system.of,
        }
        head["paper"] = paper if name == system.recipe else dict.fromkeys(METRICS)
        for data in sorted({one.data for one in found}) or [None]:
            same = [one for one in found if one.data == data]
            yield head | {"data": data, "ours": _ours(same), **_whence(same)}


def _whence(found: Sequence[Found]) -> dict[str, Any]:
    return {
        "seeds": sorted(one.seed for one in found),
        "date": max((one.date for one in found), default=None),
    }


@dataclass(frozen=True)
class Ours:
    """Over seeds, in percent."""

    mean: float
    deviation: float | None
    """Standard deviation; None of one seed."""


def _ours(found: Sequence[Found]) -> dict[str, Any]:
    means = {metric: _mean([one.values[metric] for one in found]) for metric in METRICS}
    return {metric: asdict(mean) if mean else None for metric, mean in means.items()}


def _mean(values: Sequence[float | None]) -> Ours | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = round(statistics.stdev(known), 2) if len(known) > 1 else None
    return Ours(round(statistics.mean(known), 2), deviation)


def _progress(name: str, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Figure 2: top-5 of every layer, the mean over seeds."""
    found = [one for one in map(_greedy, runs) if one]
    for data in sorted({one.data for one in found}):
        same = [one for one in found if one.data == data]
        depths = zip(*(one.layers for one in same), strict=True)
        top5 = [_mean([layer["top5"] for layer in layers]) for layers in depths]
        means = [mean.mean if mean else None for mean in top5]
        yield {"recipe": name, "data": data, **_whence(same), "top5": means}


def _separability(name: str, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Figure 3: test accuracy of probes against depth, the mean over seeds."""
    for curve in separability.curves(runs[0]) if runs else ():
        if curve["images"] is None:
            yield {"recipe": name, **curve}


# ---- as tables ----------------------------------------------------------------------------------


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="accuracy in percent, the ensemble's in brackets; mean ± deviation")
    heads = ("", "system", "recipe", "top-1, paper", "ours", "top-5, paper", "ours")
    for name in (*heads, "images", "seeds", "date"):
        table.add_column(name)
    for row in rows:
        paper, ours = row["paper"], row["ours"]
        cells = [_cell(paper, "top1"), _cell(ours, "top1"), _cell(paper, "top5")]
        cells.append(_cell(ours, "top5"))
        seeds = ", ".join(map(str, row["seeds"]))
        head = (row["place"], row["what"], row["recipe"])
        table.add_row(*head, *cells, row["data"] or "", seeds, row["date"] or "")
    return table


def _cell(values: Mapping[str, Any], metric: str) -> str:
    one, ensemble = _text(values[metric]), _text(values[f"ensemble_{metric}"])
    return f"{one} ({ensemble})" if ensemble else one


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        spread = f" ± {value['deviation']:.1f}" if value["deviation"] is not None else ""
        return f"{value['mean']:.1f}{spread}"
    return f"{value:.1f}"


def _figure_2(progress: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Figure 2: top-5 in percent, layer by layer; the paper's k = 1: 23 … 80")
    for name in ("recipe", "images", "seeds", "date", "layers 1 …"):
        table.add_column(name)
    for one in progress:
        layers = ", ".join("" if v is None else f"{v:.1f}" for v in one["top5"])
        seeds = ", ".join(map(str, one["seeds"]))
        table.add_row(one["recipe"], one["data"], seeds, one["date"], layers)
    return table


def _figure_3(probed: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="Figure 3: separability in percent, of x_1, x_2, … (the paper draws curves)"
    )
    for name in ("recipe", "of", "probe", "runs", "test accuracy"):
        table.add_column(name)
    for one in probed:
        points = ", ".join(f"{100 * point['test']:.1f}" for point in one["points"])
        runs = str(max(point["runs"] for point in one["points"]))
        table.add_row(one["recipe"], one["of"], one["kind"], runs, points)
    return table
