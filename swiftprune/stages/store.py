"""Where a run keeps finished blocks, and what it decided on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from swiftprune.calibration.data import CalibrationData
from swiftprune.checkpoints.source import Orders
from swiftprune.models.plan import Block
from swiftprune.results import PrunedBlock, PrunedWeight
from swiftprune.stages.distill import TrainingStore

if TYPE_CHECKING:
    from swiftprune.stages.context import Run


class BlockStore(TrainingStore, Protocol):
    """Where a run keeps finished blocks: stages that follow read them from here and write them anew.

    An export's store is on disk and also remembers what the run decided, so that an interrupted run can be resumed.
    """

    def finished(self, block: Block) -> bool:
        """Whether the block has been saved."""
        ...

    def load(self, block: Block) -> dict[str, PrunedWeight]:
        """All tensors of a saved block by name in the checkpoint."""
        ...

    def save(self, done: PrunedBlock) -> None: ...

    def keep_data(self, data: CalibrationData) -> None: ...

    def keep_orders(self, orders: Orders) -> None: ...

    def keep_dense_linears(self, names: list[str]) -> None: ...

    def keep_fitted_samples(self, samples: int) -> None: ...


class NoStore:
    """The BlockStore of a process that is not the first one, which keeps nothing."""

    def finished(self, block: Block) -> bool:
        return False

    def load(self, block: Block) -> dict[str, PrunedWeight]:
        raise AssertionError("the first process loads for all")

    def save(self, done: PrunedBlock) -> None: ...

    def load_training(self) -> None: ...

    def save_training(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None: ...

    def keep_data(self, data: CalibrationData) -> None: ...

    def keep_orders(self, orders: Orders) -> None: ...

    def keep_dense_linears(self, names: list[str]) -> None: ...

    def keep_fitted_samples(self, samples: int) -> None: ...


class MemoryStore(NoStore):
    """A BlockStore in memory, for `prune`."""

    def __init__(self, run: Run) -> None:
        self.blocks: dict[str, PrunedBlock] = {}
        self._run = run

    def finished(self, block: Block) -> bool:
        return block.name in self.blocks

    def load(self, block: Block) -> dict[str, PrunedWeight]:
        weights = self.blocks[block.name].weights
        return {**self._run.checkpoint.read(name for name in block.tensors if name not in weights), **weights}

    def save(self, done: PrunedBlock) -> None:
        self.blocks[done.block.name] = done
