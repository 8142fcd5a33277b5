"""Device and compute dtype: chosen with a reason, refused where it cannot be."""

import pytest
import torch

from pipeline import device
from stages.errors import DeviceError

CPU = torch.device("cpu")


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(DeviceError, match="GPU only"):
        device.compute_dtype("float16", CPU)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_recipe_has_its_way(precision: str) -> None:
    assert device.compute_dtype(precision, CPU)[0] == precision


def test_auto_on_a_cpu_is_bfloat16_only_where_the_kernel_lists_it() -> None:
    chosen, reason = device.compute_dtype("auto", CPU)
    assert chosen == ("bfloat16" if device.cpu_has_bfloat16() else "float32")
    assert "CPU" in reason


def test_cuda_without_a_gpu_says_what_to_use() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="--device cpu or auto"):
        device.pick("cuda")
    assert device.pick("auto") == CPU
