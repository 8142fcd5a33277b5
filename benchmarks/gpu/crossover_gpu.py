"""From which layer on does reading beat computing again, on this GPU, and does `plan` know?

Claim: on the network of `cifar10-k1` at full width, a run with `--cache auto` takes at most 5 %
longer than the better of `always` and `never`, and `plan` names the depth from which on reading
wins.

Method: that of benchmarks/cache_or_recompute.py, with `--device cuda`: `cli.py calibrate`, `plan`,
and a run of each kind, on the first 20,000 images of CIFAR-10 (JPEG), six epochs a layer. What plan
says of every depth is kept beside the seconds. `--device cpu --quick` tries the same lines without
a GPU, on a network of the same depth that is narrow.

    STRATA_TEST_DATA=FOLDER python benchmarks/gpu/crossover_gpu.py [--device cuda] [--quick]
        [--rounds 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache_or_recompute import one
from measuring import RESULTS, keep, strata


def planned(place: Path, name: str) -> dict[str, Any]:
    """What plan says of every depth of the scenario that was run last in ``place``."""
    return strata(place, "plan", place / f"{name}.toml", "--machine", place / "rates/machine.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a narrow network, few images")
    parser.add_argument("--out", type=Path, default=RESULTS / "crossover_gpu.json")
    options = parser.parse_args()
    name = "narrow" if options.quick else "wide"
    with tempfile.TemporaryDirectory(prefix="crossover-") as scratch:
        place = Path(scratch)
        found = one(place, name, options.rounds, options.quick, options.device)
        keep({**found, "plan": planned(place, name)}, options.out, show=True)


if __name__ == "__main__":
    main()
