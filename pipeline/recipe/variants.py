"""Variants of one auxiliary problem, from `sweep --vary KEY=VALUE,…`. Pure, no torch.

Only what concerns problem j alone may vary: not the layers below, and not which batches are seen.
A key of the schedule means what it means in a recipe; ``width`` and ``auxiliary.width`` are M and M̃
of layer j itself, after the recipe's scaling, whatever the other layers have.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from strata.pipeline.errors import OptionRange, RecipeError
from strata.pipeline.recipe.network import TRAINING, without_later_defaults
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.recipe.strict import FEW, MOST, bounded, did_you_mean, positive
from strata.pipeline.recipe.tables import Schedule
from strata.stages.network.blocks import AnyLayer, Block, scale_at
from strata.stages.network.spec import AuxiliarySpec, described

M, K, AUXILIARY_M, SEED = "width", "auxiliary.k", "auxiliary.width", "seed"
RATES = ("lr", "momentum", "nesterov", "weight_decay", "kind", "epochs", "decay", "every")
SCHEDULE = (*RATES, "warmup", "keep", *TRAINING)
SHORT = {
    **{f"schedule.{name}": name for name in SCHEDULE},
    K: "k",
    AUXILIARY_M: "aux_width",
    M: "width",
    SEED: "seed",
}
"""Every key that may vary, in the order of names, and its short form, which is accepted too."""
KINDS: dict[str, type] = {M: int, K: int, AUXILIARY_M: int, SEED: int} | {
    f"schedule.{name}": kind for name, kind in get_type_hints(Schedule).items()
}
WORDS = {"true": True, "false": False}
NOT_RESULTS = ("precision", "test_every")
"""Keys of a schedule that do not change a variant's result."""


@dataclass(frozen=True)
class Variant:
    """One auxiliary problem at layer j."""

    name: str
    """``lr=0.1,k=2,seed=1``: stable, and safe as the name of a directory."""
    changes: Mapping[str, Any]
    """What was asked for, by full key."""
    layer: AnyLayer | None
    """None: layer J is frozen, and only a classifier of x_J is trained."""
    auxiliary: AuxiliarySpec
    schedule: Schedule
    seed: int
    """Seed of the initial weights alone."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result beside x_{j-1} and the run's seed, as JSON."""
        schedule = without_later_defaults(self.schedule)
        return {
            "layer": self.layer and described(self.layer),
            "auxiliary": described(self.auxiliary),
            "schedule": {k: v for k, v in schedule.items() if k not in NOT_RESULTS},
            "seed": self.seed,
        }

    def fits(self, recipe: Recipe) -> bool:
        """Do the layer and its auxiliary classifier have the shapes that the recipe gives them?"""
        pairs = zip(recipe.layers, recipe.auxiliaries, strict=True)
        return any(pair == (self.layer, self.auxiliary) for pair in pairs)


def variants(recipe: Recipe, j: int, vary: Sequence[str], seed: int) -> list[Variant]:
    """The product of the lists, each variant once, the last list changing fastest.

    Args:
        vary: ``KEY=VALUE,VALUE,…``, one for every key that varies.
        seed: the run's, for variants that have none of their own.

    Raises:
        OptionRange: a key that may not vary or is unknown, or a value that cannot be.
    """
    lists: dict[str, list[Any]] = {}
    for text in vary:
        word, equals, values = text.partition("=")
        key = _key(recipe, word.strip())
        parts = [part.strip() for part in values.split(",")]
        if not equals or not all(parts):
            raise OptionRange(
                f"--vary {text!r} must be KEY=VALUE,VALUE,…, e.g. schedule.lr=0.05,0.1"
            )
        chosen = [_value(key, part) for part in parts]
        if key in lists:
            raise OptionRange(f"--vary {key} is given twice: write {key}=VALUE,VALUE,…")
        lists[key] = chosen
    product = (dict(zip(lists, one, strict=True)) for one in itertools.product(*lists.values()))
    named = {one.name: one for one in (_variant(recipe, j, changes, seed) for changes in product)}
    if "" in named:
        raise OptionRange(f"--vary {AUXILIARY_M}: with k = 1 there is no C whose width could vary")
    return list(named.values())


def finals(recipe: Recipe, vary: Sequence[str], seed: int) -> list[Variant]:
    """Variants of the final classifier alone, on x_J of a layer J that is frozen.

    Raises:
        OptionRange: as :func:`variants`; ``width`` may not vary, being the layer's.
        RecipeError: x_J of a canvas has no centre crop.
    """
    last = len(recipe.layers)
    scale = scale_at(recipe.layers, last)
    if recipe.augment.views == "canvas" and recipe.centre % scale:
        raise RecipeError(
            f"the border of the centre crop is {recipe.centre} pixels, which {scale} "
            f"(2^downsamplings up to x_{last}) does not divide: x_{last} cannot be cut. Change "
            "'augment.pad'"
        )
    found = variants(recipe, last, vary, seed)
    if any(M in variant.changes for variant in found):
        raise OptionRange(
            f"--vary {M}: layer {last} is frozen, and has its width; vary {AUXILIARY_M}, or use "
            f"sweep --layer {last}"
        )
    return [dataclasses.replace(variant, layer=None) for variant in found]


def _key(recipe: Recipe, word: str) -> str:
    """The full key that ``word`` is or is short for. Raises OptionRange: it may not vary."""
    full = {short: key for key, short in SHORT.items()}
    key = full.get(word, word)
    if key in SHORT:
        return key
    may = f"may vary: {', '.join(SHORT)}"
    tables = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    tables = {name: table for name, table in tables.items() if table is not None}
    keys = [f"{name}.{f.name}" for name, t in tables.items() for f in dataclasses.fields(t)]
    if key in keys or key in tables:
        raise OptionRange(
            f"--vary {key}: it would change the layers below, the batches, or more than one "
            f"layer; {may}. For anything else, copy the recipe"
        )
    near = did_you_mean(key, [*SHORT, *full])
    raise OptionRange(f"--vary {key}: unknown key{near if '?' in near else f'; {may}'}")


def _value(key: str, text: str) -> Any:
    kind = KINDS[key]
    try:
        value = WORDS[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {int: "an integer", float: "a number", bool: "true or false"}[kind]
        raise OptionRange(f"--vary {key}: {text!r} must be {wanted}") from None
    if kind is int and value < (low := 0 if key == SEED else 1):
        raise OptionRange(f"--vary {key}: {text} must be {low} or more")
    try:
        if kind in MOST and key != SEED:
            bounded(kind, value, key)
        if key == K:
            positive("auxiliary", FEW, k=value)
    except RecipeError as error:
        raise OptionRange(f"--vary {error}") from None
    return value


def _variant(recipe: Recipe, j: int, changes: dict[str, Any], seed: int) -> Variant:
    layer, auxiliary = recipe.layers[j - 1], recipe.auxiliaries[j - 1]
    k = changes.get(K, auxiliary.k)
    fixed = "'auxiliary.final_hidden'" if auxiliary.hidden else auxiliary.head and "a file's own C"
    if fixed and (wrong := [key for key in (K, AUXILIARY_M) if key in changes]):
        raise OptionRange(
            f"--vary {wrong[0]}: layer {j} ends in {fixed}, without convolutions that could vary"
        )
    if k == 1:
        changes.pop(AUXILIARY_M, None)  # there is no C with a width: the same problem
    if M in changes and isinstance(layer, Block):
        raise OptionRange(
            f"--vary {M}: layer {j} is a block of {layer.source.name}, and has its width from "
            f"there; vary {AUXILIARY_M}, or copy the recipe"
        )
    if M in changes and (auxiliary.ahead or recipe.window.layers > 1):
        raise OptionRange(
            f"--vary {M}: layer {j} is trained together with others, which fit its width; vary "
            f"{AUXILIARY_M}, or copy the recipe"
        )
    layer = dataclasses.replace(layer, **({"width": changes[M]} if M in changes else {}))
    auxiliary = dataclasses.replace(
        auxiliary,
        channels=auxiliary.channels + layer.width - recipe.layers[j - 1].width,
        k=k,
        width=changes.get(AUXILIARY_M, auxiliary.width),
        half_resolution=auxiliary.half_resolution and k > 1,
    )
    if k > 1 and not auxiliary.hidden and auxiliary.width < 1:
        raise OptionRange(
            f"--vary {K}={k}: the recipe gives no 'auxiliary.width'; add --vary {AUXILIARY_M}=…"
        )
    return Variant(
        _name(changes),
        changes,
        layer,
        auxiliary,
        _schedule(recipe, changes),
        changes.get(SEED, seed),
    )


def _schedule(recipe: Recipe, changes: Mapping[str, Any]) -> Schedule:
    found = {k.removeprefix("schedule."): v for k, v in changes.items() if k.startswith("schedule")}
    try:
        schedule = dataclasses.replace(recipe.schedule, **found)
        recipe.check_loss(schedule)
        return schedule
    except RecipeError as error:
        raise OptionRange(f"--vary: {error}") from None


def _name(changes: Mapping[str, Any]) -> str:
    """In the order of :data:`SHORT`, whatever the order of the options."""
    return ",".join(
        f"{short}={str(value).lower() if isinstance(value, bool) else value}"
        for key, short in SHORT.items()
        if (value := changes.get(key)) is not None
    )


def check_keep(recipe: Recipe, j: int, wanted: Iterable[Variant], keep: str) -> None:
    """Refuse to keep what cannot be the run's layer j, before anything is solved.

    Raises:
        OptionRange: no variant has that name, or it has not the shapes of the recipe.
    """
    named = {variant.name: variant for variant in wanted}
    if keep != "best" and keep not in named:
        raise OptionRange(f"--keep {keep!r} is no variant{did_you_mean(keep, [*named, 'best'])}")
    for variant in named.values() if keep == "best" else [named[keep]]:
        if not variant.fits(recipe):
            other = "a recipe with that width or k is the way"
            by_name = "; --keep one by its name, or " if keep == "best" else ": "
            raise OptionRange(
                f"--keep {keep}: {variant.name} has other shapes than the recipe's layer {j}"
                f"{by_name}{other}"
            )


# ---- end to end ---------------------------------------------------------------------------------


def baseline(recipe: Recipe, *, checkpointing: bool, micro_batch: int | None) -> dict[str, Any]:
    """How memory is saved while the network is trained end to end, as flags ask for and the record
    says: ``variant``, its name (``plain``, ``checkpointing``, ``micro-16``, …), ``checkpointing``,
    ``accumulate``, the micro-batches in a step, and ``micro_batch``, the images in one of them.

    Args:
        micro_batch: most images at a time; None: as the recipe accumulates.

    Raises:
        OptionRange: a micro-batch is larger than the batch.
    """
    batch, accumulate = recipe.schedule.batch, recipe.schedule.accumulate
    if micro_batch is not None:
        if micro_batch > batch:
            raise OptionRange(
                f"--micro-batch is {micro_batch}; 'schedule.batch' is only {batch}. Leave it out "
                "for whole batches"
            )
        accumulate = -(-batch // micro_batch)
    micro = -(-batch // accumulate)
    parts = ["checkpointing"] * checkpointing + [f"micro-{micro}"] * (accumulate > 1)
    return {
        "variant": "-".join(parts) or "plain",
        "checkpointing": checkpointing,
        "accumulate": accumulate,
        "micro_batch": micro,
    }
