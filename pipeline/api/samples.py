"""Reading a map-style data set of the caller's: what a module sees of every sample, and its label.

Whatever a data set or transform draws from torch, numpy and random follows from (seed, view,
sample): so a sample is the same at each reading, in this process or in a worker, and the caller's
generators stay where they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from strata.pipeline.api.identity import bytes_digest
from strata.stages import foreign
from strata.stages.errors import DataError
from strata.store.read.order import key_of

SUM = 32
"""Bytes of a sum, sha256."""
NONE = -1
"""The label of samples that have none."""
HINT = "give transform=, for example torchvision.transforms.ToTensor()"


class Batch(NamedTuple):
    """Some samples as a module sees them."""

    numbers: np.ndarray
    """int64 (n,): which they are."""
    x: Tensor
    """(n, …), on the CPU."""
    y: np.ndarray
    """int64 or float32, (n,) or (n, values)."""
    sums: np.ndarray
    """uint8 (n, SUM): sha256 of each sample and its label."""
    form: str
    """Shape and dtype of each sample and label."""


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """A data set with the draws of one view fixed."""

    data: Any
    transform: Callable[[Any], Any] | None
    seed: int
    view: int
    workers: int

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, np.ndarray, bytes] | DataError:
        """x, y and sha256 of a sample; an error is handed on as a value, out of a worker, too."""
        with foreign.drawing() as seeded:
            seeded(key_of("view", self.seed, self.view, i) % 2**63)
            try:
                return self._seen(self.data[i], i)
            except DataError as error:
                return error
            except Exception as error:  # whatever data sets of others raise
                said = f"sample {i} of the data set cannot be read: {foreign.told(error)}"
                return DataError(said)

    def read(self, blocks: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Samples by their numbers, block by block.

        Raises:
            DataError: a sample cannot be read, or is none that a module can be given.
        """
        loader = DataLoader(
            self,
            batch_sampler=[numbers.tolist() for numbers in blocks],
            num_workers=self.workers,
            collate_fn=list,
            generator=torch.Generator(),  # or it would draw from the caller's
        )
        for numbers, found in zip(blocks, loader, strict=True):
            for one in found:
                if isinstance(one, DataError):
                    raise one
            yield _stacked(numbers, found)

    def _seen(self, sample: Any, i: int) -> tuple[Tensor, np.ndarray, bytes]:
        pair = isinstance(sample, tuple | list)
        if isinstance(sample, dict) or (pair and not 1 <= len(sample) <= 2):
            what = f"a dict of {', '.join(map(str, sample))}" if isinstance(sample, dict) else ""
            raise DataError(
                f"sample {i} of the data set is {what or f'{len(sample)} things'}; it must be x "
                "or (x, y): wrap the data set"
            )
        x, y = (*sample, None)[:2] if pair else (sample, None)
        x = self.transform(x) if self.transform else x
        x = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
        if not isinstance(x, Tensor):
            kind = "a PIL image" if isinstance(x, Image.Image) else f"of type {type(x).__name__}"
            raise DataError(f"sample {i} of the data set is {kind}, and no tensor: {HINT}")
        label = _label(y, i)
        said = f"{x.dtype} {tuple(x.shape)} {bytes_digest(x)} {label.dtype} {label.shape}\n"
        return x, label, hashlib.sha256(said.encode() + label.tobytes()).digest()


def _label(y: Any, i: int) -> np.ndarray:
    """int64 or float32, of no or one axis."""
    array = np.asarray(NONE if y is None else y.cpu() if isinstance(y, Tensor) else y)
    if array.dtype.kind not in "iubf" or array.ndim > 1:
        raise DataError(
            f"the label of sample {i} is {str(y)[:60]!r}; it must be a number or a vector of them"
        )
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def _stacked(numbers: np.ndarray, found: Sequence[tuple[Tensor, np.ndarray, bytes]]) -> Batch:
    forms = [_form(x, y) for x, y, _ in found]
    for number, form in zip(numbers, forms, strict=True):
        if form != forms[0]:
            raise unlike(number, form, numbers[0], forms[0])
    x, y = torch.stack([one[0] for one in found]), np.stack([one[1] for one in found])
    sums = np.frombuffer(b"".join(one[2] for one in found), np.uint8)
    return Batch(numbers, x, y, sums.reshape(-1, SUM), forms[0])


def _form(x: Tensor, y: np.ndarray) -> str:
    return f"x {tuple(x.shape)} {x.dtype}, y {y.shape} {y.dtype}"


def unlike(number: int, form: str, other: int, wanted: str) -> DataError:
    """Two samples have not the same shapes and dtypes."""
    text = f"sample {number} is {form}; sample {other} is {wanted}"
    return DataError(f"{text}. They must be alike: a transform can make them so")
