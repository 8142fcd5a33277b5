"""Any network as a chain of blocks: cut, read, refused, initialised, and its memory."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import texts
import torch
from footprints import CPU, coded, stepped
from networks import NAME, RESIDUAL, beside, named
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from strata.pipeline.errors import RecipeError
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.stages.errors import UnusableNetwork
from strata.stages.memory import watched
from strata.stages.network import block_reading
from strata.stages.network.block_reading import read_blocks
from strata.stages.network.block_source import construct, digest
from strata.stages.network.blocks import Block, Origin, scale_at, shape_at
from strata.stages.network.featurize import Frozen, featurize
from strata.stages.network.footprint import applying, solving
from strata.stages.network.network import build, build_problem
from strata.stages.network.spec import AuxiliarySpec, described
from strata.stages.solve.baseline import build_end_to_end

CODE = """
import torch
from torch import Tensor, nn

def conv(inputs, outputs, **more):
    return nn.Conv2d(inputs, outputs, 3, **{{"padding": 1, **more}})

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale = conv(1, 4), torch.ones(1)
    def forward(self, x):
        return self.conv(x) * self.scale

class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(1, 4)
    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x

class Excited(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate = conv(1, 4), nn.Conv2d(4, 4, 1)
    def forward(self, x):
        x = self.conv(x)
        return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))

class Undecided(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else (y, y)

class AlwaysDrops(nn.Conv2d):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5)

class Unspeakable(nn.Conv2d):
    def extra_repr(self):
        raise ValueError("no words")

class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.conv, self.see = conv(1, 4), nn.MultiheadAttention(4, 2, dropout, batch_first=True)
    def forward(self, x):
        y = self.conv(x).flatten(2).transpose(1, 2)
        y, _ = self.see(y, y, y, need_weights=False)
        return y.transpose(1, 2).unflatten(2, x.shape[2:])

def blocks():
    return {0}
"""
LAST = len(CODE.splitlines())
ATTEND = """
class Attend(nn.Conv2d):
    def __init__(self):
        super().__init__(4, 4, 1)
    def forward(self, x):
        y = super().forward(x).flatten(2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.0)
        return y.unflatten(2, x.shape[2:])
"""


@pytest.fixture(scope="module")
def residual() -> tuple[Block, ...]:
    """Stem, residual block, residual block with half of the pixels; on images of 16 pixels."""
    return read_blocks(Origin("residual.py:blocks", (("width", 16),), RESIDUAL), (1, 16, 16))


@pytest.fixture(scope="module")
def resnet() -> tuple[Block, ...]:
    return read_blocks(Origin("torchvision:resnet18"), (3, 64, 64))


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- cutting -------------------------------------------------------------------------------------


def vgg_features(model: models.VGG, x: Tensor) -> Tensor:
    return nn.Sequential(*list(model.features.children())[:-1])(x)  # without the last pooling


def resnet_features(model: models.ResNet, x: Tensor) -> Tensor:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    return model.layer4(model.layer3(model.layer2(model.layer1(x))))


@pytest.mark.parametrize(
    ("name", "features", "count", "some"),
    [
        ("vgg11_bn", vgg_features, 8, ["features.0 (Conv2d)", "features.4 (Conv2d)"]),
        ("resnet18", resnet_features, 9, ["conv1 (Conv2d)", "layer1.0 (BasicBlock)"]),
    ],
)
def test_blocks_in_a_row_are_the_models_features(name, features, count, some) -> None:
    """The same draws from the same seed, so the same weights; the same maps, to the bit."""
    made = construct(Origin(f"torchvision:{name}"), 3)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(torch.Generator().manual_seed(3).get_state())
        model = models.get_model(name, weights=None)
    assert [block for block, _ in made[:2]] == some
    assert len(made) == count
    x = y = seeded(2, 3, 64, 64)
    with torch.inference_mode():
        for _, block in made:
            y = block.eval()(y)
        assert torch.equal(y, features(model.eval(), x))


def test_pooling_opens_the_next_block() -> None:
    for name in ("vgg11_bn", "resnet18"):
        second = construct(Origin(f"torchvision:{name}"), None)[1][1]
        assert isinstance(second, nn.Sequential)
        assert isinstance(second[0], nn.MaxPool2d)


def test_a_name_that_torchvision_does_not_have_is_refused() -> None:
    with pytest.raises(UnusableNetwork, match=r"no such classifier.*torchvision:resnet1"):
        read_blocks(Origin("torchvision:resnet19"), (3, 64, 64))


# ---- reading -------------------------------------------------------------------------------------


def test_figures_are_those_of_the_modules(resnet, residual) -> None:
    for blocks in (resnet, residual):
        shape = blocks[0].takes
        for block in blocks:
            module = build([block], None)[0].eval()
            with FlopCounterMode(display=False) as counter:
                x = module(torch.zeros(1, *shape))
            assert block.operations(shape) == counter.get_total_flops() // 2
            assert block.parameters == sum(p.numel() for p in module.parameters())
            assert block.output(shape) == x.shape[1:]
            assert block.local
            shape = block.output(shape)
        assert all(one.width == other.channels for one, other in pairwise(blocks))
    assert [scale_at(residual, depth) for depth in range(4)] == [1, 1, 1, 2]
    assert shape_at(resnet, 9, (3, 64, 64)) == (512, 2, 2)


def test_figures_survive_a_file(resnet: tuple[Block, ...]) -> None:
    for block in resnet:
        assert Block.of_json(json.loads(json.dumps(block.as_json())), block.source) == block


def test_a_fingerprint_has_what_decides_about_values(residual: tuple[Block, ...]) -> None:
    names = {"index", "channels", "width", "factor", "digest"}
    assert set(described(residual[1])) == names
    other = RESIDUAL.replace("relu(self.second", "1.1 * relu(self.second")
    changed = {
        "code": replace(residual[1].source, code=other),
        "arguments": replace(residual[1].source, arguments=(("width", 16), ("channels", 2))),
    }
    for source in changed.values():
        assert digest(source, build([residual[1]], None)[0]) != residual[1].digest
    again = read_blocks(residual[0].source, (1, 32, 32))
    assert [block.digest for block in again] == [block.digest for block in residual]


def test_weights_of_another_block_are_not_loaded_into_this_one(residual) -> None:
    with pytest.raises(UnusableNetwork, match="another version"):
        build([replace(residual[1], digest="0" * 64)], None)[0]


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ("AlwaysDrops(1, 4, 3, padding=1)", ["draws random numbers in eval mode too", "bernoulli"]),
        ("nn.Sequential(nn.ReLU(inplace=True), conv(1, 4))", ["changes its input in place"]),
        ("conv(1, 4, stride=8)", ["4×1×1", "2 or more pixels", "'augment.crop'"]),
        ("nn.Sequential(conv(1, 4), nn.Flatten(0))", ["N samples of 1 to 4 axes", "(512,)"]),
        ("nn.ReLU()", ["block 1, blocks[0] (ReLU)", "no weights"]),
        ("*[conv(1, 1)] * 2", ["block 2", "shares weights with block 1"]),
        ("Scaled()", ["scale", "register_buffer"]),
        ("Chooses()", ["block 1", "cannot take 1×8×8", "DataDependent"]),
        ("conv(3, 4)", ["cannot take 1×8×8", "3 channels"]),
        ("3", ["block 1 is a int"]),
        ("", ["list of blocks"]),
        ("1 / 0", [f"line {LAST}, ZeroDivisionError"]),
        ("import other", [f"line {LAST}, SyntaxError"]),
        ("__import__('elsewhere')", [f"residual.py, line {LAST}, ModuleNotFoundError"]),
        ("__import__('sys').exit('bye')", [f"residual.py, line {LAST}, SystemExit: bye"]),
        ("blocks()", ["residual.py", "RecursionError"]),
        ("nn.LazyConv2d(4, 3)", ["block 1 has a LazyConv2d", "how many channels"]),
        ("Undecided(1, 4, 3, padding=1)", ["gives tuple in eval mode"]),
        ("Unspeakable(1, 4, 3, padding=1)", ["residual.py, line", "ValueError: no words"]),
    ],
)
def test_blocks_that_cannot_be_layers_are_refused(
    tmp_path: Path, blocks: str, words: list[str]
) -> None:
    code = CODE.format(f"[{blocks}]")
    recipe = parse(named('"residual.py:blocks"'), "tiny", beside(tmp_path, code))
    with pytest.raises(RecipeError) as error:
        recipe.check_layers()
    said = str(error.value)
    assert "\n" not in said
    assert all(word in said for word in ["network residual.py:blocks", *words]), said


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ('"foo"', ["'foo'", "torchvision:NAME", "FILE.py:FUNCTION"]),
        ('"other.py:blocks"', ["other.py", "No such file"]),
        ('"../residual.py:blocks"', ["beside the recipe"]),
        ('{ name = "residual.py:blocks", width = 3 }', ["unknown key 'network.width'"]),
        ('{ name = "torchvision:vgg11", arguments = { weights = "x" } }', ["network.weights"]),
        ('{ name = "residual.py:Tensor", arguments = { x = [1] } }', ["network.arguments.x"]),
        ("3", ["'network' must be a table"]),
    ],
)
def test_names_are_checked_when_the_recipe_is_read(
    tmp_path: Path, network: str, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as error:
        parse(named(network), "tiny", beside(tmp_path))
    assert all(word in str(error.value) for word in ["recipe tiny", *words]), error.value


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ('"residual.py:block"', ["residual.py has no block"]),
        ('{ name = "residual.py:blocks", arguments = { depth = 3 } }', ["TypeError", "depth"]),
        ('{ name = "residual.py:LIST", arguments = { depth = 3 } }', ["is no function"]),
    ],
)
def test_names_and_arguments_must_be_there(tmp_path: Path, network: str, words: list[str]) -> None:
    place = beside(tmp_path, RESIDUAL + "\nLIST = blocks()\n")
    with pytest.raises(RecipeError) as error:
        parse(named(network), "tiny", place).check_layers()
    assert all(word in str(error.value) for word in words), error.value


class Tokens(nn.Module):
    """Patches with a learnt position each, which fit one size of images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.positions


class Last(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).movedim(1, -1)


@pytest.mark.parametrize(
    ("block", "shape", "dtype", "gives", "last", "factor"),
    [
        (nn.Linear(64, 10), (64,), "float32", (10,), False, 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), (3, 8, 8), "uint8", (144,), False, 1),
        (nn.Conv1d(3, 8, 3, padding=1, stride=2), (3, 8), "float16", (8, 4), False, 1),
        (nn.Linear(8, 8), (8, 8), "float32", (8, 8), True, 1),
        (nn.Embedding(50, 16), (12,), "int32", (12, 16), True, 1),
        (Tokens(), (3, 16, 16), "uint8", (16, 8), True, 1),
        (nn.Conv2d(3, 8, 2, stride=2), (3, 16, 16), "uint8", (8, 8, 8), False, 2),
        (nn.Conv2d(3, 4, 3), (3, 9, 9), "uint8", (4, 7, 7), False, 1),
        (nn.Conv2d(3, 4, 3, padding=1, stride=2), (3, 8, 12), "uint8", (4, 4, 6), False, 2),
        (nn.Conv2d(3, 4, 3, padding=1), (3, 4, 6), "uint8", (4, 4, 6), False, 1),
        (Last(nn.Conv2d(3, 8, 2, stride=2)), (3, 16, 16), "uint8", (8, 8, 8), True, 1),
        (nn.Conv3d(1, 2, 3, padding=1), (1, 4, 4, 4), "float32", (2, 4, 4, 4), False, 1),
    ],
)
def test_a_sample_has_one_to_four_axes(
    monkeypatch: pytest.MonkeyPatch, block, shape, dtype, gives, last, factor
) -> None:
    """Which of them is that of the features is seen where shapes leave it open."""
    monkeypatch.setattr(block_reading, "construct", lambda *_: [("block", block)])
    (found,) = read_blocks(Origin("any.py:blocks"), shape, dtype)
    assert (found.takes, found.gives) == (shape, gives)
    assert (found.features_last, found.factor) == (last, factor)
    assert found.width == gives[-1 if last else 0]
    assert found.channels == shape[0]
    assert found.output(shape) == gives
    assert found.whole
    assert Block.of_json(json.loads(json.dumps(found.as_json())), found.source) == found
    described_last = described(found).get("features_last", False)
    assert described_last is last


def test_a_map_of_another_size_is_scaled_where_sides_divide(residual: tuple[Block, ...]) -> None:
    assert residual[2].output((16, 24, 40)) == (32, 12, 20)
    assert residual[2].scales
    assert not replace(residual[2], gives=(32, 7, 7)).scales


def test_blocks_that_older_runs_have_kept_are_known(residual: tuple[Block, ...]) -> None:
    for block in residual:
        old = block.as_json()
        for name in ("takes", "gives", "features_last", "draws"):
            del old[name]
        assert Block.of_json({**old, "side": block.takes[1]}, block.source) == block


def test_dropout_is_noted_and_attention_without_it_is_not(tmp_path: Path) -> None:
    code = CODE.format("[Attention(0.0), nn.Sequential(conv(4, 4), nn.Dropout(0.1)), Attend()]")
    code = code.replace("conv(1, 4), nn.Multi", "nn.Conv2d(1, 4, 1), nn.Multi")
    place = beside(tmp_path, code.replace("def blocks", ATTEND + "\ndef blocks"))
    recipe = parse(named('"residual.py:blocks"', views="0"), "tiny", place)
    assert [getattr(layer, "draws", None) for layer in recipe.layers] == [False, True, False]


def test_a_block_that_sees_the_whole_map_has_no_canvas(tmp_path: Path) -> None:
    """Its features of a canvas are not those of the crops, which fixed views are."""
    place = beside(tmp_path, CODE.format("[Excited(), conv(4, 4)]"))
    canvas, views = (
        parse(named('"residual.py:blocks"', views=views), "tiny", place)
        for views in ('"canvas"', "2")
    )
    with pytest.raises(RecipeError, match=r"block 1, blocks\[0\] \(Excited\)"):
        canvas.check_layers()
    views.check_layers()
    assert [getattr(block, "local", None) for block in views.layers] == [False, True]


def test_attention_without_dropout_is_not_random(tmp_path: Path) -> None:
    place = beside(tmp_path, CODE.format("[Attention(0.0)]"))
    recipe = parse(named('"residual.py:blocks"', views="0"), "tiny", place)
    assert [getattr(layer, "local", None) for layer in recipe.layers] == [False]


def test_filters_of_blocks_are_not_removed(tmp_path: Path) -> None:
    text = named() + "[compress]\nkeep = 0.5\nepochs = 1\nlr = 0.1\n"
    with pytest.raises(RecipeError, match=r"\[compress\] removes filters of its layers"):
        parse(text, "tiny", beside(tmp_path))


# ---- weights -------------------------------------------------------------------------------------


AUXILIARY = AuxiliarySpec(16, 2, 8, 10, True, False)


def test_weights_follow_from_the_seed_alone(residual: tuple[Block, ...]) -> None:
    """Whoever has drawn before, and nobody notices; conftest.py looks at torch's generator."""
    first, again, other = (build_problem(residual[1], AUXILIARY, seed) for seed in (1, 1, 2))
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    kernels = [problem.layer.state_dict()["first.0.weight"] for problem in (first, other)]
    assert not torch.equal(*kernels)
    bound = (9 * 16) ** -0.5  # as nn.Conv2d initialises itself
    assert 0.9 * bound < kernels[0].abs().max() <= bound


def test_constructors_initialise_as_they_like(resnet: tuple[Block, ...]) -> None:
    """torchvision's ResNet: normal, of fan out; not PyTorch's default."""
    problem = build_problem(resnet[4], replace(AUXILIARY, channels=128), 0)
    kernel = problem.layer.state_dict()["conv1.weight"]
    assert kernel.std() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_end_to_end_all_blocks_are_of_one_construction(residual: tuple[Block, ...]) -> None:
    last = replace(AUXILIARY, channels=32)
    plain, checkpointed = (
        build_end_to_end(residual, last, 5, checkpointing=again) for again in (False, True)
    )
    made = construct(residual[0].source, 5)
    for (_, module), ours in zip(made, plain.layers, strict=True):
        theirs = module.state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in ours.state_dict().items())
    x = seeded(4, 1, 16, 16)
    gradients = []
    for network in (plain, checkpointed):
        network(x).sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # pyright: ignore
    assert all(
        torch.equal(a, b) for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True)
    )


def test_what_is_computed_again_draws_the_same() -> None:
    """With checkpointing: dropout of a block is the same mask in the backward pass."""
    code = CODE.format("[nn.Sequential(conv(1, 4), nn.Dropout(0.5), conv(4, 4)), conv(4, 4)]")
    blocks = read_blocks(Origin("any.py:blocks", (), code), (1, 8, 8))
    assert [block.draws for block in blocks] == [True, False]
    gradients = []
    for again in (False, True):
        network = build_end_to_end(blocks, replace(AUXILIARY, channels=4), 5, checkpointing=again)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(torch.Generator().manual_seed(3).get_state())
            network(seeded(4, 1, 8, 8)).sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # pyright: ignore


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("network", "batch", "accumulate", "k"),
    [("residual", 32, 1, 2), ("residual", 32, 4, 1), ("resnet", 16, 1, 2), ("resnet", 2, 1, 3)],
)
def test_a_step_takes_what_was_predicted(
    request: pytest.FixtureRequest,
    network: str,
    batch: int,
    accumulate: int,
    k: int,
    compute: str,
) -> None:
    blocks: tuple[Block, ...] = request.getfixturevalue(network)
    some = blocks if network == "residual" else (blocks[0], blocks[1], blocks[5])
    for block in some:
        auxiliary = AuxiliarySpec(block.width, k, 16, 10, True, False)
        shape = block.takes
        problem = build_problem(block, auxiliary, 0)
        measured = stepped(problem, shape, batch, accumulate, getattr(torch, compute))
        found = solving(
            block,
            auxiliary,
            shape,
            batch=batch,
            micro=-(-batch // accumulate),
            divided=accumulate > 1,
            compute=compute,
        )
        assert found == pytest.approx(measured, rel=0.15), block.name


@pytest.mark.parametrize("precision", ["float32", "float16", "uint8"])
def test_a_forward_pass_takes_what_was_predicted(residual, precision: str) -> None:
    """Also of a canvas, which is larger than the crop that the blocks were read with."""
    rows, side = 64, 24
    for first in range(3):
        some, shape = residual[first:], shape_at(residual, first, (1, side, side))
        modules = [build([b], None)[0].eval().to(memory_format=torch.channels_last) for b in some]
        codecs = [coded(precision, b.width) for b in some]
        layers = [Frozen(*pair) for pair in zip(modules, codecs, strict=True)]
        weights = [p for frozen in layers for p in frozen.layer.parameters()]
        x = stored = torch.zeros(rows, *shape)
        if first:
            below = coded(precision, shape[0])
            stored = below.encode(x)
            x = below.decode(stored, shape[0])
        with watched(CPU, [stored, x, *weights]) as peak:
            featurize(layers, x, block=rows, compute=torch.float32, encode=True)
        found = applying(some, shape, block=rows, precision=precision, images=first == 0)
        assert found == pytest.approx(peak.nbytes, rel=0.15), f"x_{first}"


def test_what_is_not_known_is_said(residual: tuple[Block, ...]) -> None:
    unknown = replace(residual[1], whole=None)
    how = {"batch": 4, "micro": 4, "divided": False}
    assert solving(unknown, AUXILIARY, (16, 16, 16), **how) is None
    assert applying([unknown], (16, 16, 16), block=4) is None
    assert solving(unknown, AUXILIARY, (16, 16, 16), **how, compute="bfloat16")


def recipe_of(place: Path, **changes: object) -> Recipe:
    return parse(named(NAME, **changes), "tiny", beside(place))


def test_science_knows_the_file(tmp_path: Path) -> None:
    first = recipe_of(tmp_path).science()["network"]
    assert (first["name"], first["arguments"]) == ("residual.py:blocks", {"width": 8})
    (tmp_path / "residual.py").write_text(RESIDUAL + "\n")
    other = parse(named(), "tiny", tmp_path).science()["network"]
    assert other["code"] != first["code"]


def test_nothing_is_printed_of_a_shape_that_is_only_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Positions fit one number of tokens; torch logs a traceback where another is tried."""
    blocks = read_blocks(Origin("transformer.py:images", (), texts.CODE), (1, 8, 8))
    assert [block.features_last for block in blocks] == [True] * 4
    assert not caplog.records
