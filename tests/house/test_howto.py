"""Every section of docs/howto.md is executed, as a reader would, on small data."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import noise, pets
from PIL import Image
from root import ROOT
from runs import inside
from torch import nn

PAGE = (ROOT / "docs/howto.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# (\w+\.(?:py|toml))\n")


def photos(place: Path) -> dict[str, Any]:
    """Two classes of eight small images."""
    for label, name in enumerate(("ant", "bee")):
        (place / "photos" / name).mkdir(parents=True)
        for i in range(8):
            image = Image.fromarray(noise(10 * label + i, 16, 20, 3))
            image.save(place / "photos" / name / f"{i}.png")
    return {}


def signals(place: Path) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {"signals": draw.standard_normal((40, 3, 50)), "labels": np.arange(40) % 4}


def leaves(place: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(noise(i, 16, 16, 3)) for i in range(16)]
    return {"dataset": datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 8})}


def notebook(place: Path) -> dict[str, Any]:
    with torch.random.fork_rng():
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pixels = torch.from_numpy(noise(0, 16, 3, 8, 8)) / 255
    return {"network": network, "dataset": [(x, i % 2) for i, x in enumerate(pixels)]}


def cached(place: Path) -> dict[str, Any]:
    """What a script might have written of :func:`command.pets` with the network of the page."""
    pets(place / "split")
    run_python(SECTIONS["My network"], place, names := dict[str, Any]())
    with torch.random.fork_rng():
        network = nn.Sequential(*names["net"]()).eval()
    torch.save(network.state_dict(), place / "net.pth")
    paths = sorted((place / "split/train").glob("*/*"), key=lambda p: (p.parent.name, p.name))
    pixels = [torch.from_numpy(np.asarray(Image.open(path)).copy()) / 255 for path in paths]
    x = torch.stack(pixels).movedim(-1, 1)
    mean, std = (f(x, (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    (place / "cache").mkdir()
    with torch.no_grad():
        np.save(place / "cache/features.npy", network((x - mean) / std).mean((2, 3)).numpy())
    return {}


GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "My photos": photos,
    "My array": signals,
    "My Hugging Face set": leaves,
    "My data set class": photos,
    "My network": photos,
    "My loss, my augmentation": photos,
    "My notebook": notebook,
    "My cache from another program": cached,
}


def run_python(text: str, place: Path, names: dict[str, Any]) -> None:
    """Execute the Python of a section; what has a file's name is written there, too."""
    for code in (code for kind, code in BLOCK.findall(text) if kind == "python"):
        if file := FILE.match(code):
            (place / file[1]).write_text(code)
        with contextlib.chdir(place), torch.random.fork_rng():
            exec(compile(code, "howto", "exec"), names)


def merged(recipe: str, keys: str) -> str:
    """A recipe with the keys of some tables set, as a reader would do it."""
    for table, body in re.findall(r"^\[(\w+)\]\n((?:\w.*\n)+)", keys, re.M):
        if f"[{table}]\n" not in recipe:
            recipe += f"\n[{table}]\n{body}"
            continue
        before, after = recipe.split(f"[{table}]\n")
        own, rest = after.split("\n\n", 1)
        names = {line.split(" = ")[0] for line in body.splitlines()}
        kept = [line for line in own.splitlines() if line.split(" = ")[0] not in names]
        recipe = f"{before}[{table}]\n{body}" + "\n".join(kept) + f"\n\n{rest}"
    return recipe


def commands(text: str, place: Path) -> Iterator[list[str]]:
    """The commands of a section, each after what is to be edited before it."""
    for kind, block in BLOCK.findall(text):
        if kind == "toml":
            (name,) = re.findall(r"^# ([\w.]+), these keys$", block, re.M)
            (place / name).write_text(merged((place / name).read_text(), block))
        for line in block.splitlines() if kind == "sh" else ():
            assert line.startswith("python cli.py ")
            yield shlex.split(line)[2:]


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_does_what_it_says(tmp_path: Path, title: str) -> None:
    text = SECTIONS[title]
    run_python(text, tmp_path, GIVEN[title](tmp_path))
    for words in commands(text, tmp_path):
        done = inside(tmp_path, *words)
        assert done.rc == 0, (words, done.err)
        for recipe in tmp_path.glob("*.toml"):  # so that the test is short
            recipe.write_text(recipe.read_text().replace("epochs = 30", "epochs = 1"))
    for path in re.findall(r"`((?:runs|logs)/[\w/.]+)`", text):
        assert (tmp_path / path).exists()
    shutil.rmtree(tmp_path)


def test_a_section_has_about_ten_lines() -> None:
    for title, text in SECTIONS.items():
        typed = [line for _, block in BLOCK.findall(text) for line in block.splitlines() if line]
        assert len(typed) <= 18, title
