"""Planning: what is missing, against brute force; bytes, against what is then written."""

from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from root import ROOT
from runs import here, open_run, tiny

from strata.pipeline.errors import BudgetError
from strata.pipeline.plan.plan import Inventory, Step, check_budget, make_plan, steps
from strata.pipeline.progress import duration, parse_size, progress_text, size
from strata.pipeline.recipe.builtin import load
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.run import levels
from strata.pipeline.run.levels import inventory
from strata.pipeline.train import algorithm

README = ROOT / "README.md"

inventories = st.builds(
    Inventory,
    st.booleans(),
    st.integers(0, 5),
    st.frozensets(st.integers(1, 5)),
)


def needed(have: Inventory, solve: int, write: int) -> set[Step]:
    """What must be done, by fixed point over the rules, without any order."""
    want = {Step("solve", j) for j in range(1, solve + 1)} | (
        {Step("write", write)} if write else set()
    )
    need: set[Step] = set()
    while want:
        step = want.pop()
        solved = step.j <= have.solved
        done = solved if step.kind == "solve" else solved and step.j in have.written
        if done or step in need:
            continue
        need.add(step)
        if step.kind == "write":
            want.add(Step("solve", step.j))
        elif step.j > 1:
            want |= {Step("solve", step.j - 1), Step("write", step.j - 1)}
    return need


@given(inventories, st.integers(0, 5), st.integers(0, 5))
def test_steps_are_what_is_needed_and_no_more(have: Inventory, solve: int, write: int) -> None:
    got = steps(have, solve=solve, write=write)
    features = [step for step in got if step.kind != "images"]
    assert set(features) == needed(have, solve, write)
    assert len(set(got)) == len(got)


@given(inventories, st.integers(0, 5), st.integers(0, 5))
def test_every_step_comes_after_what_it_needs(have: Inventory, solve: int, write: int) -> None:
    solved = have.solved
    written = {j for j in have.written if j <= have.solved}
    images = have.images
    for step in steps(have, solve=solve, write=write):
        if step.kind == "images":
            assert not images
            images = True
        elif step.kind == "solve":
            assert images
            assert step.j == solved + 1
            assert step.j == 1 or step.j - 1 in written
            solved += 1
        else:
            assert images
            assert step.j <= solved
            written.add(step.j)
    assert solved >= solve
    assert not write or (write in written and write <= solved)


@given(inventories, st.integers(1, 5), st.frozensets(st.integers(1, 5)))
def test_what_is_not_cached_on_the_way_is_not_written(
    have: Inventory, solve: int, cached: frozenset[int]
) -> None:
    """The layers are solved all the same; what is asked for by name is written in any case."""
    got = steps(have, solve=solve, cached=cached)
    every = steps(have, solve=solve)
    assert [s for s in got if s.kind != "write"] == [s for s in every if s.kind != "write"]
    assert {s.j for s in got if s.kind == "write"} <= cached
    assert {s for s in every if s.kind == "write" and s.j in cached} <= set(got)
    assert Step("write", solve) in steps(Inventory(True, 0, frozenset()), write=solve, cached=())


def test_the_papers_k1_needs_26_gigabytes_a_view() -> None:
    """x_1 of k = 1: 50,000 · 256 · 32 · 32 · 2 bytes at fp16."""
    _, recipe = load("cifar10-k1")
    plan = make_plan(recipe)
    assert plan.depths[1].bytes_one_view == 50_000 * 256 * 32 * 32 * 2
    assert size(plan.depths[1].bytes_one_view) == "26.2 GB"
    assert plan.depths[1].steps == 50 * 390


@pytest.mark.parametrize(
    ("name", "ceiling"), [("cifar10-k1", "1.50"), ("cifar10-k2", "1.11"), ("cifar10-k3", "1.05")]
)
def test_what_a_free_cache_could_save_is_what_the_readme_says(name: str, ceiling: str) -> None:
    """Σ_j (Σ_{i<j} F_i + 3 (F_j + A_j)) over Σ_j 3 (F_j + A_j): backward is twice forward."""
    _, recipe = load(name)
    assert f"{make_plan(recipe).ceiling:.2f}" == ceiling
    assert f"{ceiling}× (k = {recipe.auxiliary.k})" in README.read_text("utf-8")


@pytest.mark.parametrize("name", ["cifar10-k1", "cifar10-k2", "cifar10-k3", "imagenet-k1", "vgg11"])
def test_over_budget_is_refused_with_both_numbers_and_what_to_change(name: str) -> None:
    _, recipe = load(name)
    plan = make_plan(recipe)
    with pytest.raises(BudgetError) as caught:
        check_budget(plan, 20 * 10**9)
    for word in (size(plan.peak), "20.0 GB", "'network.width'", "'augment.views'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "ceiling"),
    [
        ("imagenet-k1", (256, 112, 112), "2.04"),
        ("imagenet-k2", (128, 112, 112), "1.39"),
        ("imagenet-k3", (128, 112, 112), "1.18"),
        ("vgg11", (64, 224, 224), "1.34"),
    ],
)
def test_the_papers_imagenet_takes_terabytes(
    name: str, shape: tuple[int, int, int], ceiling: str
) -> None:
    plan = make_plan(load(name)[1])
    assert plan.depths[1].bytes_one_view == 1_281_167 * prod(shape) * 2
    assert plan.depths[1].steps == 45 * 5004
    assert f"{plan.ceiling:.2f}" == ceiling
    if name == "imagenet-k3":
        assert f"take {plan.total / 1e12:.0f} TB" in README.read_text("utf-8")


def test_a_plan_beyond_the_disk_is_refused_in_one_line(tmp_path: Path) -> None:
    where = ("--store", tmp_path / "store", "--run", tmp_path / "run")
    told = here("plan", "imagenet-k3", *where, "--disk-budget", "2TB")
    assert told.rc == 5
    for words in ("needs 22.2 TB", "(40.0 TB with every level kept)", "--disk-budget is 2.0 TB"):
        assert words in told.error


def test_between_peak_and_total_levels_are_removed_on_the_way() -> None:
    _, recipe = load("cifar10-k1")
    plan = make_plan(recipe)
    assert check_budget(plan, plan.total) is False
    assert check_budget(plan, plan.total - 1) is True
    assert check_budget(plan, plan.peak) is True
    assert check_budget(plan, None) is False


@pytest.mark.parametrize(
    ("views", "precision"),
    [('"canvas"', "float16"), ("2", "bfloat16"), ("0", "uint8"), ('"canvas"', "uint4")],
)
def test_planned_bytes_are_the_bytes_written(tmp_path: Path, views: str, precision: str) -> None:
    session = open_run(tmp_path, tiny(views=views, epochs=1, layers=2, precision=precision))
    algorithm.make(session, write=2)
    plan = make_plan(session.run.recipe, session.run.data())
    for depth in plan.depths:
        keys = levels.keys_at(session.run, depth.depth)
        assert {key.name: session.store.state(key).nbytes for key in keys} == depth.levels
        if depth.depth:
            assert session.store.open(keys[0]).geometry.sample == depth.shape


def test_eviction_keeps_the_disk_under_the_planned_peak(tmp_path: Path) -> None:
    session = open_run(tmp_path, tiny(epochs=1, layers=4))
    algorithm.make(session, solve=session.run.layers, evict=True)
    written = inventory(session.run, session.store).written
    assert written == {3}
    assert algorithm.make(session, solve=session.run.layers, evict=True) == ()


def test_a_plan_counts_the_images_found() -> None:
    recipe = parse(tiny(), "tiny")
    found = make_plan(recipe, {"train": 100, "test": 10})
    assert found.depths[0].bytes_one_view == 100 * 64
    assert found.images == 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GB", 20 * 10**9), ("1.5 TB", 15 * 10**11), ("512MiB", 512 << 20), ("7", 7), ("3kb", 3000)],
)
def test_sizes_are_read_as_written(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "20XB", "-3GB", "1e9"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_progress_has_a_rate_and_the_time_left() -> None:
    text = progress_text(12_800, 50_000, 32.0, "images")
    assert text == "12,800 of 50,000 (25 %), 400 images/s, 1 min 33 s left"
    assert duration(7260) == "2 h 01 min"


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (999_960, "1.0 MB"), (25e9, "25.0 GB")],
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.00 s"),
        (0.25, "0.25 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (3599.9, "1 h 00 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_no_disk_has_so_much() -> None:
    with pytest.raises(ValueError, match="more than any disk"):
        parse_size("9" * 400 + "GB")


def test_a_plan_of_many_layers_is_no_matter_of_minutes() -> None:
    """Steps and shapes in proportion to their number; a recursion would end at some hundreds."""
    recipe = parse(tiny(layers=1000), "tiny")
    assert len(make_plan(recipe).depths) == 1001
    assert len(steps(Inventory(False, 0, frozenset()), solve=1000)) == 2000
