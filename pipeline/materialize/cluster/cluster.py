"""Workers for what is done shard by shard: some of this machine, or those of a scheduler.

They are begun, or connected to, when the first of the work is there: a command that finds nothing
to do starts nobody. What they do is in ``worker.py``, how they are kept busy in ``submit.py``.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cached_property
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

from strata.pipeline.errors import ClusterError, OptionRange
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.options import Options
from strata.pipeline.progress import Reporter
from strata.pipeline.run.stores import check_several

if TYPE_CHECKING:
    from distributed import Client

CONNECT_S, WORKERS_S, ANSWER_S = 10.0, 30.0, 120.0
"""Seconds that a scheduler, a first worker, and every worker's first answer are waited for."""
ONE_HEAP = ("MALLOC_ARENA_MAX", "1")
"""A variable for a worker's environment, since it computes in threads: glibc gives each a heap of
its own, which cannot grow beyond 64 MiB. Larger tensors then come from the kernel, page by page,
and go back, whatever ``hardware.keep_freed_memory`` says: a quarter more time. It is read when a
process begins."""
DEATHS = 3
"""Workers that may die on one shard before it is given up."""
SLOTS = 2
"""Shards at a time in a worker of this machine: one is computed while another is published."""
START = (
    "Start workers where the project is installed: "
    f"{ONE_HEAP[0]}={ONE_HEAP[1]} dask worker {{address}} --nthreads 2"
)


def check(options: Options, *, reads: bool = False) -> None:
    """Refuse flags that exclude each other; ``reads``: nothing will be written. Raises
    OptionRange."""
    if options.workers is None and options.scheduler is None:
        return
    if options.workers is not None and options.scheduler is not None:
        raise OptionRange("--workers starts workers here, --scheduler uses others: give one")
    if options.loader == "ffcv":
        raise OptionRange("--loader ffcv reads in one process: leave out --workers and --scheduler")
    if not reads:
        check_several(options.store)


@contextmanager
def crew(
    options: Options, report: Reporter, stop: Interruptions, *, reads: bool = False
) -> Iterator[Workers | None]:
    """The workers that ``--workers`` or ``--scheduler`` ask for; None: neither was given. Raises as
    :func:`check`, which explains ``reads``."""
    check(options, reads=reads)
    if options.workers is None and options.scheduler is None:
        yield None
        return
    found = Workers(options.workers, options.scheduler, options.device, report, stop)
    with closing(found):
        yield found


class Workers:
    """Workers of a Dask cluster; nobody is there until :attr:`client` is asked for."""

    def __init__(
        self,
        workers: int | None,
        scheduler: str | None,
        device: str,
        report: Reporter,
        stop: Interruptions,
    ) -> None:
        """
        Args:
            workers: to start on this machine; None: those of ``scheduler``, an address.
            device: ``auto``, ``cpu`` or ``cuda``, as the command was told.
        """
        self.report, self.stop, self.device = report, stop, device
        self._workers, self._scheduler = workers, scheduler
        self._open = ExitStack()

    @property
    def where(self) -> str:
        """Which scheduler it is, for messages."""
        return f"the scheduler at {self._scheduler}" if self._scheduler else "that of --workers"

    def begin(self) -> None:
        """Have workers, which may take some seconds."""
        _ = self.client

    @cached_property
    def client(self) -> Client:
        """A connection to workers that run what we run. Raises ClusterError: there is no scheduler,
        no worker, or one with other versions."""
        self._open.enter_context(_quiet())
        client = self._connected() if self._scheduler else self._started()
        try:
            there = _first_workers(client, self._scheduler)
            from strata.pipeline.materialize.cluster.worker import WorkerState

            client.register_plugin(WorkerState(self._threads()))
            self.report.say(f"{len(there)} workers at {client.scheduler_info()['address']}")
        except BaseException:
            self.close()
            raise
        return client

    def _threads(self) -> int | None:
        """Threads that a worker computes with; None: as many as it has slots, which whoever started
        it chose."""
        if self._scheduler:
            return None
        import torch

        cores = len(os.sched_getaffinity(0)) // (self._workers or 1)
        return max(1, min(cores, torch.get_num_threads()))

    @property
    def on_gpu(self) -> bool:
        """Do workers offer GPUs, as the resource that Dask knows by that name?"""
        workers = self.client.scheduler_info()["workers"].values()
        return self.device != "cpu" and any(w["resources"].get("GPU") for w in workers)

    def count(self) -> int:
        """Workers there are now. Raises OSError if nobody answers."""
        return len(self.client.scheduler_info()["workers"])

    def close(self) -> None:
        """Let the workers go: those that were started here end."""
        self._open.close()

    def _started(self) -> Client:
        import dask.config
        import torch
        from distributed import Client, LocalCluster

        gpus = torch.cuda.device_count() if self.device != "cpu" else 0
        settings = {
            "distributed.scheduler.allowed-failures": DEATHS,
            f"distributed.nanny.pre-spawn-environ.{ONE_HEAP[0]}": ONE_HEAP[1],
        }
        self._open.enter_context(dask.config.set(settings))
        try:
            with _deaf_children():
                cluster = LocalCluster(
                    n_workers=self._workers,
                    threads_per_worker=SLOTS,
                    processes=True,
                    protocol="tcp://",
                    dashboard_address="127.0.0.1:0",  # any free port
                    memory_limit=0,  # what a worker holds is bounded by its slots
                    silence_logs=logging.CRITICAL,
                    resources={"GPU": 1} if gpus else {},
                )
            self._open.enter_context(cluster)
            return self._open.enter_context(Client(cluster, set_as_default=False))
        except (OSError, RuntimeError) as error:
            self.close()
            raise ClusterError(
                f"{self._workers} workers could not be started here: {error}. Try fewer --workers"
            ) from error

    def _connected(self) -> Client:
        from distributed import Client
        from distributed.versions import VersionMismatchWarning

        try:
            with warnings.catch_warnings():
                # Other versions are refused, with their names, once the workers are known.
                warnings.simplefilter("ignore", VersionMismatchWarning)
                client = Client(self._scheduler, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            reason = f"{error}".partition("\n")[0] or type(error).__name__
            raise ClusterError(
                f"no scheduler answers at {self._scheduler} within {CONNECT_S:.0f} s ({reason}). "
                "Start one: dask scheduler; or let workers be started here: --workers 2"
            ) from error
        return self._open.enter_context(client)


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask has no log here: what becomes of workers and shards is for us to say."""
    import distributed  # it sets up its logs when it is imported

    loggers = [logging.getLogger(name) for name in (distributed.__name__, "distributed.client")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started by threads that begin in the block do not hear Ctrl-C, which a terminal
    sends to all of a command: we hear it, and let them go."""
    resource_tracker.ensure_running()  # which would open the ears of the thread that starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _first_workers(client: Client, address: str | None) -> list[str]:
    """Addresses of workers. Every one must run what we run, or it would write something else."""
    from distributed import wait

    from strata.pipeline.materialize.cluster.worker import facts

    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=WORKERS_S)
    there, start = list(client.scheduler_info()["workers"]), START.format(address=address)
    if not there:
        raise ClusterError(f"the scheduler has had no workers for {WORKERS_S:.0f} s. {start}")
    asked = {w: client.submit(facts, workers=[w], pure=False) for w in there}
    with suppress(TimeoutError), client.as_current():
        wait(list(asked.values()), timeout=ANSWER_S)
    ours = facts()
    for worker, future in asked.items():
        where = f"the worker at {worker}"
        if future.status == "error":
            raise ClusterError(f"{where} cannot run Strata: {future.exception()!r}. {start}")
        if future.status != "finished":
            raise ClusterError(
                f"{where} does not answer within {ANSWER_S:.0f} s. End it, and repeat the command"
            )
        theirs = future.result()
        other = [f"{k} {theirs.get(k)}, here {v}" for k, v in ours.items() if theirs.get(k) != v]
        if other:
            raise ClusterError(
                f"{where} runs other versions: {'; '.join(other)}. Start it again with the same"
            )
    return there
