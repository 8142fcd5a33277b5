"""What probes found: which there may be, of which networks, and whether to believe them.

    RUN/probe_3/linear/weights.safetensors   the classifier
               cnn-2/epochs.jsonl            of a CNN only
                     result.json             written last: on which x_3, how well, sha256 of files
                     checkpoint.safetensors  only while it is being trained

A network is the run itself, or the one trained end to end beside it, on the run's images or on
others. All but the first are runs inside the run, with copies of the weights: so their features are
named, computed and stored as any run's.

    RUN/baseline/plain/network/              run.json, data.json, layer_1/ …, probe_1/ …
    RUN/transfer/NAME/                       the run's layers on other images
    RUN/baseline/plain/network/transfer/NAME/

No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strata.pipeline.errors import NotThereYet
from strata.pipeline.recipe.network import without_later_defaults
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.recipe.variants import NOT_RESULTS
from strata.pipeline.run import record
from strata.pipeline.run.record import RESULT, RUN
from strata.pipeline.run.rundir import NETWORK, TRANSFER, Run, folders
from strata.stages.network.spec import AuxiliarySpec, described
from strata.stages.solve import probe
from strata.store.fingerprint import fingerprint

ProbeResult = Mapping[str, Any]
"""Body of result.json."""


# ---- which probe --------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Kind:
    """A class of classifiers."""

    hidden: int
    """p of the paper's CNN-p separability; 0: linear."""

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"cnn-{self.hidden}" if self.hidden else "linear"

    @classmethod
    def of(cls, name: str) -> Kind:
        """The kind that has a name."""
        return cls(int(name.removeprefix("cnn-")) if name != "linear" else 0)

    def classifier(self, recipe: Recipe, j: int) -> AuxiliarySpec:
        """L A ρW̃ … ρW̃ with p convolutions, on x_j. Their width is M̃ of layer 1, or M where the
        recipe has none (k = 1): the same at every depth, so that only x_j differs."""
        own, inputs = recipe.auxiliary, recipe.layers[j - 1].width
        width, classes = own.width or recipe.layers[0].width, recipe.data.classes
        how = width, classes, own.batch_norm, own.bias
        seen = {name: getattr(recipe.auxiliaries[j - 1], name) for name in ("sees", "pool", "each")}
        return AuxiliarySpec(inputs, self.hidden + 1, *how, **seen)

    def settings(self, recipe: Recipe, j: int) -> dict[str, Any]:
        """All that decides the result beside x_j and the seed, as JSON."""
        if not self.hidden:
            grid, iterations = probe.GRID, probe.MOST_ITERATIONS
            return {"grid": grid, "held_out": probe.HELD_OUT, "iterations": iterations}
        schedule = without_later_defaults(recipe.schedule)
        return {
            "classifier": described(self.classifier(recipe, j)),
            "schedule": {k: v for k, v in schedule.items() if k not in NOT_RESULTS},
        }


# ---- of which network ---------------------------------------------------------------------------


def trained(network: Run) -> str:
    """How the layers of a run were trained: ``greedy``, or ``end to end, plain``."""
    return "greedy" if network.variant is None else f"end to end, {network.variant}"


def end_to_end(run: Run) -> Run:
    """The network trained end to end; of several variants the plain one, or else the first.

    It was trained on crops, whatever the recipe caches for the greedy one: so its features are
    those of the centre crop, never cut from a canvas.

    Raises:
        NotThereYet: there is none.
    """
    for name in sorted(run.baselines(), key=lambda name: (name != "plain", name)):
        if (known := run.baseline(name)) is not None:
            origins = [fingerprint([known["input"], known["weights"]])] * run.layers
            crops = replace(run.recipe, augment=replace(run.recipe.augment, views=0))
            place = run.baseline_directory(name) / NETWORK
            return _of_recipe(replace(run, directory=place, variant=name, origins=origins), crops)
    raise NotThereYet(
        f"{run.directory} has no network trained end to end. Run: strata baseline {run.name}"
    )


def transferred(network: Run, source: str) -> Run:
    """A network on other images; as many classes as those were found to have."""
    name = re.sub(r"[^\w.]+", "-", f"{source_name(source)}-{fingerprint(source)[:8]}")
    return _on_images(network, source, network.directory / TRANSFER / name)


def _on_images(network: Run, source: str, place: Path) -> Run:
    own = [(network.layer(j) or {})["weights"] for j in range(1, network.solved() + 1)]
    facts = {**network.facts, "source": source}
    shown = replace(network, directory=place, facts=facts, origins=network.origins or own)
    data = shown.data()
    return shown if data is None else with_classes(shown, len(data["classes"]))


def with_classes(run: Run, classes: int) -> Run:
    """A copy of the run with another number of classes to tell apart."""
    return _of_recipe(run, replace(run.recipe, data=replace(run.recipe.data, classes=classes)))


def _of_recipe(run: Run, recipe: Recipe) -> Run:
    return replace(run, recipe=recipe, facts={**run.facts, "science": recipe.science()})


def source_name(source: str) -> str:
    """``imagefolder:flowers``: without the folders it lies in, which others do not have."""
    kind, colon, place = source.partition(":")
    return kind + colon + Path(place).name


def networks(run: Run) -> Iterator[Run]:
    """Every network of a run that may have been probed, itself first."""
    bases = [run]
    with suppress(NotThereYet):
        bases.append(end_to_end(run))
    for base in bases:
        yield base
        for path in sorted((base.directory / TRANSFER).glob(f"*/{RUN}")):
            if (facts := record.whole(path)) is not None:
                yield _on_images(base, facts["source"], path.parent)


# ---- results ------------------------------------------------------------------------------------


def made_of(run: Run, j: int, kind: Kind) -> dict[str, Any]:
    """What a result must say to be believed: x_j, whose layer must be there, and the settings."""
    settings = {"input": run.nodes()[j].fingerprint, **kind.settings(run.recipe, j)}
    return {"made_of": {**settings, "seed": run.seed}}


def result(network: Run, j: int, kind: Kind) -> ProbeResult | None:
    """The result of a probe of x_j; None if there is none, if it was made on another x_j or with
    other settings, or if one of its files is not what it was."""
    if j > network.solved():
        return None
    path = network.probe_directory(j) / kind.name / RESULT
    return record.believed(path, made_of(network, j, kind))


def results(network: Run) -> list[ProbeResult]:
    """All results of a network that are believed, by depth."""
    found: list[ProbeResult | None] = []
    for j in range(1, network.solved() + 1):
        names = (path.name for path in folders(network.probe_directory(j)))
        kinds = sorted(Kind.of(name) for name in names if re.fullmatch(r"linear|cnn-\d+", name))
        found += [result(network, j, kind) for kind in kinds]
    return [one for one in found if one is not None]
