"""Several processes that prune one model together, as `torchrun` starts them, by torch.distributed.

Each runs all blocks on its share of the calibration sequences and prunes its share of the linears; what entered them is
summed up over all. The first one alone reads text, decides, and keeps what is done; it tells the others.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
S = TypeVar("S", Tensor, list[Any])

# Others wait while the first one samples text. Where one ends with an error, torchrun ends them all.
_PATIENCE = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is; by default it is alone."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: S) -> S:
        """Of `items`, or of the rows of a tensor, those of this process."""
        return items[self.rank :: self.count]

    def from_first(self, value: T) -> T:
        """What the first process gives as `value`; that of others is not looked at."""
        if self.count == 1:
            return value
        values = [value if self.is_first else None]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        found: Any = values[0]
        return found  # type: ignore[no-any-return]

    def by_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, which alone calls it."""
        made: Any = make() if self.is_first else None
        return self.from_first(made)  # type: ignore[no-any-return]

    def from_all(self, value: T) -> list[T]:
        """What each process gives, in order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> None:
        """Makes `tensor` the sum of what all processes have there, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started this one with; one alone where it did not."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or not dist.is_torchelastic_launched():
        yield Ranks()
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(local_device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_device() -> torch.device:
    """The GPU of this process, one for each on a machine."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count()))
