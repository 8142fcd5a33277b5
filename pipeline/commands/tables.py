"""Results as tables for people. They are made here and printed by the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from strata.pipeline.commands.explain import Explanation
from strata.pipeline.commands.storage import Garbage
from strata.pipeline.commands.verify import Findings
from strata.pipeline.plan.plan import Plan, Step
from strata.pipeline.progress import duration, size
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run.sweep_results import SweepResult


def of_recipes(found: Mapping[str, Recipe]) -> Table:
    table = _table("recipe", "data", "layers", "k", "views", "claim")
    for name, r in found.items():
        table.add_row(
            name,
            r.data.source,
            r.network.said,
            str(r.auxiliary.k),
            str(r.augment.views),
            r.claim.text,
        )
    return table


def of_plan(recipe: Recipe, plan: Plan) -> Table:
    """One row per depth."""
    columns = ("", "shape", "one view", "levels", "on disk", "parameters", "SGD steps")
    table = _table(*columns, "multiply-adds", "peak memory")
    for d in plan.depths:
        table.add_row(
            f"x_{d.depth}",
            "×".join(map(str, d.shape)),
            size(d.view_bytes),
            ", ".join(d.levels),
            size(d.nbytes),
            f"{d.parameters:,} + {d.auxiliary_parameters:,}" if d.depth else "",
            f"{d.steps:,}" if d.depth else "",
            f"{d.operations:.2g}" if d.depth else "",
            ("unknown" if d.memory is None else size(d.memory)) if d.depth else "",
        )
    return table


def of_blocks(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Of a named network: which of its modules are layers."""
    blocks = ", ".join(f"{one['index']} {one['name']}" for one in found)
    return f"{name} has {len(found)} blocks, each a layer: {blocks}."


def plan_summary(recipe: Recipe, plan: Plan, todo: Sequence[Step]) -> str:
    """Totals, and what is left to do."""
    last = plan.depths[-1].depth
    training = plan.depths[1]
    one_view = f"{size(training.view_bytes)} at {plan.precision} for {plan.images:,} images"
    return "\n".join(
        (
            f"x_1 is {one_view} and one view; {_mode_text(recipe)}.",
            f"Disk for `run`: {size(plan.total)} in total, {size(plan.peak)} at the peak if levels "
            f"are removed once unneeded. x_{last} is written only by `materialize --layer {last}`.",
            "Reading the layers below instead of recomputing them divides the operations of one "
            f"run by at most {plan.ceiling:.2f}; further problems on one depth gain more.",
            f"To do: {', '.join(map(str, todo)) or 'nothing'}.",
        )
    )


def of_outcomes(found: Sequence[Mapping[str, Any]]) -> Table:
    """What was expected of every step beside what it took, and by how much they differ."""
    table = _table("", "time", "", "on disk", "", "peak of tensors", "")
    table.title = "expected, measured"
    forms = (("seconds", duration), ("bytes", size), ("peak_bytes", size))
    for outcome in found:
        row = []
        for name, form in forms:
            expected, measured = (outcome[side][name] for side in ("expected", "measured"))
            told = ["" if value is None else form(value) for value in (expected, measured)]
            compared = expected and measured and (outcome["whole"] or name != "seconds")
            row += [" / ".join(filter(None, told))]
            row += [f"{100 * (measured / expected - 1):+.0f} %" if compared else ""]
        table.add_row(outcome["step"] + ("" if outcome["whole"] else " (a part)"), *row)
    return table


def space(needed_bytes: int, free_bytes: int | None) -> str:
    """Whether the disk has room for what is still to be written."""
    if free_bytes is None:
        return f"Still to write: {size(needed_bytes)}, to an object store."
    text = f"Still to write: {size(needed_bytes)}; free: {size(free_bytes)}"
    if needed_bytes <= free_bytes:
        return f"{text}."
    return f"{text}. NOT ENOUGH: make space, choose another --store, or use --disk-budget."


def _mode_text(recipe: Recipe) -> str:
    match augmentation.mode(recipe):
        case "fresh":
            return "fresh draws every epoch: no training features are cached"
        case "fixed":
            return f"{recipe.augment.views} fixed views are cached"
        case _:
            side = recipe.canvas
            return f"the {side}×{side} canvas is cached, and cropped in feature space"


def of_status(status: Mapping[str, Any]) -> Table:
    table = _table(
        "", "state", "test", "ensemble", "level", "state", "rows", "bytes", "fingerprint"
    )
    table.title = f"{status['recipe']} in {status['run']}, levels in {status['store']}"
    _add_levels(table, ("x_0", "", "", ""), status["images"])
    for layer in status["layers"]:
        lost = layer.get("compression")
        filters = f", {lost['filters']} of {lost['of']} filters" if lost else ""
        cost = f" ({lost['points']:+.2f} by compression)" if lost else ""
        head = (
            f"layer {layer['layer']}{filters}",
            layer["state"],
            _percent(layer["test_accuracy"]) + cost,
            _percent(layer["ensemble_accuracy"]),
        )
        _add_levels(table, head, layer["levels"])
    for one in status["finals"]:
        table.add_row(f"final {one['name']}", one["state"], _percent(one["test_accuracy"]))
    for found in status["baselines"]:
        done = "" if found["epochs"] is None else f", epochs: {found['epochs']}"
        test = _percent(found["test_accuracy"])
        table.add_row(f"baseline {found['variant']}", found["state"] + done, test)
    return table


def _add_levels(table: Table, head: tuple[str, ...], levels: Sequence[Mapping[str, Any]]) -> None:
    for level in levels:
        table.add_row(
            *head,
            level["level"],
            level["state"],
            f"{level['rows']:,}",
            size(level["bytes"]),
            (level["fingerprint"] or "")[:12],
        )
        head = ("", "", "", "")


def findings(found: Findings, *, deep: bool) -> list[str]:
    """What a verification found: a line for every damaged file, and how much was looked at."""
    lines = [f"damaged: {d.path}: {d.what}" for d in found.damaged]
    lines += [f"damaged: {path}: {what}" for path, what in found.run]
    lines += [f"not finished: {path}" for path in found.partial]
    how = "every byte" if deep else "sizes and small files; --deep reads every byte"
    what = "damage was found" if found.count else "all is as it was written"
    return [*lines, f"{found.levels} levels, {size(found.nbytes)} ({how}): {what}"]


def explanations(found: Sequence[Explanation]) -> list[str]:
    """Level by level, the reasons below it."""
    lines = []
    for entry in found:
        lines += [f"{entry.level}: {entry.state}", *(f"  {reason}" for reason in entry.why)]
    return lines


def of_disk_use(found: Mapping[str, Any]) -> tuple[Table, str]:
    """One row per level, and the sums; the ratio is that of the values' bytes to those on disk."""
    table = _table("", "level", "state", "rows", "on disk", "ratio", "used by")
    table.title = f"levels in {found['store']}"
    for level in found["levels"]:
        ratio = level["value_bytes"] and level["value_bytes"] / level["bytes"]
        table.add_row(
            level["depth"],
            level["level"],
            level["state"],
            f"{level['rows']:,}",
            size(level["bytes"]),
            f"{ratio:.2f}" if ratio else "",
            ", ".join(level["runs"]) or "nobody",
        )
    summary = (
        f"{size(found['total_bytes'])} in all, {size(found['quarantine_bytes'])} of it in "
        f"quarantine, {size(found['beton_bytes'])} in copies for ffcv"
    )
    if found["free_bytes"] is not None:
        summary += f"; {size(found['free_bytes'])} free"
    return table, summary


def of_garbage(found: Sequence[Garbage], left: Sequence[Garbage] | None) -> list[str]:
    """What nobody uses, and what of it could not be removed; None: nothing was to be removed."""
    lines = [f"{item.path} ({size(item.nbytes)}): {item.why}" for item in found]
    total = size(sum(item.nbytes for item in found))
    if not found:
        return ["nothing to collect: runs refer to every level"]
    if left is None:
        return [*lines, f"{total} in all; `gc --delete` removes it"]
    busy = [f"left, because it is in use: {item.path}" for item in left]
    return [*lines, *busy, f"removed {size(sum(i.nbytes for i in found if i not in left))}"]


def of_evaluation(result: Mapping[str, Any]) -> Table:
    table = _table(
        *("layer", "test loss", "top-1", "top-5"),
        *("ensemble, logits", "ensemble, probabilities", "ensemble, top-5"),
    )
    table.title = f"{result['samples']:,} test images"
    for layer in (*result["layers"], *result.get("finals", ())):
        test, ensemble = layer["test"], layer["ensemble"]
        name = f", final {layer['name']}" if "name" in layer else ""
        table.add_row(
            f"{layer['layer']}{name}",
            f"{test['loss']:.4f}",
            _percent(test["top1"]),
            _percent(test["top5"]),
            _percent(ensemble["logits"]["top1"]),
            _percent(ensemble["probabilities"]["top1"]),
            _percent(ensemble["probabilities"]["top5"]),
        )
    return table


def of_baseline(record: Mapping[str, Any], greedy: Mapping[str, Any] | None, name: str) -> Table:
    """End to end beside layer by layer, where that was done."""
    table = _table("", "top-1", "top-5", "training", "images/s", "peak of tensors")
    rate, peak = f"{record['images_per_s']:,.0f}", size(record["peak_tensor_bytes"])
    title = f"end to end, {record['variant']}"
    table.add_row(title, *_accuracy(record["test"]), duration(record["seconds"]), rate, peak)
    if greedy is None:
        table.caption = f"`run {name}` solves the same network layer by layer"
        return table
    nbytes = greedy["peak_memory_bytes"]
    peak = "not measured" if nbytes is None else size(nbytes)
    seconds = duration(greedy["seconds"])
    table.add_row("greedy, last layer", *_accuracy(greedy["test"]), seconds, "", peak)
    table.add_row("greedy, ensemble", *_accuracy(greedy["ensemble"]), "", "", "")
    return table


def _accuracy(found: Mapping[str, float | None]) -> tuple[str, str]:
    return _percent(found["top1"]), _percent(found["top5"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _table(*columns: str) -> Table:
    table = Table(title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


SWEEP_COLUMNS = ("test top-1", "train loss", "training risk", "parameters", "epoch", "time", "")


def of_sweep(title: str, ranked: Sequence[SweepResult], kept: Sequence[str]) -> Table:
    """One row per variant; seconds are its own steps and its part of the reading.

    Args:
        kept: names of the variants that are the run's layer j.
    """
    table = Table(title=title, title_justify="left")
    for column in ("variant", *SWEEP_COLUMNS):
        table.add_column(column, overflow="fold")
    total = sum(result["seconds"] for result in ranked) or 1.0
    for result in ranked:
        table.add_row(
            result["name"],
            *_judged_variant(result),
            f"{result['parameters']:,} + {result['auxiliary_parameters']:,}",
            "" if result["diverged"] else str(result["kept_epoch"]),
            f"{duration(result['seconds'])}, {100 * result['seconds'] / total:.0f} %",
            "kept" if result["name"] in kept else "",
        )
    return table


def _judged_variant(result: SweepResult) -> tuple[str, str, str]:
    gone = result["diverged"]
    if gone:
        last = "none finite" if gone["last_good"] is None else f"last {gone['last_good']:.4g}"
        return f"diverged in epoch {gone['epoch']}", last, ""
    test, loss, risk = result["test"]["top1"], result["train"]["loss"], result["risk"]
    return f"{100 * test:.2f} %", f"{loss:.4f}", f"{risk:.4f}"
