"""Peak bytes of tensors: of a GPU as its allocator counts them, of a CPU by watching every call.

On a CPU nothing counts tensors, and the peak of the process is mostly libraries and page cache. So
every tensor that a call takes or returns is counted while its storage lives. What a kernel needs in
between (workspaces, a few MB) is seen on a GPU and not here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass
class Peak:
    """Filled in when :func:`watched` ends."""

    nbytes: int = 0


@contextmanager
def watched(device: torch.device, held: Iterable[Tensor] = ()) -> Iterator[Peak]:
    """Peak bytes of the tensors on a device while the block runs.

    ``held`` are tensors that live meanwhile though no call may touch them. A GPU counts all it has.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.nbytes = torch.cuda.max_memory_allocated(device)
        return
    with TensorBytes(device) as counted:
        counted.see(list(held))
        yield peak
    peak.nbytes = counted.peak


class TensorBytes(TorchDispatchMode):
    """Bytes of the storages on one device that calls have shown and that still live."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.now = self.peak = 0

    def see(self, values: Any) -> None:
        """Count what is not counted yet. Storages keep their Python object while they live."""
        for value in tree_iter(values):
            if not isinstance(value, Tensor) or value.device.type != self._device:
                continue
            storage = value.untyped_storage()
            key, nbytes = id(storage), storage.nbytes()
            if key in self._live:
                continue
            self._live[key] = weakref.ref(storage, lambda _, key=key: self._gone(key)), nbytes
            self.now += nbytes
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        _, nbytes = self._live.pop(key)
        self.now -= nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.see((args, kwargs))
        result = func(*args, **kwargs)
        self.see(result)
        return result
