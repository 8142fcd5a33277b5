"""A store that loses nothing: broken on purpose, many times, and what its safety costs.

Claim: 0 wrong reads and 0 lost commits in 20,000 simulated crashes, each of the protocol's mutants
caught; 0 different bytes after 200 kills with -9; 2,000 of 2,000 damages named, mended to the same
bytes and never read as data; a committed level written at 0.85 or more of the rate of a bare write
of the same bytes with fsync.

Method: four parts, each in a file of its own beside this one (durability_*.py), each with the n of
the claim; `--quick` runs a twentieth. Machine, versions, date and seconds are kept for each part,
which can be run again alone.

    python benchmarks/durability.py [crash] [kills] [corruption] [cost] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from checkout import ROOT
from strata.pipeline.run import device

PARTS = {"crash": (20_000, 0), "kills": (200, 0), "corruption": (2_000, 0), "cost": (31,)}
"""Arguments of each part's ``measure``: how many, and the seed."""
QUICK = 20


def measure(part: str, *, quick: bool) -> dict[str, Any]:
    """One part, with what it was measured on."""
    count, *seed = PARTS[part]
    begun = time.monotonic()
    found = importlib.import_module(f"durability_{part}").measure(
        max(2, count // QUICK) if quick else count, *seed
    )
    facts = device.facts(torch.device("cpu"))
    return {
        **found,
        "seconds": round(time.monotonic() - begun, 1),
        "created": time.strftime("%Y-%m-%d"),
        "machine": facts["machine"],
        "versions": facts["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/durability.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    for part in options.parts or PARTS:
        results[part] = measure(part, quick=options.quick)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({part: results[part]}, indent=1))
    if wrong := [part for part, found in results.items() if not found["holds"]]:
        raise SystemExit(f"the claim does not hold: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
