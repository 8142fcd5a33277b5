"""The linear probe: what can be told apart is, what cannot is not, and memory is as computed."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from forms import FORMS

from strata.stages.errors import DataError
from strata.stages.network.featurize import pooled
from strata.stages.solve.probe import BLOCK, GRID, bytes_of_fit, fit, fits_of, split
from strata.store.read.order import generator

CLASSES, COLUMNS = 5, 24


def blobs(rows: int, *, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around one centre per class."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, rows)
    centres = np.random.default_rng(7).standard_normal((CLASSES, COLUMNS))
    return apart * centres[labels] + draw.standard_normal((rows, COLUMNS)), labels


def fitted(rows: np.ndarray, labels: np.ndarray, seed: int = 0) -> Any:
    order, first = split(labels, generator("probe", seed).permutation(len(labels)))
    return fit(rows[order], labels[order], first, lambda done: None)


def test_what_is_linearly_separable_is_separated() -> None:
    probe, found = fitted(*blobs(400, apart=8.0))
    rows, labels = blobs(300, apart=8.0, seed=1)
    assert found["train"]["top1"] == 1.0
    assert (probe.predict(rows) == labels).all()
    assert found["converged"]


def test_labels_that_have_nothing_to_do_with_the_rows_are_guessed() -> None:
    """500 rows unseen, 5 classes: four standard deviations of chance are 0.07."""
    rows, _ = blobs(1000, apart=8.0)
    labels = np.random.default_rng(3).integers(0, CLASSES, 1000)
    probe, _ = fitted(rows[:500], labels[:500])
    guessed = (probe.predict(rows[500:]) == labels[500:]).mean()
    assert abs(guessed - 1 / CLASSES) < 0.07


def test_it_does_what_scikit_learn_does_for_one_against_the_rest() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, labels = blobs(500, apart=1.0)
    probe, found = fitted(rows, labels)
    one: Any = OneVsRestClassifier(LogisticRegression(C=found["regularisation"], max_iter=200))
    known = make_pipeline(StandardScaler(), one).fit(rows, labels)
    unseen, _ = blobs(500, apart=1.0, seed=1)
    agreed = (known.predict(unseen) == probe.predict(unseen)).mean()
    assert agreed > 0.99, "the order of the rows may move the last bits of a fit"


def test_c_is_the_smallest_of_those_that_are_best_on_rows_held_out() -> None:
    _, found = fitted(*blobs(400, apart=1.0))
    best = max(found["held_out"].values())
    assert list(found["held_out"]) == [f"{c:g}" for c in GRID]
    assert found["regularisation"] == min(
        float(c) for c, top1 in found["held_out"].items() if top1 == best
    )
    assert len(set(found["held_out"].values())) > 1, "C makes a difference here"


def test_a_fifth_of_every_class_is_held_out_and_the_seed_says_which() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    first, count = split(labels, generator("probe", 0).permutation(len(labels)))
    assert sorted(first) == list(range(len(labels)))
    assert np.bincount(labels[first[count:]], minlength=4).tolist() == [10, 2, 1, 0]
    again, _ = split(labels, generator("probe", 0).permutation(len(labels)))
    other, _ = split(labels, generator("probe", 1).permutation(len(labels)))
    assert (again == first).all()
    assert (other != first).any()


def test_columns_of_any_size_and_dead_ones_do_no_harm() -> None:
    rows, labels = blobs(400, apart=8.0)
    rows *= 10.0 ** np.arange(-12, 12)
    rows[:, 5] = 3.0
    assert fitted(rows, labels)[1]["train"]["top1"] == 1.0


def test_labels_need_not_be_consecutive_nor_all_there() -> None:
    rows, labels = blobs(300, apart=8.0)
    probe, _ = fitted(rows, 3 * labels + 2)
    assert set(probe.predict(rows)) == {2, 5, 8, 11, 14}


@pytest.mark.parametrize(
    ("labels", "words"), [(np.zeros(9), "all of one class"), (np.arange(9), "hel")]
)
def test_what_cannot_be_told_apart_is_refused(labels: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        fitted(np.zeros((9, 4)), labels.astype(np.int64))


def test_every_fit_ticks_and_a_tick_may_stop_it() -> None:
    rows, labels = blobs(200, apart=8.0)
    ticks: list[int] = []
    fit(rows.copy(), labels, 160, ticks.append)
    assert sum(ticks) == fits_of(CLASSES)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(rows, labels, 160, stop)


def test_memory_of_a_fit_is_what_was_computed() -> None:
    rows = np.random.default_rng(0).standard_normal((3 * BLOCK, 200))
    labels = (rows[:, 0] > 0).astype(np.int64)
    fit(rows[:100].copy(), labels[:100], 80, lambda done: None)  # imports are not what is measured
    tracemalloc.start()
    held = rows.copy()
    fit(held, labels, 2 * BLOCK, lambda done: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    block = 8 * BLOCK * rows.shape[1]
    assert peak < bytes_of_fit(*rows.shape) + 4 * block
    assert peak > 0.9 * held.nbytes


@pytest.mark.parametrize("kind", sorted(FORMS))
def test_pooled_features_of_what_is_no_map_are_means_over_its_places(kind: str) -> None:
    x = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    x = x[:, :, :1, :1] if kind == "vector" else x
    form, axis = FORMS[kind]
    found = pooled(form(x), axis)
    assert (found.dtype, found.shape) == (np.float32, (3, 2))
    np.testing.assert_allclose(found, x.mean((2, 3)).numpy(), rtol=1e-5)


def test_pooled_features_are_the_four_quadrants() -> None:
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float16).reshape(2, 3, 4, 4)
    found = pooled(x)
    assert found.dtype == np.float32
    assert found.shape == (2, 12)
    assert found[1, 4:8].tolist() == [
        float(x[1, 1, y : y + 2, z : z + 2].float().mean()) for y in (0, 2) for z in (0, 2)
    ]
