"""Paths as people write them: that begin with a home directory, with patterns, and those of data
sets, by the word that names one. Nothing is opened."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PATHS = ("imagefolder", "npz", "csv", "hf", "webdataset", "python")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def home(path: str) -> Path:
    """A path with ``~`` and ``~user`` in full. That of a user whom nobody knows is as it is, so
    that who opens it says that there is no such path."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def place_of(source: str) -> tuple[str, str, str]:
    """Kind, path and the rest of a source: of ``python:FILE.py:make`` that is ``:make``, of
    ``hf:PATH?image=a`` it is ``?image=a``. Path and rest are empty where there is no path."""
    kind, _, path = source.partition(":")
    if kind not in _PATHS:
        return source, "", ""
    end = {"python": path.rfind(":"), "hf": path.find("?")}.get(kind, -1)
    return (kind, path, "") if end < 0 else (kind, path[:end], path[end:])


def absolute(source: str) -> str:
    """The source with an absolute path, where it has one."""
    kind, path, rest = place_of(source)
    return f"{kind}:{home(path).absolute()}{rest}" if path else source


def files_of(source: str) -> list[Path]:
    """The files that a source consists of: none of a folder of images, whose files are many, and of
    what is no path."""
    kind, path, _ = place_of(source)
    place = home(path)
    if kind == "webdataset":
        return expanded(path)
    if kind == "npz" and place.is_dir():
        return sorted(place.glob("*.npy"))
    if kind == "hf" and place.is_dir():
        return sorted(file for file in place.rglob("*") if file.is_file())
    return [place] if path and place.is_file() else []


def expanded(pattern: str) -> list[Path]:
    """The files that a pattern names, with ``{000..009}``, ``*`` and ``?``; of a directory, its
    tars."""
    if braces := _BRACES.search(pattern):
        numbers = range(int(braces[1]), int(braces[2]) + 1)
        begin, end, wide = pattern[: braces.start()], pattern[braces.end() :], len(braces[1])
        return [file for n in numbers for file in expanded(f"{begin}{n:0{wide}}{end}")]
    path = home(pattern)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    names = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return sorted(names) if set(str(path)) & set("*?[") else [path]
