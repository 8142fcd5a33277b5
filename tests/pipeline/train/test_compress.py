"""Layer-wise compression (Sec. 4.3): layers lose filters once solved; what follows is smaller."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import recipe as written
from command import strata
from interrupted import leftovers, signalled, snapshot
from root import MACHINES
from runs import Place, curve, made, open_run, tiny
from safetensors.numpy import load_file
from torchrun import with_ranks

from strata.pipeline.errors import RecipeError
from strata.pipeline.interrupt import Interruptions
from strata.pipeline.plan.compression import summary
from strata.pipeline.plan.plan import make_plan
from strata.pipeline.progress import size
from strata.pipeline.recipe.builtin import load, names
from strata.pipeline.recipe.recipe import Recipe, parse
from strata.pipeline.run import levels
from strata.pipeline.train import algorithm
from strata.pipeline.train.train import solve
from strata.stages.solve.evaluate import accuracies
from strata.store.fingerprint import fingerprint

COMPRESS = "\n[compress]\nkeep = {keep}\nepochs = {tuned}\nlr = 0.05\nrounds = {rounds}\n"


def compressed(keep: object = 0.5, tuned: int = 1, rounds: int = 1, **changes: object) -> str:
    return tiny(**changes) + COMPRESS.format(keep=keep, tuned=tuned, rounds=rounds)


def recipe(*arguments: Any, **changes: Any) -> Recipe:
    return parse(compressed(*arguments, **changes), "tiny")


# ---- what a recipe says -------------------------------------------------------------------------


def test_layers_are_solved_whole_on_what_is_left_of_those_below() -> None:
    """M = 8, and P after x_1: 4 channels are left of 8, P makes them 16."""
    r = recipe(layers=3)
    assert [(one.channels, one.width) for one in r.layers] == [(1, 4), (4, 8), (8, 8)]
    assert [(layer.channels, layer.width) for layer, _ in r.problems] == [(1, 8), (4, 16), (8, 16)]
    assert r.layers[1].convolved_channels == 16
    assert [c.channels for c in r.auxiliaries] == [4, 8, 8]
    assert [c.channels for _, c in r.problems] == [8, 16, 16]
    assert [c.width for c in r.auxiliaries] == [c.width for _, c in r.problems] == [8, 16, 16]
    assert r.fine_tuned(2) == ((r.layers[1], r.auxiliaries[1]),)


@pytest.mark.parametrize(
    ("keep", "rounds", "wanted"),
    [
        (0.5, 1, [(4,), (8,), (8,)]),
        (0.5, 2, [(6, 4), (12, 8), (12, 8)]),
        (0.1, 1, [(1,), (2,), (2,)]),
        (0.01, 3, [(6, 3, 1), (11, 6, 1), (11, 6, 1)]),
        ("[1.0, 0.25, 0.9]", 4, [(), (13, 10, 7, 4), (15, 14)]),
    ],
)
def test_filters_go_in_even_parts(keep: object, rounds: int, wanted: list[tuple[int, ...]]) -> None:
    r = recipe(keep, rounds=rounds)
    found = [tuple(layer.width for layer, _ in r.fine_tuned(j)) for j in (1, 2, 3)]
    assert found == wanted
    assert [one.width for one in r.layers] == [
        min((8, 16, 16)[i], *w, 99) for i, w in enumerate(found)
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("keep = 0.5", "keep = 0.0", ["'compress.keep' is 0.0", "above 0 and at most 1"]),
        ("keep = 0.5", "keep = 1.5", ["'compress.keep' is 1.5"]),
        ("keep = 0.5", "keep = [0.5, 0.5]", ["2 values", "3 layers"]),
        ("keep = 0.5", "keep = [0.5, 0.0, 1]", ["[0.5, 0.0, 1.0]"]),
        ("keep = 0.5", "keep = []", ["'compress.keep'"]),
        ("keep = 0.5", 'keep = "half"', ["a number or a list of numbers", "'half'"]),
        ("keep = 0.5", "keeps = 0.5", ["unknown key 'compress.keeps'", "Did you mean 'keep'?"]),
        ("keep = 0.5\n", "", ["missing key 'compress.keep'"]),
        ("rounds = 1", "rounds = 0", ["'compress.rounds' is 0"]),
        ("epochs = 1\nlr", "epochs = 0\nlr", ["'compress.epochs' is 0"]),
        ("lr = 0.05", "lr = -1.0", ["'compress.lr' is -1.0"]),
        ("[compress]", "[compres]", ["'compres'", "Did you mean 'compress'?"]),
    ],
)
def test_what_cannot_be_is_refused(old: str, new: str, words: list[str]) -> None:
    assert old in compressed()
    with pytest.raises(RecipeError) as caught:
        parse(compressed().replace(old, new), "tiny")
    for word in words:
        assert word in str(caught.value)


def test_recipes_without_it_are_what_they_were() -> None:
    """Hashes of their science from before there was such a table: runs made then go on."""
    known = {
        "digits": "b86d6f0b8be0",
        "cifar10-k3": "96898328989e",
        "imagenet-k3": "2e60350b99f3",
        "vgg11": "0d370890022d",
        "separability-small": "94e77bb54d98",
    }
    assert {n: fingerprint(load(n)[1].science())[:12] for n in known} == known
    for name in names():
        _, r = load(name)
        if r.compress is None:
            assert "compress" not in r.science()
            assert r.problems == tuple(zip(r.layers, r.auxiliaries, strict=True))
            assert r.fine_tuned(1) == ()
    assert recipe().science()["compress"]["keep"] == 0.5


def test_the_papers_network_is_five_layers_of_64() -> None:
    _, r = load("cifar10-k3-compress")
    assert [(one.channels, one.width) for one in r.layers] == [(3, 64), (64, 64), (64, 64)]
    assert r.auxiliaries[-1].convolutions == ((64, 64), (64, 64))
    assert [layer.width for layer, _ in r.problems] == [128] * 3
    assert [c.width for c in r.auxiliaries] == [128, 128, 64]


# ---- what a run does ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Three layers, each pruned twice; x_1 … x_3 are written. Not to be changed."""
    text = compressed(rounds=2, epochs=3, tuned=2, precision="uint8")
    return made(tmp_path_factory.mktemp("ran") / "place", 3, text)


def test_levels_are_as_large_as_planned(ran: Place) -> None:
    run = ran.overview().existing()
    plan, whole = (
        make_plan(r, run.data())
        for r in (run.recipe, dataclasses.replace(run.recipe, compress=None))
    )
    for depth in plan.depths:
        keys = levels.keys_at(run, depth.depth)
        store = ran.overview().store
        assert {key.name: store.state(key).nbytes for key in keys} == depth.levels
    assert [d.shape for d in plan.depths] == [(1, 8, 8), (4, 12, 12), (8, 6, 6), (8, 6, 6)]
    assert all(
        a.bytes < 0.52 * b.bytes for a, b in zip(plan.depths[1:], whole.depths[1:], strict=True)
    )


def test_removed_filters_are_gone_from_the_weights(ran: Place) -> None:
    shapes = [
        load_file(ran.run / f"layer_{j}/weights.safetensors")["convolution.weight"].shape
        for j in (1, 2, 3)
    ]
    assert shapes == [(4, 1, 3, 3), (8, 16, 3, 3), (8, 8, 3, 3)]
    c = load_file(ran.run / "layer_2/auxiliary.safetensors")
    assert c["convolutions.0.weight"].shape == (16, 8, 3, 3)
    assert load_file(ran.run / "layer_2/quantiser.safetensors")["scale"].shape == (8,)


def test_the_record_says_what_it_cost(ran: Place) -> None:
    run = ran.overview().existing()
    for j, of in ((1, 8), (2, 16), (3, 16)):
        record = run.layer(j)
        assert record is not None
        found = record["compression"]
        assert found["solved_filters"] == of
        assert len(found["kept"]) == of // 2
        assert found["kept"] == sorted(set(found["kept"]) & set(range(of)))
        first, last = found["removals"]
        assert (first["filters"], last["filters"]) == (3 * of // 4, of // 2)
        assert (first["epochs_before"], last["epochs_before"]) == (3, 5)
        lines = (run.layer_directory(j) / "epochs.jsonl").read_text().splitlines()
        tops = [json.loads(line)["test_top1"] for line in lines]
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 8))
        assert first["test_before"] == tops[2]
        assert first["test_after"] == last["test_before"] == tops[4]
        assert last["test_after"] == tops[6] == record["test"]["top1"]
        assert record["kept_epoch"] == 7
        labels = levels_of_tests(ran)
        logits = np.load(run.layer_directory(j) / "test_logits.npy")
        assert accuracies(logits, labels)["top1"] == last["test_after"]


def levels_of_tests(place: Place) -> np.ndarray:
    found = place.overview()
    (key,) = (k for k in levels.keys_at(found.existing(), 0) if k.split == "test")
    return found.store.open(key).array("label")


def test_status_and_report_show_it(ran: Place, tmp_path: Path) -> None:
    place = ran.copy(tmp_path / "place")
    told = place.do("status", "--json").json["layers"]
    record = place.overview().existing().layer(2)
    assert told[1]["compression"] == summary(record)
    assert (told[1]["compression"]["filters"], told[1]["compression"]["of"]) == (8, 16)
    first, last = record["compression"]["removals"]  # pyright: ignore
    points = 100 * (last["test_after"] - first["test_before"])
    assert told[1]["compression"]["points"] == points
    said = " ".join(place.do("status").out.split())
    assert "layer 2, 8 of" in said
    assert f"({points:+.2f}" in said
    assert place.do("report").rc == 0
    page = (place.run / "report.html").read_text("utf-8")
    assert "<td>8 of 16</td>" in page
    assert f"<td>{points:+.2f}</td>" in page
    assert json.loads((place.run / "report.json").read_text())["recipe"]["compress"]["rounds"] == 2


def test_plan_says_with_and_without(ran: Place) -> None:
    value = ran.do("plan", "--json").json
    whole = make_plan(
        parse(tiny(epochs=3, precision="uint8"), "tiny"), {"train": 1437, "test": 360}
    )
    saved = value["compression"]
    assert saved["filters"] == [
        {"layer": 1, "filters": 4, "of": 8},
        {"layer": 2, "filters": 8, "of": 16},
        {"layer": 3, "filters": 8, "of": 16},
    ]
    assert saved["bytes_without"] == [d.bytes for d in whole.depths]
    assert saved["total_bytes_without"] == whole.total
    assert saved["seconds"] is None, "nothing is known of the machine"
    text = " ".join(ran.do("plan").out.split())
    planned = make_plan(ran.overview().recipe, {"train": 1437, "test": 360})
    x_1, without = (size(plan.depths[1].bytes) for plan in (planned, whole))
    wanted = f"leaves 4 of 8, 8 of 16, 8 of 16 filters: x_1 {x_1} instead of {without}, x_2"
    assert wanted in text
    assert f"{size(planned.total)} of disk in total instead of {size(whole.total)}" in text


def test_plan_says_seconds_where_the_machine_is_known(ran: Place, tmp_path: Path) -> None:
    machine = MACHINES
    (one, *_) = sorted(machine.glob("*.toml"))
    value = ran.do("plan", "--json", "--machine", one).json
    saved = value["compression"]
    assert saved["seconds"] == value["economics"]["seconds"]["best"]
    place = Place(tmp_path)
    (tmp_path / "tiny.toml").write_text(tiny(epochs=3, precision="uint8"))
    assert saved["seconds_without"] == pytest.approx(
        place.do("plan", "--json", "--machine", one).json["economics"]["seconds"]["best"], rel=0.01
    )


def test_a_plan_counts_fine_tuning() -> None:
    """SGD steps: 2 + 2 · 3 epochs; operations shrink with the filters."""
    plain, less = (make_plan(r).depths[2] for r in (parse(tiny(), ""), recipe(tuned=3, rounds=2)))
    assert less.steps == plain.steps // 2 * 8
    r = recipe(tuned=3, rounds=2)

    def forward(problem: Any) -> int:
        layer, auxiliary = problem
        x = r.shape(1, 8)
        return layer.operations(x) + auxiliary.operations(layer.output(x))

    whole, *tuned = map(forward, (r.problems[1], *r.fine_tuned(2)))
    assert less.operations == pytest.approx(3 * 1437 * (2 * whole + 3 * sum(tuned)))
    assert less.operations_below == 1437 * 8 * r.layers[0].operations((1, 8, 8))


@pytest.mark.parametrize(("views", "keep"), [('"canvas"', "last"), ("2", "best"), ("0", "last")])
def test_the_cache_stays_invisible(tmp_path: Path, views: str, keep: str) -> None:
    """Read or recomputed: the same losses, the same filters, the same weights."""
    text = tiny(views=views, keep=keep, epochs=1).replace("batch = 64", "batch = 240")
    text += COMPRESS.format(keep=0.5, tuned=1, rounds=2)
    cached, again = (open_run(tmp_path / name, text) for name in ("cached", "again"))
    algorithm.make(cached, solve=2)
    for j in (1, 2):
        solve(again, j, cached=False)
        one, other = (s.run.layer(j) for s in (cached, again))
        assert one is not None
        assert other is not None
        assert curve(cached, j) == curve(again, j)
        same = ("weights", "auxiliary", "compression", "kept_epoch")
        assert {k: one[k] for k in same} == {k: other[k] for k in same}


def test_the_best_of_fine_tuning_may_be_none_of_it(tmp_path: Path) -> None:
    """A rate that ruins what it touches: kept is the iterate right after the removal."""
    text = tiny(keep="best", layers=1, downsample="[]", epochs=2) + COMPRESS.format(
        keep=0.9, tuned=1, rounds=1
    ).replace("0.05", "3.0")
    session = open_run(tmp_path, text)
    solve(session, 1)
    record = session.run.layer(1)
    assert record is not None
    (removal,) = record["compression"]["removals"]
    assert record["kept_epoch"] == removal["epochs_before"] == 2
    assert record["test"]["top1"] == removal["test_removed"] == removal["test_after"]


def test_a_share_of_1_leaves_a_layer_alone(tmp_path: Path) -> None:
    text = compressed("[1.0, 0.5]", layers=2, epochs=1)
    some, none = (
        open_run(tmp_path / n, t) for n, t in (("a", text), ("b", tiny(layers=2, epochs=1)))
    )
    for session in (some, none):
        algorithm.make(session, solve=1)
    one, other = (s.run.layer(1) for s in (some, none))
    assert one is not None
    assert other is not None
    assert one["weights"] == other["weights"]
    assert "compression" not in one
    assert some.run.nodes()[1].fingerprint == none.run.nodes()[1].fingerprint


def test_a_divided_step_removes_the_same_filters(tmp_path: Path) -> None:
    """Filters are judged in micro-batches, too; only batch norm sees others."""
    text = compressed(layers=1, downsample="[]", epochs=1).replace(
        "batch_norm = true", "batch_norm = false"
    )
    whole, parts = (open_run(tmp_path / name, text) for name in ("whole", "parts"))
    parts.run.facts["accumulate"] = [4]  # pyright: ignore
    kept = []
    for session in (whole, parts):
        solve(session, 1)
        kept.append(session.run.layer(1)["compression"]["kept"])  # pyright: ignore
    assert kept[0] == kept[1]


def test_memory_is_that_of_the_whole_layer(tmp_path: Path) -> None:
    """The step before removal is the largest; its peak is what was expected."""
    session = open_run(tmp_path, compressed(layers=2, epochs=1))
    algorithm.make(session, solve=2)
    for j in (1, 2):
        outcome = session.run.layer(j)["outcome"]  # pyright: ignore
        expected, measured = (outcome[side]["peak_bytes"] for side in ("expected", "measured"))
        assert measured == pytest.approx(expected, rel=0.04)


# ---- stopped and killed -------------------------------------------------------------------------


class StopAt(Interruptions):
    """Ends the work when it is asked for the n-th time: as a kill does, or politely."""

    def __init__(self, at: int, *, polite: bool) -> None:
        self.left, self.polite = at, polite

    @property
    def asked(self) -> bool:  # pyright: ignore
        self.left -= 1
        if self.left == 0 and not self.polite:
            raise KeyboardInterrupt  # before anything is saved
        return self.left == 0


SMALL = tiny(layers=1, downsample="[]", epochs=1, keep="best").replace("batch = 64", "batch = 480")
SMALL += COMPRESS.format(keep=0.5, tuned=1, rounds=2)
LOOKS = 10
"""Between the batches of 3 epochs, and of what filters are judged on twice; two batches each."""


def outcome_of(place: Path) -> dict[str, Any]:
    found = {p.name: p.read_bytes() for p in sorted((place / "run/layer_1").glob("*.safetensors"))}
    record = json.loads((place / "run/layer_1/layer.json").read_text())["body"]
    lines = (place / "run/layer_1/epochs.jsonl").read_text().splitlines()
    told = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return {**found, "compression": record["compression"], "curve": told}


@pytest.mark.parametrize("polite", [True, False], ids=["asked to stop", "killed"])
def test_stopped_anywhere_it_ends_at_the_same_bytes(tmp_path: Path, polite: bool) -> None:
    begun = open_run(tmp_path / "begun", SMALL)
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")
    counted = StopAt(10**6, polite=False)
    whole = dataclasses.replace(open_run(tmp_path / "whole", SMALL), stop=counted)
    solve(whole, 1)
    wanted = outcome_of(tmp_path / "whole")
    assert 10**6 - counted.left == LOOKS
    assert begun.run.layer(1) is None
    for at in range(1, LOOKS + 1):
        place = tmp_path / f"at-{at}"
        shutil.copytree(tmp_path / "begun", place)
        stopped = dataclasses.replace(open_run(place, SMALL), stop=StopAt(at, polite=polite))
        with pytest.raises(KeyboardInterrupt):
            solve(stopped, 1)
        solve(open_run(place, SMALL), 1)
        assert outcome_of(place) == wanted, f"stopped at look {at}"
        assert not (place / "run/layer_1/checkpoint.safetensors").exists()


def process(cwd: Path) -> list[str]:
    table = {"compress__keep": 0.5, "compress__epochs": 5, "compress__lr": 0.05}
    return ["run", written(cwd, schedule__epochs=2, network__layers=2, compress__rounds=2, **table)]


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 while filters are judged or fine-tuned, and Ctrl-C in the middle of fine-tuning."""
    quiet, rough = tmp_path / "quiet", tmp_path / "rough"
    quiet.mkdir()
    assert strata(quiet, *process(quiet)).rc == 0
    rough.mkdir()
    first = "layer 1: removed 2 filters"
    kill = signalled(rough, signal.SIGKILL, first, 0.2, *process(rough))
    assert kill.rc == -signal.SIGKILL
    stop = signalled(rough, signal.SIGINT, first, 0.0, *process(rough))
    assert stop.rc == 130, stop.err
    assert "layer 1, fine-tuning 1 of 2: going on in epoch" in stop.err
    last = strata(rough, *process(rough))
    assert last.rc == 0, last.err
    assert "layer 1, fine-tuning 2 of 2: going on in epoch" in last.err
    assert first not in last.err
    assert leftovers(rough) == []
    want, found = snapshot(quiet), snapshot(rough)
    assert list(found) == list(want)
    assert [path for path in want if found[path] != want[path]] == []


@pytest.mark.slow
def test_two_ranks_remove_the_filters_that_one_removes(tmp_path: Path) -> None:
    """At a rate at which rounding does not decide; each rank judges its part of every batch."""
    found = []
    for name in ("one", "two"):
        cwd = tmp_path / name
        cwd.mkdir()
        table = {"compress__keep": 0.5, "compress__epochs": 1, "compress__lr": 0.01}
        line = ["train", written(cwd, schedule__lr=0.01, **table), "--layer", 1]
        if name == "one":
            assert strata(cwd, *line).rc == 0
        else:
            rc, _, err = with_ranks(cwd, 2, *line)
            assert rc == 0, err
        record = json.loads((cwd / "runs/tiny/0/layer_1/layer.json").read_text())["body"]
        found.append((record["compression"], record["train"]["loss"]))
    (one, loss), (two, other) = found
    assert one["kept"] == two["kept"]
    assert other == pytest.approx(loss, rel=2e-3)
    tops = [
        [removal[k] for k in ("test_before", "test_removed", "test_after")]
        for removal in (*one["removals"], *two["removals"])
    ]
    np.testing.assert_allclose(tops[0], tops[1], atol=0.01)


# ---- with other commands ------------------------------------------------------------------------


def test_a_sweep_is_refused_in_one_line(ran: Place) -> None:
    said = ran.do("sweep", "--layer", 1, "--vary", "lr=0.1")
    assert said.rc == 2
    for word in ("[compress]", "removes filters", "`final`"):
        assert word in said.error


def test_other_commands_work_on_what_is_left(ran: Place, tmp_path: Path) -> None:
    place = ran.copy(tmp_path / "place")
    assert "nothing to do" in place.do("materialize", "--layer", 3).out
    final = place.do("final", "--vary", "auxiliary.width=4,6", "--json").json
    assert len(final["variants"]) == 2
    probes = place.do("probe", "--json").json["probes"]
    assert len(probes) == 3
    assert (
        place.do("baseline", "--json").json["result"]["parameters"]
        == sum(layer.parameters for layer in place.overview().recipe.layers)
        + place.overview().recipe.auxiliaries[-1].parameters
    )
    exported = place.do("export", "--to", tmp_path / "model", "--json")
    assert exported.rc == 0, exported.err
    assert load_file(tmp_path / "model/weights.safetensors")
    assert place.do("evaluate", "--json").json["layers"][2]["test"]["top1"] is not None
    assert place.do("explain", "--layer", 3, "--json").json[0]["state"] == "complete"
    assert place.do("verify", "--deep").rc == 0


def test_a_lost_layer_is_made_again_with_the_same_filters(ran: Place, tmp_path: Path) -> None:
    place = ran.copy(tmp_path / "place")
    before, files = place.weights(), place.files()
    path = place.run / "layer_2/weights.safetensors"
    body = bytearray(path.read_bytes())
    body[-5] ^= 1
    path.write_bytes(body)
    said = place.do("verify", "--deep", "--repair")
    assert said.rc == 0, said.err
    assert place.weights() == before
    assert {n: b for n, b in place.files().items() if "/c." in n} == {
        n: b for n, b in files.items() if "/c." in n
    }


def test_micro_batches_fit_the_layer_before_removal(tmp_path: Path) -> None:
    """What has to fit is layer 1 as it is solved; what is kept of it would need less."""
    place, cap = Place(tmp_path), "200kB"
    rows = []
    for text in (tiny(layers=1, downsample="[]", epochs=1), SMALL.replace("480", "64")):
        (tmp_path / "tiny.toml").write_text(text)
        rows.append(place.do("plan", "--gpu-memory", cap, "--json").json["accumulate"])
    assert rows[0] == rows[1] != [1]
    said = place.do("run", "--gpu-memory", cap)
    assert said.rc == 0, said.err
    record = place.overview().existing().layer(1)
    assert record is not None
    assert record["peak_memory_bytes"] <= 200e3
    assert len(record["compression"]["kept"]) == 4
