"""Workers that write nothing: they examine images, hash shards and compute channel statistics.

An answer that fails is no reason to stop: what a worker could not do is done here, where an error
has its own name and exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from strata.pipeline.feed.level_feed import moments_of
from strata.pipeline.materialize.cluster import tasks
from strata.pipeline.materialize.cluster.submit import Dispatch, refusal
from strata.pipeline.materialize.cluster.tasks import Failed, WorkerTask
from strata.pipeline.run.session import Crew
from strata.pipeline.run.stores import StoreAddress
from strata.stages.data.images import Examined, Source, examine, spans
from strata.stages.features.moments import Moments
from strata.store.feature_store import Store
from strata.store.fingerprint import sha256
from strata.store.level.level import COMMIT, Level
from strata.store.write.verify import Damage, check_shard

SPAN = 512
"""Images that are examined in one task."""
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def examined(crew: Crew, source: Source, task: tasks.SurveyTask) -> Iterator[Examined]:
    """What workers find on all images, which they hash and decode, in their order. Raises
    ClusterError: a worker does not see the images."""
    items = list(spans(source, SPAN))
    return _in_order(_answers(crew, task, items, lambda item: examine(source, *item)), items)


def counted(crew: Crew, store: Store, level: Level) -> Iterator[Moments]:
    """Moments of the channels of every shard, in the order of shards. Raises ClusterError: a worker
    does not see the level; LevelDamaged: a row is not the one that was written."""
    task = tasks.ChannelsTask(StoreAddress.of(store), level.key, level.content_root)
    shards = range(level.geometry.shards)
    return _in_order(_answers(crew, task, shards, moments_of(level)), shards)


def hashing(
    crew: Crew, store: Store, tick: Callable[[int], None]
) -> Callable[..., Iterator[Damage | None]]:
    """The hashing of shards by workers, as :func:`store.write.verify.check_level` takes it. Raises
    ClusterError: a worker does not see the level."""

    def hashed(directory: Path, entries: Sequence[dict[str, Any]]) -> Iterator[Damage | None]:
        place, files = directory.absolute(), store.files
        task = tasks.HashTask(StoreAddress.of(store), place, sha256(files.read(place / COMMIT)))
        check = partial(check_shard, place, deep=True, files=files)
        for entry, damage in _answers(crew, task, entries, check):
            tick(entry["nbytes"])
            yield damage and replace(damage, path=directory / entry["key"], level=directory)

    return hashed


def _answers(
    crew: Crew, task: WorkerTask, items: Sequence[_Item], here: Callable[[_Item], _Answer]
) -> Iterator[tuple[_Item, _Answer]]:
    """Every item with what a worker has answered; where it failed, with what is seen here."""
    for item, answer in Dispatch(crew, task).answers(items):
        if isinstance(answer, Failed):
            if answer.for_all:
                raise refusal(answer)
            answer = here(item)
        yield item, answer


def _in_order(
    answers: Iterable[tuple[_Item, _Answer]], items: Sequence[_Item]
) -> Iterator[_Answer]:
    """Answers in the order of their items. A few wait, as a few are under way."""
    waiting: dict[_Item, _Answer] = {}
    due = iter(items)
    first = next(due, None)
    for item, answer in answers:
        waiting[item] = answer
        while first in waiting:
            yield waiting.pop(first)
            first = next(due, None)
