"""A small language model: characters of this project's docs, the next ones as labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from root import ROOT

CODE = (ROOT / "pipeline/recipe/builtin/transformer.py").read_text()
CLASSES = 128
RECIPE = """
network = {{ name = "transformer.py:text", arguments = {{ depth = {depth}, tokens = {tokens} }} }}
[data]
source = "npz:{folder}/text.npz"
shape = [{tokens}]
dtype = "int32"
targets = "token"
classes = 128
train = {train}
test = {test}
[auxiliary]
k = 1
[schedule]
kind = "one-cycle"
epochs = {epochs}
batch = 16
lr = 0.3
precision = "float32"
[cache]
precision = "{precision}"
shard_mb = 1
block = 64
"""


def rows_of_text(tokens: int, train: int, test: int) -> dict[str, np.ndarray]:
    """Arrays of an .npz: int32 (n, tokens) characters, and int64 (n, tokens) those that follow.
    One row in so many, evenly apart, is to test with."""
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    rows = train + test
    assert len(codes) > rows * tokens
    x, y = (codes[at : at + rows * tokens].reshape(rows, tokens) for at in (0, 1))
    tested = np.arange(rows) * test // rows != (np.arange(rows) + 1) * test // rows
    found = {"x_train": x[~tested], "x_test": x[tested]}
    labels = {"y_train": y[~tested], "y_test": y[tested]}
    return {
        **{name: array.astype(np.int32) for name, array in found.items()},
        **{name: array.astype(np.int64) for name, array in labels.items()},
    }


def written(
    folder: Path,
    *,
    tokens: int = 32,
    train: int = 1600,
    test: int = 320,
    depth: int = 4,
    epochs: int = 3,
    precision: str = "float16",
) -> str:
    """Write text.npz, transformer.py and tiny.toml into a folder; returns the recipe's text."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "text.npz", **rows_of_text(tokens, train, test))  # pyright: ignore
    (folder / "transformer.py").write_text(CODE)
    text = RECIPE.format(**locals())
    (folder / "tiny.toml").write_text(text)
    return text
