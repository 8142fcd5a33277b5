"""A Python file with a network: how it is run, what it may read, and whose fault an error is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import beside
from safetensors.torch import save_file
from torch import nn

from strata.pipeline import errors
from strata.stages.errors import UnusableNetwork
from strata.stages.network.block_reading import read_blocks
from strata.stages.network.block_source import construct
from strata.stages.network.blocks import Origin
from strata.stages.network.network import build

READS = """
from pathlib import Path
import helper, torch
from safetensors.torch import load_file
def blocks():
    one, two = helper.conv(1, 4), helper.conv(4, 4)
    one.load_state_dict(torch.load({!r}))
    two.load_state_dict(load_file(Path(__file__).parent / "two.safetensors"))
    return [one, two]
"""
HELPER = "from torch import nn\ndef conv(i, o): return nn.Conv2d(i, o, 3, padding=1)\n"


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def origin(place: Path, code: str, home: str = "") -> Origin:
    return Origin("net.py:blocks", (), code, str(place), home)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a helper and the weights of two blocks."""
    beside(tmp_path, HELPER, "helper.py")
    with torch.random.fork_rng(devices=[]):
        torch.save(conv(1, 4).state_dict(), tmp_path / "one.pt")
        save_file(conv(4, 4).state_dict(), tmp_path / "two.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["one.pt", "{place}/one.pt"])
def test_a_file_reads_what_lies_beside_it_from_anywhere(place: Path, name: str) -> None:
    source = origin(place, READS.format(name.format(place=place)))
    path, modules = list(sys.path), set(sys.modules)
    (_, first), (_, second) = construct(source, None)
    wanted = torch.load(place / "one.pt")
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in first.state_dict().items())
    assert second.state_dict()["weight"].any()
    assert source.read == {"helper.py", "one.pt", "two.safetensors"}
    assert sys.path == path
    new = {n for n in set(sys.modules) - modules if not n.startswith(("strata", "torch."))}
    assert new <= {"helper"}
    assert not (place / "__pycache__").exists()


def test_in_a_run_the_copies_are_read(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also where the file names the folder that it was written for."""
    run = tmp_path_factory.mktemp("run")
    for path in place.iterdir():
        path.rename(run / path.name)
    for name in ("one.pt", f"{place}/one.pt"):
        source = origin(run, READS.format(name), home=str(place))
        assert len(construct(source, None)) == 2
        assert "one.pt" in source.read


def test_two_folders_may_have_helpers_of_one_name(tmp_path: Path) -> None:
    code = "import helper\ndef blocks(): return [helper.conv(1, 4)]\n"
    other = HELPER.replace("nn.Conv2d(i, o", "nn.Conv2d(i, 2 * o")
    folders = [beside(tmp_path / str(n), t, "helper.py") for n, t in enumerate([HELPER, other])]
    found = [read_blocks(origin(folder, code), (1, 8, 8)) for folder in folders]
    assert [blocks[0].width for blocks in found] == [4, 8]
    assert found[0][0].digest != found[1][0].digest


def test_the_text_of_a_helper_is_a_part_of_the_block(place: Path) -> None:
    block = read_blocks(origin(place, READS.format("one.pt")), (1, 8, 8))[0]
    build([block], None)
    (place / "helper.py").write_text(HELPER + "\n")
    with pytest.raises(UnusableNetwork, match="is not what the run was made with"):
        build([block], None)


@pytest.mark.parametrize(
    ("helper", "said"),
    [
        ("\n1 / 0\n", "helper.py, line 2, ZeroDivisionError: division by zero"),
        ("\n\nx = = 1\n", "helper.py, line 3, SyntaxError"),
        ("import sys; sys.exit(3)", "helper.py, line 1, SystemExit: 3"),
    ],
)
def test_a_fault_of_a_helper_is_told_as_its(place: Path, helper: str, said: str) -> None:
    (place / "helper.py").write_text(helper)
    with pytest.raises(UnusableNetwork) as error:
        construct(origin(place, READS.format("one.pt")), None)
    assert f"network net.py:blocks: {said}" in str(error.value)


def test_what_a_file_changes_for_itself_is_put_back(tmp_path: Path) -> None:
    code = """
import os, torch
os.chdir("/")
torch.set_default_dtype(torch.float64)
def blocks(): return [torch.nn.Conv2d(1, 4, 3, padding=1)]
"""
    before = Path.cwd()
    ((_, block),) = construct(origin(tmp_path, code), None)
    assert block.weight.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert Path.cwd() == before


def test_ctrl_c_stays_ctrl_c(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        construct(origin(tmp_path, "raise KeyboardInterrupt"), None)


LATER = """
import torch
from torch import nn
class Later(nn.Conv2d):
    def forward(self, x):
        if x.shape[-1] == 9:
            raise {}("too late")
        return super().forward(x)
def blocks(): return [Later(1, 4, 3, padding=1)]
"""


@pytest.mark.parametrize("kind", ["RuntimeError", "SystemExit"])
def test_what_fails_later_is_told_with_file_and_line(tmp_path: Path, kind: str) -> None:
    (layer,) = build([read_blocks(origin(tmp_path, LATER.format(kind)), (1, 8, 8))[0]], None)
    with pytest.raises((RuntimeError, SystemExit)) as error:
        layer(torch.zeros(1, 1, 9, 9))
    ours = errors.ours(error.value)
    assert errors.exit_code(ours) == 3
    assert errors.one_line(ours) == (
        f"the network's own code failed: net.py, line 7, {kind}: too late"
    )


def test_what_fails_elsewhere_is_not_blamed_on_it() -> None:
    error = RuntimeError("ours")
    assert errors.ours(error) is error
    assert errors.exit_code(error) is None


def test_another_folder_is_another_network(tmp_path: Path) -> None:
    one = origin(tmp_path, HELPER)
    assert replace(one, folder="elsewhere") != one
    assert replace(one, read={"a.pt"}, home="elsewhere") == one
