"""Random pairs of commands within a second of each other: see ``pairs_of_commands``."""

from __future__ import annotations

import json
import subprocess
import sys

from command import environment
from root import PYTHONPATH, ROOT
from sizes import sized


def test_nobody_is_robbed() -> None:
    pairs = sized(12, 60)
    # The trial's own files, which its forked children inherit and never close, are no finding.
    own = {"PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore::ResourceWarning"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/pairs_of_commands.py"), str(1000), str(pairs)],
        cwd=ROOT,
        env={**environment(), **own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert sum(found["ended"].values()) == pairs
