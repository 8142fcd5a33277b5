"""Which depths are worth their disk, on machines that are not here: the table of docs/economics.md.

No measurement: the planner's arithmetic on the machine files in docs/machines, whose figures are
from data sheets. A depth is named with the fewest problems per depth that make its level worth it.

    python benchmarks/economics.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from checkout import ROOT
from strata.pipeline.plan.costs import RecipeCosts
from strata.pipeline.plan.machine import load
from strata.pipeline.plan.worth import weigh
from strata.pipeline.progress import duration
from strata.pipeline.recipe import builtin

MACHINES = ROOT / "docs/machines"
RECIPES = ("cifar10-small", "cifar10-k1", "cifar10-k2", "cifar10-k3")
RECIPES += ("imagenet-k1", "imagenet-k2", "imagenet-k3", "vgg11")


def rows() -> Iterator[str]:
    """Lines of the table, in Markdown."""
    for path in sorted(MACHINES.glob("*.toml")):
        for name in RECIPES:
            yield row(path, name)


def row(path: Path, name: str) -> str:
    recipe = builtin.load(name)[1]
    worth = weigh(RecipeCosts(recipe, load(path), recipe.data.train, recipe.data.test))
    crossovers = ", ".join(f"x_{d.depth}: {d.from_problems or 'never'}" for d in worth.depths)
    times = " | ".join(duration(t) for t in worth.seconds.values())
    return f"| {worth.machine} | `{name}` | {crossovers} | {times} |"


def main() -> None:
    print("| machine | recipe | problems per depth from which it pays | best | always | never |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows()))


if __name__ == "__main__":
    main()
