"""Recipes: strict, frozen, and the paper's where they say so."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from strata.pipeline.errors import RecipeError
from strata.pipeline.recipe.builtin import load, names, text_of
from strata.pipeline.recipe.recipe import parse
from strata.store.fingerprint import differences

DIGITS = text_of("digits")[1]


def changed(old: str, new: str) -> str:
    assert old in DIGITS
    return DIGITS.replace(old, new)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(
            changed("epochs =", "epoch ="),
            ["unknown key 'schedule.epoch'", "Did you mean 'epochs'?"],
            id="misspelt key",
        ),
        pytest.param("[nework]\n" + DIGITS, ["'nework'", "'network'"], id="misspelt table"),
        pytest.param(
            changed("classes = 10", 'classes = "ten"'),
            ["'data.classes' must be an integer", "'ten'"],
            id="wrong type",
        ),
        pytest.param(
            changed("batch_norm = true", "batch_norm = 1"),
            ["true or false", "1"],
            id="int for bool",
        ),
        pytest.param(
            changed("classes = 10", "classes = true"), ["'data.classes'", "True"], id="bool for int"
        ),
        pytest.param(
            changed("downsample = [1]", 'downsample = ["1"]'),
            ["'network.downsample[0]'"],
            id="wrong type in a list",
        ),
        pytest.param(changed("lr = 0.1\n", ""), ["missing key 'schedule.lr'"], id="missing key"),
        pytest.param(
            changed("downsample = [1]", "downsample = [3]"),
            ["x_3", "x_1 … x_2"],
            id="downsample after the last layer",
        ),
        pytest.param(
            changed("crop = 8 ", "crop = 13 "), ["'augment.crop' is 13", "12"], id="crop too large"
        ),
        pytest.param(
            changed("crop = 8 ", "crop = 7 "), ["7 pixels", "does not divide"], id="crop is odd"
        ),
        pytest.param(
            changed('views = "canvas"', "views = 1"),
            ["same draw", "allow_single_view"],
            id="a single random view",
        ),
        pytest.param(
            changed('views = "canvas"', 'views = "canvass"'),
            ["Did you mean 'canvas'?"],
            id="unknown mode",
        ),
        pytest.param(
            changed('kind = "one-cycle"', 'kind = "onecycle"'),
            ["Did you mean 'one-cycle'?"],
            id="unknown schedule",
        ),
        pytest.param(
            DIGITS + '[cache]\nprecision = "unit8"\n', ["Did you mean 'uint8'?"], id="precision"
        ),
        pytest.param(
            DIGITS + "[cache]\npercentile = 0.0\n", ["'cache.percentile' is 0.0"], id="percentile"
        ),
        pytest.param(
            DIGITS + "[cache]\npercentile = 100.5\n", ["at most 100"], id="percentile above 100"
        ),
        pytest.param(changed("mean = [0.306]", "mean = [0.3, 0.3]"), ["2 values"], id="mean"),
        pytest.param("[data\n", ["recipe test:"], id="not TOML"),
    ],
)
def test_what_cannot_be_is_refused_with_its_path(text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "test")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400", "1e39", "1" * 4000])
@pytest.mark.parametrize(
    "line",
    [
        *("lr = 0.1\n", "mean = [0.306]\n", "std = [0.376]\n", "last = 95.0\n"),
        *("momentum = 0.9\n", "weight_decay = 0.0\n", "decay = 0.2\n", "warmup = 0.25\n"),
    ],
)
def test_numbers_are_finite(line: str, value: str) -> None:
    key = line.partition(" ")[0]
    given = re.sub(r"[\d.]+", value, line)
    text = re.sub(rf"(?m)^{key} *=.*\n", "", DIGITS)
    table = {"mean": "data", "std": "data", "last": "claim"}.get(key, "schedule")
    head = "" if f"[{table}]\n" in text else f"[{table}]\n"
    text = text.replace(f"[{table}]\n", f"[{table}]\n{given}") if not head else text + head + given
    number = text.split("\n").index(given.strip()) + 1
    with pytest.raises(RecipeError) as caught:
        parse(text, "test")
    said = str(caught.value)
    assert said.startswith(f"recipe test: line {number}: '{table}.{key}"), said
    assert "finite" in said or "it must be at " in said, said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("layers = 3", "layers = 1001", "'network.layers' is 1001; it must be at most 1,000"),
        ("k = 2\n", f"k = {10**9}\n", "'auxiliary.k' is 1000000000; it must be at most 1,000"),
        ('views = "canvas"', "views = 1001", "'augment.views' is 1001; it must be in 0 … 1,000"),
        ("size = 8", "size = 65536", "'data.size' is 65536; it must be at most 65,535"),
        ("classes = 10", f"classes = {2**31}", "'data.classes' is 2147483648; it must be at most"),
        ("classes = 10", f"classes = {-(2**63)}", "it must be at least -2,147,483,647"),
        ("lr = 0.1\n", "lr = 0.1\ntest_every = -1\n", "'schedule.test_every' is -1"),
        ("weight_decay = 5e-4", "weight_decay = -1", "'schedule.weight_decay' is -1.0"),
        ("lr = 0.1\n", "lr = 0.1\ndecay = 2\n", "'schedule.decay' is 2.0; it must be at most 1"),
        ("lr = 0.1\n", "lr = 0.1\nnesterov = true\nmomentum = 0\n", "needs a 'schedule.momentum'"),
        ("k = 2\n", "k = 2\nfinal_width = 0\n", "'auxiliary.final_width' is 0; it must be above 0"),
        ("lr = 0.1\n", "lr = [[0.1]]\n", "'schedule.lr' must be a number, got [[0.1]]"),
        ("lr = 0.1\n", "lr = 1979-05-27\n", "'schedule.lr' must be a number, got datetime.date"),
        ("lr = 0.1\n", "lr = 0.1\nlr = 0.2\n", "is no TOML: Cannot overwrite a value: 'lr = 0.2'"),
        ("lr = 0.1\n", f"lr = {'9' * 5000}\n", "5000 digits"),
        ("lr = 0.1\n", f"lr = {'[' * 5000}\n", "maximum recursion depth"),
        ("lr = 0.1\n", f"lr = {[0] * 5000}\n", "'schedule.lr' must be a number, got [0, 0, 0, 0,"),
    ],
)
def test_what_no_plan_could_hold_or_no_step_could_do_is_refused(
    old: str, new: str, said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(changed(old, new), "test")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_ends_of_lines_are_understood(
    tmp_path: Path, mark: str, end: str
) -> None:
    (tmp_path / "a.toml").write_bytes((mark + DIGITS).replace("\n", end).encode())
    assert load(str(tmp_path / "a.toml"))[1] == load("digits")[1]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_refused_by_file_and_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(("[data]\n# é\n" + DIGITS).encode(encoding))
    line = 2 if encoding in ("latin-1", "utf-16-le") else 1
    with pytest.raises(RecipeError, match=rf"{path}, line {line}, is no UTF-8 text"):
        load(str(path))


def test_what_is_no_text_is_refused_by_file(tmp_path: Path) -> None:
    for name, data, said in (
        ("empty", b"", "missing key 'data'"),
        ("nul", b"[data]\nclasses\0 = 3\n", "line 2, is no UTF-8 text"),
        ("control", b"[data]\n\x01\n", "line 2 is no TOML: Invalid statement: '\\x01'"),
    ):
        (tmp_path / f"{name}.toml").write_bytes(data)
        with pytest.raises(RecipeError, match=re.escape(said)) as caught:
            load(str(tmp_path / f"{name}.toml"))
        assert f"{tmp_path / name}.toml" in str(caught.value)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.toml cannot be read: Is a directory"):
        load(str(tmp_path / "folder.toml"))


def test_a_single_random_view_is_given_to_those_who_ask() -> None:
    recipe = parse(changed('views = "canvas"', "views = 1\nallow_single_view = true"), "test")
    assert recipe.augment.views == 1


def test_a_single_view_without_randomness_needs_no_asking() -> None:
    text = changed('views = "canvas"', "views = 1").replace("pad = 2", "pad = 0")
    assert not parse(text, "test").is_random


def test_recipes_are_frozen() -> None:
    _, recipe = load("digits")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.network.layers = 4  # pyright: ignore


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'cifar10-k1'"):
        load("cifar-k1")


def test_digits_is_the_default_and_all_are_there() -> None:
    """Tables 1 to 3, Sec. 4.2 and 4.3, and a small twin of each."""
    k, m = (1, 2, 3), (64, 128, 256)
    want = [f"cifar10-k{n}" for n in k] + [f"imagenet-k{n}" for n in k] + ["imagenet-k3-mf512"]
    want += [f"vgg{n}" for n in (11, 13, 16, 19)] + [
        f"separability-k{n}-m{w}" for n in k for w in m
    ]
    want += [f"cifar10-k{n}-small" for n in k]
    want += ["cifar10-k3-compress", "cifar10-k3-compress-small"]
    want += ["cifar10-small", "imagenet-small", "vgg11-small", "separability-small"]
    want += ["digits-residual", "digits-vit"]
    later = ("cifar10-resnet32-16", "cifar10-vgg11b")
    want += [f"{name}{twin}" for name in later for twin in ("", "-small")]
    assert names() == ["digits", *sorted(want)]
    assert all(load(name)[1].claim.text for name in names())


@pytest.mark.parametrize(
    ("name", "layers", "width", "downsample", "k", "aux", "norm", "last", "ensemble"),
    [
        pytest.param("cifar10-k1", 5, 256, (2, 3), 1, 0, False, 88.3, 88.4, id="k = 1"),
        pytest.param("cifar10-k2", 4, 128, (2,), 2, 256, True, 90.4, 90.7, id="k = 2"),
        pytest.param("cifar10-k3", 4, 128, (2,), 3, 256, True, 91.7, 92.8, id="k = 3"),
    ],
)
def test_the_papers_settings(
    name: str,
    layers: int,
    width: int,
    downsample: tuple[int, ...],
    k: int,
    aux: int,
    norm: bool,
    last: float,
    ensemble: float,
) -> None:
    """Sec. 4, 4.1, 4.3 and Table 2."""
    _, r = load(name)
    network: Any = r.network
    assert (network.layers, network.width, network.downsample) == (layers, width, downsample)
    assert (r.auxiliary.k, r.auxiliary.width) == (k, aux)
    assert (network.batch_norm, network.bias) == (norm, True)
    s = r.schedule
    assert (s.kind, s.epochs, s.batch, s.lr, s.momentum) == ("step", 50, 128, 0.1, 0.9)
    assert (s.decay, s.every) == (0.2, 15)
    assert (r.claim.last, r.claim.ensemble) == (last, ensemble)


@pytest.mark.parametrize(
    ("name", "width", "downsample", "k", "aux", "norm", "sides"),
    [
        ("imagenet-k1", 256, (2, 3, 4, 6), 1, [0] * 8, False, [112, 112, 56, 28, 14, 14, 7, 7]),
        (
            *("imagenet-k2", 128, (2, 4, 6), 2),
            *([256, 256, 512, 512, 1024, 1024, 2048, 2048], True),
            [112, 112, 56, 56, 28, 28, 14, 14],
        ),
    ],
)
def test_the_papers_imagenet(
    name: str,
    width: int,
    downsample: tuple[int, ...],
    k: int,
    aux: list[int],
    norm: bool,
    sides: list[int],
) -> None:
    """Sec. 4, 4.1 and 4.3: J = 8 on 12×112×112, 1,000 classes, crops of 224 from 256."""
    _, r = load(name)
    network: Any = r.network
    assert (len(r.layers), network.width, network.downsample) == (8, width, downsample)
    assert (network.stem, r.layers[0].convolved_channels) == (1, 12)
    assert [r.shape(j, r.augment.crop)[1] for j in range(1, 9)] == sides
    assert (r.auxiliary.k, [spec.width for spec in r.auxiliaries]) == (k, aux)
    assert network.batch_norm == r.auxiliary.batch_norm == norm
    assert (r.data.classes, r.data.size, r.canvas, r.augment.crop) == (1000, 256, 256, 224)
    assert r.augment.flip


def test_k3_and_its_smaller_last_classifier() -> None:
    """Table 1: M̃_f = 2048 or 512, and nothing else differs."""
    (_, two), (_, three), (_, small) = map(
        load, ("imagenet-k2", "imagenet-k3", "imagenet-k3-mf512")
    )
    assert differences(two.science(), three.science()) == ["auxiliary.k: was 2, is 3"]
    assert differences(three.science(), small.science()) == [
        "auxiliary.final_width: was null, is 512"
    ]
    assert three.auxiliaries[-1].width == 2048
    assert small.auxiliaries == (
        *three.auxiliaries[:-1],
        dataclasses.replace(three.auxiliaries[-1], width=512),
    )


VGG = {
    "vgg11": [64, 128, 256, 256, 512, 512, 512, 512],
    "vgg13": [64, 64, 128, 128, 256, 256, 512, 512, 512, 512],
    "vgg16": [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6,
    "vgg19": [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8,
}


@pytest.mark.parametrize("name", VGG)
def test_the_papers_vgg(name: str) -> None:
    """Sec. 4.3: M̃ twice the width at half the resolution; 25,088 values to 4096 to 4096 to 1000."""
    _, r = load(name)
    network: Any = r.network
    layers: tuple[Any, ...] = r.layers
    assert [layer.width for layer in layers] == VGG[name]
    assert [layer.pool for layer in layers].count("max") == 4
    *others, last = r.auxiliaries
    assert [aux.width for aux in others] == [2 * w for w in VGG[name][:-1]]
    assert {(aux.k, aux.half_resolution) for aux in others} == {(3, True)}
    assert last.maps == ((25_088, 4096), (4096, 4096), (4096, 1000))
    assert (r.data.size, r.augment.crop, network.stem) == (256, 224, 0)


@pytest.mark.parametrize("name", ["imagenet-k1", "imagenet-k2", "imagenet-k3", *VGG])
def test_the_papers_imagenet_schedule(name: str) -> None:
    s = load(name)[1].schedule
    assert (s.kind, s.epochs, s.batch, s.lr, s.momentum) == ("step", 45, 256, 0.1, 0.9)
    assert (s.decay, s.every, s.weight_decay) == (0.1, 20, 1e-4)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("m", [64, 128, 256])
def test_the_papers_separability_study(k: int, m: int) -> None:
    """Sec. 4.2: J = 5 of one width, no downsampling, M̃ = 256."""
    _, r = load(f"separability-k{k}-m{m}")
    assert [layer.width for layer in r.layers] == [m] * 5
    assert [r.shape(j, 32)[1:] for j in range(1, 6)] == [(32, 32)] * 5
    assert {aux.width for aux in r.auxiliaries} == {256 if k > 1 else 0}
    like = load(f"cifar10-k{k}")[1]
    assert (r.data, r.augment, r.schedule) == (like.data, like.augment, like.schedule)


def test_claims_of_top_5_are_the_tables() -> None:
    """Tables 1 and 3."""
    found = {n: load(n)[1].claim for n in names() if n.startswith(("imagenet", "vgg11"))}
    told = {n: (c.last_top5, c.ensemble_top5) for n, c in found.items() if not n.endswith("small")}
    assert told == {
        "imagenet-k1": (79.7, 80.8),
        "imagenet-k2": (86.3, 87.0),
        "imagenet-k3": (88.7, 89.8),
        "imagenet-k3-mf512": (88.5, None),
        "vgg11": (88.0, 89.2),
    }


def test_keys_that_came_later_are_not_in_the_science_of_a_recipe_without_them() -> None:
    """Or every run made before there were any would be of another recipe."""
    science = load("digits")[1].science()
    assert [*science["network"]] == ["layers", "width", "downsample", "stem", "batch_norm", "bias"]
    assert [*science["auxiliary"]] == ["k", "width", "final_width", "batch_norm", "bias"]
    vgg = load("vgg11")[1].science()
    assert vgg["network"]["pool"] == "max"
    assert vgg["auxiliary"]["half_resolution"] is True
