"""The rules of the house, read from the source: who imports whom, how long, and how quiet."""

import ast
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from root import ROOT

FORBIDDEN = {
    "store": {"torch", "torchvision", "ffcv", "click", "rich", "safetensors"}
    | {"stages", "pipeline", "cli", "cli_options"},
    "stages": {"zarr", "numcodecs", "dask", "distributed", "click", "rich"}
    | {"store", "pipeline", "cli", "cli_options"},
    "pipeline": {"click", "cli", "cli_options"},
    "cli.py": {"stages", "store", "tests", "benchmarks"},
    "cli_options.py": {"stages", "store", "tests", "benchmarks", "cli"},
}
HEAVY = ("torch", "torchvision", "zarr", "dask", "matplotlib", "sklearn")
DRAWERS = {"utils.py", "helpers.py", "common.py"}
FUNCTION_LINES, FILE_LINES, MEDIAN_LINES = 60, 330, 12

# Names that make a generator of one's own; everything else in these modules is the global one.
OWN_GENERATOR = {
    "random": {"Random", "SystemRandom"},
    "numpy.random": {"default_rng", "Generator", "BitGenerator", "SeedSequence", "RandomState"}
    | {"PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937"},
}
SEEDS_TORCH = re.compile(r"torch\.(random\.|cuda\.)?(manual_seed(_all)?|seed(_all)?|set_rng_state)")

# In pieces, so that this file does not hold what it looks for.
MACHINE_PATHS = ["/" + "work" + "/", ".." + "/shared", "/" + "root" + "/"]


# --- the files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    name: str
    """Path from the root, as messages show it."""
    tree: ast.Module
    lines: int

    @property
    def floor(self) -> str:
        return self.name.split("/")[0]


def read(root: Path, name: str) -> Source:
    text = (root / name).read_text(encoding="utf-8")
    return Source(name, ast.parse(text, name), len(text.splitlines()))


def project_files() -> list[str]:
    """Tracked files and new ones that git does not ignore; outside git, what is not hidden."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        out = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = [name for name in out.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = []
    return sorted({name for name in names or unpacked_files() if (ROOT / name).is_file()})


def unpacked_files() -> Iterator[str]:
    for path in ROOT.rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        top = name.split("/")[0]
        if top not in {"runs", "features", "data"} and (top == ".ci" or not top.startswith(".")):
            yield name


FILES = project_files()
PYTHON = [name for name in FILES if name.endswith(".py")]
FLOORS = [name for name in PYTHON if name.split("/")[0] in FORBIDDEN]
QUIET = [name for name in FLOORS if name != "cli.py"]


# --- the checks: each yields "file:line: what is wrong" ------------------------------------------


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Every absolute import, wherever it stands, with the calls that import by name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            yield from ((node.lineno, text) for text in map(literal, node.args[:1]) if text)


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def literal(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


def wrong_floor(source: Source) -> Iterator[str]:
    for line, module in imports(source):
        if module.split(".")[0] in FORBIDDEN[source.floor]:
            yield f"{source.name}:{line}: {source.floor} must not import {module}"


def ffcv_imports(source: Source) -> Iterator[str]:
    for line, module in imports(source):
        if module.split(".")[0] == "ffcv":
            yield f"{source.name}:{line}: imports {module}"


def functions(source: Source) -> Iterator[tuple[int, str, int]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(source: Source) -> Iterator[str]:
    if source.lines > FILE_LINES:
        yield f"{source.name}:{source.lines}: the file has more than {FILE_LINES} lines"
    for line, name, length in functions(source):
        if length > FUNCTION_LINES:
            yield f"{source.name}:{line}: {name} has {length} lines, more than {FUNCTION_LINES}"


def prints(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield f"{source.name}:{node.lineno}: print() below the CLI"


def aliases(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: np -> numpy, shuffle -> random.shuffle."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tops = {a.name.split(".")[0] for a in node.names if not a.asname}
            names |= {top: top for top in tops} | {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def global_generators(source: Source) -> Iterator[str]:
    names = aliases(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute | ast.Name):
            path = ast.unparse(node)
            head, _, tail = path.partition(".")
            path = names.get(head, "") + ("." + tail if tail else "")
            module, _, name = path.rpartition(".")
            shared = module in OWN_GENERATOR and name not in OWN_GENERATOR[module]
            if shared or SEEDS_TORCH.fullmatch(path):
                yield f"{source.name}:{node.lineno}: {path} is the global generator"


def machine_paths(root: Path, name: str) -> Iterator[str]:
    try:
        text = (root / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # not a text file
    for number, line in enumerate(text.splitlines(), start=1):
        if any(needle in line for needle in MACHINE_PATHS):
            yield f"{name}:{number}: a path of one machine: {line.strip()[:80]}"


# --- the house as it stands --------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOORS)
def test_imports_stay_on_their_floor(name):
    assert not list(wrong_floor(read(ROOT, name)))


def test_ffcv_is_imported_in_one_file():
    names = [name for name in PYTHON if not name.startswith(("tests/", "benchmarks/"))]
    found = [hit for name in names for hit in ffcv_imports(read(ROOT, name))]
    assert len({hit.split(":")[0] for hit in found}) <= 1, found


def test_no_file_is_a_drawer():
    assert not [name for name in FILES if Path(name).name in DRAWERS]


@pytest.mark.parametrize("name", FLOORS)
def test_files_and_functions_are_short(name):
    assert not list(too_long(read(ROOT, name)))


def test_the_median_function_is_short():
    lengths = [n for name in FLOORS for _, _, n in functions(read(ROOT, name))]
    median = statistics.median(lengths or [0])
    assert median <= MEDIAN_LINES, f"the median of {len(lengths)} functions is {median} lines"


@pytest.mark.parametrize("name", QUIET)
def test_only_the_cli_prints(name):
    assert not list(prints(read(ROOT, name)))


@pytest.mark.parametrize("name", FLOORS)
def test_no_draw_from_a_global_generator(name):
    assert not list(global_generators(read(ROOT, name)))


@pytest.mark.parametrize("name", [name for name in FILES if name != ".ci/run"])
def test_no_file_knows_one_machine(name):
    assert not list(machine_paths(ROOT, name))


@pytest.mark.skipif(not (ROOT / "cli.py").exists(), reason="cli.py is not written yet")
def test_the_cli_answers_without_the_heavy_libraries():
    code = f"import cli, json, sys; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [], "python -X importtime -c 'import cli' shows by whom"


# --- the checks themselves: each sees what it is there to see ------------------------------------

PLANTED: list[tuple[str, Callable[[Source], Iterator[str]], str, str]] = [
    ("plain import", wrong_floor, "store/level/level.py", "import os\nimport torch"),
    ("from import", wrong_floor, "store/level/level.py", "\nfrom torch.nn import functional"),
    (
        "inside a function",
        wrong_floor,
        "stages/solve/solve.py",
        "def f():\n    import zarr.storage",
    ),
    ("by name", wrong_floor, "pipeline/run.py", "from importlib import *\nimport_module('click')"),
    ("past a floor", wrong_floor, "cli.py", "import pipeline\nfrom store import level"),
    ("ffcv", ffcv_imports, "stages/data/images.py", "\nfrom ffcv.loader import Loader"),
    (
        "long function",
        too_long,
        "store/level/level.py",
        "\ndef f():" + "\n    pass" * FUNCTION_LINES,
    ),
    ("print", prints, "stages/solve/solve.py", "\nprint('hello')"),
    ("numpy", global_generators, "stages/solve/solve.py", "import numpy as np\nnp.random.rand(3)"),
    (
        "renamed",
        global_generators,
        "store/read/order.py",
        "from numpy import random as r\nr.rand()",
    ),
    ("random", global_generators, "store/read/order.py", "from random import shuffle\nshuffle([])"),
    (
        "torch seed",
        global_generators,
        "stages/solve/solve.py",
        "import torch\ntorch.manual_seed(0)",
    ),
    ("cuda seed", global_generators, "stages/a.py", "import torch\ntorch.cuda.manual_seed_all(0)"),
]


@pytest.mark.parametrize(
    ("check", "name", "text"), [pytest.param(*planted, id=what) for what, *planted in PLANTED]
)
def test_a_planted_violation_is_found_on_line_two(tmp_path, check, name, text):
    assert [hit.rsplit(": ")[0] for hit in check(plant(tmp_path, name, text))][:1] == [f"{name}:2"]


def test_a_file_too_long_is_found(tmp_path):
    hits = list(too_long(plant(tmp_path, "store/level/level.py", "x = 1\n" * (FILE_LINES + 1))))
    assert hits == [f"store/level.py:{FILE_LINES + 1}: the file has more than {FILE_LINES} lines"]


def test_a_path_of_one_machine_is_found(tmp_path):
    (tmp_path / "notes.md").write_text("\nsee " + MACHINE_PATHS[0] + "notes")
    assert next(machine_paths(tmp_path, "notes.md")).startswith("notes.md:2: ")


def test_what_is_allowed_is_not_found(tmp_path):
    text = "import numpy as np\nfrom . import torch\nfrom .random import rand\n"
    source = plant(
        tmp_path, "store/level/level.py", text + "np.random.default_rng(0).random()\nrand()\n"
    )
    checks = (wrong_floor, ffcv_imports, too_long, prints, global_generators)
    assert not [hit for check in checks for hit in check(source)]


def plant(root: Path, name: str, text: str) -> Source:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return read(root, name)
