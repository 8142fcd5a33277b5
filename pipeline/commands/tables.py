"""Results as tables for people. They are made here and printed by the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Column, Table

from strata.pipeline.progress import duration, size
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run.probe_results import Kind, ProbeResult
from strata.pipeline.run.sweep_results import SweepResult
from strata.stages.solve.evaluate import NAMES, chief, figure, metrics_in, said

Row = Sequence[object]
WORD = re.compile(r"[\d.,]+ [kMGT]?[Bs%](?!\S)|\S+")
"""What is not folded in a cell: a word, or a number with its unit."""


def table(*columns: str, title: str | None = None, rows: Iterable[Row] = ()) -> Table:
    """A table; None is an empty cell. Columns come by what they matter, since :func:`fit` takes
    away the last ones first."""
    found = Table(*(Column(column, overflow="fold") for column in columns), title=title)
    for row in rows:
        found.add_row(*("" if cell is None else str(cell) for cell in row))
    return found


def fit(shown: Table, width: int | None) -> Iterator[str | Table]:
    """The title of a table, the table itself, its caption, and the names of columns that it lost.

    Cells are folded between words, never in one. Where that is not enough, lines between columns go
    first, then the last columns. Two columns stay, however wide.

    Args:
        width: columns of the terminal; None: there is none, and nothing is folded.
    """
    cells = [[str(cell) for cell in (one.header, *one.cells)] for one in shown.columns]
    words = [
        max((cell_len(w) for cell in some for w in WORD.findall(cell)), default=0) for some in cells
    ]
    widths, count = [max(map(cell_len, some)) for some in cells], len(cells)
    if width is not None:
        while count > 2 and sum(words[:count]) + count - 1 > width:
            count -= 1
        room = width - 3 * count - 1
        if sum(words[:count]) > room:
            shown.box, shown.show_edge, shown.padding = SIMPLE_HEAD, False, (0, 0, 0, 0)
            room = width - count + 1
        while sum(widths[:count]) > max(room, sum(words[:count])):
            spare = [have - need for have, need in zip(widths[:count], words, strict=False)]
            widths[spare.index(max(spare))] -= 1
    lost = [cells[i][0] or f"column {i + 1}" for i in range(count, len(cells))]
    shown.columns = shown.columns[:count]
    for column, found in zip(shown.columns, widths, strict=False):
        column.width = found
    title, caption, shown.title, shown.caption = shown.title, shown.caption, None, None
    yield from (str(title) for _ in range(bool(title)))
    yield shown
    yield from (str(caption) for _ in range(bool(caption)))
    if lost:
        yield f"No room at {width} columns for: {', '.join(lost)}. COLUMNS=200 shows all."


def percent(share: float | None) -> str:
    """A share as ``"93.27 %"``; empty where there is none."""
    return "" if share is None else f"{100 * share:.2f} %"


def of_recipes(found: Mapping[str, Recipe]) -> Table:
    """The built-in recipes."""
    rows = (
        (name, r.data.source, r.claim.text, r.network.said, r.auxiliary.k, r.augment.views)
        for name, r in found.items()
    )
    return table("recipe", "data", "claim", "layers", "k", "views", rows=rows)


def of_outcomes(found: Sequence[Mapping[str, Any]]) -> Table:
    """What was expected of every step beside what it took, and by how much they differ."""
    columns = ("", "time", "", "on disk", "", "peak of tensors", "")
    return table(*columns, title="expected, measured", rows=map(_outcome, found))


def _outcome(outcome: Mapping[str, Any]) -> Row:
    row = [outcome["step"] + ("" if outcome["whole"] else " (a part)")]
    for name, form in (("seconds", duration), ("bytes", size), ("peak_bytes", size)):
        expected, measured = (outcome[side][name] for side in ("expected", "measured"))
        row.append(" / ".join(form(one) for one in (expected, measured) if one is not None))
        compared = expected and measured and (outcome["whole"] or name != "seconds")
        row.append(f"{100 * (measured / expected - 1):+.0f} %" if compared else "")
    return row


def of_status(status: Mapping[str, Any]) -> Table:
    """Layers with their levels, then final classifiers and networks trained end to end."""
    columns = ("", "state", "test", "ensemble", "level", "state", "rows", "bytes", "fingerprint")
    title = f"{status['recipe']} in {status['run']}, levels in {status['store']}"
    return table(*columns, title=title, rows=_status_rows(status))


def _status_rows(status: Mapping[str, Any]) -> Iterator[Row]:
    yield from _level_rows(("x_0", "", "", ""), status["images"])
    for layer in status["layers"]:
        lost = layer.get("compression")
        filters = f", {lost['filters']} of {lost['of']} filters" if lost else ""
        test = _said(layer["test"])
        test += f" ({lost['points']:+.2f} by compression)" if lost else ""
        head = f"layer {layer['layer']}{filters}", layer["state"], test
        yield from _level_rows((*head, _said(layer["ensemble"])), layer["levels"])
    for one in status["finals"]:
        yield f"final {one['name']}", one["state"], _said(one["test"])
    for one in status["baselines"]:
        done = "" if one["epochs"] is None else f", epochs: {one['epochs']}"
        yield f"baseline {one['variant']}", one["state"] + done, _said(one["test"])


def _said(found: Mapping[str, Any] | None) -> str:
    return said(found) if found else ""


def _level_rows(head: Row, levels: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for one in levels:
        numbers = f"{one['rows']:,}", size(one["bytes"]), (one["fingerprint"] or "")[:12]
        yield *head, one["level"], one["state"], *numbers
        head = ("", "", "", "")


def of_statistics(title: str, found: Sequence[Mapping[str, Any]], channels: bool) -> Table:
    """One row per level, or per channel of every level."""
    counts = ("channel",) if channels else ("channels", "dead")
    rows = list[Row]()
    for one in found:
        if channels:
            rows += [(one["level"], n, *_figures(some)) for n, some in enumerate(one["channels"])]
        else:
            numbers = f"{len(one['channels']):,}", f"{one['dead']:,}"
            rows.append((one["level"], *numbers, *_figures(one["all"])))
    return table("level", *counts, *found[0]["all"], title=title, rows=rows)


def _figures(found: Mapping[str, float]) -> list[str]:
    return [percent(n) if name == "zeros" else f"{n:.4g}" for name, n in found.items()]


def of_disk_use(found: Mapping[str, Any]) -> tuple[Table, str]:
    """One row per level, and the sums; the ratio is that of the values' bytes to those on disk."""
    columns, rows = ("", "level", "state", "rows", "on disk", "used by", "ratio"), list[Row]()
    for one in found["levels"]:
        ratio = f"{one['value_bytes'] / one['bytes']:.2f}" if one["value_bytes"] else ""
        numbers = f"{one['rows']:,}", size(one["bytes"])
        users = ", ".join(one["runs"]) or "nobody"
        rows.append((one["depth"], one["level"], one["state"], *numbers, users, ratio))
    summary = (
        f"{size(found['total_bytes'])} in all, {size(found['quarantine_bytes'])} of it in "
        f"quarantine, {size(found['beton_bytes'])} in copies for ffcv"
    )
    if found["free_bytes"] is not None:
        summary += f"; {size(found['free_bytes'])} free"
    return table(*columns, title=f"levels in {found['store']}", rows=rows), summary


def of_evaluation(result: Mapping[str, Any]) -> Table:
    """Every layer and every final classifier, alone and in an ensemble with those below."""
    every = *result["layers"], *result.get("finals", ())
    names, rows = metrics_in(one["test"] for one in every), list[Row]()
    joint = ["ensemble, logits", "ensemble, probabilities"] if names else []
    columns = "layer", "test loss", *(NAMES[name] for name in names), *joint
    for one in every:
        name = f"{one['layer']}" + (f", final {one['name']}" if "name" in one else "")
        alone = f"{one['test']['loss']:.4f}", *_figures_of(one["test"], names)
        ensemble, logits = one["ensemble"], _figures_of(one["ensemble"]["logits"], names[:1])
        rows.append((name, *alone, *logits, *_figures_of(ensemble["probabilities"], names)))
    more = (f"ensemble, {NAMES[name]}" for name in names[1:])
    return table(*columns, *more, title=f"{result['samples']:,} test images", rows=rows)


def _figures_of(found: Mapping[str, float | None], names: Sequence[str]) -> list[str]:
    return [figure(name, found.get(name)) for name in names]


def of_probes(title: str, results: Sequence[ProbeResult]) -> Table:
    """One row per depth, accuracies on the test and the training images."""
    kinds = sorted({Kind.of(one["kind"]) for one in results})
    found = {(one["layer"], one["kind"]): one for one in results}
    heads = [(f"{kind.name}, test", "train", *["C"] * (not kind.hidden)) for kind in kinds]
    depths = sorted({one["layer"] for one in results})
    cells = ([_probe(found.get((j, kind.name)), kind) for kind in kinds] for j in depths)
    rows = ((f"x_{j}", *chain(*some)) for j, some in zip(depths, cells, strict=True))
    return table("x_j", *chain(*heads), title=title, rows=rows)


def _probe(one: ProbeResult | None, kind: Kind) -> Row:
    if one is None:
        return [""] * (2 if kind.hidden else 3)
    name = chief(one["test"])
    cells = [figure(name, one[split][name]) for split in ("test", "train")]
    if not kind.hidden:
        cells.append(f"{one['regularisation']:g}{'' if one['converged'] else ', not converged'}")
    return cells


def of_baseline(record: Mapping[str, Any], greedy: Mapping[str, Any] | None, name: str) -> Table:
    """End to end beside layer by layer, where that was done."""
    names = metrics_in([record["test"]])
    columns = *(NAMES[one] for one in names), "training", "images/s", "peak of tensors"
    found = table("", *columns, rows=_compared(record, greedy, names))
    if greedy is None:
        found.caption = f"`run {name}` solves the same network layer by layer"
    return found


def _compared(
    record: Mapping[str, Any], greedy: Mapping[str, Any] | None, names: Sequence[str]
) -> Iterator[Row]:
    rate, peak = f"{record['images_per_s']:,.0f}", size(record["peak_tensor_bytes"])
    seconds = duration(record["seconds"])
    own = _figures_of(record["test"], names)
    yield f"end to end, {record['variant']}", *own, seconds, rate, peak
    if greedy:
        nbytes = greedy["peak_memory_bytes"]
        peak = "not measured" if nbytes is None else size(nbytes)
        seconds = duration(greedy["seconds"])
        yield "greedy, last layer", *_figures_of(greedy["test"], names), seconds, "", peak
        yield "greedy, ensemble", *_figures_of(greedy["ensemble"], names)


def of_sweep(title: str, ranked: Sequence[SweepResult], kept: str | None) -> Table:
    """One row per variant; seconds are its own steps and its part of the reading.

    Args:
        kept: name of the variant that is the run's layer j.
    """
    name = chief(next((one["test"] for one in ranked if not one["diverged"]), {"top1": 0.0}))
    columns = ("variant", "", f"test {NAMES[name]}", "train loss", "training risk", "parameters")
    total, rows = sum(one["seconds"] for one in ranked) or 1.0, list[Row]()
    for one in ranked:
        parameters = f"{one['parameters']:,} + {one['auxiliary_parameters']:,}"
        epoch = "" if one["diverged"] else one["kept_epoch"]
        time = f"{duration(one['seconds'])}, {100 * one['seconds'] / total:.0f} %"
        mark = "kept" if one["name"] == kept else ""
        rows.append((one["name"], mark, *_judged(one), parameters, epoch, time))
    return table(*columns, "epoch", "time", title=title, rows=rows)


def _judged(result: SweepResult) -> tuple[str, str, str]:
    if gone := result["diverged"]:
        last = "none finite" if gone["last_good"] is None else f"last {gone['last_good']:.4g}"
        return f"diverged in epoch {gone['epoch']}", last, ""
    loss, risk, name = result["train"]["loss"], result["risk"], chief(result["test"])
    return figure(name, result["test"][name]), f"{loss:.4f}", f"{risk:.4f}"
