"""TOML tables into frozen dataclasses, refusing what they do not know.

An unknown key is refused with its full path and the nearest known one; a value of another type with
the type wanted; a number that is not finite, or too large, with the bound. Nothing is converted
silently, except an integer where a float is wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from strata.pipeline.errors import RecipeError

T = TypeVar("T")
MOST: dict[Any, float] = {int: 2**31 - 1, float: 3.4e38}
"""The largest number of a type, that of float32; and the least, with a minus."""
FEW = 1000
"""Most layers, views and other things that a plan goes through one by one."""
ENTRY = re.compile(r"\s*(\[*)([\w.]+)")
"""The beginning of a line of TOML: a table's head, or a key."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        RecipeError: it cannot be read, or has another encoding; names the file and the line.
    """
    try:
        text = path.read_text("utf-8-sig")
        before, nul, _ = text.partition("\0")
        if not nul:
            return text
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode("latin-1")
    line = before.count("\n") + 1
    raise RecipeError(f"{path}, line {line}, is no UTF-8 text: save the file in that encoding")


def tables(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises RecipeError: it is none."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise RecipeError(str(error)) from None


def located(text: str, error: RecipeError) -> str:
    """What is wrong in a TOML text, with the line in front: the parser's, or that of the first key
    that the message names, or of its table."""
    said, table, lines = str(error), "", dict[str, int]()
    if at := re.search(r" \(at line (\d+), column \d+\)$", said):
        line = text.split("\n")[int(at[1]) - 1]
        return f"line {at[1]} is no TOML: {said[: at.start()]}: {brief(line.strip())}"
    for number, line in enumerate(text.split("\n"), start=1):
        if entry := ENTRY.match(line):
            path = entry[2] if entry[1] else table + entry[2]
            table = f"{path}." if entry[1] else table
            lines.setdefault(path, number)
    path = (re.search(r"'([\w.]+)", said) or ["", ""])[1]
    while path and path not in lines:
        path = path.rpartition(".")[0]
    return f"line {lines[path]}: {said}" if path else said


def brief(value: Any) -> str:
    """A value as messages show it: the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def read(kind: type[T], table: Mapping[str, Any], path: str = "") -> T:
    """Build dataclass ``kind`` from a TOML table.

    Raises:
        RecipeError: unknown key, missing key, or wrong type; the message has the key's full path.
    """
    hints, above = get_type_hints(kind), path and f"{path}."
    fields = {f.name: f for f in dataclasses.fields(cast(Any, kind))}
    for key in table:
        if key not in fields:
            raise RecipeError(f"unknown key '{above}{key}'{did_you_mean(key, fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], f"{above}{name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"missing key '{above}{name}'")
    return kind(**values)


def require(condition: bool, message: str) -> None:
    """Refuse a value that has the type but cannot be. Raises RecipeError."""
    if not condition:
        raise RecipeError(message)


def one_of(path: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is not among ``known``, and suggest the nearest. Raises RecipeError."""
    require(value in known, f"'{path}' is {value!r}{did_you_mean(value, known)}")


def positive(path: str, most: float = math.inf, **values: float) -> None:
    """Refuse values of keys in the table ``path`` that are not above 0, or above ``most``. Raises
    RecipeError."""
    for name, value in values.items():
        require(value > 0, f"'{path}.{name}' is {value}; it must be above 0")
        require(value <= most, f"'{path}.{name}' is {value}; it must be at most {most:,}")


def bounded(kind: Any, value: float, path: str) -> None:
    """Refuse a number that is not finite, or larger than any of its type may be. Raises
    RecipeError."""
    most = MOST[kind]
    bound = f"at most {most:,}" if value > 0 else f"at least {-most:,}"
    bound = "finite" if kind is float and not abs(value) < math.inf else bound
    require(abs(value) <= most, f"'{path}' is {brief(value)}; it must be {bound}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``". Did you mean 'epochs'?"``, or the known words if none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f". Did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"


def _convert(kind: Any, value: Any, path: str) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return value  # read already, by who knows more about it
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise RecipeError(f"'{path}' must be a table, got {brief(value)}")
        return read(cast(type[Any], kind), cast(Mapping[str, Any], value), path)
    if get_origin(kind) in (Union, types.UnionType):
        return _first_of(get_args(kind), value, path)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"'{path}' must be a list, got {brief(value)}")
        entries = enumerate(cast(list[Any], value))
        return tuple(_convert(get_args(kind)[0], v, f"{path}[{i}]") for i, v in entries)
    if not _fits(kind, value):
        raise RecipeError(f"'{path}' must be {_NAMES.get(kind, kind)}, got {brief(value)}")
    if kind in MOST:
        bounded(kind, value, path)
    return float(value) if kind is float else value


def _first_of(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    for kind in kinds:
        if dataclasses.is_dataclass(kind) or _fits(kind, value):
            return _convert(kind, value, path)
    wanted = " or ".join(_NAMES.get(k, str(k)) for k in kinds if k is not type(None))
    raise RecipeError(f"'{path}' must be {wanted}, got {brief(value)}")


def _fits(kind: Any, value: Any) -> bool:
    wanted = list if get_origin(kind) is tuple else kind
    return type(value) is wanted or (kind is float and type(value) is int)


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple[float, ...]: "a list of numbers",
}
