"""Opening a data set by the word that a recipe or ``--data`` names it with, and dividing one that
has no test split."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from strata.stages.data.archives import open_imagefolder
from strata.stages.data.arrays import fitted, open_npz
from strata.stages.data.datasets import open_python
from strata.stages.data.shards import open_webdataset
from strata.stages.data.sources import (
    Form,
    Source,
    channels_last,
    hush_pillow,
    open_digits,
    stamp,
    suggest,
    summary,
)
from strata.stages.data.tables import open_csv, open_hf
from strata.stages.data.zoo import open_torchvision
from strata.stages.errors import DataError
from strata.stages.home import home, place_of

FORMS = ("digits", "torchvision:NAME", "imagefolder:PATH", "npz:PATH", "csv:FILE", "hf:PATH")
FORMS += ("webdataset:PATTERN", "python:FILE.py:FUNCTION")
"""What names a data set."""
_IMAGES = ("digits", "torchvision", "imagefolder")


def open_source(
    spec: str, *, root: Path, download: bool = False, form: Form | None = None
) -> Source:
    """The data source that `spec` names; close it, or use it in a with statement.

    It has a train and a test split: where the data has none to test with, `form` says which share
    is drawn for it, and is not asked otherwise. Samples are images, or, where `form` has a shape,
    arrays of it. Arguments as in `open_whole`. Raises DataError when `spec` is no data set or the
    data is unfit.
    """
    shaped = form if form and form.shape else None
    if shaped and spec.partition(":")[0] in _IMAGES:
        raise DataError(f"{spec} holds images; 'data.shape' is for arrays (npz:PATH, …)")
    source = open_whole(spec, root=root, download=download, form=form)
    try:
        source = _divided(source, form)
        source.form = shaped
        _check_first(source)
    except BaseException:
        source.close()
        raise
    return source


def open_whole(
    spec: str, *, root: Path, download: bool = False, form: Form | None = None
) -> Source:
    """The data source that `spec` names, as it lies there: with a test split or without.

    digits is scikit-learn's, its last 360 samples the test split; torchvision:NAME reads files
    under `root` and fetches them only where `download` is True; imagefolder:PATH is a directory
    or tar of class folders, under train/ and test/ (or val/) or alone; npz:PATH holds arrays; csv:,
    hf:, webdataset: and python: are as `open_csv`, `open_hf`, `open_webdataset` and `open_python`
    say. Raises DataError.
    """
    kind, _, rest = spec.partition(":")
    targets = form.targets if form and form.shape else "sample"
    if spec == "digits":
        return open_digits()
    if kind == "torchvision" and rest:
        return open_torchvision(rest, root, download)
    _, path, more = place_of(spec)
    openers: dict[str, Callable[[], Source]] = {
        "imagefolder": lambda: open_imagefolder(home(path)),
        "npz": lambda: open_npz(home(path), form),
        "csv": lambda: open_csv(home(path), targets),
        "hf": lambda: open_hf(home(path), more[1:], targets),
        "webdataset": lambda: open_webdataset(path, targets),
        "python": lambda: open_python(home(path), more[1:], targets),
    }
    if path and kind in openers:
        return openers[kind]()
    kinds = [form.partition(":")[0] for form in FORMS]
    near = "" if kind in kinds else suggest(kind, kinds)
    raise DataError(f"unknown data source {spec!r}, must be {', '.join(FORMS)}.{near}")


def _check_first(source: Source) -> None:
    """Raise DataError where not even the first array fits; broken samples are named later."""
    hush_pillow()
    try:
        array = source.open_sample("train", 0)[1]
    except Exception:
        return
    if isinstance(array, np.ndarray) and np.isfinite(array).all():
        try:
            fitted(array, source.form) if source.form else channels_last(array)
        except ValueError as error:
            raise DataError(f"{source.title}: {source.name('train', 0)}: {error}") from error


def _divided(source: Source, form: Form | None) -> Source:
    if "test" in source.splits:
        return source
    share = form.split if form else 0.0
    if not share:
        beside = f" Left out: {summary(source.left_out)}." * bool(source.left_out)
        raise DataError(
            f"{source.title} has {source.without_test}.{beside} Pass --split 0.2, or set "
            f"data.split = 0.2 in the recipe: a fifth of its {source.count('train'):,} samples is "
            "drawn to test with"
        )
    return Divided(source, share, form.split_seed if form else 0)


class Divided(Source):
    """A source without a test split, of which a share is drawn for one: of every class, or of all
    samples where labels are no single classes.

    The draw goes by the name of the sample and `seed` alone, so samples that are added leave the
    others where they are. A class keeps at least one sample to train on.
    """

    def __init__(self, source: Source, share: float, seed: int) -> None:
        labels = source.labels("train")
        named = (f"{seed}\0{source.name('train', i)}" for i in range(len(labels)))
        keys = [sha256(name.encode("utf-8", "surrogateescape")).digest() for name in named]
        order = np.argsort(keys, kind="stable")
        alike = labels if labels.ndim == 1 and not source.of_numbers else np.zeros(len(labels), int)
        tested = np.zeros(len(labels), bool)
        for kind in np.unique(alike):
            drawn = order[alike[order] == kind]
            tested[drawn[: min(len(drawn) - 1, max(1, round(share * len(drawn))))]] = True
        self._rows = {"train": np.flatnonzero(~tested), "test": np.flatnonzero(tested)}
        by_split = {split: labels[rows] for split, rows in self._rows.items()}
        super().__init__(source.title, by_split, source.classes)
        self._whole, self._marks = source, ("split", str(share), str(seed))
        self.left_out = source.left_out

    def name(self, split: str, i: int) -> str:
        return self._whole.name("train", int(self._rows[split][i]))

    def open_sample(self, split: str, i: int) -> tuple[bytes, Image.Image | np.ndarray]:
        return self._whole.open_sample("train", int(self._rows[split][i]))

    def signature(self) -> str:
        return stamp((*self._marks, self._whole.signature()), ())

    def close(self) -> None:
        self._whole.close()
