"""Windows, and what is around classifiers, in a run: from the cache, stopped, swept, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import beside, named
from root import MACHINES
from runs import Place, curve, open_run, stopped_after, tiny
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

from strata.pipeline.errors import OptionRange, RecipeError
from strata.pipeline.feed.features import frozen_layer, image_views
from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.plan.choose import X0, CachedDepth
from strata.pipeline.plan.costs import RecipeCosts
from strata.pipeline.plan.machine import load
from strata.pipeline.plan.plan import make_plan
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.recipe.variants import variants
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.pipeline.train.evaluation import evaluate
from strata.pipeline.train.train import solve
from strata.stages.solve.solve import Solver
from strata.store.read.rows import Rows

KEYS = "weights", "auxiliary", "train", "test", "kept_epoch"


def text(window: str = "", around: str = "", **changes: object) -> str:
    found = tiny(**changes).replace("[schedule]", f"{around}\n[schedule]")
    return found + (f"[window]\n{window}\n" if window else "")


WAYS = {
    "window": text("layers = 2"),
    "window of blocks": named() + "[window]\nlayers = 2",
    "stride": text("layers = 2\nstride = 2"),
    "copies": text(around="copies = 1"),
    "patches": text(around="patches = 2"),
    "similarity": text(around="similarity = 0.9"),
    "context": text(around="context = 0"),
    "context of views": text("layers = 2", "context = 0\ncopies = 1", views="3"),
    "context of x_1": text("layers = 2", "context = 1", views="3", layers=4),
    "context of x_1 on a canvas": text(around="context = 1").replace(
        "block = 64", 'block = 64\nprofile = "zstd"'
    ),
    "context of fresh draws": text(around="context = 0\nsimilarity = 0.5", views="0"),
    "all": text("layers = 2", "copies = 2\npatches = 2\nsimilarity = 0.9", layers=4),
}


def opened(place: Path, toml: str) -> Session:
    place.mkdir(exist_ok=True)
    beside(place)
    return open_run(place, toml)


def found(session: Session) -> list[Any]:
    records = [session.run.layer(j) or {} for j in range(1, session.run.layers + 1)]
    return [{key: record[key] for key in KEYS} for record in records]


@pytest.mark.parametrize("way", WAYS)
def test_weights_depend_on_neither_the_cache_nor_a_stop(tmp_path: Path, way: str) -> None:
    """In a second run x_{j-1} is computed in every batch; the third is stopped twice."""
    whole, again = opened(tmp_path / "whole", WAYS[way]), opened(tmp_path / "again", WAYS[way])
    last = whole.run.layers
    algorithm.make(whole, solve=last)
    for j in range(1, last + 1):
        solve(again, j, cached=False)
    assert found(again) == found(whole)

    for steps in (5, 55):
        stopped = opened(tmp_path / "stopped", WAYS[way])
        stopped_after(stopped, steps, lambda: algorithm.make(stopped, solve=last))  # noqa: B023
    algorithm.make(opened(tmp_path / "stopped", WAYS[way]), solve=last)
    assert found(stopped) == found(whole)


def state(session: Session, j: int, part: str) -> dict[str, Tensor]:
    return load_file(session.run.layer_directory(j) / f"{part}.safetensors")


def test_a_window_goes_on_where_the_one_before_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(tmp_path, text("layers = 2"))
    solve(session, 1)
    left = state(session, 1, "auxiliary")
    begun = dict[str, Tensor]()

    def kept(solver: Solver, *batch: Any) -> None:
        if not begun:
            begun.update({n: t.clone() for n, t in solver.problem.layer.state_dict().items()})
        real(solver, *batch)

    real = Solver.train_on
    monkeypatch.setattr(Solver, "train_on", kept)
    algorithm.make(session, solve=2)
    assert begun.keys() == state(session, 2, "weights").keys()
    for name, tensor in begun.items():
        assert torch.equal(tensor, left[f"above.0.{name}"])


def test_layers_of_one_stride_are_frozen_together(tmp_path: Path) -> None:
    """Layer 2 is as layer 1's window left it, takes no step, and gives the same logits."""
    session = opened(tmp_path, text("layers = 2\nstride = 2", precision="float32", views="3"))
    algorithm.make(session, solve=3)
    left = state(session, 1, "auxiliary")
    for name, tensor in state(session, 2, "weights").items():
        assert torch.equal(tensor, left[f"above.0.{name}"])
    for name, tensor in state(session, 2, "auxiliary").items():
        assert torch.equal(tensor, left[f"patched.0.{name}"])
    one, two, three = (session.run.layer(j) or {} for j in (1, 2, 3))
    assert two["seconds"] == 0.0 < three["seconds"]
    assert two["train"] == one["train"]
    assert two["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-5)
    assert [len(curve(session, j)) for j in (1, 2, 3)] == [2, 1, 2]
    report = evaluate(session.run, session.store)
    assert len(report["layers"]) == 3


def test_a_stride_of_a_whole_window_is_planned_as_one_problem() -> None:
    recipe = parse(text("layers = 2\nstride = 2"), "tiny")
    assert [recipe.has_problem(j) for j in (1, 2, 3)] == [True, False, True]
    plan, alone = make_plan(recipe), make_plan(parse(text(), "tiny"))
    assert plan.depths[2].steps == 0 == plan.depths[2].operations
    assert plan.depths[1].operations > alone.depths[1].operations
    assert (plan.depths[1].memory_bytes or 0) > (alone.depths[1].memory_bytes or 0)
    assert plan.depths[1].auxiliary_parameters > alone.depths[1].auxiliary_parameters


def test_a_sweep_is_of_the_same_problem(tmp_path: Path) -> None:
    """A sweep of one without changes ends where `train` does."""
    from strata.pipeline.run import sweep_results
    from strata.pipeline.study.sweep import sweep

    session = opened(tmp_path, text("layers = 2", "copies = 1\nsimilarity = 0.5"))
    algorithm.make(session, solve=2)
    (one,) = variants(session.run.recipe, 2, ["lr=0.1"], session.run.seed)
    sweep(session, 2, [one])
    result = sweep_results.result(session.run, 2, one)
    assert result is not None
    known = session.run.layer(2) or {}
    assert {k: result[k] for k in ("weights", "auxiliary")} == {
        k: known[k] for k in ("weights", "auxiliary")
    }


def test_the_loss_has_its_share_of_similarity(tmp_path: Path) -> None:
    session = opened(tmp_path, text(around="similarity = 0.5", epochs=1))
    solve(session, 1)
    alone = opened(tmp_path / "alone", text(epochs=1))
    solve(alone, 1)
    assert curve(session, 1) != curve(alone, 1)
    with ProblemFeed(session, 0) as feed:
        assert len(feed.ids) == 1437


@pytest.mark.parametrize("views", ['"canvas"', "3", "0"])
def test_context_is_the_image_of_the_same_draw(tmp_path: Path, views: str) -> None:
    """x of problem 3 has, after the channels of x_2, what problem 1 sees, averaged."""
    session = opened(tmp_path, text(around="context = 0", views=views, precision="float32"))
    algorithm.make(session, solve=2, write=2)
    scale, recipe = 2, session.run.recipe
    assert [recipe.context_of(j) for j in (1, 2, 3)] == [0, 0, None]
    with (
        ProblemFeed(session, 2, context=0) as feed,
        ProblemFeed(session, 2) as alone,
    ):
        (x, y), (plain, labels) = next(feed.epoch(1)), next(alone.epoch(1))
        assert torch.equal(y, labels)
        assert torch.equal(x[:, :-1], plain)
        rows, _ = feed._order(1, 0, feed._plan(1))
        ids = feed.ids[rows.row[: len(x)]]
        assert feed._context is not None
        images, _ = next(feed._context.read(Rows.of(rows.row[: len(x)]), [len(x)]))
        draws = feed._plan(1).images.of(ids)
        seen = image_views(recipe, images, draws)
    torch.testing.assert_close(x[:, -1:], avg_pool2d(seen, scale))


@pytest.mark.parametrize("views", ['"canvas"', "3", "0"])
def test_context_is_an_earlier_level_of_the_same_draw(tmp_path: Path, views: str) -> None:
    """Of problem 3 its last channels are what layer 1 makes of what problem 1 sees, averaged; they
    are the same when they are computed from the images. A canvas has other pixels at its border."""
    session = opened(tmp_path, text(around="context = 1", views=views, precision="float32"))
    algorithm.make(session, solve=2, write=2)
    layer = frozen_layer(session.run, 1, session.device).layer
    with (
        ProblemFeed(session, 2, context=1) as feed,
        ProblemFeed(session, 2, context=1, cached=False) as computed,
        ProblemFeed(session, 2, context=0) as images,
    ):
        (x, _), (again, _), (of_image, _) = (next(one.epoch(1)) for one in (feed, computed, images))
        assert torch.equal(x, again)
        rows, _ = images._order(1, 0, images._plan(1))
        assert images._context is not None
        plan = images._context._same(images._plan(1))
        image, _ = next(images._context._alone(rows[: len(x)], [len(x)], plan))
    torch.testing.assert_close(of_image[:, -1:], avg_pool2d(image, 2))
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(x[:, -8:][inside], avg_pool2d(layer(image), 2)[inside])


@pytest.mark.parametrize("views", ['"canvas"', "3"])
@pytest.mark.parametrize(
    ("window", "around"),
    [
        ("layers = 2", "copies = 1\npatches = 2"),
        ("layers = 2", "context = 0\nsimilarity = 0.5"),
        ("layers = 2\nstride = 2", "context = 1\ncopies = 1"),
        ("layers = 2\nstride = 2", "patches = 2"),
    ],
)
def test_a_lower_layer_is_exported_with_its_whole_network(
    tmp_path: Path, window: str, around: str, views: str
) -> None:
    """Alone, and in an ensemble; what is written is compared with the logits that were kept."""
    (tmp_path / "tiny.toml").write_text(text(window, around, epochs=1, layers=5, views=views))
    place = Place(tmp_path)
    assert place.do("run").rc == 0
    for name, flags in (("one", ("--layer", 1)), ("all", ("--ensemble",))):
        told = place.do("export", "--to", tmp_path / name, "--json", *flags).json
        assert told["compared"]["furthest"] <= told["compared"]["bound"]


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (text("layers = 0"), "'window.layers' is 0"),
        (text("layers = 2\nstride = 3"), "'window.stride' is 3; it must be in 1 … "),
        (text("stride = 0"), "'window.stride' is 0"),
        (text(around="copies = -1"), "'auxiliary.copies' is -1"),
        (text(around="patches = 0"), "'auxiliary.patches' is 0"),
        (text(around="similarity = 1.0"), "'auxiliary.similarity' is 1.0"),
        (
            text("layers = 2") + "[compress]\nkeep = 0.5\nepochs = 1\nlr = 0.1",
            "[compress] is of the paper's problems: leave [window] out",
        ),
        (
            text(around="copies = 1") + "[compress]\nkeep = 0.5\nepochs = 1\nlr = 0.1",
            "[compress] is of the paper's problems: leave 'auxiliary.copies' out",
        ),
        (
            text(around="similarity = 0.5") + '[loss]\nname = "mse"',
            "'auxiliary.similarity' is of class labels, and 'loss.name' is 'mse': leave it out",
        ),
        (
            text(around="similarity = 0.5").replace("lr = 0.1", "lr = 0.1\nmixup = 0.2"),
            "'auxiliary.similarity' is of class labels, and 'schedule.mixup' mixes them",
        ),
        (text(around="context = 3"), "'auxiliary.context' is 3; it must be in 0 … 2"),
        (text(around="context = 2"), "'auxiliary.context' is 2, and no classifier sees x_2"),
        (text("layers = 3\nstride = 3", "context = 0"), "and no classifier sees x_0 beside"),
        (text(around="context = true"), "'auxiliary.context'"),
        (
            text(around="patches = 8"),
            "'auxiliary.patches' is 8, and what is cut above layer 1 has 8×8 pixels",
        ),
    ],
)
def test_what_cannot_be_is_refused(toml: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(toml, "tiny")
    assert said in str(refused.value)


def test_a_layer_of_a_window_keeps_its_width() -> None:
    with pytest.raises(OptionRange, match="trained together with others"):
        variants(parse(text("layers = 2"), "tiny"), 1, ["width=4"], 0)


def test_seconds_of_a_layer_that_a_window_has_frozen_are_none() -> None:
    machine = load(MACHINES / "laptop.toml")
    costs = RecipeCosts(parse(text("layers = 2\nstride = 2"), "tiny"), machine, 1437, 360)
    seconds = [costs.solve(X0, j) for j in (1, 2)]
    assert seconds[0] > 0 == seconds[1]


def test_context_is_planned_as_another_read() -> None:
    machine, base = load(MACHINES / "laptop.toml"), CachedDepth(1, "raw")
    tables = text(), text(around="context = 0"), text(around="context = 1")
    plain, image, level = (RecipeCosts(parse(one, "tiny"), machine, 1437, 360) for one in tables)
    assert plain.solve(X0, 1) == level.solve(X0, 1) < image.solve(X0, 1)
    assert plain.solve(base, 2) < image.solve(base, 2)
    assert plain.solve(base, 2) < level.solve(base, 2)
    assert plain.solve(base, 3) == level.solve(base, 3)
