"""The feed: every row once, the same order for the same state, closed cleanly, errors passed on."""

import threading

import numpy as np
import pytest
import torch
from runs import open_run, tiny

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.store.errors import LevelDamaged


@pytest.fixture(scope="module", params=['"canvas"', "2"], ids=["canvas", "two fixed views"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    opened = open_run(tmp_path_factory.mktemp("feed"), tiny(views=request.param, epochs=1))
    algorithm.make(opened, write=1)
    return opened


def labels_of(feed: ProblemFeed, epoch: int, start: int = 0) -> list[torch.Tensor]:
    return [y for _, y in feed.epoch(epoch, start)]


def test_an_epoch_visits_every_row_once_but_for_the_short_last_batch(session: Session) -> None:
    with ProblemFeed(session, 1) as feed:
        ys = torch.cat(labels_of(feed, 0))
        assert feed.batches == len(feed.labels) // 64
        assert len(ys) == feed.batches * 64
        counts = np.bincount(ys.numpy(), minlength=10)
        assert (counts <= np.bincount(feed.labels, minlength=10)).all()


def test_shapes_dtypes_and_layout(session: Session) -> None:
    with ProblemFeed(session, 1) as feed:
        x, y = next(feed.epoch(0))
    assert x.shape == (64, 8, 8, 8)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_the_order_is_a_function_of_seed_and_epoch(session: Session) -> None:
    with ProblemFeed(session, 1) as one, ProblemFeed(session, 1) as other:
        assert all(map(torch.equal, labels_of(one, 3), labels_of(other, 3)))
        assert not all(map(torch.equal, labels_of(one, 3), labels_of(other, 4)))


@pytest.mark.parametrize("start", [1, 7, 21])
def test_an_epoch_can_be_taken_up_at_any_batch(session: Session, start: int) -> None:
    with ProblemFeed(session, 1) as feed:
        whole = list(feed.epoch(2))
        rest = list(feed.epoch(2, start))
    assert len(rest) == len(whole) - start
    for (x, y), (x_again, y_again) in zip(whole[start:], rest, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


def test_leaving_early_and_closing_leave_no_thread(session: Session) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        with ProblemFeed(session, 1) as feed:
            for _ in feed.epoch(0):
                break
    assert set(threading.enumerate()) <= before


def test_a_reading_error_reaches_the_caller(session: Session) -> None:
    """A shard that vanishes under the feed is a named file, not a hang and not zeros."""
    with ProblemFeed(session, 1) as feed:
        level = next(iter(feed.features.levels.values()))
        shard = level.directory / "x/c.0.0.0.0"
        hidden = shard.with_name("hidden")
        shard.rename(hidden)
        try:
            with pytest.raises(LevelDamaged, match=r"c\.0\.0\.0\.0 is missing"):
                list(feed.epoch(0))
        finally:
            hidden.rename(shard)


def test_fixed_batches_are_the_unaugmented_images(session: Session) -> None:
    """Rows in order, and the same in every call: a risk that can be compared between epochs."""
    with ProblemFeed(session, 1) as feed:
        rows = np.arange(0, 300, 3)
        one, other = (list(feed.fixed(rows)) for _ in range(2))
        assert torch.equal(torch.cat([y for _, y in one]), torch.from_numpy(feed.labels[rows]))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("accumulate", [2, 5])
def test_a_batch_in_parts_is_the_batch(session: Session, cached: bool, accumulate: int) -> None:
    with ProblemFeed(session, 1, cached=cached) as feed:
        whole = list(feed.epoch(1, 3))
    micro = -(-64 // accumulate)
    with ProblemFeed(session, 1, cached=cached) as feed:
        count = 0
        for (x, y), (parts, same) in zip(whole, feed.epoch_in_parts(1, 3, accumulate), strict=True):
            made = list(parts.split(micro))
            assert [len(part) for part in made] == [len(part) for part in y.split(micro)]
            assert torch.equal(torch.cat(made), x)
            assert torch.equal(same, y)
            count += 1
    assert count == len(whole) > 0


@pytest.mark.parametrize("cached", [True, False])
def test_values_in_another_dtype_are_those_of_float32_cast(session: Session, cached: bool) -> None:
    """So that a convolution in that dtype sees the same bits, without a copy in float32."""
    with ProblemFeed(session, 1, cached=cached) as feed:
        expected = list(feed.epoch(1))
    with ProblemFeed(session, 1, cached=cached, dtype=torch.bfloat16) as feed:
        for (x, y), (wide, same) in zip(feed.epoch(1), expected, strict=True):
            assert x.dtype == torch.bfloat16
            assert torch.equal(x, wide.to(torch.bfloat16))
            assert torch.equal(y, same)
            assert x.is_contiguous(memory_format=torch.channels_last)
