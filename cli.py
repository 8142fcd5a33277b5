"""The command line: `python cli.py`, or `strata` where the project is installed.

It parses, calls the pipeline and speaks; everything heavy is imported inside the commands, so that
--help, plan and status answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
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
store_option = click.option(
    "--store", type=FOLDER, default="features", help="Of levels; runs may share it."
)

WHERE = (
    click.argument("recipe", default="digits"),
    click.option("--run", "run_dir", type=FOLDER, help="Run directory.  [runs/RECIPE/SEED]"),
    store_option,
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


def working(command: Command) -> Command:
    """The options of every command that computes."""
    return where(reduce(lambda decorated, option: option(decorated), reversed(WORK), command))


def answer(options: dict[str, Any], value: Any, *shown: Any) -> None:
    """A result: one JSON object for machines, or tables and lines for people."""
    from rich.console import Console

    if options["as_json"]:
        click.echo(json.dumps(value, indent=1))
        return
    # Without wrapping to 80 columns where nobody looks.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for part in shown:
        click.echo(part) if isinstance(part, str) else console.print(part)


@main.command()
@json_option
def recipes(**options: Any) -> None:
    """List the built-in recipes."""
    from pipeline import tables
    from pipeline.recipes import load, names

    found = {name: load(name)[1] for name in names()}
    claims = {name: recipe.claim.text for name, recipe in found.items()}
    answer(options, claims, tables.of_recipes(found))


@main.command()
@where
@budget_option
def plan(disk_budget: int | None, **options: Any) -> None:
    """Shapes, bytes and steps of a run, and what of it is left to do. Needs no data and no GPU."""
    from pipeline import plan as planning
    from pipeline import tables, work

    found = work.find(options)
    costs = planning.make_plan(found.recipe, found.run.data() if found.run else None)
    todo = planning.steps(found.inventory(), solve=len(found.recipe.layers))
    space = {"needed_bytes": found.to_write(costs.total), "free_bytes": found.store.free_bytes()}
    value = {"recipe": found.name, **costs.as_json(), **space, "todo": [str(s) for s in todo]}
    lines = tables.plan_summary(found.recipe, costs, todo), tables.space(**space)
    answer(options, value, tables.of_plan(found.recipe, costs), *lines)
    if planning.check_budget(costs, disk_budget) and not options["as_json"]:
        click.echo("Within --disk-budget only if levels are removed once unneeded; `run` does so.")


@main.command()
@where
def status(**options: Any) -> None:
    """Which layers are solved, how good they are, and which levels are on disk."""
    from pipeline import status as looking
    from pipeline import tables, work

    found = looking.status(work.find(options))
    answer(options, found, tables.of_status(found))


@main.command()
@working
@layer_option
def train(layer: int, **options: Any) -> None:
    """Solve layer j, and whatever it needs first."""
    from pipeline import work

    finish(options, *work.perform(options, solve=layer))


@main.command()
@working
@layer_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def materialize(layer: int, dry_run: bool, **options: Any) -> None:
    """Write x_j, the features after layer j, and whatever that needs first."""
    from pipeline import work

    if not dry_run:
        finish(options, *work.perform(options, write=layer))
        return
    _, todo = work.missing(options, write=layer)
    lines = [f"would {step}" for step in todo] or [f"x_{layer} is complete: nothing to do"]
    answer(options, {"todo": todo}, *lines)


@main.command()
@working
@budget_option
def run(disk_budget: int | None, **options: Any) -> None:
    """Everything: solve every layer from cached features, evaluate, report."""
    from pipeline import plan as planning
    from pipeline import tables, work

    found = work.find(options)
    evict = planning.check_budget(planning.make_plan(found.recipe), disk_budget)
    found, done = work.perform(options, solve=len(found.recipe.layers), evict=evict)
    page = found.directory / "report.html"
    if done or not page.exists():
        from pipeline.report import write_report

        page = write_report(work.find(options))
    finish(options, found, done)
    if not options["as_json"]:
        table = tables.of_evaluation(work.find(options).evaluation())
        answer(options, None, table, f"report: {page}")


@main.command()
@where
def evaluate(**options: Any) -> None:
    """Top-1 and top-5 of every layer and of the ensembles, on the test images."""
    from pipeline import tables, work
    from pipeline.evaluation import evaluate as measure

    found = work.find(options)
    result = measure(found.existing(), found.store)
    answer(options, result, tables.of_evaluation(result))


@main.command()
@where
def report(**options: Any) -> None:
    """Write report.json and report.html into the run."""
    from pipeline import work
    from pipeline.report import write_report

    page = write_report(work.find(options))
    value = json.loads(page.with_suffix(".json").read_text("utf-8"))
    answer(options, value, f"report: {page}")


@main.command()
@where
@click.option("--layer", "-l", type=int, help="Only this layer.  [all, and the run itself]")
@click.option("--features", is_flag=True, help="Only features; weights and records stay.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before weights are removed.")
def clean(layer: int | None, features: bool, dry_run: bool, yes: bool, **options: Any) -> None:
    """Remove features (they can be made again), and without --features the trained layers too."""
    from pipeline import cleaning, work
    from pipeline.progress import size

    found = work.find(options)
    if layer is not None:
        found.check_layer(layer)
    what = cleaning.removal(found, layer, features_only=features)
    text = f"{', '.join(what.names) or 'nothing'} ({size(what.nbytes)})"
    if what.layers and not (yes or dry_run):
        click.confirm(f"remove {text}?", abort=True, err=True)
    if not dry_run:
        cleaning.remove(found, what)
    removed = {"removed": [] if dry_run else what.names, "would_remove": what.names}
    answer(
        options,
        {**removed, "bytes": what.nbytes},
        f"{'would remove' if dry_run else 'removed'} {text}",
    )


@main.command()
@working
@click.option("--layer", "-l", type=int, help="Only x_j and the weights of layer j.")
@click.option("--deep", is_flag=True, help="Read every byte, not only sizes and small files.")
@click.option("--repair", is_flag=True, help="Compute what is damaged again, and only that.")
def verify(layer: int | None, deep: bool, repair: bool, **options: Any) -> None:
    """Check every file of the store and of the run against its hash, and name what is damaged."""
    from pipeline import tables, verifying, work

    found = work.find(options)
    checked = verifying.verify(found, deep=deep, layer=layer, report=work.reporting(options))
    mended = []
    if repair and checked.count:
        with work.at_work(found, options) as session:
            mended = verifying.repair(session, checked)
        checked = verifying.verify(work.find(options), deep=deep, layer=layer)
    value = {**checked.as_json(), "mended": mended}
    answer(options, value, *mended, *tables.findings(checked, deep=deep))
    if checked.count:
        click.get_current_context().exit(errors.DAMAGED)


@main.command()
@where
@click.option("--layer", "-l", type=int, required=True, help="j, from 0 (the images).")
def explain(layer: int, **options: Any) -> None:
    """Why x_j is not there, or not to be used: which field changed, from what to what."""
    from pipeline import explaining, tables, work

    found = explaining.explain(work.find(options), layer)
    answer(options, [entry.as_json() for entry in found], *tables.explanations(found))


@main.command()
@where
@layer_option
@click.option("--force", is_flag=True, help="Even if other runs use it.")
def evict(layer: int, force: bool, **options: Any) -> None:
    """Remove x_j to make space, if all is there that makes it again."""
    from pipeline import upkeep, work
    from pipeline.progress import size

    found = work.find(options)
    freed = upkeep.evict(found, layer, force=force)
    again = f"`materialize {found.name} --layer {layer}` makes it again"
    answer(options, {"freed": freed}, f"removed x_{layer}: {size(freed)} freed; {again}")


@main.command()
@store_option
@json_option
def du(store: Path, **options: Any) -> None:
    """Every level of a store: rows, bytes on disk, and the runs that use it."""
    from pipeline import tables, upkeep

    found = upkeep.disk_use(store)
    answer(options, found, tables.of_disk_use(found), tables.disk_use_summary(found))


@main.command()
@store_option
@click.option("--delete", is_flag=True, help="Remove it; without this, it is only listed.")
@json_option
def gc(store: Path, delete: bool, **options: Any) -> None:
    """Levels that no run refers to, and what repairs set aside, with their bytes."""
    from pipeline import tables, upkeep

    found = upkeep.garbage(store)
    kept = upkeep.collect(store, found) if delete else found
    value = {"garbage": [item.as_json() for item in found], "left": [str(k.path) for k in kept]}
    answer(options, value, *tables.of_garbage(found, kept))


def finish(options: dict[str, Any], found: Any, done: list[str]) -> None:
    """Say what was done."""
    value = {"run": str(found.directory), "store": str(found.store.root), "done": done}
    text = f"done: {', '.join(done)}" if done else "nothing to do: everything is there"
    answer(options, value, text)


if __name__ == "__main__":
    main()
