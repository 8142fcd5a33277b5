"""Workers that only look: at images, at the bytes of shards, at what channels hold.

An answer that fails is no reason to stop: what a worker could not look at is looked at here, where
an error has its own name and exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from strata.pipeline.feed.shard_moments import moments_of
from strata.pipeline.materialize.cluster.submit import Dispatch, refusal
from strata.pipeline.materialize.cluster.tasks import ChannelsTask, Failed, HashTask, SurveyTask
from strata.pipeline.run.session import Crew, Session
from strata.pipeline.run.stores import StoreAddress
from strata.stages.data.images import Examined, Source, examine, spans
from strata.stages.features.moments import Moments
from strata.store.feature_store import Store
from strata.store.fingerprint import sha256
from strata.store.level.level import COMMIT, Level
from strata.store.write.verify import Damage, check_shard

SPAN = 512
"""Images that are examined in one task."""
Answered = TypeVar("Answered")


def examined(
    session: Session, source: Source, order: SurveyTask
) -> Iterator[tuple[str, int, Examined]]:
    """All images hashed and decoded by workers, in their order: split, number of the first, what
    was found.

    Raises:
        ClusterError: a worker does not see the images.
    """
    assert session.crew is not None
    answers = Dispatch(session.crew, order).answers(spans(source, SPAN))
    found = (
        ((split, span.start), _or_here(answer, partial(examine, source, split, span)))
        for (split, span), answer in answers
    )
    due = ((split, span.start) for split, span in spans(source, SPAN))
    for (split, start), one in _in_order(found, due):
        yield split, start, one


def counted(crew: Crew, store: Store, level: Level) -> Iterator[Moments]:
    """What the channels of every shard hold, in the order of shards.

    Raises:
        ClusterError: a worker does not see the level.
        LevelDamaged: a row is not the one that was written; names file and row.
    """
    order = ChannelsTask(StoreAddress.of(store), level.key, level.content_root)
    shards, look = range(level.geometry.shards), moments_of(level)
    answers = Dispatch(crew, order).answers(shards)
    found = ((shard, _or_here(answer, partial(look, shard))) for shard, answer in answers)
    for _, moments in _in_order(found, shards):
        yield moments


def hashing(
    crew: Crew, store: Store, tick: Callable[[int], None]
) -> Callable[..., Iterator[Damage | None]]:
    """For :func:`strata.store.write.verify.check_level`: workers hash.

    Raises:
        ClusterError: a worker does not see the level.
    """

    def hashed(directory: Path, entries: Sequence[dict[str, Any]]) -> Iterator[Damage | None]:
        place, files = directory.absolute(), store.files
        order = HashTask(StoreAddress.of(store), place, sha256(files.read(place / COMMIT)))
        for entry, answer in Dispatch(crew, order).answers(entries):
            look = partial(check_shard, place, entry, deep=True, files=files)
            damage = _or_here(answer, look)
            tick(entry["nbytes"])
            yield damage and replace(damage, path=directory / entry["key"], level=directory)

    return hashed


def _or_here(answer: Any, look: Callable[[], Answered]) -> Answered:
    """What a worker has answered; where it failed, what is seen here."""
    if not isinstance(answer, Failed):
        return answer
    if answer.for_all:
        raise refusal(answer)
    return look()


_Name = TypeVar("_Name")


def _in_order(
    found: Iterable[tuple[_Name, Answered]], due: Iterable[_Name]
) -> Iterator[tuple[_Name, Answered]]:
    """The same, in the order in which they are due. A few wait, as a few are under way."""
    waiting: dict[_Name, Answered] = {}
    order = iter(due)
    name = next(order, None)
    for other, one in found:
        waiting[other] = one
        while name in waiting:
            yield name, waiting.pop(name)
            name = next(order, None)
