"""TOML tables into frozen dataclasses, refusing what they do not know.

An unknown key is refused with its full path and the nearest known one; a value of another type with
the type wanted. Nothing is converted silently, except an integer where a float is wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from strata.pipeline.errors import RecipeError

T = TypeVar("T")


def read(kind: type[T], table: Mapping[str, Any], path: str = "") -> T:
    """Build dataclass ``kind`` from a TOML table.

    Raises:
        RecipeError: unknown key, missing key, or wrong type; the message has the key's full path.
    """
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore
    for key in table:
        if key not in fields:
            raise RecipeError(f"unknown key '{_join(path, key)}'{did_you_mean(key, fields)}")
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], _join(path, name))
        elif _is_required(field):
            raise RecipeError(f"missing key '{_join(path, name)}'")
    return kind(**values)


def require(condition: bool, message: str) -> None:
    """Refuse a value that has the type but cannot be. Raises RecipeError."""
    if not condition:
        raise RecipeError(message)


def one_of(path: str, value: str, known: tuple[str, ...]) -> None:
    """As :func:`require`, for words; suggests the nearest."""
    require(value in known, f"'{path}' is {value!r}{did_you_mean(value, known)}")


def positive(path: str, **values: float) -> None:
    """As :func:`require`, for keys of the table ``path``."""
    for name, value in values.items():
        require(value > 0, f"'{path}.{name}' is {value}; it must be above 0")


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``". Did you mean 'epochs'?"``, or the known words if none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f". Did you mean '{near[0]}'?" if near else f"; known: {', '.join(names)}"


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(type(value)):
        return value  # read already, by who knows more about it
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise RecipeError(f"'{path}' must be a table, got {value!r}")
        return read(kind, value, path)
    if origin in (Union, types.UnionType):
        return _first_of(get_args(kind), value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"'{path}' must be a list, got {value!r}")
        return tuple(_convert(get_args(kind)[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise RecipeError(f"'{path}' must be {_NAMES.get(kind, kind)}, got {value!r}")
    return value


def _first_of(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    for kind in kinds:
        if dataclasses.is_dataclass(kind):  # an optional table, which says best what is wrong in it
            return _convert(kind, value, path)
        try:
            return _convert(kind, value, path)
        except RecipeError:
            continue
    wanted = " or ".join(_NAMES.get(k, str(k)) for k in kinds if k is not type(None))
    raise RecipeError(f"'{path}' must be {wanted}, got {value!r}")


_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple[float, ...]: "a list of numbers",
}
