"""The command `baseline`: the network of a run trained end to end, to compare the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strata.pipeline.commands import lifecycle
from strata.pipeline.run.baselines import current, variant
from strata.pipeline.run.overview import Overview


def perform(options: Mapping[str, Any]) -> tuple[Overview, dict[str, Any], list[str]]:
    """Train what a command asks for, unless it is there: the run, the record, and what was done."""
    found = lifecycle.find(options)
    chosen = variant(
        found.recipe,
        checkpointing=options["checkpointing"],
        micro_batch=options["micro_batch"],
    )
    record, done = current(found.run, chosen.name), []
    if record is None or (found.run and options["data"] not in (None, found.run.source)):
        from strata.pipeline.train.end_to_end import train_end_to_end

        with lifecycle.at_work(found, options) as session:
            record, done = train_end_to_end(session, chosen)
    return lifecycle.find(options), record, done
