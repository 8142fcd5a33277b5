"""Features as an array, as a data set of torch with workers, and as a feed: the same values."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import Rows, convolution
from runs import Place
from sklearn.linear_model import LogisticRegression
from small_levels import SHAPES, drawn, flip
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, RandomSampler, Subset

import strata
from strata.pipeline.api.features import LevelFeatures, WholeBatch
from strata.store.errors import LevelConflict, LevelDamaged
from strata.store.level.layout import LevelKey
from strata.store.write.writer import LevelWriter

COUNT = 300


def cached(store: Path, **how: Any) -> LevelFeatures:
    told: Any = {"block": 16, "device": "cpu", "progress": False} | how
    return strata.cache(convolution(), Rows(COUNT, 3, 8, 8), store, **told)


@pytest.fixture(scope="module", params=["raw", "zstd"])
def x(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LevelFeatures:
    """Features (300, 4, 2, 2), whose labels are their numbers."""
    return cached(tmp_path_factory.mktemp("x"), profile=request.param)


# ---- an array ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        slice(10, 20),
        slice(None, None, -7),
        slice(5, 5),
        [3, 299, 0, 3],
        np.array([250, 2, 2]),
        torch.tensor([7, 1]),
        np.arange(COUNT) % 5 == 0,
    ],
)
def test_several_samples_are_those_of_the_whole(x: LevelFeatures, index: Any) -> None:
    assert torch.equal(
        x[index], x[:][index if not isinstance(index, slice) else range(COUNT)[index]]
    )


def test_one_sample_has_no_axis_of_samples(x: LevelFeatures) -> None:
    assert x[7].shape == (4, 2, 2)
    assert torch.equal(x[-1], x[:][-1])
    with pytest.raises(IndexError):
        x[COUNT]
    assert len([*x]) == len(x) == COUNT


def test_numpy_and_scikit_learn_take_it(x: LevelFeatures) -> None:
    assert np.array_equal(np.asarray(x), x[:].numpy())
    assert np.asarray(x, np.float64).dtype == np.float64
    few = x.view(0)
    flat = np.asarray(few).reshape(COUNT, -1)
    fitted = LogisticRegression(max_iter=3000).fit(flat[:40], few.labels[:40] % 2)
    assert fitted.predict(flat[:40]).shape == (40,)


def test_what_is_given_is_the_callers_own(x: LevelFeatures) -> None:
    before = x[0].clone()
    x[0].zero_()
    assert torch.equal(x[0], before)


def test_it_says_what_it_is(x: LevelFeatures) -> None:
    level = x.levels[0]
    stored = f"stored as float16, {level.geometry.profile} in {level.directory}"
    assert repr(x) == f"<Features (300, 4, 2, 2), {stored}>"


def test_images_are_given_as_they_are(sound: Place) -> None:
    images = strata.Features(strata.open_level(sound.level(0, "train")))
    assert images.dtype == torch.uint8 == images[:3].dtype
    assert images.shape == (1437, 1, 8, 8)


@pytest.mark.parametrize("name", SHAPES)
def test_any_axes_in_any_order_of_rows(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    rows = drawn(shape)
    rows = np.nan_to_num(rows, posinf=0, neginf=0)
    ids = np.random.default_rng(0).permutation(shape.rows) * 2
    writer = LevelWriter(tmp_path, LevelKey(3, "f" * 64, "train", "v0"), shape, [{}])
    writer.begin()
    for shard in range(shape.shards):
        writer.put(shard, rows[slice(*shape.shard_range(shard))])
    x = LevelFeatures(writer.commit(None, {"label": ids * 10, "sample_id": ids}))
    order = np.argsort(ids)
    assert x.ids.tolist() == sorted(ids)
    assert x.labels.tolist() == (ids[order] * 10).tolist()
    assert np.array_equal(x[:].numpy(), rows[order])
    assert np.array_equal(x[[4, 1]].numpy(), rows[order[[4, 1]]])


def test_a_row_that_is_not_what_was_written_is_named(tmp_path: Path) -> None:
    x = cached(tmp_path)
    (shard,) = tmp_path.glob("x_1-*/all.v0/x/c.5.0.0.0")
    flip(shard)
    rows = x.levels[0].geometry.shard_rows
    assert x[0].isfinite().all()
    with pytest.raises(LevelDamaged, match=f"row {5 * rows + 1} is not the one that was written"):
        x[5 * rows + 1]


# ---- a data set of torch -------------------------------------------------------------------------


def whole(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_a_loader_gives_the_samples(x: LevelFeatures, context: str | None) -> None:
    how: Any = {"num_workers": 2 if context else 0, "multiprocessing_context": context}
    values, labels = whole(DataLoader(x.dataset(), batch_size=64, **how, generator=own()))
    assert torch.equal(values, x[:])
    assert labels.tolist() == list(range(COUNT))


def own() -> torch.Generator:
    """A generator for a loader, which else would draw from the global one."""
    return torch.Generator().manual_seed(0)


def test_a_loader_in_any_order(x: LevelFeatures) -> None:
    data = x.dataset()
    shuffled = DataLoader(data, batch_size=50, shuffle=True, generator=own())
    sampler = BatchSampler(RandomSampler(data, generator=own()), 50, drop_last=False)
    for loader in (shuffled, DataLoader(data, batch_sampler=sampler, generator=own())):
        values, labels = whole(loader)
        assert torch.equal(values, x[labels])
        assert labels.tolist() != sorted(labels.tolist()) == list(range(COUNT))
    one, label = next(iter(DataLoader(data, batch_size=None, generator=own())))
    assert torch.equal(one, x[0])
    assert label == 0


def test_other_data_sets_and_collations_take_it(x: LevelFeatures) -> None:
    data = x.dataset()
    part = Subset(data, [9, 4, 7])
    values, labels = whole(DataLoader(part, batch_size=2, generator=own()))
    assert labels.tolist() == [9, 4, 7]
    assert torch.equal(values, x[[9, 4, 7]])
    both = ConcatDataset([part, Subset(data, [1])])
    assert whole(DataLoader(both, batch_size=3, generator=own()))[1].tolist() == [9, 4, 7, 1]

    def mine(batch: Any) -> Any:
        return [int(y) for _, y in batch], [tuple(a.shape) for a, _ in batch]

    loader = DataLoader(data, batch_size=3, collate_fn=mine, generator=own())
    assert next(iter(loader)) == ([0, 1, 2], [(4, 2, 2)] * 3)
    assert [len(one) for one in data.__getitems__([1, 2])] == [2, 2]


def test_a_whole_batch_is_read_at_once(x: LevelFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    real = LevelFeatures._values

    def counted(self: LevelFeatures, rows: np.ndarray) -> Tensor:
        asked.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(LevelFeatures, "_values", counted)
    assert isinstance(x.dataset().__getitems__([1]), WholeBatch)
    asked.clear()
    next(iter(DataLoader(x.dataset(), batch_size=100, generator=own())))
    assert asked == [100]


def test_it_can_be_pickled_and_is_another_when_written_anew(tmp_path: Path) -> None:
    x = cached(tmp_path)
    data = pickle.dumps(x.dataset())
    assert torch.equal(pickle.loads(data).features[:], x[:])
    commit = x.levels[0].directory / "COMMIT.json"
    other = strata.cache(
        convolution(3), Rows(COUNT, 3, 8, 8), tmp_path, block=16, device="cpu", progress=False
    )
    place, new = x.levels[0].directory, other.levels[0].directory
    del x, other, commit
    text = data.replace(str(place).encode(), str(new).encode())
    with pytest.raises(LevelConflict, match="holds other values than when it was opened"):
        pickle.loads(text)


# ---- a feed --------------------------------------------------------------------------------------


def test_the_feed_gives_the_same(x: LevelFeatures) -> None:
    with x.feed(32, seed=1) as feed:
        batches = list(feed)
    labels = torch.cat([y for _, y in batches])
    assert sorted(labels.tolist()) == list(range(COUNT))
    assert torch.equal(torch.cat([values for values, _ in batches]), x[labels])
