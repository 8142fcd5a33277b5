"""The network of a greedy run, trained end to end: what layerwise training is compared with.

    z = C_γ(x_J),  x_j = ρ W_θ P x_{j-1},  minimised over (θ_1, …, θ_J, γ) at once

The same layers 1 … J and the last auxiliary classifier, under the same solver. Two known ways to
save memory: micro-batches (``Schedule.accumulate``), and checkpointing of activations (Chen et al.
2016): only x_1 … x_J are kept, and what lies between is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from strata.stages.network.blocks import AnyLayer
from strata.stages.network.network import build, checkpointed
from strata.stages.network.spec import AuxiliarySpec


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
            x = checkpointed(layer, x, draws=self.draws) if again else layer(x)
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
