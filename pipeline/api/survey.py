"""What a data set of the caller's holds: read once, and remembered in the store by its identity.

A data set that is known by its identity (identity.py), or by the key that the caller vouches for,
is not believed blindly: some samples, drawn anew each time, are read again and compared.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import SystemRandom
from typing import Any

import numpy as np
from torch import Tensor

from strata.pipeline.api import identity
from strata.pipeline.api.samples import SUM, Batch, Samples, unlike
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.progress import Reporter
from strata.pipeline.run.device import available_memory
from strata.stages.errors import DataError
from strata.store.errors import LevelDamaged
from strata.store.feature_store import Store
from strata.store.files import publish
from strata.store.files.publish import make_directory, sealed, unseal
from strata.store.fingerprint import fingerprint, sha256
from strata.store.read.order import parts

HELD = 0.25
"""Share of the free memory that the samples of a new data set may take, so as to be read once."""
SURVEY = {"signature": str, "sums": str, "labels": str, "dtype": str, "shape": [int]}


@dataclass(frozen=True)
class Content:
    """What reading a data set has found."""

    sums: np.ndarray
    """uint8 (n, SUM): sha256 of every sample as the module sees it, and its label."""
    labels: np.ndarray
    """int64 or float32, (n,) or (n, values)."""
    held: Tensor | None = None
    """All samples, where they fit into memory."""

    @property
    def digest(self) -> str:
        """sha256 hex of the whole data set."""
        return sha256(self.sums.tobytes())


def survey(
    samples: Samples,
    store: Store,
    key: str | None,
    check: int | None,
    block: int,
    stop: Interruptions,
    report: Reporter,
) -> Content:
    """Sums and labels of all samples: remembered, or read.

    Args:
        key, check: as of :func:`cache`.
        block: samples that are read at a time.

    Raises:
        DataError: it is no data set, or a sample cannot be read or is of another form.
    """
    if not hasattr(samples.data, "__getitem__") or not hasattr(samples.data, "__len__"):
        raise DataError(f"{type(samples.data).__name__} has no len() or no [i]: wrap it")
    if not len(samples):
        raise DataError("the data set has no samples")
    signature, how = _signature(samples, store, key)
    known = signature and remembered(store, "samples", signature, SURVEY)
    if known:
        sums = _array(known["sums"], "u1").reshape(-1, SUM)
        labels = _array(known["labels"], known["dtype"]).reshape(known["shape"])
        every = range(len(samples))
        drawn = every if check is None else SystemRandom().sample(every, min(check, len(samples)))
        chosen, other = np.array(sorted(drawn), int), None
        few = samples if check is None else replace(samples, workers=0)
        for batch in few.read(parts(chosen, block)):
            stop.check()
            other = next(iter(_others(batch, sums)), other)
        if other is None:
            said = f"{len(samples):,} samples are known by {how}"
            report.say(f"{said}; {len(chosen):,} of them were read again, and are what they were")
            return Content(sums, labels)
        report.say(f"known by {how}, but sample {other} is another: all are read again")
    elif signature is None:
        report.say(f"all samples are read: the data set is not known without that, as {how}")
    found = _whole(samples, block, stop, report)
    if signature:
        form = {"dtype": found.labels.dtype.str, "shape": list(found.labels.shape)}
        arrays = {"sums": found.sums, "labels": found.labels}.items()
        text = {name: b64encode(array.tobytes()).decode() for name, array in arrays}
        remember(store, "samples", signature, text | form)
    return found


def _signature(samples: Samples, store: Store, key: str | None) -> tuple[str | None, str]:
    """What a data set is remembered by, without reading it, in words; or None and why there is
    nothing."""
    name, how = key, f"the key {key!r}"
    if key is None:
        try:
            what = samples.data, samples.transform
            name, files = identity.identity(what, None if store.remote else store.root)
            how = f"values, code and {files:,} files"
        except identity.Unknown as error:
            return None, str(error)
    return fingerprint([name, len(samples), samples.seed, samples.view]), how


def _whole(samples: Samples, block: int, stop: Interruptions, report: Reporter) -> Content:
    """Read a data set from end to end."""
    sums, labels, held, count = list[np.ndarray](), list[np.ndarray](), None, len(samples)
    form, room = "", HELD * available_memory()
    with report.task("reading the data set", count, "samples") as tick:
        for batch in samples.read(parts(np.arange(count), block)):
            stop.check()
            if not labels and batch.x[0].nbytes * count <= room:
                held = batch.x.new_empty(count, *batch.x.shape[1:])
            if batch.form != (form := form or batch.form):
                raise unlike(batch.numbers[0], batch.form, 0, form)
            if held is not None:
                held[batch.numbers] = batch.x
            sums.append(batch.sums)
            labels.append(batch.y)
            tick(len(batch.x))
    return Content(np.concatenate(sums), np.concatenate(labels), held)


def again(samples: Samples, found: Content, blocks: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Samples as they were found, block by block. Raises DataError: one is another now."""
    if found.held is not None:
        yield from (found.held[numbers] for numbers in blocks)
        return
    for batch in samples.read(blocks):
        for number in _others(batch, found.sums):
            raise DataError(
                f"sample {number} is another than when the data set was read: it may only draw "
                "from torch's generator, and nobody may change it meanwhile"
            )
        yield batch.x


def _others(batch: Batch, sums: np.ndarray) -> np.ndarray:
    """The samples that are not what they were."""
    return batch.numbers[(batch.sums != sums[batch.numbers]).any(1)]


# ---- what a store remembers ----------------------------------------------------------------------


def remembered(store: Store, what: str, signature: str, shape: Any) -> Any:
    """What a store has kept under a signature, if it is whole and has this shape; or None."""
    with suppress(FileNotFoundError, LevelDamaged):
        return unseal(_memo(store, what, signature), store.files, shape)
    return None


def remember(store: Store, what: str, signature: str, body: dict[str, Any]) -> None:
    """Keep something in a store."""
    path = _memo(store, what, signature)
    make_directory(path.parent, store.files)
    data = sealed({"source": f"strata.cache: {what}", "signature": signature, **body})
    publish.replace(path.parent, path.name, data, store.files)


def _memo(store: Store, what: str, signature: str) -> Path:
    name = fingerprint([f"strata.cache: {what}", signature])[:12]
    return store.root / "sources" / f"{name}.json"


def _array(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), dtype)
