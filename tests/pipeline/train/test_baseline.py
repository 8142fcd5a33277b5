"""End to end: checkpointing changes memory and not one weight; the command goes on where it was."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command import recipe, strata
from epochs import run_epoch
from interrupted import signalled
from runs import here, inside, tiny
from torch import Tensor, nn

from strata.pipeline.recipe.network import AuxiliaryTable, NetworkTable
from strata.stages.network.network import Layer
from strata.stages.network.spec import AuxiliarySpec, LayerSpec
from strata.stages.solve.baseline import EndToEnd, build_end_to_end
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver
from strata.store.files.publish import replace, sealed, unseal

CPU = torch.device("cpu")
X = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 10, (48,), generator=torch.Generator().manual_seed(1))
BATCH = 16


def specs(*, batch_norm: bool) -> tuple[tuple[LayerSpec, ...], AuxiliarySpec]:
    layers = NetworkTable(4, 8, downsample=(2,), batch_norm=batch_norm).specs((3, 16, 16))
    auxiliary = AuxiliaryTable(k=2, width=8, batch_norm=batch_norm)
    return layers, auxiliary.specs(layers, classes=10, side=8)[-1]


def solver(
    *, checkpointing: bool = False, accumulate: int = 1, batch_norm: bool = True
) -> Solver[EndToEnd]:
    schedule = SGDSchedule("step", 2, BATCH, 0.1, 0.9, 5e-4, accumulate=accumulate)
    layers, auxiliary = specs(batch_norm=batch_norm)
    network = build_end_to_end(layers, auxiliary, 7, checkpointing=checkpointing)
    return Solver(network, schedule, CPU, torch.float32)


def batches() -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(BATCH), Y.split(BATCH), strict=True))


def trained(**options: Any) -> dict[str, Tensor]:
    """Every weight and buffer after two epochs of three steps."""
    found = solver(**options)
    for _ in range(2):
        run_epoch(found, batches(), 3)
    return found.problem.state_dict()


# ---- the network ---------------------------------------------------------------------------------


def test_it_is_the_frozen_layers_and_the_last_classifier() -> None:
    layers, auxiliary = specs(batch_norm=True)
    network = build_end_to_end(layers, auxiliary, 0)
    count = sum(p.numel() for p in network.parameters())
    assert count == sum(spec.parameters for spec in layers) + auxiliary.parameters
    x = X[:2]
    for layer in network.eval().layers:
        x = layer(x)
    assert torch.equal(network(X[:2]), network.auxiliary(x))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_checkpointing_ends_at_the_same_bits(accumulate: int, batch_norm: bool) -> None:
    """To the bit, running statistics and counts included: the same kernels see the same values a
    second time, and what batch norm learns of a batch is learnt once."""
    options: dict[str, Any] = {"accumulate": accumulate, "batch_norm": batch_norm}
    plain, saved = trained(**options), trained(**options, checkpointing=True)
    assert plain.keys() == saved.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, saved[name]), name
    if batch_norm:
        assert plain["layers.0.norm.num_batches_tracked"] == 6 * accumulate


def test_each_layer_is_computed_again_once_and_not_for_a_test() -> None:
    calls: list[nn.Module] = []
    found = solver(checkpointing=True)
    for layer in found.problem.layers:
        layer.register_forward_pre_hook(lambda module, _: calls.append(module))
    found.step(*batches()[0])
    assert len(calls) == 2 * 4
    calls.clear()
    found.problem.eval()
    with torch.inference_mode():
        found.problem(X)
    assert len(calls) == 4


def test_batch_norm_is_as_before_after_a_repetition_that_was_cut_short() -> None:
    """As checkpointing itself does: it stops a repetition once it has what it wants."""
    found = solver(checkpointing=True)
    found.step(*batches()[0])
    for layer in found.problem.layers:
        assert isinstance(layer, Layer)
        assert isinstance(layer.norm, nn.BatchNorm2d)
        assert layer.norm.momentum == 0.1
        assert layer.norm.num_batches_tracked is not None


def test_micro_batches_take_the_step_of_the_whole_batch() -> None:
    """Without batch norm, up to the order of sums."""
    whole, parts = trained(batch_norm=False), trained(batch_norm=False, accumulate=4)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=1e-4, atol=1e-5)


def test_both_save_memory_and_together_most() -> None:
    def peak(**options: Any) -> int:
        found = solver(**options)
        run_epoch(found, batches()[:2], 2)
        return found.progress.peak_bytes

    plain, saved, micro = peak(), peak(checkpointing=True), peak(accumulate=8)
    both = peak(checkpointing=True, accumulate=8)
    assert both < min(saved, micro)
    assert max(saved, micro) < 0.8 * plain


# ---- the command ---------------------------------------------------------------------------------

EPOCHS = 12
PLACE = Path("runs/tiny/0/baseline")
FLAGS = ("--checkpointing", "--micro-batch", "32")


def command(cwd: Path, *flags: str) -> list[str]:
    return ["baseline", recipe(cwd, schedule__epochs=EPOCHS), *flags]


def snapshot(cwd: Path, variant: str) -> dict[str, Any]:
    """What must not depend on how often it was interrupted."""
    place = cwd / PLACE / variant
    found: dict[str, Any] = {p.name: p.read_bytes() for p in sorted(place.glob("*[sy]"))}
    lines = [json.loads(line) for line in (place / "epochs.jsonl").read_text().splitlines()]
    found["epochs"] = [{k: v for k, v in ln.items() if k != "seconds"} for ln in lines]
    body = json.loads((place / "result.json").read_text())["body"]
    left_out = ("seconds", "images_per_s", "peak_process_bytes")
    return {**found, "result": {k: v for k, v in body.items() if k not in left_out}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cwd = tmp_path_factory.mktemp("undisturbed")
    found = {"last": inside(cwd, *command(cwd, *FLAGS), "--json")}
    return {**found, "snapshot": snapshot(cwd, "checkpointing-micro-32")}


def disturbed(cwd: Path) -> dict[str, Any]:
    """Stopped, then killed, each time in the middle."""
    line = f"epoch 1 of {EPOCHS}"
    first = signalled(cwd, signal.SIGINT, line, 0.1, *command(cwd, *FLAGS))
    kept = (cwd / PLACE / "checkpointing-micro-32/checkpoint.safetensors").exists()
    second = signalled(cwd, signal.SIGKILL, "going on in epoch", 0.1, *command(cwd, *FLAGS))
    last = strata(cwd, *command(cwd, *FLAGS))
    left = [str(p) for p in (cwd / PLACE).rglob("*") if p.name.startswith((".tmp-", "checkpoint."))]
    found = {"first": first, "kept": kept, "second": second, "last": last, "left": left}
    return {**found, "snapshot": snapshot(cwd, "checkpointing-micro-32")}


@pytest.mark.slow
def test_stopped_and_killed_it_ends_at_the_same_bytes(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    found = disturbed(tmp_path)
    assert found["first"].rc == 130, found["first"].err
    assert found["kept"]
    assert found["second"].rc in (0, -signal.SIGKILL), "a quick machine ends first"
    assert found["last"].rc == 0, found["last"].err
    assert found["left"] == []
    assert found["snapshot"] == undisturbed["snapshot"]


def test_it_learns_and_says_what_it_took(undisturbed: dict[str, Any]) -> None:
    said = undisturbed["last"].json
    result = said["result"]
    assert said["done"] == ["train end to end, checkpointing-micro-32"]
    assert said["greedy"] is None
    assert result["variant"] == "checkpointing-micro-32"
    assert (result["micro_batch"], result["accumulate"]) == (32, 2)
    assert result["test"]["top1"] > 0.5
    assert result["test"]["top5"] >= result["test"]["top1"]
    weights = 4 * result["parameters"]
    assert 3 * weights < result["peak_tensor_bytes"] < result["peak_process_bytes"]
    assert result["images_per_s"] * result["seconds"] == pytest.approx(EPOCHS * 22 * 64)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished greedy run with a plain baseline."""
    root = tmp_path_factory.mktemp("place")
    (root / "tiny.toml").write_text(tiny(layers=2, epochs=1, keep="best"))
    assert do(root, "run").rc == 0
    assert do(root, "baseline").rc == 0
    return root


def do(root: Path, name: str, *arguments: object) -> Any:
    where = ("--run", root / "run", "--store", root / "store")
    return here(name, root / "tiny.toml", *where, *arguments)


def test_it_stands_beside_the_greedy_run(place: Path) -> None:
    again = do(place, "baseline")
    assert again.out.startswith("nothing to do: everything is there\n")
    known, greedy = (
        do(place, "evaluate", "--json").json["layers"][-1],
        do(place, "baseline", "--json"),
    )
    assert greedy.json["greedy"]["test"] == known["test"]
    assert greedy.json["greedy"]["ensemble"] == known["ensemble"]["probabilities"]
    for row in ("end to end, plain", "greedy, last layer", "greedy, ensemble"):
        assert row in again.out
    assert f"{100 * known['test']['top1']:.2f} %" in again.out
    record = json.loads((place / "run/baseline/plain/result.json").read_text())["body"]
    assert record["kept_epoch"] in (0, 1), "keep = best"


def test_verify_sees_its_files_and_repair_makes_room_for_a_new_one(place: Path) -> None:
    weights = place / "run/baseline/plain/weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    told = do(place, "verify")
    assert told.rc == 10
    assert f"{weights}: it is not what result.json says" in told.out
    assert do(place, "verify", "--repair").rc == 0
    assert not weights.parent.exists()
    assert do(place, "baseline").rc == 0
    assert weights.read_bytes() == good


def test_status_names_it_and_what_was_begun(place: Path, tmp_path: Path) -> None:
    other = shutil.copytree(place, tmp_path / "other")
    test = do(other, "baseline", "--json").json["result"]["test"]
    top1, none = test["top1"], {"test": None, "test_accuracy": None}
    plain = {"variant": "plain", "state": "trained", "epochs": 1}
    plain |= {"test": test, "test_accuracy": top1}
    begun = {"variant": "micro-32", "state": "partial", "epochs": 0, **none}
    assert do(other, "status", "--json").json["baselines"] == [plain]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("strata.pipeline.train.train.conclude", _killed)
        patched.setattr("strata.pipeline.train.solving.CHECKPOINT_SECONDS", -1.0)
        with pytest.raises(ZeroDivisionError):
            do(other, "baseline", "--micro-batch", 32)
    assert do(other, "status", "--json").json["baselines"] == [{**begun, "epochs": 1}, plain]
    (other / "run/baseline/micro-32/checkpoint.safetensors").write_bytes(b"no header")
    assert do(other, "status", "--json").json["baselines"] == [{**begun, "epochs": None}, plain]
    row = next(line for line in do(other, "status").out.splitlines() if "baseline plain" in line)
    assert "trained, epochs: 1" in row
    assert f"{100 * top1:.2f} %" in row


def test_status_says_whether_the_images_have_changed(place: Path, tmp_path: Path) -> None:
    other = shutil.copytree(place, tmp_path / "other")
    path = other / "run/baseline/plain/result.json"
    replace(path.parent, path.name, sealed({**unseal(path), "input": "0" * 64}))
    (found,) = do(other, "status", "--json").json["baselines"]
    assert found["state"] == "stale"


def _killed(*_: object) -> None:
    raise ZeroDivisionError


def test_clean_names_it_and_removes_it_with_the_run_only(place: Path) -> None:
    assert "baseline" not in do(place, "clean", "--layer", 1, "--dry-run").out
    assert "baseline" not in do(place, "clean", "--features", "--dry-run").out
    assert "layer 2, baseline plain (" in do(place, "clean", "--dry-run").out


def test_a_micro_batch_beyond_the_batch_is_refused(place: Path) -> None:
    told = do(place, "baseline", "--micro-batch", 65)
    assert told.rc == 2
    assert "--micro-batch is 65; 'schedule.batch' is only 64" in told.error
    assert do(place, "baseline", "--micro-batch", 0).rc == 2
    assert not (place / "run/baseline/micro-65").exists()


def test_a_rate_that_diverges_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(tiny(epochs=3).replace("lr = 0.1", "lr = 1e30"))
    told = do(tmp_path, "baseline")
    assert told.rc == 9
    assert "Lower 'schedule.lr' (1e+30) in a copy of the recipe" in told.error
