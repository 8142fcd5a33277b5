"""Train the network of a run end to end, taken up where an interruption left it.

Images, draws, schedule and evaluation are those of a layer: of layer 1, which sees fresh draws in
every mode. So the network has as many epochs as each layer of the greedy run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.plan import hardware
from strata.pipeline.progress import duration
from strata.pipeline.run import weights
from strata.pipeline.run.baselines import BaselineVariant, current
from strata.pipeline.run.levels import refer_to
from strata.pipeline.run.rundir import LOGITS, write_curve
from strata.pipeline.run.session import Session
from strata.pipeline.train.solving import Solving, keeping_good, logits_on_test, schedule_of, train
from strata.stages.errors import Diverged
from strata.stages.solve.baseline import build_end_to_end
from strata.stages.solve.solve import Solver
from strata.store.files.publish import make_directory, npy, replace
from strata.store.read.order import key_of


def train_end_to_end(
    session: Session, variant: BaselineVariant
) -> tuple[dict[str, Any], list[str]]:
    """Train a variant and record it, unless that was done on these images. Returns the record, and
    what was done for it. Raises as ``train.solve`` does."""
    ensure_images(session)
    refer_to(session.run, session.store)
    known = current(session.run, variant.name)
    if known is not None:
        return known, []
    recipe = session.run.recipe
    network = build_end_to_end(
        recipe.layers,
        recipe.auxiliaries[-1],
        key_of("initial weights", session.run.seed, 0) % 2**63,  # the same for all variants
        checkpointing=variant.checkpointing,
    )
    schedule = schedule_of(recipe.schedule, variant.accumulate)
    solver = Solver(network, schedule, session.device, session.compute)
    directory = session.run.baseline_directory(variant.name)
    solving = Solving(session, 1, solver, f"end to end, {variant.name}", directory)
    solving.load()
    advice = f"Lower 'schedule.lr' ({schedule.lr:g}) in a copy of the recipe"
    with ProblemFeed(session, 0) as feed, keeping_good(solving, advice):
        train(solving, feed)
        return _finish(solving, variant, feed), [f"train end to end, {variant.name}"]


def _finish(solving: Solving, variant: BaselineVariant, feed: ProblemFeed) -> dict[str, Any]:
    """Write weights, curve and test logits; the record that vouches for them comes last."""
    session, progress = solving.session, solving.solver.progress
    network = solving.solver.finish()
    (logits,), labels = logits_on_test(session, solving.j, [network])
    if not np.isfinite(logits).all():
        raise Diverged(solving.solver.schedule.epochs, progress.last_good)
    directory, state = make_directory(solving.directory), network.state_dict()
    weights.write(directory / "weights.safetensors", state)
    write_curve(directory, solving.history)
    replace(directory, LOGITS, npy(logits))
    result = solving.result(logits, labels)
    images = min(len(feed.ids), feed.batches * feed.batch) * len(solving.history)
    record = {
        "variant": variant.name,
        **dataclasses.asdict(variant),
        "input": solving.input,
        "weights": weights.digest(state),
        "parameters": sum(p.numel() for p in network.parameters()),
        **result,
        "images_per_s": images / result["seconds"],
        "peak_tensor_bytes": progress.peak_bytes,
        "peak_process_bytes": hardware.peak_memory_bytes(),
    }
    session.run.write_baseline(variant.name, record)
    solving.checkpoint.unlink(missing_ok=True)
    top1, took = record["test"]["top1"], duration(record["seconds"])
    session.report.say(f"{solving.title}: test {100 * top1:.2f} %, {took}")
    return record
