"""The code that runs in a worker of a cluster: it finds what a task names, and works a shard at a
time.

Layers and levels are opened once for all shards of a task, checked by digest, and kept by a plugin.
One shard is computed at a time, with all threads that the worker may use, while others are read or
published; so a worker wants two slots or more.
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

import torch
from distributed import Worker, WorkerPlugin, get_worker

import strata
from strata.pipeline.errors import ClusterError, exit_code
from strata.pipeline.feed.features import features
from strata.pipeline.feed.level_feed import moments_of
from strata.pipeline.materialize.cluster import tasks
from strata.pipeline.materialize.cluster.tasks import Done, Failed, FeaturesTask, ImagesTask
from strata.pipeline.materialize.images import ImageShards, order_of_rows
from strata.pipeline.materialize.level import ShardSource
from strata.pipeline.materialize.materialize import FeatureShards
from strata.pipeline.materialize.timing import Timing
from strata.pipeline.plan import hardware
from strata.pipeline.run import device as devices
from strata.pipeline.run import rundir
from strata.pipeline.run.rundir import Run
from strata.pipeline.run.session import Session
from strata.stages.data.images import examine, open_source
from strata.store.errors import StoreRefused, refusals
from strata.store.files.publish import unseal
from strata.store.fingerprint import sha256
from strata.store.level.level import COMMIT, Level
from strata.store.write.mandate import Mandate
from strata.store.write.verify import Damage, check_shard
from strata.store.write.writer import PUBLISHERS

NAME = "strata"
"""Name of the plugin."""
LATE_S = 5.0
"""Seconds that a worker that cannot get at the files waits before it says so: it would be done
with everything in no time, while others compute."""
KEPT = 2
"""Tasks whose layers and levels a worker keeps: views of one x_j are written in turn."""


def _code() -> str:
    """sha256 of our source, as this process has read it."""
    root, digest = Path(strata.__file__).resolve().parent, hashlib.sha256()
    for floor in ("pipeline", "stages", "store"):
        for path in sorted(root.glob(f"{floor}/**/*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


CODE = _code()


def facts() -> dict[str, str]:
    """Versions that must be the same wherever one level is written, whatever the device."""
    versions = {name: v.partition("+")[0] for name, v in devices.versions().items()}
    python = ".".join(versions.pop("python").split(".")[:2])
    both = {name: version(name) for name in ("dask", "distributed")}
    return {"python": python, **versions, **both, "code": CODE}


class WorkerState(WorkerPlugin):
    """The state that a worker keeps between shards."""

    name = NAME
    idempotent = True

    def setup(self, worker: Worker) -> None:
        self.label = str(worker.name).removeprefix("tcp://")
        self.number = worker.name if isinstance(worker.name, int) else 0
        self.slots = worker.state.nthreads
        self.room = BoundedSemaphore(PUBLISHERS + 1)
        """Most shards in memory at once."""
        self.computing, self._preparing = Lock(), Lock()
        self._kept: OrderedDict[tuple[tasks.WorkerTask, str], Any] = OrderedDict()
        hardware.keep_freed_memory()

    def teardown(self, worker: Worker) -> None:
        while self._kept:
            _close(self._kept.popitem()[1])

    def prepared(self, task: tasks.WorkerTask, device: str) -> Any:
        """The layers, levels and images that a task needs, opened once."""
        with self._preparing:
            if (task, device) not in self._kept:
                self._kept[task, device] = _prepare(task, self._device(device))
                while len(self._kept) > KEPT:
                    _close(self._kept.popitem(last=False)[1])
            self._kept.move_to_end((task, device))
            return self._kept[task, device]

    def _device(self, kind: str) -> torch.device:
        """The worker's own device. Workers of one machine that are numbered share its GPUs in turn;
        elsewhere CUDA_VISIBLE_DEVICES says which is whose."""
        found = devices.pick(kind)
        if found.type == "cuda":
            return torch.device("cuda", self.number % torch.cuda.device_count())
        return found


def _close(kept: Any) -> None:
    source = kept.source if isinstance(kept, ImageShards) else kept
    if hasattr(source, "close"):
        source.close()


def serve(task: tasks.WorkerTask, item: Any, device: str, threads: int | None) -> Any:
    """Do one item of a task; what is refused is returned, whatever else fails is raised.

    Args:
        item: number of a shard, a span of images, or what a commit says of a shard.
        device: ``cpu`` or ``cuda``.
        threads: to compute with; None: as many as the worker has slots.
    """
    state: Any = get_worker().plugins[NAME]
    ready = None
    try:
        with _as_refusals():
            ready = state.prepared(task, device)
        with state.room, _as_refusals():
            return _do(state, task, ready, item, threads or state.slots)
    except Exception as error:
        if exit_code(error) is None:
            raise
        if tasks.one_machine_alone(error):
            time.sleep(LATE_S)
        return Failed(state.label, error, ready is None or isinstance(error, StoreRefused))


@contextmanager
def _as_refusals() -> Iterator[None]:
    """Raise an OSError of the files of a run, or of images, as one of the store's files."""
    try:
        yield
    except OSError as error:
        with refusals(Path(error.filename or "a file")):
            raise


def _prepare(task: tasks.WorkerTask, device: torch.device) -> Any:
    """The layers, levels or images with which the items of a task are done.

    Raises:
        ClusterError: what is found here is not what the command speaks of.
    """
    match task:
        case FeaturesTask():
            return _feature_shards(task, device)
        case ImagesTask():
            return _image_shards(task)
        case tasks.SurveyTask():
            source = open_source(task.place.source, root=task.place.data_root)
            if source.signature() != task.signature:
                source.close()
                raise ClusterError(
                    f"{task.place.source} holds, here, other files than the command sees"
                )
            return source
        case tasks.HashTask():
            return _shard_check(task)
        case tasks.ChannelsTask():
            level = task.store.open().open(task.level)
            _expect_values(level, task.content_root)
            return moments_of(level)


def _run(place: tasks.RunAddress, mandate: Mandate) -> Run:
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


def _expect_values(level: Level, content_root: str) -> None:
    if level.content_root != content_root:
        raise ClusterError(f"{level.key.label} has, here, other values than the command knows")


def _feature_shards(task: FeaturesTask, device: torch.device) -> FeatureShards:
    """The layers, by their digests, and the level below, by its content."""
    key, run = task.mandate.key, _run(task.place, task.mandate)
    if tasks.layer_digests(run, task.base.depth, key.depth) != task.weights:
        raise ClusterError(f"the layers in {task.place.run} have, here, other weights")
    devices.check(run.compute, device)
    session, clean = Session(run, task.place.store.open(), device), key.view == "clean"
    source = features(session, key.depth, key.split, base=task.base.depth, clean=clean)
    found = FeatureShards(session, key, task.mandate.geometry, source)
    base = source.levels[found.view]
    if base.key != task.base:
        raise ClusterError(f"{task.base.label} has, here, other values than the command knows")
    _expect_values(base, task.content_root)
    return found


def _image_shards(task: ImagesTask) -> ImageShards:
    run, key = _run(task.place, task.mandate), task.mandate.key
    found = unseal(task.survey, task.place.store.files)
    if found["digest"] != task.digest:
        raise ClusterError(f"{task.survey} is, here, of other images")
    source = open_source(task.place.source, root=task.place.data_root)
    rows = order_of_rows(key, found)
    return ImageShards(run.recipe, source, key.split, rows, task.mandate.geometry)


def _shard_check(task: tasks.HashTask) -> Callable[[dict[str, Any]], Damage | None]:
    """A check of a shard by what the commit says of it, in the level that the command sees."""
    files = task.store.files
    try:
        found = sha256(files.read(task.directory / COMMIT))
    except OSError as error:
        found = error.strerror
    if found != task.commit:
        raise ClusterError(f"{task.directory} is, here, not the level that the command sees")
    return partial(check_shard, task.directory, deep=True, files=files)


def _do(state: WorkerState, task: tasks.WorkerTask, ready: Any, item: Any, threads: int) -> Any:
    """The answer to one item of a task; ``ready`` is what :func:`_prepare` made of it."""
    if isinstance(task, FeaturesTask | ImagesTask):
        return _write(state, task, ready, item, threads)
    if isinstance(task, tasks.SurveyTask):
        return examine(ready, *item)
    if isinstance(task, tasks.ChannelsTask):
        torch.set_num_threads(threads)
    return ready(item)


def _write(
    state: WorkerState,
    task: FeaturesTask | ImagesTask,
    source: ShardSource,
    shard: int,
    threads: int,
) -> Done:
    """Compute a shard and publish it, unless another worker has."""
    mandate, files = task.mandate, task.place.store.files
    first, last = mandate.geometry.shard_range(shard)
    published, seconds, peak = mandate.done(shard, files), {}, 0
    if published is None:
        torch.set_num_threads(threads)
        timing = Timing(source.work, mandate.geometry.row_bytes, lambda done, note="": None)
        begun, lock = time.perf_counter(), _TimedLock(state.computing)
        ((_, rows),) = source.shards([shard], timing, lock)
        computed, peak = time.perf_counter(), timing.peak_bytes
        reading = timing.shares["reading"] * (computed - begun)
        published = mandate.publish(shard, rows, files, threads)
        seconds = {
            source.work: computed - begun - reading - lock.waited,
            "reading": reading,
            "publishing": time.perf_counter() - computed,
        }
    return Done(state.label, last - first, published.nbytes, published.sha256, seconds, peak)


class _TimedLock:
    """A lock, and the seconds that it was waited for."""

    def __init__(self, lock: Lock) -> None:
        self._lock, self.waited = lock, 0.0

    def __enter__(self) -> None:
        begun = time.perf_counter()
        self._lock.acquire()
        self.waited += time.perf_counter() - begun

    def __exit__(self, *error: object) -> None:
        self._lock.release()
