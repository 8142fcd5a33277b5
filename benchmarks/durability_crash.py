"""What a power cut, a kill or a full disk can do to a level: nothing that is not found at once.

Claim: in 20,000 trials, in which the store's own code writes, mends or removes a level on a disk
that keeps only what POSIX promises and is stopped up to three times in a row, no promise is broken:
no wrong row is read, no committed level is lost, taking up again always ends in the same bytes.
And the trials can tell: of thirteen protocols with one step wrong, each breaks a promise within
2,000.

Method: `tests/support/crash.py` on `tests/support/simulated_disk.py`, wrong protocols in
`tests/support/mutants.py`; one process; all that is random comes from the seed. The disk is a
model: what a drive does that ignores a flush is not in it, and neither are two writers at once.
"""

from __future__ import annotations

import sys
from typing import Any

from checkout import ROOT

sys.path.insert(0, str(ROOT / "tests/support"))

from crash import PROMISES, caught_after, run_trials
from mutants import MUTANTS

LIMIT = 2_000
"""Trials within which a wrong protocol must be caught."""


def measure(trials: int, seed: int) -> dict[str, Any]:
    """Counts of broken promises, which must be 0, and when each wrong protocol was caught."""
    counts = run_trials(trials, seed)
    mutants = {}
    for name, mutant in MUTANTS.items():
        after, promise = caught_after(mutant, seed, LIMIT) or (None, None)
        mutants[name] = {"what": mutant.what, "caught_after": after, "broke": promise}
    broken = {name: counts[name] for name in PROMISES}
    return {
        "trials": trials,
        "broken": broken,
        "stops": {how: counts[how] for how in ("power", "kill", "full")},
        "mutants": mutants,
        "holds": not any(broken.values()) and all(m["caught_after"] for m in mutants.values()),
    }
