"""A module at work on tensors without content: shapes, operations and memory, for nothing.

Fake tensors have shapes, strides, dtypes and a device, and kernels give such tensors again; so what
a step would take is known without taking it. The module itself stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Where a shape does not fit, torch tells so on stderr beside the error that it raises: whoever asks
# has use for the error alone.
logging.getLogger(fake_tensor.__name__).setLevel(logging.CRITICAL)


@contextmanager
def faked(
    module: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Fake parameters and buffers of a module, and a fake input; inside, new tensors are fake.

    ``torch.func.functional_call(module, state, (x,))`` then runs the module on them. ``shape``
    is that of the input, N and a sample's axes. Maps lie channels last, as inputs do.
    """
    with FakeTensorMode() as fakes:
        state: dict[str, Tensor] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            fake = fakes.from_tensor(tensor).detach().to("cpu")  # it may be without content
            if fake.ndim == 4:  # as the solver lays kernels out
                fake = fake.contiguous(memory_format=torch.channels_last)
            state[name] = fake.requires_grad_(tensor.requires_grad)
        x = torch.empty(*shape, dtype=dtype, device="cpu")
        yield state, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
