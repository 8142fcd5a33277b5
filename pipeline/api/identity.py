"""What an object of the caller's is, told without running it: its values, its code, and its files.

Two objects have one digest if their attributes hold equal values, and their classes and functions
have the same bytecode, with all that these refer to by name. Of installed packages the version
counts. Files are those that a text in the object names, or that lie in a folder that one names:
path, size and time of change. What none of this sees (a data base, files that code finds by
itself) is for whoever uses it to look at.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePath
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from strata.pipeline.run.weights import bytes_of
from strata.stages.data.sources import stamp
from strata.stages.foreign import first_line, is_installed
from strata.store.fingerprint import digest_arrays, sha256

PLAIN = (int, float, bool, bytes, type(None), list, tuple, dict, complex)
MOST_FILES = 2_000_000


class Unknown(Exception):
    """An object that cannot be told from others without running it."""


def identity(value: Any, without: Path | None = None) -> tuple[str, int]:
    """The digest of an object with its files, and how many files these are.

    Args:
        without: a folder whose files are none of the object's.

    Raises:
        Unknown: it holds what has no value, such as an open file; or too many files.
    """
    found, words = digest(value)
    files = sorted(set(_files(words, without and without.absolute())))
    return stamp([found], files), len(files)


def digest(value: Any) -> tuple[str, set[str]]:
    """The digest of an object, sha256 hex, and every text in it. Raises Unknown, as above."""
    reason: Exception | None = None
    for fast in (True, False):  # equal parts, and not the same ones, where nothing is in itself
        found = hashlib.sha256()
        try:
            writer = _Writer(SimpleNamespace(write=found.update), fast)
            writer.dump(value)
            return found.hexdigest(), writer.words
        except Exception as error:  # whatever reducers of others raise
            reason = error
    assert reason is not None
    raise Unknown(first_line(reason)) from reason


class _Writer(pickle.Pickler):
    """Pickles what is to be hashed, and never to be read again."""

    def __init__(self, to: Any, fast: bool) -> None:
        super().__init__(to, 5)
        self.fast, self.words, self._seen = fast, set[str](), set[int]()

    def persistent_id(self, obj: Any) -> Any:
        """What is written in place of an object; None: what pickle makes of it."""
        kind = type(obj)
        if kind is str:
            self.words.add(obj)
        if kind is str or kind in PLAIN:
            return None
        if isinstance(obj, Tensor):
            return "tensor", str(obj.dtype), tuple(obj.shape), bytes_digest(obj)
        if isinstance(obj, np.ndarray):
            self.words.update(obj.ravel().tolist() if obj.dtype.kind == "U" else ())
            return None if obj.dtype.hasobject else ("array", digest_arrays({"": obj}))
        if isinstance(obj, set | frozenset):
            parts = [digest(one) for one in obj]
            self.words.update(*(words for _, words in parts))
            return "set", sorted(found for found, _ in parts)
        if isinstance(obj, PurePath):
            self.words.add(str(obj))
            return "path", str(obj)
        if isinstance(obj, ModuleType):
            return _package(obj.__name__) or ("file", Path(str(obj.__file__)).read_bytes())
        if isinstance(obj, CodeType):
            names = obj.co_varnames, obj.co_freevars, obj.co_cellvars
            return obj.co_code, obj.co_consts, obj.co_names, names
        if isinstance(obj, type | FunctionType):
            return self._code(obj)
        return None

    def _code(self, obj: Any) -> Any:
        """A class or function by its name, and unless it is installed by all that it is made of."""
        name = f"{obj.__module__}.{obj.__qualname__}"
        if (package := _package(obj.__module__)) or id(obj) in self._seen:
            return name, package
        self._seen.add(id(obj))
        if isinstance(obj, type):
            return obj.__qualname__, obj.__bases__, dict(_members(obj))
        reached = {n: obj.__globals__[n] for n in _names(obj.__code__) if n in obj.__globals__}
        cells = [cell.cell_contents for cell in obj.__closure__ or ()]
        return obj.__code__, obj.__defaults__, obj.__kwdefaults__, cells, reached


def bytes_digest(tensor: Tensor) -> str:
    """sha256 hex of a tensor's values, in the order of its axes."""
    return sha256(bytes_of(tensor).data)


def _package(module: str | None) -> tuple[str, str] | None:
    """The installed package that a module is of, with its version; None: it is none."""
    top = sys.modules.get((module or "builtins").partition(".")[0])
    if top is None or top.__name__ == "__main__":
        return None
    file = getattr(top, "__file__", None) or next(iter(getattr(top, "__path__", ())), None)
    if top.__name__ != "strata" and file is not None and not is_installed(Path(file)):
        return None
    return top.__name__, str(getattr(top, "__version__", ""))


def _names(code: CodeType) -> Iterator[str]:
    """Global names that code refers to, and code inside it."""
    yield from code.co_names
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _names(one)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Functions and values that a class is made of."""
    for name, value in vars(kind).items():
        value = value.func if isinstance(value, cached_property) else value
        value = getattr(value, "__func__", value)
        if isinstance(value, property):
            yield name, (value.fget, value.fset)
        elif isinstance(value, FunctionType) or not (
            name.startswith(("__", "_abc_")) or hasattr(value, "__objclass__")
        ):
            yield name, value


def _files(words: set[str], without: Path | None) -> Iterator[Path]:
    """Files that texts name, and those beneath folders; not what holds the working directory."""
    count = 0
    for word in words:
        if not word or not os.path.exists(word):  # noqa: PTH110  # texts may be no paths
            continue
        path = Path(word)
        if not path.is_dir():
            yield path
        elif not Path.cwd().is_relative_to(path.absolute().resolve()):
            for folder, inside, names in os.walk(path, followlinks=True):
                inside[:] = [one for one in inside if Path(folder, one).absolute() != without]
                count += len(names)
                if count > MOST_FILES:
                    raise Unknown(f"there are more than {MOST_FILES:,} files in {path}")
                yield from (Path(folder, name) for name in names)
