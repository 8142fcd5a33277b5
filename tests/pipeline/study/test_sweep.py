"""Variants of one layer on one read: each as if it were alone, to the bit, whatever happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import CLI, environment
from runs import Place, made
from sweeps import MANY, SOLVED, TEXT, solved, sweep, trained, variant

from strata.pipeline.feed.features import Features
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.run import weights
from strata.stages.network.network import build_problem
from strata.store.read.order import key_of


@pytest.fixture
def place(base: Place, tmp_path: Path) -> Place:
    return base.copy(tmp_path / "place")


# ---- each as if it were alone --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lr=0.1,epochs=2,keep=last,k=2", {}),
        ("lr=0.3,epochs=2,keep=last,k=2", {"lr": 0.3}),
        ("lr=0.1,epochs=1,keep=last,k=2", {"epochs": 1}),
        ("lr=0.3,epochs=2,keep=best,k=1", {"lr": 0.3, "keep": "best", "k": 1}),
    ],
)
def test_a_variant_is_what_train_gives_with_its_settings(
    base: Place, swept: Place, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    alone = trained(base, tmp_path / "alone", **changes)
    assert solved(variant(swept, name)) == solved(alone)


@pytest.mark.parametrize(
    ("vary", "changes"),
    [
        ("nesterov=true", {"nesterov": True}),
        ("kind=step", {"kind": "step"}),
        ("momentum=0.5", {"momentum": 0.5}),
        ("weight_decay=0.01", {"weight_decay": 0.01}),
    ],
)
def test_the_rest_of_the_schedule(
    base: Place, tmp_path: Path, vary: str, changes: dict[str, Any]
) -> None:
    place = base.copy(tmp_path / "place")
    assert sweep(place, vary).rc == 0
    alone = trained(base, tmp_path / "alone", **changes)
    assert solved(variant(place, vary)) == solved(alone)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("aux_width=4,width=8", {"[auxiliary] width": 4}),
        ("aux_width=8,width=12", {"[network] width": 12}),
    ],
)
def test_widths_of_layer_1_are_those_of_a_recipe(
    base: Place, tmp_path: Path, name: str, changes: dict[str, int]
) -> None:
    place = base.copy(tmp_path / "place")
    assert sweep(place, "width=8,12", "auxiliary.width=4,8", j=1).rc == 0
    text = TEXT
    for key, value in changes.items():
        table = key.split()[0]
        head, tail = text.split(f"{table}\n")
        text = f"{head}{table}\n{tail.replace('width = 8', f'width = {value}', 1)}"
    alone = made(tmp_path / "alone", 1, text)
    assert solved(variant(place, name, 1)) == solved(alone.run / "layer_1")


def test_steps_in_micro_batches(tmp_path: Path) -> None:
    """`train` has no more of a batch there than one of them, and a sweep all of it."""
    text = TEXT.replace("batch = 64", "batch = 64\naccumulate = 3")
    by_train, by_sweep = (made(tmp_path / name, 1, text) for name in ("train", "sweep"))
    assert by_train.do("train", "--layer", 2).rc == 0
    assert sweep(by_sweep, "lr=0.1,0.3").rc == 0
    assert solved(variant(by_sweep, "lr=0.1")) == solved(by_train.run / "layer_2")


def test_a_variant_alone_and_among_others(swept: Place, place: Place) -> None:
    one = ("lr=0.3", "k=2", "epochs=2", "keep=last")
    assert sweep(place, *one).rc == 0
    name = "lr=0.3,epochs=2,keep=last,k=2"
    assert solved(variant(place, name)) == solved(variant(swept, name))


def test_nothing_cached_gives_the_same(swept: Place, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    bare = Place(tmp_path)
    assert sweep(bare, "lr=0.1,0.3", "k=2", "epochs=2", "keep=last", options=NEVER).rc == 0
    assert not list(bare.store.glob("x_1-*"))
    for rate in ("0.1", "0.3"):
        name = f"lr={rate},epochs=2,keep=last,k=2"
        assert solved(variant(bare, name)) == solved(variant(swept, name))


NEVER = ("--cache", "never")


def test_the_seed_is_of_the_initial_weights_alone(place: Place) -> None:
    """With a rate of nearly nothing the weights stay where they began."""
    assert sweep(place, "lr=1e-30", "seed=0,1").rc == 0
    wanted = parse(TEXT, "tiny")
    for seed in (0, 1):
        found, _ = weights.read(variant(place, f"lr=1e-30,seed={seed}") / "weights.safetensors")
        number = key_of("initial weights", seed, 2) % 2**63
        begun = build_problem(wanted.layers[1], wanted.auxiliaries[1], number).layer.state_dict()
        assert torch.equal(found["convolution.weight"], begun["convolution.weight"])


def test_a_batch_is_made_once_for_all(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[int] = []
    values = Features.values

    def counted(self: Features, *arguments: Any) -> Any:
        made_of.append(1)
        return values(self, *arguments)

    monkeypatch.setattr(Features, "values", counted)
    assert sweep(place, "seed=0").rc == 0
    alone = len(made_of)
    assert sweep(place, "seed=1,2,3,4").rc == 0
    assert len(made_of) == 2 * alone


# ---- the table -----------------------------------------------------------------------------------


def test_the_best_on_the_test_images_comes_first(swept: Place) -> None:
    told = sweep(swept, *MANY, options=("--json",)).json
    top1 = [one["test"]["top1"] for one in told["variants"]]
    assert top1 == sorted(top1, reverse=True)
    assert len(top1) == 16
    assert told["done"] == []
    assert told["kept"] is None
    one = told["variants"][0]
    assert one["parameters"] == 9 * 32 * 16 + 2 * 16
    shown = sweep(swept, *MANY).out
    assert shown.index(told["variants"][0]["name"]) < shown.index(told["variants"][-1]["name"])
    assert f"{100 * top1[0]:.2f} %" in shown


def test_where_nothing_is_to_do_torch_is_not_imported(swept: Place) -> None:
    words = ["sweep", *swept.options, "--layer", 2, "--vary", "lr=0.1", "--vary", "k=2"]
    words += ["--vary", "epochs=2", "--vary", "keep=last"]
    code = (
        f"import cli, sys; cli.main({[str(word) for word in words]!r}, standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CLI.parent, env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr


# ---- what is there is kept, if it is of what is there --------------------------------------------


def test_one_more_variant_solves_only_that(place: Place) -> None:
    assert sweep(place, "lr=0.1,0.2").rc == 0
    before = (variant(place, "lr=0.1") / "result.json").stat().st_mtime_ns
    more = sweep(place, "lr=0.1,0.2,0.3", options=("--json",)).json
    assert more["done"] == ["solve layer 2 with lr=0.3"]
    assert (variant(place, "lr=0.1") / "result.json").stat().st_mtime_ns == before
    assert len(more["variants"]) == 3


def test_a_result_of_another_x_1_is_not_believed(place: Place) -> None:
    assert sweep(place, "lr=0.1").rc == 0
    before = solved(variant(place, "lr=0.1"))
    assert place.do("clean", "--layer", 1, "--yes").rc == 0
    assert sweep(place, "lr=0.3", j=1, options=("--keep", "lr=0.3")).rc == 0
    again = sweep(place, "lr=0.1", options=("--json",)).json
    assert again["done"] == ["write x_1", "solve layer 2 with lr=0.1"]
    assert solved(variant(place, "lr=0.1")) != before


@pytest.mark.parametrize("name", [*SOLVED, "result.json"])
def test_a_damaged_result_is_made_again(place: Place, name: str) -> None:
    assert sweep(place, "lr=0.1").rc == 0
    before = solved(variant(place, "lr=0.1"))
    path = variant(place, "lr=0.1") / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert sweep(place, "lr=0.1", options=("--json",)).json["done"] == ["solve layer 2 with lr=0.1"]
    assert solved(variant(place, "lr=0.1")) == before


# ---- one that diverges ---------------------------------------------------------------------------


def test_one_diverges_and_the_others_go_on(swept: Place, place: Place) -> None:
    rest = ("k=2", "epochs=2", "keep=last")
    done = sweep(place, "lr=0.1,1e30", *rest)
    assert done.rc == 0
    assert "diverged in epoch 1" in done.out
    assert "the loss is not finite in epoch 1" in done.err
    good, bad = (f"lr={rate},epochs=2,keep=last,k=2" for rate in ("0.1", "1e+30"))
    assert solved(variant(place, good)) == solved(variant(swept, good))
    assert [path.name for path in variant(place, bad).iterdir()] == ["result.json"]
    again = sweep(place, "lr=0.1,1e30", *rest, options=("--json",)).json
    assert again["done"] == []
    assert [one["diverged"] is None for one in again["variants"]] == [True, False]
    assert again["variants"][1]["diverged"]["epoch"] == 1
    kept = sweep(place, "lr=0.1,1e30", *rest, options=("--keep", bad))
    assert kept.rc == 9
    assert "keep another variant" in kept.error
    kept = sweep(place, "lr=0.1,1e30", *rest, options=("--keep", good, "--json")).json
    assert kept["kept"] == good, "beside a layer that is solved, the other one is told as well"
    assert sweep(place, "lr=0.1,1e30", *rest).rc == 0


def test_all_diverge(place: Place) -> None:
    done = sweep(place, "lr=1e30,1e31")
    assert done.rc == 9
    assert "every variant diverged" in done.error
    assert sweep(place, "lr=1e30", options=("--keep", "best")).rc == 9
    assert not (place.run / "layer_2/layer.json").exists()
