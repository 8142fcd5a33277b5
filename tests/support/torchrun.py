"""Commands and scripts as several ranks. Run as a script, this file is such a rank: it takes some
steps and keeps what it has after each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from command import TIMEOUT, environment
from root import CLI, PYTHONPATH

from strata.stages.network.network import build_problem
from strata.stages.network.spec import AuxiliarySpec, LayerSpec
from strata.stages.solve.ranks import Ranks
from strata.stages.solve.schedule import SGDSchedule
from strata.stages.solve.solve import Solver

STEPS, BATCH = 6, 12


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = 3 + torch.randn(BATCH, 2, 8, 8, generator=generator)
    return x, torch.randint(0, 5, (BATCH,), generator=generator)


def part(rows: torch.Tensor, ranks: Ranks, accumulate: int) -> torch.Tensor:
    """This rank's rows of every micro-batch."""
    micro = rows.split(-(-len(rows) // accumulate))
    return torch.cat([one.chunk(ranks.count)[ranks.rank] for one in micro])


CHOICES: dict[str, Any] = {"optimizer": "adamw", "mixup": 0.4, "label_smoothing": 0.1}


def steps(
    ranks: Ranks, *, norm: bool, accumulate: int, choices: bool = False
) -> list[dict[str, torch.Tensor]]:
    """The solver's tensors and loss after every step; with AdamW and mixtures if asked."""
    spec = LayerSpec(1, 2, 6, 1, norm, not norm), AuxiliarySpec(6, 2, 4, 5, norm, not norm)
    more: dict[str, Any] = {"lr": 0.01, **CHOICES} if choices else {"lr": 0.1}
    plan = SGDSchedule("step", 1, BATCH, weight_decay=1e-3, accumulate=accumulate, **more)
    problem = build_problem(*spec, seed=3)
    how: Any = {"ranks": ranks, "draws": lambda *step: 9 + sum(step)}
    solver = Solver(problem, plan, torch.device("cpu"), torch.float32, **how)
    solver.problem.train()
    kept = []
    for step in range(STEPS):
        x, y = (part(rows, ranks, accumulate) for rows in batch(step))
        solver.train_on(x, y, STEPS)
        loss = torch.tensor([solver.progress.loss_sum, solver.progress.correct])
        tensors = {"loss": loss, **solver.tensors()}
        kept.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
    return kept


@contextmanager
def torchrun(cwd: Path, count: int, script: Path, *arguments: object) -> Iterator[subprocess.Popen]:
    """So many ranks of a script; they end with the block. Warnings are torchrun's own."""
    line = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    line += [f"--nproc-per-node={count}", str(script), *map(str, arguments)]
    env = environment() | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(
        line, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def with_ranks(cwd: Path, count: int, *arguments: object) -> tuple[int, str, str]:
    """A command of ours under torchrun: exit code, stdout, stderr."""
    with torchrun(cwd, count, CLI, *arguments) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


if __name__ == "__main__":
    out, norm, accumulate = Path(sys.argv[1]), sys.argv[2] == "norm", int(sys.argv[3])
    choices = sys.argv[4:] == ["choices"]
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    torch.save(
        steps(ranks, norm=norm, accumulate=accumulate, choices=choices), out / f"{ranks.rank}.pt"
    )
    dist.destroy_process_group()
