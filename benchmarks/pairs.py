"""Two commands at once on one run and store: nobody is robbed, whoever comes second is told.

Claim: of 200 random pairs of commands, the second started within a second of the first, every one
ends in success or in one line; what was there or was made is there afterwards, unless a command
whose work is removing says that it removed it later; and the same commands again, and then a whole
run, end well, with the bytes of a run that was alone.

Method: `tests/support/pairs_of_commands.py`: 26 commands (10 that make, 10 that look, 6 that
remove; reading a level from Python is one), three states of the run (new, one layer, complete),
processes forked from one that has imported everything; all that is random comes from the seed, but
not what the kernel makes of it. One kind of disk (ext4), one machine.

    python benchmarks/pairs.py [--pairs 200] [--seed 0] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from checkout import ROOT

sys.path.insert(0, str(ROOT / "tests/support"))
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

from pairs_of_commands import trials

from strata.pipeline.run import device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/pairs.json")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pairs-") as top:
        found = trials(Path(top), range(options.seed, options.seed + options.pairs))
    facts = device.facts(torch.device("cpu"))
    results = {
        **found,
        "seed": options.seed,
        "seconds": round(time.monotonic() - begun, 1),
        "created": time.strftime("%Y-%m-%d"),
        "machine": facts["machine"],
        "versions": facts["versions"],
        "holds": not found["wrong"],
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    if not results["holds"]:
        raise SystemExit(f"the claim does not hold: {len(found['wrong'])} findings")


if __name__ == "__main__":
    main()
