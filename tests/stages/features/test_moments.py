"""What channels hold, part by part, against numpy on all of it at once."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from forms import FORMS
from hypothesis import given, settings
from hypothesis import strategies as st

from strata.stages.features.moments import Moments


def maps(rows: int, *, shift: float = 0.0, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.relu(torch.randn(rows, channels, 4, 5, generator=generator)) + shift


def parts(x: torch.Tensor, cuts: list[int]) -> Moments:
    ends = [*sorted({cut % len(x) for cut in cuts} - {0}), len(x)]
    begins = [0, *ends[:-1]]
    pairs = zip(begins, ends, strict=True)
    return reduce(Moments.merged, (Moments.of(x[begin:end]) for begin, end in pairs))


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 100), max_size=6), st.sampled_from([0.0, 1e4]))
def test_parts_merged_are_the_whole(rows: int, cuts: list[int], shift: float) -> None:
    """Also where the mean is ten thousand deviations from 0, and sums of squares would cancel."""
    x = maps(rows, shift=shift)
    found, all_of = parts(x, cuts), x.double().permute(1, 0, 2, 3).flatten(1).numpy()
    assert found.count == all_of.shape[1]
    np.testing.assert_allclose(found.mean, all_of.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.deviation, all_of.std(1), rtol=1e-9)
    assert (found.minimum == all_of.min(1)).all()
    assert (found.maximum == all_of.max(1)).all()
    assert (found.zeros == (all_of == 0).sum(1)).all()


def test_channels_together_are_one_channel() -> None:
    x = maps(7)
    one = Moments.of(x.reshape(7, 1, -1, 1))
    together = Moments.of(x).together()
    assert together.count == one.count
    assert together.mean[0] == pytest.approx(one.mean[0])
    assert together.deviation[0] == pytest.approx(one.deviation[0])
    assert (together.minimum, together.maximum) == (one.minimum, one.maximum)
    assert together.zeros == one.zeros


def test_a_channel_is_dead_if_it_never_says_anything() -> None:
    x = maps(5)
    x[:, 1] = 0
    x[:4, 2] = 0
    assert Moments.of(x).dead == 1


@pytest.mark.parametrize("kind", sorted(FORMS))
def test_channels_of_samples_of_any_axes_are_counted(kind: str) -> None:
    x, (form, axis) = maps(6), FORMS[kind]
    x = x[:, :, :1, :1] if kind == "vector" else x
    for name, found in vars(Moments.of(form(x), axis)).items():
        np.testing.assert_allclose(found, getattr(Moments.of(x), name), rtol=1e-12)


def test_large_integers_are_counted_exactly() -> None:
    tokens = torch.tensor([[2**24 + 1, 2**31 - 1], [2**24 + 1, 0]], dtype=torch.int32)
    found = Moments.of(tokens)
    assert found.maximum.tolist() == [2**24 + 1, 2**31 - 1]
    assert found.mean[0] == 2**24 + 1
    assert found.deviation[0] == 0
    assert found.zeros.tolist() == [0, 1]


def test_images_are_counted_as_they_are() -> None:
    x = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    assert Moments.of(x).mean.tolist() == [7.5, 11.5, 15.5]
