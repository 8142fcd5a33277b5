"""Code that is not ours: a Python file that a recipe names, run and called in one guarded place.

It runs as a module does: with ``__file__``, and with its folder first on the path, so that it can
import what lies beside it. A relative path that it opens is of that folder. What it reads while it
runs is noted: files beneath the folder belong to it. torch is imported when a file is run, and not
before.
"""

from __future__ import annotations

import builtins
import importlib
import io
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from strata.stages.errors import StageError, UnusableNetwork

FOLDERS = set[Path]()
"""Folders whose files this process has run."""
SIBLINGS = set[str]()
"""Names of modules that were imported from there: others may have the same."""


@contextmanager
def guarded(title: str) -> Iterator[None]:
    """Turn whatever code of others raises into one line: what it is, file, line and reason. Ctrl-C
    stays Ctrl-C. Raises UnusableNetwork."""
    try:
        yield
    except (StageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit
        raise UnusableNetwork(f"{title}: {told(error)}") from error


def told(error: BaseException) -> str:
    """File and line of others that raised an error, if one did, and the error's first line."""
    return f"{place(error)}{type(error).__name__}: {first_line(error)}".rstrip(": ")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def place(error: BaseException) -> str:
    """``"residual.py, line 12, "``, where the error comes through code of others; else nothing."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in frames
        if _is_foreign(frame.f_code.co_filename, str(frame.f_globals.get("__name__")))
    ]
    if isinstance(error, SyntaxError) and _is_foreign(error.filename or "", ""):
        lines = [(str(error.filename), error.lineno or 0)]
    return f"{Path(lines[-1][0]).name}, line {lines[-1][1]}, " if lines else ""


def _is_foreign(file: str, module: str) -> bool:
    """Is it beneath a folder of others, and neither ours nor installed?"""
    ours = module == "__main__" or module.partition(".")[0] == "strata"
    return not (ours or is_installed(Path(file)) or FOLDERS.isdisjoint(Path(file).parents))


def is_installed(file: Path) -> bool:
    """Is it of a package that was installed, or of Python itself?"""
    packages = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
    return packages or not {Path(sys.prefix), Path(sys.base_prefix, "lib")}.isdisjoint(file.parents)


def executed(name: str, code: str, file: Path) -> ModuleType:
    """A Python file as a module of its own. Within :func:`at_home`."""
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses look there for the types of their fields
    exec(compile(code, str(file), "exec"), module.__dict__)
    return module


@cache
def function(title: str, name: str, code: str, folder: str) -> Callable[..., Any]:
    """A function of the user's in a file that imports nothing that lies beside it.

    Args:
        title: for messages: ``loss mine.py:focal``.
        name: ``mine.py:focal``, the path from ``folder``.
        code: text of the file.

    Raises UnusableNetwork: the file fails, has no such function, or reads what lies beside it.
    """
    import torch

    path, _, called = name.rpartition(":")
    file, read = Path(folder, path).absolute(), set[str]()
    own = f"strata_own_{sha256(code.encode()).hexdigest()[:12]}"
    home = at_home(file.parent, file.parent, read)
    with torch.random.fork_rng(devices=[]), guarded(title), home:
        found = getattr(executed(own, code, file), called, None)
    if not callable(found):
        raise UnusableNetwork(f"{title}: {path} has no function {called}")
    if beside := sorted(one for one in read - {file.name} if not Path(one).is_absolute()):
        raise UnusableNetwork(
            f"{title}: {path} reads {', '.join(beside)} beside it, and a run keeps a copy of one "
            "file: put what it needs into that"
        )
    return found


@contextmanager
def drawing() -> Iterator[Callable[[int], None]]:
    """A function that lets the global generators of torch (on the CPU), numpy and random go on from
    a seed; afterwards they go on from where they were."""
    import numpy as np
    import torch

    def seeded(seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())
        random.setstate(random.Random(seed).getstate())

    before = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield seeded
        finally:
            np.random.set_state(before[0])
            random.setstate(before[1])


@contextmanager
def at_home(folder: Path, home: Path, read: set[str]) -> Iterator[None]:
    """Let code of a folder import and open what lies there, and note what it reads.

    Args:
        folder: where its files are, absolute.
        home: where they were when the code was first run; a path from there is looked for in
            ``folder``.
        read: takes the names of the files that are read: from ``folder``, or absolute.
    """
    FOLDERS.add(folder)
    thread = threading.get_ident()

    def opening(real: Any, file: Any, *how: Any, **more: Any) -> Any:
        if threading.get_ident() != thread or not isinstance(file, (str, Path)):
            return real(file, *how, **more)
        path = Path(os.path.normpath(Path(home, file)))
        there = folder / path.relative_to(home) if path.is_relative_to(home) else path
        path = there if there.exists() else Path(file)
        found = real(path, *how, **more)
        if path.is_file() and not is_installed(path) and path.stat().st_size:
            inside = path.is_relative_to(folder)
            read.add(str(path.relative_to(folder) if inside else path.absolute()))
        return found

    with ExitStack() as stack:
        import safetensors.torch
        import torch

        # Left as they were, also where the code changes them for itself.
        stack.callback(os.chdir, Path.cwd())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        openers = (safetensors, "safe_open"), (safetensors.torch, "safe_open")
        for owner, name in ((builtins, "open"), (io, "open"), *openers):
            real = getattr(owner, name)
            wrapped = lambda *how, real=real, **more: opening(real, *how, **more)  # noqa: E731
            stack.enter_context(_replaced(owner, name, wrapped))
        stack.enter_context(_replaced(sys, "path", [str(folder), *sys.path]))
        stack.enter_context(_replaced(sys, "dont_write_bytecode", True))
        while SIBLINGS:
            sys.modules.pop(SIBLINGS.pop(), None)
        importlib.invalidate_caches()
        before = set(sys.modules)
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                file = getattr(sys.modules[name], "__file__", None)
                if file and _is_foreign(file, name):
                    SIBLINGS.add(name)
                    read.add(os.path.relpath(file, folder))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)
