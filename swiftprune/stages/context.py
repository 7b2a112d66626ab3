"""What all stages of a run share: the model, what is asked for, and what was decided so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swiftprune.calibration.data import CalibrationData
from swiftprune.checkpoints import fp8
from swiftprune.checkpoints.source import Checkpoint, Orders
from swiftprune.compute import Compute
from swiftprune.config import DTYPES, PruneSettings
from swiftprune.formats import spec
from swiftprune.formats.spec import check_finite
from swiftprune.kernels import packing
from swiftprune.methods.mask import Pattern
from swiftprune.methods.scores import KEEP, find_method
from swiftprune.methods.statistics import Needs
from swiftprune.models.linears import as_linears
from swiftprune.models.load import load_whole_model
from swiftprune.models.plan import Block, Linear, Targets, empty_model, find_targets
from swiftprune.progress import Notify, ProgressCallback, ignore_message, no_progress
from swiftprune.ranks import Ranks
from swiftprune.results import PrunedBlock, PrunedWeight
from swiftprune.stages import prepare
from swiftprune.stages.clock import StageClock
from swiftprune.stages.compressed_tensors import StoredWeights, declared_format
from swiftprune.stages.distill import Validation
from swiftprune.stages.keep import KeepMasks
from swiftprune.stages.store import BlockStore


class Run:
    """One pruning run over one checkpoint. Making it checks settings and headers, before any work.

    `keeps_values` says whether the result may hold 8-bit values that the checkpoint stores as they are; `ranks` are
    the processes that share the work.
    `data`, `orders`, `fitted_samples` and `dense_linears` are what a run decides on the way; one that is resumed is
    given those of the run before it. `clock` fills up on the way.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: PruneSettings,
        *,
        data: CalibrationData | None = None,
        progress: ProgressCallback = no_progress,
        notify: Notify = ignore_message,
        keeps_values: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.stored_weights: StoredWeights | None = None
        """Of a checkpoint that compressed-tensors wrote 2:4."""
        if declared_format(checkpoint.quantization):
            self.stored_weights = StoredWeights(checkpoint, settings.dtype)
            checkpoint = self.stored_weights.checkpoint
            keeps_values &= self.stored_weights.is_quantized and settings.values in (None, "int8")
        elif checkpoint.quantization.get("quant_method") == fp8.METHOD:
            checkpoint = fp8.with_plain_weights(checkpoint)
            notify(f"{checkpoint.name} is stored in fp8: its weights are read in the type of the model.")
        else:
            checkpoint.refuse_quantized()
        self.keeps_values = keeps_values and self.stored_weights is not None
        """Whether its values go into the result as they are, in 8 bits."""
        self.model, checkpoint = empty_model(checkpoint)
        """On the meta device; blocks are filled in one at a time."""
        self.checkpoint = checkpoint
        """The source, with experts one by one; a permuted view of it once `permute` is done."""
        self.notify = notify
        self.progress = progress
        self.places = frozenset(self.model.state_dict())
        kept = prepare.with_keep(checkpoint, settings, notify, self.stored_weights)
        self.settings = prepare.with_what_can_be_had(self.model, kept, notify).resolved()
        self.pattern = Pattern.parse(self.settings.pattern)
        self.method = find_method(self.settings.method)
        assert self.settings.compute != "auto"
        self.compute = Compute(torch.device(self.settings.device), DTYPES[self.settings.compute])
        self.clock = StageClock(self.compute.wait)
        self.data = data
        self.orders: Orders | None = None
        self.dense_linears: list[str] | None = None
        """Linears that `max_perplexity_ratio` left dense."""
        self.fitted_samples: int | None = None
        """Calibration sequences that fit into the minutes of a preset, where it set more."""
        self.input_scales: dict[str, dict[str, Tensor]] = {}
        """By block and tensor, (K,) fp32: what weights were multiplied by as norms took it over (see `equalize`)."""
        self.validations: list[Validation] = []
        self.started = time.monotonic()
        self.needs: Needs = prepare.needs(self.settings, self.method)
        group = self.pattern.group if self.pattern.structured else 1
        self.targets: Targets = find_targets(self.model, checkpoint, ignore=self.settings.ignore, group=group)
        self.masks = KeepMasks(Path(self.settings.mask)) if self.settings.mask else None
        prepare.check_ranks(self)
        prepare.check_dtype(self)
        prepare.check_text(self)
        self.settings = prepare.with_conversations(self)
        prepare.check_head(self)
        prepare.check_length(self)
        prepare.note_few_tokens(self)
        prepare.check_memory(self)
        if self.settings.method == KEEP:
            self.targets = prepare.without_violations(self)
            if self.stored_weights:
                prepare.decide_values(self, self.stored_weights)
        else:
            prepare.note_sparse_weights(self)

    def pruned_count(self) -> int:
        """Weights in all linears that are pruned."""
        linears = (linear for block in self.targets.blocks for linear in block.linears)
        return sum(torch.Size(self.checkpoint.tensors[linear.tensor].shape).numel() for linear in linears)

    def permuted(self, names: Iterable[str]) -> dict[str, PrunedWeight]:
        """Those of the checkpoint's tensors `names` that `permute` reordered."""
        return {**self.checkpoint.read(name for name in names if name in (self.orders or {}))}

    def put_pruned(
        self, student: nn.Module, load: Callable[[Block], Mapping[str, PrunedWeight]]
    ) -> dict[str, PrunedWeight]:
        """Puts the tensors of all blocks, as `load` gives them, in place; returns the pruned ones by parameter."""
        weights = {}
        places = student.state_dict()
        outside = self.checkpoint.read(self.targets.outside)  # they may be permuted
        for name, tensor in self.targets.tensor_of.items():
            if tensor in outside and name in places:
                places[name].copy_(outside[tensor])
        for block in self.targets.blocks:
            stored = load(block)
            pruned = {linear.tensor for linear in block.linears}
            for name, tensor in self.parameters(block).items():
                places[name].copy_(packing.unpack(stored[tensor], name))
                if tensor in pruned:
                    weights[name] = stored[tensor]
        return weights

    def by_parameter(self, block: Block, weights: Mapping[str, PrunedWeight]) -> dict[str, Tensor]:
        """Those of `weights`, by tensor name, that the block's parameters are made of: dense, by parameter name."""
        return {
            name: packing.unpack(weights[tensor], name)
            for name, tensor in self.parameters(block).items()
            if tensor in weights
        }

    def parameters(self, block: Block) -> dict[str, str]:
        """Parameter or buffer of the model -> tensor of the checkpoint, of one block.

        A tensor that the model has no place for, as older checkpoints hold some, is not among them.
        """
        own = set(block.tensors)
        return {
            name: tensor for name, tensor in self.targets.tensor_of.items() if tensor in own and name in self.places
        }

    def read_dense(self, block: Block) -> dict[str, Tensor]:
        """The weights of a block's linears before pruning, times their `input_scales`."""
        return self.with_input_scales(block, self.checkpoint.read(linear.tensor for linear in block.linears))

    def with_input_scales(self, block: Block, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`dense` weights of a block, by tensor, times their `input_scales`."""
        scales = self.input_scales.get(block.name, {})
        return {
            name: weight * scales[name].to(weight.device) if name in scales else weight
            for name, weight in dense.items()
        }

    def stored_dtype(self, linear: Linear) -> torch.dtype:
        """The type that the weight of `linear` is written in."""
        dtype = self.checkpoint.tensors[linear.tensor].dtype
        assert dtype is not None, "find_targets refuses others"
        return self._stored(dtype)

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return DTYPES[self.settings.dtype] if self.settings.dtype else dtype

    def to_store(self, tensor: str, weight: Tensor, sparse: bool) -> PrunedWeight:
        """A trained fp32 weight as it is written. Raises FormatError where its type cannot hold it."""
        dtype = self.checkpoint.tensors[tensor].dtype
        assert dtype is not None
        weight = weight.to(self._stored(dtype))
        if sparse and self.pattern.name == spec.FORMAT:
            return packing.pack(weight, tensor)
        check_finite(weight, tensor)
        return weight

    def load_whole(self, dtype: torch.dtype) -> Any:
        """The source's model on the run's device, experts with linears of their own."""
        model = load_whole_model(
            self.checkpoint.folder, dtype=dtype, trust_remote_code=self.checkpoint.trust_remote_code
        )
        as_linears(model)
        return model.to(self.compute.device)

    def save(self, store: BlockStore, done: PrunedBlock) -> None:
        with self.clock("write"):
            store.save(done)
