"""Small transformers (Vaswani et al., 2017): of images (Dosovitskiy et al., 2021), and of text."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class TransformerBlock(nn.Module):
    """Attention, and a perceptron of two layers, each beside a shortcut; N×token×width in and out.

    Of text, ``tokens`` long, a token sees itself and those before it, the nearer the more: each
    head by a slope of its own (Press et al., 2022).
    """

    bias: Tensor | None

    def __init__(self, width: int, heads: int, tokens: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        places, slopes = torch.arange(tokens), 2.0 ** -torch.arange(heads)
        behind = places[:, None] - places
        bias = (-slopes[:, None, None] * behind).masked_fill(behind < 0, -torch.inf)
        self.register_buffer("bias", bias if tokens else None)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.into(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        seen = scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(gelu(self.wide(self.norms[1](x))))


class Patches(nn.Module):
    """Patches of an image as tokens, with learnt positions: N×C×H×W to N×token×width."""

    def __init__(self, channels: int, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.3 * torch.randn((size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(x).flatten(2).transpose(1, 2) + self.places


def images(
    depth: int = 4,
    width: int = 32,
    heads: int = 4,
    channels: int = 1,
    size: int = 8,
    patch: int = 2,
) -> list[nn.Module]:
    """So many blocks; the first begins with patches of ``patch`` × ``patch`` pixels."""
    first, *rest = (TransformerBlock(width, heads) for _ in range(depth))
    return [nn.Sequential(Patches(channels, size, patch, width), first), *rest]


def text(
    depth: int = 4, width: int = 32, heads: int = 4, tokens: int = 64, classes: int = 128
) -> list[nn.Module]:
    """So many blocks; the first begins with an embedding of N×token integers below ``classes``."""
    first, *rest = (TransformerBlock(width, heads, tokens) for _ in range(depth))
    return [nn.Sequential(nn.Embedding(classes, width), first), *rest]
