"""What is minimised: a loss of every sample, by its name or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from strata.stages.errors import DataError, UnusableNetwork
from strata.stages.foreign import function, guarded
from strata.stages.network.blocks import Origin
from strata.stages.solve.evaluate import losses


@dataclass(frozen=True)
class SampleLoss:
    """A loss. Logits are (n, classes) and labels int64 (n,), or of tokens one axis more; ``bce``
    and ``mse`` have labels float32 (n, classes), or (n,) where there is one output."""

    kind: str = "cross-entropy"
    """``cross-entropy``, ``bce``, ``mse`` or ``own``."""
    own: Callable[[Tensor, Tensor], Tensor] | None = None
    """A user's: float32 logits and labels to the loss of every sample, (n,)."""
    title: str = ""
    """The name of a user's, for messages."""

    def total(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Σ over the samples; of tokens a sample has their mean. Errors as in :meth:`each`.

        Args:
            smoothing: share of a label that is spread over all classes, of cross-entropy.
        """
        if self.kind != "cross-entropy":
            return self.each(logits, labels).sum()
        check_logits(logits.shape, labels.shape)
        z, y = logits.flatten(0, -2), labels.flatten()
        total = F.cross_entropy(z, y, reduction="sum", label_smoothing=smoothing)
        return total / labels[:1].numel()

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of every sample, (n,), of all but cross-entropy.

        Raises:
            DataError: labels and logits do not go together.
            UnusableNetwork: a user's function fails, or gives something else.
        """
        if self.own is not None:
            if not labels.is_floating_point():
                check_logits(logits.shape, labels.shape)
            with guarded(self.title):
                found = self.own(logits, labels)
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            if isinstance(found, Tensor) and logits.requires_grad > found.requires_grad:
                raise UnusableNetwork(f"{self.title} gives what no gradient can come from")
            if shape != [len(labels)]:
                raise UnusableNetwork(
                    f"{self.title} gives {shape} for {len(labels)} samples; it must give a tensor "
                    f"with the loss of every sample, {[len(labels)]}: leave its reduction out"
                )
            return found
        if labels.numel() != logits.numel() or not labels.is_floating_point():
            raise DataError(
                f"the loss {self.kind} wants as many numbers for a sample as the classifier gives, "
                f"{list(logits.shape[1:])}, and labels are {labels.dtype} {list(labels.shape[1:])}"
            )
        compare = F.mse_loss if self.kind == "mse" else F.binary_cross_entropy_with_logits
        wanted = labels.reshape(logits.shape).to(logits.dtype)
        return compare(logits, wanted, reduction="none").flatten(1).mean(1)

    def of_arrays(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The loss of every sample as it is judged, without smoothing: float64 (n,). Errors as in
        :meth:`each`."""
        if self.kind == "cross-entropy":
            return losses(logits, labels)
        z, y = torch.from_numpy(logits), torch.from_numpy(labels)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return self.each(z if self.own else z.double(), y).double().numpy()


def loss_of(name: str | Origin) -> SampleLoss:
    """The loss that a recipe names. Raises UnusableNetwork: a user's file has no such function."""
    if isinstance(name, str):
        return SampleLoss(name)
    title = f"loss {name.name}"
    return SampleLoss("own", function(title, name.name, name.code or "", name.folder), title)


def check_targets(name: str, kind: str, labels: np.ndarray, outputs: int) -> None:
    """Refuse labels that a loss is not for. Raises DataError.

    Args:
        name, kind: of the loss, as a recipe and as :class:`SampleLoss` has it.
        labels: of all training samples.
        outputs: numbers that a classifier gives for a sample.
    """
    floats, width = labels.dtype.kind == "f", labels.shape[1] if labels.ndim > 1 else 1
    of_numbers = kind in ("bce", "mse")
    there = f"numbers, {width} for each sample" if floats else "class labels"
    is_said = f"'loss.name' is {name!r}, and the labels are {there}"
    if kind != "own" and floats != of_numbers:
        raise DataError(
            f"{is_said}: cross-entropy is of class labels, bce (several classes at once) and "
            "mse of numbers"
        )
    if of_numbers and width != outputs:
        raise DataError(f"{is_said}: set 'data.classes', which is {outputs}, to {width}")
    low, high = (labels.min(), labels.max()) if floats else (0, 1)
    if kind == "bce" and not 0 <= low <= high <= 1:
        raise DataError(f"{is_said}, from {low:g} to {high:g}: those of bce are in 0 … 1")


def check_logits(logits: Sequence[int], labels: Sequence[int]) -> None:
    """Raise DataError where a classifier does not give logits for every label, by their shapes."""
    if tuple(logits[:-1]) != tuple(labels):
        given, wanted = list(logits[1:-1]), list(labels[1:])
        raise DataError(
            f"a sample has labels of shape {wanted}, and its classifier gives logits for {given}: "
            "'data.targets' says what has a label, and blocks must keep as many tokens as there are"
        )
