"""`--log-dir`: what TensorBoard and readers of tables find is what the run has, each epoch once."""

import csv
import json
import sys
from pathlib import Path

import pytest
from runs import Place, here, made, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from strata.pipeline.curves import TABLE, shown_in

TEXT = tiny(layers=2, epochs=3, flip="false")


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two layers solved without any log. Not to be changed."""
    place = made(tmp_path_factory.mktemp("curves") / "place", 1, TEXT)
    assert place.do("train", "--layer", 2).rc == 0
    return place


def lines(place: Place, j: int) -> list[dict[str, float]]:
    text = (place.run / f"layer_{j}/epochs.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def rows(logs: Path) -> list[dict[str, str]]:
    with (logs / TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of one of its runs: figure → step → value."""
    found = EventAccumulator(str(directory)).Reload()
    names = found.Tags()["scalars"]
    assert all(len(found.Scalars(n)) == len({e.step for e in found.Scalars(n)}) for n in names)
    return {n: {e.step: e.value for e in found.Scalars(n)} for n in names}


def check(logs: Path, place: Place, j: int) -> None:
    """Both forms have every figure of every epoch of layer j, and no other."""
    curve, owner = lines(place, j), f"{place.root.name}/run"
    own = [row for row in rows(logs) if row["problem"] == f"layer_{j}"]
    assert [row["run"] for row in own] == [owner] * len(curve)
    assert [
        {k: float(v) for k, v in row.items() if k not in ("run", "problem")} for row in own
    ] == curve
    shown = scalars(logs / owner / f"layer_{j}")
    for name in curve[0].keys() - {"epoch"}:
        values = {line["epoch"]: pytest.approx(line[name], rel=1e-6) for line in curve}
        assert shown.pop(name) == values
    assert shown == {}


def test_every_epoch_of_a_layer_is_shown(tmp_path: Path, solved: Place) -> None:
    place = made(tmp_path / "place", 1, TEXT)  # solved before, without a log
    assert place.do("train", "--layer", 2, "--log-dir", tmp_path / "logs").rc == 0
    check(tmp_path / "logs", place, 1)
    check(tmp_path / "logs", place, 2)
    assert place.weights() == solved.weights()


def test_a_run_that_is_through_is_shown_too(tmp_path: Path, solved: Place) -> None:
    for _ in range(2):
        said = solved.do("train", "--layer", 2, "--log-dir", tmp_path)
        assert "nothing to do" in said.out
        check(tmp_path, solved, 1)
        check(tmp_path, solved, 2)


def test_a_run_that_was_stopped_goes_on_with_each_epoch_once(tmp_path: Path) -> None:
    run, logs = tmp_path / "r/0", tmp_path / "logs"
    curve = [
        {"epoch": e, "train_loss": 1 / e, "test_top1": None, "seconds": 1.0} for e in (1, 2, 3)
    ]
    with shown_in(logs, run) as show:
        for end in (1, 2, 3):
            show(run / "layer_1", curve[:end])
        show(run / "layer_10", curve)
    again = [*curve[:2], {**curve[2], "seconds": 2.0}, {**curve[2], "epoch": 4}]
    with shown_in(logs, run) as show:  # the third was shown, and was not saved
        for end in (3, 4):
            show(run / "layer_1", again[:end])
    assert [(row["problem"], row["epoch"]) for row in rows(logs)] == [
        *(("layer_10", e) for e in "123"),
        *(("layer_1", e) for e in "1234"),
    ]
    assert rows(logs)[3]["test_top1"] == ""
    found = scalars(logs / "r/0/layer_1")
    assert found.keys() == {"train_loss", "seconds"}
    assert found["seconds"] == {1: 1.0, 2: 1.0, 3: 2.0, 4: 1.0}


def test_two_runs_share_a_directory(tmp_path: Path) -> None:
    for seed in ("0", "1"):
        run = tmp_path / "digits" / seed
        with shown_in(tmp_path / "logs", run) as show:
            show(run / "sweep_1/lr=0.1,k=2", [{"epoch": 1, "train_loss": 2.5}])
    found = rows(tmp_path / "logs")
    assert [row["run"] for row in found] == ["digits/0", "digits/1"]
    assert found[0]["problem"] == "sweep_1/lr=0.1,k=2"
    assert scalars(tmp_path / "logs/digits/1/sweep_1/lr=0.1,k=2") == {"train_loss": {1: 2.5}}


def test_without_tensorboard_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "tiny.toml").write_text(TEXT)
    said = Place(tmp_path).do("train", "--layer", 1, "--log-dir", tmp_path / "logs")
    assert said.rc == 2
    assert said.error == ("Error: --log-dir needs TensorBoard: pip install 'strata[tensorboard]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00", b""])
def test_a_table_of_others_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    (tmp_path / TABLE).write_bytes(content)
    said = Place(tmp_path).do("train", "--layer", 1, "--log-dir", tmp_path)
    assert said.rc == 2
    assert f"{tmp_path / TABLE} is not of Strata" in said.error
    assert (tmp_path / TABLE).read_bytes() == content


def test_a_directory_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TEXT)
    (tmp_path / "logs").write_text("")
    said = here(
        "run", tmp_path / "tiny.toml", "--run", tmp_path / "run", "--log-dir", tmp_path / "logs"
    )
    assert said.rc == 11
    assert str(tmp_path / "logs") in said.error
