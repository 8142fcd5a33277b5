"""Paths as people write them: that begin with a home directory, with patterns, and those of data
sets, by the word that names one. Nothing is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_PATHS = ("imagefolder", "npz", "csv", "hf", "webdataset", "python")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def home(path: str) -> Path:
    """A path with ``~`` and ``~user`` in full. That of a user whom nobody knows is as it is, so
    that who opens it says that there is no such path."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def place_of(source: str) -> tuple[str, str, str]:
    """Kind, path and the rest of a source: of ``python:FILE.py:make`` the function, of
    ``hf:PATH?image=a&label=b`` what is asked for. Without a path both are empty."""
    kind, _, path = source.partition(":")
    if kind not in _PATHS:
        return source, "", ""
    mark = {"python": ":", "hf": "?"}.get(kind)
    if not mark:
        return kind, path, ""
    path, _, rest = path.rpartition(mark) if kind == "python" else path.partition(mark)
    return kind, path, rest


def absolute(source: str) -> str:
    """The source with an absolute path, where it has one."""
    kind, path, rest = place_of(source)
    if not path:
        return source
    mark = {"python": ":", "hf": "?"}.get(kind, "") if rest else ""
    return f"{kind}:{home(path).absolute()}{mark}{rest}"


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
    """The files that a pattern names, with ``{000..009}``, ``{a,b}``, ``*`` and ``?``; of a
    directory, its tars."""
    found: list[Path] = []
    for one in _braces(str(home(pattern))):
        path = Path(one)
        if path.is_dir():
            found += sorted(path.glob("*.tar"))
        elif re.search(r"[*?\[]", one):
            found += sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
        else:
            found.append(path)
    return found


def _braces(text: str) -> Iterator[str]:
    if not (part := _BRACES.search(text)):
        yield text
        return
    if part[3] is None:
        wide = len(part[1])
        words = [f"{n:0{wide}}" for n in range(int(part[1]), int(part[2]) + 1)]
    else:
        words = part[3].split(",")
    for word in words:
        yield from _braces(text[: part.start()] + word + text[part.end() :])
