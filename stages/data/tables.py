"""Tables of samples as a source: a CSV file with paths and labels, and what Hugging Face's
`datasets` saves or reads."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np

from strata.stages.data.labels import labels_of
from strata.stages.data.sources import (
    IMAGE_NAMES,
    LABEL_NAMES,
    Arrays,
    printable,
    short_reason,
    stamp,
)
from strata.stages.errors import DataError
from strata.stages.home import files_of

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}
"""Words that name a split: train, test, or val, which does for test where there is none."""
_PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image_path")
_SPLITS = ("split", "set", "subset", "fold", "partition")


def by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names begin with; all in train where one begins with none."""
    words = [re.match(r"[a-z]*", file.name.lower()) for file in files]
    named = [SPLIT_WORDS.get(word[0], "") if word else "" for word in words]
    if not all(named):
        return {"train": files}
    return {split: [f for f, n in zip(files, named, strict=True) if n == split] for split in named}


def of_splits(words: Iterable[str], title: str) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Rows by split, of the word that each has, and what is left out. Val does for test where there
    is none. Raises DataError for another word, and where there is no train."""
    rows: dict[str, list[int]] = {}
    for i, word in enumerate(words):
        if (split := SPLIT_WORDS.get(word.lower())) is None:
            raise DataError(f"{title} has the split {word!r}, must be train, test or val")
        rows.setdefault(split, []).append(i)
    if "train" not in rows:
        raise DataError(f"{title} has no split train, it has {', '.join(rows) or 'nothing'}")
    if "test" not in rows and "val" in rows:
        rows["test"] = rows.pop("val")
    left = rows.pop("val", [])
    return rows, {"in the split val, beside train and test": (len(left), "val")} if left else {}


# ---- CSV ----------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """Which columns of a table are what, by number; ``header`` says whether it names them."""

    path: int
    split: int | None
    labels: list[int]
    names: list[str]
    header: bool


class _Listed(Arrays):
    """Files that a table names; its signature looks at all of them."""

    def signature(self) -> str:
        return stamp(self._marks, [*self._files, *(p for of in self._samples.values() for p in of)])


def open_csv(file: Path, targets: str) -> Arrays:
    """Images, or .npy files, by their paths from the folder of the CSV file, with labels.

    Columns are named (path, label, split), or else are, in this order, path, label, and perhaps
    split. Words are classes; several columns of labels are a vector. Raises DataError: it cannot be
    read, or a column cannot be told.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as CSV: {short_reason(error)}") from error
    columns = _columns(file, rows)
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise DataError(f"{file}, row {number}, has {len(row)} cells, must be {len(rows[0])}")
    rows = rows[columns.header :]
    words = ["train"] * len(rows) if columns.split is None else [r[columns.split] for r in rows]
    parts, left_out = of_splits(words, str(file))
    named = ", ".join(columns.names)
    values = _values([[row[k] for k in columns.labels] for row in rows])
    labels, classes = labels_of(
        {split: values[of] for split, of in parts.items()},
        {split: f"the column {named} of {file}, {split}," for split in parts},
        targets,
    )
    if labels["train"].ndim > 1 and targets != "token":
        classes = columns.names
    paths = {s: [os.path.normpath(rows[i][columns.path]) for i in of] for s, of in parts.items()}
    samples = {split: [file.parent / path for path in of] for split, of in paths.items()}
    names = {split: [f"{split}/{printable(path)}" for path in of] for split, of in paths.items()}
    source = _Listed(str(file), samples, labels, ("csv",), [file], classes=classes, names=names)
    source.left_out = left_out
    return source


def _columns(file: Path, rows: list[list[str]]) -> _Columns:
    if not rows:
        raise DataError(f"{file} is empty: it must have rows of path,label or path,label,split")
    names, every = rows[0], range(len(rows[0]))
    lower = [name.lower() for name in names]
    path = next((i for i in every if lower[i] in (*_PATHS, *IMAGE_NAMES)), None)
    if path is None:
        split = 2 if len(names) == 3 and lower[2] in SPLIT_WORDS else None
        labels = [i for i in every if i not in (0, split)]
        found = _Columns(0, split, labels, [f"column {i + 1}" for i in labels], False)
    else:
        split = next((i for i in every if lower[i] in _SPLITS), None)
        others = [i for i in every if i not in (path, split)]
        labels = [i for i in others if lower[i] in LABEL_NAMES] or others
        found = _Columns(path, split, labels, [names[i] for i in labels], True)
    if not found.labels or len(rows) == found.header:
        raise DataError(f"{file} has no labels: its columns are {', '.join(names)}")
    return found


def _values(cells: list[list[str]]) -> np.ndarray:
    """Integers where all are, else numbers, else words."""
    array = np.array(cells)
    for kind in (np.int64, np.float64, str):
        try:
            return array.astype(kind)
        except (ValueError, OverflowError):
            continue
    return array


# ---- Hugging Face -------------------------------------------------------------------------------


class _Column:
    """One column of a table of Hugging Face's, by row; images are not decoded."""

    def __init__(self, part: Any, name: str) -> None:
        self._part, self._name = part, name

    def __getitem__(self, i: int) -> Any:
        return self._part[i][self._name]


def open_hf(path: Path, query: str, targets: str) -> Arrays:
    """What Hugging Face's ``save_to_disk`` has written, or parquet or arrow files: these are split
    by the word that their names begin with.

    `query` names the columns, ``image=img&label=fine``; else the column of images and that of class
    labels are taken, or those with the usual names. Raises DataError: it cannot be read, or a
    column cannot be told.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("hf: needs the package datasets: pip install 'strata[hf]'") from error
    tables = _tables(path, datasets)
    splits, left_out = of_splits(tables if len(tables) > 1 else ["train"], str(path))
    keys = {split: list(tables)[of[0]] for split, of in splits.items()}
    parts = {split: tables[key] for split, key in keys.items()}
    features, wanted = parts["train"].features, dict(parse_qsl(query))
    image = _named(features, wanted, "image", datasets.Image, IMAGE_NAMES, path)
    label = _named(features, wanted, "label", datasets.ClassLabel, LABEL_NAMES, path)
    given: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for split, part in parts.items():
        given[split] = part.with_format(None)[label][:]
        only = part.select_columns([image])
        if isinstance(features[image], datasets.Image):
            only = only.cast_column(image, datasets.Image(decode=False)).with_format(None)
        elif str(features[image]) not in ("Value('binary')", "Value('large_binary')"):
            only = only.with_format("numpy")
        samples[split] = _Column(only, image)
    named = {split: f"the column {label} of {path}, {split}," for split in parts}
    labels, words = labels_of(given, named, targets)
    known = getattr(features[label], "names", None) or words
    marks, files = ("hf", image, label), files_of(f"hf:{path}")
    source = Arrays(str(path), samples, labels, marks, files, classes=known)
    source.left_out = left_out
    return source


def _tables(path: Path, datasets: Any) -> dict[str, Any]:
    """Tables by the name of their split. Raises DataError: there are none, or one is damaged."""
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            found = datasets.load_from_disk(str(path))
            return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
        files = [f for f in files_of(f"hf:{path}") if f.suffix in (".parquet", ".arrow")]
        if files:
            return {split: _table(of, datasets) for split, of in by_split(files).items()}
    except Exception as error:  # pyarrow and datasets raise nearly anything on damaged files
        raise DataError(f"{path} cannot be read: {short_reason(error)}") from error
    raise DataError(
        f"{path} is no folder that save_to_disk of datasets has written, and holds no .parquet or "
        ".arrow file"
    )


def _table(files: Sequence[Path], datasets: Any) -> Any:
    if files[0].suffix == ".arrow":
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    from pyarrow import concat_tables, parquet

    rows = concat_tables([parquet.read_table(str(file)) for file in files])
    return datasets.Dataset(datasets.table.InMemoryTable(rows))


def _named(
    features: Any, wanted: dict[str, str], role: str, kind: type, usual: Sequence[str], path: Path
) -> str:
    """The column of a role: the one that is asked for, the only one of its kind, or the first with
    a usual name."""
    alike = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = wanted.get(role) or (alike[0] if len(alike) == 1 else None)
    found = found or next((name for name in usual if name in (alike or features)), None)
    if found in features:
        return found
    holds = ", ".join(features)
    raise DataError(
        f"{path} has no column {found or role}: it has {holds}. Name it: hf:{path}?{role}=…"
    )
