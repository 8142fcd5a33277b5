"""What a power cut, a kill or a full disk can do to a level: nothing that is not found at once.

Claim: in 20,000 trials, in which the store's own code writes, mends or removes a level on a disk
that keeps only what POSIX promises and is stopped up to three times in a row, no promise is broken:
no wrong row is read, no committed level is lost, taking up again always ends in the same bytes.
And the trials can tell: of thirteen protocols with one step wrong, each breaks a promise within
2,000.

Method: `tests/crash.py` on `tests/simulated_disk.py`, wrong protocols in `tests/mutants.py`; one
process; everything random comes from --seed. The disk is a model: what a drive does that ignores a
flush is not in it, and neither are two writers at once. n, machine and versions are in the result.

    python benchmarks/durability_crash.py --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from crash import PROMISES, caught_after, run_trials  # noqa: E402
from mutants import MUTANTS  # noqa: E402

TRIALS = 20_000
LIMIT = 2_000
"""Trials within which a wrong protocol must be caught."""


def measure(trials: int, seed: int) -> dict[str, Any]:
    begun = time.perf_counter()
    counts = run_trials(trials, seed)
    seconds = time.perf_counter() - begun
    mutants = {}
    for name, mutant in MUTANTS.items():
        caught = caught_after(mutant, seed, LIMIT)
        after, promise = caught or (None, None)
        mutants[name] = {"what": mutant.what, "caught_after": after, "broke": promise}
    return {
        "claim": " ".join((__doc__ or "").split("Claim: ")[1].split("\n\n")[0].split()),
        "n": trials,
        "seed": seed,
        "seconds": round(seconds, 1),
        "counts": {name: counts[name] for name in PROMISES},
        "stops": {how: counts[how] for how in ("power", "kill", "full")},
        "mutants": mutants,
        "holds": not any(counts[name] for name in PROMISES)
        and all(found["caught_after"] for found in mutants.values()),
        **facts(),
    }


def facts() -> dict[str, Any]:
    """Date, machine and versions, as a run notes them."""
    import torch

    from pipeline import device

    found = device.facts(torch.device("cpu"))
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"created": date, "machine": found["machine"], "versions": found["versions"]}


def show(result: dict[str, Any]) -> None:
    stops = ", ".join(f"{count:,} {how}" for how, count in result["stops"].items())
    title = f"{result['n']:,} trials in {result['seconds']:.0f} s; stopped by {stops}"
    promises = Table("broken promise", "times", "", title=title)
    for name, what in PROMISES.items():
        promises.add_row(name, f"{result['counts'][name]:,}", what)
    wrong = Table("wrong protocol", "trials", "first broken", title="How soon mistakes are caught")
    for name, found in result["mutants"].items():
        after = "NOT CAUGHT" if found["caught_after"] is None else f"{found['caught_after']:,}"
        wrong.add_row(name, after, found["broke"] or "")
    console = Console()
    console.print(promises)
    console.print(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    result = measure(options.trials, options.seed)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)
    if not result["holds"]:
        sys.exit("the claim does not hold")


if __name__ == "__main__":
    main()
