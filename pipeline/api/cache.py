"""Features of any frozen module over any map-style data set, written once, by the store's protocol.

A level is named by its content: the module's weights, buffers and code, and every sample as the
module sees it (survey.py). One that is there is opened; of one that was begun the rest is written.

    STORE/sources/….json     sums and labels of a data set that was read; scales of codes
    STORE/x_1-…/all.v0       the features
    STORE/runs/….json        a note, so that `gc` leaves them alone
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strata.pipeline.api import identity
from strata.pipeline.api.features import LevelFeatures
from strata.pipeline.api.samples import Samples
from strata.pipeline.api.survey import Survey, again, parts, remember, remembered, survey
from strata.pipeline.errors import OptionRange, own_errors, remedy
from strata.pipeline.interrupt import Interruptions, patience
from strata.pipeline.materialize.timing import Timing
from strata.pipeline.plan.costs import SCALE_ROWS
from strata.pipeline.progress import Reporter, duration, reporter, size
from strata.pipeline.recipe.strict import FEW, one_of, positive, read
from strata.pipeline.recipe.tables import Cache
from strata.pipeline.run import device as devices
from strata.pipeline.run.lineage import FEATURES_VERSION
from strata.pipeline.run.stores import open_store
from strata.stages import foreign
from strata.stages.errors import DataError, NotFinite, UnusableNetwork
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Floats, codec, needs_scales
from strata.stages.network.featurize import Frozen, featurize, placed
from strata.store.errors import LevelAbsent, LevelDamaged
from strata.store.feature_store import Store
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey, geometry
from strata.store.level.level import Level
from strata.store.level.references import Reference, refer
from strata.store.read.order import generator

SPLIT = "all"
"""What stands for a split: a data set is cached whole."""
HOST = "python"
"""The host in notes of what no run has asked for: `gc` cannot look whether it is there."""
SHARD_BYTES, SHARDS = Cache.shard_mb << 20, 32
"""Shards are whole batches, of so many bytes, and so many at least where samples are few: a kill
costs those under way."""
SCALES = {"signature": str, "scale": [float], "zero": [int]}


def cache(
    module: nn.Module,
    dataset: Any,
    store: Path | str = "features",
    *,
    transform: Callable[[Any], Any] | None = None,
    precision: str = "float16",
    percentile: float = 99.99,
    profile: str = "raw",
    features_last: bool | None = None,
    views: int = 1,
    seed: int = 0,
    batch: int = 64,
    compute: str = "float32",
    device: str = "auto",
    workers: int = 0,
    key: str | None = None,
    check: int | None = 8,
    progress: bool = True,
) -> LevelFeatures:
    """Features of a frozen module for every sample of a data set: written, or found as written.

    Args:
        module: from (n, …) to (n, feature), (n, channel, y, x), (n, token, feature), …. A copy of
            it is used, in eval mode; the module itself is not touched.
        dataset: map-style: ``len(dataset)``, and ``dataset[i]`` is (x, y) or x. y is a number or a
            vector, kept as int64 or float32; it is -1 if there is none.
        store: a directory, or ``s3://BUCKET/PREFIX``.
        transform: applied to x first. x must then be a tensor or an array, all of one shape.
        precision, percentile, profile: as in a recipe's [cache].
        features_last: the features are a sample's last axis, and not its first, the channels; None:
            of samples of two axes, (token, feature), they are.
        views: so many draws of what data set and transform draw from torch's generator.
        seed: of these draws.
        batch: rows in a forward pass.
        compute: ``float32``, ``bfloat16``, ``float16`` (GPU), or ``auto``: what is fastest.
        device: ``auto``, ``cpu`` or ``cuda``.
        workers: processes that read the data set; 0: this one.
        key: a name that you vouch for, in place of what the data set is by values, code and files.
        check: samples of a data set that is known, drawn at random, that are read again and
            compared; None: all of them.
        progress: say on stderr what is done.

    Returns:
        The features: ``x[i]`` is what the module makes of ``dataset[i]``.

    Raises:
        RecipeError, OptionRange, DeviceError: an argument cannot be.
        DataError: a sample cannot be read, is no tensor, or is another one at each reading.
        UnusableNetwork: the module failed, gives no features, or cannot be told from others.
        NotFinite: a feature is NaN, or does not fit the precision.
        LevelDamaged: what was written is not what lies there.
        DiskFull, StoreRefused, KeyboardInterrupt: the same call goes on from what is finished.
    """
    with own_errors(), Interruptions() as stop:
        form = {"precision": precision, "percentile": percentile, "profile": profile}
        table = read(Cache, form | {"block": batch}, "cache")
        one_of("compute", compute, ("auto", "float32", "bfloat16", "float16"))
        positive("cache", FEW, views=views)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(f"{type(dataset).__name__} has no len() or no [i]: wrap it")
        if not len(dataset):
            raise DataError("the data set has no samples")
        chosen = devices.pick(device)
        how: Any = table, features_last, devices.compute_dtype(compute, chosen)[0], chosen
        work = Caching(
            *_frozen(module), open_store(store), *how, stop, reporter(quiet=not progress)
        )
        levels = list[Level]()
        for view in range(views):
            samples = Samples(dataset, transform, seed, view, workers)
            found = survey(samples, work.store, key, check, batch, stop, work.report)
            levels.append(work.level(samples, found))
        if len({level.key.fingerprint for level in levels}) < views:
            raise OptionRange(f"views is {views}, but data set and transform draw nothing")
        return LevelFeatures(levels)


def _frozen(module: nn.Module) -> tuple[nn.Module, str]:
    """A copy of a module, frozen and on the CPU, and the digest of all that it is."""
    with foreign.guarded("the module cannot be copied"):
        own = copy.deepcopy(module).requires_grad_(False).eval().cpu()
    try:
        return own, identity.digest(own)[0]
    except identity.Unknown as error:
        raise UnusableNetwork(f"the module cannot be told from others: {error}") from error


@dataclass(frozen=True)
class Caching:
    """A module, and how its features are kept."""

    module: nn.Module
    name: str
    """Digest of the module."""
    store: Store
    table: Cache
    features_last: bool | None
    compute: str
    device: torch.device
    stop: Interruptions
    report: Reporter

    def level(self, samples: Samples, found: Survey) -> Level:
        """The features of a view: opened, or written first."""
        intent = {
            "depth": 1,
            "module": self.name,
            "data": found.digest,
            "precision": self.table.precision,
            "features_last": self.features_last,
            "numeric": {"compute": self.compute, "block": self.table.block},
            "code": FEATURES_VERSION,
        }
        tensors: dict[str, Tensor] = {}
        if needs_scales(self.table.precision):
            tensors = self._scales(samples, found, intent | {"percentile": self.table.percentile})
            intent["scales"] = fingerprint({n: t.tolist() for n, t in tensors.items()})
        key = LevelKey(1, fingerprint(intent), SPLIT, f"v{samples.view}")
        place = key.directory(self.store.root)
        with remedy(LevelDamaged, f"Remove {place}, and it is written again"):
            with suppress(LevelAbsent):
                return self.store.open(key)
            return self._written(samples, found, key, intent, tensors)

    def _written(
        self,
        samples: Samples,
        found: Survey,
        key: LevelKey,
        intent: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> Level:
        placed(self.module, self.device)
        sample, axis = self._form(samples, found)
        table, count = self.table, len(samples)
        profile = "raw" if table.profile == "auto" else table.profile
        row = Geometry(count, sample, table.precision, 1, 1, features_last=axis == -1).row_bytes
        few = min(SHARD_BYTES // (row * table.block), count // (SHARDS * table.block))
        how: Any = table.precision, row * table.block * max(1, few), profile
        shape = geometry(count, sample, *how, features_last=axis == -1)
        shape = self.store.geometry(key) or shape
        # In the order of the data set where rows can be read in any; the same for all views.
        order = np.arange(count)
        if shape.profile != "raw":
            order = generator("order of rows", count).permutation(count)
        directory = key.directory(self.store.root).parent.name
        kind = type(self.module).__name__
        note = Reference(f"strata.cache of {kind} ({directory})", HOST, (directory,))
        refer(self.store.root, note, self.store.files)
        writer = self.store.writer(key, shape, [intent])
        with writer.lock(patience(self.stop, self.report)):
            if writer.committed():
                return self.store.open(key)
            writer.begin()
            todo = writer.missing()
            rows = sum(map(shape.rows_in, todo))
            with self.report.task(f"features of {kind}", rows, "samples") as tick:
                timing = Timing("forward pass", shape.row_bytes, tick)
                blocks = [
                    [order[first:last][part] for part in parts(last - first, table.block)]
                    for first, last in map(shape.shard_range, todo)
                ]
                kept = Frozen(self.module, codec(table.precision, tensors, axis))
                made = self._made(samples, found, blocks, kept, timing)
                nbytes = writer.fill(
                    timing.publishing(zip(todo, made, strict=True), self.stop.check)
                )
            arrays = {"label": found.labels[order], "sample_id": order}
            scales = {name: tensor.numpy() for name, tensor in tensors.items()}
            level = writer.commit(None, arrays | scales, devices.versions())
        taken = duration(sum(timing.seconds.values()))
        self.report.say(f"wrote {rows:,} of {count:,} features of {kind}: {size(nbytes)}, {taken}")
        return level

    def _made(
        self,
        samples: Samples,
        found: Survey,
        blocks: Sequence[Sequence[np.ndarray]],
        kept: Frozen,
        timing: Timing,
    ) -> Iterator[np.ndarray]:
        """Stored elements of shards, whose samples are given block by block."""
        every = list(chain.from_iterable(blocks))
        coming = zip(every, timing.reading(again(samples, found, every)), strict=True)
        for shard in blocks:
            done = []
            for part, x in islice(coming, len(shard)):
                self.stop.check()
                done.append(self._of(kept, x, part, encode=True).cpu().numpy())
                timing.tick(len(part))
            yield np.concatenate(done)

    def _of(self, kept: Frozen, x: Tensor, numbers: np.ndarray, *, encode: bool = False) -> Tensor:
        """Features of some samples, on the device."""
        how: Any = {"block": self.table.block, "compute": devices.dtype(self.compute)}
        try:
            with foreign.guarded("the module failed"):
                return featurize([kept], x.to(self.device), **how, encode=encode)
        except NotFinite as error:
            error.add_note(f"It is sample {numbers[error.sample]} of the data set")
            raise

    def _form(self, samples: Samples, found: Survey) -> tuple[tuple[int, ...], int]:
        """The shape of a sample's features, and which axis of a batch has them: 1 or -1."""
        (x,) = again(samples, found, [np.arange(1)])
        x = x.to(self.device, torch.float32 if x.is_floating_point() else x.dtype)
        how: Any = self.device.type, devices.dtype(self.compute), self.compute != "float32"
        with foreign.guarded("the module failed"), torch.no_grad(), torch.autocast(*how):
            made: Any = self.module(x)
        if not isinstance(made, Tensor) or not made.is_floating_point():
            kind = made.dtype if isinstance(made, Tensor) else type(made).__name__
            raise UnusableNetwork(f"the module gives {kind}, and no floating tensor: wrap it")
        if not 2 <= made.ndim <= 5 or len(made) != 1 or not made.numel():
            raise UnusableNetwork(
                f"the module makes {tuple(made.shape)} of one sample; it must be (1, …), with 1 "
                "to 4 axes behind"
            )
        last = made.ndim == 3 if self.features_last is None else self.features_last
        return tuple(made.shape[1:]), -1 if last and made.ndim > 2 else 1

    def _scales(self, samples: Samples, found: Survey, made_of: Any) -> dict[str, Tensor]:
        """Scales and zero points of codes: remembered, or chosen on a part of the samples."""
        signature = fingerprint(made_of)
        known = remembered(self.store, "scales", signature, SCALES)
        if known is None:
            placed(self.module, self.device)
            _, axis = self._form(samples, found)
            drawn = generator("calibration rows").permutation(len(samples))[:SCALE_ROWS]
            chosen, table = np.sort(drawn), self.table
            some = [chosen[part] for part in parts(len(chosen), table.block)]
            kept = Frozen(self.module, Floats("float32", axis))
            made = map(lambda x, part: self._of(kept, x, part), again(samples, found, some), some)
            calibration = calibrate(made, table.precision, table.percentile, axis)
            self.report.say(f"features as {calibration.text}")
            scales = calibration.quantiser.tensors()
            known = {name: tensor.tolist() for name, tensor in scales.items()}
            remember(self.store, "scales", signature, known)
        scale, zero = (torch.tensor(known[name]) for name in ("scale", "zero"))
        return {"scale": scale, "zero": zero.to(torch.uint8)}
