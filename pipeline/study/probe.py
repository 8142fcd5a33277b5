"""Probing x_j: a classifier is trained on features that do not change (paper Sec. 4.2, Figure 3).

Linear: one class against the rest, on maps averaged to 2 × 2, on the mean of tokens, on vectors.
CNN-p: C_γ with p convolutions, by the recipe's schedule, on maps. Both see the un-augmented images:
the paper names no augmentation for them, and its CNN probes reach 100 % on the training images.

A network that is not the run itself is a run inside it: x_0 of the images it is shown, and copies
of its layers. What these must be copies of, pipeline/run/probe_results.py says.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.pipeline.errors import BudgetError, OptionRange
from strata.pipeline.feed.problem_feed import ProblemFeed, clean_batches
from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.progress import Tick, duration, size
from strata.pipeline.run import device, record, weights
from strata.pipeline.run.levels import refer_to, unchanged
from strata.pipeline.run.probe_results import Kind, made_of, with_classes
from strata.pipeline.run.record import DATA, RESULT, RUN
from strata.pipeline.run.rundir import WEIGHTS, Run
from strata.pipeline.run.session import Session
from strata.pipeline.train import given
from strata.pipeline.train.loop import conclude, train
from strata.pipeline.train.solving import Solving, solver_of
from strata.stages.data.images import check_probed
from strata.stages.data.opening import open_source
from strata.stages.network.featurize import pooled
from strata.stages.network.network import Auxiliary, build
from strata.stages.solve import probe
from strata.stages.solve.evaluate import hits, metrics, said
from strata.stages.solve.solve import logits_of
from strata.store.files.publish import make_directory
from strata.store.level.layout import Geometry
from strata.store.read.order import generator, key_of


def train_probe(session: Session, j: int, kind: Kind) -> None:
    """Probe x_j and record it; layer j must be there.

    Raises:
        OptionRange: a CNN of what is no map; labels of tokens; a linear one of numbers.
        BudgetError: the rows of a linear probe do not fit into memory; gives both numbers.
        DataError: the training images are all of one class, or none can be held out.
        Diverged: the loss of a CNN is not finite; the last good state is kept.
        KeyboardInterrupt: somebody asked to stop; the state of a CNN is saved.
    """
    if session.run.recipe.data.targets == "token":
        raise OptionRange(
            "a probe says one class of a sample, and here every token has its own "
            "('data.targets' is 'token'): `sweep` and `final` train classifiers of tokens"
        )
    found = _cnn(session, j, kind) if kind.hidden else _linear(session, j)
    body = {**made_of(session.run, j, kind), "layer": j, "kind": kind.name, **found}
    record.vouch(session.run.probe_directory(j) / kind.name / RESULT, body)
    test, train = (said(body[split]) for split in ("test", "train"))
    spent = duration(body["seconds"])
    session.report.say(f"{kind.name} probe of x_{j}: test {test}, train {train}, {spent}")


# ---- linear -------------------------------------------------------------------------------------


def _linear(session: Session, j: int) -> dict[str, Any]:
    begun, run = time.monotonic(), session.run
    labels = session.images()["train"].array("label")
    if labels.dtype.kind == "f":
        raise OptionRange(
            "a linear probe tells classes apart, and the labels here are numbers: use --kind cnn"
        )
    _check_memory(session, j, len(labels))
    shuffled = generator("probe rows", run.seed, j).permutation(len(labels))
    order, fitted_on = probe.split(labels, shuffled)
    fits = probe.fits_of(len(np.unique(labels)))
    with session.report.task(f"features of x_{j}", len(labels), "images") as tick:
        rows = _rows(session, j, order, tick)
    with session.report.task(f"linear probe of x_{j}", fits, "fits") as tick:

        def done(count: int) -> None:
            session.stop.check()
            tick(count)

        fitted, found = probe.fit(rows, labels[order], fitted_on, done)
    directory = make_directory(run.probe_directory(j) / "linear")
    arrays = {name: torch.from_numpy(array) for name, array in vars(fitted).items()}
    weights.write(directory / WEIGHTS, arrays)
    axis = session.geometry(j, "test").axis
    guessed = np.concatenate([fitted.predict(pooled(x, axis)) for x in clean_batches(session, j)])
    return {
        "train": found.pop("train"),
        "test": {"top1": float(np.mean(guessed == session.images()["test"].array("label")))},
        **found,
        "parameters": fitted.weight.size + fitted.bias.size,
        "seconds": time.monotonic() - begun,
    }


def _check_memory(session: Session, j: int, rows: int) -> None:
    columns = _columns(session.geometry(j, "train"))
    needed = probe.bytes_of_fit(rows, columns)
    asked, free = session.options.memory_budget, device.available_memory()
    if asked is not None and needed > asked:
        bound = f"--memory-budget is {size(asked)}"
    elif needed > free:
        bound = f"only {size(free)} is free"
    else:
        return
    raise BudgetError(
        f"a linear probe of x_{j} holds {rows:,} × {columns:,} values in memory, {size(needed)}; "
        f"{bound}. --kind cnn reads its features batch by batch"
    )


def _columns(shape: Geometry) -> int:
    """What :func:`pooled` makes of a row of a level."""
    return shape.features * (4 if shape.is_map else 1)


def _rows(session: Session, j: int, order: np.ndarray, tick: Tick) -> np.ndarray:
    """Pooled x_j of the training images: float64 (rows, columns), row order[i] at i."""
    place, first, shape = np.argsort(order), 0, session.geometry(j, "train")
    rows = np.empty((len(order), _columns(shape)))
    for x in clean_batches(session, j, "train"):
        rows[place[first : first + len(x)]] = pooled(x, shape.axis)
        first += len(x)
        tick(len(x))
        session.stop.check()
    return rows


# ---- CNN-p --------------------------------------------------------------------------------------


def _cnn(session: Session, j: int, kind: Kind) -> dict[str, Any]:
    run, recipe, shape = session.run, session.run.recipe, session.geometry(j, "train")
    if not shape.is_map:
        raise OptionRange(
            f"a CNN is a probe of maps, and x_{j} is ({', '.join(shape.axes)}): use --kind linear"
        )
    seed = key_of("probe weights", run.seed, j, kind.hidden) % 2**63
    spec = kind.classifier(recipe, j)
    classifier = build([spec], seed)[0]
    solver = solver_of(session, j + 1, classifier, [spec], recipe.schedule)
    where = f"{kind.name} probe of x_{j}", run.probe_directory(j) / kind.name
    advice = f"It was a probe: lower 'schedule.lr' ({recipe.schedule.lr:g}) in a copy of the recipe"
    # A classifier of x_j is the problem after layer j, without a layer of its own.
    solving = Solving(session, j + 1, solver, *where, made_of(run, j, kind), advice)
    solving.load()
    with ProblemFeed(session, j, augmented=False) as feed:
        train([solving], feed)
        ((_, found),) = conclude([solving], keep_logits=False)
        found["train"] = _on_training_images(session, feed, classifier, found["train"])
    kept = ("train", "test", "kept_epoch", "parameters", "seconds")
    return {name: found[name] for name in kept}


def _on_training_images(
    session: Session, feed: ProblemFeed, classifier: Auxiliary, known: dict[str, Any]
) -> dict[str, Any]:
    """Top-1; where labels are no classes, the metrics of the loss beside what is ``known``."""
    of_classes, found = feed.labels.dtype.kind != "f", list[np.ndarray]()
    for x, y in feed.fixed(np.arange(len(feed.ids))):
        z = logits_of(classifier, [x], session.device, session.compute).numpy()
        found.append(hits(z, y.cpu().numpy(), 1) if of_classes else z)
        session.stop.check()
    every = np.concatenate(found)
    if of_classes:
        return {"top1": float(every.mean())}
    return known | metrics(session.run.recipe.loss.kind, every, feed.labels)


# ---- of which network ----------------------------------------------------------------------------


def shown(session: Session, network: Run) -> Session:
    """A session of the network's run, its images read and x_0 written.

    Args:
        session: of the run that the network belongs to, which is locked.

    Raises:
        DataError: the images have one class, or colour where the network knows none.
    """
    if network.origins is not None:
        network.tidy()
        network = _with_data(session, network)
        record.write(network.directory / RUN, network.facts)  # who it is, also for `gc`
    own = dataclasses.replace(session, run=network)
    ensure_images(own)
    refer_to(network, session.store)
    return own


def _with_data(session: Session, run: Run) -> Run:
    """The same run, with as many classes as its images have; what is known of images that have
    changed since is forgotten."""
    if run.source == session.run.source:
        record.write(run.directory / DATA, session.run.data())
        return run
    known = run.data()
    if known is not None and unchanged(run, known):
        return run
    (run.directory / DATA).unlink(missing_ok=True)
    told, form = session.options, run.recipe.data
    how: Any = {"root": told.data_root, "download": told.download, "form": form}
    with open_source(run.source, **how) as source:
        check_probed(source, run.recipe.data.channels)
        return with_classes(run, len(source.classes))


def copy_layers(session: Session, origin: Run, depth: int) -> None:
    """Have layers 1 … ``depth`` in a session of a network's run, with scales of their own where
    features are stored as codes: chosen as ever, on the images that are shown.

    Args:
        origin: the run that has the weights; if it is the network's own, there is nothing to do.

    Raises:
        LevelDamaged: the weights are not those that the record speaks of.
        NotFinite: a feature does not fit; names row, sample and channel.
    """
    run = session.run
    if run.origins is None:
        return
    for j, state in _states(origin, run.variant, range(run.solved() + 1, depth + 1)):
        given.copy(session, j, state, origin=run.origins[j - 1])
    refer_to(run, session.store)


def _states(
    run: Run, variant: str | None, layers: Iterable[int]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Layers of a run with their weights and buffers: as they were solved, or those of its network
    trained end to end, which is one file and read once."""
    whole: dict[str, Tensor] = {}
    for j in layers:
        if variant is None:
            path, known = run.layer_directory(j) / WEIGHTS, run.layer(j)
            yield j, weights.read_checked(path, (known or {})["weights"])
            continue
        if not whole:
            path, known = run.baseline_directory(variant), run.baseline(variant)
            whole = weights.read_checked(path / WEIGHTS, (known or {})["weights"])
        prefix = f"layers.{j - 1}."
        yield j, {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}
