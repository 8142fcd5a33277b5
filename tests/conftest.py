"""What every test lives with: nobody touches global state (and warnings are errors: pyproject)."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sizes
from hypothesis import settings
from root import PYTHONPATH

os.environ["PYTHONPATH"] = PYTHONPATH  # of every process that a test starts
os.environ.pop("COLUMNS", None)  # tables are as wide as they are where nobody looks
os.environ["OMP_NUM_THREADS"] = "1"  # here and in those: there are as many tests as cores

if TYPE_CHECKING:
    from runs import Place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="repeat as often as `make test-all` does")


def pytest_configure(config: pytest.Config) -> None:
    sizes.choose(bool(config.getoption("--full")))
    settings.register_profile("strata", max_examples=sizes.examples(100), deadline=None)
    settings.load_profile("strata")


@pytest.fixture
def test_data() -> Path:
    """The folder of real data sets, for the tests that want one."""
    folder = os.environ.get("STRATA_TEST_DATA")
    if not folder:
        pytest.skip("STRATA_TEST_DATA does not name a folder of data sets")
    return Path(folder)


@pytest.fixture(autouse=True)
def folders_of_others() -> Iterator[None]:
    """Whose code failed is told by folders that this process has run files of: each test's own."""
    from strata.stages import foreign

    tests = Path(__file__).parent  # what runs a file of theirs, would make all of them others' code
    before = {one for one in foreign.FOLDERS if not tests.is_relative_to(one)}
    before = {one for one in before if not one.is_relative_to(tests)}
    foreign.FOLDERS.intersection_update(before)
    yield
    foreign.FOLDERS.intersection_update(before)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> "Place":
    """A finished run of two layers, with x_1 and x_2. Not to be changed."""
    from runs import made
    from spoil import TEXT

    return made(tmp_path_factory.mktemp("sound") / "place", 2, TEXT)


@pytest.fixture
def place(sound: "Place", tmp_path: Path) -> "Place":
    """A copy of it."""
    return sound.copy(tmp_path / "place")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> "Place":
    """Layer 1 of two is solved, and x_1 written. Not to be changed."""
    from runs import made
    from sweeps import TEXT

    return made(tmp_path_factory.mktemp("base") / "place", 1, TEXT)


@pytest.fixture(scope="session")
def swept(base: "Place", tmp_path_factory: pytest.TempPathFactory) -> "Place":
    """Sixteen variants of its layer 2, solved together. Not to be changed."""
    from sweeps import MANY, sweep

    place = base.copy(tmp_path_factory.mktemp("swept") / "place")
    assert sweep(place, *MANY).rc == 0
    return place


@pytest.fixture(autouse=True)
def no_global_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that moves numpy's or torch's global generator, or torch's thread count.

    Every draw comes from a generator made of (seed, view or epoch, sample), so a test that moves
    the global one has met code that would not reproduce. `@pytest.mark.global_rng` opts out.
    """
    if request.node.get_closest_marker("global_rng"):
        yield
        return
    before = _global_state()
    yield
    after = _global_state()
    changed = [what for what in before if after[what] != before[what]]
    if changed:
        pytest.fail(f"{request.node.nodeid} changed {', '.join(changed)}", pytrace=False)


def _global_state() -> dict[str, object]:
    """The state of the libraries that are loaded; nothing is imported for the sake of the check."""
    state: dict[str, object] = {}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy's global generator"] = (name, keys.tobytes(), *rest)
    if torch is not None:
        state["torch's global generator"] = torch.random.get_rng_state().numpy().tobytes()
        state["torch's thread count"] = torch.get_num_threads()
    return state


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of an S3-speaking server of the file's own."""
    from s3_server import serving

    with serving() as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a new bucket there, which this process finds from here on."""
    from s3_server import new_bucket, use

    use(monkeypatch, server)
    return new_bucket(server)
