"""A user of `newcomer.py`: what they write is counted, what they call is a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from checkout import ROOT

CLI = ROOT / "cli.py"
TIMEOUT = 300
NAMES = ("plane", "car", "bird")
SHORTER = {"epochs = 30": "epochs = 1", "width = 64 ": "width = 8 ", "width = 32\n": "width = 8\n"}
"""What is lowered in recipes that `init` wrote."""
PLAIN = {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "TERM": "dumb"}


class No(Exception):
    """The job was not done; the message is what its user saw last."""


class Skipped(Exception):
    """What the job needs is not installed here."""


@dataclass
class User:
    """Somebody in a folder of their own, and the lines that they have written."""

    place: Path
    pixels: dict[str, np.ndarray]
    """`x_train`, uint8 (n, y, x, channel), `y_train`, int64 (n,), `x_test`, `y_test`."""
    lines: dict[str, int] = field(default_factory=lambda: {"code": 0, "recipe": 0, "commands": 0})

    def count(self, kind: str, text: str) -> None:
        lines = (line.strip() for line in text.splitlines())
        self.lines[kind] += sum(bool(line) and not line.startswith("#") for line in lines)

    def file(self, name: str, text: str) -> None:
        """A Python file or a recipe, of which every line is the user's."""
        (self.place / name).write_text(text.lstrip("\n"), "utf-8")
        self.count("recipe" if name.endswith(".toml") else "code", text)

    def keys(self, name: str, text: str) -> None:
        """Set keys of a recipe: lines `table.key = value`. A name takes the place of the table."""
        path = self.place / name
        recipe = path.read_text("utf-8")
        for line in filter(None, map(str.strip, text.splitlines())):
            table, key, value = re.fullmatch(r"(\w+)\.(\w+) = (.*)", line).groups()  # pyright: ignore
            if f"[{table}]\n" not in recipe:
                recipe += f"\n[{table}]\n"
            before, after = recipe.split(f"[{table}]\n")
            own, *rest = re.split(r"^(?=\[)", after, maxsplit=1, flags=re.M)
            own = "\n" if key == "name" else re.sub(rf"^{key} = .*\n", "", own, flags=re.M)
            recipe = f"{before}[{table}]\n{key} = {value}\n{own}{''.join(rest)}"
        path.write_text(recipe, "utf-8")
        self.count("recipe", text)

    def command(self, *words: str, rc: int = 0) -> str:
        """A command of Strata: what it said, last on standard error."""
        self.lines["commands"] += 1
        return self.process([str(CLI), *words], rc)

    def python(self, text: str, before: str = "") -> str:
        """A script, with something before it that is not the user's; what it printed."""
        self.count("code", text)
        (self.place / "job.py").write_text(before + text.lstrip("\n"), "utf-8")
        return self.process(["job.py"], 0)

    def process(self, words: list[str], rc: int) -> str:
        for recipe in self.place.glob("*.toml"):
            text = recipe.read_text("utf-8")
            for long, short in SHORTER.items():
                text = text.replace(long, short)
            recipe.write_text(text, "utf-8")
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.place,
            env=os.environ | PLAIN,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        said = done.stdout + done.stderr
        if done.returncode != rc or "Traceback (most recent call last)" in said:
            raise No(f"exit code {done.returncode}: {last_words(said)}")
        return said

    def refused(self, *words: str, rc: int, because: str) -> str:
        """A refusal that is right, with this in its reason."""
        said = " ".join(self.command(*words, rc=rc).split())
        if because not in said:
            raise No(last_words(said))
        return said.rpartition("Error: ")[2]

    def there(self, *patterns: str) -> None:
        for pattern in patterns:
            if not any(self.place.glob(pattern)):
                raise No(f"no {pattern}")

    def init_and_run(self, source: str, *options: str, name: str) -> str:
        """The two commands of most jobs; what `run` said."""
        self.command("init", source, *options)
        said = self.command("run", f"{name}.toml")
        self.there(f"runs/{name}/0/report.json")
        return said


def last_words(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was said"


def write_photos(user: User, folder: str, split: str = "train") -> list[tuple[str, str]]:
    """A folder of JPEGs for each class: path and class of each."""
    written = []
    x, y = user.pixels[f"x_{split}"], user.pixels[f"y_{split}"]
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        path = user.place / folder / NAMES[label] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=90)
        written.append((str(path.relative_to(user.place)), NAMES[label]))
    return written


def needed(package: str) -> Any:
    """An optional package, or the end of the job."""
    if find_spec(package) is None:
        raise Skipped(f"{package} is not installed")
    return import_module(package)


Job = tuple[str, str, Callable[[User], str | None]]
"""What somebody brings; how it was received before; and the work, which gives None, or the refusal
that is right."""
