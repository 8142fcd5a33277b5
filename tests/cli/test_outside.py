"""The outside fails in every way: one line and a documented exit code, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment
from root import ROOT
from runs import Place, here, made, tiny

from strata.pipeline import errors
from strata.pipeline.errors import exit_code, of_outside, one_line
from strata.pipeline.progress import BarReporter

TEXT = tiny(flip="false", layers=1, downsample="[]", epochs=1)
DRAWN = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of one layer. Not to be changed."""
    return made(tmp_path_factory.mktemp("outside") / "place", 1, TEXT)


def test_commands_and_broken_outsides_drawn_at_random(tmp_path: Path) -> None:
    """The benchmark goes through all of them."""
    words = ("--draw", str(DRAWN), "--out", str(tmp_path / "found.json"))
    line = [sys.executable, str(ROOT / "benchmarks/outside.py"), *words]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == []
    assert (found["n"], found["traceback"], found["lost_work"]) == (DRAWN, 0, 0)
    assert found["done"] + found["one_line"] == DRAWN


# ---- the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((number, 11) for number in (errno.EIO, errno.EROFS, errno.EACCES, errno.EISDIR)),
        *((number, 11) for number in (errno.EMFILE, errno.ENAMETOOLONG, errno.ENOENT)),
        (errno.ENOSPC, 6),
        (errno.EDQUOT, 6),
    ],
)
@pytest.mark.parametrize("name", ["some/file", b"some/file", None])
def test_what_the_system_answers_is_one_line(number: int, code: int, name: str | None) -> None:
    found = of_outside(OSError(number, os.strerror(number), name))
    assert exit_code(found) == code
    assert "some/file" in one_line(found) or name is None
    assert "\n" not in one_line(found)
    assert os.strerror(number).lower() in one_line(found) or code == 6


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError("x"),
        OSError("a library's own words"),
        OSError(errno.EBADF, "Bad file descriptor"),
    ],
)
def test_anything_else_is_a_bug_and_keeps_its_traceback(error: Exception) -> None:
    assert of_outside(error) is error
    assert exit_code(error) is None


def test_a_null_byte_in_a_path_is_one_line() -> None:
    with pytest.raises(ValueError, match="embedded null") as raised:
        Path("a\0b").read_bytes()
    assert "null byte" in one_line(of_outside(raised.value))
    assert exit_code(of_outside(raised.value)) == 3


def test_too_many_open_files_says_which_limit() -> None:
    found = of_outside(OSError(errno.EMFILE, "Too many open files", "f"))
    assert "`ulimit -n`" in one_line(found)
    assert set(errors.REMEDY_OF) >= {errno.EMFILE}


# ---- places that are something else -------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "other", "words"),
    [
        ("--store", "run", "is a run. Name a store; the default is features"),
        ("--store", "store/x_1-*", "is one depth of the store"),
        ("--store", "store/x_1-*/test", "is a level of the store"),
        ("--store", "tiny.toml", "is a file"),
        ("--store", "nowhere", "is a link that leads nowhere"),
        ("--run", "store", "is a store. Name a run; the default is runs/RECIPE/SEED"),
        ("--run", "store/x_1-*/test", "is a level of the store"),
        ("--run", "tiny.toml", "is a file"),
    ],
)
def test_another_place_is_called_by_its_name(
    place: Place, option: str, other: str, words: str
) -> None:
    if other == "nowhere" and not (place.root / other).is_symlink():
        (place.root / other).symlink_to("gone")
    path = next(place.root.glob(other), place.root / other)
    said = place.do("status", option, path)
    assert said.rc == 2
    assert f"{option} {path} {words}" in said.error
    if option == "--store":
        assert here("du", option, path).rc == 2


def test_a_run_may_be_its_own_store(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    both = (tmp_path / "tiny.toml", "--run", tmp_path / "both", "--store", tmp_path / "both")
    for _ in range(2):
        assert here("train", *both, "--layer", 1).rc == 0
    assert here("status", *both).rc == 0
    assert here("du", "--store", tmp_path / "both").rc == 0


def test_a_run_one_folder_down_is_named(place: Place) -> None:
    said = place.do("evaluate", "--run", place.root)
    assert said.rc == 8
    assert f"There are runs in {place.run}: name one with --run" in said.error


def test_evaluate_names_the_store_it_looked_in(place: Place) -> None:
    assert place.do("evaluate").out.splitlines()[-1] == f"labels from the store {place.store}"
    assert place.do("evaluate", "--json").json["store"] == str(place.store)
    said = place.do("evaluate", "--store", place.root / "none")
    assert said.rc == 10
    assert f"is not in the store {place.root / 'none'}. Name the store" in said.error


@pytest.mark.parametrize("source", ["npz:~nobody-here/x.npz", "imagefolder:~nobody-here/x"])
def test_the_home_of_nobody_is_a_path_that_is_not_there(place: Place, source: str) -> None:
    said = place.do("train", "--layer", 1, "--data", source)
    assert said.rc == 4
    assert "~nobody-here/x" in said.error


# ---- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[ablation] lr", "x[/y]z", ":smile: [red]", "a\\[b]"])
def test_names_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    place = Place(tmp_path, f"runs/{name}")
    assert place.do("train", "--layer", 1).rc == 0
    for shown in (here("du", "--store", place.store).out, place.do("status").out):
        assert name in " ".join(shown.split())  # a long title is folded between words


def test_a_bar_shows_names_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    bars = BarReporter()
    with bars.task("reading [/x] :x: [red]a", 2, "images") as tick:
        tick(1, "[/y] limits")
        bars.say("wrote [b] :smile:")
    seen = capsys.readouterr().err
    assert "reading [/x] :x: [red]a" in seen
    assert "[/y] limits" in seen
    assert "wrote [b] :smile:" in seen


def test_eighty_columns_cut_no_word(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {command: place.do(command).out for command in ("status", "plan", "evaluate")}
    monkeypatch.setenv("COLUMNS", "80")
    for command, shown in wide.items():
        said = place.do(command).out
        tables = [line for line in said.splitlines() if len(line) > 80]
        assert not [line for line in tables if "┃" in line or "──" in line]
        lost = re.search(r"^No room at 80 columns for: (.*)\. COLUMNS=200 shows all\.$", said, re.M)
        gone = cells_under(shown, lost[1].split(", ")) if lost else set()
        words = {word for word in shown.split() if word[0].isalnum()}
        assert words - set(said.split()) <= gone


def cells_under(shown: str, columns: list[str]) -> set[str]:
    """The words of some columns, heads included, of a table with lines."""
    rows = [re.split("[│┃]", line)[1:-1] for line in shown.splitlines() if line[:1] in "│┃"]
    heads = [head.strip() for head in rows[0]]
    assert set(columns) <= set(heads)
    return {
        word
        for row in rows
        for n, c in zip(heads, row, strict=True)
        if n in columns
        for word in c.split()
    }


def test_a_pipe_has_no_width(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line a row, however long, where nobody has said how wide."""
    monkeypatch.delenv("COLUMNS", raising=False)
    shown = place.do("status").out
    (row,) = [line for line in shown.splitlines() if "train.plain" in line]
    assert re.search(r"layer 1 .*complete.* [0-9a-f]{12} ", row)
    assert f"{place.run}, levels in {place.store}" in shown
