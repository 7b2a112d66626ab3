"""What enters the linears of a block, summed up as it goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swiftprune.formats.spec import GROUP
from swiftprune.methods.statistics import InputStats, Needs
from swiftprune.models.plan import Linear
from swiftprune.ranks import Ranks


class InputObserver:
    """Sums up the InputStats of a block's linears; those that are fed the same tensor (q, k, v) share one object.

    `needs` is what to collect. `tokens_kept` of each sample are kept as they are. `writers` has, of each linear that
    writes to the residual stream, the factor by which it does.
    """

    def __init__(self, needs: Needs, tokens_kept: int, writers: Mapping[str, float]) -> None:
        self.stats: dict[str, InputStats] = {}
        self.residual_drift: Tensor | None = None
        """(T, H): what the residual stream lacks in the sample at hand."""
        self._needs = needs
        self._writers = writers
        self._tokens_kept = tokens_kept
        self._seen: list[tuple[Tensor, InputStats]] = []
        self._dense: dict[str, Tensor] = {}

    def new_sample(self) -> None:
        self._seen = []
        self._dense = {}

    def update_dense(self, linear: Linear, inputs: Tensor) -> None:
        """Takes what entered `linear` in the dense model, before `update` takes the same tokens' inputs."""
        self._dense[linear.name] = inputs

    def update(self, linear: Linear, inputs: Tensor) -> None:
        """Adds `inputs` (..., K) of `linear`, of one sample."""
        for seen, stats in self._seen:
            if seen is inputs:
                self.stats[linear.name] = stats
                return
        stats = self.stats.setdefault(linear.name, InputStats(token_count=0))
        self._seen.append((inputs, stats))
        rows = _rows(inputs)
        stats.token_count += len(rows)
        step = max(1, len(rows) // self._tokens_kept)
        some = rows[step // 2 :: step][: self._tokens_kept].clone()
        stats.sample = some if stats.sample is None else torch.cat((stats.sample, some))
        if self._needs in ("nothing", "input_sq_sum"):  # of nothing, whether inputs are finite
            stats.input_sq_sum = _plus(stats.input_sq_sum, rows.square().sum(0))
        elif self._needs == "group_gram":
            groups = rows.T.reshape(-1, GROUP, len(rows))
            stats.group_gram = _plus(stats.group_gram, groups @ groups.mT)
        else:
            stats.gram = _plus_product(stats.gram, rows, rows)
        if self._needs == "drift":
            stats.input_drift = _plus_product(stats.input_drift, _rows(self._dense[linear.name]) - rows, rows)
            if factor := self._writers.get(linear.name):
                assert self.residual_drift is not None
                stats.residual_drift = _plus_product(stats.residual_drift, self.residual_drift / factor, rows)

    def add_others(self, ranks: Ranks, linears: Sequence[Linear], device: torch.device) -> None:
        """Adds what the observers of all other processes saw, of `linears` in the same order everywhere."""
        if ranks.count == 1:
            return
        own: dict[int, list[str]] = {}
        for linear in linears:
            if stats := self.stats.get(linear.name):
                own.setdefault(id(stats), []).append(linear.name)
        others = ranks.from_all(
            {name: (names, _described(self.stats[name])) for names in own.values() for name in names}
        )
        done: set[str] = set()
        for linear in linears:
            seen = next((each[linear.name] for each in others if linear.name in each), None)
            if seen is None or linear.name in done:
                continue
            names, fields = seen
            stats = self.stats.get(linear.name) or InputStats(token_count=0)
            for field, shape in fields.items():
                tensor = getattr(stats, field)
                if tensor is None:
                    tensor = torch.zeros(shape, device=device)
                    setattr(stats, field, tensor)
                ranks.sum(tensor)
            own_sample = None if stats.sample is None else stats.sample.cpu()
            counts, samples = zip(*ranks.from_all((stats.token_count, own_sample)), strict=True)
            stats.token_count = sum(counts)
            stats.sample = torch.cat([sample for sample in samples if sample is not None]).to(device)
            self.stats |= dict.fromkeys(names, stats)
            done.update(names)


_SUMS = ("input_sq_sum", "group_gram", "gram", "input_drift", "residual_drift")


def _described(stats: InputStats) -> dict[str, torch.Size]:
    """Which sums it has, and their shapes."""
    found = {field: getattr(stats, field) for field in _SUMS}
    return {field: tensor.shape for field, tensor in found.items() if tensor is not None}


def _rows(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, inputs.shape[-1]).float()


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total` + left^T right, in place: for wide layers a second (K, K) would be as large as a block."""
    return left.T @ right if total is None else total.addmm_(left.T, right)
