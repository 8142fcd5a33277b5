"""A run: one recipe and seed in one directory, as small sealed files.

    RUN/recipe.toml                     the text it was made from
        network.json  FILE.py           of a named network: its blocks, a copy of its file
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
        baseline/plain/                     the network trained end to end: weights, curve, test
                result.json                 logits, and a record as of a layer; see baseline.py
                network/                    its layers as a run, to be probed
                (pipeline/run/probe_results.py)
        transfer/NAME/                      the run's layers as a run on other images

No torch here: status and plan read runs too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.pipeline.errors import RunConflict
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.run import network_record
from strata.pipeline.run.lineage import Node, feature_node, images_node
from strata.store.errors import LevelDamaged
from strata.store.files.publish import TEMPORARY, make_directory, replace, sealed, unseal
from strata.store.fingerprint import differences, sha256

RUN, DATA, LAYER, FEATURES = "run.json", "data.json", "layer.json", "features.json"
EVALUATION = "evaluation.json"
BASELINE, RESULT = "baseline", "result.json"
CHECKPOINT, QUANTISER = "checkpoint.safetensors", "quantiser.safetensors"
CURVE, LOGITS = "epochs.jsonl", "test_logits.npy"
NOTE = "strata"
"""Key in the header of a .safetensors for what is not tensors, as JSON."""
UNVOUCHED = (LAYER, RESULT, FEATURES, CHECKPOINT, CURVE)
"""Files without a hash in a record: they are sealed, come and go, or decide nothing."""


@dataclass(frozen=True)
class Run:
    """A run directory that exists."""

    directory: Path
    name: str
    recipe: Recipe
    facts: Mapping[str, Any]
    """Body of run.json."""

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
        return _read(self.directory / DATA)

    def layer(self, j: int) -> dict[str, Any] | None:
        """The record of layer j as it was solved, current or not; None if it never was."""
        return _read(self.layer_directory(j) / LAYER)

    def features(self, j: int) -> dict[str, Any] | None:
        """The record of the last time x_j was written."""
        return _read(self.layer_directory(j) / FEATURES)

    def evaluation(self) -> dict[str, Any] | None:
        """The last evaluation of the solved layers, current or not; None before the first."""
        return _read(self.directory / EVALUATION)

    def baseline_directory(self, variant: str) -> Path:
        return self.directory / BASELINE / variant

    def baselines(self) -> list[str]:
        """Variants of the network that were trained end to end, or begun."""
        return sorted(path.name for path in (self.directory / BASELINE).glob("*"))

    def baseline(self, variant: str) -> dict[str, Any] | None:
        """The record of a network trained end to end, current or not; None if it never was."""
        return _read(self.baseline_directory(variant) / RESULT)

    def write_baseline(self, variant: str, record: Mapping[str, Any]) -> None:
        """Write the record of a network trained end to end, with the hash of every file of it."""
        self._write_with_hashes(self.baseline_directory(variant) / RESULT, record)

    def probe(self, j: int, name: str) -> dict[str, Any] | None:
        """The record of a probe of x_j, current or not; None if there is none."""
        return _read(self.probe_directory(j) / name / RESULT)

    def write_probe(self, j: int, name: str, record: Mapping[str, Any]) -> None:
        """Write the record of a probe of x_j, with the hash of every file of it."""
        self._write_with_hashes(self.probe_directory(j) / name / RESULT, record)

    def write_layer(self, j: int, record: Mapping[str, Any]) -> None:
        """Write the record that vouches for layer j, with the hash of every file of it."""
        self._write_with_hashes(self.layer_directory(j) / LAYER, record)

    def _write_with_hashes(self, path: Path, record: Mapping[str, Any]) -> None:
        files = sorted(path.parent.glob("[!.]*.*"))
        hashes = {f.name: sha256(f.read_bytes()) for f in files if f.name not in UNVOUCHED}
        self.write(path, {**record, "files": hashes})

    def write(self, path: Path, body: Any) -> None:
        """Write a sealed JSON file, and its directory."""
        replace(make_directory(path.parent), path.name, sealed(body))

    # ---- lineage ------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """x_0 … x_n as they are or would be named, for the layers that are solved and current.

        A layer is current if it was solved on the x_{j-1} that the layers below it give today.
        """
        data = self.data()
        if data is None:
            return []
        how = self.recipe, self.seed, self.compute
        nodes = [images_node(self.recipe, data["digest"])]
        for j in range(1, self.layers + 1):
            record = self.layer(j)
            if record is None or record["input"] != nodes[-1].fingerprint:
                break
            nodes.append(feature_node(*how, nodes[-1], record["weights"], record["scales"]))
        return nodes

    def lineage(self, depth: int) -> list[dict[str, Any]]:
        """What made x_0 … x_depth, field by field."""
        return [node.intent for node in self.nodes()[: depth + 1]]

    def solved(self) -> int:
        """How many layers, from the first, are solved and current."""
        return max(0, len(self.nodes()) - 1)

    def damaged_files(self, j: int) -> Iterator[tuple[Path, str]]:
        """Files of layer j that are not what its records say, and what is wrong with them."""
        for name in (LAYER, FEATURES):
            yield from _damage(self.layer_directory(j) / name)
        yield from damaged_beside(self.layer_directory(j) / LAYER)

    def damaged_records(self) -> Iterator[tuple[Path, str]]:
        """Records of the whole run that do not match their own sha256, and files of baselines and
        probes."""
        for name in (RUN, DATA, EVALUATION, network_record.NETWORK):
            yield from _damage(self.directory / name)
        baselines = (self.baseline_directory(name) / RESULT for name in self.baselines())
        for path in (*baselines, *sorted(self.directory.glob(f"probe_*/*/{RESULT}"))):
            yield from _damage(path)
            yield from damaged_beside(path)

    def tidy(self) -> None:
        """Remove what a killed process was writing of a layer, variant, probe or baseline. The run
        must be locked."""
        for place in ("layer_*", "sweep_*/*", "probe_*/*", f"{BASELINE}/*"):
            for path in self.directory.glob(f"{place}/{TEMPORARY}*"):
                path.unlink(missing_ok=True)

    def forget_layer(self, j: int) -> None:
        """Remove a layer's weights and records; the record that vouches for the rest goes first."""
        (self.layer_directory(j) / LAYER).unlink(missing_ok=True)
        shutil.rmtree(self.layer_directory(j), ignore_errors=True)


def write_curve(directory: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One line of JSON per epoch."""
    replace(directory, CURVE, "".join(json.dumps(line) + "\n" for line in history).encode())


def _read(path: Path) -> Any:
    try:
        return unseal(path)
    except FileNotFoundError:
        return None


def changed_files(directory: Path, hashes: Mapping[str, str]) -> Iterator[Path]:
    """Files of a directory that are missing, or whose sha256 is not the one expected by name."""
    for name, expected in hashes.items():
        path = directory / name
        if not path.exists() or sha256(path.read_bytes()) != expected:
            yield path


def damaged_beside(record: Path) -> Iterator[tuple[Path, str]]:
    """Files that a record vouches for and that are not what it says."""
    with suppress(LevelDamaged):
        for path in changed_files(record.parent, (_read(record) or {"files": {}})["files"]):
            differs = f"it is not what {record.name} says: its sha256 differs"
            yield path, differs if path.exists() else "it is missing"


def _damage(path: Path) -> Iterator[tuple[Path, str]]:
    try:
        _read(path)
    except LevelDamaged:
        yield path, "it does not match its own sha256"


def find(directory: Path) -> Run | None:
    """The run in a directory, or None.

    Raises:
        RunConflict: its recipe was edited since it was made.
    """
    facts = _read(directory / RUN)
    if facts is None:
        return None
    recipe = parse((directory / "recipe.toml").read_text("utf-8"), facts["recipe"], directory)
    recipe = network_record.recalled(directory, recipe)
    if edited := differences(facts["science"], recipe.science()):
        raise RunConflict(
            f"{directory / 'recipe.toml'}, or a file it names, was edited since the run was made: "
            f"{'; '.join(edited[:3])}. Restore it, or start a new run from a copy of it"
        )
    return Run(directory, facts["recipe"], recipe, facts)


def find_matching(directory: Path, wanted: Recipe, seed: int) -> Run | None:
    """The run in a directory, or None; a directory made from another recipe or seed is refused.

    Raises:
        RunConflict: names the fields that differ.
    """
    run = find(directory)
    if run is None:
        return None
    asked = {**wanted.science(), "seed": seed}
    if found := differences({**run.recipe.science(), "seed": run.seed}, asked):
        raise RunConflict(
            f"{directory} was made with another recipe ({run.name}): {'; '.join(found[:3])}"
            f"{' …' if len(found) > 3 else ''}. Choose another directory with --run"
        )
    return run


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
    replace(directory, "recipe.toml", text.encode())
    network_record.keep(directory, recipe)
    body = {
        "recipe": name,
        "science": recipe.science(),
        "seed": seed,
        "source": source or recipe.data.source,
        **facts,
    }
    replace(directory, RUN, sealed(body))
    return Run(directory, name, recipe, body)


def with_source(run: Run, source: str) -> Run:
    """A run, written down with its images at another place; they are checked when read."""
    body = {**run.facts, "source": source}
    replace(run.directory, RUN, sealed(body))
    return Run(run.directory, run.name, run.recipe, body)
