"""The command line: `python cli.py`, or `strata` where the project is installed.

It parses, calls the pipeline and speaks. What a command does is imported when the command runs, so
that --help, plan and status answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":
    # The checkout that this file lies in, whatever is installed; and so in processes that we start.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here / "typings"), *(p for p in sys.path if Path(p).resolve() != here)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.getenv("PYTHONPATH"))))

from strata.pipeline import errors, streams
from strata.pipeline.options import Options
from strata.pipeline.run import ranks


def place(text: object) -> Path | str:
    """A directory, or the URL of an object store, which is none."""
    return str(text) if "://" in str(text) else Path(str(text))


def sized(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Callback of options in bytes."""
    from strata.pipeline.progress import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def option(names: str, help: str | None = None, **how: Any) -> click.Option:
    """An option; its names are parted by blanks, the last may be that of :class:`Options`, which
    says what is meant where it is left out."""
    found = click.Option(names.split(), help=help, **how)
    if not found.required:
        found.default = getattr(Options, found.name or "")
    return found


def flag(names: str, help: str) -> click.Option:
    """An option without a value."""
    return option(names, help, is_flag=True)


FOLDER, COUNT = click.Path(path_type=Path), click.IntRange(1, 2**31 - 1)
FILE = click.Path(path_type=Path, dir_okay=False)
TIER, LOADER = click.Choice(["auto", "device", "memory", "disk"]), click.Choice(["native", "ffcv"])
CACHED = click.Choice(["always", "never", "auto"])

JSON = flag("--json as_json", "One JSON object on stdout.")
STORE_HELP = "A directory, or s3://BUCKET/PREFIX; runs may share it."
STORE = option("--store", STORE_HELP, type=place, metavar="PATH|URL")
LAYER = option("--layer -l", "j, from 1.", type=int, required=True)
ONLY_LAYER = option("--layer -l", "Only this layer.  [all]", type=int)
BUDGET = option("--disk-budget", "Refuse to need more: 20GB.", callback=sized)
DEVICE = option("--device", type=click.Choice(["auto", "cpu", "cuda"]))
DATA = option("--data", "Other images for the recipe, e.g. imagefolder:PATH.")
SPLIT_HELP = "Share to test with, of data without a test split: 0.2."
SPLIT = option("--split held_out", SPLIT_HELP, type=click.FloatRange(0, 1, True, True))
DATA_ROOT = option("--data-root", "Of torchvision's data sets.", type=FOLDER)
DOWNLOAD = flag("--download", "Let torchvision fetch its data set, or weights.")
VARY = option("--vary", "Once per key.", multiple=True, required=True, metavar="KEY=VALUE,…")
CACHE_HELP = "Local copies of shards from an object store: PATH[:BYTES].  [read-cache:20GB]"

WHERE = (
    click.Argument(["recipe"], default=Options.recipe),
    option("--run run_dir", "Run directory.  [runs/RECIPE/SEED]", type=FOLDER),
    STORE,
    option("--read-cache", CACHE_HELP, metavar="PATH[:BYTES]"),
    option("--seed", "Of weights, order and augmentation.", type=int),
    JSON,
)
"""What every command knows that looks at a run."""
MEMORY = (
    option("--gpu-memory", "Most on the device: divides steps to fit.", callback=sized),
    option("--memory-budget", "Of RAM, for features.  [what is free]", callback=sized),
)
WORK = (
    *WHERE,
    DEVICE,
    DATA,
    DATA_ROOT,
    SPLIT,
    DOWNLOAD,
    flag("--skip-broken", "Leave broken images out; do not stop."),
    flag("--accept-data", "Take other numbers of images than the recipe says."),
    option("--tier", "Where the features of a problem lie.", type=TIER),
    option("--loader", "ffcv is an extra: make ffcv.", type=LOADER),
    *MEMORY,
)
"""What every command knows that computes."""
WORTH = (
    option("--machine", "TOML with its rates.  [as `calibrate` measured]", type=FILE),
    option("--problems", "Per depth, to ask that.", type=COUNT),
)
NETWORK = (
    option("--network", "torchvision:NAME, timm:NAME or FILE.py:FUNCTION."),
    option("--weights", "Of the network: a file, or torchvision:NAME."),
)
LOG_DIR = option("--log-dir", "Curves for TensorBoard, and epochs.csv.", type=FOLDER)
SOLVING = (
    *WORK,
    LOG_DIR,
    option("--cache", "What to write on the way.", type=CACHED),
    *WORTH,
)
"""What every command knows that solves layers and writes features."""
CLUSTER = (
    option("--workers", "Of this machine, to share the work.", type=COUNT),
    option("--scheduler", "Of Dask: it sees run, images and store.", metavar="tcp://…"),
)

COMMANDS: dict[str, tuple[str, tuple[click.Parameter, ...]]] = {
    "inspect.recipes": ("List the built-in recipes.", (JSON,)),
    "init.init": (
        "Look at data, and write a commented recipe for them: photos/, data.npz, hf:PATH, …",
        (
            *(click.Argument(["source"]), *NETWORK, DATA_ROOT, SPLIT, DOWNLOAD, JSON),
            option("--frozen", "Layers that are given, from the first: n, or all."),
            option("--to", "The new file.  [NAME.toml]", type=FOLDER, show_default=False),
        ),
    ),
    "plan.plan": (
        "Shapes, bytes and steps of a run, and what of it is left to do. Needs no GPU.",
        (*WHERE, DATA, DATA_ROOT, SPLIT, BUDGET, *MEMORY, *WORTH),
    ),
    "plan.calibrate": ("Measure this machine, for `plan` and --cache auto.", (*WHERE, DEVICE)),
    "inspect.status": ("Layers that are solved, how good they are, and levels on disk.", WHERE),
    "run.train": ("Solve layer j, and whatever it needs first.", (*SOLVING, LAYER)),
    "run.materialize": (
        "Write x_j, the features after layer j, and whatever that needs first.",
        (*SOLVING, LAYER, *CLUSTER, flag("--dry-run", "Say what would be done, and do nothing.")),
    ),
    "run.run": (
        "Everything: solve every layer from cached features, evaluate, report.",
        (*SOLVING, *CLUSTER, BUDGET),
    ),
    "sweep.sweep": (
        "Solve variants of layer j together: every batch of x_{j-1} is read once for all of them."
        "\n\nMay vary: most of schedule, auxiliary.k, auxiliary.width and width of layer j itself,"
        " and seed.",
        (
            *(*SOLVING, LAYER, VARY),
            option("--keep", "Make it layer j; best: lowest training risk.", metavar="best|NAME"),
        ),
    ),
    "sweep.final": (
        "Train other final classifiers on x_J, with layer J frozen: another M̃_f, or k."
        "\n\nMay vary: what `sweep` may, but width. To solve layer J again too: sweep --layer J.",
        (*SOLVING, VARY),
    ),
    "run.baseline": (
        "Train the network of a run end to end, by backpropagation, to compare the two.",
        (
            *(*WORK, LOG_DIR),
            flag("--checkpointing", "Compute activations again in backward."),
            option("--micro-batch", "Images at a time.  [the recipe's]", type=COUNT),
        ),
    ),
    "probe.probe": (
        "Train a classifier on x_j of every depth: how separable it is. Nothing else is trained.",
        (
            *(*WORK, ONLY_LAYER),
            option("--kind", "Classifier.", type=click.Choice(["linear", "cnn"])),
            option("--p", "Hidden layers of the CNN.  [1]", type=COUNT),
            option("--of", "Whose layers.", type=click.Choice(["run", "baseline"])),
            option("--transfer", "Other labelled images: imagefolder:PATH, …", metavar="SOURCE"),
            flag("--materialize", "Write the x_j that are probed first."),
        ),
    ),
    "inspect.statistics": (
        "Mean, deviation, extremes and zeros of the channels of x_j, over every row on disk.",
        (
            *(*WHERE, ONLY_LAYER, *CLUSTER),
            option("--split", "Only this one.  [both]", type=click.Choice(["train", "test"])),
            flag("--channels", "A line for each."),
        ),
    ),
    "inspect.evaluate": ("How good every layer and the ensembles are on the test images.", WHERE),
    "inspect.export": (
        "The trained network as files that load without this project: plain PyTorch.",
        (
            *WHERE,
            option("--to", "A new directory.", type=FOLDER, required=True),
            option("--layer -l", "Layers 1 … j, with C_j.  [all]", type=int),
            flag("--ensemble", "All classifiers, weighted by 2^j."),
            flag("--features", "x_j, and no classifier."),
            option("--final", "With a classifier that `final` trained.", metavar="NAME"),
            flag("--onnx", "model.onnx, too: pip install 'strata[onnx]'."),
        ),
    ),
    "inspect.report": ("Write report.json and report.html into the run.", WHERE),
    "clean.clean": (
        "Remove features, and if not only these, layers; sweeps with --sweeps or the whole run.",
        (
            *(*WHERE, ONLY_LAYER),
            flag("--features", "Only features; weights and records stay."),
            flag("--sweeps", "Only what was swept; layers stay."),
            flag("--dry-run", "Say what would go, and remove nothing."),
            flag("--yes", "Do not ask before weights are removed."),
        ),
    ),
    "verify.verify": (
        "Check every file of the store and of the run against its hash, and name what is damaged.",
        (
            *(*WORK, ONLY_LAYER, *CLUSTER),
            flag("--deep", "Read every byte, not only sizes and small files."),
            flag("--repair", "Compute what is damaged again, and only that."),
        ),
    ),
    "inspect.audit": (
        "Make rows at random again from the images and the weights: are those on disk the same?",
        (
            *(*WHERE, DEVICE, DATA, DATA_ROOT, DOWNLOAD),
            option("--layer -l", "Only x_j, and x_0.  [all there are]", type=int),
            option("--features foreign", "A folder of .npy, .npz or .safetensors.", type=FOLDER),
            *NETWORK,
            option("--rows", "To draw of every split.", type=COUNT),
            option(
                "--draw", "Draw the rows of an earlier audit.  [other rows each time]", type=int
            ),
        ),
    ),
    "explain.explain": ("Why x_j is not there, or not used: which field changed.", (*WHERE, LAYER)),
    "storage.evict": (
        "Remove x_j to make space, if all is there that makes it again.",
        (*WHERE, LAYER, flag("--force", "Even if other runs use it.")),
    ),
    "storage.du": (
        "Every level of a store: rows, bytes on disk, and the runs that use it.",
        (STORE, JSON),
    ),
    "storage.gc": (
        "Levels that no run refers to, and what repairs set aside, with their bytes.",
        (STORE, flag("--delete", "Remove it; without this, it is only listed."), JSON),
    ),
}
"""Help and options of every command. A key is the function of :mod:`strata.pipeline.commands` that
does it, and has the command's name."""


def perform(path: str, **parsed: Any) -> None:
    """Do the command of a key of :data:`COMMANDS`, and print its answer: one JSON object for
    machines, tables and lines for people. Of several ranks the first one speaks."""
    file, _, name = path.partition(".")
    command = getattr(import_module(f"strata.pipeline.commands.{file}"), name)
    options = Options(**parsed, confirm=partial(click.confirm, abort=True, err=True))
    with streams.silenced():  # what code of others prints, and workers, is no answer
        answer = command(options)
    if not ranks.leads():
        return
    from rich.console import Console

    from strata.pipeline.commands.tables import fit

    console = Console(markup=False, emoji=False, highlight=False)  # names are shown as they are
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").strip("0").isdigit()
    width = console.width if known else None
    console.width = 10**6  # `fit` sees to it
    value, left_out = answer.value, list(answer.left_out)
    if left_out:
        said = f"Warning: left out, since it cannot be read: {'; '.join(left_out)}"
        click.echo(" ".join(said.split()), err=True)
        value = value | {"left_out": left_out} if isinstance(value, dict) else value
    if options.as_json:
        print(json.dumps(value, indent=1))
    for part in () if options.as_json else answer.shown:
        for one in (part,) if isinstance(part, str) else fit(part, width):
            print(one) if isinstance(one, str) else console.print(one)
    if answer.error:
        raise answer.error


class Strata(click.Group):
    """Turns our own errors into one line and an exit code; anything else stays a bug."""

    def main(self, *args: Any, **how: Any) -> Any:
        streams.install()
        try:
            return super().main(*args, **how)
        finally:
            if why := streams.lost():
                click.echo(f"Warning: the answer on stdout is lost: {why.lower()}", err=True)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt, SystemExit) as raised:
            error = errors.ours(raised)
            code = errors.exit_code(error)
            if code is None:
                raise
            click.echo(f"Error: {ranks.voice()}{errors.one_line(error)}", err=True)
            ctx.exit(code)


SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=Strata, epilog=errors.HELP, context_settings=SETTINGS)
@click.version_option(package_name="strata")
def main() -> None:
    """Train CNNs one layer at a time, each from the cached features of the layers below.

    RECIPE is a built-in name (see `recipes`) or a path to a TOML file; the default is digits. Every
    command does what is missing and says what it skips.
    """


for path, (help, parameters) in COMMANDS.items():
    name, does = path.rpartition(".")[2], partial(perform, path)
    main.add_command(click.Command(name, callback=does, params=[*parameters], help=help))

if __name__ == "__main__":
    main()
