"""What may be around a classifier: layers of a window, copies, patches, similarity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from footprints import stepped
from runs import tiny
from torch.nn import functional as F

from strata.pipeline.recipe.recipe import Recipe, parse
from strata.stages.network.blocks import shape_at
from strata.stages.network.footprint import solving
from strata.stages.network.network import AuxiliaryNetwork, build, build_problem, compared
from strata.stages.network.spec import AuxiliarySpec, LayerSpec, described, sampled

NARROW = dict(zip(range(1, 7), (8, 8, 16, 16, 32, 32), strict=True))


def layers(pool: str = "invertible") -> tuple[LayerSpec, ...]:
    """Six, of which the third and the fifth have half of the pixels and twice the width."""
    found, inputs = [], 3
    for j, width in NARROW.items():
        found.append(LayerSpec(j, inputs, width, int(j in (3, 5)), True, False, pool))
        inputs = width
    return tuple(found)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def auxiliary(channels: int, **changes: Any) -> AuxiliarySpec:
    return replace(AuxiliarySpec(channels, 2, 8, 10, True, False), **changes)


@pytest.mark.parametrize(
    ("count", "picked"),
    [(0, []), (1, [3, 5, 6]), (2, [3, 4, 5, 6]), (3, [3, 5, 6]), (5, [2, 3, 4, 5, 6])],
)
def test_copies_are_spaced_evenly_and_fit_each_other(count: int, picked: list[int]) -> None:
    rest = layers()[1:]
    found = sampled(rest, (8, 16, 16), count)
    assert [layer.index for layer in found] == picked
    assert shape_at(found, len(found), (8, 16, 16)) == ((32, 4, 4) if count else (8, 16, 16))


def test_copies_have_weights_of_their_own_from_the_seed() -> None:
    spec = auxiliary(16, copies=layers()[2:4])
    one, again, other = (build([spec], seed)[0] for seed in (1, 1, 2))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    kernel = "patched.0.convolution.weight"
    assert not torch.equal(one.state_dict()[kernel], other.state_dict()[kernel])
    assert sum(p.numel() for p in one.parameters()) == spec.parameters


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_the_mean_over_patches_and_so_are_the_gradients(training: bool) -> None:
    """One patch at a time, computed again in backward, is all of them at once."""
    (network,) = build([auxiliary(4, patches=2, batch_norm=False, bias=True)], 0)
    network.train(training)
    x = drawn(3, 4, 8, 8).requires_grad_()
    parts = [x[..., a : a + 4, b : b + 4] for a in (0, 4) for b in (0, 4)]
    wanted = torch.stack([network.patched(part) for part in parts]).mean(0)
    found = network(x)
    torch.testing.assert_close(found, wanted)
    of = [x, *network.parameters()]
    for one, two in zip(
        torch.autograd.grad(found.square().sum(), of),
        torch.autograd.grad(wanted.square().sum(), of),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_patches_count_once_for_batch_norm() -> None:
    (network,) = build([auxiliary(4, patches=2)], 0)
    norm = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    x = drawn(3, 4, 8, 8).requires_grad_()
    network.train()(x).sum().backward()
    assert norm.num_batches_tracked == 4, "once for every patch, not again in backward"


def test_alike_in_x_j_as_in_labels_is_no_dissimilarity() -> None:
    """Two classes, whose samples differ in the channel that has a deviation."""
    (network,) = build([auxiliary(2, similarity=0.5)], 0)
    assert isinstance(network, AuxiliaryNetwork)
    similar: Any = network.similar
    noise = drawn(4, 8, 8)
    x, labels = torch.zeros(4, 2, 8, 8), torch.tensor([0, 1, 1, 0])
    for i, label in enumerate(labels):
        x[i, label] = noise[i]
    with torch.no_grad():
        similar.weight.zero_()
        for channel in (0, 1):
            similar.weight[channel, channel, 1, 1] = 1
        alike = network.dissimilarity(x, labels, 2)
        not_alike = network.dissimilarity(x, labels.flip(0).roll(1), 2)
    assert alike < 1e-9
    assert not_alike > 0.5


def test_dissimilarity_is_the_formula() -> None:
    (network,) = build([auxiliary(3, similarity=0.5)], 0)
    x, labels = drawn(5, 3, 4, 4), torch.tensor([0, 3, 1, 3, 9])
    seen = network.similar(x).detach().flatten(2).std(2)
    total = 0.0
    for i in range(5):
        for k in range(5):
            pair = [seen[n] - seen[n].mean() for n in (i, k)]
            hot = [F.one_hot(labels[n], 10) - 0.1 for n in (i, k)]
            cosines = (F.cosine_similarity(*(t.float() for t in two), dim=0) for two in (pair, hot))
            total += float(next(cosines) - next(cosines)) ** 2
    found = float(network.dissimilarity(x, labels, 10).detach())
    assert found == pytest.approx(total / 25, rel=1e-5)


def test_a_problem_says_its_share_of_similarity() -> None:
    x, labels = drawn(4, 3, 16, 16), torch.arange(4)
    plain = build_problem(layers()[0], auxiliary(8), 0).eval()
    assert compared(plain, x, labels)[1] is None
    problem = build_problem(layers()[0], auxiliary(8, similarity=0.9), 0).eval()
    logits, apart = compared(problem, x, labels)
    torch.testing.assert_close(logits, problem(x))
    assert apart is not None
    assert apart[0] > 0
    assert apart[1] == 0.9


def test_context_is_seen_beside_the_highest_layer() -> None:
    """Averaged to its size, and by the classifier alone."""
    spec = auxiliary(19, above=layers()[1:3], context=3)
    problem = build_problem(layers()[0], spec, 0).eval()
    x, image = drawn(2, 3, 16, 16), drawn(2, 3, 16, 16) + 1
    network: Any = problem.auxiliary
    top = network.above[1](network.above[0](problem.layer(x)))
    assert top.shape == (2, 16, 8, 8)
    wanted = network.patched[0](torch.cat([top, F.avg_pool2d(image, 2)], 1))
    torch.testing.assert_close(problem(torch.cat([x, image], 1)), wanted)


def test_specifications_are_json_with_what_is_around() -> None:
    spec = auxiliary(16, above=layers()[1:2], copies=layers()[3:4], patches=2)
    found = described(spec)
    assert [layer["index"] for layer in (*found["above"], *found["copies"])] == [2, 4]
    assert not {"similarity", "copies"} & described(auxiliary(16, patches=2)).keys()


AROUND: dict[str, tuple[int, dict[str, Any]]] = {
    "window": (8, {"above": layers()[1:2]}),
    "window over P": (16, {"above": layers()[1:3]}),
    "copies": (32, {"copies": layers()[2:5]}),
    "copies of pooling": (16, {"copies": layers("max")[2:3]}),
    "patches": (8, {"patches": 2}),
    "copies in patches": (32, {"above": layers()[1:2], "copies": layers()[2:5], "patches": 2}),
    "similarity": (8, {"similarity": 0.5}),
    "context": (11, {"context": 3}),
}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("title", AROUND)
def test_a_step_takes_what_was_predicted(title: str, compute: str) -> None:
    channels, around = AROUND[title]
    layer, spec = layers()[0], auxiliary(channels, **around)
    problem = build_problem(layer, spec, 0)
    measured = stepped(problem, (3 + spec.context, 32, 32), 32, 1, getattr(torch, compute))
    how: Any = {"batch": 32, "micro": 32, "divided": False, "compute": compute}
    found = solving(layer, spec, (3, 32, 32), **how)
    assert found == pytest.approx(measured, rel=0.1)


def recipe(window: str = "", auxiliary: str = "") -> Recipe:
    text = tiny(layers=5, downsample="[2]", views=0)
    text = text.replace("[schedule]", f"{auxiliary}\n[schedule]")
    return parse(text + (window and f"[window]\n{window}\n"), "r")


def above(found: Recipe) -> list[list[int]]:
    return [[layer.index for layer in spec.above] for spec in found.auxiliaries]


@pytest.mark.parametrize(
    ("window", "wanted"),
    [
        ("", [[], [], [], [], []]),
        ("layers = 2", [[2], [3], [4], [5], []]),
        ("layers = 3", [[2, 3], [3, 4], [4, 5], [5], []]),
        ("layers = 2\nstride = 2", [[2], [], [4], [], []]),
        ("layers = 3\nstride = 2", [[2, 3], [3], [4, 5], [5], []]),
    ],
)
def test_windows_reach_so_far(window: str, wanted: list[list[int]]) -> None:
    found = recipe(window)
    assert above(found) == wanted
    for spec, layer in zip(found.auxiliaries, found.layers, strict=True):
        top = (layer, *spec.above)[-1]
        assert spec.channels == top.width
        assert spec.width == 8 * top.width // 8, "the classifier is that of the layer it sees"


def test_copies_are_fewer_the_higher_the_layer() -> None:
    found = recipe(auxiliary="copies = 2")
    copies = [[layer.index for layer in spec.copies] for spec in found.auxiliaries]
    assert copies == [[3, 5], [3, 4, 5], [5], [5], []]


def test_the_last_layer_has_the_paper_s_classifier() -> None:
    plain, found = recipe(), recipe(auxiliary="copies = 2\npatches = 2\nsimilarity = 0.5")
    assert found.auxiliaries[-1] == plain.auxiliaries[-1]
    assert found.science() != plain.science()
    assert not {"copies", "patches", "similarity"} & plain.science()["auxiliary"].keys()
    assert "window" not in plain.science()
