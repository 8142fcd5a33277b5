"""Tars of sample files, as WebDataset has them: files of one name and different endings are one
sample."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from strata.stages.data.archives import Header
from strata.stages.data.folders import is_image
from strata.stages.data.labels import arrays_of
from strata.stages.data.sources import LABEL_NAMES, Arrays, printable, short_reason
from strata.stages.data.tables import by_split
from strata.stages.errors import DataError
from strata.stages.home import expanded

Part = tuple[Path, int, int]
"""A file of a tar: the tar, where it begins there, and its bytes."""


class _Sample(NamedTuple):
    name: str
    image: Part
    label: Any


class _Parts(list[Part]):
    """Bytes of files of tars, by number."""

    def __getitem__(self, i: Any) -> Any:
        return _bytes(super().__getitem__(i))


def open_webdataset(pattern: str, targets: str) -> Arrays:
    """The samples of the tars that a pattern names (`home.expanded`), which are split by the word
    that their names begin with.

    A sample's image is the file that has the ending of one, or .npy; its label the file .cls,
    .label or the like, a number or a word, or a key of the file .json. Raises DataError: there is
    no tar, one is damaged or compressed, or a label is unfit.
    """
    files = [file for file in expanded(pattern) if file.is_file()]
    if not files:
        raise DataError(f"webdataset:{pattern} names no file")
    left_out: dict[str, tuple[int, str]] = {}
    samples = {
        word: [one for tar in tars for one in _samples(tar, left_out)]
        for word, tars in by_split(files).items()
    }
    source = arrays_of(
        pattern,
        {w: (_Parts([s.image for s in of]), [s.label for s in of]) for w, of in samples.items()},
        targets,
        called={word: f"labels of {pattern}, {word}" for word in samples},
        marks=("webdataset",),
        files=files,
        names={w: [f"{w}/{printable(s.name)}" for s in of] for w, of in samples.items()},
    )
    source.left_out = {**source.left_out, **left_out}
    return source


def _samples(tar: Path, left_out: dict[str, tuple[int, str]]) -> Iterator[_Sample]:
    """The samples of a tar; counts those without an image or a label in ``left_out``."""
    groups: dict[str, dict[str, Part]] = {}
    try:
        with tarfile.open(tar, "r:", tarinfo=Header) as file:
            for member in file:
                folder, base = posixpath.split(member.name)
                stem, _, ending = base.partition(".")
                if member.isreg() and stem and not base.startswith("."):
                    part = tar, member.offset_data, member.size
                    groups.setdefault(posixpath.join(folder, stem), {})[ending.lower()] = part
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{tar} cannot be read as a tar: {short_reason(error)}. A compressed one must be "
            "unpacked first"
        ) from error
    for name, parts in groups.items():
        images = (e for e in parts if is_image(f"a.{e}") or e == "npy")
        image = min(images, key=lambda ending: ending.count("."), default=None)  # not mask.png
        label = next((e for e in (*LABEL_NAMES, "json") if e in parts), None)
        if image is None or label is None:
            why = f"without {'an image' if image is None else 'a label'}"
            count, first = left_out.get(why, (0, printable(name)))
            left_out[why] = count + 1, first
            continue
        yield _Sample(name, parts[image], _label(parts[label], label, name))


def _label(part: Part, ending: str, name: str) -> Any:
    text = _bytes(part).decode("utf-8", "replace").strip()
    if ending == "json":
        try:
            held = json.loads(text)
            return next(held[key] for key in LABEL_NAMES if key in held)
        except (ValueError, TypeError, StopIteration) as error:
            raise DataError(f"{name}.json in {part[0]} holds no key label") from error
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _bytes(part: Part) -> bytes:
    path, start, size = part
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)
