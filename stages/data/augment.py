"""Augmentation of a batch with one draw per sample, in pixel space or in feature space.

A draw is a flip and an offset. The view of an image is ``crop(flip(canvas), offset)``; the canvas
is the image with its padding. Because convolutions commute with translation, the same crop can be
taken after the layers (canvas mode), at offsets that are multiples of the downsampling so far.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from strata.stages.errors import UnusableNetwork
from strata.stages.foreign import drawing, function, guarded

Batch = Shaped[Tensor, "b c h w"]


def pad(images: Batch, border: int) -> Shaped[Tensor, "b c h2 w2"]:
    """The canvas: ``border`` zero (black) pixels on every side."""
    return F.pad(images, (border,) * 4) if border else images


def flip(images: Batch, flipped: Bool[Tensor, " b"]) -> Batch:
    """Mirror left to right the samples that ``flipped`` names."""
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


def crop(maps: Batch, offsets: Int[Tensor, "b 2"], size: int) -> Shaped[Tensor, "b c s s"]:
    """Cut ``size`` × ``size`` at each sample's own (y, x) offset, in pixels of ``maps``.

    Offsets must lie in 0 … H - size; the caller draws them so. Channels lie last in what is cut.
    """
    samples, channels, height, width = maps.shape
    if height == size and width == size:
        return maps
    along = torch.arange(size, device=maps.device)
    window = (along[:, None] * width + along).flatten()  # pixels of a window at (0, 0)
    first = torch.arange(samples, device=maps.device)[:, None] * (height * width)
    pixels = first + offsets[:, :1] * width + offsets[:, 1:] + window
    cut = maps.movedim(1, -1).reshape(-1, channels).index_select(0, pixels.flatten())
    return cut.view(samples, size, size, channels).movedim(-1, 1)


def transformed(images: Batch, own: tuple[str, str, str], seeds: np.ndarray) -> Batch:
    """Every image as a user's function gives it, one after another on the CPU, so that a draw is
    the same on every device: uint8 (B, C, H, W).

    Args:
        own: name, code and folder of the function, as ``foreign.function`` has them.
        seeds: int64 (B,), what the draws of each image begin with.

    Raises UnusableNetwork: it fails, or gives another shape or dtype.
    """
    title, found = f"augment.transform {own[0]}", []
    apply = function(title, *own)
    with drawing() as seeded, torch.no_grad():
        for image, seed in zip(images.contiguous().cpu(), seeds.tolist(), strict=True):
            seeded(seed)
            with guarded(title):
                made = torch.as_tensor(apply(image.clone()))
            if made.shape != image.shape or made.dtype != image.dtype:
                raise UnusableNetwork(
                    f"{title} makes {made.dtype} {list(made.shape)} of an image, which is "
                    f"{image.dtype} {list(image.shape)}; it must keep both. Normalising is done "
                    "by 'data.mean' and 'data.std'"
                )
            found.append(made)
    return torch.stack(found).to(images.device)


def normalise(
    images: Batch, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b c h w"]:
    """uint8 pixels to float32 (pixel / 255 - mean) / std, per channel."""
    shape = (1, -1, 1, 1)
    mean_ = torch.tensor(mean, dtype=torch.float32, device=images.device).view(shape)
    std_ = torch.tensor(std, dtype=torch.float32, device=images.device).view(shape)
    return (images.to(torch.float32) / 255 - mean_) / std_


def standardise(
    x: Shaped[Tensor, "b ..."], mean: Sequence[float], std: Sequence[float]
) -> Shaped[Tensor, "b ..."]:
    """What is no image as layer 1 sees it: float32, (x - mean) / std where these are given, one for
    all values or one for each index of the first axis of a sample; int32 as it is."""
    if x.dtype == torch.int32:
        return x
    if x.dtype in (torch.uint16, torch.int16):  # torch computes little in uint16
        x = x.view(torch.int16).to(torch.int32) & 0xFFFF
    shape, x = (1, -1, *[1] * (x.ndim - 2)), x.to(torch.float32)
    if not mean:
        return x
    mean_, std_ = (torch.tensor(one, device=x.device).view(shape) for one in (mean, std))
    return (x - mean_) / std_
