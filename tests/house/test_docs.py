"""The pages are short-lined, name what exists, and say what the code says."""

import ast
import inspect
import re
from itertools import chain

import click
import pytest
from root import ROOT

import strata
from strata import cli

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in PAGES}
WIDTH = 100
PATH = re.compile(
    r"(?<![\w/.-])((?:store|stages|pipeline|tests|benchmarks|docs|typings)/[\w./-]*\w"
    r"|(?:cli|cli_options)\.py)"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def headings(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", TEXTS[page], re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def section(page: str, heading: str) -> str:
    return TEXTS[page].split(f"{heading}\n", 1)[1].split("\n#", 1)[0]


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page: str) -> None:
    """Tables are excepted: a row is one line."""
    lines = TEXTS[page].splitlines()
    assert [line for line in lines if len(line) > WIDTH and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_path_that_is_named_exists(page: str) -> None:
    assert [path for path in PATH.findall(TEXTS[page]) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_somewhere(page: str) -> None:
    for link in LINK.findall(TEXTS[page]):
        if link.startswith("http"):
            continue
        place, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / place).resolve() if place else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target.relative_to(ROOT).as_posix()), link


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(LINK.findall(TEXTS["README.md"]))
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


def test_a_path_that_does_not_exist_is_found() -> None:
    text = "see `store/level/gone.py`, tests/house, store/s3 and features/x_1-…, not ours/store/x"
    assert PATH.findall(text) == ["store/level/gone.py", "tests/house", "store/s3"]


# ---- the glossary -------------------------------------------------------------------------------


def test_a_word_of_the_glossary_has_a_sentence_and_a_file() -> None:
    rows = section("docs/architecture.md", "## Glossary").strip().splitlines()[2:]
    assert len(rows) >= 40
    for row in rows:
        word, meaning, place = (cell.strip() for cell in row.strip("|").split(" | "))
        assert word, row
        assert meaning.endswith("."), row
        assert re.fullmatch(r"`[\w/]+\.py`", place), row


# ---- the public names ---------------------------------------------------------------------------


def test_the_api_page_has_the_public_names_and_no_others() -> None:
    assert re.findall(r"^## `(\w+)`$", TEXTS["docs/api.md"], re.M) == sorted(
        strata.__all__, reverse=True
    )


@pytest.mark.parametrize("name", strata.__all__)
def test_the_api_page_has_the_signature(name: str) -> None:
    """Names and kinds of all parameters, and defaults that are literals."""
    code = section("docs/api.md", f"## `{name}`").split("```")[1]
    (shown,) = ast.parse(f"def {code.strip()}: ...").body
    assert isinstance(shown, ast.FunctionDef)
    known = inspect.signature(getattr(strata, name)).parameters
    assert [one.arg for one in shown.args.kwonlyargs] == [
        one.name for one in known.values() if one.kind is one.KEYWORD_ONLY
    ]
    arguments = [*shown.args.args, *shown.args.kwonlyargs]
    others = [shown.args.kwarg] if shown.args.kwarg else []
    assert [one.arg for one in (*arguments, *others)] == list(known)
    defaults = [*shown.args.defaults, *shown.args.kw_defaults]
    for argument, default in zip(reversed(arguments), reversed(defaults), strict=False):
        if isinstance(default, ast.Constant):
            assert known[argument.arg].default == default.value


# ---- the commands -------------------------------------------------------------------------------

COMMANDS = cli.main.commands
HELP = ["--help"]


def flags(command: click.Command) -> set[str]:
    return set(chain(HELP, *(one.opts for one in command.params)))


def test_every_command_has_its_section() -> None:
    named = re.findall(r"^### `(\w+)`$", TEXTS["docs/commands.md"], re.M)
    assert sorted(named) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_in_the_section_of_a_command_is_one_of_its_flags(name: str) -> None:
    said = section("docs/commands.md", f"### `{name}`")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", said)) <= flags(COMMANDS[name])


def test_every_flag_is_on_the_page() -> None:
    known = {flag for command in COMMANDS.values() for flag in flags(command) if flag[:2] == "--"}
    page = TEXTS["docs/commands.md"]
    assert {flag for flag in known if flag not in page} == set()
