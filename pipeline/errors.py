"""Errors people meet, grouped by what they would do next, each group with its exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from strata.stages import foreign
from strata.stages.errors import (
    DataError,
    DeviceError,
    StageError,
    TemporaryFull,
    UnusableNetwork,
)
from strata.store.errors import (
    DiskFull,
    LevelAbsent,
    LevelBusy,
    LevelDamaged,
    StoreError,
    StoreRefused,
    refusal,
)


class PipelineError(Exception):
    """Base of what the pipeline refuses."""


class RecipeError(PipelineError):
    """The recipe is unknown, or says something that cannot be."""


class BudgetError(PipelineError):
    """What was asked for does not fit."""


class NotThereYet(PipelineError):
    """Something must be made first."""


class RunConflict(PipelineError):
    """The run directory belongs to another recipe, seed or data set."""


class LoaderError(PipelineError):
    """The loader asked for cannot be had, cannot read this, or has failed."""


class ClusterError(PipelineError):
    """There is no cluster to work with, or workers could not do all that they were told."""


class LayerRange(PipelineError):
    """The network has no such layer."""


class OptionRange(PipelineError):
    """An option has a value that this recipe does not allow."""


EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (LayerRange, 2),  # name a layer that exists
    (OptionRange, 2),  # give an option a value that can be
    (RecipeError, 3),  # edit the recipe
    (UnusableNetwork, 3),
    (DataError, 4),  # mend the images or labels
    (BudgetError, 5),  # raise a budget or lower what it pays for
    (TemporaryFull, 6),  # name another directory by TMPDIR
    (DiskFull, 6),  # make space and repeat the command: finished shards are kept
    (DeviceError, 7),  # choose another device
    (LoaderError, 7),  # install ffcv, or use the native loader
    (NotThereYet, 8),  # run the command that makes it
    (RunConflict, 8),  # use another run directory
    (LevelBusy, 8),  # wait for the other process
    (StageError, 9),  # training diverged: lower the learning rate; the last good state is kept
    (StoreRefused, 11),  # the disk is read-only or failing, the object store not to be had
    (StoreError, 10),  # a level or weights are damaged: verify --repair
    (ClusterError, 12),  # start workers, or mend what the named shards need
    (KeyboardInterrupt, 130),  # repeat the command: it goes on where it was
)
"""First match wins. 1 is left for bugs, with a traceback, and 2 for usage."""

REMEDIES: tuple[tuple[type[BaseException], str], ...] = (
    (DiskFull, "Make space and repeat the command: what is finished is kept"),
    (LevelBusy, "Wait for it and repeat the command"),
    (StoreRefused, "Choose another --store or --run; what is finished is kept"),
    (LevelAbsent, "Name the store that has it with --store, or let `run` make it"),
    (LevelDamaged, "`verify --deep --repair` mends what the run can make again"),
)
"""What to do next where nobody below said so."""

REMEDY_OF = {
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`) and repeat the command",
    errno.ENFILE: "Too many files are open on this machine: close some and repeat the command",
    **dict.fromkeys(
        (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
        "Something else lies there than was written: put it right and repeat the command",
    ),
}
"""What to do next where the system said why, by its number."""

HELP = """
\b
Exit codes:
  0 done · 1 a bug · 2 usage, no such layer · 3 recipe · 4 images or labels
  5 over a budget · 6 disk full · 7 device or loader · 8 not there yet, or another run's directory
  9 training diverged · 10 a level or weights are damaged
  11 the disk or object store refuses (read-only, I/O error, no bucket)
  12 there is no cluster, or its workers failed · 130 stopped
"""
"""The exit codes, as the end of --help shows them."""


OUR_OWN = (None, errno.EBADF, errno.EFAULT)
"""What an ``OSError`` has for a number where the system was not asked, or asked nonsense."""


def of_outside(error: BaseException) -> BaseException:
    """What was raised, as one of our errors where the outside failed: every ``OSError`` by which
    the system answers a call, whoever made it, and a path with a null byte. Anything else, as it
    is, is ours or a bug."""
    if isinstance(error, OSError) and error.errno not in OUR_OWN:
        found = refusal(error)
        found.__cause__ = error
        return found
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return RecipeError("a path has a null byte in it, which no file system can hold")
    return error


def exit_code(error: BaseException) -> int | None:
    """The exit code of one of our errors; None for anything else, which is a bug."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), None)


def ours(error: BaseException) -> BaseException:
    """The error, or one of ours where the outside failed, or where code of others raised it, with
    its file and line."""
    if exit_code(error) is not None or not foreign.place(error):
        return of_outside(error)
    return UnusableNetwork(f"the network's own code failed: {foreign.told(error)}")


@contextmanager
def own_errors() -> Iterator[None]:
    """Let who calls us from Python meet our own errors where the outside fails."""
    try:
        yield
    except Exception as error:
        if (known := ours(error)) is not error:
            raise known from error
        raise


def one_line(error: BaseException) -> str:
    """The message and the remedies added on its way up, on one line."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped; what is finished is kept, and the same command goes on from there"
    number = getattr(error.__cause__, "errno", None)
    general = [text for kind, text in REMEDIES if isinstance(error, kind)]
    general = [REMEDY_OF[number]] if number in REMEDY_OF else general[:1]
    text = ". ".join([str(error).rstrip("."), *getattr(error, "__notes__", general)])
    return " ".join(text.split())


@contextmanager
def remedy(kind: type[BaseException], text: str) -> Iterator[None]:
    """Add what to do next to an error from a floor that cannot know it."""
    try:
        yield
    except kind as error:
        error.add_note(text)
        raise
