"""Solving one auxiliary problem (paper Sec. 3.2): min over (θ_j, γ_j) of the risk, by SGD or AdamW.

The solver takes a step on each batch that it is handed; it knows neither where they come from nor
where its state is kept. Everything it needs to go on after an interruption is in :class:`Solver`,
between any two batches. A step on a GPU waits for none before it: losses are read later.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from strata.stages.errors import Diverged
from strata.stages.memory import watched
from strata.stages.network.featurize import placed
from strata.stages.network.network import compared
from strata.stages.solve.loss import SampleLoss
from strata.stages.solve.mixup import mixed
from strata.stages.solve.momentum import StraightSGD
from strata.stages.solve.ranks import Ranks
from strata.stages.solve.schedule import SGDSchedule

Trainable = TypeVar("Trainable", bound=nn.Module)
"""What is trained: an auxiliary problem, or a whole network."""


@runtime_checkable
class BatchRows(Protocol):
    """Rows of a batch: a tensor such as (B, C, H, W), or what makes them while it is split."""

    def split(self, rows: int, /) -> Iterable[Tensor]:
        """Micro-batches of so many rows, the last perhaps smaller."""
        ...


Batches = Iterable[tuple[BatchRows, Shaped[Tensor, " b ..."]]]

WATCHED_STEPS = 2
"""First steps, of which peak memory is measured: from the second on there is momentum, and then all
steps agree."""
STATE = {"momentum": "momentum_buffer"} | {n: n for n in ("exp_avg", "exp_avg_sq", "step")}
"""What optimisers keep of a weight, by its name in a checkpoint."""
LAG = 8
"""Most steps whose losses a GPU has not told yet: none of them is waited for."""


@dataclass
class Progress:
    """How far a problem is: all that is not a tensor."""

    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Finished batches of the epoch under way."""
    loss_sum: float = 0.0
    """Σ loss over the samples of the epoch under way, of the steps that were read."""
    correct: float = 0.0
    """Σ share of the tokens that are right, over those samples; of one label, 1 or 0. NaN where
    labels are no classes."""
    samples: int = 0
    seconds: float = 0.0
    """Time spent in the epoch under way, over all processes that worked on it."""
    best_risk: float | None = None
    best_epoch: int | None = None
    last_good: float | None = None
    """Mean loss of the last batch that was read."""
    peak_bytes: int = 0
    """Most bytes of tensors on the device in a step; see stages/memory.py."""


@dataclass
class Solver(Generic[Trainable]):
    """One auxiliary problem under way: module, optimiser, progress, and the best iterate so far."""

    problem: Trainable
    schedule: SGDSchedule
    device: torch.device
    compute: torch.dtype
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)
    """In host memory."""
    watched: int = 0
    """Steps whose memory this process has measured."""
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that solve it together; :meth:`step` is given this one's part of the batch."""
    straight: bool = True
    """Large gradients go into the momentum as they come, if the schedule allows it. The step is
    torch.optim.SGD's in any case."""
    draws: Callable[[int, int, int], int] | None = None
    """Seed of what a step draws (dropout), from epoch, batch and rank, which is -1 of what all
    ranks draw alike (mixup); None: it draws nothing."""
    loss: SampleLoss = field(default_factory=SampleLoss)

    def __post_init__(self) -> None:
        placed(self.problem, self.device)
        self.ranks.share_norms(self.problem, self.device)
        plan = self.schedule
        compute = str(self.compute).removeprefix("torch.")
        self.straight &= plan.goes_straight(compute)
        weights = self.problem.parameters()
        how: dict[str, Any] = {"lr": plan.lr, "weight_decay": plan.weight_decay}
        if plan.optimizer == "adamw":  # fused: one kernel, with nothing beside it in memory
            self.optimiser = torch.optim.AdamW(
                weights, betas=(plan.momentum, 0.999), fused=True, **how
            )
        else:
            how |= {"momentum": plan.momentum, "nesterov": plan.nesterov}
            self.optimiser = (StraightSGD if self.straight else torch.optim.SGD)(weights, **how)
        self.lag = LAG if self.device.type == "cuda" and self.ranks.count == 1 else 0
        self._unread: deque[tuple[Tensor, Any, int]] = deque()
        """Σ loss and hits of steps that are not read yet, the event at which they are on the host
        (None: they are there), and rows."""
        self.scaler = torch.amp.GradScaler(  # pyright: ignore
            self.device.type, enabled=self.compute == torch.float16
        )

    # ---- state between two batches ------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers, what the optimiser keeps, and best iterate: with :attr:`progress`, all
        the state."""
        state = {f"problem.{n}": t for n, t in self.problem.state_dict().items()}
        for name, parameter in self.problem.named_parameters():
            kept = self.optimiser.state.get(parameter, {})
            found = {n: kept.get(own) for n, own in STATE.items()}
            state |= {f"{n}.{name}": t for n, t in found.items() if t is not None}
        return state | {f"best.{n}": t for n, t in self.best.items()}

    def restore(self, tensors: dict[str, Tensor], progress: dict, scaler: dict) -> None:
        """Take up where :meth:`tensors`, :attr:`progress` and the scaler's state were saved."""
        part: dict[str, dict[str, Tensor]] = {n: {} for n in ("problem", "best", *STATE)}
        for name, tensor in tensors.items():
            prefix, _, rest = name.partition(".")
            part[prefix][rest] = tensor
        self.problem.load_state_dict(part["problem"])
        for name, parameter in self.problem.named_parameters():
            for n in (n for n in STATE if name in part[n]):
                kept = torch.empty_like(parameter, dtype=(found := part[n][name]).dtype)
                kept = kept if found.shape == kept.shape else kept.new_empty(found.shape)
                self.optimiser.state[parameter][STATE[n]] = kept.copy_(found)
        self.best = part["best"]
        self.progress = Progress(**progress)
        if scaler:
            self.scaler.load_state_dict(scaler)

    def snapshot(self) -> dict:
        """The state that is not tensors, as JSON. All steps must be read: see :meth:`settle`."""
        assert not self._unread
        return {"progress": asdict(self.progress), "scaler": self.scaler.state_dict()}

    # ---- one epoch ------------------------------------------------------------------------------

    def train_on(self, x: BatchRows, y: Tensor, steps_per_epoch: int) -> None:
        """One step at the schedule's rate, and the progress that makes it resumable.

        The problem must be in training mode. Arguments and errors are those of :meth:`step`.
        """
        done = self.progress
        rate = self.schedule.rate(done.epoch * steps_per_epoch + done.batch, steps_per_epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with self._seeded():
            if self.watched < WATCHED_STEPS:
                self.watched += 1
                with watched(self.device, self.tensors().values()) as peak:
                    self.step(x, y)
                done.peak_bytes = max(done.peak_bytes, peak.nbytes)
            else:
                self.step(x, y)
        done.batch += 1

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Inside, torch's generators go on from the step's seed; after it, from where they were."""
        if self.draws is None:
            yield
            return
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_gpu else []):
            seed = self.draws(self.progress.epoch, self.progress.batch, self.ranks.rank)
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                index = self.device.index
                number = torch.cuda.current_device() if index is None else index
                torch.cuda.default_generators[number].manual_seed(seed)
            yield

    def step(self, x: BatchRows, y: Shaped[Tensor, " b ..."]) -> None:
        """One step at the present rate.

        Args:
            x: x_{j-1} of the batch, for example float (B, C, H, W); what is made while it is split
                is never there whole.
            y: its labels, int64 (B,), or of every token (B, token), or float32 (B,) or (B, k), on
                the device.

        Raises:
            DataError: there are not as many logits as labels.
            UnusableNetwork: a user's loss fails, or gives something else.
            Diverged: the loss of this step, or of one of the :attr:`lag` before it, is not finite.
                The state is of no use then; the last saved one is good.
        """
        micro = -(-len(y) // self.schedule.accumulate)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        parts = iter(x.split(micro))  # none is held here while the next one is made
        straight = self.optimiser if isinstance(self.optimiser, StraightSGD) else None
        draw = None
        if self.schedule.mixup:
            assert self.draws is not None
            at = self.progress.epoch, self.progress.batch
            draw = np.random.default_rng(self.draws(*at, -1))
        with straight.collecting(self.problem) if straight else nullcontext():
            for target in y.split(micro):
                sums += self._backward(next(parts), target, len(y), draw)
        own = (p.grad for p in self.problem.parameters() if p.grad is not None)
        self.ranks.average(straight.sums if straight else own)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        told = sums.to("cpu", non_blocking=True)
        is_told = torch.cuda.current_stream().record_event() if sums.is_cuda else None
        self._unread.append((told, is_told, len(y)))
        self._read(self.lag)

    def _backward(
        self, x: Tensor, target: Tensor, rows: int, draw: np.random.Generator | None
    ) -> Tensor:
        """Gradients of a micro-batch in a batch of so many ``rows``; its Σ loss and hits, float64
        (2,) on the device. ``draw`` is of mixup, if there is any."""
        other, share = target, 1.0
        if draw is not None:
            x, other, share = mixed(x, target, self.schedule.mixup, draw, self.ranks)
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            logits, apart = compared(self.problem, x, target)
        loss, hits = self._judged(logits, target)
        if apart is not None:
            loss = torch.lerp(loss, len(target) * apart[0], apart[1])
        if draw is not None:
            pairs = zip(self._judged(logits, other), (loss, hits), strict=True)
            loss, hits = (torch.lerp(theirs, own, share) for theirs, own in pairs)
        self.scaler.scale(loss / rows).backward()
        return torch.stack((loss.detach().double(), hits))

    def _judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Σ loss and, float64, Σ share of labels that are right; NaN where they are no classes."""
        loss = self.loss.total(logits.float(), labels, self.schedule.label_smoothing)
        if labels.is_floating_point():
            return loss, loss.new_full((), math.nan, dtype=torch.float64)
        return loss, (logits.argmax(-1) == labels).sum().double() / labels[:1].numel()

    def _read(self, left: int) -> None:
        """Add what steps have found to :attr:`progress`, of all but so many. Raises Diverged."""
        done = self.progress
        while len(self._unread) > left:
            told, is_told, rows = self._unread.popleft()
            if is_told is not None:
                is_told.synchronize()
            loss_sum, correct, samples = self.ranks.total(*told.tolist(), rows)
            if not math.isfinite(loss_sum):
                raise self._diverged()
            done.last_good = loss_sum / samples
            done.loss_sum += loss_sum
            done.correct += correct
            done.samples += int(samples)

    def settle(self) -> None:
        """Read all steps, and look at what they have made: the state may be saved then.

        Raises:
            Diverged: a loss, a weight or a momentum is not finite. The last saved state is good.
        """
        self._read(0)
        trained = [*self.problem.parameters()]
        states = [kept.items() for kept in self.optimiser.state.values()]
        trained += [t for kept in states for name, t in kept if name != "step"]
        bounds = [bound for t in trained if t.numel() for bound in torch.aminmax(t.detach())]
        if not torch.stack(bounds).isfinite().all():
            raise self._diverged()

    def _diverged(self) -> Diverged:
        self._unread.clear()
        return Diverged(self.progress.epoch + 1, self.progress.last_good)

    def finish_epoch(self) -> dict[str, Any]:
        """Mean training ``loss``, accuracy ``top1`` (None where labels are no classes), and
        ``seconds`` of the epoch whose last batch was trained on. Raises Diverged: one of its losses
        is not finite."""
        self._read(0)
        done = self.progress
        top1 = None if math.isnan(done.correct) else done.correct / done.samples
        result = {"loss": done.loss_sum / done.samples, "top1": top1, "seconds": done.seconds}
        done.epoch, done.batch = done.epoch + 1, 0
        done.loss_sum, done.correct, done.samples, done.seconds = 0.0, 0.0, 0, 0.0
        return result

    def consider(self, risk: float) -> None:
        """Keep the present iterate if its training risk is the lowest so far (Prop. 3.1)."""
        if self.progress.best_risk is None or risk < self.progress.best_risk:
            self.progress.best_risk, self.progress.best_epoch = risk, self.progress.epoch
            state = self.problem.state_dict()
            self.best = {n: t.to("cpu", copy=True) for n, t in state.items()}

    def finish(self) -> Trainable:
        """The problem at the iterate the schedule keeps, in eval mode."""
        if self.schedule.keep == "best":
            self.problem.load_state_dict(self.best)
        return self.problem.eval()


@torch.inference_mode()
def logits_of(
    problem: nn.Module, batches: Iterable[Tensor], device: torch.device, compute: torch.dtype
) -> Float[Tensor, "n ... classes"]:
    """Logits in eval mode, float32 on the CPU, in the order of the batches."""
    was_training = problem.training
    problem.eval()
    parts = []
    for x in batches:
        with torch.autocast(device.type, compute, enabled=compute != torch.float32):
            parts.append(problem(x).float().cpu())
    problem.train(was_training)
    return torch.cat(parts)
