"""Gradients of large kernels, found and added to a total in parts: none is ever there whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from strata.stages.network.convolving import PART, channels_at_once

TotalOf = Callable[[Tensor], Tensor]
"""The tensor, of a kernel's shape, that a kernel's gradient is to be added to."""


@contextmanager
def in_parts(network: nn.Module, total_of: TotalOf) -> Iterator[None]:
    """Inside, the convolutions of a network that have large kernels add each kernel's gradient to
    its total in the backward pass, some output channels at a time; ``.grad`` stays None. What they
    compute is the same. Only ``nn.Conv2d`` of one group, padded with zeros, does so."""
    changed = [part for part in network.modules() if _is_large(part)]
    for part in changed:
        part._conv_forward = partial(_convolved, part, total_of)  # pyright: ignore
    try:
        yield
    finally:
        for part in changed:
            del part._conv_forward


def _is_large(part: nn.Module) -> bool:
    kernel = part._parameters.get("weight")
    return (
        isinstance(part, nn.Conv2d)
        and getattr(part._conv_forward, "__func__", None) is nn.Conv2d._conv_forward
        and part.groups == 1
        and part.padding_mode == "zeros"
        and not isinstance(part.padding, str)
        and kernel is not None
        and kernel.requires_grad
        and kernel.nbytes > PART
    )


def _convolved(
    part: nn.Conv2d, total_of: TotalOf, x: Tensor, kernel: Tensor, bias: Tensor | None
) -> Tensor:
    """``part._conv_forward(x, kernel, bias)``."""
    if kernel is not part._parameters["weight"] or not torch.is_grad_enabled():
        return nn.Conv2d._conv_forward(part, x, kernel, bias)
    kind, dtype = x.device.type, kernel.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        settings = part.stride, part.padding, part.dilation
        # Of the parameter itself: checkpointing saves another tensor in its place.
        total = partial(total_of, kernel)
        return _Convolution.apply(x.to(dtype), kernel, bias, total, settings)  # pyright: ignore


class _Convolution(torch.autograd.Function):
    """A convolution in the dtype of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        total: Callable[[], Tensor],
        settings: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.total, ctx.settings = total, settings
        return torch.conv2d(
            x, kernel.to(x.dtype), None if bias is None else bias.to(x.dtype), *settings
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (gradient,), (x, kernel) = gradients, ctx.saved_tensors
        total, size = ctx.total(), channels_at_once(len(kernel), kernel[0].nbytes)
        for part, below in zip(total.split(size), gradient.split(size, 1), strict=True):
            part.add_(conv2d_weight(x, part.shape, below, *ctx.settings))
        wanted, _, biased, *_ = ctx.needs_input_grad
        found = None
        if wanted:
            found = conv2d_input(x.shape, kernel.to(x.dtype), gradient, *ctx.settings)
        return found, None, gradient.sum((0, 2, 3)) if biased else None, None, None
