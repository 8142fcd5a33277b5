"""Tables of samples as a source: a CSV file with paths and labels, and what Hugging Face's
`datasets` saves or reads."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from strata.stages.data.labels import SPLIT_WORDS, arrays_of
from strata.stages.data.sources import (
    IMAGE_NAMES,
    LABEL_NAMES,
    Arrays,
    printable,
    short_reason,
)
from strata.stages.errors import DataError
from strata.stages.home import files_of

_PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image_path")
_SPLITS = ("split", "subset", "set")


def by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names begin with; all in train where one begins with none."""
    words = [re.match("[a-z]*", file.name.lower())[0] for file in files]  # pyright: ignore
    if not all(word in SPLIT_WORDS for word in words):
        return {"train": list(files)}
    pairs = list(zip(files, words, strict=True))
    return {word: [file for file, own in pairs if own == word] for word in words}


# ---- CSV ----------------------------------------------------------------------------------------


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
    for number, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise DataError(f"{file}, row {number}, has {len(row)} cells, must be {len(rows[0])}")
    head = [name.lower() for name in (rows or [[]])[0]]
    every, is_head = range(len(head)), not set(head).isdisjoint((*_PATHS, *IMAGE_NAMES))
    path = next((i for i in every if head[i] in (*_PATHS, *IMAGE_NAMES)), 0)
    split = next((i for i in every if head[i] in (_SPLITS if is_head else SPLIT_WORDS)), None)
    others = [i for i in every if i not in (path, split)]
    at = [i for i in others if is_head and head[i] in LABEL_NAMES] or others
    if not at or not rows[is_head:]:
        raise DataError(f"{file} must have rows of path,label or path,label,split")
    several, by_word = is_head and len(at) > 1, dict[str, list[list[str]]]()
    for row in rows[is_head:]:
        by_word.setdefault("train" if split is None else row[split].lower(), []).append(row)
    values = _values({w: [[row[i] for i in at] for row in of] for w, of in by_word.items()})
    paths = {word: [os.path.normpath(row[path]) for row in of] for word, of in by_word.items()}
    places = {word: [file.parent / path for path in of] for word, of in paths.items()}
    return arrays_of(
        str(file),
        {word: (of, values[word]) for word, of in places.items()},
        targets,
        called={word: f"column {', '.join(rows[0][i] for i in at)} of {file}" for word in by_word},
        marks=("csv",),
        files=[file, *chain(*places.values())],
        classes=[rows[0][i] for i in at] if several and targets == "sample" else None,
        names={word: [f"{word}/{printable(path)}" for path in of] for word, of in paths.items()},
    )


def _values(parts: dict[str, list[list[str]]]) -> dict[str, np.ndarray]:
    """Cells as integers where all are, else as numbers, else as they are."""
    for kind in (np.int64, np.float64):
        with suppress(ValueError, OverflowError):
            return {word: np.array(cells).astype(kind) for word, cells in parts.items()}
    return {word: np.array(cells) for word, cells in parts.items()}


# ---- Hugging Face -------------------------------------------------------------------------------


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
    tables, wanted = _tables(path, datasets), dict(parse_qsl(query))
    features = next(iter(tables.values())).features
    image = _named(features, wanted, "image", datasets.Image, IMAGE_NAMES, path)
    label = _named(features, wanted, "label", datasets.ClassLabel, LABEL_NAMES, path)
    encoded, parts = isinstance(features[image], datasets.Image), dict[str, tuple[Any, Any]]()
    for word, table in tables.items():
        column = table.select_columns([image])
        if encoded:
            column = column.cast_column(image, datasets.Image(decode=False))
        kind = None if encoded or "binary" in str(features[image]) else "numpy"
        parts[word] = column.with_format(kind)[image], table.with_format(None)[label][:]
    return arrays_of(
        str(path),
        parts,
        targets,
        called={word: f"the column {label} of {path}, {word}" for word in parts},
        marks=("hf", image, label),
        files=files_of(f"hf:{path}"),
        classes=getattr(features[label], "names", None),
    )


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
    found = wanted.get(role) or (alike[0] if len(alike) == 1 else "")
    found = found or next((name for name in usual if name in (alike or features)), "")
    if found in features:
        return found
    holds = ", ".join(features)
    raise DataError(
        f"{path} has no column {found or role}: it has {holds}. Name it: hf:{path}?{role}=…"
    )
