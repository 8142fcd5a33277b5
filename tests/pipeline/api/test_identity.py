"""What an object is: equal ones are one, and a change of values, code or files makes another."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import Photos, convolution, linear, photos
from torch import nn

from strata.pipeline.api.identity import Unknown, digest, identity

BASE = """
import functools
SCALE = 2
def double(x):
    return helper(x) * SCALE
def helper(x):
    return x + 1
class Data:
    classes = ["cat", "dog"]
    @property
    def size(self): return 3
    @staticmethod
    def opened(x): return [y for y in x if y > 4]
    @functools.cached_property
    def wide(self): return 5
    def __init__(self, n=7): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return double(i)
"""


def made(code: str, *arguments: Any) -> Any:
    module = types.ModuleType("__main__")
    exec(code, module.__dict__)
    return module.Data(*arguments)


def test_the_same_code_and_values_are_one_identity_in_any_process() -> None:
    own = digest(made(BASE))[0]
    assert digest(made("\n\n# another comment" + BASE))[0] == own
    assert digest(made(BASE + "\nunused = 3"))[0] == own
    code = "import sys; from strata.pipeline.api.identity import digest\n"
    code += "sys.path.insert(0, sys.argv[1]); from test_identity import BASE, made\n"
    code += "print(digest(made(BASE))[0], digest({'b', 'a', 'c'})[0])"
    line = [sys.executable, "-c", code, str(Path(__file__).parent)]
    for seed in ("1", "2"):  # of the order of sets
        env = os.environ | {"PYTHONHASHSEED": seed}
        out = subprocess.run(line, env=env, capture_output=True, text=True, check=True).stdout
        assert out.split() == [own, digest({"c", "b", "a"})[0]]


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("SCALE = 2", "SCALE = 3"),
        ("x + 1", "x + 2"),
        ('"dog"', '"fox"'),
        ("return 3", "return 4"),
        ("y > 4", "y > 5"),
        ("return 5", "return 6"),
        ("n=7", "n=8"),
        ("double(i)", "double(-i)"),
    ],
)
def test_a_change_anywhere_in_the_code_makes_another(was: str, becomes: str) -> None:
    changed = BASE.replace(was, becomes)
    assert changed != BASE
    assert digest(made(changed, 7))[0] != digest(made(BASE, 7))[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        ([1], (1,)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (np.arange(3), np.arange(3)[::-1]),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x, k=1: x, lambda x, k=2: x),
        ({1, 2}, {1, 3}),
        (Path("a"), "a"),
        (nn.ReLU(), nn.GELU()),
        (nn.MaxPool2d(2), nn.MaxPool2d(3)),
    ],
)
def test_what_differs_has_another_digest(one: Any, other: Any) -> None:
    assert digest(one)[0] != digest(other)[0]


def test_closures_and_modules_are_told_by_what_they_hold() -> None:
    def scaled(by: Any) -> Callable[[Any], Any]:
        return lambda x: x * by

    assert digest(scaled(2))[0] == digest(scaled(2))[0] != digest(scaled(3))[0]
    network = convolution(seed=1)
    assert digest(network)[0] == digest(convolution(seed=1))[0] != digest(convolution(seed=2))[0]
    network[0].to(memory_format=torch.channels_last)  # pyright: ignore
    assert digest(network)[0] == digest(convolution(seed=1))[0]
    with torch.no_grad():
        next(network.parameters())[0, 0, 0, 0] += 1e-6
    assert digest(network)[0] != digest(convolution(seed=1))[0]


def test_what_holds_itself_has_a_digest() -> None:
    def circle() -> list[Any]:
        one: list[Any] = [1]
        one.append(one)
        return one

    assert digest(circle())[0] == digest(circle())[0]
    module = linear()
    module.__dict__["parent"] = [module]
    assert len(digest(module)[0]) == 64


def test_files_that_are_named_count_by_size_and_time(tmp_path: Path) -> None:
    data = Photos(photos(tmp_path / "photos", 4))
    own, files = identity(data)
    assert files == 4
    assert identity(data)[0] == own
    (tmp_path / "photos/cat/notes.txt").write_text("beside them")
    assert identity(data) != (own, 4)
    (tmp_path / "photos/cat/notes.txt").unlink()
    assert identity(data)[0] == own
    one = Path(data.files[2])
    facts = one.stat()
    os.utime(one, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert identity(data)[0] != own


def test_a_folder_of_ones_own_files_and_the_working_directory_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "photos", 2)
    (tmp_path / "photos/features").mkdir()
    (tmp_path / "photos/features/x").write_text("ours")
    assert identity(str(tmp_path / "photos"))[1] == 3
    assert identity(str(tmp_path / "photos"), tmp_path / "photos/features")[1] == 2
    monkeypatch.chdir(tmp_path / "photos")
    assert identity([".", "/", "", "\0", str(tmp_path)])[1] == 0


def test_names_in_arrays_and_linked_folders_are_seen(tmp_path: Path) -> None:
    data = Photos(photos(tmp_path / "photos", 4))
    assert identity([np.array(data.files)])[1] == 4
    assert identity([np.array(data.files, object)])[1] == 4
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/there").symlink_to(tmp_path / "photos")
    (tmp_path / "linked/loop").symlink_to(tmp_path / "linked")
    assert identity(tmp_path / "linked")[1] > 4
    before = identity(tmp_path / "linked")[0]
    Path(data.files[0]).write_bytes(b"other")
    assert identity(tmp_path / "linked")[0] != before


def test_an_open_file_cannot_be_told_from_another(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as file, pytest.raises(Unknown, match="pickle"):
        digest([file])
