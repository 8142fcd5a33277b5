"""Random pairs of commands on one run and store, the second within a second of the first.

Nobody may be robbed: each ends with success or with one line; what was there, or was made, is there
afterwards, unless a command whose work is removing says that it removed it later; and the same
commands, and then a whole run, end well and with the same bytes. Commands are forked from a process
that has imported everything; run as a script it prints what was found as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runs import Place, tiny
from together import HEAVY

from strata.store.feature_store import open_level

TEXT = tiny(flip="false", layers=2, epochs=6)
MAKE = {
    "run": ("run",),
    "train 1": ("train", "--layer", 1),
    "train 2": ("train", "--layer", 2),
    "materialize 1": ("materialize", "--layer", 1),
    "materialize 2": ("materialize", "--layer", 2),
    "probe": ("probe",),
    "sweep": ("sweep", "--layer", 2, "--vary", "schedule.lr=0.05,0.2"),
    "final": ("final", "--vary", "auxiliary.k=1"),
    "baseline": ("baseline",),
    "repair": ("verify", "--deep", "--repair"),
}
LOOK = {
    "feed": ("feed",),
    "evaluate": ("evaluate",),
    "report": ("report",),
    "status": ("status",),
    "plan": ("plan",),
    "explain": ("explain", "--layer", 1),
    "statistics": ("statistics",),
    "export": ("export", "--to", "exported", "--layer", 1),
    "verify": ("verify", "--deep"),
    "du": ("du",),
}
REMOVE = {
    "clean": ("clean", "--yes"),
    "clean features": ("clean", "--features"),
    "clean 2": ("clean", "--layer", 2, "--yes"),
    "clean sweeps": ("clean", "--sweeps", "--yes"),
    "evict": ("evict", "--layer", 1),
    "gc": ("gc", "--delete"),
}
COMMANDS = {**MAKE, **LOOK, **REMOVE}
STATES = {
    "new": (),
    "half": (MAKE["materialize 1"],),
    "whole": (MAKE["run"], MAKE["materialize 2"]),
}
"""What was done before the pair begins."""
MADE = {
    "run": ("layer_1/layer.json", "layer_2/layer.json", "report.html"),
    "train 1": ("layer_1/layer.json",),
    "train 2": ("layer_1/layer.json", "layer_2/layer.json"),
    "materialize 1": ("layer_1/layer.json", "layer_1/features.json"),
    "materialize 2": ("layer_2/layer.json", "layer_2/features.json"),
    "sweep": ("sweep_2/lr=0.05/result.json", "sweep_2/lr=0.2/result.json"),
    "baseline": ("baseline/plain/result.json",),
}
"""Files of the run that are there once a command has succeeded."""
LATER = 1.0
"""Seconds between the beginnings of two commands, at most."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    name: str
    rc: int
    err: str
    at: float

    @property
    def wrong(self) -> str:
        """What is wrong with the way it ended; empty: nothing."""
        lines = [line for line in self.err.splitlines() if line.startswith("Error:")]
        if "Traceback" in self.err or "Exception" in self.err:
            return f"{self.name}: a traceback: {self.err[-1500:]}"
        if self.rc and (self.rc != 8 or len(lines) != 1 or self.err.splitlines()[-1] != lines[0]):
            return f"{self.name}: exit code {self.rc}: {self.err[-1500:]}"
        return ""


def feed_on(place: Place) -> None:
    """Read a level again and again, for a second or so."""
    from strata import feed
    from strata.store.errors import LevelAbsent

    found = sorted(place.store.glob("x_1-*/train.plain"))
    if not found:
        raise LevelAbsent("there is no x_1")
    with feed(open_level(found[0]), batch=64) as batches:
        end, rows = time.monotonic() + 1, 0
        while time.monotonic() < end:
            rows = sum(len(x) for x, _ in batches)
            assert rows == 1437
            time.sleep(0.1)


def start(place: Place, name: str) -> Callable[[], Ended]:
    """Start a command; returns what waits for its end."""
    command, *rest = COMMANDS[name]
    out = tempfile.TemporaryFile("w+")  # noqa: SIM115
    pid = os.fork()
    if not pid:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        os.chdir(place.root)
        os._exit(_ended(place, command, rest))

    def wait() -> Ended:
        rc = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        return Ended(name, rc, out.read(), time.monotonic())

    return wait


def _ended(place: Place, command: str, rest: list[Any]) -> int:
    from strata import cli
    from strata.pipeline.errors import exit_code

    options = ("--store", place.store) if command in ("du", "gc") else place.options
    if command == "export":
        rest = ["--to", f"exported-{os.getpid()}", *rest[2:]]
    code: Any = 1
    try:
        if command == "feed":
            feed_on(place)
            code = 0
        else:
            cli.main([str(word) for word in (command, *options, *rest)], "strata")
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        from strata.store.errors import LevelAbsent

        if command == "feed" and exit_code(error) is not None:
            print(f"Error: {error}", file=sys.stderr)
            code = 8 if isinstance(error, LevelAbsent) else exit_code(error)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


@cache
def prepare(top: Path) -> dict[str, Place]:
    """A place in every state, beside the levels of a run that is gone."""
    import torch

    for name in HEAVY:
        importlib.import_module(name)
    torch.set_num_threads(1)
    found = {}
    for state, commands in STATES.items():
        (top / state).mkdir(parents=True)
        (top / state / "tiny.toml").write_text(TEXT)
        place = found[state] = Place(top / state)
        for one in (Place(top / state, "gone", seed=1), place):
            for words in (MAKE["materialize 1"], *commands) if one.seed else commands:
                assert one.do(*map(str, words)).rc == 0  # pyright: ignore[reportArgumentType]
        shutil.rmtree(top / state / "gone")
    return found


def trial(top: Path, seed: int) -> tuple[list[Ended], list[str]]:
    """One pair: how its commands ended, and what is wrong."""
    draw = random.Random(seed)
    places = prepare(top)
    state = draw.choice(list(STATES))
    first = draw.choice(list({**MAKE, **LOOK} if draw.random() < 0.8 else COMMANDS))
    second = draw.choice(list(REMOVE if draw.random() < 0.5 else COMMANDS))
    names = draw.sample((first, second), 2)
    root = top / f"pair-{seed}"
    shutil.copytree(places[state].root, root)
    place = Place(root)
    for note in (root / "store/runs").iterdir():  # speaks of the place that was copied
        note.unlink()
    if state != "new":
        assert place.do("train", "--layer", 1).rc == 0
    before = files_of(place)
    waits = [start(place, names[0])]
    time.sleep(draw.uniform(0, LATER))
    waits.append(start(place, names[1]))
    ended = _in_their_order(waits)
    wrong = [one.wrong for one in ended if one.wrong]
    wrong += lost(place, before, ended)
    wrong += afterwards(place, places["whole"], names)
    label = f"seed {seed}, {state}: {names[0]} and {names[1]}: "
    shutil.rmtree(root)
    return ended, [label + one for one in wrong]


def _in_their_order(waits: list[Callable[[], Ended]]) -> list[Ended]:
    """Wait for both; each is timed when it ends."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        return sorted(pool.map(lambda wait: wait(), waits), key=lambda one: one.at)


def files_of(place: Place) -> set[str]:
    """Records and levels that are whole."""
    found = [*place.run.rglob("*.json"), *place.store.glob("x_*/*/COMMIT.json")]
    return {path.relative_to(place.root).as_posix() for path in found}


def lost(place: Place, before: set[str], ended: list[Ended]) -> Iterator[str]:
    """What is not there, though nobody has said that it was removed."""
    removed = [one for one in ended if one.name in REMOVE and not one.rc]
    missing = before - files_of(place)
    if missing and not removed and "repair" not in [one.name for one in ended]:
        yield f"lost: {sorted(missing)[:5]}"
    for one in ended:
        if not one.rc and not any(other.at > one.at for other in removed):
            for name in MADE.get(one.name, ()):
                if not (place.run / name).exists():
                    yield f"{one.name} has ended well, and there is no {name}"
    if place.run.exists() and not (place.run / "run.json").exists():
        yield f"a run without run.json: {[p.name for p in place.run.iterdir()]}"
    if left := [str(path) for path in place.root.rglob(".tmp-*")]:
        yield f"left: {left}"
    run = place.overview().run
    if run and len((run.evaluation() or {"layers": ()})["layers"]) < run.solved():
        yield f"{run.solved()} layers are solved, and the evaluation does not have them all"


def afterwards(place: Place, whole: Place, names: list[str]) -> Iterator[str]:
    """The same commands again, one after another, and then a whole run."""
    for name in (*names, "run", "materialize 2", "verify"):
        one = start(place, name)()
        if one.wrong or (one.rc and name in MAKE and name not in ("probe", "repair")):
            yield f"afterwards: {one.wrong or one.err[-500:]}"
    if place.weights() != whole.weights():
        yield "afterwards: other weights"
    own, theirs = place.files(), whole.files()
    other = [name for name in own if own[name] != theirs.get(name, own[name])]
    if other := [name for name in other if "/COMMIT" not in name]:  # which says what it was read of
        yield f"afterwards: other bytes: {other[:5]}"


def trials(top: Path, seeds: range) -> dict[str, Any]:
    """Some pairs: counts, and what is wrong."""
    codes, wrong = Counter[str](), list[str]()
    for seed in seeds:
        ended, found = trial(top, seed)
        kinds = ("success" if one.rc == 0 else "one line" for one in ended)
        codes[" and ".join(sorted(kinds))] += 1
        wrong += found
        for line in found:
            print(line, file=sys.stderr, flush=True)
    return {"pairs": len(seeds), "ended": dict(codes), "wrong": wrong}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
        first, count = map(int, sys.argv[1:3])
        json.dump(trials(Path(folder), range(first, first + count)), sys.stdout)
