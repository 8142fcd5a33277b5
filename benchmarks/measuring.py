"""What benchmarks share: time, ratios, peak memory, commands, and the machine of a result."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

from checkout import ROOT
from strata.pipeline.run import device

Item = TypeVar("Item")
Result = TypeVar("Result")

CPU = torch.device("cpu")
RESULTS = ROOT / "benchmarks/results"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For runs of which several are at work at once."""


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def strata(
    place: Path,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    enter: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """A command, in a process of its own, and its answer as JSON.

    Args:
        place: its working directory.
        environment: what is other than in ours.
        enter: called in the process before it begins, e.g. to join a control group.
    """
    line = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments), "--json"]
    env = os.environ | (environment or {})
    done = subprocess.run(
        line, cwd=place, env=env, capture_output=True, preexec_fn=enter, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: {done.stderr.decode()[-2000:]}")
    return json.loads(done.stdout)


def as_they_finish(
    work: Callable[[Item], Result], items: Iterable[Item], at_once: int
) -> Iterator[tuple[Item, Result]]:
    """Every item with its result. What has not begun when one fails, or when nobody wants more, is
    not begun."""
    with ThreadPoolExecutor(at_once) as pool:
        started = {pool.submit(work, item): item for item in items}
        try:
            for done in as_completed(started):
                yield started[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Of rates that were taken in the same rounds: the median over the rounds, and the quartiles,
    because a machine that is shared is as fast as it is in that round."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    quartiles = statistics.quantiles(found, n=4) if len(found) > 1 else [found[0]] * 3
    return {
        "median": round(statistics.median(found), 3),
        "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "n": len(found),
    }


class Peak:
    """The most anonymous memory of this process while the block runs, beyond that at its start."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.start = self.most = anonymous_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.002):
            self.most = max(self.most, anonymous_bytes())

    @property
    def nbytes(self) -> int:
        return self.most - self.start


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def keep(result: dict[str, Any], path: Path | None, *, show: bool, on: torch.device = CPU) -> None:
    """Write a result with its date, machine and versions, and show it if asked or not written."""
    facts = device.facts(on)
    result |= {"created": time.strftime("%Y-%m-%d")}
    result |= {name: facts[name] for name in ("machine", "versions")}
    text = json.dumps(result, indent=1) + "\n"
    if path is not None:
        path.write_text(text, encoding="utf-8")
    if show or path is None:
        print(text, end="")
