"""The options of the command line, under the names that it gives them; `--help` says what each
means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What a command was told. A default is what the command line gives, and what a command has
    that does not know the option."""

    recipe: str = "digits"
    run_dir: Path | None = None
    store: Path | str = Path("features")
    read_cache: str | None = None
    seed: int = 0
    as_json: bool = False
    layer: int | None = None

    device: str = "auto"
    data: str | None = None
    data_root: Path = Path("data")
    held_out: float | None = None
    download: bool = False
    skip_broken: bool = False
    accept_data: bool = False
    tier: str = "auto"
    loader: str = "native"
    gpu_memory: int | None = None
    memory_budget: int | None = None
    workers: int | None = None
    scheduler: str | None = None

    cache: str = "always"
    machine: Path | None = None
    problems: int = 1
    disk_budget: int | None = None

    dry_run: bool = False
    vary: tuple[str, ...] = ()
    keep: str | None = None
    checkpointing: bool = False
    micro_batch: int | None = None
    kind: str = "linear"
    p: int | None = None
    of: str = "run"
    transfer: str | None = None
    materialize: bool = False
    split: str | None = None
    channels: bool = False
    to: Path = Path()
    ensemble: bool = False
    features: bool = False
    onnx: bool = False
    final: str | None = None
    sweeps: bool = False
    yes: bool = False
    deep: bool = False
    repair: bool = False
    force: bool = False
    delete: bool = False

    rows: int = 300
    draw: int | None = None

    confirm: Callable[[str], object] = lambda question: None
    """Asks whether something may be removed, and raises if it may not."""

    @property
    def j(self) -> int:
        """``--layer`` of a command that requires it."""
        assert self.layer is not None
        return self.layer
