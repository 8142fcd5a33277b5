"""ResNets for 32×32 pixels (He et al., 2016, Sec. 4.2): a stem, and three stages of blocks."""

from residual import Residual
from torch import nn


def blocks(channels: int = 3, width: int = 16, each: int = 5, stride: int = 1) -> list[nn.Module]:
    """1 + 3 · ``each`` blocks; the second and the third stage have half of the pixels and twice the
    width. Five in each stage are ResNet-32.

    Args:
        stride: of the stem.
    """
    stem = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    found: list[nn.Module] = [nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True))]
    inputs = width
    for stage in range(3):
        for number in range(each):
            outputs = width * 2**stage
            halved = stage > 0 and number == 0
            found.append(Residual(inputs, outputs, stride=2 if halved else 1))
            inputs = outputs
    return found
