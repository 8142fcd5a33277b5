"""Commands that are stopped or killed, and what of a run must not depend on that."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

from command import TIMEOUT, Result, shards, start

RUN = Path("runs/tiny/0")


def signalled(
    cwd: Path, number: signal.Signals, line: str, delay: float, *arguments: object
) -> Result:
    """Start a command and send it a signal some time after its stderr has a line with these words.

    A command that ends before is left alone; its own exit code tells.
    """
    with start(cwd, *arguments) as process:
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        try:
            assert process.stderr is not None
            heard = []
            for text in process.stderr:
                heard.append(text)
                if line in text:
                    time.sleep(delay)
                    process.send_signal(number)
                    break
            out, rest = process.communicate(timeout=TIMEOUT)
        finally:
            watchdog.cancel()
            process.kill()
    return Result(process.returncode, out, "".join(heard) + rest)


def snapshot(cwd: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how often it was interrupted."""
    run, store = cwd / RUN, cwd / "features"
    found: dict[str, Any] = {f"shard {name}": data for name, data in shards(store).items()}
    for pattern in ("*.safetensors", "test_logits.npy"):
        for path in sorted(run.glob(f"layer_*/{pattern}")):
            found[str(path.relative_to(run))] = path.read_bytes()
    for path in sorted(run.glob("layer_*/epochs.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(run))] = [
            {key: value for key, value in line.items() if key != "seconds"} for line in lines
        ]
    for path in sorted(store.glob("x_*/*/COMMIT.json")):
        found[str(path.relative_to(store))] = json.loads(path.read_text())["body"]["content_root"]
    return found


def leftovers(cwd: Path) -> list[str]:
    """Checkpoints and temporary files."""
    found = [*cwd.rglob(".tmp-*"), *cwd.rglob("checkpoint.safetensors")]
    return [str(path.relative_to(cwd)) for path in found]
