"""The table of a sweep: its variants, the best on the test images first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from strata.pipeline.progress import duration
from strata.pipeline.run.sweep_results import Result

COLUMNS = ("test top-1", "train loss", "training risk", "parameters", "epoch", "time", "")


def of_sweep(title: str, ranked: Sequence[Result], kept: Sequence[str]) -> Table:
    """One row per variant; seconds are its own steps and its part of the reading.

    Args:
        kept: names of the variants that are the run's layer j.
    """
    table = Table(title=title, title_justify="left")
    for column in ("variant", *COLUMNS):
        table.add_column(column, overflow="fold")
    total = sum(result["seconds"] for result in ranked) or 1.0
    for result in ranked:
        table.add_row(
            result["name"],
            *_judged(result),
            f"{result['parameters']:,} + {result['auxiliary_parameters']:,}",
            "" if result["diverged"] else str(result["kept_epoch"]),
            f"{duration(result['seconds'])}, {100 * result['seconds'] / total:.0f} %",
            "kept" if result["name"] in kept else "",
        )
    return table


def _judged(result: Result) -> tuple[str, str, str]:
    gone = result["diverged"]
    if gone:
        last = "none finite" if gone["last_good"] is None else f"last {gone['last_good']:.4g}"
        return f"diverged in epoch {gone['epoch']}", last, ""
    test, loss, risk = result["test"]["top1"], result["train"]["loss"], result["risk"]
    return f"{100 * test:.2f} %", f"{loss:.4f}", f"{risk:.4f}"
