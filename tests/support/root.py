"""Where the checkout lies that is being tested."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / "cli.py"
MACHINES = ROOT / "docs/machines"
PYTHONPATH = f"{ROOT / 'typings'}:{ROOT / 'tests/support'}"
"""With it, a process imports this checkout as ``strata``, and the tests' helpers."""
