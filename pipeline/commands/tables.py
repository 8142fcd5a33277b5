"""Results as tables for people. They are made here and printed by the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from strata.pipeline.progress import duration, size
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run.sweep_results import SweepResult


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table that folds what is too wide, so that nothing is left out."""
    found = Table(title=title, title_justify="left")
    for column in columns:
        found.add_column(column, overflow="fold")
    return found


def percent(share: float | None) -> str:
    """A share as ``"93.27 %"``; empty where there is none."""
    return "" if share is None else f"{100 * share:.2f} %"


def of_recipes(found: Mapping[str, Recipe]) -> Table:
    """The built-in recipes."""
    shown = table("recipe", "data", "layers", "k", "views", "claim")
    for name, r in found.items():
        numbers = r.network.said, str(r.auxiliary.k), str(r.augment.views)
        shown.add_row(name, r.data.source, *numbers, r.claim.text)
    return shown


def of_outcomes(found: Sequence[Mapping[str, Any]]) -> Table:
    """What was expected of every step beside what it took, and by how much they differ."""
    columns = ("", "time", "", "on disk", "", "peak of tensors", "")
    shown = table(*columns, title="expected, measured")
    forms = (("seconds", duration), ("bytes", size), ("peak_bytes", size))
    for outcome in found:
        row = []
        for name, form in forms:
            expected, measured = (outcome[side][name] for side in ("expected", "measured"))
            pair = [form(value) for value in (expected, measured) if value is not None]
            compared = expected and measured and (outcome["whole"] or name != "seconds")
            row += [" / ".join(pair)]
            row += [f"{100 * (measured / expected - 1):+.0f} %" if compared else ""]
        shown.add_row(outcome["step"] + ("" if outcome["whole"] else " (a part)"), *row)
    return shown


def of_status(status: Mapping[str, Any]) -> Table:
    """Layers with their levels, then final classifiers and networks trained end to end."""
    columns = ("", "state", "test", "ensemble", "level", "state", "rows", "bytes", "fingerprint")
    title = f"{status['recipe']} in {status['run']}, levels in {status['store']}"
    shown = table(*columns, title=title)
    _add_levels(shown, ("x_0", "", "", ""), status["images"])
    for layer in status["layers"]:
        lost = layer.get("compression")
        filters = f", {lost['filters']} of {lost['of']} filters" if lost else ""
        cost = f" ({lost['points']:+.2f} by compression)" if lost else ""
        head = (
            f"layer {layer['layer']}{filters}",
            layer["state"],
            percent(layer["test_accuracy"]) + cost,
            percent(layer["ensemble_accuracy"]),
        )
        _add_levels(shown, head, layer["levels"])
    for one in status["finals"]:
        shown.add_row(f"final {one['name']}", one["state"], percent(one["test_accuracy"]))
    for one in status["baselines"]:
        done = "" if one["epochs"] is None else f", epochs: {one['epochs']}"
        test = percent(one["test_accuracy"])
        shown.add_row(f"baseline {one['variant']}", one["state"] + done, test)
    return shown


def _add_levels(shown: Table, head: Sequence[str], levels: Sequence[Mapping[str, Any]]) -> None:
    for level in levels:
        numbers = f"{level['rows']:,}", size(level["bytes"]), (level["fingerprint"] or "")[:12]
        shown.add_row(*head, level["level"], level["state"], *numbers)
        head = ("", "", "", "")


def of_statistics(title: str, found: Sequence[Mapping[str, Any]], channels: bool) -> Table:
    """One row per level, or per channel of every level."""
    counts = ("channel",) if channels else ("channels", "dead")
    shown = Table("level", *counts, *found[0]["all"], title=title, title_justify="left")
    for one in found:
        if channels:
            for channel, figures in enumerate(one["channels"]):
                shown.add_row(one["level"], str(channel), *_figures(figures))
        else:
            numbers = f"{len(one['channels']):,}", f"{one['dead']:,}"
            shown.add_row(one["level"], *numbers, *_figures(one["all"]))
    return shown


def _figures(found: Mapping[str, float]) -> list[str]:
    return [percent(n) if name == "zeros" else f"{n:.4g}" for name, n in found.items()]


def of_disk_use(found: Mapping[str, Any]) -> tuple[Table, str]:
    """One row per level, and the sums; the ratio is that of the values' bytes to those on disk."""
    columns = ("", "level", "state", "rows", "on disk", "ratio", "used by")
    shown = table(*columns, title=f"levels in {found['store']}")
    for level in found["levels"]:
        ratio = level["value_bytes"] and level["value_bytes"] / level["bytes"]
        shown.add_row(
            *(level[name] for name in ("depth", "level", "state")),
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
    return shown, summary


def of_evaluation(result: Mapping[str, Any]) -> Table:
    """Every layer and every final classifier, alone and in an ensemble with those below."""
    columns = ("layer", "test loss", "top-1", "top-5", "ensemble, logits")
    more = ("ensemble, probabilities", "ensemble, top-5")
    shown = table(*columns, *more, title=f"{result['samples']:,} test images")
    for layer in (*result["layers"], *result.get("finals", ())):
        test, ensemble = layer["test"], layer["ensemble"]
        name = f", final {layer['name']}" if "name" in layer else ""
        shown.add_row(
            f"{layer['layer']}{name}",
            f"{test['loss']:.4f}",
            *_accuracy(test),
            percent(ensemble["logits"]["top1"]),
            *_accuracy(ensemble["probabilities"]),
        )
    return shown


def _accuracy(found: Mapping[str, float | None]) -> tuple[str, str]:
    return percent(found["top1"]), percent(found["top5"])


def of_baseline(record: Mapping[str, Any], greedy: Mapping[str, Any] | None, name: str) -> Table:
    """End to end beside layer by layer, where that was done."""
    shown = table("", "top-1", "top-5", "training", "images/s", "peak of tensors")
    rate, peak = f"{record['images_per_s']:,.0f}", size(record["peak_tensor_bytes"])
    title = f"end to end, {record['variant']}"
    shown.add_row(title, *_accuracy(record["test"]), duration(record["seconds"]), rate, peak)
    if greedy is None:
        shown.caption = f"`run {name}` solves the same network layer by layer"
        return shown
    nbytes = greedy["peak_memory_bytes"]
    peak = "not measured" if nbytes is None else size(nbytes)
    seconds = duration(greedy["seconds"])
    shown.add_row("greedy, last layer", *_accuracy(greedy["test"]), seconds, "", peak)
    shown.add_row("greedy, ensemble", *_accuracy(greedy["ensemble"]), "", "", "")
    return shown


def of_sweep(title: str, ranked: Sequence[SweepResult], kept: str | None) -> Table:
    """One row per variant; seconds are its own steps and its part of the reading.

    Args:
        kept: name of the variant that is the run's layer j.
    """
    columns = ("variant", "test top-1", "train loss", "training risk", "parameters", "epoch")
    shown = table(*columns, "time", "", title=title)
    total = sum(result["seconds"] for result in ranked) or 1.0
    for result in ranked:
        if gone := result["diverged"]:
            last = "none finite" if gone["last_good"] is None else f"last {gone['last_good']:.4g}"
            judged = f"diverged in epoch {gone['epoch']}", last, ""
        else:
            top1, loss = result["test"]["top1"], result["train"]["loss"]
            judged = percent(top1), f"{loss:.4f}", f"{result['risk']:.4f}"
        shown.add_row(
            result["name"],
            *judged,
            f"{result['parameters']:,} + {result['auxiliary_parameters']:,}",
            "" if gone else str(result["kept_epoch"]),
            f"{duration(result['seconds'])}, {100 * result['seconds'] / total:.0f} %",
            "kept" if result["name"] == kept else "",
        )
    return shown
