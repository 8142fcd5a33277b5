"""Augmentation with a cache: the same draw gives the same feature whichever mode made it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import examples

from strata.pipeline.feed.features import image_views
from strata.pipeline.feed.level_feed import view_of_epoch
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.augmentation import Draws
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.run import lineage
from strata.stages.data import augment
from strata.stages.features.quantise import Floats
from strata.stages.network.blocks import scale_at
from strata.stages.network.featurize import Frozen, featurize
from strata.stages.network.network import build_problem

TOML = """
[data]
source = "digits"
classes = 10
channels = 3
size = 16
mean = [0.5, 0.4, 0.3]
std = [0.2, 0.2, 0.3]
train = 100
test = 10
[augment]
pad = 4
crop = 16
flip = true
views = {views}
[network]
layers = 3
width = 8
downsample = {downsample}
pool = "{pool}"
[auxiliary]
k = 1
[schedule]
kind = "step"
epochs = 1
batch = 8
lr = 0.1
"""


def recipe(mode: str = '"canvas"', downsample: str = "[]", pool: str = "invertible") -> Recipe:
    return parse(TOML.format(views=mode, downsample=downsample, pool=pool), "test")


def images(n: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize(
    ("downsample", "reach"),
    [
        pytest.param("[]", [0, 1, 2, 3], id="no downsampling: one pixel a layer"),
        pytest.param("[1]", [0, 1, 2, 3], id="x_1 downsampled"),
        pytest.param("[1, 2]", [0, 1, 2, 2], id="twice"),
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("pool", ["invertible", "max"])
def test_a_crop_in_feature_space_is_the_feature_of_the_crop(
    downsample: str, reach: list[int], depth: int, pool: str
) -> None:
    """Canvas ≡ fresh, exactly, except where the fresh crop's zero padding is within reach.

    ``reach`` is how many pixels of x_depth, from the border, a padding pixel can influence.
    """
    r = recipe(downsample=downsample, pool=pool)
    n = 12
    layers = [
        Frozen(build_problem(r.layers[j], r.auxiliaries[j], j).layer.eval(), Floats("float32"))
        for j in range(depth)
    ]
    scale = scale_at(r.layers, depth)
    draws = augmentation.epoch_draws(r, 0, 3, n, scale)
    assert draws.flipped.any()
    assert not draws.flipped.all()

    def through(x: torch.Tensor) -> torch.Tensor:
        return featurize(layers, x, block=n, compute=torch.float32)

    fresh = through(image_views(r, images(n), draws))
    whole = Draws(draws.flipped, np.empty((0, 2), np.int64))
    canvas = through(image_views(r, images(n), whole))
    side = r.augment.crop // scale
    cut = augment.crop(canvas, torch.from_numpy(draws.offsets // scale), side)
    inner = slice(reach[depth], side - reach[depth])
    torch.testing.assert_close(cut[..., inner, inner], fresh[..., inner, inner], rtol=0, atol=1e-5)
    if depth == 0:
        assert torch.equal(cut, fresh)


def test_where_no_border_is_in_reach_canvas_and_fresh_agree_to_the_bit() -> None:
    """A black border is what zero padding would put there, if black is zero after normalising."""
    r = recipe()
    layer = build_problem(r.layers[0], r.auxiliaries[0], 0).layer.eval()
    x = torch.zeros(8, 3, 24, 24)
    x[:, :, 10:14, 10:14] = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([[0, 0], [8, 8], [4, 4], [1, 7], [3, 2], [5, 5], [0, 8], [8, 0]])
    nothing = torch.nn.init.zeros_(layer.convolution.bias)  # pyright: ignore
    assert not nothing.any()

    def through(y: torch.Tensor) -> torch.Tensor:
        frozen = Frozen(layer, Floats("float32"))
        return featurize([frozen], y, block=8, compute=torch.float32)

    assert torch.equal(augment.crop(through(x), offsets, 16), through(augment.crop(x, offsets, 16)))


def test_flip_then_crop_is_what_torchvision_would_cut() -> None:
    """Per sample: mirror, then a crop at (y, x), against plain slicing."""
    x = images(6)
    offsets = torch.tensor([[0, 0], [1, 2], [3, 3], [8, 0], [5, 8], [8, 8]])
    flipped = torch.tensor([True, False, True, True, False, False])
    got = augment.crop(augment.flip(augment.pad(x, 4), flipped), offsets, 16)
    for i, (dy, dx) in enumerate(offsets.tolist()):
        canvas = torch.zeros(3, 24, 24, dtype=torch.uint8)
        canvas[:, 4:20, 4:20] = x[i]
        if flipped[i]:
            canvas = canvas.flip(2)
        assert torch.equal(got[i], canvas[:, dy : dy + 16, dx : dx + 16])


def test_normalise_is_pixel_over_255_minus_mean_over_std() -> None:
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    got = augment.normalise(x, [0.5, 0.2, 0.0], [0.5, 0.1, 2.0]).flatten()
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 0.5]))


# ---- draws --------------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(0, 50), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=examples(30), deadline=None)
def test_a_draw_depends_on_seed_epoch_and_sample_only(
    seed: int, epoch: int, few: int, more: int
) -> None:
    """Sample i's draw is the same however many samples there are beside it."""
    r = recipe()
    small = augmentation.epoch_draws(r, seed, epoch, few)
    large = augmentation.epoch_draws(r, seed, epoch, few + more)
    np.testing.assert_array_equal(small.offsets, large.offsets[:few])
    np.testing.assert_array_equal(small.flipped, large.flipped[:few])


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 20))
@settings(max_examples=examples(20), deadline=None)
def test_offsets_are_multiples_of_the_scale_and_cover_the_canvas(scale: int, epoch: int) -> None:
    offsets = augmentation.epoch_draws(recipe(), 1, epoch, 2000, scale).offsets
    assert set(np.unique(offsets)) == set(range(0, 9, scale))


def test_fixed_views_are_used_in_turn_and_flips_alternate() -> None:
    """Over V epochs every sample uses every view once; from one view to the next it is mirrored."""
    r = recipe("4")
    used = np.stack([view_of_epoch(0, epoch, np.arange(500), 4) for epoch in range(4)])
    assert (np.sort(used, axis=0) == np.arange(4)[:, None]).all()
    assert len(np.unique(used[0])) == 4
    flips = np.stack([augmentation.view_draws(r, 0, view, 500).flipped for view in range(4)])
    assert (flips[0] != flips[1]).all()
    assert (flips[0] == flips[2]).all()
    assert 0.4 < flips[0].mean() < 0.6


def drawing(views_: str = "0", **changes: str | int) -> Recipe:
    """The recipe with other keys of [augment]."""
    r = recipe(views_)
    return replace(r, augment=replace(r.augment, **changes))  # pyright: ignore[reportArgumentType]


def test_flips_are_alternated_or_drawn_as_the_recipe_says() -> None:
    def of_epochs(r: Recipe) -> np.ndarray:
        return np.stack([augmentation.epoch_draws(r, 0, epoch, 500).flipped for epoch in range(4)])

    alternated, drawn = of_epochs(drawing(flips="alternated")), of_epochs(drawing())
    assert (alternated[0] != alternated[1]).all()
    assert (alternated[0] == alternated[2]).all()
    assert 0.4 < alternated[0].mean() < 0.6
    assert 0.4 < (drawn[0] != drawn[1]).mean() < 0.6
    np.testing.assert_array_equal(drawn, of_epochs(drawing(flips="random")))
    some = drawing("4", flips="random")
    flips = np.stack([augmentation.view_draws(some, 0, view, 500).flipped for view in range(2)])
    assert 0.4 < (flips[0] != flips[1]).mean() < 0.6
    assert not augmentation.epoch_draws(
        drawing(flips="alternated", flip=False), 0, 0, 500
    ).flipped.any()


@pytest.mark.parametrize(("scale", "step"), [(1, 4), (2, 4), (8, 8)])
def test_offsets_are_multiples_of_the_recipes_stride(scale: int, step: int) -> None:
    offsets = augmentation.epoch_draws(drawing(stride=4), 1, 0, 2000, scale).offsets
    assert set(np.unique(offsets)) == set(range(0, 9, step))


def test_fixed_views_drawn_otherwise_are_other_levels() -> None:
    def first(r: Recipe) -> str:
        images_ = lineage.images_node(r, "data")
        return lineage.feature_node(r, 0, "float32", images_, "weights", None).fingerprint

    ways = [drawing("4"), drawing("4", flips="random"), drawing("4", stride=2)]
    assert len({first(way) for way in ways}) == 3
    assert first(drawing("4", flips="auto", stride=1)) == first(recipe("4"))


def test_adding_a_view_changes_no_other() -> None:
    for view in range(2):
        two, four = (augmentation.view_draws(recipe(v), 0, view, 100) for v in ("2", "4"))
        np.testing.assert_array_equal(two.offsets, four.offsets)
        np.testing.assert_array_equal(two.flipped, four.flipped)


def test_the_three_modes_name_their_levels() -> None:
    assert augmentation.train_views(recipe("0")) == ()
    assert augmentation.train_views(recipe("3")) == ("v0", "v1", "v2")
    assert augmentation.train_views(recipe()) == ("plain", "flipped")
