"""Making a variant of layer j the run's layer j: its files, the scales of x_j, and the record."""

from __future__ import annotations

from strata.pipeline.feed.features import features, read_layer
from strata.pipeline.run import outcome, sweep_results
from strata.pipeline.run.levels import refer_to
from strata.pipeline.run.session import Session
from strata.pipeline.run.sweep_results import SweepResult
from strata.pipeline.train import scales
from strata.pipeline.train.evaluation import evaluate
from strata.store.files.publish import make_directory, replace


def keep(session: Session, j: int, one: SweepResult) -> None:
    """Write what `train --layer j` would have written with the variant's settings.

    Args:
        one: a variant with the recipe's shapes, solved on the x_{j-1} that is there now.

    Raises:
        LevelDamaged: its weights are not those that were solved.
    """
    run = session.run
    source, directory = run.sweep_directory(j) / one["name"], run.layer_directory(j)
    path = source / sweep_results.WEIGHTS
    layer = read_layer(run.recipe.layers[j - 1], path, one["weights"], session.device)
    for name in sweep_results.FILES:
        replace(make_directory(directory), name, (source / name).read_bytes())
    quantised = scales.keep(session, j, layer, features(session, j - 1, "train"))
    # Seconds were shared with other variants: nothing was expected of them.
    measured = outcome.figures(one["seconds"], None, one["peak_memory_bytes"])
    nothing = outcome.figures(None, None, None)
    same = ("weights", "auxiliary", "parameters", "auxiliary_parameters", "kept_epoch", "train")
    body = {  # as pipeline/train/train.py has it, and which variant it was
        "layer": j,
        "input": one["made_of"]["input"],
        "lineage": run.lineage(j - 1),
        **{name: one[name] for name in (*same, "test", "seconds", "peak_memory_bytes")},
        "outcome": outcome.kept(session, nothing, measured, whole=False),
        "variant": {"name": one["name"], "changes": one["changes"]},
    }
    run.write_layer(j, {**body, **quantised})
    evaluate(run, session.store)
    refer_to(run, session.store)
    session.report.say(
        f"layer {j} is now the variant {one['name']}: test {100 * one['test']['top1']:.2f} %"
    )
