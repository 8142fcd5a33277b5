"""What a sweep left in a run: the results of variants, believed only if made of what is there now.

    RUN/sweep_3/lr=0.1,k=2/weights.safetensors     as those of a layer
                           auxiliary.safetensors
                           epochs.jsonl
                           test_logits.npy
                           result.json             written last: the variant is through
                           checkpoint.safetensors  only while it is being solved

Beside the layers and not inside, so that removing layer 3, or mending it, leaves them. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import inf
from typing import Any

from strata.pipeline.errors import RunConflict
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.recipe.variants import Variant
from strata.pipeline.run import record
from strata.pipeline.run.record import RESULT
from strata.pipeline.run.rundir import Run, folders
from strata.stages.errors import Diverged, StageError
from strata.stages.solve.evaluate import rank
from strata.store.errors import LevelDamaged

AUXILIARY = "auxiliary.safetensors"

SweepResult = Mapping[str, Any]
"""Body of result.json; ``diverged`` is None, or epoch and last finite loss."""


def title(recipe: Recipe, j: int) -> str:
    """The name of what has variants, for messages: those of J + 1 are classifiers of x_J."""
    return f"layer {j}" if j <= len(recipe.layers) else "the final classifier"


def made_of(run: Run, j: int, variant: Variant) -> dict[str, Any]:
    """What a result or a checkpoint of the variant must say to be believed: the x_{j-1} that it was
    made on, which must have a name, and its settings."""
    return {"made_of": {"input": run.nodes()[j - 1].fingerprint, **variant.settings}}


def result(run: Run, j: int, variant: Variant) -> SweepResult | None:
    """The result of a variant that is through; None if it is not, was made on another x_{j-1} or
    with other settings, or if one of its files is not what it was."""
    if len(run.nodes()) < j:
        return None
    path = run.sweep_directory(j) / variant.name / RESULT
    return record.believed(path, made_of(run, j, variant))


def results(run: Run | None, j: int, wanted: Iterable[Variant]) -> dict[str, SweepResult | None]:
    """The results of variants by name, in the order asked for."""
    return {variant.name: run and result(run, j, variant) for variant in wanted}


def finals(run: Run) -> dict[str, tuple[str, SweepResult | None]]:
    """Every classifier of x_J by its name: its state, and its result where that is believed.

    States: ``solved``; ``diverged``; ``stale``: x_J is another now, or a file is not what it was;
    ``partial``.
    """
    found: dict[str, tuple[str, SweepResult | None]] = {}
    here = [node.fingerprint for node in run.nodes()[run.layers :]]
    for directory in folders(run.sweep_directory(run.layers + 1)):
        one, state = record.whole(directory / RESULT), "partial"
        if one and [one["made_of"]["input"]] == here:
            state = "diverged" if one["diverged"] else "solved"
        elif (directory / RESULT).exists():
            state = "stale"
        found[directory.name] = state, one if state == "solved" else None
    return found


def ranked(found: Mapping[str, SweepResult | None]) -> list[SweepResult]:
    """Results by their test metric, such as top-1, the best first; those that diverged last."""
    there = [result for result in found.values() if result is not None]
    return sorted(there, key=lambda r: -inf if r["diverged"] else rank(r["test"]), reverse=True)


# ---- keeping one --------------------------------------------------------------------------------


def chosen(
    run: Run | None, j: int, found: Mapping[str, SweepResult | None], keep: str
) -> SweepResult | None:
    """The result that ``--keep`` speaks of; ``best`` has the lowest training risk, so that nothing
    is chosen by the test images. None as long as it is not known.

    Raises:
        Diverged: it has no weights.
        RunConflict: there is another layer j, which layers above may rest on.
        StageError: none has weights.
    """
    one, there = found.get(keep), [result for result in found.values() if result is not None]
    finite = [result for result in there if not result["diverged"]]
    if keep == "best" and len(there) == len(found):
        if not finite:
            raise StageError("every variant diverged: there is none to keep. Lower 'schedule.lr'")
        one = min(finite, key=lambda result: result["risk"])
    if one is not None and one["diverged"]:
        error = Diverged(**one["diverged"])
        error.add_note(f"It was {keep}: keep another variant")
        raise error
    if run is not None and run.solved() >= j and not is_kept(run, j, one):
        raise RunConflict(
            f"layer {j} of {run.directory} is solved already, and --keep would replace it. Remove "
            f"it with `clean --layer {j}`, which leaves what was swept, and repeat the command"
        )
    return one


def is_kept(run: Run | None, j: int, one: SweepResult | None) -> bool:
    """Is the run's layer j, solved and current, this very result?"""
    if run is None or one is None or one["diverged"] or run.solved() < j:
        return False
    layer = run.layer(j) or {}
    return all(layer[part] == one[part] for part in ("weights", "auxiliary"))


def taken_from(run: Run, j: int) -> SweepResult | None:
    """The result that the run's layer j was taken from, if it was, and if all of it is there."""
    layer: dict[str, Any] = {}
    with suppress(LevelDamaged):
        layer = run.layer(j) or {}
    name = layer.get("variant", {}).get("name")
    found = record.whole(run.sweep_directory(j) / name / RESULT) if name else None
    return found if found and found["weights"] == layer["weights"] else None
