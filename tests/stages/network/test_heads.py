"""Classifiers of what is no map: what they compute, and their arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from footprints import stepped
from networks import NAME, beside, named
from runs import Place, here, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from strata.pipeline.errors import RecipeError, RunConflict
from strata.pipeline.recipe.network import AuxiliaryTable
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.run.rundir import find
from strata.stages.network.block_reading import read_blocks
from strata.stages.network.blocks import Block, Origin
from strata.stages.network.footprint import solving
from strata.stages.network.network import build, build_problem
from strata.stages.network.spec import AuxiliarySpec, described

CODE = """
import torch
from torch import nn

class Attends(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.see = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    def forward(self, x):
        y = self.norm(x)
        x = x + self.see(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))

class Last(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).movedim(1, -1)

def tokens(width=32): return [nn.Embedding(64, width), Attends(width)]
def vectors(): return [nn.Linear(64, 512), nn.Sequential(nn.Linear(512, 256), nn.ReLU())]
def sound(): return [nn.Conv1d(2, 32, 5, padding=2), nn.Conv1d(32, 64, 5, 2, 2)]
def swin(): return [Last(3, 32, 4, 4), nn.LayerNorm(32)]
def volumes(): return [nn.Conv3d(1, 8, 3, padding=1)]
def patches():
    return [nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.Flatten(2), nn.Linear(64, 8))]
"""
KINDS = {
    "tokens": ((24,), "int32", "tokens"),
    "vectors": ((64,), "float32", "vector"),
    "sound": ((2, 128), "float32", "places"),
    "swin": ((3, 32, 32), "uint8", "tokens"),
    "volumes": ((1, 8, 8, 8), "float32", "places"),
}


def blocks_of(name: str) -> tuple[Block, ...]:
    shape, dtype, _ = KINDS[name]
    return read_blocks(Origin(f"net.py:{name}", (), CODE), shape, dtype)


def inputs(block: Block, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if block.x_0[1] == "int32" and block.index == 1:
        return torch.randint(0, 64, (rows, *block.takes), generator=generator, dtype=torch.int32)
    return torch.randn(rows, *block.takes, generator=generator)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_a_head_for_every_kind_of_sample(name: str, k: int) -> None:
    blocks = blocks_of(name)
    specs = AuxiliaryTable(k, 16 * (k > 1)).specs(blocks, 10, 0)
    for block, spec in zip(blocks, specs, strict=True):
        assert spec.sees == KINDS[name][2]
        problem = build_problem(block, spec, 0).eval()
        x = problem.layer(inputs(block, 4)).detach()
        with FlopCounterMode(display=False) as counter:
            z = problem.auxiliary(x)
        assert z.shape == (4, 10)
        assert spec.operations(block.gives) == counter.get_total_flops() // 2 // 4
        assert spec.parameters == sum(p.numel() for p in problem.auxiliary.parameters())
        assert sum(type(part) is nn.Linear for part in problem.auxiliary.modules()) == k


def test_what_heads_make_of_tokens() -> None:
    spec = AuxiliarySpec(8, 1, 0, 10, False, True, sees="tokens")
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    for changed, wanted in (
        ({}, lambda head: head.linear(head.norm(x).mean(1))),
        ({"pool": "class"}, lambda head: head.linear(head.norm(x)[:, 0])),
        ({"each": True}, lambda head: head.linear(head.norm(x))),
        ({"sees": "places"}, lambda head: head.linear(head.norm(x).mean(1))),
    ):
        head = build([replace(spec, **changed)], 0)[0]
        seen = x.transpose(1, 2) if changed.get("sees") == "places" else x
        assert torch.allclose(head(seen), wanted(head), atol=1e-6), changed
    each = build([replace(spec, each=True)], 0)[0]
    assert torch.equal(each(x[:1, :2].unflatten(1, (1, 2))), each(x[:1, :2]))  # Swin's maps


def test_fingerprints_of_maps_stay_as_they_were() -> None:
    known = {"channels": 8, "k": 2, "width": 4, "classes": 10, "batch_norm": True, "bias": False}
    assert described(AuxiliarySpec(8, 2, 4, 10, True, False)) == known


@pytest.mark.parametrize(
    ("table", "name", "each", "words"),
    [
        ({"half_resolution": True, "k": 2, "width": 4}, "tokens", False, "half_resolution' is for"),
        ({"final_hidden": (8,)}, "vectors", False, r"final_hidden' is for maps, but x_2 is a vec"),
        ({"pool": "class"}, "sound", False, "no layer gives tokens"),
        ({}, "vectors", True, "every token has a label of its own, but x_1 is a vector"),
    ],
)
def test_settings_for_other_kinds_are_refused(
    table: dict[str, object], name: str, each: bool, words: str
) -> None:
    settings: dict[str, object] = {"k": 1, **table}
    with pytest.raises(RecipeError, match=words):
        AuxiliaryTable(**settings).specs(blocks_of(name), 10, 0, each=each)  # pyright: ignore


def test_a_pool_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'auxiliary.pool' is 'max'"):
        AuxiliaryTable(1, pool="max")


def test_a_recipe_may_mix_maps_and_tokens(tmp_path: Path) -> None:
    code = CODE.replace("nn.Linear(64, 8)", "nn.Linear(64, 8)")
    text = named('"residual.py:patches"', views="0")
    recipe = parse(text, "tiny", beside(tmp_path, code))
    assert [one.sees for one in recipe.auxiliaries] == ["map", "tokens"]
    assert recipe.shape(2, recipe.augment.crop) == (4, 8)
    recipe.check_layers()


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "each", "pool", "k", "classes"),
    [
        ("tokens", False, "mean", 2, 10),
        ("tokens", False, "class", 2, 10),
        ("tokens", True, "mean", 2, 64),
        ("tokens", True, "mean", 1, 512),
        ("vectors", False, "mean", 3, 10),
        ("sound", False, "mean", 1, 10),
        ("swin", False, "mean", 2, 10),
        ("volumes", False, "mean", 1, 10),
    ],
)
def test_a_step_takes_what_was_predicted(
    name: str, each: bool, pool: str, k: int, classes: int, compute: str
) -> None:
    batch = 32
    for block in blocks_of(name)[pool == "class" :]:
        table = AuxiliaryTable(k, 32, pool=pool)
        (spec,) = table.specs([block], classes, 0, each=each)
        problem = build_problem(block, spec, 0)
        x = inputs(block, batch)
        y = torch.zeros((batch, block.gives[0]) if each else batch).long()
        measured = stepped(problem, x.shape[1:], batch, 1, getattr(torch, compute), (x, y))
        how = {"batch": batch, "micro": batch, "divided": False, "compute": compute}
        found = solving(block, spec, block.takes, **how)
        assert found == pytest.approx(measured, rel=0.15), block.name


# ---- of a file -----------------------------------------------------------------------------------

HEAD = """
import torch
from torch import nn

class Drops(nn.Module):
    def __init__(self, shape, classes, width):
        super().__init__()
        self.conv = nn.Conv2d(shape[0], width, 3, padding=1)
        self.drop, self.linear = nn.Dropout(0.2), nn.Linear(width, classes)
    def forward(self, x):
        return self.linear(self.drop(torch.relu(self.conv(x)).mean((2, 3))))

def head(shape, classes, width=8): return Drops(shape, classes, width)
def few(shape, classes): return Drops(shape, classes - 1, 8)
def listed(shape, classes): return [nn.Linear(1, 1)]
"""


def with_head(place: Path, auxiliary: str = '"head.py:head"', network: str = NAME) -> Recipe:
    beside(beside(place), HEAD, "head.py")
    return parse(headed(auxiliary, network), "tiny", place)


def headed(auxiliary: str = '"head.py:head"', network: str = NAME) -> str:
    before, rest = named(network, views="0", epochs=1).split("[auxiliary]")
    return f"auxiliary = {auxiliary}\n{before}[schedule]{rest.split('[schedule]')[1]}"


def test_a_file_makes_the_classifiers(tmp_path: Path) -> None:
    table = '{ name = "head.py:head", arguments = { width = 16 } }'
    first, wide = with_head(tmp_path), with_head(tmp_path, table)
    for j, (layer, spec) in enumerate(first.problems, start=1):
        x = torch.zeros(4, *first.shape(j, first.augment.crop))
        head = build([spec], 3)[0]
        assert type(head).__name__ == "Drops"
        assert spec.draws
        assert head.eval()(x).shape == (4, first.data.classes)
        assert spec.parameters == sum(p.numel() for p in head.parameters())
        with FlopCounterMode(display=False) as counter:
            head(x)
        assert spec.operations(x.shape[1:]) == counter.get_total_flops() // 2 // 4
        again, other = build([spec], 3)[0], build([spec], 4)[0]
        assert torch.equal(again.linear.weight, head.linear.weight)
        assert not torch.equal(other.linear.weight, head.linear.weight)
        assert layer.index == j
    assert first.science()["auxiliary"]["name"] == "head.py:head"
    assert first.auxiliaries[0].digest != wide.auxiliaries[0].digest
    assert "head" not in described(first.auxiliaries[0])


def test_a_step_with_a_files_classifier_takes_what_was_predicted(tmp_path: Path) -> None:
    recipe, batch = with_head(tmp_path), 32
    for j, (layer, spec) in enumerate(recipe.problems, start=1):
        shape = recipe.shape(j - 1, recipe.augment.crop)
        measured = stepped(build_problem(layer, spec, 0), shape, batch, 1, torch.float32)
        found = solving(layer, spec, shape, batch=batch, micro=batch, divided=False)
        assert found == pytest.approx(measured, rel=0.15), j


@pytest.mark.parametrize(
    ("auxiliary", "words"),
    [
        ('"head.py:few"', r"the classifier of x_1 gives 9; its last axis must be 10 classes"),
        ('"head.py:listed"', "must return one module, not a list"),
        ('"head.py:none"', "head.py has no none"),
        ('"torchvision:resnet18"', r"'auxiliary' is 'torchvision:resnet18'; it must be \"FILE"),
        ('{ name = "head.py:head", k = 2 }', "unknown key 'auxiliary.k' beside 'auxiliary.name'"),
    ],
)
def test_classifiers_that_will_not_do_are_refused(
    tmp_path: Path, auxiliary: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        with_head(tmp_path, auxiliary).auxiliaries  # noqa: B018


@pytest.mark.parametrize("is_named", [True, False])
def test_a_run_keeps_the_file_and_the_figures(tmp_path: Path, is_named: bool) -> None:
    """Also where layers are those of a table; looking at it makes no classifier."""
    text = headed()
    if not is_named:
        network = tiny().split("[network]")[1].split("[auxiliary]")[0]
        text = text.split("\n", 2)[0] + "\n" + text.split("\n", 2)[2] + f"[network]{network}"
    beside(beside(tmp_path), HEAD, "head.py")
    (tmp_path / "tiny.toml").write_text(text)
    place = Place(tmp_path)
    done = place.do("run")
    assert done.rc == 0, done.err
    (tmp_path / "head.py").unlink()
    run = find(place.run)
    assert run is not None
    assert [spec.head.name for spec in run.recipe.auxiliaries] == ["Drops"] * run.layers
    assert (place.run / "head.py").read_text() == HEAD
    again = here("run", place.run / "recipe.toml", "--run", place.run, "--store", place.store)
    assert again.rc == 0, again.err
    assert again.err.count("solved already") == run.layers
    (place.run / "head.py").write_text(HEAD + "\n")
    with pytest.raises(RunConflict, match="was edited since the run was made"):
        find(place.run)
