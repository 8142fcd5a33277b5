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
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strata.pipeline.api import identity
from strata.pipeline.api.features import LevelFeatures
from strata.pipeline.api.samples import Samples
from strata.pipeline.api.survey import Content, again, remember, remembered, survey
from strata.pipeline.errors import OptionRange, own_errors, remedy
from strata.pipeline.interrupt import Interruptions, patience
from strata.pipeline.materialize.timing import Timing
from strata.pipeline.plan.costs import SCALE_ROWS
from strata.pipeline.progress import Reporter, duration, reporter, size
from strata.pipeline.recipe.strict import FEW, one_of, positive, read, require
from strata.pipeline.recipe.tables import COMPUTE, Cache
from strata.pipeline.run import device as devices
from strata.pipeline.run.lineage import FEATURES_VERSION
from strata.pipeline.run.stores import open_store
from strata.stages import foreign
from strata.stages.errors import NotFinite, UnusableNetwork
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Codec, Floats, codec, needs_scales
from strata.stages.network.featurize import Frozen, featurize, placed
from strata.store.errors import LevelAbsent, LevelDamaged
from strata.store.feature_store import Store
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey, geometry
from strata.store.level.level import Level
from strata.store.level.references import Reference, refer
from strata.store.read.order import generator, parts

SPLIT, HOST = "all", "python"
"""What stands for a split, and for the host in notes of what no run has asked for."""
SHARDS = 32
"""Shards are whole blocks, and so many at least, where samples are few: a kill costs one or two."""
SCALES = {"signature": str, "scale": [float], "zero": [int]}


def cache(
    module: nn.Module,
    dataset: Any,
    store: Path | str = "features",
    *,
    transform: Callable[[Any], Any] | None = None,
    features_last: bool | None = None,
    views: int = 1,
    seed: int = 0,
    compute: str = "float32",
    device: str = "auto",
    workers: int = 0,
    key: str | None = None,
    check: int | None = 8,
    progress: bool = True,
    **form: Any,
) -> LevelFeatures:
    """Features of a frozen module for every sample of a data set: written, or found as written.

    Args:
        module: from (n, …) to (n, feature), (n, channel, y, x), (n, token, feature), …: a copy of
            it, in eval mode.
        dataset: map-style, or a list: (x, y) or x. y: a number or a vector, int64 or float32.
        store: a directory, or ``s3://BUCKET/PREFIX``.
        transform: applied to x first. x must then be a tensor or an array, all of one shape.
        features_last: which axis has them; None: the last of two, (token, feature), or the first.
        views, seed: so many draws of what data set and transform draw from torch's generator.
        compute: ``float32``, ``bfloat16``, ``float16`` (GPU), or ``auto``: what is fastest.
        workers: processes that read the data set.
        key: a name that you vouch for, in place of the data set's values, code and files.
        check: samples that are read again of a data set that is known; None: all.
        form: keys of a recipe's [cache]: ``precision``, ``percentile``, ``profile``, ``block``.

    Returns:
        ``x[i]`` is what the module makes of ``dataset[i]``.

    Raises:
        RecipeError, OptionRange, DeviceError: an argument cannot be.
        DataError: a sample cannot be read, is no tensor, or is another one at each reading.
        UnusableNetwork, NotFinite: the module fails, gives no features, or some that do not fit.
        StoreError, KeyboardInterrupt: the same call goes on from what is finished.
    """
    with own_errors(), Interruptions() as stop:
        table = read(Cache, form, "cache")
        one_of("compute", compute, COMPUTE)
        positive("cache", FEW, views=views)
        for name, count in (("workers", workers), ("check", check or 0)):
            require(count >= 0, f"'{name}' is {count}; it must be 0 or more")
        chosen, report = devices.pick(device), reporter(quiet=not progress)
        dtype, _ = devices.compute_dtype(compute, chosen)
        with foreign.guarded("the module cannot be copied"):
            own = copy.deepcopy(module).requires_grad_(False).eval().cpu()
        work = Writing(own, open_store(store), table, features_last, dtype, chosen, stop, report)
        levels = list[Level]()
        for samples in (Samples(dataset, transform, seed, view, workers) for view in range(views)):
            known = survey(samples, work.store, key, check, table.block, stop, report)
            levels.append(work.level(samples, known))
        if len({level.key.fingerprint for level in levels}) < views:
            raise OptionRange(f"views is {views}, but data set and transform draw nothing")
        return LevelFeatures(levels)


@dataclass(frozen=True)
class Writing:
    """A frozen module of our own, and how its features are kept."""

    module: nn.Module
    store: Store
    table: Cache
    features_last: bool | None
    compute: str
    device: torch.device
    stop: Interruptions
    report: Reporter

    def level(self, samples: Samples, known: Content) -> Level:
        """The features of a view: opened, or written first."""
        try:
            module, _ = identity.digest(self.module)
        except identity.Unknown as error:
            raise UnusableNetwork(f"the module cannot be told from others: {error}") from error
        intent = {
            "depth": 1,
            "module": module,
            "data": known.digest,
            "precision": self.table.precision,
            "features_last": self.features_last,
            "numeric": {"compute": self.compute, "block": self.table.block},
            "code": FEATURES_VERSION,
        }
        tensors: dict[str, Tensor] = {}
        if needs_scales(self.table.precision):
            tensors = self._scales(samples, known, intent | {"percentile": self.table.percentile})
            intent["scales"] = fingerprint({n: t.tolist() for n, t in tensors.items()})
        key = LevelKey(1, fingerprint(intent), SPLIT, f"v{samples.view}")
        place = key.directory(self.store.root)
        with remedy(LevelDamaged, f"Remove {place}, and it is written again"):
            with suppress(LevelAbsent):
                return self.store.open(key)
            return self._written(samples, known, key, intent, tensors)

    def _written(
        self,
        samples: Samples,
        known: Content,
        key: LevelKey,
        intent: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> Level:
        shape, kind = self._geometry(samples, known, key), type(self.module).__name__
        order = np.arange(len(samples))  # that of the data set, if rows can be read in any
        if shape.profile != "raw":
            order = generator("order of rows", len(order)).permutation(len(order))  # of all views
        name = key.directory(self.store.root).parent.name
        note = Reference(f"strata.cache of {kind} ({name})", HOST, (name,))
        refer(self.store.root, note, self.store.files)
        writer = self.store.writer(key, shape, [intent])
        with writer.lock(patience(self.stop, self.report)):
            if writer.committed():
                return self.store.open(key)
            writer.begin()
            missing, kept = writer.missing(), codec(self.table.precision, tensors, shape.axis)
            todo = [order[slice(*shape.shard_range(shard))] for shard in missing]
            rows = sum(map(len, todo))
            with self.report.task(f"features of {kind}", rows, "samples") as tick:
                timing = Timing("forward pass", shape.row_bytes, tick)
                made = zip(missing, self._shards(samples, known, todo, kept, timing), strict=True)
                nbytes = writer.fill(timing.publishing(made, self.stop.check))
            arrays = {"label": known.labels[order], "sample_id": order}
            scales = {name: tensor.numpy() for name, tensor in tensors.items()}
            level = writer.commit(None, arrays | scales, devices.versions())
        took = f"{size(nbytes)}, {duration(sum(timing.seconds.values()))}"
        self.report.say(f"wrote {rows:,} of {len(level):,} features of {kind}: {took}")
        return level

    def _geometry(self, samples: Samples, known: Content, key: LevelKey) -> Geometry:
        """How a level lies on disk: as one that was begun, or as the module gives features."""
        table, count, found = self.table, len(samples), self.store.geometry(key)
        sample, axis = self._form(samples, known)
        row = Geometry(count, sample, table.precision, 1, 1, features_last=axis < 0).row_bytes
        block = row * table.block
        blocks = max(1, min((table.shard_mb << 20) // block, count // (SHARDS * table.block)))
        profile = "raw" if table.profile == "auto" else table.profile
        how: Any = table.precision, blocks * block, profile
        return found or geometry(count, sample, *how, features_last=axis < 0)

    def _shards(
        self,
        samples: Samples,
        known: Content,
        shards: Sequence[np.ndarray],
        kept: Codec,
        timing: Timing,
    ) -> Iterator[np.ndarray]:
        """Stored elements of shards, each of some samples."""
        blocks = [parts(numbers, self.table.block) for numbers in shards]
        reading = timing.reading(again(samples, known, list(chain.from_iterable(blocks))))
        for shard in blocks:
            done = []
            for numbers, x in zip(shard, islice(reading, len(shard)), strict=True):
                self.stop.check()
                done.append(self._of(kept, x, numbers, encode=True).cpu().numpy())
                timing.tick(len(numbers))
            yield np.concatenate(done)

    def _of(self, kept: Codec, x: Tensor, numbers: np.ndarray, *, encode: bool = False) -> Tensor:
        """Features of some samples, on the device."""
        how: Any = {"block": self.table.block, "compute": devices.dtype(self.compute)}
        layer = Frozen(placed(self.module, self.device), kept)
        try:
            with foreign.guarded("the module failed"):
                return featurize([layer], x.to(self.device), **how, encode=encode)
        except NotFinite as error:
            error.add_note(f"It is sample {numbers[error.sample]} of the data set")
            raise

    def _form(self, samples: Samples, known: Content) -> tuple[tuple[int, ...], int]:
        """The shape of a sample's features, and which axis of a batch has them: 1 or -1."""
        first = replace(samples, workers=0), replace(known, held=None)  # read anew: is it the same?
        (x,) = again(*first, [np.arange(1)])
        x = x.to(self.device, torch.float32 if x.is_floating_point() else x.dtype)
        how: Any = self.device.type, devices.dtype(self.compute), self.compute != "float32"
        module = placed(self.module, self.device)
        with foreign.guarded("the module failed"), torch.no_grad(), torch.autocast(*how):
            made: Any = module(x)
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

    def _scales(self, samples: Samples, known: Content, made_of: Any) -> dict[str, Tensor]:
        """Scales and zero points of codes: remembered, or chosen on a part of the samples."""
        signature, table = fingerprint(made_of), self.table
        found = remembered(self.store, "scales", signature, SCALES)
        if found is None:
            _, axis = self._form(samples, known)
            drawn = generator("calibration rows").permutation(len(samples))[:SCALE_ROWS]
            some = parts(np.sort(drawn), table.block)
            as_they_are = partial(self._of, Floats("float32", axis))
            made = map(as_they_are, again(samples, known, some), some)
            calibration = calibrate(made, table.precision, table.percentile, axis)
            self.report.say(f"features as {calibration.text}")
            scales = calibration.quantiser.tensors().items()
            found = {name: tensor.tolist() for name, tensor in scales}
            remember(self.store, "scales", signature, found)
        dtypes = {"scale": torch.float32, "zero": torch.uint8}
        return {name: torch.tensor(found[name], dtype=dtype) for name, dtype in dtypes.items()}
