"""Where the checkout lies that is being tested, and its files."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / "cli.py"
MACHINES = ROOT / "docs/machines"
PYTHONPATH = f"{ROOT / 'typings'}:{ROOT / 'tests/support'}"
"""With it, a process imports this checkout as ``strata``, and the tests' helpers."""


def project_files() -> list[str]:
    """Tracked files and new ones that git does not ignore; outside git, what is not hidden."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        out = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = [name for name in out.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = []
    return sorted({name for name in names or unpacked_files() if (ROOT / name).is_file()})


def unpacked_files() -> Iterator[str]:
    for path in ROOT.rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        top = name.split("/")[0]
        if top not in {"runs", "features", "data"} and (top == ".ci" or not top.startswith(".")):
            yield name
