"""Processes that solve one problem together: data-parallel SGD, each on its part of every batch.

Every rank has the same weights, is fed an equal part of every (micro-)batch, and takes the same
step: gradients are averaged, batch norm is over all parts. So the result is that of one process but
for the order in which floats are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strata.stages.errors import StageError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among those of a process group; by default the only one, which needs none."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Is it the one that writes and speaks?"""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def total(self, *values: float) -> list[float]:
        """Sums over the ranks, in float64."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Does one of them say so?"""
        return bool(self.total(flag)[0])

    def by_leader(self, find: Callable[[], T]) -> T:
        """What the leading rank finds, given to all; the others do not look."""
        if self.count == 1:
            return find()
        found = [find() if self.leads else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]  # pyright: ignore[reportReturnType]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over the ranks, in place: dense ones, which lie alike on every rank."""
        if self.count == 1:
            return
        for tensor in tensors:
            flat = tensor.as_strided((tensor.numel(),), (1,))  # kernels lie channels last
            dist.all_reduce(flat)
            flat.div_(self.count)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, of equal size, one after another: the whole (micro-)batch."""
        if self.count == 1:
            return part
        flat = part.contiguous().flatten().view(torch.uint8)  # of any dtype
        parts = [torch.empty_like(flat) for _ in range(self.count)]
        dist.all_gather(parts, flat)
        return torch.cat(parts).view(part.dtype).view(-1, *part.shape[1:])

    def share_norms(self, network: nn.Module, device: torch.device) -> None:
        """Let every batch norm in a network be over all ranks, with the parameters that it has.

        Raises StageError where one has no weights or no running averages.
        """
        if self.count > 1 and device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return
        for name, norm in network.named_modules() if self.count > 1 else ():
            if type(norm) in NORMS:
                if not norm.affine or norm.momentum is None or not norm.track_running_stats:
                    raise StageError(
                        f"{name} is {norm}: several ranks need weights and averages in it"
                    )
                norm.__class__ = NormOverRanks  # in place: by name it stays what the records know


NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


class _Sum(torch.autograd.Function):
    """Σ over the ranks; so is its gradient, since every rank's loss depends on every part."""

    @staticmethod
    def forward(ctx: object, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:  # pyright: ignore
        whole = gradients[0].clone()
        dist.all_reduce(whole)
        return whole


class NormOverRanks(nn.BatchNorm2d):
    """Batch norm over the parts of all ranks, of equal size; on a CPU, for which torch's
    SyncBatchNorm is not made. In eval mode it is its base class, of inputs with any axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Of a batch norm of one and of three dimensions the base class is another."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, …), float32 or what autocast makes of it; the same comes back."""
        if not self.training:
            return super().forward(input)
        x, ranks = input.float(), dist.get_world_size()
        count, along = ranks * x.numel() // x.shape[1], (-1, *(1,) * (x.ndim - 2))
        axes = (0, *range(2, x.ndim))
        mean = _Sum.apply(x.sum(axes)) / count
        centred = x - mean.view(along)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(along) + self.bias.view(along)).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """The running statistics, as torch.nn.BatchNorm2d keeps them."""
        assert self.momentum is not None
        assert self.running_mean is not None
        self.num_batches_tracked.add_(1)  # pyright: ignore
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)  # pyright: ignore
