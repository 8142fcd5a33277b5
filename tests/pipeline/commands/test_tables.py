"""Tables for people: what goes first where there is no room, and what is never cut."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from strata.pipeline.commands.tables import WORD, fit, table

HEADS = ("layer", "top-1", "on disk", "fingerprint")
ROWS = (("layer 1", "93.27 %", "115.0 kB", "3c17fd871988"), ("layer 12", "7.9e+10", "", "x"))


def shown(found: Table, width: int | None) -> list[str]:
    """The lines, as the command line prints them."""
    console = Console(file=io.StringIO(), width=10**6)
    for part in fit(found, width):
        console.print(part, soft_wrap=isinstance(part, str))
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_last_column_goes_first_and_is_named() -> None:
    lines = shown(table(*HEADS, title="levels", rows=ROWS), 28)
    assert lines[0] == "levels"
    assert lines[-1] == "No room at 28 columns for: fingerprint. COLUMNS=200 shows all."
    text = " ".join(lines)
    assert "115.0 kB" in text
    assert "3c17fd871988" not in text


def test_nothing_goes_while_folding_between_words_is_enough() -> None:
    for width in (None, 200, 56):
        text = "\n".join(shown(table(*HEADS, rows=ROWS), width))
        assert "No room" not in text
        assert "3c17fd871988" in text
        assert ("┃" in text) is (width is None or width > 50)


def test_lines_between_columns_go_before_a_column_does() -> None:
    text = "\n".join(shown(table(*HEADS, rows=ROWS), 40))
    assert "┃" not in text
    assert "3c17fd871988" in text


def test_a_title_is_a_line_of_its_own_and_is_not_folded() -> None:
    long = "levels in " + "/a/long/path" * 20
    assert shown(table("a", "b", title=long, rows=[("1", "2")]), 20)[0] == long


def test_two_columns_stay_however_wide() -> None:
    lines = shown(table("name", "value", "more", rows=[("n" * 60, "v" * 60, "m")]), 80)
    assert any("n" * 60 in line and "v" * 60 in line for line in lines)


CELLS = st.lists(st.sampled_from(["12.5 MB", "93.27 %", "a", "word", "7.9e+10", "1,234 + 56"]))


@given(st.integers(20, 120), st.lists(CELLS, min_size=1, max_size=5), st.integers(2, 9))
def test_no_word_and_no_number_is_cut(width: int, cells: list[list[str]], count: int) -> None:
    rows = [[" ".join((row * count)[:3]) for _ in range(count)] for row in cells]
    heads = [f"column {i}" for i in range(count)]
    known = {word for row in (*rows, heads) for cell in row for word in WORD.findall(cell)}
    lines = shown(table(*heads, rows=rows), width)
    kept = [line for line in lines if not line.startswith("No room")]
    assert max(map(len, kept)) <= max(width, 40)
    said = {word for line in kept for word in WORD.findall(line)}
    pieces = {word for word in said if word[0].isalnum()}
    assert pieces <= known | {part for word in known for part in word.split()}


@pytest.mark.parametrize("cell", ["115.0 kB", "9.4 MB", "7 B", "93.27 %", "0.25 s"])
def test_a_number_and_its_unit_are_one_word(cell: str) -> None:
    assert WORD.findall(f"a {cell}") == ["a", cell]
