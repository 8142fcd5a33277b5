"""Commands in real processes that start at the same moment, or are killed at a given call.

They are forked from one process that has imported everything, so a start takes no seconds, and a
race is a race. That process is this file, run as a script.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from command import TIMEOUT, Result, environment
from root import PYTHONPATH, ROOT

HEAVY = (
    "strata.pipeline.train.algorithm",
    "sklearn.datasets",
    "torch._dynamo",
    "zarr",
    "PIL.Image",
)
"""What commands import, early or late."""
CHANGES = ("create", "write", "sync", "link", "rename", "unlink")
CHANGES += ("make_directory", "remove_directory", "sync_directory")
"""Calls of the store that change a file system."""


def together(*commands: Sequence[object], kill_at: Sequence[int] = ()) -> list[Result]:
    """Run commands at the same time, to the end of all.

    Args:
        kill_at: SIGKILL each command at its n-th call that would change the store.
    """
    jobs = [[str(word) for word in words] for words in commands]
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(jobs), json.dumps(list(kill_at) or [0] * len(jobs))],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return [Result(*entry) for entry in json.loads(done.stdout)]


@contextmanager
def has(code: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, for the block or until it is killed.

    Args:
        code: what it does with the path ``sys.argv[1]``; it prints ``ready`` once it has it, and
            reads stdin to wait.
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": PYTHONPATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def holding(lock: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """Another process that holds a lock."""
    code = (
        "import sys; from pathlib import Path; from strata.store.files.lock import hold\n"
        "with hold(Path(sys.argv[1]), 'it'): print('ready', flush=True); sys.stdin.read()"
    )
    return has(code, lock)


def reading(directory: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """Another process that has a level open."""
    code = (
        "import sys; from strata import open_level\n"
        "level = open_level(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    )
    return has(code, directory)


def _main(jobs: list[list[str]], kills: list[int]) -> None:
    for name in HEAVY:
        importlib.import_module(name)

    waiting, gate = os.pipe()
    children = []
    for words, kill_at in zip(jobs, kills, strict=True):
        out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        pid = os.fork()
        if not pid:
            os.close(gate)
            _child(words, kill_at, waiting, out.fileno(), err.fileno())
        children.append((pid, out, err))
    os.close(gate)  # every child reads its end now
    found = []
    for pid, out, err in children:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found.append((code, *(file.seek(0) or file.read() for file in (out, err))))
    json.dump(found, sys.stdout)


def _child(words: list[str], kill_at: int, waiting: int, out: int, err: int) -> None:
    from strata import cli

    os.dup2(out, 1)
    os.dup2(err, 2)
    if kill_at:
        _kill_at(kill_at)
    code: Any = 1
    try:
        os.read(waiting, 1)
        cli.main(words, "strata")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _kill_at(n: int) -> None:
    from strata.store.files.files import Files

    left = [n]

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return counted

    for name in CHANGES:
        setattr(Files, name, counting(getattr(Files, name)))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
