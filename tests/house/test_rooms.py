"""The rules of the house, read from the source: who imports whom, how long, and how quiet."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from root import ROOT, project_files

FORBIDDEN = {
    "store": {"torch", "torchvision", "ffcv", "click", "rich", "safetensors"}
    | {"strata.stages", "strata.pipeline", "strata.cli"},
    "stages": {"zarr", "numcodecs", "dask", "distributed", "click", "rich"}
    | {"strata.store", "strata.pipeline", "strata.cli"},
    "pipeline": {"click", "strata.cli"},
    "cli.py": {"strata.stages", "strata.store", "tests", "benchmarks"},
    "__init__.py": {"torch", "zarr", "click", "dask", "strata.cli"},
}
ROOMS = (
    "store/errors store/fingerprint store/memory store/parallel",
    *("store/files", "store/level", "store/read store/write", "store/s3"),
    "store/feature_store",
    "stages/errors stages/memory stages/faking stages/foreign stages/home",
    *("stages/data", "stages/features", "stages/network", "stages/solve"),
    "pipeline/errors pipeline/options pipeline/progress pipeline/interrupt pipeline/streams"
    " pipeline/curves",
    *("pipeline/recipe", "pipeline/plan", "pipeline/run", "pipeline/feed"),
    *("pipeline/materialize", "pipeline/train", "pipeline/study pipeline/results"),
    *("pipeline/commands", "pipeline/api", "__init__", "cli"),
)
"""Lowest first. An arrow points down, or to another file of its own room. In one line are rooms, or
files that are no room, that do not know each other: files of the lowest line of a floor may."""
ROOM_FILES = 15
HEAVY = ("torch", "torchvision", "zarr", "dask", "matplotlib", "sklearn")
FRAGMENT = re.compile(r"(Of|Its|As|The same)\b")
DRAWERS = {"utils.py", "helpers.py", "common.py"}
FUNCTION_LINES, FILE_LINES, MEDIAN_LINES = 60, 330, 12

# Names that make a generator of one's own, and those that put the global one back where it was
# after a user's code has drawn from it; everything else in these modules is the global one.
OWN_GENERATOR = {
    "random": {"Random", "SystemRandom", "getstate", "setstate"},
    "numpy.random": {"default_rng", "Generator", "BitGenerator", "SeedSequence", "RandomState"}
    | {"get_state", "set_state"}
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


FILES = project_files()
PYTHON = [name for name in FILES if name.endswith(".py")]
FLOORS = [name for name in PYTHON if name.split("/")[0] in FORBIDDEN]
QUIET = [name for name in FLOORS if name != "cli.py"]


# --- the checks: each yields "file:line: what is wrong" ------------------------------------------


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Every absolute import, wherever it stands and for types only too, as ``module.name``, with
    the calls that import by name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            yield from ((node.lineno, text) for text in map(literal, node.args[:1]) if text)


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def literal(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


def inside(module: str, packages: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def wrong_floor(source: Source) -> Iterator[str]:
    for line, module in imports(source):
        if inside(module, FORBIDDEN[source.floor]):
            yield f"{source.name}:{line}: {source.floor} must not import {module}"


def ffcv_imports(source: Source) -> Iterator[str]:
    for line, module in imports(source):
        if inside(module, {"ffcv"}):
            yield f"{source.name}:{line}: imports {module}"


def modules(names: Iterable[str]) -> dict[str, str]:
    """What our files are imported as: strata.store.level.level -> store/level/level."""
    stems = (name.removesuffix(".py").removesuffix("/__init__") for name in names)
    return {f"strata.{stem.replace('/', '.')}".removesuffix(".__init__"): stem for stem in stems}


def arrows(source: Source, known: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Line and file, without its ending, of every import of one of our modules."""
    for line, module in imports(source):
        while module and module not in known:
            module = module.rpartition(".")[0]
        if module not in ("", "strata"):
            yield line, known[module]


def room(stem: str) -> tuple[int, str]:
    """Which line of ROOMS a file is in, and which room of it."""
    for number, line in enumerate(ROOMS):
        for name in line.split():
            if stem == name or stem.startswith(f"{name}/"):
                return number, name
    return -1, ""


def wrong_way(source: Source, known: dict[str, str]) -> Iterator[str]:
    """Imports that point up, or to the room beside; a file that has no room."""
    stem = source.name.removesuffix(".py").removesuffix("/__init__")
    if stem in FORBIDDEN:
        return  # what a floor's own __init__ says is for nobody
    here, own = room(stem)
    if here < 0:
        yield f"{source.name}: in no room"
    for line, target in arrows(source, known):
        there, other = room(target)
        if there > here or (here == there and own != other and own != stem):
            yield f"{source.name}:{line}: {own} must not import {other}"


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other, over however many others."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


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


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    """The product's files, read once."""
    return {name: read(ROOT, name) for name in FLOORS}


def test_imports_stay_on_their_floor(sources: dict[str, Source]) -> None:
    assert not [hit for source in sources.values() for hit in wrong_floor(source)]


def test_arrows_point_down(sources: dict[str, Source]) -> None:
    known = modules(sources)
    assert not [hit for source in sources.values() for hit in wrong_way(source, known)]


def test_no_two_files_need_each_other(sources: dict[str, Source]) -> None:
    known = modules(sources)
    stems = {name: name.removesuffix(".py").removesuffix("/__init__") for name in sources}
    graph = {stems[n]: {t for _, t in arrows(s, known)} - {stems[n]} for n, s in sources.items()}
    assert not circles(graph)


def test_a_room_has_few_files_and_says_what_it_is_for(sources: dict[str, Source]) -> None:
    folders = Counter(str(Path(name).parent) for name in sources)
    assert not {name: count for name, count in folders.items() if count > ROOM_FILES}
    inits = [source for name, source in sources.items() if name.endswith("__init__.py")]
    assert not [source.name for source in inits if not ast.get_docstring(source.tree)]


def test_a_class_has_a_name_of_its_own(sources: dict[str, Source]) -> None:
    names = Counter(
        node.name
        for source in sources.values()
        for node in source.tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not [name for name, count in names.items() if count > 1]


def test_docstrings_can_be_read_without_the_name(sources: dict[str, Source]) -> None:
    found = [
        f"{source.name}: {getattr(node, 'name', 'module')}: {text.splitlines()[0]}"
        for source in sources.values()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        if not getattr(node, "name", "").startswith("_")
        if (text := ast.get_docstring(node)) and FRAGMENT.match(text)
    ]
    assert not found


def test_what_is_installed_are_the_rooms(sources: dict[str, Source]) -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {str(Path(name).parent) for name in sources}
    packages = {"strata" if f == "." else f"strata.{f.replace('/', '.')}" for f in folders}
    assert packages == set(setuptools["packages"])


def test_ffcv_is_imported_in_one_file(sources: dict[str, Source]) -> None:
    found = [hit for source in sources.values() for hit in ffcv_imports(source)]
    assert len({hit.split(":")[0] for hit in found}) <= 1, found


def test_no_file_is_a_drawer() -> None:
    assert not [name for name in FILES if Path(name).name in DRAWERS]


def test_files_and_functions_are_short(sources: dict[str, Source]) -> None:
    assert not [hit for source in sources.values() for hit in too_long(source)]
    lengths = [n for source in sources.values() for _, _, n in functions(source)]
    median = statistics.median(lengths or [0])
    assert median <= MEDIAN_LINES, f"the median of {len(lengths)} functions is {median} lines"


def test_only_the_cli_prints(sources: dict[str, Source]) -> None:
    assert not [hit for name in QUIET for hit in prints(sources[name])]


def test_no_draw_from_a_global_generator(sources: dict[str, Source]) -> None:
    assert not [hit for source in sources.values() for hit in global_generators(source)]


def test_no_file_knows_one_machine() -> None:
    names = [name for name in FILES if name != ".ci/run"]
    assert not [hit for name in names for hit in machine_paths(ROOT, name)]


def test_the_cli_answers_without_the_heavy_libraries():
    code = f"import sys; from strata import cli; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]", "python -X importtime -c 'import strata.cli' shows by whom"


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
    ("past a floor", wrong_floor, "cli.py", "import strata.pipeline\nfrom strata import store"),
    ("own floor above", wrong_floor, "store/a.py", "\nfrom strata.stages.solve import solve"),
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("store/read/rows.py", "from strata.store.s3 import objects"),
        ("store/read/rows.py", "from strata.store.write.writer import LevelWriter"),
        ("store/errors.py", "def f():\n    import strata.store.level.level"),
        ("pipeline/plan/plan.py", "if TYPE_CHECKING:\n    from strata.pipeline.run import levels"),
        ("pipeline/drawer.py", ""),
    ],
)
def test_an_arrow_up_is_found(tmp_path: Path, name: str, text: str) -> None:
    assert len(list(wrong_way(plant(tmp_path, name, text), modules([*FLOORS, name])))) == 1


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})
    assert not circles({"a": {"b", "c"}, "b": {"c"}})


def test_a_file_too_long_is_found(tmp_path):
    hits = list(too_long(plant(tmp_path, "store/level/level.py", "x = 1\n" * (FILE_LINES + 1))))
    assert hits == [
        f"store/level/level.py:{FILE_LINES + 1}: the file has more than {FILE_LINES} lines"
    ]


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
