"""Claim: machines that share nothing but a network file system write one level together, with the
bytes of one process on a local disk; also when one of them vanishes, whichever it is.

Method: a machine is a network namespace and a mount namespace: an address of its own, and a client
of its own of a GlusterFS volume, with its own caches, under the same path. Scheduler and worker
`near` are on the first machine, worker `far` on the second. The level is x_1 of `cifar10-k1-small`
(layer 1 solved once, one epoch; shards of 16 MB), written again for every case:

    together                both workers
    killed                  -9 for the second machine's worker
    unplugged               the second machine's network is gone, for good
    unmounted               the second machine's client of the file system dies, not its worker
    two commands            one on each machine, at once
    command unplugged       the command runs on the second machine, and its network goes; then the
                            same command on the first

After each, exit codes, seconds from the fault to the end, and whether all files are those of one
process. Seconds are of one run each, on a machine that does other things too.

As root, with glusterfs-server and iproute2 installed; it makes a volume, two links and a namespace,
and removes them.

    STRATA_TEST_DATA=FOLDER python benchmarks/several_machines.py [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_images import archive
from measuring import RESULTS, keep
from two_machines import FAR, NEAR, Machines, file_system, machines, until

from checkout import ROOT

SCHEDULER = f"tcp://{NEAR}:8786"
TRAIN, SHARD_MB = 20_000, 16
WORKER = ("--nworkers", "1", "--nthreads", "2", "--no-dashboard", "--memory-limit", "0")


# ---- a level, and what happens to its writers ----------------------------------------------------


@dataclass
class Trial:
    """The level that is written, and by whom."""

    machines: Machines
    reference: dict[str, str] = field(default_factory=dict)
    """Files of x_1 as one process wrote them on a local disk, by sha256."""
    worker: subprocess.Popen[bytes] | None = None
    """``far``."""

    @property
    def store(self) -> Path:
        return self.machines.shared / "features"

    def line(self, store: Path) -> list[object]:
        place = self.machines.place
        data = f"imagefolder:{archive()}"
        words = ["materialize", place / "small.toml", "--layer", 1, "--data", data, "--accept-data"]
        run = self.machines.shared / "run"
        return [sys.executable, ROOT / "cli.py", *words, "--run", run, "--store", store]

    @property
    def command(self) -> list[object]:
        return [*self.line(self.store), "--scheduler", SCHEDULER]

    def prepare(self) -> None:
        """Solve layer 1, write the reference, and start scheduler and workers."""
        recipe = (ROOT / "pipeline/recipe/builtin/cifar10-k1-small.toml").read_text("utf-8")
        for key, value in (("train", TRAIN), ("epochs", 1)):
            line = next(one for one in recipe.splitlines() if one.startswith(f"{key} = "))
            recipe = recipe.replace(line, f"{key} = {value}")
        recipe = recipe.replace("[cache]", f"[cache]\nshard_mb = {SHARD_MB}")
        (self.machines.place / "small.toml").write_text(recipe, encoding="utf-8")
        local = self.machines.place / "local"
        assert self.machines.near(*self.line(local)).wait() == 0, "see the log"
        self.reference = files(local)
        dask = (sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard")
        self.machines.near(*dask, "--host", NEAR, "--port", SCHEDULER.rpartition(":")[2])
        self.machines.near(*self._worker(NEAR, "near"))
        self.start_far()

    def start_far(self) -> None:
        if self.worker:
            self.machines.end(self.worker)
        self.worker = self.machines.far(*self._worker(FAR, "far"))
        until(lambda: workers() == 2)

    def _worker(self, host: str, name: str) -> list[object]:
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", SCHEDULER, *WORKER]
        return [*worker, "--host", host, "--name", name]

    def begin(self) -> None:
        for directory in self.store.glob("x_1-*"):
            shutil.rmtree(directory)

    def until_under_way(self) -> None:
        """Three shards are there."""
        until(lambda: len(list(self.store.glob("x_1-*/train.plain/x/c.*"))) >= 3)

    def told(self, codes: list[int], begun: float) -> dict[str, Any]:
        seconds = round(time.monotonic() - begun, 1)
        return {"codes": codes, "seconds": seconds, "same": files(self.store) == self.reference}


def workers() -> int:
    from distributed import Client

    with Client(SCHEDULER, set_as_default=False, timeout=60) as client:
        return len(client.scheduler_info()["workers"])


def files(store: Path) -> dict[str, str]:
    """Of x_1, without its locks."""
    found = (path for path in sorted(store.glob("x_1-*/**/*")) if path.is_file())
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
        if "lock" not in path.name.lower()
    }


def together(trial: Trial) -> dict[str, Any]:
    begun = time.monotonic()
    return trial.told([trial.machines.near(*trial.command).wait()], begun)


def during(trial: Trial, fault: Callable[[], None]) -> dict[str, Any]:
    """A command on the first machine, and what happens while it is at work."""
    command = trial.machines.near(*trial.command)
    trial.until_under_way()
    begun = time.monotonic()
    fault()
    return trial.told([command.wait()], begun)


def killed(trial: Trial) -> dict[str, Any]:
    assert trial.worker is not None
    return during(trial, lambda: trial.machines.end(trial.worker))  # pyright: ignore


def unplugged(trial: Trial) -> dict[str, Any]:
    return during(trial, lambda: trial.machines.plug(into=False))


def unmounted(trial: Trial) -> dict[str, Any]:
    def die() -> None:
        for pid in trial.machines.clients():
            os.kill(pid, signal.SIGKILL)

    return during(trial, die)


def two_commands(trial: Trial) -> dict[str, Any]:
    begun = time.monotonic()
    both = [trial.machines.near(*trial.command), trial.machines.far(*trial.command)]
    return trial.told([command.wait() for command in both], begun)


def command_unplugged(trial: Trial) -> dict[str, Any]:
    lost = trial.machines.far(*trial.command)
    trial.until_under_way()
    begun = time.monotonic()
    trial.machines.plug(into=False)
    codes = [trial.machines.near(*trial.command).wait()]
    trial.machines.end(lost)
    return trial.told(codes, begun)


SAID = {
    "together": "both workers",
    "killed": "the second machine's worker is killed (-9)",
    "unplugged": "the second machine loses its network, for good",
    "unmounted": "the second machine's file system client dies, not its worker",
    "two commands": "one on each machine, at once",
    "command unplugged": "the second machine, with the command, loses its network; the same on the "
    "first",
}
"""By case, for people."""
CASES = (together, killed, unplugged, unmounted, two_commands, command_unplugged)


def name(case: Callable[..., Any]) -> str:
    return case.__name__.replace("_", " ")


def table(found: dict[str, Any]) -> list[str]:
    """Rows of docs/cluster.md."""
    rows = []
    for case, one in found["cases"].items():
        codes, same = ", ".join(map(str, one["codes"])), "the same" if one["same"] else "OTHERS"
        rows.append(f"| {SAID[case]} | {codes} | {one['seconds']:.0f} s | {same} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "several_machines.json")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="machines-", dir=Path.cwd()) as scratch,
        machines(Path(scratch).resolve()) as both,
    ):
        trial = Trial(both)
        trial.prepare()
        for case in CASES:
            both.plug(into=True)
            trial.start_far()
            trial.begin()
            found[name(case)] = case(trial)
            print(name(case), found[name(case)], file=sys.stderr, flush=True)
            facts = {"file_system": file_system(), "files": len(trial.reference)}
            keep(facts | {"cases": found}, options.out, show=False)


if __name__ == "__main__":
    main()
