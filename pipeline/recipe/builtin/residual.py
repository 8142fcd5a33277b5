"""Residual blocks (He et al., 2016) for small images: a stem, and one block for every width."""

from torch import Tensor, nn, relu


class Residual(nn.Module):
    """Two convolutions beside a shortcut; N×C×H×W in, N×width×H/stride×W/stride out."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        changes = stride > 1 or channels != width
        self.shortcut = nn.Conv2d(channels, width, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.second(self.first(x)) + self.shortcut(x))


def blocks(channels: int = 1, width: int = 32) -> list[nn.Module]:
    """Three blocks; the third has half of the pixels and twice the width."""
    stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return [
        nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        Residual(width, width),
        Residual(width, 2 * width, stride=2),
    ]
