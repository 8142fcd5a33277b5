"""Taking up a run: what it remembers of the machine and of the images, and what it does not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from root import MACHINES
from runs import tiny

from strata.pipeline.materialize.images import ensure_images
from strata.pipeline.options import Options
from strata.pipeline.plan import hardware
from strata.pipeline.plan.machine import load
from strata.pipeline.progress import Reporter
from strata.pipeline.run import device, overview, record
from strata.pipeline.run.session import Session, open_session
from strata.stages.errors import DataError, DeviceError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny())
    return path


def opened(text: Path, source: str | None = None) -> Session:
    found = overview.find(Options(str(text), text.parent / "run", text.parent / "store"))
    options = Options(device="cpu", data=source, accept_data=True)
    return open_session(found, options, report=Reporter())


def test_a_mistaken_source_is_forgotten(text: Path) -> None:
    """Images that were never read do not bind the run: the next plain command goes."""
    with pytest.raises(DataError):
        ensure_images(opened(text, "imagefolder:nowhere"))
    session = opened(text)
    assert session.run.source == "digits"
    ensure_images(session)


def test_a_source_that_was_read_is_remembered(text: Path) -> None:
    other = text.parent / "other.npz"
    make_npz(other)
    ensure_images(opened(text, f"npz:{other}"))
    assert opened(text).run.source == f"npz:{other}"


@pytest.mark.parametrize(
    ("where", "threads"), [(hardware.described(), 3), ("Z80, 1 cores, 64 kB", device.GATHERERS)]
)
def test_rows_are_gathered_by_as_many_threads_as_were_measured_here(
    text: Path, where: str, threads: int
) -> None:
    rates = replace(load(MACHINES / "laptop.toml"), gatherers=3, hardware=where)
    assert replace(opened(text), rates=rates).read_options.threads == threads


def make_npz(path: Path) -> None:

    labels = np.arange(40) % 10
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


def test_a_run_made_for_float16_is_not_taken_up_on_a_cpu(text: Path) -> None:
    session = opened(text)
    facts = {**session.run.facts, "compute": "float16"}
    record.write(session.run.directory / "run.json", facts)
    with pytest.raises(DeviceError, match="float16"):
        opened(text)


def test_the_dtype_is_decided_once(text: Path) -> None:
    first = opened(text)
    assert opened(text).run.compute == first.run.compute == "float32"


def test_what_a_killed_process_was_writing_of_a_layer_goes(text: Path) -> None:
    """And nothing else: other processes may be making the run's own records at this moment."""
    run = opened(text).run
    half, others, whole = (
        run.directory / name
        for name in ("layer_1/.tmp-0123", ".tmp-4567", "layer_1/weights.safetensors")
    )
    whole.parent.mkdir()
    for path in (half, others, whole):
        path.write_bytes(b"bytes")
    run.tidy()
    assert [path.exists() for path in (half, others, whole)] == [False, True, True]
