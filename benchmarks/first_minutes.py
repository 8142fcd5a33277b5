"""What a newcomer waits for: looking is instant, doing nothing is instant, the demo is short.

Claim: `--help`, `plan`, `status` and a `materialize` that finds nothing to do each answer in under
half a second of process time and do not import torch; `run digits` (three layers, at least 97 %
on the test images) takes under 90 s.

Method: whole processes in an empty directory, n = 5 rounds (1 for `run digits`), the commands
interleaved; medians, beside the time of `python -c "import torch"` in the same rounds, because the
machines are shared. The machine and versions are in the result file.

    python benchmarks/first_minutes.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkout import ROOT

CLI = [sys.executable, str(ROOT / "cli.py")]
ROUNDS = 5
COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "--help": [*CLI, "--help"],
    "plan cifar10-k1": [*CLI, "plan", "cifar10-k1"],
    "status digits": [*CLI, "status", "digits"],
    "materialize --layer 3, nothing to do": [*CLI, "materialize", "--layer", "3"],
}


def seconds(command: list[str], place: Path) -> float:
    """Wall time of one process that must succeed."""
    begun = time.perf_counter()
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    return time.perf_counter() - begun


def measure(place: Path) -> dict[str, object]:
    """Medians of everything, in one directory that begins empty."""
    digits = seconds([*CLI, "run", "digits"], place)
    layer_3 = seconds([*CLI, "materialize", "--layer", "3"], place)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command, place))
    medians = {name: statistics.median(values) for name, values in times.items()}
    report = json.loads((place / "runs/digits/0/report.json").read_text("utf-8"))
    last = report["layers"][-1]
    return {
        "rounds": ROUNDS,
        "seconds_run_digits": round(digits, 1),
        "seconds_materialize_layer_3": round(layer_3, 1),
        "median_seconds": {name: round(value, 3) for name, value in medians.items()},
        "ratio_to_import_torch": {
            name: round(value / medians["import torch"], 3) for name, value in medians.items()
        },
        "digits_test_top1": [layer["test"]["top1"] for layer in report["layers"]],
        "digits_ensemble_top1": last["ensemble"]["probabilities"]["top1"],
        **{key: report[key] for key in ("created", "machine", "versions")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/first-minutes.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-minutes-") as place:
        result = measure(Path(place))
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
