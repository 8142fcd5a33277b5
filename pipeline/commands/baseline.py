"""The command `baseline`: the network of a run trained end to end, to compare the two."""

from __future__ import annotations

from strata.pipeline.commands import lifecycle, tables
from strata.pipeline.commands.lifecycle import Answer, Options
from strata.pipeline.run import baselines


def baseline(options: Options) -> Answer:
    """Train the network end to end unless that was done; shown beside the greedy run."""
    found = lifecycle.find(options)
    saving = {"checkpointing": options.checkpointing, "micro_batch": options.micro_batch}
    chosen = baselines.variant(found.recipe, **saving)
    record, done = baselines.current(found.run, chosen.name), []
    if record is None or lifecycle.names_other_images(options, found):
        from strata.pipeline.train.end_to_end import train_end_to_end

        with lifecycle.at_work(found, options) as session:
            record, done = train_end_to_end(session, chosen)
        found = lifecycle.find(options)
    beside = baselines.greedy(found)
    said = lifecycle.done_answer(found, done)
    value = {**said.value, "result": record, "greedy": beside}
    return Answer(value, (*said.shown, tables.of_baseline(record, beside, found.name)))
