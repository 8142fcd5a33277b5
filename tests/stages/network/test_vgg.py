"""VGG (Sec. 4.3): max pooling, half resolution, its own classifier; torchvision's, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Place, here, tiny
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg

from strata.pipeline.errors import OptionRange, RecipeError
from strata.pipeline.plan.costs import kind
from strata.pipeline.recipe.builtin import load, text_of
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.recipe.variants import variants
from strata.stages.network.network import Auxiliary, Layer, build, build_problem
from strata.stages.network.spec import AuxiliarySpec, LayerSpec
from strata.stages.solve.baseline import EndToEnd, build_end_to_end

SMALL = text_of("vgg11-small")[1]


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- the modules ---------------------------------------------------------------------------------


def test_max_pooling_opens_the_layer() -> None:
    layer: Any = build_problem(
        LayerSpec(2, 3, 4, 1, False, True, "max"), AuxiliarySpec(4, 1, 0, 2, False, True), 0
    ).layer
    x = seeded(2, 3, 8, 8)
    want = torch.relu(layer.convolution(F.max_pool2d(x, 2)))
    assert torch.equal(layer(x), want)
    assert want.shape == (2, 4, 4, 4)


@pytest.mark.parametrize("side", [8, 7, 1])
def test_auxiliary_convolutions_see_half_the_resolution(side: int) -> None:
    """Sec. 4.3: 2×2 averages; where a side is odd, the last is of fewer pixels."""
    spec = AuxiliarySpec(3, 3, 5, 10, True, True, half_resolution=True)
    half = build([spec], None)[0].eval()
    problem = build_problem(LayerSpec(1, 3, 3, 0, False, True), spec, 0)
    half.load_state_dict(problem.auxiliary.state_dict())
    whole = build([AuxiliarySpec(3, 3, 5, 10, True, True)], None)[0].eval()
    whole.load_state_dict(half.state_dict())
    x = seeded(2, 3, side, side)
    means = F.adaptive_avg_pool2d(F.pad(x, (0, side % 2) * 2, mode="replicate"), -(-side // 2))
    torch.testing.assert_close(half(x), whole(means))
    with FlopCounterMode(display=False) as counter:
        half(x[:1])
    assert counter.get_total_flops() == 2 * spec.operations((3, side, side))


def test_layers_without_p_are_the_same_layers() -> None:
    """So that they have the same fingerprints."""
    invertible, pooled = (parse(SMALL.replace("max", p), "test") for p in ("invertible", "max"))
    layers: tuple[Any, ...] = pooled.layers
    begins_with_p = [layer.downsamplings > 0 for layer in layers]
    pairs = zip(pooled.layers, invertible.layers, strict=True)
    assert [a != b for a, b in pairs] == begins_with_p
    assert begins_with_p == [False, True, True, False, True, False, True, False]


# ---- the same network as torchvision's -----------------------------------------------------------


@pytest.mark.parametrize("n", [11, 13, 16, 19])
def test_end_to_end_it_is_the_standard_network(n: int) -> None:
    """VGG-n with batch norm: the same weights in the same order."""
    _, recipe = load(f"vgg{n}")
    with torch.device("meta"):
        specs: tuple[Any, ...] = recipe.layers
        layers = [Layer(spec) for spec in specs]
        ours = EndToEnd(layers, Auxiliary(recipe.auxiliaries[-1]), checkpointing=False)
        theirs = getattr(vgg, f"vgg{n}_bn")(init_weights=False)
    shapes = [[p.shape for p in network.parameters()] for network in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(layer.parameters for layer in recipe.layers) + recipe.auxiliaries[
        -1
    ].parameters == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("side", [32, 64])
def test_end_to_end_it_gives_the_same_logits(side: int) -> None:
    """At 64 pixels a map of 2×2 is left, whose order the fully connected layers must know."""
    recipe = parse(SMALL.replace("crop = 32", f"crop = {side}").replace("pad = 4", "pad = 32"), "t")
    ours = build_end_to_end(recipe.layers, recipe.auxiliaries[-1], 0).eval()
    form = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
    with torch.device("meta"):
        theirs: Any = vgg.VGG(vgg.make_layers(form, batch_norm=True), init_weights=False)  # pyright: ignore
        theirs.avgpool = nn.Identity()
        flat = 128 * (side // 32) ** 2
        theirs.classifier = nn.Sequential(
            *(nn.Linear(flat, 128), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(128, 128), nn.ReLU(), nn.Dropout()),
            nn.Linear(128, 10),
        )
    theirs = theirs.to_empty(device="cpu").eval()
    values = ours.state_dict().values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    x = seeded(4, 3, side, side)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
        channels_last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(channels_last), theirs(x))


# ---- in a recipe ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('pool = "max"', 'pool = "mx"', ["'network.pool' is 'mx'", "'max'"]),
        ("widths = [16, 32", "widths = [32", ["'network.widths' has 7 values", "is 8"]),
        ("widths = [16", "widths = [8", ["begins with 8", "'network.width' is 16"]),
        ("widths = [16, 32", "widths = [16, 0", ["each must be above 0"]),
        ("k = 3", "k = 1", ["'auxiliary.half_resolution'", "'auxiliary.k' 1"]),
        ("width = 32\n", "width = 32\nfinal_width = 8\n", ["'auxiliary.final_width'"]),
        ("[128, 128]\n", "[128, 0]\n", ["'auxiliary.final_hidden' is [128, 0]"]),
        ("crop = 32", "crop = 16", ["x_J has 1", "'augment.crop'"]),
    ],
)
def test_what_cannot_be_is_refused(old: str, new: str, words: list[str]) -> None:
    assert old in SMALL
    with pytest.raises(RecipeError) as caught:
        parse(SMALL.replace(old, new), "test")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_rates_are_of_their_own() -> None:
    """What was measured of a layer with the invertible P says nothing of max pooling, and so on."""
    recipe = parse(SMALL, "test")
    told = [kind(recipe, j) for j in (1, 2, 8)]
    assert told == [
        "3 to 16 at 32x32, k 3 of 32 at half of it",
        "16 to 32 at 16x16, max pooled, k 3 of 64 at half of it",
        "128 to 128 at 2x2, hidden 128 128",
    ]


def test_the_last_classifier_has_no_convolutions_that_could_vary() -> None:
    recipe = parse(SMALL, "test")
    for key in ("auxiliary.k", "auxiliary.width"):
        with pytest.raises(OptionRange, match=f"--vary {key}: layer 8 ends in"):
            variants(recipe, 8, [f"{key}=1,2"], 0)
    one, two = variants(recipe, 7, ["k=1,2"], 0)
    assert (one.auxiliary.half_resolution, two.auxiliary.half_resolution) == (False, True)
    wider = variants(recipe, 8, ["width=8"], 0)[0]
    assert wider.layer is not None
    problem = build_problem(wider.layer, wider.auxiliary, 0)
    assert problem(seeded(2, 128, 2, 2)).shape == (2, 10)
    assert json.loads(json.dumps(wider.settings))["auxiliary"]["hidden"] == [128, 128]


# ---- a run ---------------------------------------------------------------------------------------


def tiny_vgg() -> str:
    """Of three layers on the digits' canvas of 12 pixels; x_3 has 4 pixels a side, pooled to 2."""
    text = tiny(epochs=1, downsample="[1]", flip="false")
    text = text.replace("downsample =", 'pool = "max"\nwidths = [8, 8, 4]\ndownsample =')
    return text.replace("k = 2", "k = 2\nhalf_resolution = true\nfinal_hidden = [16, 12]")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A finished run with every level, in canvas mode."""
    root = tmp_path_factory.mktemp("vgg")
    (root / "tiny.toml").write_text(tiny_vgg())
    place = Place(root)
    assert place.do("run").rc == 0
    return place


def test_from_the_cache_or_computed_again_the_weights_are_the_same(
    run: Place, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(tiny_vgg())
    again = Place(tmp_path)
    assert again.do("run", "--cache", "never").rc == 0
    assert not list(again.store.glob("x_[12]-*"))
    assert again.weights() == run.weights()
    assert len(run.weights()) == 6


def test_end_to_end_it_is_layers_and_classifier_of_the_run(run: Place) -> None:
    said: dict[str, Any] = run.do("baseline", "--checkpointing", "--json").json
    recipe: Recipe = parse(tiny_vgg(), "tiny")
    parameters = sum(layer.parameters for layer in recipe.layers)
    last = recipe.auxiliaries[-1]
    assert last.maps == ((4 * 2 * 2, 16), (16, 12), (12, 10))
    assert said["result"]["parameters"] == parameters + last.parameters
    assert said["greedy"]["test"]["top5"] >= said["greedy"]["test"]["top1"]


def test_plan_and_sweep_know_it(run: Place) -> None:
    depths = run.do("plan", "--json").json["depths"]
    assert [d["shape"] for d in depths[1:]] == [[8, 12, 12], [8, 6, 6], [4, 6, 6]]
    swept = run.do("sweep", "--layer", 3, "--vary", "width=2,4", "--json")
    assert swept.rc == 0, swept.err
    refused = here("sweep", *run.options, "--layer", 3, "--vary", "k=2")
    assert (refused.rc, "'auxiliary.final_hidden'" in refused.err) == (2, True)
