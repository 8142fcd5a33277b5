"""Optimiser, loss and transform of a recipe's own: the same weights after a stop, from a cache or
without one; metrics that are read; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Place, open_run, stopped_after, tiny

from strata.pipeline.errors import OptionRange, RecipeError
from strata.pipeline.materialize.materialize import materialize
from strata.pipeline.recipe import augmentation
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.recipe.variants import variants
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.pipeline.train.train import solve
from strata.stages.errors import UnusableNetwork

CODE = """
import random

import numpy as np
import torch
from torch.nn.functional import cross_entropy

def focal(logits, labels):
    loss = cross_entropy(logits, labels, reduction="none")
    return loss * (1 - torch.exp(-loss)) ** 2

def noisy(image):
    by = torch.rand(()) + np.random.rand() + random.random()
    return (image * (0.3 + by / 5)).to(image.dtype)

def larger(image):
    return image.float() / 255

class Focal(torch.nn.Module):
    def forward(self, logits, labels):
        return focal(logits, labels)

module = Focal()
"""
ADAM = {
    "optimizer": "adamw",
    "kind": "cosine",
    "weight_decay": 0.01,
    "lr": 0.01,
    "label_smoothing": 0.1,
    "mixup": 0.2,
}
NAMES = "weights", "auxiliary", "train", "test"


def text(
    schedule: dict[str, Any] | None = None, loss: str = "", transform: str = "", **changes: object
) -> str:
    """TOML of a tiny recipe of two layers with choices of its own."""
    whole = tiny(**{"layers": 2, "epochs": 2, "views": 2, **changes})
    for key, value in (schedule or {}).items():
        kept = (line for line in whole.splitlines() if not line.startswith(f"{key} = "))
        whole = "\n".join(kept).replace("[schedule]", f"[schedule]\n{key} = {json.dumps(value)}")
    if transform:
        whole = whole.replace("[augment]", f'[augment]\ntransform = "mine.py:{transform}"')
    return whole + (f'\n[loss]\nname = "{loss}"\n' if loss else "\n")


def opened(place: Path, toml: str) -> Session:
    place.mkdir(exist_ok=True, parents=True)
    (place / "mine.py").write_text(CODE)
    return open_run(place, toml)


def found(session: Session) -> list[Any]:
    records = [session.run.layer(j) or {} for j in (1, 2)]
    return [{name: record[name] for name in NAMES} for record in records]


WAYS = {
    "adamw": text(ADAM),
    "loss": text(loss="mine.py:focal"),
    "fixed": text(transform="noisy"),
    "fresh": text(transform="noisy", views=0),
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_depend_on_neither_the_cache_nor_a_stop(tmp_path: Path, way: str) -> None:
    """In a second run x_1 is computed in every batch; the third is stopped in each layer."""
    whole, again = opened(tmp_path / "whole", WAYS[way]), opened(tmp_path / "again", WAYS[way])
    algorithm.make(whole, solve=2)
    for j in (1, 2):
        solve(again, j, cached=False)
    assert found(again) == found(whole)

    for steps in (5, 55):
        stopped = opened(tmp_path / "stopped", WAYS[way])
        stopped_after(stopped, steps, lambda: algorithm.make(stopped, solve=2))  # noqa: B023
    algorithm.make(opened(tmp_path / "stopped", WAYS[way]), solve=2)
    assert found(stopped) == found(whole)


def test_a_module_is_a_function(tmp_path: Path) -> None:
    one, other = (opened(tmp_path / n, text(loss=f"mine.py:{n}")) for n in ("focal", "module"))
    for session in (one, other):
        solve(session, 1)
    assert (one.run.layer(1) or {})["weights"] == (other.run.layer(1) or {})["weights"]


# ---- what a run is ------------------------------------------------------------------------------


def science(toml: str, place: Path) -> dict[str, Any]:
    (place / "mine.py").write_text(CODE)
    return parse(toml, "tiny", place).science()


def test_a_recipe_without_choices_is_what_it_was(tmp_path: Path) -> None:
    """No key of theirs is in what identifies a run, or a variant."""
    plain = parse(text(), "tiny")
    assert "loss" not in plain.science()
    (variant,) = variants(plain, 2, ["lr=0.1"], 0)
    for table in (plain.science()["schedule"], variant.settings["schedule"]):
        assert not {"optimizer", "label_smoothing", "mixup"} & set(table)
    assert "transform" not in plain.science()["augment"]
    assert science(text(loss="cross-entropy"), tmp_path) == plain.science()


@pytest.mark.parametrize(
    "changed",
    [
        *(text({key: value}) for key, value in ADAM.items() if key != "lr"),
        text(loss="mine.py:focal"),
        text(transform="noisy"),
    ],
)
def test_every_choice_makes_another_run(tmp_path: Path, changed: str) -> None:
    assert science(changed, tmp_path) != parse(text(), "tiny").science()


@pytest.mark.parametrize("toml", [text(loss="mine.py:focal"), text(transform="noisy")])
def test_a_run_keeps_the_file(tmp_path: Path, toml: str) -> None:
    """It goes on when the file is gone; another text is another run."""
    place = Place(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "tiny.toml").write_text(toml)
    assert place.do("train", "--layer", 1).rc == 0
    assert (place.run / "mine.py").read_text() == CODE
    assert place.do("status").rc == 0
    (tmp_path / "mine.py").write_text(CODE + "\n# another")
    said = place.do("train", "--layer", 2)
    assert said.rc == 8
    assert ".code" in said.error


def test_a_transform_names_the_levels_it_made(tmp_path: Path) -> None:
    names = []
    for toml in (text(), text(transform="noisy")):
        session = opened(tmp_path / str(len(names)), toml)
        algorithm.make(session, solve=1)
        node = session.run.nodes()[1]
        names.append(node.intent["preprocessing"].get("transform"))
    assert names[0] is None
    assert set(names[1]) == {"name", "code"}


# ---- draws --------------------------------------------------------------------------------------


def test_draws_of_a_transform_are_of_seed_epoch_and_sample() -> None:
    recipe = parse(text(), "tiny")
    assert augmentation.epoch_draws(recipe, 0, 0, 9).seeds is None
    own = _with_transform(recipe)
    one, again, later = (augmentation.epoch_draws(own, 0, e, 9).seeds for e in (0, 0, 1))
    assert one is not None
    np.testing.assert_array_equal(one, again)
    seeds = [one, later, augmentation.view_draws(own, 0, 0, 9).seeds]
    assert len(set(np.concatenate(seeds).tolist())) == 27  # pyright: ignore
    assert augmentation.centre_draws(own, 9).seeds is None
    chosen = np.array([3, 1])
    np.testing.assert_array_equal(
        augmentation.epoch_draws(own, 0, 0, 9).of(chosen).seeds, one[chosen]
    )


def _with_transform(recipe: Recipe) -> Recipe:
    return replace(recipe, augment=replace(recipe.augment, transform="mine.py:noisy"))


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        (text({"optimizer": "adam"}), "'schedule.optimizer' is 'adam'. Did you mean 'adamw'?"),
        (text({"kind": "cosines"}), "'schedule.kind' is 'cosines'. Did you mean 'cosine'?"),
        (text({"label_smoothing": 1.0}), "'schedule.label_smoothing' is 1.0; it must be in [0, 1)"),
        (text({"mixup": -1}), "'schedule.mixup' is -1.0; it must be in 0 … 1,000"),
        (text({"optimizer": "adamw", "nesterov": True}), "'schedule.nesterov' is of SGD"),
        (text({"kind": "cosine", "warmup": 1.0}), "'schedule.warmup' is 1.0; it must be in [0, 1)"),
        (text(loss="hinge"), "'loss.name' is 'hinge'; known: cross-entropy, bce, mse, FILE.py:"),
        (text(loss="bec"), "'loss.name' is 'bec'. Did you mean 'bce'?"),
        (text(loss="gone.py:loss"), "'loss.name' names a file: "),
        (text(loss="../mine.py:loss"), "the file must lie beside the recipe, or below it"),
        (
            text({"label_smoothing": 0.1}, loss="mse"),
            "is of cross-entropy, and 'loss.name' is 'mse'",
        ),
        (text(transform="noisy", views='"canvas"'), "use 4 or more views, or 0"),
        (text(transform="noisy", views=1), "every epoch would see the same draw"),
        (
            text(transform="no function"),
            "'augment.transform' is 'mine.py:no function'; known: FI",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, toml: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    with pytest.raises(RecipeError) as caught:
        parse(toml, "tiny", tmp_path)
    assert said in str(caught.value)


def test_a_transform_must_keep_shape_and_dtype(tmp_path: Path) -> None:
    session = opened(tmp_path, text(transform="larger"))
    with pytest.raises(UnusableNetwork, match=r"makes torch.float32 \[1, 8, 8\] of an image"):
        solve(session, 1)


def test_smoothing_varies_with_cross_entropy_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    recipe = parse(text(loss="mine.py:focal"), "tiny", tmp_path)
    with pytest.raises(OptionRange, match="is of cross-entropy"):
        variants(recipe, 2, ["label_smoothing=0.1"], 0)
    many = variants(parse(text(), "tiny"), 2, ["optimizer=sgd,adamw", "mixup=0,0.2"], 0)
    assert [one.name for one in many][-1] == "optimizer=adamw,mixup=0.2"


# ---- what is told -------------------------------------------------------------------------------


def test_sweeps_finals_and_reports_with_choices(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "tiny.toml").write_text(text({"optimizer": "adamw"}, loss="mine.py:focal"))
    assert place.do("run").rc == 0
    assert place.do("sweep", "--layer", 2, "--vary", "optimizer=sgd,adamw").rc == 0
    assert place.do("final", "--vary", "mixup=0,0.5").rc == 0
    assert place.do("baseline").rc == 0
    assert place.do("probe", "--layer", 1, "--kind", "cnn").rc == 0
    layer = place.do("evaluate", "--json").json["layers"][-1]
    assert 0.2 < layer["test"]["top1"] <= 1
    assert layer["ensemble"]["probabilities"]["top1"] is not None
    assert place.do("report").rc == 0
    assert "mine.py:focal" in (place.run / "report.html").read_text()


def test_levels_of_a_transform_can_be_made_again(tmp_path: Path) -> None:
    """The same bytes, whoever computes them."""
    found = []
    for name in ("one", "two"):
        session = opened(tmp_path / name, text(transform="noisy"))
        algorithm.make(session, solve=1)
        materialize(session, 1)
        shards = sorted((tmp_path / name / "store").glob("x_1*/*/x/c*"))
        found.append([path.read_bytes() for path in shards])
    assert found[0] == found[1]
    assert found[0]
