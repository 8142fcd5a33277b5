"""Options that several commands share, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

Command = Callable[..., None]
FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)


def sized(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Callback of options in bytes."""
    from strata.pipeline.progress import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


class StoreName(click.ParamType):
    """A directory, or the URL of an object store, which is none."""

    name = "path|url"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path | str:
        return value if isinstance(value, Path) or "://" in value else Path(value)


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
layer_option = click.option("--layer", "-l", type=int, required=True, help="j, from 1.")
only_layer = click.option("--layer", "-l", type=int, help="Only this layer.  [all]")
budget_option = click.option("--disk-budget", callback=sized, help="Refuse to need more: 20GB.")
STORE_HELP = "A directory, or s3://BUCKET/PREFIX; runs may share it."
store_option = click.option("--store", type=StoreName(), default="features", help=STORE_HELP)
CACHE_HELP = "Local copies of shards from an object store: PATH[:BYTES].  [read-cache:20GB]"

MEMORY = (
    click.option("--gpu-memory", callback=sized, help="Most on the device: divides steps to fit."),
    click.option("--memory-budget", callback=sized, help="Of RAM, for features.  [what is free]"),
)
WHERE = (
    click.argument("recipe", default="digits"),
    click.option("--run", "run_dir", type=FOLDER, help="Run directory.  [runs/RECIPE/SEED]"),
    store_option,
    click.option("--read-cache", metavar="PATH[:BYTES]", help=CACHE_HELP),
    click.option("--seed", default=0, help="Of weights, order and augmentation."),
    json_option,
)
DEVICE = click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
TIER, LOADER = click.Choice(["auto", "device", "memory", "disk"]), click.Choice(["native", "ffcv"])
CACHED = click.Choice(["always", "never", "auto"])
WORK = (
    DEVICE,
    click.option("--data", help="Other images for the recipe, e.g. imagefolder:PATH."),
    click.option("--data-root", type=FOLDER, default="data", help="Of torchvision's data sets."),
    click.option("--download", is_flag=True, help="Let torchvision fetch its data set."),
    click.option("--skip-broken", is_flag=True, help="Leave broken images out; do not stop."),
    click.option("--tier", default="auto", type=TIER, help="Where the features of a problem lie."),
    click.option("--loader", default="native", type=LOADER, help="ffcv is an extra: make ffcv."),
    *MEMORY,
)

WORTH = (
    click.option("--machine", type=FILE, help="TOML with its rates.  [as `calibrate` measured]"),
    click.option("--problems", type=click.IntRange(1), default=1, help="Per depth, to ask that."),
)
CLUSTER = (
    click.option("--workers", type=click.IntRange(1), help="Of this machine, to share the work."),
    click.option("--scheduler", metavar="tcp://…", help="Of Dask: it sees run, images and store."),
)
CACHE = click.option("--cache", default="always", type=CACHED, help="What to write on the way.")


def where(command: Command) -> Command:
    """The options of every command that looks at a run."""
    return reduce(lambda decorated, option: option(decorated), reversed(WHERE), command)


def work(command: Command) -> Command:
    """The options of every command that computes."""
    return where(reduce(lambda decorated, option: option(decorated), reversed(WORK), command))


def worth(command: Command) -> Command:
    """The options of what asks which levels are worth their disk."""
    return reduce(lambda decorated, option: option(decorated), reversed(WORTH), command)


def spread(command: Command) -> Command:
    """The options of what can be done by the workers of a cluster."""
    return reduce(lambda decorated, option: option(decorated), reversed(CLUSTER), command)


def bounded(command: Command) -> Command:
    """The options that bound memory."""
    return reduce(lambda decorated, option: option(decorated), reversed(MEMORY), command)


def solving(command: Command) -> Command:
    """The options of every command that solves layers and writes features."""
    return work(CACHE(worth(command)))
