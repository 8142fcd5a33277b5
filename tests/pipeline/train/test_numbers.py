"""Labels that are numbers, several classes at once or regression, in every command that judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Place, tiny
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, r2_score

from strata.pipeline.run.levels import keys_at

SPLIT = 1437
CODE = "def far(z, y):\n    return (z - y.reshape(z.shape)).abs().mean(1)\n"


def written(root: Path, loss: str, **changes: object) -> Place:
    """The digits: even, above 4, divisible by 3; or how bright they are."""
    root.mkdir(parents=True, exist_ok=True)
    digits: Any = load_digits()
    x = (digits.images * 255 / 16).astype(np.uint8)[:, None]
    n, y = digits.target, digits.images.mean((1, 2)).astype(np.float32)
    if loss == "bce":
        y = np.stack([n % 2 == 0, n > 4, n % 3 == 0], 1).astype(np.float32)
    arrays = {"x_train": x[:SPLIT], "y_train": y[:SPLIT], "x_test": x[SPLIT:], "y_test": y[SPLIT:]}
    np.savez(root / "numbers.npz", **arrays)
    text = tiny(**{"layers": 2, "views": 2, "keep": "best", **changes})
    text = text.replace('"digits"', f'"npz:{root}/numbers.npz"')
    text = text.replace("classes = 10", f"classes = {3 if loss == 'bce' else 1}")
    text = text.replace('kind = "one-cycle"', 'kind = "cosine"\noptimizer = "adamw"\nmixup = 0.1')
    (root / "mine.py").write_text(CODE)
    text = text.replace("lr = 0.1", "lr = 0.01") + f'\n[loss]\nname = "{loss}"\n'
    (root / "tiny.toml").write_text(text)
    return Place(root)


@pytest.fixture(scope="module", params=["bce", "mse"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = written(tmp_path_factory.mktemp("numbers") / request.param, request.param)
    assert found.do("run").rc == 0
    return found


def chief(place: Place) -> str:
    return "map" if "bce" in (place.root / "tiny.toml").read_text() else "r2"


def labels(place: Place) -> np.ndarray:
    """Those of the test rows, in the order of x_0."""
    seen = place.overview()
    key = next(key for key in keys_at(seen.existing(), 0) if key.split == "test")
    return seen.store.open(key).array("label")


def test_layers_are_judged_as_scikit_learn_does(place: Place) -> None:
    found = place.do("evaluate", "--json").json
    assert found["confusion"] is None
    y = labels(place)
    for j, one in enumerate(found["layers"], start=1):
        z = np.load(place.run / f"layer_{j}/test_logits.npy")
        own = average_precision_score(y, z) if chief(place) == "map" else r2_score(y, z)
        assert one["test"][chief(place)] == pytest.approx(own, rel=1e-4)
        assert one["test"]["top1"] is one["test"]["top5"] is None
    joint = found["layers"][1]["ensemble"]["probabilities"]
    assert joint.keys() == found["layers"][1]["test"].keys() - {"loss"}
    line = json.loads((place.run / "layer_2/epochs.jsonl").read_text().splitlines()[-1])
    assert line["train_top1"] is None
    assert line[f"test_{chief(place)}"] is not None


def test_commands_say_what_the_loss_has(place: Place, tmp_path: Path) -> None:
    copy, name = place.copy(tmp_path / "copy"), "mAP" if chief(place) == "map" else "R²"
    for command in (
        ("sweep", "--layer", 2, "--vary", "lr=0.001,0.01"),
        ("final", "--vary", "lr=0.001,0.01"),
        ("probe", "--layer", 1, "--kind", "cnn"),
        ("baseline",),
        ("status",),
        ("evaluate",),
    ):
        said = copy.do(*command)  # pyright: ignore
        assert said.rc == 0, said.err
        assert "top-1" not in said.out
        assert name in said.out + said.err, command
    swept = copy.do("sweep", "--layer", 2, "--vary", "lr=0.001,0.01", "--json").json
    found = [one["test"][chief(place)] for one in swept["variants"]]
    assert found == sorted(found, reverse=True)
    assert copy.do("report").rc == 0
    page = (copy.run / "report.html").read_text()
    assert name in page
    assert "nats" not in page


def test_a_linear_probe_is_refused(place: Place) -> None:
    said = place.do("probe", "--layer", 1)
    assert said.rc == 2
    assert "tells classes apart, and the labels here are numbers: use --kind cnn" in said.error


def test_a_loss_of_ones_own_is_judged_by_itself(tmp_path: Path) -> None:
    place = written(tmp_path, "mine.py:far", layers=1, epochs=1, downsample="[]")
    assert place.do("run").rc == 0
    (layer,) = place.do("evaluate", "--json").json["layers"]
    z = np.load(place.run / "layer_1/test_logits.npy")
    y = labels(place)
    expected = {"loss": pytest.approx(np.abs(z[:, 0] - y).mean(), rel=1e-5)}
    assert layer["test"] == expected | {"top1": None, "top5": None}


@pytest.mark.parametrize(
    ("loss", "data", "said"),
    [
        ("cross-entropy", "mse", "is 'cross-entropy', and the labels are numbers, 1 for each"),
        ("bce", "mse", "those of bce are in 0 … 1"),
    ],
)
def test_labels_that_do_not_suit(tmp_path: Path, loss: str, data: str, said: str) -> None:
    place = written(tmp_path, data)
    text = (tmp_path / "tiny.toml").read_text()
    (tmp_path / "tiny.toml").write_text(text.replace(f'name = "{data}"', f'name = "{loss}"'))
    found = place.do("run")
    assert found.rc == 4
    assert said in found.error
