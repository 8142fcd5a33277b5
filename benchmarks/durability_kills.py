"""Runs killed with -9 at random moments end, once resumed, at the bytes of one that was not.

One story: `train --layer 3` or `materialize --layer 3` from nothing, killed after a random time and
started again until it is done. Its levels and weights are then compared with an undisturbed run's.
Checkpoints are written every 50 ms instead of every 20 s, so that kills land in those, too.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import checkout  # noqa: F401

LAYERS, CHECKPOINT_SECONDS = 3, 0.05
COMMANDS = ("train", "materialize")
COMPARED = ("weights.safetensors", "auxiliary.safetensors", "test_logits.npy")
RECIPE = """
[data]
source = "digits"
classes = 10
channels = 1
size = 8
mean = [0.306]
std = [0.376]
train = 1437
test = 360
[augment]
pad = 2
crop = 8
flip = true
[network]
layers = 3
width = 32
downsample = [1]
batch_norm = true
bias = false
[auxiliary]
k = 2
width = 16
batch_norm = true
[schedule]
kind = "one-cycle"
epochs = 2
batch = 64
lr = 0.1
precision = "float32"
[cache]
shard_mb = 1
block = 64
"""


def prepare() -> None:
    """Import what a run imports, so that a forked process is at work at once."""
    import torch

    from strata.pipeline.commands import run  # noqa: F401
    from strata.pipeline.train import algorithm, solving  # noqa: F401

    torch.set_num_threads(1)
    solving.CHECKPOINT_SECONDS = CHECKPOINT_SECONDS


def start(place: Path, command: str) -> int:
    """A process of its own, working in ``place``; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    os.chdir(place)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(os.open(place / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    from strata.cli import main

    try:
        main([command, "tiny.toml", "--layer", str(LAYERS)], standalone_mode=True)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    finally:
        os._exit(1)


def ended(place: Path, command: str, pid: int) -> bool:
    """Wait for a process: did it end by itself? An error of its own is ours, too."""
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{command} failed: {(place / 'stderr').read_text()[-2000:]}")
    return os.WIFEXITED(status)


def undisturbed(place: Path, command: str) -> float:
    """The same story without kills; its seconds."""
    place.mkdir()
    (place / "tiny.toml").write_text(RECIPE)
    begun = time.monotonic()
    ended(place, command, start(place, command))
    return time.monotonic() - begun


def story(place: Path, command: str, draw: random.Random, seconds: float) -> tuple[int, int]:
    """Kill and start again until the command is done; kills, and how many left something half done.

    Args:
        seconds: that the command takes; a kill comes within one of three shares of them.
    """
    (place / "tiny.toml").write_text(RECIPE)
    longest, kills, half = seconds * draw.choice((0.1, 0.3, 0.6)), 0, 0
    while True:
        pid = start(place, command)
        # A tenth more after every kill, so that the story ends.
        time.sleep(draw.uniform(0.0, longest * (1 + kills / 10)))
        os.kill(pid, signal.SIGKILL)
        if ended(place, command, pid):
            return kills, half
        kills += 1
        half += half_done(place)


def half_done(place: Path) -> bool:
    """Did the kill leave a temporary file, a level without a commit, or a checkpoint?"""
    levels = [path for path in place.glob("features/x_*/*") if path.is_dir()]
    return (
        any(place.rglob(".tmp-*"))
        or any(not (level / "COMMIT.json").exists() for level in levels)
        or any(place.rglob("checkpoint.safetensors"))
    )


def result(place: Path) -> dict[str, str]:
    """sha256 of every file of every level, and of the final weights, by path."""
    files = [path for path in place.glob("features/x_*/**/*") if path.is_file()]
    files += [path for name in COMPARED for path in place.glob(f"runs/**/{name}")]
    return {
        path.relative_to(place).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files
    }


def measure(kills: int, seed: int) -> dict[str, Any]:
    """Stories until ``kills`` processes were killed."""
    prepare()
    draw = random.Random(seed)
    counts = {"kills": 0, "half_done": 0, "stories": 0, "different": 0}
    with tempfile.TemporaryDirectory(prefix="kills-") as top:
        places = {command: Path(top) / command for command in COMMANDS}
        seconds = {command: undisturbed(place, command) for command, place in places.items()}
        wanted = {command: result(place) for command, place in places.items()}
        while counts["kills"] < kills:
            command = COMMANDS[counts["stories"] % len(COMMANDS)]
            with tempfile.TemporaryDirectory(dir=top) as place:
                killed, half = story(Path(place), command, draw, seconds[command])
                counts["different"] += result(Path(place)) != wanted[command]
            counts["kills"] += killed
            counts["half_done"] += half
            counts["stories"] += 1
            print(f"  kills: {counts}", file=sys.stderr)
    compared = {name: len(files) for name, files in wanted.items()}
    return {**counts, "files_compared": compared, "holds": not counts["different"]}
