"""The network of a greedy run, trained end to end: what layerwise training is compared with.

    z = C_γ(x_J),  x_j = ρ W_θ P x_{j-1},  minimised over (θ_1, …, θ_J, γ) at once

The same layers 1 … J and the last auxiliary classifier, under the same solver. Two known ways to
save memory: micro-batches (``Schedule.accumulate``), and checkpointing of activations (Chen et al.
2016): only x_1 … x_J are kept, and what lies between is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strata.stages.network.blocks import AnyLayer
from strata.stages.network.network import build
from strata.stages.network.spec import AuxiliarySpec

NORMS = nn.modules.batchnorm._BatchNorm  # pyright: ignore


class EndToEnd(nn.Module):
    """Layers 1 … J and a classifier, from x_0 (B, C, H, W) to logits z_J."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        auxiliary: nn.Module,
        *,
        checkpointing: bool,
        draws: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self.auxiliary = nn.ModuleList(layers), auxiliary
        self.checkpointing, self.draws = checkpointing, draws

    def forward(self, x: Tensor) -> Tensor:
        again = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = _checkpointed(layer, x, draws=self.draws) if again else layer(x)
        # Not checkpointed: backward begins here, so what it would give up is wanted at once.
        return self.auxiliary(x)


def build_end_to_end(
    layers: Sequence[AnyLayer], auxiliary: AuxiliarySpec, seed: int, *, checkpointing: bool = False
) -> EndToEnd:
    """A freshly initialised network. The same seed gives the same weights on every machine, with
    checkpointing or without."""
    *made, classifier = build([*layers, auxiliary], seed)
    draws = any(layer.draws for layer in layers)
    return EndToEnd(made, classifier, checkpointing=checkpointing, draws=draws)


def _checkpointed(layer: nn.Module, x: Tensor, *, draws: bool) -> Any:
    """One layer, of which only x is kept until backward asks for the rest."""
    return checkpoint(
        layer,
        x,
        use_reentrant=False,
        preserve_rng_state=draws,  # the same again
        context_fn=lambda: (nullcontext(), _running_statistics_stay(layer)),
    )


@contextmanager
def _running_statistics_stay(layer: nn.Module) -> Iterator[None]:
    """Batch norm normalises by its batch as before, and counts it not a second time.

    With momentum 0 the running statistics are multiplied by 1. Taking them away instead would
    change what is saved for backward, and checkpointing insists on the same.
    """
    norms = [part for part in layer.modules() if isinstance(part, NORMS)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
