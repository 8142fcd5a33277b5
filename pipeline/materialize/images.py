"""Images → x_0: surveyed once, resized, written in a seeded random order of rows.

Row i is the same sample in every level above. Random rows mean that even a sequential read of a
level is a shuffled one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from strata.pipeline.errors import ClusterError, RunConflict, remedy
from strata.pipeline.materialize.cluster.submit import in_order
from strata.pipeline.materialize.level import (
    RunAddress,
    ShardRows,
    locked_writer,
    publishing,
    write_level,
)
from strata.pipeline.materialize.timing import Done, Timing
from strata.pipeline.plan.costs import level_geometry
from strata.pipeline.recipe.recipe import Recipe
from strata.pipeline.run import record
from strata.pipeline.run.levels import have_images, stamp
from strata.pipeline.run.rundir import DATA
from strata.pipeline.run.session import READ_THREADS, Session
from strata.stages.data.images import (
    Examined,
    check_labels,
    examine,
    read,
    spans,
    square,
    survey,
)
from strata.stages.data.opening import open_source
from strata.stages.data.sources import SPLITS, Form, Source, printable, summary
from strata.stages.data.values import COLOUR
from strata.stages.errors import BrokenImage, DataError
from strata.store.errors import LevelDamaged
from strata.store.files.publish import make_directory, replace, sealed, unseal
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import Geometry, LevelKey
from strata.store.parallel import map_in_threads
from strata.store.read.order import generator

SPAN = 512
"""Images that workers examine in one task."""
NAMED_BROKEN = 20
"""Broken images kept by name in data.json; all are counted."""


def ensure_images(session: Session) -> None:
    """Make x_0 complete, or find that it is.

    Raises:
        DataError: the images or labels cannot be used; names the first that is at fault. Or their
            numbers are not those of the recipe, where the run has not read them before.
        RunConflict: the images are not those that the run was made from.
    """
    known = session.run.data()
    if have_images(session.run, session.store):
        return
    how: Any = {"root": session.options.data_root, "download": session.options.download}
    with open_source(session.run.source, form=session.run.recipe.data, **how) as source:
        skip = session.options.skip_broken  # then it depends on what is left
        if not skip:
            _check(session, source, {})
        found = _survey(session, source)
        session.report.say(_table(session, source, found))
        if skip:
            _check(session, source, found)
        if known is not None and found["digest"] != known["digest"]:
            raise RunConflict(
                f"the images of {session.run.source} are not those {session.run.directory} was "
                f"made from (digest {known['digest'][:12]}, now {found['digest'][:12]}). Restore "
                "them, or choose another directory with --run"
            )
        facts = {k: v for k, v in found.items() if k not in ("kept", "sums")}
        facts["converted"] = converted(found, session.run.recipe.data.channels)
        facts["left_out"] = {why: count for why, (count, _) in source.left_out.items()}
        record.write(session.run.directory / DATA, facts)
        for split in SPLITS:
            _write_split(session, source, split, found)


def _check(session: Session, source: Source, left: Mapping[str, Any]) -> None:
    """Hold images to the numbers of the recipe, or to what is ``left`` of them without broken ones,
    the first time that a run reads them. A run inside a run has no numbers of its own."""
    run, data = session.run, session.run.recipe.data
    first = run.origins is None and run.data() is None
    there = {"classes": len(source.classes), **{split: source.count(split) for split in SPLITS}}
    differ = {k: n for k, n in there.items() if getattr(data, k) not in (n, left.get(k))}
    advice = f"In the recipe, set {', '.join(f'data.{k} = {n}' for k, n in differ.items())}"
    try:
        with remedy(DataError, advice) if differ else nullcontext():
            check_labels(source, data.classes)
        if first and differ and not session.options.accept_data:
            each = (
                f"{k} is {n:,}, the recipe says {getattr(data, k):,}" for k, n in differ.items()
            )
            said = [f"{run.source} is not what the recipe says: {'; '.join(each)}"]
            said += [f"Left out: {summary(source.left_out)}"] * bool(source.left_out)
            raise DataError(". ".join([*said, f"{advice}, or pass --accept-data"]))
    except DataError:
        if first:
            run.take_back()
        raise


def _table(session: Session, source: Source, found: Mapping[str, Any]) -> str:
    """What was found, beside what the recipe says, and what was left out: lines for people."""
    data, own = session.run.recipe.data, session.run.origins is None
    lines = [(f"images of {session.run.source}", "found", "recipe" * own, "")]
    for split in SPLITS:
        lines.append((split, f"{found[split]:,}", f"{getattr(data, split):,}" * own, ""))
    names = ", ".join(source.classes[:10]) + ", …" * (len(source.classes) > 10)
    lines.append(("classes", f"{len(source.classes):,}", f"{data.classes:,}" * own, names))
    wide = max(len(line[0]) for line in lines)
    shown = [f"{a:{wide}} {b:>10} {c:>10}  {d}".rstrip() for a, b, c, d in lines]
    for why, (count, name) in source.left_out.items():
        shown.append(f"left out {count:,} ({why}), such as {name}")
    if found["broken_count"]:
        first = found["broken"][0]
        shown.append(f"left out {found['broken_count']:,} broken images, the first: {first}")
    for how, count in converted(found, data.channels).items():
        shown.append(f"converted {count:,} images: {how}")
    return "\n".join(shown)


def _survey(session: Session, source: Source) -> dict[str, Any]:
    """Digest, counts and good samples of a source, remembered while it is unchanged."""
    signature, store = source.signature(), session.store
    memo = memo_of(session, signature)
    with suppress(FileNotFoundError, LevelDamaged):
        remembered = unseal(memo, store.files, record.SURVEY)
        if not remembered["broken_count"] or session.options.skip_broken:
            return remembered
    found = _read_all(session, source, signature) | {
        "signature": signature,
        "stamp": stamp(session.run.source),
    }
    make_directory(memo.parent, store.files)
    replace(memo.parent, memo.name, sealed(found), store.files)
    return found


def converted(found: Mapping[str, Any], channels: int) -> dict[str, int]:
    """Images by what is done to them, beyond resizing, to have 8 bits in so many channels."""
    counts = dict(sorted(found["converted"].items()))
    colour = counts.pop(COLOUR, 0)
    return counts | ({"colour to grey": colour} if colour and channels == 1 else {})


def memo_of(session: Session, signature: str) -> Path:
    """The file that remembers a survey."""
    name = fingerprint([session.run.source, signature])[:12]
    return session.store.root / "sources" / f"{name}.json"


def _read_all(session: Session, source: Source, signature: str) -> dict[str, Any]:
    total = sum(source.count(split) for split in SPLITS)
    if session.crew is not None:
        session.crew.begin()
        address, form = RunAddress.of(session), session.run.recipe.data
        task = partial(examination, address.source, address.data_root, signature, form)
        findings = in_order(session.crew, task, list(spans(source, SPAN)), READ_THREADS)
    else:
        findings = map_in_threads(
            lambda span: examine(source, *span), spans(source), READ_THREADS, waiting=READ_THREADS
        )
    advice = "Mend or remove them, or pass --skip-broken to leave them out"
    with session.report.task("reading images", total, "images") as tick, remedy(DataError, advice):

        def done(images: int) -> None:
            session.stop.check()
            tick(images)

        skip = session.options.skip_broken
        result = survey(source, skip_broken=skip, tick=done, examined=findings)
    return {
        "source": session.run.source,
        "digest": result.digest,
        "classes": list(source.classes),
        "train": len(result.kept["train"]),
        "test": len(result.kept["test"]),
        "kept": {split: result.kept[split].tolist() for split in SPLITS},
        "sums": {split: sums.astype("<u4").tobytes().hex() for split, sums in result.sums.items()},
        "scales": result.scales,
        "converted": result.converted,
        "broken": [printable(f"{b.name}: {b.reason}") for b in result.broken[:NAMED_BROKEN]],
        "broken_count": len(result.broken),
    }


@contextmanager
def _same_source(source: str, data_root: Path, signature: str, form: Form) -> Iterator[Source]:
    """The images of a worker. Raises ClusterError: there are other files, by their signature, than
    the command sees."""
    with open_source(source, root=data_root, form=form) as opened:
        if opened.signature() != signature:
            raise ClusterError(f"{source} holds, here, other files than the command sees")
        yield opened


@contextmanager
def examination(
    source: str, data_root: Path, signature: str, form: Form
) -> Iterator[Callable[[Any], Examined]]:
    """The task of workers that hash and decode spans of images, to say which can be used. Raises
    ClusterError: there are other files than the command sees."""
    with _same_source(source, data_root, signature, form) as opened:
        yield lambda span: examine(opened, *span)


@dataclass(frozen=True)
class ImageShards:
    """The rows of x_0 of one split, in a seeded random order, decoded from their source."""

    recipe: Recipe
    source: Source
    split: str
    samples: np.ndarray
    """int64 (rows,): the sample of every row."""
    shape: Geometry
    scales: Mapping[str, int] = field(default_factory=dict)
    """Full scales of values of more than 8 bits, as the survey found them."""
    sums: np.ndarray | None = None
    """uint32 by sample: sums of the contents that the survey found; None: they are not compared."""
    threads: int = READ_THREADS
    work = "decoding"

    def shards(self, todo: Sequence[int], timing: Timing) -> ShardRows:
        """Stored elements of each shard; see ``level.ShardSource``."""
        with ThreadPoolExecutor(self.threads) as pool:
            for shard in todo:
                first, last = self.shape.shard_range(shard)
                lying = np.empty((last - first, *self.shape.lying), self.shape.dtype)
                images = np.moveaxis(lying, -1, 1)
                with timing.computing():
                    for row, image in enumerate(pool.map(self.pixels, self.samples[first:last])):
                        images[row] = image
                        timing.tick(1)
                yield shard, images

    def pixels(self, sample: np.int64) -> np.ndarray:
        """uint8 (channel, y, x) of one image, or what is none as it is. Raises DataError: it has
        changed meanwhile."""
        data, i = self.recipe.data, int(sample)
        try:
            image, found = read(self.source, self.split, i, self.scales)
            if self.sums is not None and int(found.digest[:8], 16) != self.sums[i]:
                raise BrokenImage(self.source.name(self.split, i), "it holds something else now")
        except BrokenImage as error:
            raise DataError(
                f"{printable(error.name)} has changed since the images were looked through: "
                f"{error.reason}. Run the command again when nobody changes them"
            ) from error
        return image if isinstance(image, np.ndarray) else square(image, data.size, data.channels)


def _as_surveyed(split: str, found: Mapping[str, Any]) -> tuple[dict[str, int], np.ndarray]:
    """``scales`` and ``sums`` of :class:`ImageShards`."""
    kept = np.array(found["kept"][split], np.int64)
    sums = np.zeros(kept[-1] + 1, np.uint32)
    sums[kept] = np.frombuffer(bytes.fromhex(found["sums"][split]), "<u4")
    return found["scales"], sums


def order_of_rows(key: LevelKey, found: Mapping[str, Any]) -> np.ndarray:
    """The sample of every row of x_0: int64 (rows,).

    Args:
        found: what a survey found.
    """
    kept = np.array(found["kept"][key.split], np.int64)
    shuffled = generator("order of rows", key.fingerprint, key.split).permutation(len(kept))
    return kept[shuffled]


def _write_split(session: Session, source: Source, split: str, found: Mapping[str, Any]) -> None:
    """Write x_0 of one split."""
    key = session.key(0, split, "clean")
    samples = order_of_rows(key, found)
    arrays = {"label": source.labels(split)[samples], "sample_id": samples}
    shape = level_geometry(session.run.recipe, 0, len(samples))
    with locked_writer(session, key, shape) as writer:
        if writer is not None:
            shape, memo = writer.geometry, memo_of(session, found["signature"]).absolute()
            rows = ImageShards(
                session.run.recipe, source, split, samples, shape, *_as_surveyed(split, found)
            )
            task = partial(image_shards, RunAddress.of(session), key, shape, memo, found["digest"])
            try:
                write_level(session, writer, rows, task, parent=None, arrays=arrays)
            except DataError:  # what changed may have left no trace in the signature
                session.store.files.unlink(memo)
                raise


@contextmanager
def image_shards(
    address: RunAddress, key: LevelKey, shape: Geometry, memo: Path, digest: str
) -> Iterator[Callable[[int], Done]]:
    """The task of workers that publish shards of x_0.

    Args:
        memo: the record of the survey.
        digest: of all good images.

    Raises:
        ClusterError: the record is of other images than the command knows, or there are others.
    """
    run, writer = address.begun(key, shape)
    found = unseal(memo, writer.files, record.SURVEY)
    if found["digest"] != digest:
        raise ClusterError(f"{memo} is, here, of other images")
    place, form = (address.source, address.data_root), run.recipe.data
    with _same_source(*place, found["signature"], form) as source:
        samples, known = order_of_rows(key, found), _as_surveyed(key.split, found)
        rows = ImageShards(run.recipe, source, key.split, samples, shape, *known)
        yield publishing(writer, rows)
