"""Free permutations: input channels are reordered so that important weights do not compete within a group of four.

An order of a layer's inputs costs nothing at run time where the layer before it can give its outputs in that order:

- the inputs of `down_proj`, by the rows of `gate_proj` and `up_proj`;
- the inputs of `o_proj`, inside each head, by the rows of `v_proj` (those of one key-value head serve all its heads);
- the hidden dimension, one order for the whole model: embeddings, norms, every reader's inputs, every writer's outputs.

GPT-NeoX has the same under other names, with v fused into `query_key_value`. The search is that of RIA (Zhang et al.,
ICLR 2024, section 4): channels are dealt to groups by rank, then one channel of every group is put up and all are
handed out again by linear assignment, which is optimal for that step, and again with other channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from swiftprune.calibration.runner import BlockRunner
from swiftprune.checkpoints.source import Checkpoint, Orders
from swiftprune.compute import Compute
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.formats.spec import GROUP
from swiftprune.models.architectures import HEAD_NORMS, ROLES, find_roles
from swiftprune.models.experts import all_experts
from swiftprune.models.plan import Block, Targets, decoder_blocks
from swiftprune.stages.clock import Tick
from swiftprune.stages.text import calibration_tokens

if TYPE_CHECKING:
    from swiftprune.stages.context import Run
    from swiftprune.stages.store import BlockStore

# Of calibration, on which orders are found: they need the energy of channels only, which few tokens tell.
_ORDER_TOKENS = 4096

STEPS = 16
# Bounds for large models: rows looked at, of all weights that read the hidden dimension together, and groups among
# which channels are handed out at a time.
HIDDEN_ROWS = 16384
GROUPS_AT_ONCE = 512
TOLERANCE = 0.02  # of the hidden states behind the last block, permuted against not, in whatever type is computed in


def search_permutation(scores: Tensor) -> Tensor:
    """The order (K,) int64 of the columns of `scores` (N, K), fp32 and not negative, that 2:4 keeps the most of.

    Kept is the sum, over rows and groups of four consecutive columns, of the two highest scores. Never worse than the
    order they are in.
    """
    generator = torch.Generator().manual_seed(0)
    columns = scores.T.contiguous()
    count = len(columns) // GROUP
    ranks = columns.sum(1).argsort(descending=True).view(GROUP, count)
    ranks[1::2] = ranks[1::2].flip(1)
    members = ranks.T.contiguous()
    for _ in range(STEPS):
        leaving = torch.randint(0, GROUP, (count,), generator=generator)
        stays = torch.arange(GROUP) != leaving[:, None]
        staying, put_up = members[stays].view(count, GROUP - 1), members[~stays]
        order = torch.randperm(count, generator=generator)
        for start in range(0, count, GROUPS_AT_ONCE):
            some = order[start : start + GROUPS_AT_ONCE]
            gain = _gain(columns, staying[some], put_up[some])
            groups, channels = linear_sum_assignment(gain.numpy(), maximize=True)
            members[some[groups]] = torch.cat((staying[some[groups]], put_up[some[channels]][:, None]), dim=1)
    found = members.flatten()
    return found if _kept(columns[found]) > _kept(columns) else torch.arange(len(columns))


def _gain(columns: Tensor, staying: Tensor, put_up: Tensor) -> Tensor:
    """(G, G): how much channel j of `put_up` (G,) adds to what group g of `staying` (G, 3) keeps.

    With b the second highest of three scores, a fourth one x adds max(0, x - b) = ((x - b) + |x - b|) / 2.
    """
    first, second, third = columns[staying].unbind(1)
    bar = torch.maximum(torch.minimum(first, second), torch.minimum(torch.maximum(first, second), third))
    candidates = columns[put_up]
    return (candidates.sum(1) - bar.sum(1)[:, None] + torch.cdist(bar, candidates, p=1)) / 2


def _kept(columns: Tensor) -> float:
    return float(columns.view(-1, GROUP, columns.shape[1]).topk(2, dim=1).values.sum())


def permute(run: Run, store: BlockStore) -> None:
    """Makes the checkpoint of `run` a permuted view of it, by orders that were found before or are found now."""
    if not run.settings.permute:
        return
    if run.orders is None:
        run.orders = run.ranks.by_first(lambda: _orders(run))
        store.keep_orders(run.orders)
    if not run.checkpoint.is_permuted:
        run.checkpoint = run.checkpoint.permuted(run.orders)


def _orders(run: Run) -> Orders:
    tokens = calibration_tokens(run)
    assert tokens is not None
    with run.clock("permute"):
        tokens = tokens[: max(1, _ORDER_TOKENS // tokens.shape[1])]
        tick = Tick(run.progress, 0, len(run.targets.blocks) * len(tokens), "permute")
        return find_permutations(run.model, run.checkpoint, run.targets, tokens, compute=run.compute, tick=tick)


def find_permutations(
    model: nn.Module,
    checkpoint: Checkpoint,
    targets: Targets,
    tokens: Tensor,
    *,
    compute: Compute | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Orders:
    """Orders for the tensors of `checkpoint`, by scores (w ||x_k||)^2 on `tokens` (samples, T): Wanda's, squared.

    `tick` is called once a sample and block. Raises SettingsError when the architecture is not one whose permutations
    are known, CheckpointError when the permuted model would not compute what the model does.
    """
    search = _Search(model)
    runner = BlockRunner(model, checkpoint, targets, tokens, compute=compute)
    for block in targets.blocks:
        with runner.block(block) as module:
            stats = runner.collect(block, "input_sq_sum", tick, advance=True)
            search.add_block(block, module, {name: layer.channel_energy for name, layer in stats.items()})
    hidden = search.finish()
    orders = {targets.tensor_of[name]: axes for name, axes in search.orders.items() if name in targets.tensor_of}
    _check_same(model, checkpoint.permuted(orders), targets, tokens[:1], runner.hidden[0][..., hidden], compute)
    return orders


def check_supported(model: nn.Module) -> None:
    """Raises SettingsError when the architecture is not one whose permutations are known."""
    if any(all_experts(model)):
        raise SettingsError("--permute: the permutations of experts are not known; leave it out")
    _Search(model).finish()


def _check_same(
    model: nn.Module, permuted: Checkpoint, targets: Targets, tokens: Tensor, expected: Tensor, compute: Compute | None
) -> None:
    runner = BlockRunner(model, permuted, targets, tokens, compute=compute)
    for block in targets.blocks:
        with runner.block(block):
            runner.advance(block, {}, lambda: None)
    error = float(torch.linalg.vector_norm(runner.hidden[0] - expected) / torch.linalg.vector_norm(expected))
    if not error < TOLERANCE:
        raise CheckpointError(
            f"{permuted.folder}: permuting changes the hidden states of this architecture, by {error:.1%}; "
            "leave out --permute"
        )


class _Search:
    """Gathers orders by parameter name, block after block, and at the end that of the hidden dimension."""

    def __init__(self, model: nn.Module) -> None:
        self.orders: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self._model = model
        self._list, modules = decoder_blocks(model)
        kinds = {name.rpartition(".")[2] for name, child in modules.named_modules() if isinstance(child, nn.Linear)}
        if (roles := find_roles(kinds)) is None:
            raise SettingsError(
                f"--permute knows the decoder blocks of {' and '.join(ROLES)}, not those of {type(model).__name__} "
                f"(linears {', '.join(sorted(kinds))})"
            )
        self._roles = roles
        config: Any = model.config
        self._heads = int(config.get_text_config().num_attention_heads)
        self._blocks = len(modules)
        self._hidden_scores: list[Tensor] = []

    def add_block(self, block: Block, module: nn.Module, energy: Mapping[str, Tensor]) -> None:
        """Finds the orders within a block whose dense weights are loaded; `energy` (K,) is by linear."""
        linears = {
            name.rpartition(".")[2]: (f"{block.name}.{name}", child)
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        }

        def scores(kind: str) -> Tensor | None:
            name, linear = linears[kind]
            if name not in energy:
                return None
            squared = linear.weight.float().square() * energy[name]
            return squared.cpu()  # where channels are handed out

        roles = self._roles
        if (out := scores(roles.mlp_out)) is not None:
            order = search_permutation(out)
            self._put(linears[roles.mlp_out], 1, order)
            for kind in roles.mlp_in:
                self._put(linears[kind], 0, order)
        if (out := scores(roles.attention_out)) is not None:
            inside, rows = self._head_orders(out, linears[roles.value][1])
            self._put(linears[roles.attention_out], 1, inside)
            self._put(linears[roles.value], 0, rows)
        share = max(1, HIDDEN_ROWS // self._blocks // len(roles.readers))
        for kind in sorted(roles.readers):
            if (read := scores(kind)) is not None:
                some = read[:: max(1, len(read) // share)]
                self._hidden_scores.append(some / some.mean().clamp_min(torch.finfo(torch.float32).tiny))

    def _head_orders(self, scores: Tensor, value: nn.Linear) -> tuple[Tensor, Tensor]:
        """The orders of the inputs of the attention's output (N, heads x D), and of the rows of `value`."""
        size = scores.shape[1] // self._heads
        key_values = self._heads if self._roles.fused_qkv else value.out_features // size
        per_head = scores.view(len(scores), key_values, -1, size)
        inside, rows = [], torch.arange(value.out_features)
        for head in range(key_values):
            order = search_permutation(per_head[:, head].reshape(-1, size))
            sharing = per_head.shape[2]
            inside += [(head * sharing + index) * size + order for index in range(sharing)]
            start = (3 * head + 2) * size if self._roles.fused_qkv else head * size
            rows[start : start + size] = start + order
        return torch.cat(inside), rows

    def _put(self, linear: tuple[str, nn.Linear], axis: int, order: Tensor) -> None:
        name, module = linear
        self.orders[f"{name}.weight"][axis] = order
        if axis == 0 and module.bias is not None:
            self.orders[f"{name}.bias"][axis] = order

    def finish(self) -> Tensor:
        """Adds the order of the hidden dimension to every parameter that has one, and returns it."""
        model: Any = self._model
        width = model.get_input_embeddings().embedding_dim
        order = search_permutation(torch.cat(self._hidden_scores)) if self._hidden_scores else torch.arange(width)
        ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
        for name, module in model.named_modules():
            kind = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and name.startswith(f"{self._list}."):
                self._put((name, module), 1 if kind in self._roles.readers else 0, order)
            elif id(module) in ends:
                self.orders[f"{name}.weight"][1] = order
            elif kind not in HEAD_NORMS:
                for key, parameter in module.named_parameters(recurse=False):
                    if parameter.shape != (width,):
                        raise SettingsError(f"--permute does not know what {name}.{key} of {type(model).__name__} is")
                    self.orders[f"{name}.{key}"][0] = order
        return order
