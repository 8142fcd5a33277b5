"""What to cache on a machine: bytes against the plan, seconds against sums done by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from root import MACHINES, ROOT
from runs import inside

from strata.pipeline.errors import RecipeError
from strata.pipeline.plan.choose import X0, CachedDepth, cheapest_chain
from strata.pipeline.plan.costs import RecipeCosts
from strata.pipeline.plan.machine import JPEG_GUESS, Machine, RowRate, load
from strata.pipeline.plan.plan import make_plan
from strata.pipeline.plan.worth import weigh
from strata.pipeline.recipe import builtin
from strata.pipeline.recipe.augmentation import train_views
from strata.pipeline.recipe.recipe import Recipe
from strata.store.level.layout import geometry

FLAT = Machine("flat", "a test", "cpu", *[1.0] * 10, publish_shard=1e-30, publish_level=1e-30)
"""One of everything in a second, and nothing for a file by itself."""

RATES = [
    name
    for name, value in asdict(FLAT).items()
    if isinstance(value, float) and not name.startswith(("ratio", "publish"))
]


def fast_but(*slow: str) -> dict[str, Any]:
    """All rates but some, as if they were nothing."""
    return dict.fromkeys((name for name in RATES if name not in slow), 1e30)


def recipe(name: str = "cifar10-small") -> Recipe:
    return builtin.load(name)[1]


def costs(name: str = "cifar10-small", machine: Machine = FLAT, problems: int = 1) -> RecipeCosts:
    found = recipe(name)
    return RecipeCosts(found, machine, found.data.train, found.data.test, problems)


# ---- bytes and seconds --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10-small", "cifar10-k1", "cifar10-k3"])
def test_bytes_are_those_of_the_plan(name: str) -> None:
    plan = make_plan(recipe(name))
    for depth in plan.depths:
        assert costs(name).nbytes(CachedDepth(depth.depth, "raw")) == pytest.approx(
            depth.bytes, rel=0.02
        )


def test_operations_are_those_of_the_plan() -> None:
    """Nothing but training costs time; the plan counts forward and backward, all epochs."""
    found = costs(machine=replace(FLAT, **fast_but("train")))
    for depth in make_plan(recipe()).depths[1:]:
        base = CachedDepth(depth.depth - 1, "raw")
        used = 49920 / 50000  # the last batch of an epoch is dropped
        assert found.solve(base, depth.depth) == pytest.approx(depth.operations * used, rel=1e-3)


def test_computing_again_costs_the_layers_between() -> None:
    found = costs(machine=replace(FLAT, **fast_but("forward")))
    once = found.write(X0, CachedDepth(1, "raw")) / (2 * 50_000 + 10_000)  # plain, flipped, test
    side = recipe().canvas // 2
    network: Any = recipe().network
    assert once == 4 * 3 * 9 * network.width * side**2
    again = found.solve(X0, 3) - found.solve(CachedDepth(1, "raw"), 3)
    rows = 49_920 * recipe().schedule.epochs + 10_000 * (recipe().schedule.epochs + 1)
    assert again == pytest.approx(rows * once)


def test_packed_levels_take_less_disk_and_more_of_the_cores() -> None:
    slow = replace(FLAT, memory=1.0)
    disk = costs(machine=replace(slow, **fast_but("disk_read", "memory")))
    cores = costs(machine=replace(slow, **fast_but("decode_lz4", "decode_zstd", "memory")))
    raw, zstd = CachedDepth(1, "raw"), CachedDepth(1, "zstd")
    both = len(train_views(recipe()))  # an epoch decodes every chunk of both levels
    assert FLAT.ratio_zstd * disk.solve(zstd, 2) == pytest.approx(both * disk.solve(raw, 2))
    assert cores.solve(zstd, 2) > cores.solve(raw, 2)


@pytest.mark.parametrize(
    ("form", "tier", "parts"),
    [
        # gathered, decoded, from the disk, copied: rows of each in 5 epochs, in rows of an epoch
        ("raw", "memory", (3, 2, 0, 5)),
        ("raw", "device", (0, 2, 0, 2)),
        ("raw", "disk", (3, 2, 5, 5)),
        ("zstd", "memory", (3, 2, 0, 5)),
        ("zstd", "device", (0, 2, 0, 2)),
        ("zstd", "disk", (0, 10, 10, 5)),
    ],
)
def test_where_rows_lie_decides_what_an_epoch_pays(
    form: str, tier: str, parts: tuple[int, ...]
) -> None:
    """Two views, five epochs. What is on the device is copied there once; in memory it is decoded
    once, or touched once; packed chunks of both views are read and decoded in every epoch."""
    node, epochs = CachedDepth(1, form), recipe().schedule.epochs
    assert epochs == 5
    room = {"memory": 1e30 if tier == "memory" else 1.0, "device_memory": None}
    if tier == "device":
        room = {"memory": 1e30, "device_memory": 1e30}
    names = ("gather", f"decode_{form}" if form != "raw" else "raw", "disk_read", "copy")
    for name, rows in zip(names, parts, strict=True):
        rates: dict[str, Any] = fast_but() | room | {"device": "cuda", "ratio_zstd": 1.0}
        machine = replace(FLAT, **rates, rows=(RowRate("raw", "float16", 1e30, 1e30, 1.0),))
        if name == "raw":
            machine = replace(machine, rows=(RowRate("raw", "float16", 1e30, 1.0, 1.0),))
        else:
            machine = replace(machine, **{name: 1.0})
        found = costs(machine=machine)
        assert found.tier_of(node).tier == tier
        row = 2 * math.prod(recipe().shape(1, recipe().canvas))
        assert found.epoch(node) * epochs == pytest.approx(rows * 49_920 * row)


def test_a_level_costs_its_files_and_the_publishing_of_its_last_shard() -> None:
    quiet = replace(FLAT, **fast_but())
    files = replace(quiet, publish_shard=7.0, publish_level=100.0)
    node, rows = CachedDepth(1, "raw"), 50_000
    shards = geometry(rows, recipe().shape(1, recipe().canvas), "float16", 64 << 20).shards
    assert costs(machine=files).write_level(X0, node, rows) == pytest.approx(100 + 7 * shards)
    both = costs(machine=replace(quiet, disk_write=1.0, forward=1.0))
    disk = costs(machine=replace(quiet, disk_write=1.0)).write_level(X0, node, rows)
    forward = costs(machine=replace(quiet, forward=1.0)).write_level(X0, node, rows)
    overlapped = max(disk, forward) + min(disk, forward) / shards
    assert both.write_level(X0, node, rows) == pytest.approx(overlapped)
    few = both.write_level(X0, node, 10)
    assert few == pytest.approx((disk + forward) * 10 / rows), "one shard: nothing overlaps"


def test_images_are_decoded_from_jpeg_whenever_they_are_read() -> None:
    found = costs(machine=replace(FLAT, **fast_but("decode_jpeg"), decode_jpeg=1.0))
    jpeg = replace(found, recipe=replace(found.recipe, data=replace(found.recipe.data, jpeg=90)))
    pixels = 3 * 32 * 32
    assert jpeg.epoch(X0) == pytest.approx(49_920 * pixels)
    assert jpeg.write(X0, CachedDepth(1, "raw")) == pytest.approx(110_000 * pixels)
    assert found.epoch(X0) < 1
    assert replace(FLAT, decode_jpeg=None).jpeg == JPEG_GUESS


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 7.0), ("cuda", 5.0)])
def test_what_the_host_does_competes_with_computing_on_a_cpu(device: str, seconds: float) -> None:
    machine = replace(FLAT, device=device)
    assert machine.seconds(compute=4, host=3, disk=2, copy=5) == seconds
    assert machine.seconds(compute=1, host=1, disk=9, copy=5) == 9


# ---- what is decided ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10-small", "cifar10-k1", "cifar10-k3"])
@pytest.mark.parametrize("machine", sorted(path.stem for path in MACHINES.glob("*.toml")))
def test_nothing_is_better_than_the_best(name: str, machine: str) -> None:
    found = costs(name, load(MACHINES / f"{machine}.toml"))
    worth = weigh(found)
    assert worth.seconds["best"] <= min(worth.seconds.values())
    assert [d.depth for d in worth.depths] == list(range(1, found.table.layers))
    for depth in worth.depths:
        assert depth.otherwise >= worth.seconds["best"]
        fewest = depth.from_problems
        if fewest is None:
            assert depth.form is None
            continue
        assert cheapest_chain(replace(found.table, problems=fewest)).form(depth.depth)
        for fewer in range(1, fewest):
            assert cheapest_chain(replace(found.table, problems=fewer)).form(depth.depth) is None


def test_a_slow_disk_is_not_worth_reading_and_a_slow_core_is_not_worth_using() -> None:
    even = replace(FLAT, **dict.fromkeys(RATES, 1e12))
    assert not cheapest_chain(costs(machine=replace(even, disk_write=1.0)).table).chain
    deep = cheapest_chain(costs(machine=replace(even, forward=1.0)).table).chain
    assert [node.depth for node in deep] == list(range(1, len(recipe().layers)))


def test_less_disk_costs_more_time() -> None:
    found, seconds = costs("cifar10-k1", load(MACHINES / "card-8gb.toml")), []
    for disk in (math.inf, 100e9, 60e9, 20e9, 1e9):
        seconds.append(weigh(found, disk).seconds["best"])
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1] < math.inf
    assert weigh(found, 1e6).as_json()["seconds"]["best"] is None


def test_fresh_draws_cannot_be_cached() -> None:
    found = costs()
    fresh = replace(
        found, recipe=replace(found.recipe, augment=replace(found.recipe.augment, views=0))
    )
    worth = weigh(fresh)
    assert worth.seconds["best"] == worth.seconds["never"]
    assert worth.as_json()["seconds"]["always"] is None


# ---- the file and the command -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("forward = -1.0", "'forward' is -1.0; it must be above 0"),
        ("decode_jpeg = 0.0", "'decode_jpeg' is 0.0; it must be above 0"),
        ("memory = nan", "'memory' is nan; it must be finite"),
        ('device = "tpu"', "'device' is 'tpu'; it is one of cpu, cuda"),
        ("forwards = 1.0", "Did you mean 'forward'?"),
        ("= 1", "is no TOML"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, line: str, said: str) -> None:
    good = (MACHINES / "laptop.toml").read_text("utf-8").splitlines()
    key = line.split("=")[0].strip()
    kept = [other for other in good if not (key and other.startswith(f"{key} "))]
    path = tmp_path / "machine.toml"
    path.write_text("\n".join([*kept, line]), "utf-8")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_plan_for_a_machine_that_is_not_here(tmp_path: Path) -> None:
    ask = ["plan", "cifar10-k1", "--machine", MACHINES / "laptop.toml"]
    shown = inside(tmp_path, *ask)
    assert shown.rc == 0
    assert "deciding otherwise costs" in shown.out
    assert "other ways to cache" in shown.out
    assert "Predicted, from data sheets" in shown.out
    found: list[Any] = [
        json.loads(inside(tmp_path, *ask, "--problems", n, "--json").out)["economics"]
        for n in (1, 64)
    ]
    one, many = found
    assert one["depths"][0]["form"] is None
    assert many["depths"][0]["form"] is not None
    assert many["seconds"]["best"] > 32 * one["seconds"]["best"]
    missing = inside(tmp_path, "plan", "--machine", tmp_path / "none.toml")
    assert missing.rc == 3
    assert "No such file" in missing.error


def test_what_a_clock_said_is_in_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    root = ROOT
    monkeypatch.syspath_prepend(root / "benchmarks")
    from cache_or_recompute import rows

    page = (root / "docs/economics.md").read_text("utf-8").splitlines()
    found = json.loads((root / "benchmarks/results/cache_or_recompute.json").read_text("utf-8"))
    assert all(row in page for row in rows(found))


def test_the_table_in_the_docs_is_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    root = ROOT
    monkeypatch.syspath_prepend(root / "benchmarks")
    from economics import rows

    page = (root / "docs/economics.md").read_text("utf-8").splitlines()
    expected = list(rows())
    machines = {row.split(" | ")[0] for row in expected}
    assert [line for line in page if line.split(" | ")[0] in machines] == expected
