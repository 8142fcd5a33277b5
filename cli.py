"""The command line: `python cli.py`, or `strata` where the project is installed.

It parses, calls the pipeline and speaks; everything heavy is imported inside the commands, so that
--help, plan and status answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":
    # The checkout that this file lies in, whatever is installed; and so in processes that we start.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here / "typings"), *(p for p in sys.path if Path(p).resolve() != here)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.getenv("PYTHONPATH"))))

from strata.cli_options import (
    DEVICE,
    FOLDER,
    bounded,
    budget_option,
    json_option,
    layer_option,
    only_layer,
    solving,
    spread,
    store_option,
    where,
    work,
    worth,
)
from strata.pipeline import errors
from strata.pipeline.run import ranks


class Strata(click.Group):
    """Turns our own errors into one line and an exit code; anything else stays a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException:
            raise
        except (Exception, KeyboardInterrupt) as error:
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


def answer(options: dict[str, Any], found: Any) -> None:
    """Print the answer of a command: one JSON object for machines, tables and lines for people. Of
    several ranks the first one speaks."""
    if not ranks.leads():
        return
    from rich.console import Console

    # Without wrapping to 80 columns where nobody looks.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    if options["as_json"]:
        click.echo(json.dumps(found.value, indent=1))
    for part in () if options["as_json"] else found.shown:
        click.echo(part) if isinstance(part, str) else console.print(part)
    if found.error:
        raise found.error


@main.command()
@json_option
def recipes(**options: Any) -> None:
    """List the built-in recipes."""
    from strata.pipeline.commands import commands

    answer(options, commands.list_recipes(options))


@main.command()
@where
@budget_option
@bounded
@worth
def plan(**options: Any) -> None:
    """Shapes, bytes and steps of a run, and what of it is left to do. Needs no data and no GPU."""
    from strata.pipeline.commands import commands

    answer(options, commands.make_plan(options))


@main.command()
@where
@DEVICE
def calibrate(**options: Any) -> None:
    """Measure this machine for a recipe, in under a minute: `plan` and --cache auto use it."""
    from strata.pipeline.commands import commands

    answer(options, commands.calibrate(options))


@main.command()
@where
def status(**options: Any) -> None:
    """Which layers are solved, how good they are, and which levels are on disk."""
    from strata.pipeline.commands import commands

    answer(options, commands.status(options))


@main.command()
@solving
@layer_option
def train(**options: Any) -> None:
    """Solve layer j, and whatever it needs first."""
    from strata.pipeline.commands import commands

    answer(options, commands.train(options))


@main.command()
@solving
@layer_option
@spread
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def materialize(**options: Any) -> None:
    """Write x_j, the features after layer j, and whatever that needs first."""
    from strata.pipeline.commands import commands

    answer(options, commands.materialize(options))


@main.command()
@solving
@spread
@budget_option
def run(**options: Any) -> None:
    """Everything: solve every layer from cached features, evaluate, report."""
    from strata.pipeline.commands import commands

    answer(options, commands.run(options))


@main.command()
@solving
@layer_option
@click.option("--vary", multiple=True, required=True, metavar="KEY=VALUE,…", help="Once per key.")
@click.option("--keep", metavar="best|NAME", help="Make it layer j; best: lowest training risk.")
def sweep(**options: Any) -> None:
    """Solve variants of layer j together: every batch of x_{j-1} is read once for all of them.

    May vary: most of schedule, auxiliary.k, auxiliary.width and width of layer j itself, and seed.
    """
    from strata.pipeline.commands import commands

    answer(options, commands.sweep(options))


@main.command()
@solving
@click.option("--vary", multiple=True, required=True, metavar="KEY=VALUE,…", help="Once per key.")
def final(**options: Any) -> None:
    """Train other final classifiers on x_J, with layer J frozen: another M̃_f, or k.

    May vary: what `sweep` may, but width. To solve layer J again too: sweep --layer J.
    """
    from strata.pipeline.commands import commands

    answer(options, commands.final(options))


@main.command()
@work
@click.option("--checkpointing", is_flag=True, help="Compute activations again in backward.")
@click.option("--micro-batch", type=click.IntRange(1), help="Images at a time.  [the recipe's]")
def baseline(**options: Any) -> None:
    """Train the network of a run end to end, by backpropagation, to compare the two."""
    from strata.pipeline.commands import commands

    answer(options, commands.train_baseline(options))


@main.command()
@work
@only_layer
@click.option("--kind", default="linear", type=click.Choice(["linear", "cnn"]), help="Classifier.")
@click.option("--p", type=click.IntRange(1), help="Hidden layers of the CNN.  [1]")
@click.option("--of", default="run", type=click.Choice(["run", "baseline"]), help="Whose layers.")
@click.option("--transfer", metavar="SOURCE", help="Other labelled images: imagefolder:PATH, …")
@click.option("--materialize", is_flag=True, help="Write the x_j that are probed first.")
def probe(**options: Any) -> None:
    """Train a classifier on x_j of every depth: how separable it is. Nothing else is trained."""
    from strata.pipeline.commands import probe as probing

    answer(options, probing.probe(options))


@main.command()
@where
@only_layer
@spread
@click.option("--split", type=click.Choice(["train", "test"]), help="Only this one.  [both]")
@click.option("--channels", is_flag=True, help="A line for each.")
def statistics(**options: Any) -> None:
    """Mean, deviation, extremes and zeros of the channels of x_j, over every row on disk."""
    from strata.pipeline.commands import inspect

    answer(options, inspect.statistics(options))


@main.command()
@where
def evaluate(**options: Any) -> None:
    """Top-1 and top-5 of every layer and of the ensembles, on the test images."""
    from strata.pipeline.commands import commands

    answer(options, commands.evaluate(options))


@main.command()
@where
@click.option("--to", type=FOLDER, required=True, help="A new directory.")
@click.option("--layer", "-l", type=int, help="Layers 1 … j, with C_j.  [all]")
@click.option("--ensemble", is_flag=True, help="All classifiers, weighted by 2^j.")
@click.option("--features", is_flag=True, help="x_j, and no classifier.")
@click.option("--final", metavar="NAME", help="With a classifier that `final` trained.")
def export(**options: Any) -> None:
    """The trained network as files that load without this project: plain PyTorch."""
    from strata.pipeline.commands import inspect

    answer(options, inspect.export(options))


@main.command()
@where
@click.option("--paper", is_flag=True, help="Instead: the paper's tables, ours beside them.")
@click.option("--runs", type=FOLDER, default="runs", help="Of --paper: RECIPE/SEED in it.")
def report(**options: Any) -> None:
    """Write report.json and report.html into the run; or the paper's tables with our figures."""
    from strata.pipeline.commands import commands

    answer(options, commands.report(options))


@main.command()
@where
@only_layer
@click.option("--features", is_flag=True, help="Only features; weights and records stay.")
@click.option("--sweeps", is_flag=True, help="Only what was swept; layers stay.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before weights are removed.")
def clean(**options: Any) -> None:
    """Remove features, and if not only these, layers; sweeps with --sweeps or the whole run."""
    from strata.pipeline.commands import commands

    def confirm(what: str) -> None:
        click.confirm(f"remove {what}?", abort=True, err=True)

    answer(options, commands.clean(options, confirm))


@main.command()
@work
@only_layer
@spread
@click.option("--deep", is_flag=True, help="Read every byte, not only sizes and small files.")
@click.option("--repair", is_flag=True, help="Compute what is damaged again, and only that.")
def verify(**options: Any) -> None:
    """Check every file of the store and of the run against its hash, and name what is damaged."""
    from strata.pipeline.commands import commands

    answer(options, commands.verify(options))


@main.command()
@where
@layer_option
def explain(**options: Any) -> None:
    """Why x_j is not there, or not to be used: which field changed, from what to what."""
    from strata.pipeline.commands import commands

    answer(options, commands.explain(options))


@main.command()
@where
@layer_option
@click.option("--force", is_flag=True, help="Even if other runs use it.")
def evict(**options: Any) -> None:
    """Remove x_j to make space, if all is there that makes it again."""
    from strata.pipeline.commands import commands

    answer(options, commands.evict(options))


@main.command()
@store_option
@json_option
def du(**options: Any) -> None:
    """Every level of a store: rows, bytes on disk, and the runs that use it."""
    from strata.pipeline.commands import commands

    answer(options, commands.disk_use(options))


@main.command()
@store_option
@click.option("--delete", is_flag=True, help="Remove it; without this, it is only listed.")
@json_option
def gc(**options: Any) -> None:
    """Levels that no run refers to, and what repairs set aside, with their bytes."""
    from strata.pipeline.commands import commands

    answer(options, commands.collect_garbage(options))


if __name__ == "__main__":
    main()
