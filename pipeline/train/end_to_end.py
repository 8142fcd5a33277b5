"""Train the network of a run end to end, taken up where an interruption left it.

Images, draws, schedule and evaluation are those of a layer: of layer 1, which sees fresh draws in
every mode. So the network has as many epochs as each layer of the greedy run.
"""

from __future__ import annotations

from typing import Any

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.plan import hardware
from strata.pipeline.run import record
from strata.pipeline.run.levels import refer_to
from strata.pipeline.run.record import RESULT
from strata.pipeline.run.session import Session
from strata.pipeline.train.loop import conclude, train
from strata.pipeline.train.solving import Solving, how_good, schedule_of
from strata.stages.solve.baseline import build_end_to_end
from strata.stages.solve.solve import Solver
from strata.store.read.order import key_of


def train_end_to_end(session: Session, variant: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Train a variant (see recipe/variants.py) and record it, unless that was done on these images.
    Returns the record, and what was done for it. Raises as ``train.solve`` does."""
    title = f"end to end, {variant['variant']}"
    ensure_images(session)
    refer_to(session.run, session.store)
    known = session.run.baseline(variant["variant"])
    if known is not None:
        return known, []
    recipe = session.run.recipe
    network = build_end_to_end(
        recipe.layers,
        recipe.auxiliaries[-1],
        key_of("initial weights", session.run.seed, 0) % 2**63,  # the same for all variants
        checkpointing=variant["checkpointing"],
    )
    schedule = schedule_of(recipe.schedule, variant["accumulate"])
    solver = Solver(network, schedule, session.device, session.compute)
    made_of = {"input": session.run.nodes()[0].fingerprint}
    advice = f"Lower 'schedule.lr' ({schedule.lr:g}) in a copy of the recipe"
    directory = session.run.baseline_directory(variant["variant"])
    solving = Solving(session, 1, solver, title, directory, made_of, advice)
    solving.load()
    with ProblemFeed(session, 0) as feed:
        train([solving], feed)
        ((_, found),) = conclude([solving])
    images = min(len(feed.ids), feed.batches * feed.batch) * len(solving.history)
    body = {
        **variant,
        **made_of,
        **found,
        "images_per_s": images / found["seconds"],
        "peak_tensor_bytes": solving.at.peak_bytes,
        "peak_process_bytes": hardware.peak_memory_bytes(),
    }
    record.vouch(solving.directory / RESULT, body)
    solving.say(how_good(body))
    return body, [f"train {title}"]
