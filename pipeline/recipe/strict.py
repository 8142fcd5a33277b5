"""TOML tables into frozen dataclasses, refusing what they do not know.

An unknown key is refused with its full path and the nearest known one; a value of another type with
the type wanted. Nothing is converted silently, except an integer where a float is wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from strata.pipeline.errors import RecipeError

T = TypeVar("T")


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


def positive(path: str, **values: float) -> None:
    """Refuse values of keys in the table ``path`` that are not above 0. Raises RecipeError."""
    for name, value in values.items():
        require(value > 0, f"'{path}.{name}' is {value}; it must be above 0")


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
            raise RecipeError(f"'{path}' must be a table, got {value!r}")
        return read(cast(type[Any], kind), cast(Mapping[str, Any], value), path)
    if get_origin(kind) in (Union, types.UnionType):
        return _first_of(get_args(kind), value, path)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"'{path}' must be a list, got {value!r}")
        entries = enumerate(cast(list[Any], value))
        return tuple(_convert(get_args(kind)[0], v, f"{path}[{i}]") for i, v in entries)
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


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple[float, ...]: "a list of numbers",
}
