"""The code that runs in a worker of a cluster: it opens what a task needs, and does its items.

A task is a pickled context manager that takes no arguments. It opens what its items need, checks by
digest that this is what the command sees, and gives a function of an item; a worker enters it once,
and a plugin keeps it for the next items. So shards are made one at a time, with all threads that
the worker may use, while others are read or published: a worker wants two slots or more.

A scheduler reads what it passes on, and imports this file, so nothing here imports torch before
there is work.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any, cast

from distributed import Worker, WorkerPlugin, get_worker

import strata
from strata.pipeline.errors import exit_code, ours
from strata.pipeline.plan import hardware
from strata.store.errors import DiskFull, StoreRefused
from strata.store.write.writer import PUBLISHERS

if TYPE_CHECKING:
    import torch

Task = Callable[[], AbstractContextManager[Callable[[Any], Any]]]
"""A task: a function of a module, perhaps with arguments bound by ``functools.partial``."""
NAME = "strata"
"""Name of the plugin."""
LATE_S = 5.0
"""Seconds that a worker that cannot get at the files waits before it says so: it would be done
with everything in no time, while others compute."""
KEPT = 2
"""Tasks whose layers and levels a worker keeps: views of one x_j are written in turn."""


@dataclass(frozen=True)
class Failed:
    """The reason why a worker did not do an item."""

    worker: str
    error: Exception
    for_all: bool = False
    """Would it be the same for every other item? Then nothing more is begun, unless it is this
    worker alone."""

    @property
    def alone(self) -> bool:
        """May it be one machine that cannot get at the files? A full disk is everybody's."""
        refused = isinstance(self.error, StoreRefused) and not isinstance(self.error, DiskFull)
        return self.for_all and refused


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
    from strata.pipeline.run import device

    versions = {name: v.partition("+")[0] for name, v in device.versions().items()}
    python = ".".join(versions.pop("python").split(".")[:2])
    both = {name: version(name) for name in ("dask", "distributed")}
    return {"python": python, **versions, **both, "code": CODE}


class WorkerState(WorkerPlugin):
    """The state that a worker keeps between items."""

    name = NAME
    idempotent = True

    def __init__(self, threads: int | None) -> None:
        """
        Args:
            threads: to compute with; None: as many as the worker has slots.
        """
        self._threads = threads

    def setup(self, worker: Worker) -> None:
        self.label = str(worker.name).removeprefix("tcp://")
        self.threads = self._threads or worker.state.nthreads
        self._number = worker.name if isinstance(worker.name, int) else 0
        self._gpu = bool(worker.state.total_resources.get("GPU"))
        self.room = BoundedSemaphore(PUBLISHERS + 1)
        """Most items in memory at once."""
        self.computing, self._opening = Lock(), Lock()
        self._kept: OrderedDict[bytes, tuple[ExitStack, Callable[[Any], Any]]] = OrderedDict()
        hardware.keep_freed_memory()

    def teardown(self, worker: Worker) -> None:
        while self._kept:
            self._kept.popitem()[1][0].close()

    def opened(self, task: bytes) -> Callable[[Any], Any]:
        """The function of a task, which is entered once."""
        with self._opening:
            if task not in self._kept:
                stack = ExitStack()
                self._kept[task] = stack, stack.enter_context(pickle.loads(task)())
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)[1][0].close()
            self._kept.move_to_end(task)
            return self._kept[task][1]

    def device(self, wanted: str) -> torch.device:
        """The worker's own device, if it offers a GPU and the command wants one: ``auto`` or
        ``cuda``. Workers of one machine that are numbered share its GPUs in turn; elsewhere
        CUDA_VISIBLE_DEVICES says which is whose."""
        import torch

        from strata.pipeline.run import device

        if wanted == "cpu" or not self._gpu:
            return device.pick("cpu")
        return torch.device(device.pick("cuda").type, self._number % torch.cuda.device_count())


def this_worker() -> WorkerState:
    """The state of the worker that this runs in."""
    return cast(WorkerState, get_worker().plugins[NAME])


def serve(task: bytes, item: Any) -> Any:
    """Do one item of a task; what is refused is returned, whatever else fails is raised."""
    import torch

    state, work = this_worker(), None
    torch.set_num_threads(state.threads)  # of this thread
    try:
        work = state.opened(task)
        with state.room:
            return work(item)
    except Exception as raised:
        error = ours(raised)
        if exit_code(error) is None or not isinstance(error, Exception):
            raise
        failed = Failed(state.label, error, work is None or isinstance(error, StoreRefused))
        if failed.alone:
            time.sleep(LATE_S)
        return failed
