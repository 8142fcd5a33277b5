"""What newcomers bring: does it get in, and how many lines do they write?

Claim: whatever a practitioner brings, in the list of jobs of `newcomer_jobs.py` and
`newcomer_uses.py`, gets in by a few lines, or is refused with a line that names the reason and
the way.

Method: every job has a folder of its own with small files of real images (CIFAR-10 as JPEG, three
classes of twenty; arrays of the same pixels), as its owner has them before Strata. A job writes
what a user writes, and these lines are counted, without blank lines and comments: Python, keys of a
recipe, commands. What `init` writes is not. Commands and scripts are processes of their own, with
80 columns. Epochs and widths that `init` chose are lowered, so that a job is short; models of
millions of weights are planned, but for ResNet18, and not trained.

*now* is `yes`: all processes ended well, and what the job asks for is there; `refused`: that is
right, and the line below says why; `skipped`: an optional package is absent; or `no`, with what was
printed last. *before* is what the same jobs met when there was no `init`, no [loss], no `import
strata`, and data were folders of images. Seconds are wall time, of a machine that may be shared.
The exit code is 1 if a row is `no`.

    STRATA_TEST_DATA=… python benchmarks/newcomer.py [--only WORD] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from cifar_images import images
from measuring import RESULTS, keep
from newcomer_jobs import JOBS
from newcomer_user import Job, No, Skipped, User, last_words
from newcomer_uses import JOBS as USES

import checkout  # noqa: F401

CLASSES, TRAIN, TEST = 3, 20, 5
WIDTHS = {"job": "<48", "before": "<8", "now": "<7", "code": ">4", "recipe": ">6"}
WIDTHS |= {"commands": ">8", "seconds": ">7"}


def row(job: Job, pixels: dict[str, np.ndarray]) -> dict[str, Any]:
    """One job, done in a new folder."""
    name, before, work = job
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        user = User(Path(folder), pixels)
        begun = time.perf_counter()
        try:
            said = work(user)
            now, said = ("refused", said) if said else ("yes", "")
        except Skipped as error:
            now, said = "skipped", str(error)
        except No as error:
            now, said = "no", str(error)
        except Exception:  # a job that is wrong itself must not end the table
            now, said = "no", last_words(traceback.format_exc())
        took = time.perf_counter() - begun
    return {
        "job": name,
        "before": before,
        "now": now,
        **user.lines,
        "seconds": round(took, 1),
        **({"said": said} if said else {}),
    }


def pixels(place: Path) -> dict[str, np.ndarray]:
    """Images of three classes, the first ones of each."""
    found = np.load(images(place, 200, 50))
    kept: dict[str, np.ndarray] = {}
    for split, most in (("train", TRAIN), ("test", TEST)):
        x, y = found[f"x_{split}"], found[f"y_{split}"]
        rows = np.concatenate([np.flatnonzero(y == label)[:most] for label in range(CLASSES)])
        kept[f"x_{split}"], kept[f"y_{split}"] = x[rows], y[rows].astype(np.int64)
    return kept


def shown(rows: list[dict[str, Any]]) -> str:
    """The table as text."""
    lines = []
    for one in ({name: name for name in WIDTHS}, *rows):
        cells = (f"{one[name]!s:{width}}" for name, width in WIDTHS.items())
        lines.append(" ".join(cells))
        if "said" in one:
            lines += textwrap.wrap(one["said"], 98, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="jobs with this word in their name")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or (None if options.only else RESULTS / "newcomer.json")
    wanted = [job for job in (*JOBS, *USES) if options.only in job[0]]
    rows = []
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        brought = pixels(Path(folder))
        for job in wanted:
            rows.append(row(job, brought))
            print(shown(rows[-1:]).splitlines()[1], file=sys.stderr, flush=True)
    print(shown(rows))
    counts = dict(Counter(one["now"] for one in rows))
    print(", ".join(f"{count} {now}" for now, count in counts.items()))
    if out is not None:
        keep({"counts": counts, "jobs": rows}, out, show=False)
    raise SystemExit(1 if counts.get("no") else 0)


if __name__ == "__main__":
    main()
