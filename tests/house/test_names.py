"""The public names: eight of them, typed, cheap to import, and as the README shows them."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import recipe
from photos import photos
from root import ROOT

import strata

NAMES = ["Features", "Run", "cache", "feed", "open_level", "open_run", "run", "solve"]
METHODS = {
    "Features": ["dataset", "dtype", "feed", "ids", "labels", "levels", "shape", "view"],
    "Run": ["directory", "features", "network", "records", "store"],
}


def test_the_names_are_these() -> None:
    assert sorted(strata.__all__) == NAMES == strata.__all__
    assert set(NAMES) <= set(dir(strata))
    with pytest.raises(AttributeError, match="module 'strata' has no attribute 'caches'"):
        strata.caches  # noqa: B018  # pyright: ignore


@pytest.mark.parametrize("name", METHODS)
def test_a_class_has_these_members(name: str) -> None:
    kind = getattr(strata, name)
    own = set(dir(kind)) | set(re.findall(r"self\.([a-z]\w*)", inspect.getsource(kind.__init__)))
    assert sorted(one for one in own if not one.startswith("_")) == METHODS[name]


def functions(name: str) -> list[Callable[..., Any]]:
    found = getattr(strata, name)
    if not inspect.isclass(found):
        return [found]
    members = [found.__init__, *(getattr(found, one, None) for one in METHODS.get(name, ()))]
    plain = [one.fget if isinstance(one, property) else one for one in members]
    return [one for one in plain if inspect.isfunction(one)]


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_and_result_is_typed_and_documented(name: str) -> None:
    for function in functions(name):
        known = inspect.signature(function)
        named = [one for one in known.parameters.values() if one.name != "self"]
        assert [one.name for one in named if one.annotation is inspect.Parameter.empty] == []
        assert known.return_annotation is not inspect.Signature.empty
    assert inspect.getdoc(getattr(strata, name))


def test_importing_is_quick_and_brings_neither_torch_nor_click() -> None:
    code = "import sys, strata; print([m for m in ('torch', 'zarr', 'click') if m in sys.modules])"
    code += f"; [getattr(strata, n) for n in {NAMES}]; print('click' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"], done.stdout


def test_type_checkers_are_told_that_there_are_types() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    told = tomllib.loads(text)["tool"]["setuptools"]["package-data"]
    assert told["strata"] == ["py.typed"]
    assert (ROOT / "py.typed").is_file()


# ---- the README as a notebook --------------------------------------------------------------------

CHANGES = {
    "models.resnet18(weights)": "models.resnet18()",  # nothing is downloaded
    'strata.run("digits")': 'strata.run("tiny.toml")',
    "features(2)": "features(1)",
    "x.feed(256,": "x.feed(6,",
}
SHOWN = """
import json
x, y = next(iter(batches))
batches.close()
print(json.dumps([list(x.shape), str(x.dtype), y.dtype == labels.dtype, len(history)]))
print(ds.x.dims, ds.label.dtype, run)
"""


@pytest.mark.filterwarnings("ignore")
def test_the_python_section_of_the_readme_runs_in_a_notebook(tmp_path: Path) -> None:
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    photos(tmp_path / "photos", 6, 40)
    recipe(tmp_path, network__layers=2, schedule__epochs=1)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    for was, becomes in CHANGES.items():
        assert code.count(was) == 1, was
        code = code.replace(was, becomes)
    cells = [nbformat.v4.new_code_cell(text) for text in (code, "labels = x.labels" + SHOWN)]
    book = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=240, kernel_name="python3", resources=where).execute()
    streams = [one for cell in book.cells for one in cell.outputs]
    assert {one.name for one in streams} == {"stdout", "stderr"}  # progress alone
    first, second = "".join(s.text for s in streams if s.name == "stdout").splitlines()
    assert json.loads(first) == [[6, 512], "torch.float32", True, 10]
    assert second.startswith("('sample', 'channel', 'height', 'width') int64 <Run tiny, 2 of 2")
