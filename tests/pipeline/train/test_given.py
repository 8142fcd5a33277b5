"""Layers that are given: weights from a file, never trained, and found as solved ones are."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from command import noise
from networks import RESIDUAL, beside, named
from PIL import Image
from root import MACHINES
from runs import Place
from safetensors.torch import load_file, save_file
from spoil import flip
from torch import Tensor, nn
from torchvision.models import resnet18

from strata.pipeline.errors import RecipeError
from strata.pipeline.feed.features import (
    frozen_layer,
    frozen_layers,
    image_views,
    level_draws,
)
from strata.pipeline.plan.choose import X0, CachedDepth
from strata.pipeline.plan.costs import RecipeCosts
from strata.pipeline.plan.machine import load as load_machine
from strata.pipeline.recipe.builtin import load
from strata.pipeline.run.rundir import find
from strata.stages.network import block_source
from strata.store.feature_store import Store

WEIGHTS = "residual.safetensors"
MACHINE = MACHINES / "laptop.toml"
RESNET = """
[data]
source = "imagefolder:{pets}"
classes = 2
channels = 3
size = 64
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
train = 8
test = 8
[augment]
crop = 64
pad = 0
views = 1
allow_single_view = true
flip = false
[network]
name = "torchvision:resnet18"
weights = "torchvision:IMAGENET1K_V1"
frozen = 8
[auxiliary]
k = 1
[schedule]
kind = "one-cycle"
epochs = 1
batch = 4
lr = 0.1
precision = "float32"
[cache]
precision = "float32"
"""
WHOLE = """

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = blocks(width=8)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))
"""
NETWORK = '{{ name = "residual.py:blocks", arguments = {{ width = 8 }}, weights = "{}"{} }}'


def network(seed: int = 3) -> nn.Sequential:
    """The blocks of residual.py, as somebody else trained them."""
    module = ModuleType("residual")
    exec(RESIDUAL, module.__dict__)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(*module.blocks(width=8))
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean = torch.randn(part.num_features) / 4
                part.running_var = 1 + torch.rand(part.num_features)
    return made.eval()


def place(
    root: Path, frozen: str = ", frozen = 2", weights: str = WEIGHTS, **changes: object
) -> Place:
    beside(root)
    text = named(NETWORK.format(weights, frozen), **{"epochs": 1, "views": 2, **changes})
    (root / "tiny.toml").write_text(text)
    save_file(network().state_dict(), root / WEIGHTS)
    return Place(root)


def rows(one: Place, depth: int, split: str = "test", view: str = "test") -> Tensor:
    """A level as float32 values."""
    run, store = one.overview().run, Store(one.store)
    assert run is not None
    (path,) = one.store.glob(f"x_{depth}-*/{view}")
    level = next(store.open(key) for key in keys(one, depth) if key.directory(one.store) == path)
    return torch.from_numpy(level.read(0, len(level)).astype(np.float32))


def keys(one: Place, depth: int) -> list:
    from strata.pipeline.run.levels import all_at

    run = find(one.run)
    assert run is not None
    return all_at(run, depth)


def images(one: Place, level: str = "test") -> Tensor:
    """What the network sees of the test images."""
    run = find(one.run)
    assert run is not None
    key = next(key for key in keys(one, 0) if key.split == level)
    stored = Store(one.store).open(key)
    x = torch.from_numpy(stored.read(0, len(stored)))
    return image_views(run.recipe, x, level_draws(run.recipe, 0, "clean", len(x)))


@pytest.mark.parametrize("precision", ["float32", "uint8"])
def test_features_are_those_of_the_whole_network_and_need_no_training(
    tmp_path: Path, precision: str
) -> None:
    one = place(tmp_path, precision=precision)
    done = one.do("materialize", "--layer", 2, "--json")
    steps = ["read images into x_0", "take layers 1 … 2 as given", "write x_2"]
    assert done.json["done"] == steps
    assert [path.name[:3] for path in sorted(one.store.glob("x_*"))] == ["x_0", "x_2"]
    with torch.no_grad():
        x = network()[:2](images(one))
    if precision == "float32":
        assert torch.allclose(rows(one, 2), x, atol=1e-5)
    else:
        scales = load_file(one.run / "layer_2/quantiser.safetensors")
        shape = (1, -1, 1, 1)
        steps = scales["scale"].view(shape)
        found = (rows(one, 2) - scales["zero"].float().view(shape)) * steps
        assert ((found - x).abs() <= 2 * steps).float().mean() > 0.99
    assert not list(one.run.glob("layer_*/auxiliary*"))


def test_a_chain_is_calibrated_without_running_all_of_it_for_every_layer(tmp_path: Path) -> None:
    """Where memory has room for the rows in between; the scales are the same."""
    places = [place(tmp_path / name, ', frozen = "all"', precision="uint8") for name in "abc"]
    calls: dict[str, int] = dict.fromkeys(("1GB", "10kB"), 0)
    for memory, one in zip(calls, places, strict=False):

        def count(module: nn.Module, *_: object, memory: str = memory) -> None:
            calls[memory] += isinstance(module, nn.Conv2d) and module.in_channels == 1

        with nn.modules.module.register_module_forward_hook(count):
            done = one.do("materialize", "--layer", 3, "--memory-budget", memory)
        assert done.rc == 0, done.err
    for j in (1, 2, 3):  # each on a level of the one below
        assert places[2].do("materialize", "--layer", j).rc == 0
        paths = (one.run / f"layer_{j}/quantiser.safetensors" for one in places)
        assert len({path.read_bytes() for path in paths}) == 1
    run = find(places[0].run)
    assert run is not None
    (train,) = (key for key in keys(places[0], 0) if key.split == "train")
    blocks = -(-len(Store(places[0].store).open(train)) // run.recipe.cache.block)
    assert calls["10kB"] - calls["1GB"] == blocks


def test_every_command_takes_given_layers_as_solved_ones(tmp_path: Path) -> None:
    one = place(tmp_path, precision="uint8")
    assert one.do("run").rc == 0
    record = json.loads((one.run / "layer_2/layer.json").read_text())["body"]
    assert record["given"] is True
    kept = load_file(one.run / "layer_2/weights.safetensors")
    state = network()[1].state_dict()
    assert all(torch.equal(kept[name], state[name]) for name in state)
    status = one.do("status", "--json").json["layers"]
    assert [layer["state"] for layer in status] == ["given", "given", "solved"]
    assert status[1]["test_accuracy"] is None
    assert 0 < status[2]["test_accuracy"] <= 1
    found = one.do("evaluate", "--json").json
    assert [layer["layer"] for layer in found["layers"]] == [3]
    assert found["confusion"]["of"] == "ensemble of layers 3 … 3 (probabilities)"
    assert "does not" not in one.do("report").err
    assert one.do("probe", "--layer", 2).rc == 0
    assert one.do("final", "--vary", "schedule.lr=0.05").rc == 0
    assert one.do("sweep", "--layer", 3, "--vary", "schedule.lr=0.05,0.1").rc == 0
    assert "layer 2 is given" in one.do("sweep", "--layer", 2, "--vary", "schedule.lr=0.1").error
    assert one.do("statistics", "--layer", 2).rc == 0
    assert one.do("audit", "--rows", 30).rc == 0
    assert one.do("export", "--to", tmp_path / "e", "--ensemble").rc == 0
    assert one.do("export", "--to", tmp_path / "f", "--layer", 2, "--features").rc == 0
    refused = one.do("export", "--to", tmp_path / "g", "--layer", 2)
    assert refused.rc == 2
    assert "layer 2 is given, and has no classifier: add --features" in refused.error
    assert one.do("evict", "--layer", 2).rc == 0
    assert one.do("run", "--json").json["done"] == []


def test_a_damaged_layer_or_copy_is_mended(tmp_path: Path) -> None:
    one = place(tmp_path, precision="uint8")
    assert one.do("materialize", "--layer", 2).rc == 0
    before = one.files(), one.weights()
    for name in ("layer_1/weights.safetensors", "initial/layer_2.safetensors"):
        flip(one.run / name)
        assert one.do("verify").rc == 10
        assert one.do("verify", "--repair").rc == 0
        assert (one.files(), one.weights()) == before
    (one.root / WEIGHTS).unlink()
    assert one.do("clean", "--layer", 2, "--yes").rc == 0
    assert one.do("materialize", "--layer", 2).rc == 0
    assert (one.files(), one.weights()) == before
    flip(one.run / "initial/layer_2.safetensors")
    lost = one.do("verify", "--repair")
    assert lost.rc == 3
    assert "there is no such file" in lost.error


def test_the_file_may_move_and_a_changed_one_is_another_network(tmp_path: Path) -> None:
    one = place(tmp_path)
    file = one.root / WEIGHTS
    assert one.do("materialize", "--layer", 1).rc == 0
    torch.save({"state_dict": network().state_dict()}, one.root / "same.pth")
    file.rename(one.root / "moved")
    assert one.do("materialize", "--layer", 2).rc == 0
    recipe = one.root / "tiny.toml"
    recipe.write_text(recipe.read_text().replace(WEIGHTS, "same.pth"))
    assert one.do("materialize", "--layer", 2, "--json").json["done"] == []
    save_file(network(4).state_dict(), file)
    recipe.write_text(recipe.read_text().replace("same.pth", WEIGHTS))
    for command in ("explain", "materialize"):
        other = one.do(command, "--layer", 2)
        assert other.rc == 8
        assert "network.weights: was" in other.error
    recipe.write_text(recipe.read_text().replace(WEIGHTS, "nowhere.pth"))
    assert "there is no such file" in one.do("explain", "--layer", 2).error


def test_all_layers_may_be_given(tmp_path: Path) -> None:
    one = place(tmp_path, ', frozen = "all"')
    planned = one.do("plan", "--json").json
    assert (planned["todo"][-1], planned["ceiling"]) == ("write x_3", 1.0)
    done = one.do("run", "--json").json["done"]
    assert done[-1] == "write x_3"
    assert "train classifiers on it" in one.do("run").out
    assert one.do("evaluate").rc == 8
    assert one.do("final", "--vary", "schedule.lr=0.1").rc == 0
    assert one.do("evaluate", "--json").json["finals"][0]["layer"] == 3
    assert one.do("report").rc == 0
    assert one.do("plan").rc == 0
    assert one.do("export", "--to", tmp_path / "e", "--final", "lr=0.1").rc == 0


def test_weights_are_where_training_begins(tmp_path: Path) -> None:
    """Without ``frozen`` of every layer, and of `baseline` with it, too: a rate that moves nothing
    leaves them where they were."""
    one = place(tmp_path, "", batch=1437)
    recipe = one.root / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("lr = 0.1", "lr = 1e-30"))
    assert one.do("run").rc == 0
    for j, block in enumerate(network(), start=1):
        kept = load_file(one.run / f"layer_{j}/weights.safetensors")
        for name, value in block.named_parameters():
            assert torch.allclose(kept[name], value, rtol=0, atol=1e-20)
    two = place(tmp_path / "two", ", frozen = 2")
    recipe = two.root / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("lr = 0.1", "lr = 1e-30"))
    assert two.do("baseline").rc == 0
    kept = load_file(two.run / "baseline/plain/weights.safetensors")
    for j, block in enumerate(network()):
        for name, value in block.named_parameters():
            assert torch.allclose(kept[f"layers.{j}.{name}"], value, rtol=0, atol=1e-20)
    assert two.do("probe", "--of", "baseline", "--layer", 2).rc == 0


def test_features_of_a_resnet_are_those_that_a_hook_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that torchvision has published, where it would have put them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for split, kind in itertools.product(("train", "test"), ("cat", "dog")):
        (folder := tmp_path / "pets" / split / kind).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(noise(i, 64, 64, 3)).save(folder / f"{i}.png")
    (tmp_path / "tiny.toml").write_text(RESNET.format(pets=tmp_path / "pets"))
    one = Place(tmp_path)
    refused = one.do("materialize", "--layer", 6)
    assert refused.rc == 3
    assert "add --download to fetch https://download.pytorch.org/models/resnet18" in refused.error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = resnet18().eval()
    place = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    place.parent.mkdir(parents=True)
    torch.save(model.state_dict(), place)
    done = one.do("materialize", "--layer", 6)
    assert done.rc == 0
    assert "2 left out, which no block has: fc.bias, fc.weight" in done.err
    seen = list[Any]()
    model.layer3[0].register_forward_hook(lambda part, given, output: seen.append(output))
    with torch.no_grad():
        model(images(one))
    assert torch.allclose(rows(one, 6), seen[0], atol=1e-5)
    place.unlink()
    assert one.do("materialize", "--layer", 7).rc == 0


def test_what_baseline_trained_is_given_to_another_run(tmp_path: Path) -> None:
    first = place(tmp_path / "a", "")
    assert first.do("baseline").rc == 0
    path = first.run / "baseline/plain/weights.safetensors"
    one = place(tmp_path / "b", weights=str(path))
    done = one.do("materialize", "--layer", 2)
    assert done.rc == 0, done.err
    assert "which no block has: auxiliary." in done.err
    trained = load_file(path)
    for j in (1, 2):
        for name, tensor in load_file(one.run / f"layer_{j}/weights.safetensors").items():
            assert torch.equal(tensor, trained[f"layers.{j - 1}.{name}"])


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    one = place(tmp_path)
    state = network().state_dict()
    del state["1.first.0.weight"]
    state["1.extra"] = torch.zeros(2)
    state["0.0.weight"] = torch.zeros(8, 3, 3, 3)
    save_file(state, one.root / WEIGHTS)
    refused = one.do("materialize", "--layer", 1)
    assert refused.rc == 3
    for said in (
        "1 missing (1.first.0.weight)",
        "1 unexpected (1.extra)",
        "1 of other shapes (0.0.weight is 8×3×3×3 there, and 8×1×3×3 in the network)",
    ):
        assert said in refused.error
    assert not (one.run / "run.json").exists()


def test_the_plan_says_from_when_on_the_cache_pays(tmp_path: Path) -> None:
    one = place(tmp_path)
    plan = one.do("plan", "--machine", MACHINE, "--json").json
    assert plan["todo"][1:] == [
        "take layers 1 … 2 as given",
        "write x_2",
        "solve layer 3",
    ]
    _, second, third = plan["depths"][1:]
    assert second["steps"] == second["operations"] == second["auxiliary_parameters"] == 0
    assert 0 < second["memory_bytes"] < third["memory_bytes"]
    assert plan["total_bytes"] == plan["depths"][0]["bytes"] + second["bytes"]
    reuse = plan["economics"]["reuse"]
    assert reuse["depth"] == 2
    pays = reuse["write"] / (reuse["again"] - reuse["read"])
    assert reuse["epochs"] is None or reuse["epochs"] == pytest.approx(pays)
    recipe, machine = load(str(one.root / "tiny.toml"))[1], load_machine(MACHINE)
    costs = RecipeCosts(recipe, machine, recipe.data.train, recipe.data.test)
    x_2 = CachedDepth(2, reuse["form"])
    heads = [costs.problem(base, 3, swept=True) for base in (X0, x_2)]
    assert heads[0] > costs.problem(X0, 3), "a variant's risk is found on training rows"
    if reuse["problems"] is not None:
        assert reuse["problems"] == pytest.approx(reuse["write"] / (heads[0] - heads[1]), rel=0.05)
    assert [depth["depth"] for depth in plan["economics"]["depths"]] == [2]
    said = one.do("plan", "--machine", MACHINE).out
    assert "Given, and not trained, are layers 1 … 2." in said
    assert "Layers 1 … 2 are given. An epoch that reads x_2 takes" in said


def test_a_checkpoint_of_a_whole_model_is_taken_apart(tmp_path: Path) -> None:
    """Its keys are the model's, with what a trainer adds; another head is no matter."""
    beside(tmp_path, RESIDUAL + WHOLE)
    state = network().state_dict()
    names = {"0": "stem", "1": "one", "2": "two"}
    keys = {f"module.{names[key[0]]}{key[1:]}": tensor for key, tensor in state.items()}
    whole = {"epoch": 9, "model": {**keys, "module.other.weight": torch.zeros(2)}}
    torch.save(whole, tmp_path / "whole.pth")
    made = '{ name = "residual.py:Whole", weights = "whole.pth", frozen = "all" }'
    (tmp_path / "tiny.toml").write_text(named(made, views=2, precision="float32"))
    one = Place(tmp_path)
    done = one.do("materialize", "--layer", 3)
    assert done.rc == 0
    assert "weights whole.pth: 1 left out, which no block has: other.weight" in done.err
    with torch.no_grad():
        assert torch.allclose(rows(one, 3), network()(images(one)), atol=1e-5)


def test_a_network_is_made_once_for_all_its_given_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To make a block, the whole network is cut: that is done once, whatever is frozen."""
    one, made = place(tmp_path), list[int]()
    one.do("materialize", "--layer", 2)
    run, real = one.overview().existing(), block_source.construct
    monkeypatch.setattr(block_source, "construct", lambda *a, **k: made.append(1) or real(*a, **k))
    layers = frozen_layers(run, [1, 2], torch.device("cpu"))
    assert len(made) == 1
    for j, frozen in enumerate(layers, start=1):
        alone = frozen_layer(run, j, torch.device("cpu")).layer.state_dict()
        for name, tensor in frozen.layer.state_dict().items():
            assert torch.equal(tensor, alone[name])


def test_a_recipe_of_features_alone_needs_no_schedule(tmp_path: Path) -> None:
    """What heads are trained with where nothing is said; with a layer to train it must be."""
    beside(tmp_path)
    text = named('{ name = "residual.py:blocks", arguments = { width = 8 }, frozen = "all" }')
    head, rest = text.split("[auxiliary]")
    alone = f"{head}[cache]{rest.split('[cache]')[1]}"
    (tmp_path / "tiny.toml").write_text(alone)
    (one,) = Place(tmp_path).do("final", "--vary", "epochs=1", "--json").json["variants"]
    assert one["name"] == "epochs=1"
    recipe = load(str(tmp_path / "tiny.toml"))[1]
    assert (recipe.auxiliary.k, recipe.schedule.kind, recipe.schedule.epochs) == (
        1,
        "one-cycle",
        10,
    )
    (tmp_path / "tiny.toml").write_text(alone.replace('"all"', "1"))
    with pytest.raises(RecipeError, match="missing key 'auxiliary'"):
        load(str(tmp_path / "tiny.toml"))
