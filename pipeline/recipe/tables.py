"""A recipe's tables of plain values, checked: [data], [augment], [schedule], [compress], [cache]
and [claim].

What a table cannot know of another is checked by ``recipe.Recipe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from strata.pipeline.recipe.strict import FEW, MOST, one_of, positive, require
from strata.stages.network.blocks import Origin
from strata.stages.network.spec import Shape
from strata.stages.solve.schedule import KINDS, OPTIMISERS, SGDSchedule

SIDE = 65_535
"""Most pixels a side: those of the largest JPEG."""
DTYPES = ("uint8", "uint16", "int32", "float16", "float32")
"""What ``data.dtype`` may be."""
COMPUTE = ("auto", "float32", "bfloat16", "float16")
"""What convolutions may be computed in."""
SPLIT = ("split", "split_seed")
"""Keys of [data] about data without a test split."""


@dataclass(frozen=True)
class Data:
    """A recipe's [data]: the images, or other arrays, and what they are expected to be."""

    source: str
    """What holds the samples: ``digits``, ``imagefolder:PATH``, … (docs/data.md)."""
    classes: int = 0
    """Classes; of labels that are numbers, how many of them a sample has. What is 0 here, and what
    is empty below, is found in the data when the recipe of a new run is read."""
    train: int = 0
    """Samples the recipe expects; what is planned with until the data set has been read."""
    test: int = 0
    """Samples to test with, likewise."""
    split: float = 0.0
    """Share of the samples that is drawn to test with, of every class alike, where a data set has
    no test split; 0: it has one."""
    split_seed: int = 0
    """Another number draws others."""
    channels: int = 0
    """1 (grey) or 3 (RGB)."""
    size: int = 0
    """Side of x_0 in pixels; images of another size are resized and cut to it."""
    mean: tuple[float, ...] = ()
    """Per channel, of pixels in 0 … 1. Empty: found in the data, as ``std`` is."""
    std: tuple[float, ...] = ()
    """Deviation per channel, likewise."""
    jpeg: int = 0
    """Quality, 1 … 100, at which x_0 is kept as JPEG in a .beton for the ffcv loader, which decodes
    it on all cores; it is then what the network sees. 0: raw pixels."""
    shape: tuple[int, ...] = ()
    """Of a sample that is no image, 1 to 4 axes, the channels first. ``mean`` and ``std`` are in
    the units of its values, one for all of them or one for each index of the first axis. Empty:
    images."""
    dtype: str = "uint8"
    """Of its values: ``uint8``, ``uint16``, ``float16`` and ``float32`` are seen as float32,
    ``int32``, such as tokens, as it is."""
    targets: str = "sample"
    """What has a label: a ``sample``, or every ``token``."""

    def __post_init__(self) -> None:
        counts = {"classes": self.classes, "train": self.train, "test": self.test}
        positive("data", **{name: count for name, count in counts.items() if count})
        told = f"'data.split' is {self.split}; it must be 0, or between 0 and 1"
        require(0 <= self.split < 1, told)
        one_of("data.dtype", self.dtype, DTYPES)
        one_of("data.targets", self.targets, ("sample", "token"))
        if self.shape:
            return self._check_shape()
        for name, default in (("dtype", "uint8"), ("targets", "sample")):
            value = getattr(self, name)
            require(value == default, f"'data.{name}' is {value!r}, which needs 'data.shape'")
        for name in ("channels", "size"):
            require(bool(getattr(self, name)), f"missing key 'data.{name}'")
        positive("data", SIDE, size=self.size)
        require(
            self.channels in (1, 3),
            f"'data.channels' is {self.channels}; it must be 1 or 3. Samples of other channels are "
            f"arrays: set data.shape = [{self.channels}, {self.size}, {self.size}] and data.dtype",
        )
        for name, values in (("mean", self.mean), ("std", self.std)):
            require(
                len(values) in (0, self.channels),
                f"'data.{name}' has {len(values)} values; 'data.channels' is {self.channels}",
            )
        require(0 <= self.jpeg <= 100, f"'data.jpeg' is {self.jpeg}; it must be in 0 … 100")
        require(
            not self.jpeg or self.channels == 3,
            f"'data.jpeg' is {self.jpeg}, and 'data.channels' {self.channels}; a JPEG has 3",
        )
        least = min(self.std, default=1)
        require(least > 0, f"'data.std' is {list(self.std)}; each must be above 0")

    def _check_shape(self) -> None:
        shape = list(self.shape)
        require(
            len(shape) <= 4 and all(0 < side <= MOST[int] for side in shape),
            f"'data.shape' is {shape}; it must have 1 to 4 numbers above 0",
        )
        for name in ("channels", "size", "jpeg"):
            require(
                not getattr(self, name),
                f"'data.{name}' is for images: with 'data.shape' leave it out",
            )
        require(
            not self.mean or self.dtype != "int32",
            "'data.mean' is for numbers, and 'data.dtype' int32 for tokens: leave it out",
        )
        require(
            all(len(each) in (0, 1, shape[0]) for each in (self.mean, self.std)),
            f"'data.mean' has {len(self.mean)} values and 'data.std' {len(self.std)}; with "
            f"'data.shape' {shape} both must have none, 1 or {shape[0]}",
        )
        least = min(self.std, default=1)
        require(least > 0, f"'data.std' is {list(self.std)}; each must be above 0")

    @property
    def left_out(self) -> tuple[str, ...]:
        """The keys that the recipe leaves to the data."""
        numbers = () if self.dtype == "int32" else ("mean", "std")
        return tuple(k for k in ("classes", "train", "test", *numbers) if not getattr(self, k))

    def filled(self, known: Mapping[str, Any]) -> Data:
        """This one, with what it leaves out as ``known`` has it: JSON of a complete one."""
        keys = {*self.left_out, *(key for key in SPLIT if not getattr(self, key))}
        found: dict[str, Any] = {key: value for key, value in known.items() if key in keys}
        for key in {"mean", "std"} & found.keys():
            found[key] = tuple(found[key])
        return replace(self, **found)

    def sample(self, size: int) -> Shape:
        """Shape of x_0, for an image (crop or canvas) of side ``size``."""
        return self.shape or (self.channels, size, size)


@dataclass(frozen=True)
class Augment:
    """A recipe's [augment]: crops and flips, and which of them are cached."""

    crop: int
    """Side in pixels of what the classifier sees."""
    pad: int = 0
    """Black pixels around x_0; with them it is the canvas that crops are cut from."""
    flip: bool = False
    """Mirror half of the images."""
    views: int | str = "canvas"
    """0: fresh draws every epoch, recomputing the layers below. V: V fixed draws, cached.
    ``canvas``: the whole canvas is cached, and cropped in feature space."""
    flips: str = "auto"
    """``random``: drawn anew in every epoch, or for every fixed view; ``alternated``: a sample's
    first is drawn, and each is the other way round than the one before; ``auto``: alternated
    between fixed views, random otherwise."""
    stride: int = 1
    """Offsets of random crops are multiples of this many pixels. In canvas mode they are multiples
    of the downsampling so far, too."""
    allow_single_view: bool = False
    """Permit ``views = 1`` with random draws: the same crop and flip in every epoch."""
    transform: str | Origin = ""
    """``FILE.py:FUNCTION``, such as a torchvision v2 transform: ``function(image)`` is given every
    training image, cropped and flipped, uint8 (channel, y, x), and gives one of the same shape. It
    draws from torch, numpy or random, seeded by (seed, view or epoch, sample)."""

    def __post_init__(self) -> None:
        positive("augment", crop=self.crop, stride=self.stride)
        one_of("augment.flips", self.flips, ("auto", "random", "alternated"))
        require(0 <= self.pad <= SIDE, f"'augment.pad' is {self.pad}; it must be in 0 … {SIDE:,}")
        if isinstance(self.views, str):
            one_of("augment.views", self.views, ("canvas",))
        else:
            require(
                0 <= self.views <= FEW,
                f"'augment.views' is {self.views}; it must be in 0 … {FEW:,}",
            )


AS_IT_IS = Augment(crop=1, views=1)
"""What stands for [augment] where x_0 is no images: every sample has one view, itself."""


@dataclass(frozen=True)
class Schedule(SGDSchedule):
    """A recipe's [schedule]: how every auxiliary problem is solved."""

    precision: str = "auto"
    """Of the convolutions: ``float32``, ``bfloat16``, ``float16`` (GPU), or ``auto``: the fastest
    that the device has in hardware."""
    test_every: int = 1
    """Epochs between test accuracies in the training curve; 0 for the end only."""

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, KINDS)
        one_of("schedule.optimizer", self.optimizer, OPTIMISERS)
        one_of("schedule.keep", self.keep, ("last", "best"))
        one_of("schedule.precision", self.precision, COMPUTE)
        positive("schedule", epochs=self.epochs, batch=self.batch, lr=self.lr)
        positive("schedule", every=self.every, accumulate=self.accumulate)
        positive("schedule", 1, decay=self.decay)
        for name, value in (("weight_decay", self.weight_decay), ("test_every", self.test_every)):
            require(value >= 0, f"'schedule.{name}' is {value}; it must be 0 or more")
        require(
            self.momentum > 0 or not self.nesterov,
            "'schedule.nesterov' needs a 'schedule.momentum' above 0",
        )
        require(
            0 <= self.momentum < 1, f"'schedule.momentum' is {self.momentum}; it must be in [0, 1)"
        )
        require(
            self.optimizer == "sgd" or not self.nesterov,
            "'schedule.nesterov' is of SGD, and 'schedule.optimizer' is \"adamw\": leave it out",
        )
        least = self.warmup >= 0 if self.kind == "cosine" else self.warmup > 0
        bounds = "[0, 1)" if self.kind == "cosine" else "(0, 1)"
        require(
            least and self.warmup < 1,
            f"'schedule.warmup' is {self.warmup}; it must be in {bounds}",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"'schedule.label_smoothing' is {self.label_smoothing}; it must be in [0, 1)",
        )
        require(
            0 <= self.mixup <= FEW,
            f"'schedule.mixup' is {self.mixup}; it must be in 0 … {FEW:,}, 0 for none",
        )
        require(
            self.accumulate <= self.batch,
            f"'schedule.accumulate' is {self.accumulate}; 'schedule.batch' is only {self.batch}",
        )


@dataclass(frozen=True)
class Compress:
    """Layer-wise compression (Sec. 4.3): once layer j is solved, filters of it are removed by the
    Taylor criterion, and it is fine-tuned with C_j, before x_j is written."""

    keep: float | tuple[float, ...]
    """Share of its filters that a layer keeps, above 0 and at most 1; or a list, one per layer."""
    epochs: int
    """Epochs of fine-tuning after every removal."""
    lr: float
    """Rate that fine-tuning begins with; all else is as in [schedule]."""
    rounds: int = 1
    """Removals, of as many filters each time."""

    def __post_init__(self) -> None:
        positive("compress", epochs=self.epochs, lr=self.lr)
        positive("compress", FEW, rounds=self.rounds)
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        require(
            bool(shares) and all(0 < share <= 1 for share in shares),
            f"'compress.keep' is {self.keep if shares is not self.keep else list(shares)}; a share "
            "of the filters must be above 0 and at most 1",
        )

    def widths(self, j: int, solved: int) -> tuple[int, ...]:
        """Filters of layer j, solved with ``solved`` of them, after each removal that takes any."""
        share = self.keep[j - 1] if isinstance(self.keep, tuple) else self.keep
        gone = solved - max(1, round(share * solved))
        after = {solved - round(gone * n / self.rounds) for n in range(1, self.rounds + 1)}
        return tuple(sorted(after - {solved}, reverse=True))


@dataclass(frozen=True)
class Cache:
    """A recipe's [cache]: how features are stored."""

    precision: str = "float16"
    """How features are stored: ``float32`` (reference), ``float16``, ``bfloat16``, or codes with
    scales per channel, ``uint8`` and ``uint4``."""
    percentile: float = 99.99
    """Percentile of a channel's values other than 0 at which the codes of ``uint8`` and ``uint4``
    end, if there are outliers beyond. 100 clips nothing that calibration has seen."""
    profile: str = "raw"
    """How rows of features lie on disk: ``raw``, uncompressed at a constant stride, or packed with
    ``zstd`` (slow disks) or ``lz4`` (fast ones), or ``auto``: at every depth what is cheapest on
    the machine that writes it. Images are always raw."""
    shard_mb: int = 64
    """Megabytes (2^20) per shard file: the unit of writing, of resuming and of memory."""
    block: int = 128
    """Rows in one forward pass of frozen layers."""

    def __post_init__(self) -> None:
        known = ("float32", "float16", "bfloat16", "uint8", "uint4")
        one_of("cache.precision", self.precision, known)
        require(
            0 < self.percentile <= 100,
            f"'cache.percentile' is {self.percentile}; it must be above 0 and at most 100",
        )
        one_of("cache.profile", self.profile, ("raw", "zstd", "lz4", "auto"))
        positive("cache", 1 << 16, shard_mb=self.shard_mb, block=self.block)


@dataclass(frozen=True)
class Claim:
    """What the recipe tries to reproduce, printed beside what a run gives; in percent."""

    text: str = ""
    """What is claimed, in words."""
    source: str = ""
    """Where it is from."""
    last: float | None = None
    """Top-1 of the last layer."""
    ensemble: float | None = None
    """Top-1 of the ensemble."""
    last_top5: float | None = None
    """Top-5 of the last layer."""
    ensemble_top5: float | None = None
    """Top-5 of the ensemble."""
