"""Where the channels of a stored map lie: before y and x, or after them.

Claim: with channels last, a packed batch of codes (zstd) is read 1.25 times as fast or faster, one
of raw codes becomes what a convolution reads (float32, channels last) 1.3 times as fast or faster,
and what a convolution made is laid out 5 times as fast or faster, at 16 % more bytes or fewer.

Method: x_1 and x_2 of `cifar10-small`, trained for its five epochs on CIFAR-10 images, as float16,
uint8 and uint4 codes with scales that are chosen as a run chooses them. Everything is done by one
thread, to the same rows in both orders, in turn, in every round; a ratio is the median over the
rounds of last / first, of rates, or of bytes. `encode` packs chunks of 1 MiB (raw: lays a batch
out), `decode` unpacks them, `read` is `decode` and `values`, `gather` takes 128 shuffled rows from
memory (np.take), `values` makes them float32 in channels last, `crop` cuts a window of 3/4 of the
side at another place of each map first, `step` is `values` and a 3 x 3 convolution that keeps the
channels, with its backward pass.

    python benchmarks/layouts.py --data cifar10.tar.xz [--images 4096] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
from feed_levels import load_images
from measuring import CPU, RESULTS, keep, ratio, seconds
from random_run import RECIPES
from torch import Tensor, nn

import checkout  # noqa: F401
from strata.pipeline.feed.problem_feed import clean_batches
from strata.pipeline.options import Options
from strata.pipeline.run import device as devices
from strata.pipeline.run import rundir
from strata.pipeline.run.session import Session
from strata.pipeline.train import algorithm
from strata.stages.data import augment
from strata.stages.features.calibrate import calibrate
from strata.stages.features.quantise import Codec, Floats
from strata.store.feature_store import Store

DEPTHS, PRECISIONS, PROFILES = (1, 2), ("float16", "uint8", "uint4"), ("raw", "zstd", "lz4")
ROWS, BATCH, CHUNK = 2048, 128, 1 << 20
AT_LEAST = {"read": 1.25, "values": 1.3, "lay out": 5.0}
AT_MOST = {"bytes": 1.16}


def trained(place: Path, images: np.ndarray) -> Session:
    """A run of `cifar10-small` on these images, layers 1 and 2 solved."""
    half, labels = len(images) // 2, np.arange(len(images)) % 10
    arrays: dict[str, Any] = {}
    for split, part in (("train", slice(half)), ("test", slice(half, None))):
        arrays[f"x_{split}"] = images[part].transpose(0, 2, 3, 1)
        arrays[f"y_{split}"] = labels[part]
    np.savez(place / "images.npz", **arrays)
    text = (RECIPES / "cifar10-small.toml").read_text("utf-8")
    facts = {"compute": "float32", **devices.facts(CPU)}
    source = f"npz:{place / 'images.npz'}"
    run = rundir.create(place / "run", "cifar10-small", text, 0, source, facts)
    session = Session(run, Store(place / "store"), CPU, options=Options(accept_data=True))
    algorithm.make(session, solve=2, write=2)
    return session


@dataclass(frozen=True)
class Order:
    """The stored rows of one precision in one order."""

    codec: Codec
    rows: np.ndarray
    """(n, y, x, channel) if channels are last, else (n, channel, y, x); uint4 along the last."""
    last: bool
    channels: int

    @classmethod
    def of(cls, codec: Codec, x: Tensor, *, last: bool) -> Order:
        codes = torch.cat([codec.encode(part) for part in x.split(BATCH)])
        if last:
            codes = codes.movedim(1, -1)
        elif codec.precision == "uint4":  # two neighbours along x share a byte
            every = codec.unpacked(codes, x.shape[1])
            codes = every[..., 0::2] | (every[..., 1::2] << 4)
        return cls(codec, codes.contiguous().numpy(), last, x.shape[1])

    def lay(self, computed: Tensor) -> np.ndarray:
        """A batch as it comes out of a convolution, as it lies."""
        out = np.empty((len(computed), *self.rows.shape[1:]), self.rows.dtype)
        torch.from_numpy(out).copy_(computed.movedim(1, -1) if self.last else computed)
        return out

    def values(self, rows: np.ndarray, out: Tensor, window: Tensor | None = None) -> Tensor:
        """A batch of rows as a convolution reads it, in ``out``."""
        x = torch.from_numpy(rows)
        if self.last:
            x = x.movedim(-1, 1)
            x = x if window is None else augment.crop(x, window, out.shape[2])
            return self.codec.values(self.codec.unpacked(x, self.channels), out)
        if self.codec.precision == "uint4":
            x = torch.stack([x & 15, x >> 4], -1).flatten(-2)
        elif self.codec.precision in ("float16", "bfloat16"):
            x = self.codec.unpacked(x, self.channels)
        return self.codec.values(x if window is None else cut(x, window, out.shape[2]), out)


def cut(maps: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Windows of maps whose channels lie first."""
    width, along = maps.shape[3], torch.arange(size)
    pixels = offsets[:, :1] * width + offsets[:, 1:] + (along[:, None] * width + along).flatten()
    pixels = pixels[:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, pixels).unflatten(2, (size, size))


def packer(profile: str, itemsize: int) -> Any:
    if profile == "zstd":
        return numcodecs.Zstd(level=1)
    shuffle = numcodecs.Blosc.NOSHUFFLE
    return numcodecs.Blosc("lz4", clevel=5, shuffle=shuffle, typesize=itemsize)


def packing(
    order: Order, profile: str, sample: torch.Size
) -> tuple[dict[str, Callable[[], object]], int]:
    """Works, and bytes on disk."""
    rows = order.rows
    each = max(1, CHUNK // rows[0].nbytes)
    parts = [rows[at : at + each] for at in range(0, len(rows), each)]
    codec, out = packer(profile, rows.itemsize), np.empty_like(parts[0])
    packed = [codec.encode(part) for part in parts]
    values: Any = torch.empty(each, *sample, memory_format=torch.channels_last)

    def read() -> None:
        for p in packed[:-1]:
            codec.decode(p, out)
            order.values(out, values)

    works: dict[str, Callable[[], object]] = {
        "encode": lambda: [codec.encode(part) for part in parts],
        "decode": lambda: [codec.decode(p, out) for p in packed[:-1]],
        "read": read,
    }
    return works, sum(map(len, packed))


def feeding(order: Order, x: Tensor) -> dict[str, Callable[[], object]]:
    """Works on one batch of shuffled rows."""
    rng = np.random.default_rng(0)
    chosen, side = np.sort(rng.permutation(len(order.rows))[:BATCH]), x.shape[2]
    batch, crop = order.rows[chosen], side * 3 // 4
    window = torch.from_numpy(rng.integers(0, side - crop + 1, (BATCH, 2)))
    last: Any = torch.channels_last
    whole = torch.empty(BATCH, *x.shape[1:], memory_format=last)
    part = torch.empty(BATCH, order.channels, crop, crop, memory_format=last)
    layer: Any = nn.Conv2d(order.channels, order.channels, 3, padding=1).to(memory_format=last)
    codes = order.codec.encode(x[:BATCH].contiguous(memory_format=last))
    if not order.last and order.codec.precision == "uint4":
        codes = torch.from_numpy(order.rows[:BATCH]).contiguous(memory_format=last)
    out = np.empty_like(batch)
    return {
        "lay out": lambda: order.lay(codes),
        "gather": lambda: np.take(order.rows, chosen, axis=0, out=out, mode="clip"),
        "values": lambda: order.values(batch, whole),
        "crop": lambda: order.values(batch, part, window),
        "step": lambda: layer(order.values(batch, whole)).sum().backward(),
    }


def compared(both: dict[bool, dict[str, Callable[[], object]]], rounds: int) -> dict[str, Any]:
    """Rates of channels last over those of channels first."""
    found = {}
    for work in both[True]:
        taken: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds + 1):
            for last in (True, False) if number % 2 else (False, True):
                took = seconds(both[last][work])
                if number:
                    taken[last].append(took)
        found[work] = ratio(taken[False], taken[True])
    return found


def one(session: Session, depth: int, precision: str, rounds: int) -> dict[str, Any]:
    """What both orders cost, of x_depth in one precision."""
    x = torch.cat(list(clean_batches(session, depth)))[:ROWS].contiguous()
    codec: Codec = Floats(precision)
    if precision != "float16":
        codec = calibrate(x.split(256), precision, session.run.recipe.cache.percentile).quantiser
    orders = {last: Order.of(codec, x, last=last) for last in (True, False)}
    found: dict[str, Any] = {"sample": list(x.shape[1:]), "row_bytes": orders[True].rows[0].nbytes}
    feeds = {last: feeding(order, x) for last, order in orders.items()}
    found["raw"] = compared(feeds, rounds)
    for profile in PROFILES[1:]:
        works = {last: packing(order, profile, x.shape[1:]) for last, order in orders.items()}
        sizes = {last: nbytes for last, (_, nbytes) in works.items()}
        rates = compared({last: some for last, (some, _) in works.items()}, rounds)
        shares = {"last" if last else "first": n / (4 * x.numel()) for last, n in sizes.items()}
        over = {name: round(share, 4) for name, share in shares.items()}
        found[profile] = rates | {"bytes": round(sizes[True] / sizes[False], 3), "of float32": over}
    return found


def holds(forms: dict[str, Any]) -> dict[str, bool]:
    """What is claimed, of zstd and of codes, which is what levels are packed as."""
    coded = [form for name, form in forms.items() if "uint" in name]
    return {
        "read": all(f["zstd"]["read"]["median"] >= AT_LEAST["read"] for f in coded),
        "values": all(f["raw"]["values"]["median"] >= AT_LEAST["values"] for f in coded),
        "lay out": all(f["raw"]["lay out"]["median"] >= AT_LEAST["lay out"] for f in coded),
        "bytes": all(f["zstd"]["bytes"] <= AT_MOST["bytes"] for f in coded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="CIFAR-10, as class folders; none: smooth noise")
    parser.add_argument("--images", type=int, default=2 * ROWS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "layouts.json")
    options = parser.parse_args()
    rounds = 3 if options.quick else 11
    with tempfile.TemporaryDirectory() as place:
        session = trained(Path(place), load_images(options.data, options.images))
        torch.set_num_threads(1)
        numcodecs.blosc.use_threads = False
        made = partial(one, session, rounds=rounds)
        forms = {f"x_{d} {p}": made(d, p) for d in DEPTHS for p in PRECISIONS}
    result = {"forms": forms, "holds": holds(forms), "rounds": rounds, "images": options.images}
    keep(result, options.out, show=True)


if __name__ == "__main__":
    main()
