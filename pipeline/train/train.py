"""Solve layer j: min over (θ_j, γ_j) on x_{j-1}, taken up where an interruption left it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from torch import nn

from strata.pipeline.errors import BudgetError
from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.progress import Tick, duration, size
from strata.pipeline.run import outcome, ranks, weights
from strata.pipeline.run.rundir import LOGITS, write_curve
from strata.pipeline.run.session import Session
from strata.pipeline.train import compress, judging, scales
from strata.pipeline.train.solving import Solving, keeping_good, schedule_of
from strata.stages.errors import Diverged
from strata.stages.network.network import build_problem
from strata.stages.solve.evaluate import accuracies, cross_entropy
from strata.stages.solve.solve import Solver
from strata.store.files.publish import make_directory, npy, replace
from strata.store.read.order import key_of


def solve(session: Session, j: int, *, cached: bool = True) -> None:
    """Solve layer j on x_{j-1} and record it.

    Args:
        cached: False recomputes x_{j-1} from the images in every batch, whatever is in the store.

    Raises:
        Diverged: the loss is not finite; the last checkpoint is kept.
        KeyboardInterrupt: somebody asked to stop; the state is saved.
    """
    recipe = session.run.recipe
    seed = key_of("initial weights", session.run.seed, j) % 2**63
    problem = build_problem(*recipe.problems[j - 1], seed)
    schedule = schedule_of(recipe.schedule, session.run.accumulate[j - 1])
    solver = Solver(problem, schedule, session.device, session.compute, ranks=session.ranks)
    solving = Solving(session, j, solver, f"layer {j}", session.run.layer_directory(j))
    compress.take_up(solving)
    solving.load()
    advice = f"It was layer {j}: lower 'schedule.lr' ({schedule.lr:g}) in a copy of the recipe"
    if recipe.compress:
        advice += f", or 'compress.lr' ({recipe.compress.lr:g}) if it was fine-tuned"
    with ProblemFeed(session, j - 1, cached=cached) as feed, keeping_good(solving, advice):
        rows = min(feed.batch, len(feed.ids))
        ranks.check_parts(rows, schedule.accumulate, session.ranks.count)
        solving.expected = outcome.of_solving(session, j, feed.features.base)
        train(solving, feed)
        compress.compress(solving, feed, train, _top1)
        _finish(solving, feed)


def train(solving: Solving, feed: ProblemFeed) -> None:
    """The epochs that are left."""
    solver = solving.solver
    if solver.schedule.keep == "best" and solver.progress.best_risk is None:
        solver.consider(_risk(solving.session, feed, solver.problem))
    for epoch in range(solver.progress.epoch, solver.schedule.epochs):
        _epoch(solving, feed, epoch)


def _epoch(solving: Solving, feed: ProblemFeed, epoch: int) -> None:
    session, solver = solving.session, solving.solver
    total = solver.schedule.epochs
    solving.resumed_at = time.monotonic()
    title = f"{solving.title}, epoch {epoch + 1} of {total}"
    done = solver.progress.batch
    with session.report.task(title, feed.batches * feed.batch, "images") as tick:
        tick(done * feed.batch)
        parts = solver.schedule.accumulate
        at = solving.before + epoch
        batches = feed.epoch_in_parts(at, done, parts) if parts > 1 else feed.epoch(at, done)
        result = solver.run_epoch(batches, feed.batches, lambda n: _after_batch(solving, n, tick))
    seconds = _epoch_seconds(solving)
    rate = solver.schedule.rate((epoch + 1) * feed.batches - 1, feed.batches)
    line = {
        "epoch": solving.before + epoch + 1,
        "lr": rate,
        "train_loss": result["loss"],
        "train_top1": result["top1"],
        "test_top1": _test_accuracy(session, solving.j, solver.problem, epoch + 1),
        "seconds": seconds,
    }
    if solver.schedule.keep == "best":
        line["risk"] = _risk(session, feed, solver.problem)
        solver.consider(line["risk"])
    solving.history.append(line)
    solving.remember()
    if solving.worth_saying(last=epoch + 1 == total):
        session.report.say(f"{title}: {_epoch_text(line, feed.batches * feed.batch)}")
    if solving.is_due:
        solving.save()


def _after_batch(solving: Solving, samples: int, tick: Tick) -> None:
    session, progress = solving.session, solving.solver.progress
    tick(samples * session.ranks.count, f"loss {progress.loss_sum / progress.samples:.3f}")
    cap = session.gpu_memory
    if cap is not None and progress.peak_bytes > cap:
        raise BudgetError(
            f"a step of {solving.title} took {size(progress.peak_bytes)} of device memory; "
            f"--gpu-memory is {size(cap)}. Raise it, or lower 'schedule.batch'"
        )
    asked = session.ranks.any(session.stop.asked)  # all stop after the same batch
    if asked or solving.is_due:
        solving.save()
    if asked:
        raise KeyboardInterrupt


def _epoch_seconds(solving: Solving) -> float:
    """Seconds of the epoch that just ended, over all processes that worked on it."""
    spent = solving.solver.epoch_seconds + time.monotonic() - solving.resumed_at
    solving.resumed_at = time.monotonic()
    return spent


def _epoch_text(line: dict[str, Any], samples: int) -> str:
    test = "" if line["test_top1"] is None else f", test {100 * line['test_top1']:.1f} %"
    return (
        f"loss {line['train_loss']:.4f}, train {100 * line['train_top1']:.1f} %{test}, "
        f"{duration(line['seconds'])}, {samples / line['seconds']:,.0f} images/s"
    )


def _test_accuracy(session: Session, j: int, problem: nn.Module, epoch: int) -> float | None:
    every = session.run.recipe.schedule.test_every
    if not every or epoch % every or not session.ranks.leads:
        return None
    return accuracies(*logits_of_tests(session, j, problem))["top1"]


def _top1(solving: Solving) -> float:
    session, j, problem = solving.session, solving.j, solving.solver.problem
    share = session.ranks.by_leader(
        lambda: accuracies(*logits_of_tests(session, j, problem))["top1"]
    )
    assert share is not None, "every data set has two classes"
    return share


def logits_of_tests(session: Session, j: int, problem: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """What a network that sees x_{j-1} says of the test images, float32 (n, classes); labels."""
    (logits,) = judging.logits_on_test(session, j, [problem])
    return logits, judging.labels_of_test(session)


def _risk(session: Session, feed: ProblemFeed, problem: nn.Module) -> float:
    return session.ranks.by_leader(lambda: judging.risks(session, feed, [problem])[0])


def _finish(solving: Solving, feed: ProblemFeed) -> None:
    """Write weights, scales, curve and test logits; the record that vouches for them comes last."""
    session, j = solving.session, solving.j
    problem = solving.solver.finish()
    if not session.ranks.leads:
        return
    logits, labels = logits_of_tests(session, j, problem)
    if not np.isfinite(logits).all():
        raise Diverged(solving.solver.schedule.epochs, solving.solver.progress.last_good)
    directory = make_directory(session.run.layer_directory(j))
    layer, auxiliary = problem.layer.state_dict(), problem.auxiliary.state_dict()
    weights.write(directory / "weights.safetensors", layer)
    weights.write(directory / "auxiliary.safetensors", auxiliary)
    quantised = scales.keep(session, j, problem.layer, feed.features)
    write_curve(directory, solving.history)
    record = {
        "layer": j,
        "input": solving.input,
        "lineage": session.run.lineage(j - 1),
        "weights": weights.digest(layer),
        "auxiliary": weights.digest(auxiliary),
        **quantised,
        "parameters": sum(p.numel() for p in problem.layer.parameters()),
        "auxiliary_parameters": sum(p.numel() for p in problem.auxiliary.parameters()),
        "kept_epoch": solving.kept_epoch,
        "train": {
            "loss": solving.history[-1]["train_loss"],
            "top1": solving.history[-1]["train_top1"],
        },
        "test": {"loss": cross_entropy(logits, labels), **accuracies(logits, labels)},
        "seconds": sum(line["seconds"] for line in solving.history),
        "peak_memory_bytes": solving.solver.progress.peak_bytes,
        "outcome": solving.outcome(),
    }
    if solving.compression:
        record["compression"] = solving.compression
    replace(directory, LOGITS, npy(logits))
    session.run.write_layer(j, record)
    solving.checkpoint.unlink(missing_ok=True)
    session.report.say(
        f"solved layer {j}: test {100 * record['test']['top1']:.2f} %, "
        f"{duration(record['seconds'])}"
    )
