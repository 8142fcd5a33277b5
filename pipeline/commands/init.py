"""The command `init`: a look at a data set, and a recipe that suits it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strata.pipeline.commands.lifecycle import Answer, reporting
from strata.pipeline.errors import OptionRange
from strata.pipeline.options import Options
from strata.pipeline.recipe.recipe import parse
from strata.stages.network.blocks import PACKAGES
from strata.store.files.publish import make_directory, put_exclusive

if TYPE_CHECKING:
    from strata.stages.data.look import Facts

Row = tuple[Any, ...]
"""A key, its value, and perhaps a comment."""
KINDS = {".npz": "npz", ".npy": "npz", ".csv": "csv", ".tar": "imagefolder"}
KINDS |= dict.fromkeys((".parquet", ".arrow", "dataset_dict.json"), "hf")
"""Data sources by what names of files end in."""
NAMED = 8
"""Classes that a comment names, and channels up to which mean and std are written out."""
TRAINED_AT, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Side, mean and deviation of the images that published networks were trained with."""
ATTENTION = ("vit", "swin", "former", "convnext", "mixer", "deit")
"""Words in names of networks that are trained by AdamW."""
CHAINS = {1: (3, 32, [1], 0), 2: (4, 64, [1, 3], 0), 3: (6, 32, [2, 4], 1), 0: (3, 32, [], 0)}
"""Layers, width, downsampled depths and stem, by how often pixels are halved."""
PARTS = {1: ("Linear", ""), 2: ("Conv1d", ", 3, padding=1"), 4: ("Conv3d", ", 3, padding=1")}
"""Parts with weights by the axes of a sample, and their arguments beside channels."""
BLOCKS = '''\
"""Blocks for samples of shape {shape}: each is a layer. Change them as you like."""

from torch import nn


def blocks(width=64, count=3):
    widths = [{channels}, *[width] * count]
    return [
        nn.Sequential(nn.{part}(a, b{more}), nn.BatchNorm{axes}d(b), nn.ReLU())
        for a, b in zip(widths, widths[1:])
    ]
'''


def init(options: Options) -> Answer:
    """Write a commented recipe for a data set.

    Raises:
        OptionRange: the file, or one that it would name, is there already; or no network is known
            for such samples.
        DataError: the data cannot be read.
        RecipeError: the network does not suit them.
    """
    from strata.stages.data.look import look

    source = spec_of(options.source)
    to = options.to if options.to.name else Path(f"{name_of(source)}.toml")
    python = to.with_name(f"{to.stem}_blocks.py")
    if to.suffix != ".toml":
        raise OptionRange(f"--to {to} must end in .toml")
    if to.exists() or python.exists():
        there = to if to.exists() else python
        raise OptionRange(f"{there} exists already: name another file with --to, or remove it")
    reporting(options).say(f"looking at {source}")
    facts = look(source, root=options.data_root, download=options.download)
    text, blocks = written(facts, options, python.name)
    make_directory(to.parent)
    if blocks:
        put_exclusive(python.parent, python.name, blocks.encode())
    parse(text, str(to), to.parent).check_layers()
    put_exclusive(to.parent, to.name, text.encode())
    wrote, following = [str(to), *[str(python)] * bool(blocks)], f"strata plan {to}"
    value = {"wrote": wrote, "source": source, "next": following, "recipe": text}
    return Answer(value, (text, f"wrote {' and '.join(wrote)}; next: {following}"))


def recipe_text(source: str, options: Options) -> str:
    """The text of a recipe for data and a network that options name. Raises as :func:`init`."""
    from strata.stages.data.look import look

    facts = look(spec_of(source), root=options.data_root, download=options.download)
    return written(facts, options, "")[0]


def spec_of(source: str) -> str:
    """The data source that is meant by the path of a folder or file, or what says it already."""
    if not source.isprintable():
        raise OptionRange(f"{source!r} has characters that a recipe cannot hold: rename it")
    path, kind = Path(source).expanduser(), KINDS.get(Path(source).suffix, "")
    if path.is_dir():
        inside = (KINDS.get(one.name, KINDS.get(one.suffix, "")) for one in path.iterdir())
        kind = min({*inside} & {"hf", "npz"}, default="imagefolder")
    return f"{kind}:{source}" if kind and path.exists() else source


def name_of(source: str) -> str:
    """A name for the recipe of a data source: ``photos`` for ``imagefolder:~/photos.tar``."""
    kind, _, rest = source.partition(":")
    word = Path(rest.partition(".py:")[0] or kind).name.partition(".")[0]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in word).lower() or kind


# ---- the text ------------------------------------------------------------------------------------


def written(facts: Facts, options: Options, python: str) -> tuple[str, str]:
    """The text of a recipe for what a data set holds, and of a Python file of blocks that it names
    by the name ``python``; empty where it needs none. Raises OptionRange: as :func:`init`."""
    axes, network, blocks = len(facts.shape), options.network or "", ""
    if not network and facts.dtype == "int32":
        raise OptionRange(
            "samples are tokens, and a network must embed them: name one with --network, for "
            "example a copy of pipeline/recipe/builtin/transformer.py with --network "
            "transformer.py:text"
        )
    if not network and axes in PARTS:
        part, more = PARTS[axes]
        fill = {"shape": list(facts.shape), "channels": facts.channels, "axes": max(1, axes - 1)}
        blocks = BLOCKS.format(part=part, more=more, **fill)
        network = f"{python}:blocks"
    text = f"# Made by `init {facts.source}` of what lies there; docs/reference.md has every key.\n"
    for table, rows in _tables(facts, options, network):
        lines = [f"[{table}]"] * bool(table) + [_line(*row) for row in rows]
        text += "\n" + "\n".join(lines) + "\n"
    return text, blocks


def _line(key: str, value: Any, comment: str = "") -> str:
    text = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    comment = "".join(c if c.isprintable() else "?" for c in comment)
    return f"{text:<31} # {comment}" if comment else text


def _tables(facts: Facts, options: Options, network: str) -> Iterator[tuple[str, list[Row]]]:
    """The tables of a recipe in their order, each with its keys, values and comments; the first has
    no name where it is none."""
    count, given, halvings = facts.counts["train"], options.frozen, _halvings(facts)
    if not network:
        layers, width, downsample, stem = CHAINS[halvings]
        rows: list[Row] = [("layers", layers, "each is solved by itself, with a classifier")]
        rows += [("width", width, "channels of x_1")]
        rows += [("downsample", downsample, "then the side is halved, the width doubled")]
        rows += [("stem", stem, "the image is halved before the first layer")] * stem
        yield "network", [*rows, ("batch_norm", True), ("bias", False)]
    elif not (options.weights or given):
        yield "", [("network", network, "each block is a layer")]
    else:
        rows = [("name", network, "each block is a layer")]
        rows += [("weights", options.weights)] if options.weights else []
        if given:
            frozen = int(given) if given.isdigit() else given
            rows += [("frozen", frozen, "layers that are given; those above are trained")]
        yield "network", rows
    size = _size(facts, options, network)
    yield "data", list(_data(facts, options, network, size))
    if facts.sizes:
        pad = size // 8 if network else 2 ** max(1, halvings)
        drawn = "draws of crop and flip, cached" if network else "all crops, from two levels"
        rows = [("views", 1, "every image once, as it is; with flip = true 2 or more")]
        if not given:
            rows = [("pad", pad, "crops are moved by up to so many pixels")]
            rows += [("flip", facts.channels == 3, "mirror half of the images; no digits or maps")]
            rows += [("views", 4 if network else "canvas", f"{drawn}; 0: new draws, no cache")]
        yield "augment", [("crop", size), *rows]
    hidden = [("k", 2, "layer j is trained with a convolution, and a linear classifier")]
    hidden += [("width", 32), ("batch_norm", True), ("bias", False)]
    linear = [("k", 1, "layer j is trained with a linear classifier")]
    yield "auxiliary", linear if network else hidden
    if facts.labels == "numbers":
        yield "loss", [_loss(facts)]
    adamw = any(word in network.lower() for word in ATTENTION) and not given
    rows = [("optimizer", "adamw")] * adamw
    rows += [("kind", "cosine" if adamw else "one-cycle", "the rate goes up, and down to 0")]
    rows += [("epochs", 30 if count < 5_000 else 20 if count < 50_000 else 10, "of every layer")]
    rows += [("batch", max(4, min(128 if count >= 10_000 else 64, count // 8)))]
    rows += [("lr", 1e-3 if adamw else 0.01 if facts.labels == "numbers" else 0.05)]
    yield "schedule", [*rows, ("weight_decay", 0.05 if adamw else 5e-4)]
    yield "cache", [("precision", "float16", "or float32; uint8 is a half, uint4 a quarter")]
    yield "claim", [("text", "", "what you expect; reports show it beside the result")]


def _halvings(facts: Facts) -> int:
    """How often the table [network] halves the pixels."""
    if facts.sizes:
        short = min(facts.sizes[1])
        return 1 if short < 16 else 2 if short < 64 else 3
    sides = gcd(*facts.shape[1:]) if min(facts.shape[1:], default=0) >= 8 else 1
    return (sides % 2 == 0) + (sides % 4 == 0)


def _size(facts: Facts, options: Options, network: str) -> int:
    """The side of x_0; 0: samples are no images."""
    if not facts.sizes:
        return 0
    short, step = min(facts.sizes[1]), 2 ** _halvings(facts)
    if network.startswith(PACKAGES):
        fixed = options.weights or any(word in network for word in ATTENTION)
        return TRAINED_AT if fixed else max(64, min(TRAINED_AT, short // 32 * 32))
    return min(TRAINED_AT, short) if network else max(8, min(96, short)) // step * step


def _data(facts: Facts, options: Options, network: str, size: int) -> Iterator[Row]:
    names = ", ".join(facts.names[:NAMED]) + ", …" * (len(facts.names) > NAMED)
    yield "source", facts.source
    yield "classes", facts.classes, "numbers in a label" if facts.labels == "numbers" else names
    if "test" in facts.counts:
        yield from (("train", facts.counts["train"]), ("test", facts.counts["test"]))
    else:
        all_of = f"share of all {facts.counts['train']:,} samples to test with, of every class"
        yield "split", options.held_out or 0.2, all_of
    mean, std, whose = facts.mean, facts.std, "of the samples"
    if facts.shape:
        yield from (("shape", facts.shape), ("dtype", facts.dtype))
        yield from [("targets", "token", "every token has a label")] * (facts.labels == "tokens")
    else:
        least, median, most = (f"{height}×{width}" for height, width in facts.sizes)
        yield "channels", facts.channels, "1 is grey"
        yield "size", size, f"images have {least} … {most}, half of them {median} or less"
        if options.weights and network.startswith(PACKAGES) and facts.channels == 3:
            mean, std, whose = MEAN, STD, "of ImageNet: those that it was trained with"
    if 0 < len(mean) <= NAMED:  # what is left out is found in the data
        yield from (("mean", mean, whose), ("std", std))


def _loss(facts: Facts) -> Row:
    said = ("bce", "several classes at once") if facts.several else ("mse", "numbers to meet")
    return "name", *said
