"""Models cut into blocks: their features, what is left out, and what is no chain."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from footprints import CPU
from torch import Tensor, nn

from strata.stages.errors import UnusableNetwork
from strata.stages.memory import watched
from strata.stages.network.block_reading import read_blocks
from strata.stages.network.block_source import block_modules, construct
from strata.stages.network.blocks import Origin
from strata.stages.network.spec import Shape

TORCHVISION = """
from functools import partial
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

def vit():
    return models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)
def swin():
    return models.SwinTransformer([4, 4], 8, [1, 2], [2, 2], [2, 2], 2.0)
def convnext():
    return models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], 0.1)
def wrapped():
    net = nn.Module.__new__(Wrapped)
    Wrapped.__init__(net)
    return net

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = models.resnet18(num_classes=7)
        self.head = nn.Linear(7, 2)
    def forward(self, x):
        return self.head(self.backbone(x).relu())
"""
TIMM = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim)
    def forward(self, x, attn_mask=None):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, attn_mask=attn_mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))

class PatchEmbed(nn.Module):
    def __init__(self, dim, size):
        super().__init__()
        self.size, self.proj = size, nn.Conv2d(3, dim, 8, stride=8)
    def forward(self, x):
        B, C, H, W = x.shape
        torch._assert(H == self.size, "Input height doesn't match")
        return self.proj(x).flatten(2).transpose(1, 2)

class VisionTransformer(nn.Module):
    def __init__(self, img_size=224, dim=16, depth=3):
        super().__init__()
        self.grad_checkpointing, self.num_prefix_tokens = False, 1
        self.patch_embed = PatchEmbed(dim, img_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // 8) ** 2 + 1, dim))
        self.pos_drop, self.patch_drop = nn.Dropout(0.0), nn.Identity()
        self.norm_pre = nn.Identity()
        rates = [x.item() for x in torch.linspace(0, 0.1, depth)]
        self.blocks = nn.Sequential(*[Block(dim) for _ in rates])
        self.norm, self.fc_norm, self.head_drop = nn.LayerNorm(dim), nn.Identity(), nn.Dropout(0.0)
        self.head = nn.Linear(dim, 5)
    def _pos_embed(self, x):
        to_cat = [self.cls_token.expand(x.shape[0], -1, -1)]
        return self.pos_drop(torch.cat(to_cat + [x], dim=1) + self.pos_embed)
    def forward_features(self, x, attn_mask=None):
        x = self._pos_embed(self.patch_embed(x))
        x = self.norm_pre(self.patch_drop(x))
        if attn_mask is not None or self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask)
        else:
            x = self.blocks(x)
        return self.norm(x)
    def forward(self, x, attn_mask=None):
        x = self.forward_features(x, attn_mask=attn_mask)
        return self.head(self.head_drop(self.fc_norm(x[:, 0])))

def create_model(name, pretrained=True, **kwargs):
    assert name == "vit_tiny_patch8.augreg_in1k" and not pretrained
    return VisionTransformer(**kwargs)
"""
MADE = """
import torch
from torch import nn
from torch.nn import functional as F

def conv(i, o, **more):
    return nn.Conv2d(i, o, 3, padding=1, **more)

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.norm = conv(1, 4), conv(4, 4), conv(4, 8), nn.BatchNorm2d(4)
        self.fc = nn.Linear(8, 3)
    def forward(self, x):
        x = F.relu(self.norm(self.a(x)), inplace=True)
        x = F.max_pool2d(F.relu(self.b(x)), 2)
        x = self.c(x)
        x += 1
        return self.fc(x.mean((2, 3)))

class Drops(Plain):
    def forward(self, x):
        x = self.b(F.dropout(self.a(x), 0.5, self.training))
        return self.fc(self.c(x).mean((2, 3)))

class Chooses(Plain):
    def forward(self, x):
        x = self.a(x) + 1
        return self.b(x) if len(x) else self.c(x)

class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.mid = conv(1, 4), conv(4, 8), conv(8, 8)
        self.up_two, self.up_one, self.out = conv(16, 4), conv(8, 4), conv(4, 1)
    def forward(self, x):
        one = F.relu(self.one(x))
        two = F.relu(self.two(F.max_pool2d(one, 2)))
        y = F.interpolate(F.relu(self.mid(F.max_pool2d(two, 2))), scale_factor=2.0)
        y = F.relu(self.up_two(torch.cat([y, two], 1)))
        y = F.interpolate(y, scale_factor=2.0)
        return self.out(F.relu(self.up_one(torch.cat([y, one], 1))))

class Inline(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(1, 4), conv(4, 4), conv(4, 4), conv(4, 8)
    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.c(x)

def sequential():
    return nn.Sequential(nn.Flatten(0, 0), conv(1, 4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Sequential(conv(4, 8), nn.BatchNorm2d(8), nn.ReLU()), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
def listed():
    two = nn.Sequential(conv(1, 4), conv(4, 4))
    return [nn.Identity(), two, nn.ReLU(), nn.MaxPool2d(2), conv(4, 8), nn.AvgPool2d(2)]
def mlp():
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
def language():
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 50))
"""


def origin(code: str, name: str) -> Origin:
    return Origin(f"net.py:{name}", (), code, "/nowhere")


def names(found: list[tuple[str, nn.Module]]) -> list[str]:
    return [name.split(" ")[0] for name, _ in found]


def features(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What a part of a model gives in a forward pass of the whole."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda *call: found.append(call[2]))
    with torch.inference_mode():
        model.eval()(x)
    hook.remove()
    return found[-1]


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def made(code: str, name: str) -> nn.Module:
    """The model with the weights of seed 3."""
    space: dict[str, Any] = {"__name__": "made"}
    exec(code, space)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(torch.Generator().manual_seed(3).get_state())
        return space[name]()


@pytest.mark.parametrize(
    ("code", "name", "shape", "path", "last", "count"),
    [
        (TORCHVISION, "vit", (3, 32, 32), "encoder.ln", 4, 4),
        (TORCHVISION, "vit", (3, 32, 32), "encoder.layers.encoder_layer_1", 3, 4),
        (TORCHVISION, "swin", (3, 32, 32), "features.2", 3, 5),
        (TORCHVISION, "convnext", (3, 64, 64), "features.2.0", 3, 5),
        (TORCHVISION, "wrapped", (3, 64, 64), "backbone.layer2", 5, 9),
        (TIMM, "VisionTransformer", (3, 224, 224), "blocks.0", 2, 4),
        (MADE, "Plain", (1, 16, 16), "b", 2, 3),
        (MADE, "sequential", (1, 16, 16), "4", 2, 2),
    ],
)
def test_blocks_in_a_row_are_the_models_features(
    code: str, name: str, shape: Shape, path: str, last: int, count: int
) -> None:
    """The same draws from the same seed, so the same weights; the same features, to the bit."""
    found, model, x = construct(origin(code, name), 3, shape), made(code, name), seeded(2, *shape)
    assert len(found) == count
    y = x
    with torch.inference_mode():
        for _, block in found[:last]:
            y = block.eval()(y)
    wanted = features(model, path, x)
    if name == "Plain":
        wanted = wanted.relu()  # pooling opens the next block
    assert torch.equal(y, wanted)
    blocks = read_blocks(origin(code, name), shape)
    assert blocks[last - 1].gives == y.shape[1:]


def test_what_a_forward_computes_joins_the_block_before_it() -> None:
    found = construct(origin(MADE, "Plain"), 3, (1, 16, 16))
    assert names(found) == ["a", "b", "c"]
    x = seeded(2, 1, 16, 16)
    model = made(MADE, "Plain").eval()
    with torch.inference_mode():
        y = x
        for _, block in found:
            y = block.eval()(y)
        assert torch.equal(model.get_submodule("fc")(y.mean((2, 3))), model(x))


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "wanted"),
    [
        ("sequential", (1, 16, 16), "uint8", ["1", "4.0"]),
        ("listed", (1, 16, 16), "uint8", ["listed[1]", "listed[4]"]),
        ("Inline", (1, 16, 16), "uint8", ["stem", "a", "c"]),
        ("mlp", (12,), "float32", ["0", "2"]),
        ("language", (6,), "int32", ["0", "1"]),
    ],
)
def test_where_models_are_cut(name: str, shape: Shape, dtype: str, wanted: list[str]) -> None:
    found = construct(origin(MADE, name), None, shape, dtype)
    assert names(found) == wanted
    assert len(read_blocks(origin(MADE, name), shape, dtype)) == len(wanted)


def test_pooling_opens_a_block_and_activations_close_one() -> None:
    (_, first), (_, second) = construct(origin(MADE, "listed"), None)
    assert [type(part).__name__ for part in first.children()] == ["Identity", "Sequential", "ReLU"]
    assert [type(part).__name__ for part in second.children()] == [
        "MaxPool2d",
        "Conv2d",
        "AvgPool2d",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("UNet", ["is no chain of blocks", "its skip connection crosses block 3 (mid)"]),
        ("Drops", ["dropout does something else in training mode", "module of its own"]),
        (
            "Chooses",
            [
                "b (Conv2d) does not see just what",
                "cannot be followed (net.py, line 29, RuntimeError",
            ],
        ),
    ],
)
def test_what_is_no_chain_is_refused_with_the_reason(name: str, words: list[str]) -> None:
    with pytest.raises(UnusableNetwork) as error:
        read_blocks(origin(MADE, name), (1, 16, 16))
    said = str(error.value)
    assert "\n" not in said
    assert all(word in said for word in [f"network net.py:{name}", *words]), said


# ---- timm ----------------------------------------------------------------------------------------


def test_models_of_timm_are_made_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = ModuleType("timm")
    exec(TIMM, timm.__dict__)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr("inspect.getsource", lambda kind: f"class {kind.__name__}: pass")
    source = Origin("timm:vit_tiny_patch8.augreg_in1k", (("img_size", 32), ("depth", 2)))
    blocks = read_blocks(source, (3, 32, 32))
    assert [block.gives for block in blocks] == [(17, 16)] * 3
    assert [block.x_0 for block in blocks] == [((3, 32, 32), "float32")] * 3
    (module,) = block_modules(blocks[1:2], None)
    assert module(torch.zeros(1, 17, 16)).shape == (1, 17, 16)


def test_without_timm_it_is_said_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnusableNetwork, match=r"network timm:vit: .*: pip install timm"):
        construct(Origin("timm:vit"), None)


# ---- memory --------------------------------------------------------------------------------------

CHAIN = """
from torch import nn
def chain():
    return [nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(10)]
"""


def test_only_blocks_that_are_wanted_have_content() -> None:
    source, one = origin(CHAIN, "chain"), 9 * 64 * 64 * 4
    with watched(CPU) as peak:
        blocks = read_blocks(source, (64, 8, 8))
    assert peak.nbytes < 6 * one
    with watched(CPU) as peak:
        (module,) = block_modules(blocks[4:5], None)
    assert peak.nbytes == one
    assert [p.device for p in module.parameters()] == [CPU]
    assert not any(p.any() for p in module.parameters())
    assert {p.is_meta for _, m in construct(source, None) for p in m.parameters()} == {True}


def test_a_constructor_that_reads_numbers_from_tensors_has_content() -> None:
    for _, module in construct(origin(TIMM, "VisionTransformer"), None):
        assert not any(p.is_meta for p in module.parameters())


def test_every_model_of_torchvision_that_is_asked_for_is_cut() -> None:
    wanted = {"mobilenet_v2": 19, "efficientnet_b0": 18, "densenet121": 8}
    found = {n: len(construct(Origin(f"torchvision:{n}"), None)) for n in wanted}
    assert found == wanted
