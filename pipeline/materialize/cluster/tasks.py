"""Tasks for the workers of a cluster, and their answers: small, and never the values of a level.

A task names a run, a store and images by path or URL, and what must be found there by digest: a
worker loads weights itself and refuses others than those that the command knows.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata.pipeline.run.rundir import Run
from strata.pipeline.run.stores import StoreAddress
from strata.store.errors import DiskFull, StoreRefused
from strata.store.level.layout import LevelKey
from strata.store.level.level import Level
from strata.store.write.mandate import Mandate

if TYPE_CHECKING:
    from strata.pipeline.run.session import Session

WORKERS_S = 30.0
"""Seconds that a first worker is waited for."""


@dataclass(frozen=True)
class RunAddress:
    """Paths by which a worker finds what a run is made of. All of it must be on a shared file
    system, but for a store in a bucket."""

    run: Path
    store: StoreAddress
    source: str
    """The images, as a recipe names them, with an absolute path."""
    data_root: Path
    """Directory of torchvision's data sets."""

    @classmethod
    def of(cls, session: Session) -> RunAddress:
        run, source = session.run.directory.absolute(), session.run.source
        kind, _, path = source.partition(":")
        if kind in ("imagefolder", "npz"):
            source = f"{kind}:{Path(path).expanduser().absolute()}"
        return cls(run, StoreAddress.of(session.store), source, session.data_root.absolute())


@dataclass(frozen=True)
class FeaturesTask:
    """Compute shards of a level of x_j from a level below, and publish them."""

    place: RunAddress
    mandate: Mandate
    base: LevelKey
    """The level to read."""
    content_root: str
    """Digest of its values."""
    weights: tuple[str, ...]
    """Digests of the layers in between, lowest first."""


def features(session: Session, base: Level, mandate: Mandate) -> FeaturesTask:
    """The task to write a level of x_j from ``base``, a level below."""
    weights = layer_digests(session.run, base.key.depth, mandate.key.depth)
    return FeaturesTask(RunAddress.of(session), mandate, base.key, base.content_root, weights)


def layer_digests(run: Run, base: int, depth: int) -> tuple[str, ...]:
    """Digests of the weights of the layers between x_base and x_depth, lowest first."""
    records = (run.layer(j) for j in range(base + 1, depth + 1))
    return tuple(record["weights"] for record in records if record is not None)


@dataclass(frozen=True)
class SurveyTask:
    """Hash and decode images, to say which can be used."""

    place: RunAddress
    signature: str
    """State of the images, as far as can be told without reading them."""


@dataclass(frozen=True)
class ImagesTask:
    """Decode shards of x_0, and publish them."""

    place: RunAddress
    mandate: Mandate
    survey: Path
    """The record of the images: which are good."""
    digest: str
    """Digest of all good images."""


@dataclass(frozen=True)
class HashTask:
    """Hash shards of a committed level."""

    store: StoreAddress
    directory: Path
    commit: str
    """sha256 of its commit, to tell a level that is not to be seen from one that is damaged."""


@dataclass(frozen=True)
class ChannelsTask:
    """Compute the statistics of the channels of a committed level, shard by shard."""

    store: StoreAddress
    level: LevelKey
    content_root: str


WorkerTask = FeaturesTask | SurveyTask | ImagesTask | HashTask | ChannelsTask


def call(function: bytes, *arguments: Any) -> Any:
    """Call a pickled function of ``worker.py``: a scheduler reads what it passes on, and it must
    not need that file, which needs torch."""
    return pickle.loads(function)(*arguments)


@dataclass(frozen=True)
class Done:
    """A shard that is published, and what that took."""

    worker: str
    rows: int
    nbytes: int
    sha256: str
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by part of the work: reading, forward pass, publishing."""
    peak_bytes: int = 0
    """Most bytes of tensors on the device, where they were counted."""


@dataclass(frozen=True)
class Failed:
    """The reason why a worker did not do its task."""

    worker: str
    error: Exception
    for_all: bool = False
    """Would it be the same for every other shard? Then nothing more is begun, unless it is this
    worker alone."""


def one_machine_alone(error: Exception) -> bool:
    """May it be one machine that cannot get at the files? A disk that is full is everybody's."""
    return isinstance(error, StoreRefused) and not isinstance(error, DiskFull)
