"""A run: one recipe and seed in one directory, as small sealed files. No torch here: `status` and
`plan` read runs too.

    RUN/recipe.toml                     the text it was made from
        network.json                    blocks of a named network, so that looking makes none
        FILE.py                         a copy of its file, where the recipe beside it looks for it;
                                        also of those of [loss] and augment.transform
        initial/layer_1.safetensors     weights that it begins with (pipeline/run/weights.py)
        run.json                        science, seed, device and compute dtype, source of the data
        data.json                       digest, counts, classes of the images; broken ones by name
        layer_1/weights.safetensors     θ_1 (and batch-norm buffers)
                auxiliary.safetensors   γ_1
                quantiser.safetensors   scale and zero point of each channel of x_1, if it has codes
                quantiser.json          what calibration found in each channel
                epochs.jsonl            one line per epoch
                test_logits.npy         z_1 of the test images
                layer.json              written last: the layer is solved
                features.json           which x_1 was written, bytes and seconds
                checkpoint.safetensors  only while the layer is being solved
        sweep_1/NAME/…                  variants of layer 1 (pipeline/run/sweep_results.py)
        sweep_final/NAME/…              classifiers of x_J, layer J frozen
        probe_1/linear/ cnn-2/ …        probes of x_1 (pipeline/run/probe_results.py)
        evaluation.json  report.json  report.html
        LOCK                            held while somebody works on the run
        baseline/plain/                     the network trained end to end: weights, curve, test
                result.json                 logits, and a record as of a layer; see baseline.py
                network/                    its layers as a run (run/probe_results.py)
        transfer/NAME/                      the run's layers as a run on other images
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strata.pipeline.errors import RunConflict
from strata.pipeline.recipe.named_network import NamedHead, NamedNetwork
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.recipe.strict import read_text
from strata.pipeline.run import record
from strata.pipeline.run.lineage import Node, feature_node, images_node
from strata.pipeline.run.record import DATA, EVALUATION, FEATURES, INITIAL, LAYER, RESULT, RUN
from strata.stages.network.blocks import Block, Origin
from strata.store.files import publish
from strata.store.files.files import DISK
from strata.store.files.publish import TEMPORARY, make_directory
from strata.store.fingerprint import differences

BASELINE, TRANSFER, NETWORK = "baseline", "transfer", "network"
WEIGHTS, QUANTISER = "weights.safetensors", "quantiser.safetensors"
LOGITS, LOCK = "test_logits.npy", "LOCK"
BY_SAMPLE = "test_by_sample.npy"
"""In the place of logits of tokens that are too many: float32 (n, 2), mean loss and top-1."""
NOTE = "strata"
"""Key in the header of a .safetensors for what is not tensors, as JSON."""
PLACES = ("initial", "layer_*", "sweep_*/*", "probe_*/*", f"{BASELINE}/*")
"""Where a record stands beside the files that it vouches for."""
REPLICAS = (f"{BASELINE}/*/{NETWORK}", f"{TRANSFER}/*", f"{BASELINE}/*/{NETWORK}/{TRANSFER}/*")
"""Where runs inside a run are."""


@dataclass(frozen=True)
class Run:
    """A run directory that exists."""

    directory: Path
    name: str
    recipe: Recipe
    facts: Mapping[str, Any]
    """Body of run.json."""
    variant: str | None = None
    """Variant of the network trained end to end, where its layers are copies of that one's."""
    origins: Sequence[str] | None = None
    """Names of the weights, layer by layer, that its layers must be copies of; None: they are its
    own."""

    @property
    def seed(self) -> int:
        return self.facts["seed"]

    @property
    def compute(self) -> str:
        """Dtype of the convolutions, decided when the run was made."""
        return self.facts["compute"]

    @property
    def source(self) -> str:
        return self.facts["source"]

    @property
    def accumulate(self) -> Sequence[int]:
        """Micro-batches per step of layers 1 … J, decided when the run was made."""
        return self.facts.get("accumulate") or [self.recipe.schedule.accumulate] * self.layers

    @property
    def layers(self) -> int:
        return len(self.recipe.layers)

    # ---- records ------------------------------------------------------------------------------

    def layer_directory(self, j: int) -> Path:
        return self.directory / f"layer_{j}"

    def sweep_directory(self, j: int) -> Path:
        """Where variants of layer j lie: beside it, so that it can go without them. Those of J + 1
        are classifiers of x_J."""
        return self.directory / ("sweep_final" if j > self.layers else f"sweep_{j}")

    def probe_directory(self, j: int) -> Path:
        """Where probes of x_j lie; a probe of other layers' weights is not believed."""
        return self.directory / f"probe_{j}"

    def data(self) -> dict[str, Any] | None:
        """What the images turned out to be, or None before they were read."""
        return record.read(self.directory / DATA)

    def layer(self, j: int) -> dict[str, Any] | None:
        """The record of layer j as it was solved, current or not; None if it never was."""
        return record.read(self.layer_directory(j) / LAYER)

    def features(self, j: int) -> dict[str, Any] | None:
        """The record of the last time x_j was written."""
        return record.read(self.layer_directory(j) / FEATURES)

    def evaluation(self) -> dict[str, Any] | None:
        """The last evaluation of the solved layers, current or not; None before the first."""
        return record.read(self.directory / EVALUATION)

    def baseline_directory(self, variant: str) -> Path:
        return self.directory / BASELINE / variant

    def baselines(self) -> list[str]:
        """Variants of the network that were trained end to end, or begun."""
        return [path.name for path in folders(self.directory / BASELINE)]

    def baseline(self, variant: str) -> dict[str, Any] | None:
        """The record of a network trained end to end on the images that the run has today; None if
        there is none, or if it or one of its files is not what it was."""
        path, nodes = self.baseline_directory(variant) / RESULT, self.nodes()
        return record.believed(path, {"input": nodes[0].fingerprint}) if nodes else None

    def write_layer(self, j: int, body: Mapping[str, Any]) -> None:
        """Write the record that vouches for layer j, with the hash of every file of it."""
        record.vouch(self.layer_directory(j) / LAYER, body)

    # ---- lineage ------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """x_0 … x_n as they are or would be named, for the layers that are solved and current.

        A layer is current if it was solved on the x_{j-1} that the layers below it give today, or
        is a copy, for them, of what it must be a copy of.
        """
        data = self.data()
        if data is None:
            return []
        how = self.recipe, self.seed, self.compute
        nodes = [images_node(self.recipe, data["digest"])]
        for j in range(1, self.layers + 1):
            layer, made_of = self.layer(j), {"input": nodes[-1].fingerprint}
            if self.origins is not None:
                made_of["origin"] = self.origins[j - 1] if j <= len(self.origins) else ""
            if layer is None or not record.agrees(layer, made_of):
                break
            nodes.append(feature_node(*how, nodes[-1], layer["weights"], layer["scales"]))
        return nodes

    def lineage(self, depth: int) -> list[dict[str, Any]]:
        """What made x_0 … x_depth, field by field."""
        return [node.intent for node in self.nodes()[: depth + 1]]

    def solved(self) -> int:
        """How many layers, from the first, are solved and current."""
        return max(0, len(self.nodes()) - 1)

    def damaged(self, *places: str) -> Iterator[tuple[Path, str]]:
        """Files that are not what a record says, and what is wrong with them.

        Args:
            places: patterns of directories with records, for example ``layer_2``; none: all there
                are, those of runs inside the run with them.
        """
        inside = [path for pattern in REPLICAS for path in sorted(self.directory.glob(pattern))]
        for root in [self.directory] if places else [self.directory, *inside]:
            for place in places or (".", *PLACES):
                for path in sorted(root.glob(f"{place}/*.json")):
                    if path.name in record.RECORDS:
                        yield from record.damage(path)

    def tidy(self) -> None:
        """Remove what a killed process was writing of a layer, variant, probe or baseline. The run
        must be locked."""
        for place in PLACES:
            for path in self.directory.glob(f"{place}/{TEMPORARY}*"):
                path.unlink(missing_ok=True)

    def take_back(self) -> None:
        """Unmake a run that has read no images yet, so that its recipe may still be edited."""
        inside = {path.name for path in self.directory.glob("*/")} - {Path(INITIAL).parent.name}
        if not (self.directory / DATA).exists() and not inside:
            (self.directory / RUN).unlink(missing_ok=True)

    def forget_layer(self, j: int) -> None:
        """Remove a layer's weights and records; the record that vouches for the rest goes first."""
        (self.layer_directory(j) / LAYER).unlink(missing_ok=True)
        shutil.rmtree(self.layer_directory(j), ignore_errors=True)

    def in_turn(self) -> AbstractContextManager[None]:
        """One process at a time, briefly: who looks last at the run writes last what it saw."""
        return DISK.alone([self.directory / "recipe.toml"], str(self.directory), lambda who: None)

    def remove(self) -> None:
        """Remove all but the lock, which we must have. A run that lost its layers is one that
        `clean` finds again, so small files go last, and first of them what makes it a run."""
        paths = [path for path in self.directory.iterdir() if path.name != LOCK]
        for path in sorted(paths, key=lambda path: (path.is_file(), path.name != RUN)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def folders(directory: Path) -> list[Path]:
    """What lies in folders of their own in a directory, by name: variants, for example. What others
    leave there (``.DS_Store``, ``@eaDir``) is none."""
    return sorted(path for path in directory.glob("[!.@]*") if path.is_dir())


def find(directory: Path) -> Run | None:
    """The run in a directory, or None. Raises RunConflict: its recipe was edited meanwhile."""
    facts = record.read(directory / RUN)
    if facts is None:
        return None
    text = read_text(path := directory / "recipe.toml")
    recipe = parse(text, str(path), directory)
    recipe = replace(recipe, data=recipe.data.filled(facts["science"]["data"]))
    network, kept = recipe.network, record.whole(directory / record.NETWORK)
    if isinstance(head := recipe.auxiliary, NamedHead) and kept is not None:
        recipe = replace(recipe, auxiliary=head.knowing(kept))
    if isinstance(network, NamedNetwork) and network.weights:  # the run has copies of them
        digest = facts["science"]["network"].get("weights", "")
        recipe = replace(recipe, network=(network := replace(network, weights_digest=digest)))
    if isinstance(network, NamedNetwork) and kept is not None:  # a damaged one: `verify` names it
        recipe = replace(recipe, network=network.knowing(kept))
    if edited := differences(facts["science"], recipe.science()):
        raise RunConflict(
            f"{path}, or a file it names, was edited since the run was made: "
            f"{'; '.join(edited[:3])}. Restore it, or start a new run from a copy of it"
        )
    return Run(directory, facts["recipe"], recipe, facts)


def other_files(run: Run, wanted: object) -> list[str]:
    """Files that the run's network has read, which are others now beside the network that is
    wanted. Those that are gone are not: the run has copies."""
    read = (record.whole(run.directory / record.NETWORK) or {}).get("read", {})
    if not isinstance(wanted, NamedNetwork):
        return []
    there = {name: _beside(wanted.folder, wanted) / name for name in read}
    there = {name: path for name, path in there.items() if path.is_file()}
    return [
        f"{path} is another"
        for name, path in there.items()
        if record.file_sha256(path) != read[name]
    ]


def _beside(folder: str | Path, network: Origin) -> Path:
    return Path(folder, network.file or "").parent


def create(
    directory: Path,
    name: str,
    text: str,
    seed: int,
    source: str | None,
    facts: Mapping[str, Any],
    recipe: Recipe | None = None,
) -> Run:
    """Make a run directory from a recipe's TOML ``text``.

    Args:
        facts: kept beside what identifies the run: ``compute`` dtype, device, versions.
        recipe: the text as it was read, if it was.
    """
    recipe = recipe or parse(text, name)
    make_directory(directory)
    publish.replace(directory, "recipe.toml", text.encode())
    keep_network(directory, recipe)
    body = {
        "recipe": name,
        "science": recipe.science(),
        "seed": seed,
        "source": source or recipe.data.source,
        **facts,
    }
    record.write(directory / RUN, body)
    return Run(directory, name, recipe, body)


def keep_network(directory: Path, recipe: Recipe) -> None:
    """Write what a run keeps of a named network, and of classifiers that a file makes, and is not
    there yet. Raises RecipeError if they are to be made, and cannot be."""
    network, source = recipe.network, getattr(recipe.auxiliary, "source", None)
    named = [one for one in (network, source) if isinstance(one, NamedNetwork)]
    for one in (*named, *recipe.functions):
        if one.file and not (path := directory / one.file).exists():
            publish.replace(make_directory(path.parent), path.name, (one.code or "").encode())
    if not named or (path := directory / record.NETWORK).exists():
        return
    heads = [spec.head for spec in recipe.classifiers if spec.head]
    blocks = [layer for layer in recipe.layers if isinstance(layer, Block)]
    body: Any = {"blocks": [block.as_json() for block in blocks]}
    body |= {"heads": [one.as_json() for one in heads]} if heads else {}
    for source in (one.source for one in (*blocks[:1], *heads[:1])):
        home, here = _beside(source.folder, source), _beside(directory, source)
        for name in sorted(source.read):
            if not (to := here / name).exists():  # as what lies elsewhere does
                publish.replace(make_directory(to.parent), to.name, (home / name).read_bytes())
    if isinstance(network, NamedNetwork):
        if read := sorted(blocks[0].source.read):
            there = _beside(network.folder, network)
            body |= {"read": {name: record.file_sha256(there / name) for name in read}}
            body |= {"home": network.home or network.folder}
        if place := network.file_of_weights:
            body["weights"] = {"file": str(place), "stamp": network.stamp}
    record.write(path, body)
