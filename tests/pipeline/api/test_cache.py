"""`strata.cache`: features of any module over any data set, by content, resumed, never stale."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import environment, shards
from photos import Photos, Rows, as_tensor, convolution, linear, photos
from runs import here
from torch import Tensor, nn

import strata
from strata.pipeline.api import cache as caching
from strata.pipeline.errors import OptionRange, RecipeError
from strata.stages.errors import DataError, NotFinite, UnusableNetwork
from strata.store.errors import LevelDamaged

QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


def exactly(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module.eval()(x)


# ---- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["raw", "zstd"])
@pytest.mark.parametrize(
    ("precision", "within"),
    [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2), ("uint8", 2e-2), ("uint4", 0.4)],
)
def test_features_are_what_the_module_makes_of_each_sample(
    tmp_path: Path, precision: str, within: float, profile: str
) -> None:
    data, module = Rows(300, 3, 8, 8), convolution()
    how: Any = {"precision": precision, "profile": profile, "block": 64, "percentile": 100.0}
    x = strata.cache(module, data, tmp_path, **how, **QUIET)
    assert x.shape == (300, 4, 2, 2)
    assert x.dtype == torch.float32
    expected = exactly(module, data.x)
    assert torch.allclose(x[:], expected, atol=within * float(expected.abs().max()))
    assert x.labels.tolist() == data.y
    assert x.levels[0].geometry.precision == precision
    assert x.levels[0].geometry.profile == profile


@pytest.mark.parametrize(
    ("module", "shape", "axes"),
    [
        (linear(), (6,), ("feature",)),
        (linear(), (7, 6), ("token", "feature")),
        (nn.Flatten(), (3, 4), ("feature",)),
        (nn.Identity(), (2, 3, 4), ("channel", "height", "width")),
        (nn.Identity(), (2, 3, 4, 2), ("channel", "depth", "height", "width")),
    ],
)
def test_a_sample_may_have_one_to_four_axes(
    tmp_path: Path, module: nn.Module, shape: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    data = Rows(10, *shape)
    x = strata.cache(module, data, tmp_path, precision="float32", **QUIET)
    assert x.levels[0].geometry.axes == axes
    assert torch.equal(x[:], exactly(module, data.x))


def test_the_caller_says_which_axis_has_the_features(tmp_path: Path) -> None:
    data, how = Rows(10, 3, 4), {"precision": "float32", **QUIET}
    series = strata.cache(nn.Identity(), data, tmp_path, features_last=False, **how)
    assert series.levels[0].geometry.axes == ("channel", "time")
    assert torch.equal(series[:], data.x)
    grid = strata.cache(nn.Identity(), Rows(4, 2, 2, 5), tmp_path, features_last=True, **how)
    assert grid.levels[0].geometry.axes == ("height", "width", "channel")


@pytest.mark.parametrize(
    ("given", "kept", "dtype"),
    [
        ([3, 1, 2], [3, 1, 2], torch.int64),
        ([True, False, True], [1, 0, 1], torch.int64),
        ([0.5, 1.5, -1.0], [0.5, 1.5, -1.0], torch.float32),
        ([torch.tensor(2), torch.tensor(0), torch.tensor(1)], [2, 0, 1], torch.int64),
        ([[0, 1], [1, 0], [1, 1]], [[0, 1], [1, 0], [1, 1]], torch.int64),
        (np.eye(3, 2), [[1, 0], [0, 1], [0, 0]], torch.float32),
        ([None, None, None], [-1, -1, -1], torch.int64),
    ],
)
def test_labels_are_kept_as_they_are(
    tmp_path: Path, given: Any, kept: list[Any], dtype: torch.dtype
) -> None:
    x = strata.cache(linear(), Rows(3, labels=given), tmp_path, **QUIET)
    assert x.labels.tolist() == kept
    assert x.labels.dtype == dtype


def test_a_data_set_may_be_a_list_of_arrays_without_labels(tmp_path: Path) -> None:
    rows = [np.full(6, i, np.float32) for i in range(4)]
    x = strata.cache(nn.Identity(), rows, tmp_path, precision="float32", **QUIET)
    assert x[2].tolist() == [2.0] * 6
    assert x.labels.tolist() == [-1] * 4


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    module.train()
    module[0].weight.requires_grad_(True)  # pyright: ignore
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    strata.cache(module, Rows(5, 3, 8, 8), tmp_path, **QUIET)
    assert all(part.training for part in module.modules())
    assert module[0].weight.requires_grad  # pyright: ignore
    assert module[0].weight.is_contiguous()  # pyright: ignore
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_a_value_does_not_depend_on_what_is_beside_it(tmp_path: Path) -> None:
    few, many = Rows(3, 3, 8, 8), Rows(200, 3, 8, 8)
    few.x = many.x[150:153]
    how: Any = {"precision": "float32", "block": 64, **QUIET}
    x, y = (strata.cache(convolution(), data, tmp_path, **how) for data in (few, many))
    assert torch.equal(x[:], y[150:153])


def test_a_block_that_is_not_full_makes_no_value_infinite(tmp_path: Path) -> None:
    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.norm(dim=1, keepdim=True)

    data = Rows(10)
    x = strata.cache(Unit(), data, tmp_path, block=8, precision="float32", **QUIET)
    assert torch.allclose(x[:], data.x / data.x.norm(dim=1, keepdim=True))


def test_workers_read_the_same(tmp_path: Path) -> None:
    data = Photos(photos(tmp_path / "photos"))
    how: Any = {"transform": as_tensor, "block": 4, **QUIET}
    one = strata.cache(convolution(), data, tmp_path / "a", **how)
    two = strata.cache(convolution(), data, tmp_path / "b", workers=2, **how)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    assert one.levels[0].key == two.levels[0].key


# ---- the second call -----------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forward passes, by their rows."""
    rows, real = list[int](), caching.featurize

    def featurize(layers: Any, x: Tensor, **how: Any) -> Tensor:
        rows.append(len(x))
        return real(layers, x, **how)

    monkeypatch.setattr(caching, "featurize", featurize)
    return rows


def test_the_second_call_computes_nothing_and_reads_a_few_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, data = counted(monkeypatch), Photos(photos(tmp_path / "photos", 40))
    how: Any = {"transform": as_tensor, "check": 5, **QUIET}
    first = strata.cache(convolution(), data, tmp_path / "store", **how)
    assert sum(forward) == 40
    assert data.reads == 41  # and not twice; one to see that it is the same again
    again = Photos(tmp_path / "photos")
    second = strata.cache(convolution(), again, tmp_path / "store", **how)
    assert sum(forward) == 40
    assert again.reads == 5
    assert second.levels[0].directory == first.levels[0].directory
    strata.cache(convolution(), again, tmp_path / "store", **(how | {"check": None}))
    assert again.reads == 45


def test_another_module_on_a_data_set_that_is_known_reads_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, data = counted(monkeypatch), Photos(photos(tmp_path / "photos"))
    how: Any = {"transform": as_tensor, "check": 0, **QUIET}
    strata.cache(convolution(1), data, tmp_path / "store", **how)
    other = strata.cache(convolution(2), data, tmp_path / "store", **how)
    assert sum(forward) == 24
    assert data.reads == 12 + 1 + 12 + 1
    seen = torch.stack([as_tensor(data[i][0]) for i in range(12)])
    assert torch.allclose(other[:], exactly(convolution(2), seen), atol=1e-2)


def test_the_same_samples_elsewhere_are_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By content: a copy, with other names and times, is read, and nothing is computed."""
    forward = counted(monkeypatch)
    one, two = (Photos(photos(tmp_path / name)) for name in ("one", "two"))
    how: Any = {"transform": as_tensor, **QUIET}
    x = strata.cache(convolution(), one, tmp_path / "store", **how)
    y = strata.cache(convolution(), two, tmp_path / "store", **how)
    assert x.levels[0].directory == y.levels[0].directory
    assert sum(forward) == 12


def test_a_file_that_has_changed_is_seen(tmp_path: Path) -> None:
    data = Photos(photos(tmp_path / "photos"))
    how: Any = {"transform": as_tensor, "check": 0, **QUIET}
    before = strata.cache(convolution(), data, tmp_path / "store", **how)[:]
    Path(data.files[3]).write_bytes(Path(data.files[5]).read_bytes())
    after = strata.cache(convolution(), data, tmp_path / "store", **how)[:]
    changed = [i for i in range(12) if not torch.equal(before[i], after[i])]
    assert changed == [3]


class Behind:
    """Samples that a key does not know."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.full((6,), HIDDEN["value"]), i


HIDDEN = {"value": 1.0}


def test_what_no_identity_sees_is_found_by_reading_some_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how: Any = {"key": "my data", "check": 3, "device": "cpu"}
    first = strata.cache(nn.Identity(), Behind(), tmp_path, **how)
    monkeypatch.setitem(HIDDEN, "value", 2.0)
    capsys.readouterr()
    second = strata.cache(nn.Identity(), Behind(), tmp_path, **how)
    assert first[0].tolist() == [1.0] * 6
    assert second[0].tolist() == [2.0] * 6
    assert "known by the key 'my data', but sample" in capsys.readouterr().err


def test_a_data_set_that_has_no_identity_is_read_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Open(Rows):
        def __init__(self) -> None:
            super().__init__(5)
            self.file = (tmp_path / "f").open("a")
            self.reads = 0

        def __getitem__(self, i: int) -> tuple[Tensor, Any]:
            self.reads += 1
            return super().__getitem__(i)

    data = Open()
    for reads in (6, 11):
        strata.cache(linear(), data, tmp_path / "store", device="cpu")
        assert data.reads == reads
        assert "all samples are read: the data set is not known" in capsys.readouterr().err
    strata.cache(linear(), data, tmp_path / "store", key="mine", **QUIET)
    strata.cache(linear(), data, tmp_path / "store", key="mine", check=1, **QUIET)
    assert data.reads == 17
    data.file.close()


@pytest.mark.parametrize(
    "change",
    [{"precision": "float32"}, {"block": 7}, {"compute": "bfloat16"}, {"features_last": True}],
)
def test_what_changes_the_bytes_has_another_name(tmp_path: Path, change: dict[str, Any]) -> None:
    x, y = (
        strata.cache(nn.Identity(), Rows(9, 3, 4), tmp_path, **how, **QUIET) for how in ({}, change)
    )
    assert (x.levels[0].directory == y.levels[0].directory) is False


# ---- views ---------------------------------------------------------------------------------------


class Noisy(Rows):
    """A data set that draws from torch's generator."""

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return self.x[i] + torch.randn(6), self.y[i]


class Shaken(Rows):
    """A data set that draws from numpy's generator and Python's."""

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return self.x[i] + float(np.random.rand()) + random.random(), self.y[i]


def test_what_numpy_and_random_draw_is_the_same_at_each_reading(tmp_path: Path) -> None:
    """And numpy's generator stays where it was; beartype, in tests, draws from Python's."""
    before = np.random.get_state(legacy=False)
    how: Any = {"precision": "float32", **QUIET}
    one = strata.cache(nn.Identity(), Shaken(20), tmp_path / "a", **how)
    two = strata.cache(nn.Identity(), Shaken(20), tmp_path / "b", workers=1, block=3, **how)
    assert torch.equal(one[:], two[:])
    assert not torch.equal(one[:], Rows(20).x[:20])
    np.testing.assert_equal(np.random.get_state(legacy=False), before)


def test_views_are_draws_of_seed_view_and_sample(tmp_path: Path) -> None:
    how: Any = {"precision": "float32", **QUIET}
    both = strata.cache(nn.Identity(), Noisy(20), tmp_path / "a", views=2, **how)
    assert len(both.levels) == 2
    one, two = both.view(0)[:], both.view(1)[:]
    assert not torch.isclose(one, two).any()
    alone = strata.cache(nn.Identity(), Noisy(20), tmp_path / "b", workers=1, block=3, **how)
    assert torch.equal(alone[:], one)
    third = strata.cache(nn.Identity(), Noisy(20), tmp_path / "a", views=3, **how)
    assert [level.directory for level in third.levels[:2]] == [x.directory for x in both.levels]
    other = strata.cache(nn.Identity(), Noisy(20), tmp_path / "a", seed=1, **how)
    assert not torch.isclose(other[:], one).any()
    with both.feed(20, seed=3) as feed:
        (batch, y) = next(iter(feed))
    seen = {tuple(row.tolist()) for row in batch}
    assert seen <= {tuple(row.tolist()) for row in torch.cat([one, two])}
    assert len(seen & {tuple(row.tolist()) for row in one}) not in (0, 20)
    assert sorted(y.tolist()) == list(range(20))


def test_views_of_what_draws_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionRange, match="views is 2, but data set and transform draw nothing"):
        strata.cache(linear(), Rows(5), tmp_path, views=2, **QUIET)


def test_draws_from_elsewhere_are_refused(tmp_path: Path) -> None:
    own = np.random.default_rng(0)

    class Wild(Rows):
        def __getitem__(self, i: int) -> tuple[Tensor, Any]:
            return self.x[i] + float(own.random()), self.y[i]

    with pytest.raises(DataError, match="sample 0 is another than when the data set was read"):
        strata.cache(linear(), Wild(5), tmp_path, **QUIET)


# ---- stopped, killed, damaged --------------------------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
import torch
import strata
from photos import Rows, convolution
class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = convolution(side=8)
    def forward(self, x):
        time.sleep(0.02)
        return self.inner(x)
how = dict(precision=sys.argv[2], block=16, device="cpu")
x = strata.cache(Slow(), Rows(900, 3, 32, 32), sys.argv[1], **how)
print(len(x), float(x[899].sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "uint8"])
def test_killed_and_called_again_ends_at_the_same_bytes(tmp_path: Path, precision: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(store: str) -> subprocess.Popen[str]:
        line = [sys.executable, str(script), str(tmp_path / store), precision]
        how: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, env=environment(), **how)

    with start("whole") as process:
        whole = process.communicate()[0]
        assert process.returncode == 0
    expected, kills = shards(tmp_path / "whole"), 0
    for delay in (0.3, 0.6, 0.9):
        with start("killed") as process:
            while process.poll() is None and not list((tmp_path / "killed").glob("sources/*")):
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += process.returncode == -signal.SIGKILL
    assert kills
    with start("killed") as process:
        assert process.communicate()[0] == whole
    assert shards(tmp_path / "killed") == expected


def test_shards_that_are_finished_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, module = Rows(3000, 3, 8, 8), convolution(side=8)
    small: Any = {"precision": "float32", "block": 10, **QUIET}
    real, calls = caching.featurize, list[int]()

    def failing(layers: Any, x: Tensor, **how: Any) -> Tensor:
        calls.append(len(x))
        if sum(calls) > 2000:
            raise KeyboardInterrupt
        return real(layers, x, **how)

    monkeypatch.setattr(caching, "featurize", failing)
    with pytest.raises(KeyboardInterrupt):
        strata.cache(module, data, tmp_path / "store", **small)
    monkeypatch.setattr(caching, "featurize", real)
    forward = counted(monkeypatch)
    x = strata.cache(module, data, tmp_path / "store", **small)
    assert 1000 <= sum(forward) < 1300
    whole = strata.cache(module, data, tmp_path / "whole", **small)
    assert shards(tmp_path / "store") == shards(tmp_path / "whole")
    assert torch.equal(x[:], whole[:])


def test_a_damaged_level_is_named_with_what_to_do(tmp_path: Path) -> None:
    x = strata.cache(linear(), Rows(5), tmp_path, **QUIET)
    place = x.levels[0].directory
    (place / "COMMIT.json").write_text("{}")
    with pytest.raises(LevelDamaged) as raised:
        strata.cache(linear(), Rows(5), tmp_path, **QUIET)
    assert raised.value.__notes__ == [f"Remove {place}, and it is written again"]


def test_the_store_is_sound_and_gc_leaves_it_alone(tmp_path: Path) -> None:
    for precision in ("float16", "uint4"):
        strata.cache(linear(), Rows(5), tmp_path / "store", precision=precision, **QUIET)
    checked = here("verify", "digits", "--store", tmp_path / "store", "--deep", "--json")
    assert (checked.json["damaged"], checked.json["strange"]) == ([], [])
    assert checked.json["levels"] == 2
    collected = here("gc", "--store", tmp_path / "store", "--json")
    assert collected.json["garbage"] == []
    used = here("du", "--store", tmp_path / "store", "--json").json["levels"]
    assert all(one["runs"] == [f"strata.cache of Linear ({one['depth']})"] for one in used)


# ---- refusals ------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, give: Any) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(x)


def words_of_torch(module: nn.Module, x: Tensor) -> str:
    """What torch says when the module cannot take x; it differs between its versions."""
    with pytest.raises(RuntimeError) as raised:
        module(x)
    return re.escape(str(raised.value))


NARROW = nn.Linear(7, 2)


@pytest.mark.parametrize(
    ("module", "error", "said"),
    [
        (Odd(lambda x: (x, x)), UnusableNetwork, "gives tuple, and no floating tensor: wrap it"),
        (Odd(lambda x: x.sum()), UnusableNetwork, r"makes \(\) of one sample"),
        (Odd(lambda x: x.sum(1)), UnusableNetwork, r"makes \(1,\) of one sample"),
        (Odd(lambda x: x.repeat(2, 1)), UnusableNetwork, r"makes \(2, 6\) of one sample"),
        (Odd(lambda x: x.long()), UnusableNetwork, "gives torch.int64"),
        (
            NARROW,
            UnusableNetwork,
            "the module failed: RuntimeError: " + words_of_torch(NARROW, torch.ones(1, 6)),
        ),
        (Odd(lambda x: x / 0), NotFinite, "which float16 cannot hold"),
        (Odd(_ for _ in ()), UnusableNetwork, "the module cannot be copied"),
    ],
)
def test_a_module_that_gives_no_features_is_refused(
    tmp_path: Path, module: nn.Module, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        strata.cache(module, Rows(5), tmp_path, **QUIET)
    assert not list(tmp_path.rglob("COMMIT.json"))


def test_a_feature_that_does_not_fit_is_named_by_its_sample(tmp_path: Path) -> None:
    data = Rows(300)
    data.x[217, 3] = 1e9
    with pytest.raises(NotFinite) as raised:
        strata.cache(nn.Identity(), data, tmp_path, block=50, **QUIET)
    assert raised.value.__notes__ == ["It is sample 217 of the data set"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the data set has no samples"),
        (iter([1]), "list_iterator has no len"),
        ([{"image": 1, "label": 2}], r"a dict of image, label; it must be x or \(x, y\)"),
        ([(1, 2, 3)], "is 3 things"),
        ([("a text", 1)], "is of type str, and no tensor: give transform="),
        ([(torch.zeros(6), "cat")], "the label of sample 0 is 'cat'; it must be a number"),
        (
            [(torch.zeros(6), 0), (torch.zeros(5), 1)],
            r"sample 1 is x \(5,\) .*0 is x \(6,\)",
        ),
        ([(torch.zeros(6), 0), (torch.zeros(6), 0.5)], "y .* float32; sample 0 .* y .* int64"),
    ],
)
def test_a_data_set_that_gives_no_samples_is_refused(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        strata.cache(linear(), data, tmp_path, **QUIET)


def test_an_image_wants_a_transform(tmp_path: Path) -> None:
    data = Photos(photos(tmp_path / "photos", 2))
    with pytest.raises(DataError, match=r"sample 0 of the data set is a PIL image, .* transform="):
        strata.cache(convolution(), data, tmp_path / "store", **QUIET)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(tmp_path: Path, workers: int) -> None:
    data = Photos(photos(tmp_path / "photos"))
    Path(data.files[7]).write_bytes(b"no image")
    with pytest.raises(DataError, match="sample 7 of the data set cannot be read: Unidentified"):
        strata.cache(
            convolution(), data, tmp_path / "s", transform=as_tensor, workers=workers, **QUIET
        )


def test_shapes_that_differ_from_batch_to_batch_are_named(tmp_path: Path) -> None:
    data = [torch.zeros(6)] * 4 + [torch.zeros(5)] * 2
    with pytest.raises(DataError, match=r"sample 4 is x \(5,\) .* sample 0 is x \(6,\)"):
        strata.cache(linear(), data, tmp_path, block=2, **QUIET)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"precision": "float8"}, "'cache.precision' is 'float8'"),
        ({"profile": "gzip"}, "'cache.profile' is 'gzip'"),
        ({"block": 0}, "'cache.block' is 0; it must be above 0"),
        ({"views": 0}, "'cache.views' is 0; it must be above 0"),
        ({"compute": "float64"}, "'compute' is 'float64'"),
        ({"check": -1}, "'check' is -1; it must be 0 or more"),
        ({"workers": -1}, "'workers' is -1; it must be 0 or more"),
        ({"precison": "uint8"}, "unknown key 'cache.precison'. Did you mean 'precision'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    tmp_path: Path, how: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        strata.cache(linear(), Rows(5), tmp_path, **how, **QUIET)
