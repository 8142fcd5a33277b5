"""docs/reference.md, made of the dataclasses that check a recipe:

PYTHONPATH=typings python tests/support/reference.py > docs/reference.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from strata.pipeline.recipe.named_network import NamedHead, NamedNetwork
from strata.pipeline.recipe.recipe import Recipe
from strata.stages.network.blocks import Origin

HEAD = """\
# Every key of a recipe

Made by `tests/support/reference.py` of the classes that check recipes; a test compares the two.
[recipes.md](recipes.md) explains how they work together, [howto.md](howto.md) has examples. A key
without a default must be given.
"""
NAMED = {"name": "string", "arguments": "table", "weights": "string", "frozen": 'integer or "all"'}
"""Keys of a table that names a network or classifiers, and their types in words."""
HEADS = ("name", "arguments")
WORDS = {int: "integer", float: "number", str: "string", bool: "true or false"}
WORDS |= {type(None): "", Origin: ""}
REQUIRED = dataclasses.MISSING


def docs_of(kind: type) -> dict[str, str]:
    """The docstring beneath each field of a dataclass and its bases, as Markdown."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        lines = cast(ast.ClassDef, body).body
        for line, below in zip(lines, [*lines[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                said = text.value if isinstance(text, ast.Constant) else ""
                found[line.target.id] = " ".join(str(said).split()).replace("``", "`")
    return found


def kinds(hint: Any) -> tuple[Any, ...]:
    """The types that a hint permits."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def word(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is tuple:
        return f"list of {word(get_args(kind)[0])}s"
    return WORDS[kind]


def toml(value: Any) -> str:
    """A default as a recipe has it; nothing where a key must be given."""
    if value is None or value is REQUIRED:
        return "" if value is REQUIRED else "none"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def rows_of(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of every field of a table."""
    docs, hints = docs_of(kind), get_type_hints(kind)
    named = {NamedNetwork: NAMED, NamedHead: {name: NAMED[name] for name in HEADS}}.get(kind)
    if named:
        docs = docs_of(NamedNetwork)
        for name, words in named.items():
            default = '`""`' if name == "weights" else "`0`" if name == "frozen" else ""
            yield name, words, default, docs[name]
        return
    for field in dataclasses.fields(kind):
        words = " or ".join(filter(None, map(word, kinds(hints[field.name]))))
        yield field.name, words, toml(field.default), docs[field.name]


def tables() -> Iterator[tuple[str, type]]:
    """Every table of a recipe, and the class that checks it; two where it may be a name."""
    for name, hint in get_type_hints(Recipe).items():
        found = [kind for kind in kinds(hint) if dataclasses.is_dataclass(kind)]
        yield from ((name, cast(type, kind)) for kind in found)
        if name == "auxiliary":
            yield name, NamedHead


def page() -> str:
    """The text of docs/reference.md."""
    parts = [HEAD]
    for table, kind in tables():
        is_named = kind in (NamedNetwork, NamedHead)
        about = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
        about = about.replace("``", "`")
        if is_named:
            about = f'In its place `{table} = "NAME"` on a line before all tables, or a table:'
        else:
            parts.append(f"## `[{table}]`\n")
        parts.append(textwrap.fill(about, 100, break_long_words=False) + "\n")
        parts.append("| key | type | default | |\n|---|---|---|---|")
        for key, words, default, meaning in rows_of(kind):
            parts.append(
                f"| `{table}.{key}` | {words} | {default} | {meaning} |".replace("  ", " ")
            )
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
