"""SGD whose large gradients go straight into the momentum.

    v ← m v + λ w,  v ← v + ∂loss/∂w of each micro-batch,  w ← w - η v

The steps are those of torch.optim.SGD but for the order of sums. A gradient is there while it is
added, and of a large kernel only a part: a step takes weights, momentum, and little else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strata.stages.network.convolving import WHOLE
from strata.stages.network.kernels import in_parts


class StraightSGD(torch.optim.SGD):
    """torch.optim.SGD without Nesterov; large gradients are taken while :meth:`collecting`."""

    def __init__(self, parameters: Any, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._begun: dict[Tensor, Tensor] = {}

    @contextmanager
    def collecting(self, network: nn.Module) -> Iterator[None]:
        """Inside, backward passes of a network add to the momentum of :meth:`step`, and leave none
        but small gradients."""
        with ExitStack() as stack:
            stack.enter_context(in_parts(network, self.total_of))
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.requires_grad and parameter.nbytes > WHOLE:
                        hook = parameter.register_post_accumulate_grad_hook(self._take)
                        stack.callback(hook.remove)
            yield

    @property
    def sums(self) -> list[Tensor]:
        """What the step under way has added up: momentum, and small gradients."""
        (group,) = self.param_groups
        return [*self._begun.values(), *(p.grad for p in group["params"] if p.grad is not None)]

    @torch.no_grad()
    def total_of(self, parameter: Tensor) -> Tensor:
        """What gradients of a parameter are added to, in this step."""
        if parameter not in self._begun:
            (group,) = self.param_groups
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            total = self._begun[parameter] = state["momentum_buffer"].mul_(group["momentum"])
            if group["weight_decay"]:
                total.add_(parameter, alpha=group["weight_decay"])
        return self._begun[parameter]

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # of a large kernel, the parts were added already
            self.total_of(parameter).add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change the weights by the momentum. As in its base class, what had no gradient stays."""
        super().step()
        (group,) = self.param_groups
        for parameter, total in self._begun.items():
            parameter.add_(total, alpha=-group["lr"])
        self._begun.clear()
        if not group["momentum"]:
            self.state.clear()
