"""The thin paths that only a GPU takes: the same line, on the device, in mixed precision."""

from pathlib import Path

import pytest
import torch
from runs import open_run, tiny

from strata.pipeline.feed.problem_feed import ProblemFeed
from strata.pipeline.run import device
from strata.pipeline.train import algorithm
from strata.stages.features.calibrate import calibrate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_is_taken_with_mixed_precision() -> None:
    chosen = device.pick("auto")
    assert chosen.type == "cuda"
    assert device.compute_dtype("auto", chosen)[0] in ("bfloat16", "float16")


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_three_layers_learn_on_the_gpu(tmp_path: Path, compute: str) -> None:
    session = open_run(tmp_path, tiny(epochs=8), device="cuda", compute=compute)
    algorithm.make(session, solve=3, write=3)
    record = session.run.layer(3)
    assert record is not None
    assert record["test"]["top1"] > 0.8
    assert record["peak_memory_bytes"] > 0


@pytest.mark.parametrize("views", ['"canvas"', "2"])
def test_batches_from_the_cache_are_the_recomputed_ones(tmp_path: Path, views: str) -> None:
    session = open_run(tmp_path, tiny(epochs=1, views=views), device="cuda")
    algorithm.make(session, write=2)
    with ProblemFeed(session, 2) as cached, ProblemFeed(session, 2, cached=False) as recomputed:
        for (x, y), (x_again, y_again) in zip(cached.epoch(1), recomputed.epoch(1), strict=True):
            assert x.is_cuda
            torch.testing.assert_close(x, x_again, rtol=1e-3, atol=1e-3)
            assert torch.equal(y, y_again)


@pytest.mark.parametrize("precision", ["uint8", "uint4"])
def test_codes_are_the_same_on_every_device(precision: str) -> None:
    x = torch.randn(64, 8, 12, 11, generator=torch.Generator().manual_seed(0))
    here, there = calibrate([x], precision, 99.9), calibrate([x.cuda()], precision, 99.9)
    assert here.channels == there.channels
    moved = there.quantiser.to(torch.device("cuda"))
    codes = moved.encode(x.cuda())
    assert torch.equal(codes.cpu(), here.quantiser.encode(x))
    assert torch.equal(moved.decode(codes, 8).cpu(), here.quantiser.rounded(x))
