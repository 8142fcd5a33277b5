"""A module at work on tensors without content: shapes, operations and memory, for nothing.

Fake tensors have shapes, strides, dtypes and a device, and kernels give such tensors again; so what
a step would take is known without taking it. The module itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call


@dataclass(frozen=True)
class Faked:
    """A module as a function of fake tensors."""

    module: nn.Module
    state: dict[str, Tensor]
    """Its parameters and buffers, fake."""

    def __call__(self, x: Tensor) -> Any:
        return functional_call(self.module, self.state, (x,))


@contextmanager
def faked(module: nn.Module, shape: Sequence[int]) -> Iterator[tuple[Faked, Tensor]]:
    """The module, and a fake input; inside, new tensors are fake.

    Args:
        shape: (N, C, H, W) of the input, which lies channels last, as inputs do.
    """
    with FakeTensorMode() as fakes:
        state: dict[str, Tensor] = {}
        for name, tensor in _tensors(module):
            fake = fakes.from_tensor(tensor).detach()
            if fake.ndim == 4:  # as the solver lays kernels out
                fake = fake.contiguous(memory_format=torch.channels_last)
            state[name] = fake.requires_grad_(tensor.requires_grad)
        x = torch.empty(*shape, device="cpu").contiguous(memory_format=torch.channels_last)
        yield Faked(module, state), x


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
