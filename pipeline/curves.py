"""The training curves of a run as other tools read them: scalars of TensorBoard, and epochs.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from strata.pipeline.errors import OptionRange
from strata.store.errors import LevelDamaged
from strata.store.files.publish import make_directory, present, replace

Curve = Sequence[Mapping[str, Any]]
"""One line for every epoch: its number from 1 under ``epoch``, and figures, None where there is
none."""
Show = Callable[[Path, Curve], None]
"""Shows the curve of a problem so far, given the problem's directory in the run."""
TABLE = "epochs.csv"
OWNER = ("run", "problem")
"""The first columns of the table."""


def curve_of(path: Path) -> Curve:
    """The curve in a file epochs.jsonl. Raises LevelDamaged: it is not there, or not as written."""
    with present(path, "the layer is solved"):
        try:
            return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        except ValueError as error:
            raise LevelDamaged(f"{path} is damaged: {error}") from None


@contextmanager
def shown_in(directory: Path | None, run: Path) -> Iterator[Show]:
    """What shows the curves of a run in a directory, for the block; None: nowhere.

    A curve is written whole when its first epoch here ends, and what earlier processes wrote of it
    is hidden; so a run that was stopped, and goes on, has every epoch once.

    Raises:
        OptionRange: TensorBoard is not installed, or the directory has a table of others.
    """
    if directory is None:
        yield lambda place, curve: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise OptionRange(
            "--log-dir needs TensorBoard: pip install 'strata[tensorboard]'"
        ) from None
    make_directory(directory)
    _rows(directory)
    owner, writers = "/".join(run.resolve().parts[-2:]), dict[Path, SummaryWriter]()
    with ExitStack() as stack:

        def show(place: Path, curve: Curve) -> None:
            problem, fresh = place.relative_to(run), curve[-1:]
            if place not in writers:
                home = str(directory / owner / problem)
                writers[place] = SummaryWriter(home, purge_step=curve[0]["epoch"])
                stack.callback(writers[place].close)
                fresh = curve
            for line in fresh:
                for name, value in line.items():
                    if name != "epoch" and value is not None:
                        writers[place].add_scalar(name, value, line["epoch"])
                writers[place].flush()
            _tabulate(directory, (owner, problem.as_posix()), curve)

        yield show


def _rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of the table in a directory; none, if there is no table."""
    path = directory / TABLE
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = csv.DictReader(file)
            if tuple(found.fieldnames or ())[:2] == OWNER:
                return list(found)
    except (ValueError, csv.Error):  # no text, or no table
        pass
    raise OptionRange(f"--log-dir: {path} is not of Strata. Name another directory")


def _tabulate(directory: Path, owner: tuple[str, str], curve: Curve) -> None:
    """Put a curve in the place of the rows that the table has of it."""
    others = [row for row in _rows(directory) if (row["run"], row["problem"]) != owner]
    rows = [*others, *({**dict(zip(OWNER, owner, strict=True)), **line} for line in curve)]
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    table.writeheader()
    table.writerows(rows)
    replace(directory, TABLE, text.getvalue().encode())
