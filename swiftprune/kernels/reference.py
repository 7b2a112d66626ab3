"""The slow oracle: select, pack and unpack in plain torch, written for reading rather than for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.errors import FormatError
from swiftprune.formats.spec import GROUP, KEPT, SCALE_DTYPE, SCALED_INPUTS, Packed24, Quantized
from swiftprune.kernels.levels import LARGEST, codebook, from_values, to_values
from swiftprune.kernels.score_factors import EwmaGains, ScoreFactors

# (pos0, pos1) stored for each set of non-zero kept positions, by the bits of the set (format.py, rule 4);
# None where the set has more than two members.
STORED_POSITIONS: tuple[tuple[int, int] | None, ...] = (
    (2, 3),
    (0, 2),
    (1, 2),
    (0, 1),
    (2, 3),
    (0, 2),
    (1, 2),
    None,
    (2, 3),
    (0, 3),
    (1, 3),
    None,
    (2, 3),
    None,
    None,
    None,
)


# Of the scale at which the largest weight is just reached; a smaller one rounds the many finer and cuts off the few.
_SCALE_FACTORS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


class ReferenceKernels:
    """See `dispatch.Kernels`."""

    def prune_pack(self, weight: Tensor, factors: ScoreFactors, name: str) -> tuple[Tensor, Tensor]:
        groups = _groups(weight)
        _check_finite(groups, name)
        scores = factors.scores(weight).reshape(groups.shape).masked_fill_(groups == 0, -torch.inf)
        # A stable descending sort ranks the lower position first among equal scores.
        order = scores.argsort(dim=-1, descending=True, stable=True)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)
        return _store(torch.where(keep, groups, 0))

    def pack(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        groups = _groups(weight)
        _check_finite(groups, name)
        count = (groups != 0).sum(-1)
        if (count > 2).any():
            row, group = (count > 2).nonzero()[0].tolist()
            raise too_many_non_zeros(name, row, group, int(count[row, group]))
        return _store(groups)

    def unpack(self, values: Tensor, metadata: Tensor, name: str) -> Tensor:
        positions = stored_positions(values, metadata)
        if (bad := positions[..., 0] >= positions[..., 1]).any():
            row, group = bad.nonzero()[0].tolist()
            raise bad_metadata(name, row, group, int(metadata[row, group // 2]) >> group % 2 * 4 & 15)
        return scatter(values, positions)

    def ewma_zscore(self, score: Tensor, mean: Tensor, deviation: Tensor, gains: EwmaGains) -> Tensor:
        columns = []
        for now in score.T:
            distance = now - mean
            columns.append(distance / (deviation + gains.floor))
            deviation = deviation + gains.deviation * (distance.abs() - deviation)
            mean = mean + gains.mean * distance
        return torch.stack(columns, dim=1)

    def kth_value(self, values: Tensor, rank: int) -> float:
        return float(values.flatten().kthvalue(rank + 1).values)

    def prune_columns(self, weight: Tensor, factor: Tensor, keep: Tensor | tuple[int, int]) -> tuple[Tensor, Tensor]:
        part = weight.clone()
        errors = torch.empty_like(part)
        mask = keep if isinstance(keep, Tensor) else torch.empty(part.shape, dtype=torch.bool, device=part.device)
        for k in range(part.shape[1]):
            if not isinstance(keep, Tensor) and k % keep[1] == 0:
                together = slice(k, k + keep[1])
                scores = part[:, together].square() / factor.diagonal()[together].square()
                order = scores.argsort(dim=1, descending=True, stable=True)  # of equal ones the first comes first
                mask[:, together] = torch.zeros_like(mask[:, together]).scatter_(1, order[:, : keep[0]], True)
            stored = torch.where(mask[:, k], part[:, k], 0)
            errors[:, k] = (part[:, k] - stored) / factor[k, k]
            part[:, k + 1 :] -= errors[:, k, None] * factor[k, k + 1 :]
            part[:, k] = stored
        return part, errors

    def int4_scales(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        rows = len(weight)
        parts = _scaled_together(weight)
        weighs = None if importance is None else _scaled_together(importance[None])
        largest = parts.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 2**10)
        best, lowest = torch.empty(0), torch.full_like(largest, torch.inf)
        for signed in [sign * factor / LARGEST for factor in _SCALE_FACTORS for sign in (1, -1)]:
            scale = (signed * largest).to(SCALE_DTYPE)
            error = (from_values(to_values(parts, scale, "int4"), scale) - parts).square() * (parts != 0)
            if weighs is not None:
                error *= weighs.repeat(rows, 1)
            while error.shape[1] > 1:  # in an order that lanes of any number can keep
                first, second = error.chunk(2, dim=1)
                error = first + second
            best = torch.where(error < lowest, scale, best) if best.numel() else scale
            lowest = torch.minimum(error, lowest)
        return best.view(rows, -1)

    def round_columns(
        self, weight: Tensor, keep_mask: Tensor, factor: Tensor, scales: Tensor, quantized: Quantized
    ) -> tuple[Tensor, Tensor]:
        part = weight.clone()
        values, errors = [], torch.empty_like(part)
        for k in range(part.shape[1]):
            values.append(to_values(part[:, k : k + 1], scales, quantized))
            rounded = torch.where(keep_mask[:, k], from_values(values[-1], scales)[:, 0], 0)
            errors[:, k] = (part[:, k] - rounded) / factor[k, k]
            part[:, k + 1 :] -= errors[:, k, None] * factor[k, k + 1 :]
        return torch.cat(values, dim=1), errors

    def descend_columns(
        self, stored: Tensor, gradient: Tensor, keep_mask: Tensor, gram: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        stored, part = stored.clone(), gradient.clone()
        values = []
        for k in range(stored.shape[1]):
            values.append(to_values((stored[:, k] + part[:, k] / gram[k, k])[:, None], scales, "int4"))
            best = torch.where(keep_mask[:, k], from_values(values[-1], scales)[:, 0], 0)
            part[:, k + 1 :] -= (best - stored[:, k])[:, None] * gram[k, k + 1 :]
            stored[:, k] = best
        return torch.cat(values, dim=1), stored


def _scaled_together(rows: Tensor) -> Tensor:
    """(N * S, 128) of `rows` (N, K): inputs that share a scale of 4-bit values, filled up with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % SCALED_INPUTS)).reshape(-1, SCALED_INPUTS)


def stored_positions(values: Tensor, metadata: Tensor) -> Tensor:
    """Positions within their groups (N, K/4, 2) int64 of `values` (N, K/2), on any device, unchecked."""
    nibbles = torch.stack((metadata & 15, metadata >> 4), dim=-1).flatten(1)[:, : values.shape[1] // 2]
    return torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()


def unpack_unchecked(packed: Packed24) -> Tensor:
    """The weight (N, K) with its zeros, on any device, without waiting for it; a quantized one in float32."""
    values = stored_values(packed)
    return scatter(values, stored_positions(values, packed.metadata))


def stored_values(packed: Packed24) -> Tensor:
    """(N, K/2): the numbers that the stored values stand for, of quantized ones in float32."""
    if packed.scales is None:
        return packed.values
    values, scales = packed.values, packed.scales.float()
    if packed.quantized == "int8":
        return values.float() * scales
    levels = codebook(values.device)[torch.stack((values & 15, values >> 4), dim=-1).flatten(1).long()]
    stored = SCALED_INPUTS // GROUP * KEPT  # that share a scale
    return levels * scales.repeat_interleave(stored, dim=1)[:, : levels.shape[1]]


def stored_mask(packed: Packed24) -> Tensor:
    """(N, K) bool: True where a value is stored."""
    rows, cols = packed.shape
    ones = torch.ones(rows, cols // GROUP * KEPT, dtype=torch.bool, device=packed.values.device)
    return scatter(ones, stored_positions(ones, packed.metadata))


def scatter(values: Tensor, positions: Tensor) -> Tensor:
    """The weight (N, K) with zeros between the values."""
    weight = torch.zeros(*positions.shape[:2], 4, dtype=values.dtype, device=values.device)
    return weight.scatter_(-1, positions, values.reshape(positions.shape)).flatten(1)


def _groups(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1, 4)


def _check_finite(groups: Tensor, name: str) -> None:
    finite = torch.isfinite(groups).all(-1)
    if not finite.all():
        row, group = (~finite).nonzero()[0].tolist()
        raise not_finite(name, row, group, groups[row, group].tolist())


def _store(groups: Tensor) -> tuple[Tensor, Tensor]:
    """`groups` (N, K/4, 4) with at most two non-zeros each -> values (N, K/2), metadata (N, ceil(K/8))."""
    rows, count, _ = groups.shape
    table = torch.tensor([pair or (0, 0) for pair in STORED_POSITIONS], device=groups.device)
    non_zero_set = ((groups != 0) * torch.tensor([1, 2, 4, 8], device=groups.device)).sum(-1)
    positions = table[non_zero_set]
    values = groups.gather(-1, positions).reshape(rows, 2 * count)
    values = torch.where(values == 0, 0, values)  # no -0.0
    nibbles = (positions[..., 0] | positions[..., 1] << 2).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, count % 2))
    return values, nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def not_finite(name: str, row: int, group: int, values: list[float]) -> FormatError:
    return FormatError(
        f"{name}: row {row}, group {group} (inputs {4 * group}..{4 * group + 3}) holds {values}; "
        "NaN and infinities cannot be pruned or packed, check the checkpoint"
    )


def too_many_non_zeros(name: str, row: int, group: int, count: int) -> FormatError:
    return FormatError(
        f"{name}: row {row}, group {group} (inputs {4 * group}..{4 * group + 3}) has {count} non-zeros; "
        "2:4 allows two, and packing never drops a weight: prune first"
    )


def bad_metadata(name: str, row: int, group: int, nibble: int) -> FormatError:
    return FormatError(
        f"{name}: metadata of row {row}, group {group} is {nibble:#x}, not a pair of ascending "
        "positions; the file is damaged or of another format"
    )
