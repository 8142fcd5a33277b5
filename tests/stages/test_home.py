"""Where the files of a data set lie, by the word that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from strata.stages.home import absolute, expanded, files_of, place_of


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("digits", ("digits", "", "")),
        ("torchvision:CIFAR10", ("torchvision:CIFAR10", "", "")),
        ("npz:a:b.npz", ("npz", "a:b.npz", "")),
        ("python:c:/mine.py:make", ("python", "c:/mine.py", ":make")),
        ("python:mine.py", ("python", "mine.py", "")),
        ("hf:a?image=x&label=y", ("hf", "a", "?image=x&label=y")),
        ("hf:a", ("hf", "a", "")),
    ],
)
def test_a_source_in_parts(source: str, parts: tuple[str, str, str]) -> None:
    assert place_of(source) == parts
    kind, path, rest = parts
    want = f"{kind}:{Path.cwd() / path}{rest}" if path else source
    assert absolute(source) == want


def test_patterns(tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"a-{n:03}.tar").touch()
    every = sorted(tmp_path.glob("*.tar"))
    assert expanded(str(tmp_path)) == expanded(f"{tmp_path}/a-*.tar") == every
    assert expanded(f"{tmp_path}/a-{{009..011}}.tar") == every[9:]
    assert expanded(f"{tmp_path}/a-0{{09..12}}.tar") == [*every[9:], tmp_path / "a-012.tar"]
    assert expanded(f"{tmp_path}/b-*.tar") == []
    assert expanded(f"{tmp_path}/b.tar") == [tmp_path / "b.tar"]


def test_files(tmp_path: Path) -> None:
    (tmp_path / "x.npy").touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more/y.arrow").touch()
    assert files_of(f"npz:{tmp_path}") == [tmp_path / "x.npy"]
    assert files_of(f"hf:{tmp_path}?image=a") == [tmp_path / "more/y.arrow", tmp_path / "x.npy"]
    assert files_of(f"imagefolder:{tmp_path}") == files_of("digits") == []
    assert files_of(f"csv:{tmp_path / 'x.npy'}") == [tmp_path / "x.npy"]
    assert files_of(f"python:{tmp_path / 'x.npy'}:make") == [tmp_path / "x.npy"]
