"""What surrounds the code agrees with it: lists of packages, the lock file, hooks, the workflow."""

import re
import tomllib
from typing import Any

import pytest
from root import ROOT

import strata

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def requirement(text: str) -> tuple[str, str]:
    """Name and bound of ``dask[distributed]>=2025.1``."""
    found = re.fullmatch(r"([\w-]+)(?:\[.*\])?(.*)", text)
    assert found is not None
    return found[1], found[2]


def locked(entries: list[dict[str, str]]) -> set[tuple[str, str]]:
    return {(entry["name"], entry["specifier"]) for entry in entries}


def test_the_group_dev_is_the_extra_dev() -> None:
    assert PROJECT["dependency-groups"]["dev"] == EXTRAS["dev"]


def test_the_lock_file_is_that_of_the_project() -> None:
    """After a change: `uv lock`."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))
    (ours,) = (package for package in lock["package"] if package["name"] == "strata")
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(one for some in EXTRAS.values() for one in some),
    ]
    assert locked(ours["metadata"]["requires-dist"]) == set(map(requirement, wanted))
    group = PROJECT["dependency-groups"]["dev"]
    assert locked(ours["metadata"]["requires-dev"]["dev"]) == set(map(requirement, group))
    assert ours["version"] == PROJECT["project"]["version"]


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", ".github/workflows/test.yml"])
def test_hooks_and_workflow_call_targets_of_the_makefile(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"\bmake ([a-z][a-z-]*)", (ROOT / name).read_text("utf-8"))
    assert targets
    assert [one for one in targets if not re.search(rf"^{one}:", makefile, re.M)] == []


def test_the_version_has_its_entry_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert PROJECT["project"]["version"] == strata.__version__
    for version in ("Unreleased", strata.__version__):
        assert f"\n## [{version}]" in changelog
