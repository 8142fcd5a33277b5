"""Variants of one layer on one read: each as if it were alone, to the bit, whatever happens."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import CLI, environment, recipe, strata
from house import Place, made, tiny
from test_cli_resume import signalled

from pipeline import sweep as sweeping
from pipeline import weights
from pipeline.problem_feed import ProblemFeed
from pipeline.recipe import parse
from pipeline.source import Features
from stages.network import build_problem
from store.order import key_of
from store.publish import replace, sealed, unseal

TEXT = tiny(layers=2, precision="uint8")
SOLVED = ("weights.safetensors", "auxiliary.safetensors", "test_logits.npy")
MANY = ("lr=0.1,0.3", "k=1,2", "epochs=1,2", "keep=last,best")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Layer 1 is solved, and x_1 written."""
    return made(tmp_path_factory.mktemp("base") / "place", 1, TEXT)


@pytest.fixture(scope="module")
def swept(base: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Sixteen variants of layer 2, solved together."""
    place = base.copy(tmp_path_factory.mktemp("swept") / "place")
    assert sweep(place, *MANY).rc == 0
    return place


@pytest.fixture
def place(base: Place, tmp_path: Path) -> Place:
    return base.copy(tmp_path / "place")


def sweep(place: Place, *vary: str, j: int = 2, options: tuple[Any, ...] = ()) -> Any:
    every = itertools.chain.from_iterable(("--vary", text) for text in vary)
    return place.do("sweep", "--layer", j, *every, *options)


def variant(place: Place, name: str, j: int = 2) -> Path:
    return place.run / f"sweep_{j}" / name


def solved(directory: Path) -> dict[str, Any]:
    """What must not depend on who solved it with whom."""
    lines = [json.loads(line) for line in (directory / "epochs.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return {name: (directory / name).read_bytes() for name in SOLVED} | {"curve": curve}


def trained(base: Place, root: Path, j: int = 2, **changes: Any) -> Path:
    """The directory of layer j, solved by ``train`` with a recipe of other settings, on the same
    layers below: a copied run whose recipe says that it was made so."""
    text = TEXT
    for key, value in changes.items():
        lines = text.splitlines()
        (at,) = [n for n, line in enumerate(lines) if line.startswith(f"{key} = ")] or [None]
        if at is None:
            lines.insert(at := lines.index("[schedule]") + 1, "")
        lines[at] = f"{key} = {json.dumps(value)}"
        text = "\n".join(lines)
    place = base.copy(root)
    for path in (place.root / "tiny.toml", place.run / "recipe.toml"):
        path.write_text(text)
    facts = unseal(place.run / "run.json")
    facts["science"] = parse(text, "tiny").science()
    replace(place.run, "run.json", sealed(facts))
    if j == 1:
        shutil.rmtree(place.run / "layer_1")
    done = place.do("train", "--layer", j)
    assert f"solved layer {j}" in done.err
    return place.run / f"layer_{j}"


# ---- each as if it were alone --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lr=0.1,epochs=2,keep=last,k=2", {}),
        ("lr=0.3,epochs=2,keep=last,k=2", {"lr": 0.3}),
        ("lr=0.1,epochs=1,keep=last,k=2", {"epochs": 1}),
        ("lr=0.3,epochs=2,keep=best,k=1", {"lr": 0.3, "keep": "best", "k": 1}),
    ],
)
def test_a_variant_is_what_train_gives_with_its_settings(
    base: Place, swept: Place, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    alone = trained(base, tmp_path / "alone", **changes)
    assert solved(variant(swept, name)) == solved(alone)


@pytest.mark.parametrize(
    ("vary", "changes"),
    [
        ("nesterov=true", {"nesterov": True}),
        ("kind=step", {"kind": "step"}),
        ("momentum=0.5", {"momentum": 0.5}),
        ("weight_decay=0.01", {"weight_decay": 0.01}),
    ],
)
def test_the_rest_of_the_schedule(
    base: Place, tmp_path: Path, vary: str, changes: dict[str, Any]
) -> None:
    place = base.copy(tmp_path / "place")
    assert sweep(place, vary).rc == 0
    alone = trained(base, tmp_path / "alone", **changes)
    assert solved(variant(place, vary)) == solved(alone)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("aux_width=4,width=8", {"[auxiliary] width": 4}),
        ("aux_width=8,width=12", {"[network] width": 12}),
    ],
)
def test_widths_of_layer_1_are_those_of_a_recipe(
    base: Place, tmp_path: Path, name: str, changes: dict[str, int]
) -> None:
    place = base.copy(tmp_path / "place")
    assert sweep(place, "width=8,12", "auxiliary.width=4,8", j=1).rc == 0
    text = TEXT
    for key, value in changes.items():
        table = key.split()[0]
        head, tail = text.split(f"{table}\n")
        text = f"{head}{table}\n{tail.replace('width = 8', f'width = {value}', 1)}"
    alone = made(tmp_path / "alone", 1, text)
    assert solved(variant(place, name, 1)) == solved(alone.run / "layer_1")


def test_steps_in_micro_batches(tmp_path: Path) -> None:
    """`train` has no more of a batch there than one of them, and a sweep all of it."""
    text = TEXT.replace("batch = 64", "batch = 64\naccumulate = 3")
    by_train, by_sweep = (made(tmp_path / name, 1, text) for name in ("train", "sweep"))
    assert by_train.do("train", "--layer", 2).rc == 0
    assert sweep(by_sweep, "lr=0.1,0.3").rc == 0
    assert solved(variant(by_sweep, "lr=0.1")) == solved(by_train.run / "layer_2")


def test_a_variant_alone_and_among_others(swept: Place, place: Place) -> None:
    one = ("lr=0.3", "k=2", "epochs=2", "keep=last")
    assert sweep(place, *one).rc == 0
    name = "lr=0.3,epochs=2,keep=last,k=2"
    assert solved(variant(place, name)) == solved(variant(swept, name))


def test_nothing_cached_gives_the_same(swept: Place, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    bare = Place(tmp_path)
    assert sweep(bare, "lr=0.1,0.3", "k=2", "epochs=2", "keep=last", options=NEVER).rc == 0
    assert not list(bare.store.glob("x_1-*"))
    for rate in ("0.1", "0.3"):
        name = f"lr={rate},epochs=2,keep=last,k=2"
        assert solved(variant(bare, name)) == solved(variant(swept, name))


NEVER = ("--cache", "never")


def test_the_seed_is_of_the_initial_weights_alone(place: Place) -> None:
    """With a rate of nearly nothing the weights stay where they began."""
    assert sweep(place, "lr=1e-30", "seed=0,1").rc == 0
    wanted = parse(TEXT, "tiny")
    for seed in (0, 1):
        found, _ = weights.read(variant(place, f"lr=1e-30,seed={seed}") / "weights.safetensors")
        number = key_of("initial weights", seed, 2) % 2**63
        begun = build_problem(wanted.layers[1], wanted.auxiliaries[1], number)
        assert torch.equal(found["convolution.weight"], begun.layer.convolution.weight)


def test_a_batch_is_made_once_for_all(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made_of: list[int] = []
    values = Features.values

    def counted(self: Features, *arguments: Any) -> Any:
        made_of.append(1)
        return values(self, *arguments)

    monkeypatch.setattr(Features, "values", counted)
    assert sweep(place, "seed=0").rc == 0
    alone = len(made_of)
    assert sweep(place, "seed=1,2,3,4").rc == 0
    assert len(made_of) == 2 * alone


# ---- the table -----------------------------------------------------------------------------------


def test_the_best_on_the_test_images_comes_first(swept: Place) -> None:
    told = sweep(swept, *MANY, options=("--json",)).json
    top1 = [one["test"]["top1"] for one in told["variants"]]
    assert top1 == sorted(top1, reverse=True)
    assert len(top1) == 16
    assert told["done"] == []
    assert told["kept"] is None
    one = told["variants"][0]
    assert one["parameters"] == 9 * 32 * 16 + 2 * 16
    shown = sweep(swept, *MANY).out
    assert shown.index(told["variants"][0]["name"]) < shown.index(told["variants"][-1]["name"])
    assert f"{100 * top1[0]:.2f} %" in shown


def test_where_nothing_is_to_do_torch_is_not_imported(swept: Place) -> None:
    words = ["sweep", *swept.options, "--layer", 2, "--vary", "lr=0.1", "--vary", "k=2"]
    words += ["--vary", "epochs=2", "--vary", "keep=last"]
    code = (
        f"import cli, sys; cli.main({[str(word) for word in words]!r}, standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CLI.parent, env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr


# ---- what is there is kept, if it is of what is there --------------------------------------------


def test_one_more_variant_solves_only_that(place: Place) -> None:
    assert sweep(place, "lr=0.1,0.2").rc == 0
    before = (variant(place, "lr=0.1") / "result.json").stat().st_mtime_ns
    more = sweep(place, "lr=0.1,0.2,0.3", options=("--json",)).json
    assert more["done"] == ["solve layer 2 with lr=0.3"]
    assert (variant(place, "lr=0.1") / "result.json").stat().st_mtime_ns == before
    assert len(more["variants"]) == 3


def test_a_result_of_another_x_1_is_not_believed(place: Place) -> None:
    assert sweep(place, "lr=0.1").rc == 0
    before = solved(variant(place, "lr=0.1"))
    assert place.do("clean", "--layer", 1, "--yes").rc == 0
    assert sweep(place, "lr=0.3", j=1, options=("--keep", "lr=0.3")).rc == 0
    again = sweep(place, "lr=0.1", options=("--json",)).json
    assert again["done"] == ["write x_1", "solve layer 2 with lr=0.1"]
    assert solved(variant(place, "lr=0.1")) != before


@pytest.mark.parametrize("name", [*SOLVED, "result.json"])
def test_a_damaged_result_is_made_again(place: Place, name: str) -> None:
    assert sweep(place, "lr=0.1").rc == 0
    before = solved(variant(place, "lr=0.1"))
    path = variant(place, "lr=0.1") / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert sweep(place, "lr=0.1", options=("--json",)).json["done"] == ["solve layer 2 with lr=0.1"]
    assert solved(variant(place, "lr=0.1")) == before


# ---- one that diverges ---------------------------------------------------------------------------


def test_one_diverges_and_the_others_go_on(swept: Place, place: Place) -> None:
    rest = ("k=2", "epochs=2", "keep=last")
    done = sweep(place, "lr=0.1,1e30", *rest)
    assert done.rc == 0
    assert "diverged in epoch 1" in done.out
    assert "the loss is not finite in epoch 1" in done.err
    good, bad = (f"lr={rate},epochs=2,keep=last,k=2" for rate in ("0.1", "1e+30"))
    assert solved(variant(place, good)) == solved(variant(swept, good))
    assert [path.name for path in variant(place, bad).iterdir()] == ["result.json"]
    again = sweep(place, "lr=0.1,1e30", *rest, options=("--json",)).json
    assert again["done"] == []
    assert [one["diverged"] is None for one in again["variants"]] == [True, False]
    assert again["variants"][1]["diverged"]["epoch"] == 1
    kept = sweep(place, "lr=0.1,1e30", *rest, options=("--keep", bad))
    assert kept.rc == 9
    assert "keep another variant" in kept.error


def test_all_diverge(place: Place) -> None:
    done = sweep(place, "lr=1e30,1e31")
    assert done.rc == 9
    assert "every variant diverged" in done.error
    assert sweep(place, "lr=1e30", options=("--keep", "best")).rc == 9
    assert not (place.run / "layer_2/layer.json").exists()


# ---- stopped and killed --------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a kill: nobody catches it."""


EIGHT = ("lr=0.1,0.3", "epochs=1,2", "keep=last,best", "k=2")
"""Eight variants, of one epoch and of two."""


def killed_at(monkeypatch: pytest.MonkeyPatch, count: int, place: Place, *vary: str) -> None:
    """Checkpoints after every batch; after ``count`` files, no more is written."""
    write, left = weights.write, itertools.count(-count)

    def dying(path: Path, *rest: Any) -> None:
        if next(left) == 0:
            raise Killed
        write(path, *rest)

    monkeypatch.setattr(sweeping, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(weights, "write", dying)
    try:
        done = sweep(place, *vary)
    except Killed:
        monkeypatch.undo()
        return
    pytest.fail(f"it ended before, with {done.rc}: {done.err}")


@pytest.mark.parametrize("counts", [(5, 3, 170), (187, 1), (203, 2, 90)])
def test_killed_between_any_two_checkpoints(
    swept: Place, place: Place, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]
) -> None:
    """The variants are then at different batches, and some are through."""
    for count in counts:
        killed_at(monkeypatch, count, place, *EIGHT)
    last = sweep(place, *EIGHT)
    assert last.rc == 0
    assert "going on in epoch" in last.err
    for path in sorted((place.run / "sweep_2").iterdir()):
        assert solved(path) == solved(variant(swept, path.name)), path.name
    assert len(list((place.run / "sweep_2").iterdir())) == 8
    assert not list(place.run.rglob("checkpoint.safetensors"))


def test_a_batch_goes_only_to_those_that_have_not_seen_it(
    swept: Place, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variant added to others that are half way begins at its beginning."""
    few = ("lr=0.1", "epochs=2", "keep=last", "k=2")
    killed_at(monkeypatch, 30, place, *few)
    starts: list[tuple[int, int]] = []
    epoch = ProblemFeed.epoch

    def seen(self: ProblemFeed, number: int, start: int = 0) -> Any:
        starts.append((number, start))
        return epoch(self, number, start)

    monkeypatch.setattr(ProblemFeed, "epoch", seen)
    assert sweep(place, "lr=0.1,0.3", *few[1:]).rc == 0
    assert starts == [(0, 0), (1, 0)]
    for rate in ("0.1", "0.3"):
        name = f"lr={rate},epochs=2,keep=last,k=2"
        assert solved(variant(place, name)) == solved(variant(swept, name))


COMMAND = ("--layer", 1, "--vary", "lr=0.1,0.2", "--vary", "seed=0,1", "--vary", "epochs=8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cwd = tmp_path_factory.mktemp("undisturbed")
    assert strata(cwd, "sweep", recipe(cwd), *COMMAND).rc == 0
    return left_by(cwd)


def left_by(cwd: Path) -> dict[str, Any]:
    return {path.name: solved(path) for path in (cwd / "runs/tiny/0/sweep_1").iterdir()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_process_that_is_stopped_goes_on(
    undisturbed: dict[str, Any], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = ("sweep", recipe(tmp_path), *COMMAND)
    first = signalled(tmp_path, number, "layer 1, epoch 1, 4 variants", 0.05, *command)
    assert first.rc == code, first.err
    last = strata(tmp_path, *command)
    assert last.rc == 0, last.err
    if number == signal.SIGINT:
        assert "lr=0.1,epochs=8,seed=0: going on in epoch" in last.err
    assert len(undisturbed) == 4
    assert left_by(tmp_path) == undisturbed


# ---- keeping one ---------------------------------------------------------------------------------


def record(place: Place) -> dict[str, Any]:
    return unseal(place.run / "layer_2/layer.json")


def test_a_kept_variant_is_what_train_would_have_left(base: Place, tmp_path: Path) -> None:
    """Weights, scales, logits and record; and the level above has the same bytes."""
    by_train, by_sweep = base.copy(tmp_path / "train"), base.copy(tmp_path / "sweep")
    assert by_train.do("materialize", "--layer", 2).rc == 0
    assert sweep(by_sweep, "lr=0.1,0.3", options=("--keep", "lr=0.1")).rc == 0
    assert by_sweep.weights() == by_train.weights()
    assert by_sweep.do("materialize", "--layer", 2).rc == 0
    assert by_sweep.files().keys() == by_train.files().keys()
    kept, solved_alone = record(by_sweep), record(by_train)
    assert kept["variant"] == {"name": "lr=0.1", "changes": {"schedule.lr": 0.1}}
    differ = {k for k in kept | solved_alone if kept.get(k) != solved_alone.get(k)}
    assert differ <= {"variant", "seconds", "outcome", "files"}, (
        "and memory is that of a solve alone"
    )
    assert set(kept) - {"variant"} == set(solved_alone)
    assert {n for n in kept["files"] if kept["files"][n] != solved_alone["files"][n]} == set()
    assert by_sweep.do("report").rc == 0
    assert by_sweep.do("verify", "--deep").rc == 0


def test_keeping_again_does_nothing(place: Place) -> None:
    assert sweep(place, "lr=0.1,0.3", options=("--keep", "best")).rc == 0
    again = sweep(place, "lr=0.1,0.3", options=("--keep", "best", "--json")).json
    assert again["done"] == []
    risks = {one["name"]: one["risk"] for one in again["variants"]}
    assert again["kept"] == min(risks, key=lambda name: risks[name])
    states = [layer["state"] for layer in place.do("status", "--json").json["layers"]]
    assert states == ["solved", "solved"]


def test_a_solved_layer_is_not_replaced(place: Place) -> None:
    assert place.do("train", "--layer", 2).rc == 0
    before = place.weights()
    refused = sweep(place, "lr=0.3", options=("--keep", "lr=0.3"))
    assert refused.rc == 8
    assert "clean --layer 2" in refused.error
    assert not (place.run / "sweep_2").exists(), "refused before anything was solved"
    assert sweep(place, "lr=0.3").rc == 0
    assert place.weights() == before, "a sweep leaves the layer alone"
    assert place.do("clean", "--layer", 2, "--yes").rc == 0
    kept = sweep(place, "lr=0.3", options=("--keep", "lr=0.3", "--json")).json
    assert kept["done"] == ["keep lr=0.3 as layer 2"], "what was swept was left"


def test_other_shapes_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    for keep in ("k=1", "best", "k=3"):
        refused = sweep(Place(tmp_path), "k=1,2", options=("--keep", keep))
        assert refused.rc == 2
        assert refused.error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


# ---- the other commands know it ------------------------------------------------------------------


def test_clean_knows_what_was_swept(swept: Place, tmp_path: Path) -> None:
    place = swept.copy(tmp_path / "place")
    there = place.run / "sweep_2"
    assert place.do("clean", "--layer", 2, "--yes", "--json").json["removed"] == []
    only = place.do("clean", "--sweeps", "--dry-run", "--json").json
    assert only["would_remove"] == ["the sweep of layer 2"]
    assert only["bytes"] == sum(p.stat().st_size for p in there.rglob("*") if p.is_file())
    whole = place.do("clean", "--dry-run", "--json").json["would_remove"]
    assert whole[-1] == "the sweep of layer 2"
    assert place.do("clean", "--sweeps").rc == 1, "it asks first"
    assert there.exists()
    assert place.do("clean", "--sweeps", "--yes").rc == 0
    assert not there.exists()
    assert (place.run / "layer_1/weights.safetensors").exists()


@pytest.mark.parametrize("command", [("status",), ("verify", "--deep"), ("plan",), ("evaluate",)])
def test_looking_minds_no_sweep(swept: Place, command: tuple[str, ...]) -> None:
    assert swept.do(*command).rc == 0


def test_verify_names_a_damaged_variant_and_repair_removes_it(swept: Place, tmp_path: Path) -> None:
    place = swept.copy(tmp_path / "place")
    path = variant(place, "lr=0.1,epochs=1,keep=last,k=1") / "test_logits.npy"
    path.write_bytes(path.read_bytes()[:-1])
    found = place.do("verify")
    assert found.rc == 10
    assert str(path) in found.out
    mended = place.do("verify", "--repair")
    assert mended.rc == 0
    assert f"removed with its variant, for `sweep` or `final` to solve again: {path}" in mended.out
    assert len(list((place.run / "sweep_2").iterdir())) == 15


def test_a_damaged_layer_is_mended_from_the_variant_it_was(place: Place) -> None:
    assert sweep(place, "lr=0.3", options=("--keep", "lr=0.3")).rc == 0
    before = place.weights()
    (place.run / "layer_2/weights.safetensors").write_bytes(b"")
    assert place.do("verify", "--repair").rc == 0
    assert place.weights() == before
    assert record(place)["variant"]["name"] == "lr=0.3"


def test_variants_that_do_not_fit_together_are_refused(place: Place) -> None:
    cap = ("--gpu-memory", "3MB")
    assert sweep(place, "seed=0", options=cap).rc == 0
    many = "seed=" + ",".join(map(str, range(200)))
    refused = sweep(place, many, options=cap)
    assert refused.rc == 5
    assert "variants of layer 2 need" in refused.error
    assert "--gpu-memory is 3.0 MB. Vary fewer at a time" in refused.error


@pytest.mark.parametrize("text", ["schedule.batch=32", "schedule.lrr=1"])
def test_what_cannot_vary_is_a_usage_error(place: Place, text: str) -> None:
    refused = sweep(place, text)
    assert refused.rc == 2
    assert refused.error.startswith("Error: --vary ")
    assert sweep(place, "lr=0.1", j=3).rc == 2
