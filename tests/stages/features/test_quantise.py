"""Stored forms: rounding once is rounding for good, nothing wraps, and an outlier ruins nothing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from forms import FORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import examples
from torch import Tensor

from strata.stages.errors import NotFinite
from strata.stages.features import calibrate as calibration
from strata.stages.features.calibrate import Calibration, calibrate
from strata.stages.features.quantise import LEVELS, Codec, Floats, Quantiser, codec
from strata.stages.network.featurize import Frozen, featurize
from strata.stages.network.network import build
from strata.stages.network.spec import LayerSpec

CODES = sorted(LEVELS)
PRECISIONS = ["float32", "float16", "bfloat16", *CODES]
FEW = settings(max_examples=examples(60), deadline=None)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def maps(draw: Callable, orders: int = 3) -> Tensor:
    """(B, C, H, W): channels of either sign or none, over a few orders of magnitude, some dead."""
    shape = [draw(st.integers(1, top)) for top in (4, 4, 3, 9)]
    x = normal(draw(st.integers(0, 2**32)), *shape)
    for c in range(shape[1]):
        kind = draw(st.sampled_from(["signed", "positive", "negative", "dead"]))
        part = x[:, c]
        x[:, c] = {
            "signed": part,
            "positive": part.relu(),
            "negative": -part.relu(),
            "dead": part * 0,
        }[kind] * 10.0 ** draw(st.integers(-orders, orders))
    return x


def codec_for(precision: str, x: Tensor, percentile: float = 99.0) -> Codec:
    if precision in LEVELS:
        return calibrate([x], precision, percentile).quantiser
    return codec(precision, {})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of stored forms, or of values, whatever dtype those are held in."""
    one, other = (t.float() if t.is_floating_point() else t for t in (a, b))
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


# --- stored and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@given(x=maps(), other=maps())
@FEW
def test_rounding_what_is_rounded_changes_nothing(precision: str, x: Tensor, other: Tensor) -> None:
    """Also values that the scales were not made for: they are clipped, and stay where they are."""
    stored = codec_for(precision, x)
    beyond = torch.cat([x, 3 * x, -x, x + other.abs().max()])
    once = stored.decode(stored.encode(beyond), beyond.shape[1])
    assert same_bits(once, stored.rounded(beyond))
    assert same_bits(stored.encode(once), stored.encode(beyond))
    assert same_bits(stored.rounded(once), once)


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("order", [-42, -38, -30, 30, 38])
def test_scales_at_the_ends_of_float32_round_for_good_too(precision: str, order: int) -> None:
    x = normal(0, 3, 2, 5, 5) / 4 * 10.0**order
    stored = codec_for(precision, x, 100.0)
    once = stored.rounded(x)
    assert torch.isfinite(once).all()
    assert same_bits(stored.rounded(once), once)


@pytest.mark.parametrize("precision", CODES)
@given(x=maps())
@FEW
def test_the_error_is_half_a_step_and_the_poison_is_never_made(precision: str, x: Tensor) -> None:
    stored = calibrate([x], precision, 100.0).quantiser
    step = stored.scale[:, None, None].double()
    assert ((stored.rounded(x).double() - x.double()).abs() <= step * (0.5 + 1e-4)).all()
    outside = torch.cat([x, 1e6 * x, -1e6 * x])
    codes = stored.encode(outside)
    assert codes.dtype == torch.uint8
    if precision == "uint8":
        assert int(codes.max()) <= 254
    else:
        assert codes.shape[1] == -(-x.shape[1] // 2)
        assert int((codes & 15).max()) <= 14
        assert int((codes >> 4).max()) <= 14


@pytest.mark.parametrize("precision", PRECISIONS)
@given(x=maps())
@FEW
def test_zero_is_exact_and_a_value_does_not_depend_on_its_batch(precision: str, x: Tensor) -> None:
    stored = codec_for(precision, x)
    assert not stored.rounded(torch.zeros_like(x)).any()
    for row, alone in zip(stored.encode(x).split(1), x.split(1), strict=True):
        assert same_bits(row, stored.encode(alone))
    strided = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(stored.rounded(strided), stored.rounded(x))


@pytest.mark.parametrize("kind", sorted(FORMS))
@pytest.mark.parametrize("precision", PRECISIONS)
@given(x=maps(), percentile=st.sampled_from([90.0, 100.0]))
@FEW
def test_samples_of_any_axes_are_stored_as_maps_are(
    precision: str, kind: str, x: Tensor, percentile: float
) -> None:
    """Value for value, with the same scales, in one piece of memory where axes are in order."""
    form, axis = FORMS[kind]
    x = x[:, :, :1, :1] if kind == "vector" else x
    known = codec_for(precision, x, percentile)
    stored: Codec = Floats(precision, axis)
    if precision in LEVELS:
        stored = calibrate([form(x)], precision, percentile, axis).quantiser
        for name, tensor in known.tensors().items():
            assert torch.equal(tensor, stored.tensors()[name])
    assert same_bits(stored.rounded(form(x)), form(known.rounded(x)))
    codes = stored.encode(form(x))
    assert same_bits(codes, form(known.encode(x)))
    values = stored.decode(codes, x.shape[1])
    assert same_bits(values, form(known.decode(known.encode(x), x.shape[1])))
    assert values.is_contiguous()
    assert values.shape == form(x).shape
    out = torch.empty_like(values)
    assert stored.values(stored.unpacked(codes, x.shape[1]), out) is out
    assert same_bits(out, values)


@given(x=maps(orders=30))
@FEW
def test_bfloat16_is_kept_as_its_bits(x: Tensor) -> None:
    stored = Floats("bfloat16")
    bits = stored.encode(x)
    assert bits.dtype == torch.uint16
    assert torch.equal(stored.decode(bits, x.shape[1]), x.to(torch.bfloat16).float())
    as_numpy = (bits.numpy().astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(as_numpy, x.to(torch.bfloat16).float().numpy())


def test_two_codes_share_a_byte_the_first_in_its_low_bits() -> None:
    stored = Quantiser("uint4", torch.ones(5), torch.zeros(5, dtype=torch.uint8))
    x = torch.tensor([1.0, 2.0, 14.0, 99.0, 3.0]).view(1, 5, 1, 1)
    assert stored.encode(x).flatten().tolist() == [0x21, 0xEE, 0x03]
    assert stored.decode(stored.encode(x), 5).flatten().tolist() == [1, 2, 14, 14, 3]


@pytest.mark.parametrize("precision", CODES)
def test_ties_go_to_even_codes(precision: str) -> None:
    stored = Quantiser(precision, torch.tensor([1.0]), torch.tensor([4], dtype=torch.uint8))
    x = torch.tensor([[[[0.5, 1.5, 2.5, -0.5, -1.5, -9.0]]]])
    assert stored.rounded(x).flatten().tolist() == [0, 2, 2, 0, -2, -4]


# --- what cannot be stored -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_sample_and_channel(precision: str, value: float) -> None:
    x = normal(0, 6, 3, 4, 5)
    stored = codec_for(precision, x)
    x[4, 2, 3, 1] = value
    for refuse in (stored.encode, stored.rounded):
        with pytest.raises(NotFinite, match=f"sample 4 .*channel 2, which {precision}") as caught:
            refuse(x)
        assert (caught.value.sample, caught.value.channel) == (4, 2)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", sorted(FORMS))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_of_what_is_no_map_the_channel_is_named_too(precision: str, kind: str) -> None:
    x = normal(0, 6, 3, 1, 1)
    form, axis = FORMS[kind]
    scales = {"scale": torch.ones(3), "zero": torch.zeros(3, dtype=torch.uint8)}
    x[4, 2] = float("nan")
    with pytest.raises(NotFinite, match=r"sample 4 .*channel 2, which"):
        codec(precision, scales, axis).encode(form(x))


def test_float16_refuses_what_the_others_hold() -> None:
    x = torch.full((1, 1, 2, 2), 7e4)
    with pytest.raises(NotFinite, match="70000 in channel 0, which float16 cannot hold"):
        Floats("float16").rounded(x)
    for precision in ("float32", "bfloat16", *CODES):
        assert torch.isfinite(codec_for(precision, x).rounded(x).float()).all()


@pytest.mark.parametrize("block", [2, 8])
def test_frozen_layers_name_the_sample_of_the_batch_not_of_the_block(block: int) -> None:
    layer = build([LayerSpec(1, 1, 4, 0, batch_norm=False, bias=True)], 0)[0].eval()
    x = normal(0, 7, 1, 4, 4)
    x[5] = float("nan")
    with pytest.raises(NotFinite) as caught:
        featurize([Frozen(layer, Floats("float32"))], x, block=block, compute=torch.float32)
    assert caught.value.sample == 5


@pytest.mark.parametrize("size", [2, 9])
def test_calibration_refuses_it_too(size: int) -> None:
    x = normal(0, 9, 3, 4, 5)
    x[7, 1, 0, 0] = float("inf")
    with pytest.raises(NotFinite) as caught:
        calibrate(x.split(size), "uint8", 99.99)
    assert (caught.value.sample, caught.value.channel) == (7, 1)
    with pytest.raises(ValueError, match="nothing to calibrate on"):
        calibrate([], "uint8", 99.99)


# --- calibration ---------------------------------------------------------------------------------


def snr(found: Calibration) -> list[float | None]:
    return [channel.snr_db for channel in found.channels]


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("looked_at", [calibration.VALUES_PER_ROW, 24])
def test_how_the_rows_are_batched_does_not_matter(
    precision: str, looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only a part of the pixels is looked at; the extremes are still those of all."""
    monkeypatch.setattr(calibration, "VALUES_PER_ROW", looked_at)
    x = normal(0, 50, 6, 9, 7)
    whole, parts = (calibrate(x.split(size), precision, 99.0) for size in (50, 7))
    assert whole.channels == parts.channels
    assert torch.equal(whole.quantiser.scale, parts.quantiser.scale)
    assert torch.equal(whole.quantiser.zero, parts.quantiser.zero)
    assert [channel.maximum for channel in whole.channels] == x.amax((0, 2, 3)).tolist()
    assert whole.channels[0].values == 50 * min(63, looked_at // 6)


@pytest.mark.parametrize("precision", CODES)
def test_one_outlier_leaves_the_rest_of_its_channel_alone(precision: str) -> None:
    x = normal(0, 40, 3, 16, 16).relu()
    clean = calibrate([x], precision, 99.99)
    assert clean.channels[1].snr_db is not None
    spoilt = x.clone()
    spoilt[3, 1, 5, 5] = 1e4
    quantiser = calibrate([spoilt], precision, 99.99).quantiser
    ordinary = spoilt != 1e4
    error = (quantiser.rounded(spoilt) - spoilt)[:, 1][ordinary[:, 1]].square().sum()
    ratio = 10 * torch.log10(spoilt[:, 1][ordinary[:, 1]].square().sum() / error)
    assert float(ratio) > clean.channels[1].snr_db - 1.5
    assert float(quantiser.rounded(spoilt)[3, 1, 5, 5]) == pytest.approx(
        float(quantiser.levels * quantiser.scale[1])
    )


def test_an_outlier_is_seen_even_among_a_few_values() -> None:
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 0] = torch.tensor([1.0, 1.2, 1e4])
    assert float(calibrate([x], "uint8", 99.99).quantiser.scale) == pytest.approx(1.2 / 254)


@pytest.mark.parametrize("precision", CODES)
def test_a_channel_that_seldom_speaks_is_heard(precision: str) -> None:
    """One value in five hundred: over all values the percentile 99.9 would be about the median."""
    x = normal(0, 64, 2, 32, 32).abs()
    x[:, 0] *= torch.rand(64, 32, 32, generator=torch.Generator().manual_seed(1)) < 1 / 500
    found = calibrate([x], precision, 99.9)
    seldom, often = found.channels
    assert seldom.snr_db is not None
    assert often.snr_db is not None
    assert seldom.clipped <= 2
    assert seldom.snr_db > often.snr_db - 2.5


@pytest.mark.parametrize(("ratio", "clipped"), [(1.9, False), (2.1, True)])
def test_eight_bits_reach_to_a_largest_value_that_is_near(ratio: float, clipped: bool) -> None:
    x = torch.ones(1, 1, 10, 10)
    x[0, 0, 0, 0] = ratio
    found = calibrate([x], "uint8", 99.0)
    assert found.channels[0].clipped == clipped
    assert float(found.quantiser.scale) == pytest.approx((1.0 if clipped else ratio) / 254)
    assert calibrate([x], "uint4", 99.0).channels[0].clipped == 1
    assert calibrate([x], "uint4", 100.0).channels[0].clipped == 0


@pytest.mark.parametrize("precision", CODES)
def test_a_dead_channel_may_wake_up(precision: str) -> None:
    x = normal(0, 20, 3, 8, 8).relu() * torch.tensor([1.0, 0.0, 5.0])[:, None, None]
    found = calibrate([x], precision, 99.99)
    assert [channel.dead for channel in found.channels] == [False, True, False]
    assert snr(found)[1] is None
    assert float(found.quantiser.scale[1]) == float(found.quantiser.scale.max())
    awake = x.roll(1, dims=1)
    error = (found.quantiser.rounded(awake)[:, 1] - awake[:, 1]).abs().max()
    assert float(error) <= 0.5001 * float(found.quantiser.scale[2])
    nothing = calibrate([x * 0], precision, 99.99)
    assert nothing.quantiser.scale.tolist() == [1.0] * 3
    assert nothing.text == (
        f"{precision}: without a measurable error, 0.000 % clipped, 3 dead channels of 3"
    )


def test_the_summary_is_that_of_the_channels() -> None:
    x = normal(0, 20, 5, 8, 8).relu()
    x[:, 3, 0, :4] = 50.0  # so that most of its values have one code in common
    found = calibrate([x], "uint4", 100.0)
    ratios = [ratio for ratio in snr(found) if ratio is not None]
    error = (found.quantiser.rounded(x) - x).double().square().sum((0, 2, 3))
    expected = 10 * (x.double().square().sum((0, 2, 3)) / error).log10().numpy()
    np.testing.assert_allclose(ratios, expected, atol=0.006)
    summary = found.summary()
    assert summary["worst_snr_db"] == min(ratios)
    assert summary["median_snr_db"] == sorted(ratios)[2]
    assert f"worst channel {ratios.index(min(ratios))}" in found.text
    assert found.text.startswith("uint4: signal-to-noise ")
    assert len(found.as_json()) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", CODES)
def test_values_in_few_bits_are_those_of_float32_cast(precision: str, dtype: torch.dtype) -> None:
    x = normal(0, 20, 5, 8, 8) * torch.tensor([1e-3, 0.1, 1.0, 7.0, 300.0])[:, None, None]
    stored = codec_for(precision, x)
    codes = stored.unpacked(stored.encode(x), 5)
    expected = stored.values(codes).to(dtype)
    assert torch.equal(stored.values(codes, dtype=dtype), expected)
    assert torch.equal(stored.values(codes, torch.empty(20, 5, 8, 8, dtype=dtype)), expected)
