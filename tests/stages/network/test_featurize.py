"""Frozen layers see samples of any axes as they were trained on them: laid out alike, integers as
integers, and the same value for a row whatever rows are beside it."""

from __future__ import annotations

import pytest
import torch
from forms import FORMS
from torch import Tensor, nn

from strata.stages.features.quantise import Floats
from strata.stages.network.featurize import Frozen, featurize


class Seen(nn.Module):
    """A layer that keeps what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return x.float() * 2


@pytest.mark.parametrize("kind", sorted(FORMS))
def test_what_is_no_map_is_seen_in_the_order_of_its_axes(kind: str) -> None:
    """Also if it lies otherwise, as channels on disk do; a last block is filled up."""
    x = torch.randn(7, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    x = x[:, :, :1, :1] if kind == "vector" else x
    form, axis = FORMS[kind]
    layer, given = Seen(), form(x.contiguous(memory_format=torch.channels_last))
    stored = Floats("float32", axis)
    found = featurize([Frozen(layer, stored, axis)], given, block=4, compute=torch.float32)
    assert torch.equal(found, 2 * given)
    assert layer.x.is_contiguous()
    assert len(layer.x) == 4


def test_maps_are_seen_with_channels_last() -> None:
    layer, stored = Seen(), Floats("float32")
    featurize([Frozen(layer, stored)], torch.ones(4, 3, 2, 5), block=4, compute=torch.float32)
    assert layer.x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_integers_stay_what_they_are(compute: torch.dtype) -> None:
    """Tokens, also those that float32 does not know apart."""
    tokens = torch.tensor([[2**24, 2**24 + 1, 0]] * 5, dtype=torch.int32)
    layer, embedding = Seen(), nn.Embedding.from_pretrained(torch.arange(12.0).view(3, 4))
    featurize([Frozen(layer, Floats("float32"))], tokens, block=2, compute=compute)
    assert layer.x.dtype == torch.int32
    assert layer.x.tolist() == tokens[:2].tolist()
    words = tokens % 3
    found = featurize([Frozen(embedding, Floats("float32", -1))], words, block=2, compute=compute)
    assert torch.equal(found, embedding(words))
