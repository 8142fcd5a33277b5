"""Removing filters of a layer by the Taylor criterion (Molchanov et al., 2016; paper Sec. 4.3).

A filter of layer j is what makes one channel of x_j: a kernel of W, its bias, and what batch norm
knows of it. Once it is gone, its channel is gone from x_j, and from all that C_γ and layer j + 1
would have done with it. What is left computes what the whole problem would with that channel at 0.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from strata.stages.network.blocks import AnyLayer
from strata.stages.network.network import Problem, build_problem
from strata.stages.network.spec import AuxiliarySpec
from strata.stages.solve.ranks import Ranks

SCALE = 1024.0
"""Factor on the loss, so that gradients in float16 do not vanish; normalising takes it away."""


def taylor(
    problem: Problem,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    compute: torch.dtype,
    ranks: Ranks | None = None,
) -> Tensor:
    """How much the loss would change without each filter, to first order (Molchanov's Eq. 8 and 9).

    Of every example, |mean over pixels of x_j · ∂loss/∂x_j| per channel; of these the mean over the
    examples; divided by the l2 norm over the layer's filters. In eval mode, so that an example's
    part does not depend on the batch it is in.

    Args:
        batches: x_{j-1} (B, C, H, W) float and labels (B,) int64, on the device; at least one.
        compute: dtype of the convolutions.
        ranks: those who judge together, each on its part of the batches; None: this one alone.

    Returns:
        float64 (width,) on the CPU, the same on every rank; all 0 where no filter matters.
    """
    was_training = problem.training
    problem.eval()
    total = torch.zeros(problem.filters, dtype=torch.float64)
    examples = 0
    for x, y in batches:
        total += _changes(problem, x, y, device, compute).double().sum(0).cpu()
        examples += len(y)
    problem.train(was_training)
    *sums, count = (ranks or Ranks()).total(*total.tolist(), examples)
    mean = torch.tensor(sums, dtype=torch.float64) / count
    return mean / mean.norm().clamp_min(torch.finfo(torch.float64).tiny)


def _changes(
    problem: Problem, x: Tensor, y: Tensor, device: torch.device, compute: torch.dtype
) -> Tensor:
    """float32 (B, width): by how much the loss would change, of every example and channel."""
    with torch.autocast(device.type, compute, enabled=compute != torch.float32):
        with torch.no_grad():
            features = problem.layer(x.contiguous(memory_format=torch.channels_last))
        features.requires_grad_()
        logits = problem.auxiliary(features)
    loss = nn.functional.cross_entropy(logits.float(), y, reduction="sum")
    (gradient,) = torch.autograd.grad(SCALE * loss, features)
    return gradient.float().mul_(features.detach()).mean((2, 3)).abs_()


def strongest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` filters with the highest scores, int64, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def narrowed(problem: Problem, layer: AnyLayer, auxiliary: AuxiliarySpec, kept: Tensor) -> Problem:
    """The problem with the kept filters alone: physically smaller, the weights as they were.

    ``layer`` and ``auxiliary`` are of the narrower problem, with as many filters as are ``kept``:
    their numbers, int64, ascending.
    """
    found = build_problem(layer, auxiliary, None)
    # Kernels, biases and batch norm by filter; what batch norm counts is one number for all.
    layer_state = problem.layer.state_dict()
    found.layer.load_state_dict(
        {name: t[kept.to(t.device)] if t.dim() else t for name, t in layer_state.items()}
    )
    found.auxiliary.load_state_dict(_columns(problem.auxiliary.state_dict(), problem.filters, kept))
    return found.train(problem.training)


def _columns(auxiliary: dict[str, Tensor], channels: int, kept: Tensor) -> dict[str, Tensor]:
    """The state of C whose first map, convolution or linear, sees the kept channels alone.

    A linear one sees x_j averaged (or pooled) and flattened: all pixels of channel 0, then all of
    channel 1, and so on. So lie its columns.
    """
    first = next(name for name in auxiliary if name.endswith("weight"))
    by_channel = auxiliary[first].unflatten(1, (channels, -1))
    return auxiliary | {first: by_channel[:, kept.to(by_channel.device)].flatten(1, 2)}
