"""The command line: `python cli.py`, or `strata` where the project is installed.

It parses, calls the pipeline and speaks; everything heavy is imported inside the commands, so that
--help, plan and status answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import click

from pipeline import errors


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
            click.echo(f"Error: {errors.one_line(error)}", err=True)
            ctx.exit(code)


SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=Strata, epilog=errors.HELP, context_settings=SETTINGS)
@click.version_option(package_name="strata")
def main() -> None:
    """Train CNNs one layer at a time, each from the cached features of the layers below.

    RECIPE is a built-in name (see `recipes`) or a path to a TOML file; the default is digits. Every
    command does what is missing and says what it skips.
    """


Command = Callable[..., None]
FOLDER = click.Path(path_type=Path)


def sized(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Callback of options in bytes."""
    from pipeline.progress import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
layer_option = click.option("--layer", "-l", type=int, required=True, help="j, from 1.")
budget_option = click.option("--disk-budget", callback=sized, help="Refuse to need more: 20GB.")

WHERE = (
    click.argument("recipe", default="digits"),
    click.option("--run", "run_dir", type=FOLDER, help="Run directory.  [runs/RECIPE/SEED]"),
    click.option("--store", type=FOLDER, default="features", help="Of levels; runs may share it."),
    click.option("--seed", default=0, help="Of weights, order and augmentation."),
    json_option,
)
WORK = (
    click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"])),
    click.option("--data", help="Other images for the recipe, e.g. imagefolder:PATH."),
    click.option("--data-root", type=FOLDER, default="data", help="Of torchvision's data sets."),
    click.option("--download", is_flag=True, help="Let torchvision fetch its data set."),
    click.option("--skip-broken", is_flag=True, help="Leave broken images out; do not stop."),
)


def where(command: Command) -> Command:
    """The options of every command that looks at a run."""
    return reduce(lambda decorated, option: option(decorated), reversed(WHERE), command)


def work(command: Command) -> Command:
    """The options of every command that computes."""
    return where(reduce(lambda decorated, option: option(decorated), reversed(WORK), command))


def emit(value: Any) -> None:
    """A result for machines."""
    click.echo(json.dumps(value, indent=1))


def show(renderable: Any) -> None:
    """Print a table, without wrapping it to 80 columns where nobody looks."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(renderable)


@main.command()
@json_option
def recipes(as_json: bool) -> None:
    """List the built-in recipes."""
    from pipeline import tables
    from pipeline.recipes import load, names

    found = {name: load(name)[1] for name in names()}
    if as_json:
        emit({name: recipe.claim.text for name, recipe in found.items()})
    else:
        show(tables.of_recipes(found))


@main.command()
@where
@budget_option
def plan(as_json: bool, disk_budget: int | None, **place: Any) -> None:
    """Shapes, bytes and steps of a run, and what of it is left to do. Needs no data and no GPU."""
    from pipeline import overview, tables
    from pipeline import plan as planning

    found = overview.find(**at(place))
    costs = planning.make_plan(found.recipe, found.run.data() if found.run else None)
    todo = planning.steps(found.inventory(), solve=len(found.recipe.layers))
    if as_json:
        emit({"recipe": found.name, **costs.as_json(), "todo": [str(step) for step in todo]})
    else:
        show(tables.of_plan(found.recipe, costs))
        click.echo(tables.plan_summary(found.recipe, costs, todo))
    if planning.check_budget(costs, disk_budget) and not as_json:
        click.echo("Within --disk-budget only if levels are removed once unneeded; `run` does so.")


@main.command()
@where
def status(as_json: bool, **place: Any) -> None:
    """Which layers are solved, how good they are, and which levels are on disk."""
    from pipeline import overview, tables
    from pipeline import status as looking

    found = looking.status(overview.find(**at(place)))
    if as_json:
        emit(found)
    else:
        show(tables.of_status(found))


@main.command()
@work
@layer_option
def train(layer: int, **options: Any) -> None:
    """Solve layer j, and whatever it needs first."""
    finish(options, *perform(options, solve=layer))


@main.command()
@work
@layer_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def materialize(layer: int, dry_run: bool, **options: Any) -> None:
    """Write x_j, the features after layer j, and whatever that needs first."""
    if not dry_run:
        finish(options, *perform(options, write=layer))
        return
    _, todo = missing(options, write=layer)
    if options["as_json"]:
        emit({"todo": todo})
    else:
        lines = [f"would {step}" for step in todo]
        click.echo("\n".join(lines) or f"x_{layer} is complete: nothing to do")


@main.command()
@work
@budget_option
def run(disk_budget: int | None, **options: Any) -> None:
    """Everything: solve every layer from cached features, evaluate, report."""
    from pipeline import overview
    from pipeline import plan as planning

    found = overview.find(**at(options))
    evict = planning.check_budget(planning.make_plan(found.recipe), disk_budget)
    found, done = perform(options, solve=len(found.recipe.layers), evict=evict)
    page = found.directory / "report.html"
    if done or not page.exists():
        from pipeline.report import write_report

        page = write_report(overview.find(**at(options)))
    finish(options, found, done)
    if not options["as_json"]:
        from pipeline import tables

        show(tables.of_evaluation(overview.find(**at(options)).evaluation()))
        click.echo(f"report: {page}")


@main.command()
@where
def evaluate(as_json: bool, **place: Any) -> None:
    """Top-1 and top-5 of every layer and of the ensembles, on the test images."""
    from pipeline import overview, tables
    from pipeline.evaluation import evaluate as measure

    found = overview.find(**at(place))
    result = measure(found.existing(), found.store)
    if as_json:
        emit(result)
    else:
        show(tables.of_evaluation(result))


@main.command()
@where
def report(as_json: bool, **place: Any) -> None:
    """Write report.json and report.html into the run."""
    from pipeline import overview
    from pipeline.report import write_report

    page = write_report(overview.find(**at(place)))
    if as_json:
        emit(json.loads(page.with_suffix(".json").read_text("utf-8")))
    else:
        click.echo(f"report: {page}")


@main.command()
@where
@click.option("--layer", "-l", type=int, help="Only this layer.  [all, and the run itself]")
@click.option("--features", is_flag=True, help="Only features; weights and records stay.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before weights are removed.")
def clean(
    layer: int | None, features: bool, dry_run: bool, yes: bool, as_json: bool, **place: Any
) -> None:
    """Remove features (they can be made again), and without --features the trained layers too."""
    from pipeline import cleaning, overview
    from pipeline.progress import size

    found = overview.find(**at(place))
    if layer is not None:
        found.check_layer(layer)
    what = cleaning.removal(found, layer, features_only=features)
    named = [f"x_{j}-{fp[:12]}" for j, fp in what.features] + [f"layer {j}" for j in what.layers]
    text = f"{', '.join(named) or 'nothing'} ({size(what.nbytes)})"
    if what.layers and not (yes or dry_run):
        click.confirm(f"remove {text}?", abort=True, err=True)
    if not dry_run:
        cleaning.remove(found, what)
    if as_json:
        emit({"removed": [] if dry_run else named, "would_remove": named, "bytes": what.nbytes})
    else:
        click.echo(f"{'would remove' if dry_run else 'removed'} {text}")


def at(options: dict[str, Any]) -> dict[str, Any]:
    """The options that name a run, as the pipeline calls them."""
    names = {"recipe": "recipe", "directory": "run_dir", "store": "store", "seed": "seed"}
    return {name: options[option] for name, option in names.items()}


def missing(options: dict[str, Any], **goal: int) -> tuple[Any, list[str]]:
    """The run a command speaks of, and the steps it still needs; says what is there already."""
    from pipeline import overview, plan

    found = overview.find(**at(options))
    found.check_layer(max(goal.values()))
    have = found.inventory()
    for line in () if options["as_json"] else plan.skipped(have, **goal):
        click.echo(line, err=True)
    return found, [str(step) for step in plan.steps(have, **goal)]


def perform(options: dict[str, Any], *, evict: bool = False, **goal: int) -> tuple[Any, list[str]]:
    """Do what is missing. Where nothing is, torch is not even imported."""
    found, todo = missing(options, **goal)
    if todo or (found.run and options["data"] not in (None, found.run.source)):
        from pipeline.algorithm import make

        with session(found, options) as opened:
            make(opened, evict=evict, **goal)
    return found, todo


@contextmanager
def session(found: Any, options: dict[str, Any]) -> Iterator[Any]:
    """A session from the options of :func:`work`; Ctrl-C stops it between two batches or shards."""
    from pipeline.interrupt import interruptions
    from pipeline.progress import reporter
    from pipeline.session import open_session

    with interruptions() as stop:
        yield open_session(
            found,
            seed=options["seed"],
            device_name=options["device"],
            source=options["data"],
            report=reporter(quiet=options["as_json"]),
            stop=stop,
            data_root=options["data_root"],
            download=options["download"],
            skip_broken=options["skip_broken"],
        )


def finish(options: dict[str, Any], found: Any, done: list[str]) -> None:
    """Say what was done."""
    if options["as_json"]:
        emit({"run": str(found.directory), "store": str(found.store.root), "done": done})
    else:
        click.echo(f"done: {', '.join(done)}" if done else "nothing to do: everything is there")


if __name__ == "__main__":
    main()
