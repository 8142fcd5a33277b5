"""What runs in a worker of a cluster: it finds what an order names, and works a shard at a time.

Layers and levels are opened once for all shards of an order, checked by digest, and kept by a
plugin. One shard is computed at a time, with all threads that the worker may use, while others are
read or published; so a worker wants two slots or more.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

import numpy as np
import torch
from distributed import Worker, WorkerPlugin, get_worker

import strata
from strata.pipeline.errors import ClusterError, exit_code
from strata.pipeline.feed.features import features
from strata.pipeline.feed.shard_moments import ShardMoments, moments_of
from strata.pipeline.materialize.cluster.tasks import (
    ChannelsTask,
    Done,
    Failed,
    FeaturesTask,
    HashTask,
    ImagesTask,
    RunAddress,
    SurveyTask,
    WorkerTask,
    one_machine_alone,
)
from strata.pipeline.materialize.forward import Computed
from strata.pipeline.materialize.images import Decoded, order_of_rows
from strata.pipeline.materialize.timing import Line
from strata.pipeline.plan import hardware
from strata.pipeline.run import device as devices
from strata.pipeline.run import rundir
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.session import Session
from strata.stages.data.images import Examined, Source, examine, open_source
from strata.stages.features.moments import Moments
from strata.store.errors import StoreRefused, refusals
from strata.store.files.publish import unseal
from strata.store.fingerprint import sha256
from strata.store.level.level import COMMIT
from strata.store.write.mandate import Mandate
from strata.store.write.verify import Damage, check_shard
from strata.store.write.writer import PUBLISHERS

NAME = "strata"
"""Of the plugin."""
Check = Callable[[dict[str, Any]], Damage | None]
"""Of what a commit says of a shard."""
LATE_S = 5.0
"""What a worker waits that cannot get at the files, before it says so: it would be done with
everything in no time, while others compute."""
KEPT = 2
"""Orders whose layers and levels a worker keeps: views of one x_j are written in turn."""


def _code() -> str:
    """sha256 of our source, as this process has read it."""
    root, digest = Path(strata.__file__).resolve().parent, hashlib.sha256()
    for floor in ("pipeline", "stages", "store"):
        for path in sorted(root.glob(f"{floor}/**/*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


CODE = _code()


def facts() -> dict[str, str]:
    """What must be the same wherever one level is written; builds for other devices are."""
    versions = {name: v.partition("+")[0] for name, v in devices.versions().items()}
    python = ".".join(versions.pop("python").split(".")[:2])
    both = {name: version(name) for name in ("dask", "distributed")}
    return {"python": python, **versions, **both, "code": CODE}


class Bench(WorkerPlugin):
    """What a worker keeps between shards."""

    name = NAME
    idempotent = True

    def setup(self, worker: Worker) -> None:
        self.label = str(worker.name).removeprefix("tcp://")
        self.number = worker.name if isinstance(worker.name, int) else 0
        self.slots = worker.state.nthreads
        self.room = BoundedSemaphore(PUBLISHERS + 1)
        """As many shards are in memory."""
        self.computing, self._preparing = Lock(), Lock()
        self._kept: OrderedDict[tuple[WorkerTask, str], Any] = OrderedDict()
        hardware.keep_freed_memory()

    def teardown(self, worker: Worker) -> None:
        while self._kept:
            _close(self._kept.popitem()[1])

    def prepared(self, order: WorkerTask, device: str, make: Callable[[Any, Any], Any]) -> Any:
        """What an order needs, made once."""
        with self._preparing:
            if (order, device) not in self._kept:
                self._kept[order, device] = make(order, self.device(device))
                while len(self._kept) > KEPT:
                    _close(self._kept.popitem(last=False)[1])
            self._kept.move_to_end((order, device))
            return self._kept[order, device]

    def device(self, kind: str) -> torch.device:
        """Workers of one machine that are numbered share its GPUs in turn; elsewhere
        CUDA_VISIBLE_DEVICES says which is a worker's own."""
        found = devices.pick(kind)
        if found.type == "cuda":
            return torch.device("cuda", self.number % torch.cuda.device_count())
        return found


def _close(kept: Any) -> None:
    source = kept.source if isinstance(kept, Decoded) else kept
    if hasattr(source, "close"):
        source.close()


def serve(order: WorkerTask, item: Any, device: str, threads: int | None) -> Any:
    """Do one item of an order; what is refused is returned, whatever else fails is raised.

    Args:
        item: number of a shard, a span of images, or what a commit says of a shard.
        device: ``cpu`` or ``cuda``.
        threads: to compute with; None: as many as the worker has slots.
    """
    bench: Any = get_worker().plugins[NAME]
    make, work = _WORK[type(order)]
    try:
        with _reaching():
            ready = bench.prepared(order, device, make)
    except Exception as error:
        if exit_code(error) is None:
            raise
        return _failed(bench, error, for_all=True)
    try:
        with bench.room, _reaching():
            return work(bench, order, ready, item, threads or bench.slots)
    except Exception as error:
        if exit_code(error) is None:
            raise
        return _failed(bench, error, for_all=isinstance(error, StoreRefused))


@contextmanager
def _reaching() -> Iterator[None]:
    """Files of a run, and images, are refused as the store's files are."""
    try:
        yield
    except OSError as error:
        with refusals(Path(error.filename or "a file")):
            raise


def _failed(bench: Bench, error: Exception, *, for_all: bool) -> Failed:
    if one_machine_alone(error):
        time.sleep(LATE_S)
    return Failed(bench.label, error, for_all)


# ---- finding what an order names ----------------------------------------------------------------


def _run(place: RunAddress, mandate: Mandate) -> Run:
    """The run, which must give the level its name: so its recipe, layers and scales are those that
    the command knows."""
    mandate.check(place.store.files)
    run = rundir.find(place.run)
    if run is None:
        raise ClusterError(f"there is no run in {place.run} here: it must lie on a shared disk")
    nodes, depth = run.nodes(), mandate.key.depth
    if depth >= len(nodes) or nodes[depth].fingerprint != mandate.key.fingerprint:
        raise ClusterError(f"the run in {place.run} is, here, not the one that x_{depth} is of")
    return run


def _computed(order: FeaturesTask, device: torch.device) -> Computed:
    """The layers, by their digests, and the level below, by its content."""
    key, run = order.mandate.key, _run(order.place, order.mandate)
    records = [run.layer(j) for j in range(order.base.depth + 1, key.depth + 1)]
    found = tuple(record["weights"] for record in records if record is not None)
    if found != order.weights:
        raise ClusterError(f"the layers in {order.place.run} have, here, other weights")
    devices.check(run.compute, device)
    session = Session(run, order.place.store.open(), device)
    clean = key.view == "clean"
    source = features(session, key.depth, key.split, base=order.base.depth, clean=clean)
    computed = Computed.of(session, key, order.mandate.geometry, source)
    base = source.levels[computed.view]
    if (base.key, base.content_root) != (order.base, order.content_root):
        raise ClusterError(f"{order.base.label} has, here, other values than the command knows")
    return computed


def _images(order: ImagesTask, device: torch.device) -> Decoded:
    run = _run(order.place, order.mandate)
    found = unseal(order.survey, order.place.store.files)
    if found["digest"] != order.digest:
        raise ClusterError(f"{order.survey} is, here, of other images")
    source, key = open_source(order.place.source, root=order.place.data_root), order.mandate.key
    samples = order_of_rows(key, found)
    return Decoded(run.recipe, source, key.split, samples, order.mandate.geometry)


def _source(order: SurveyTask, device: torch.device) -> Source:
    source = open_source(order.place.source, root=order.place.data_root)
    if source.signature() != order.signature:
        source.close()
        raise ClusterError(f"{order.place.source} holds, here, other files than the command sees")
    return source


def _checking(order: HashTask, device: torch.device) -> Check:
    """What hashes a shard of a level that is the one the command sees."""
    files = order.store.files
    try:
        found = sha256(files.read(order.directory / COMMIT))
    except OSError as error:
        found = error.strerror
    if found != order.commit:
        raise ClusterError(f"{order.directory} is, here, not the level that the command sees")
    return partial(check_shard, order.directory, deep=True, files=files)


def _counting(order: ChannelsTask, device: torch.device) -> ShardMoments:
    """What looks at the channels of a shard of a level that is the one the command sees."""
    level = order.store.open().open(order.level)
    if level.content_root != order.content_root:
        raise ClusterError(f"{order.level.label} has, here, other values than the command knows")
    return moments_of(level)


# ---- one item -----------------------------------------------------------------------------------


def _write(bench: Bench, order: Any, ready: Computed | Decoded, shard: int, threads: int) -> Done:
    """Compute a shard and publish it, unless another worker has."""
    mandate: Mandate = order.mandate
    files = order.place.store.files
    first, last = mandate.geometry.shard_range(shard)
    published, seconds, peak = mandate.done(shard, files), {}, 0
    if published is None:
        torch.set_num_threads(threads)
        rows, seconds, peak = _rows(bench, ready, shard, mandate.geometry.row_bytes)
        begun = time.perf_counter()
        published = mandate.publish(shard, rows, files, threads)
        seconds["publishing"] = time.perf_counter() - begun
    return Done(bench.label, last - first, published.nbytes, published.sha256, seconds, peak)


def _rows(
    bench: Bench, ready: Computed | Decoded, shard: int, row_bytes: int
) -> tuple[np.ndarray, dict[str, float], int]:
    """Stored elements of a shard, seconds by part of the work, and peak bytes of tensors."""
    work = "forward pass" if isinstance(ready, Computed) else "decoding"
    line, begun = Line(work, row_bytes, lambda done, note="": None), time.perf_counter()
    turn = _Turn(bench.computing)
    ((_, rows),) = ready.shards([shard], line, turn)
    whole = time.perf_counter() - begun
    reading = line.shares["reading"] * whole
    return rows, {work: whole - reading - turn.waited, "reading": reading}, line.peak_bytes


class _Turn:
    """A lock, and the seconds that it was waited for."""

    def __init__(self, lock: Lock) -> None:
        self._lock, self.waited = lock, 0.0

    def __enter__(self) -> None:
        begun = time.perf_counter()
        self._lock.acquire()
        self.waited += time.perf_counter() - begun

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _examine(
    bench: Bench, order: SurveyTask, source: Source, span: tuple[str, range], threads: int
) -> Examined:
    return examine(source, *span)


def _hash(
    bench: Bench, order: HashTask, check: Check, entry: dict[str, Any], threads: int
) -> Damage | None:
    return check(entry)


def _count(
    bench: Bench, order: ChannelsTask, look: ShardMoments, shard: int, threads: int
) -> Moments:
    torch.set_num_threads(threads)
    return look(shard)


_WORK: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {
    FeaturesTask: (_computed, _write),
    ImagesTask: (_images, _write),
    SurveyTask: (_source, _examine),
    HashTask: (_checking, _hash),
    ChannelsTask: (_counting, _count),
}
"""By kind of order: what finds what it names, and what does one item of it."""
