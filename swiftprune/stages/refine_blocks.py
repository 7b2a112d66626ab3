"""Block-wise refinement: a pruned decoder block learns to give what its dense original gives, mask fixed.

As in BESA (Xu et al., arXiv 2402.16880) and the block-wise reconstruction of quantization (BRECQ, Li et al., arXiv
2102.05426): a few hundred steps of Adam on the kept weights and the norms of one block, on the hidden states that the
pruned blocks before it give, against those of the dense model behind it. One block and its moments are in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from swiftprune.calibration.runner import BlockRunner
from swiftprune.models.plan import Block

STEPS = 200
LEARNING_RATE = 2e-4
BETAS = (0.9, 0.95)


def refine(
    runner: BlockRunner,
    block: Block,
    pruned: Mapping[str, Tensor],
    keep_masks: Mapping[str, Tensor],
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    """Puts `pruned` weights into the loaded block, trains it, and returns them with its norms and biases.

    Names are those of parameters. `dense_hidden` of the runner must be that behind the block, as `collect` leaves it.
    """
    assert runner.dense_hidden is not None
    runner.put(pruned)
    parameters = runner.parameters(block, pruned)
    run = functools.partial(runner.run, block)
    refine_block(run, parameters, keep_masks, runner.hidden, runner.dense_hidden, tick)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def refine_block(
    run: Callable[[int, Tensor], Tensor],
    parameters: Mapping[str, nn.Parameter],
    keep_masks: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    tick: Callable[[], None],
) -> None:
    """Trains `parameters` in place so that `run` maps each of `inputs` (1, T, H) to its one of `targets`, all fp32.

    `run` takes the index of the input and the input. Weights where a mask of `keep_masks` is False stay as they are.
    The loss of a token is ||out - target||^2 / ||target||^2: some tokens have hidden states a thousand times larger
    than the others, and would be all that counts. Where training did not lower the loss over all samples, the
    parameters are put back.
    """
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    start = _loss_of_all(run, inputs, targets)
    adam = torch.optim.Adam(parameters.values(), betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for step in range(STEPS):
        if step % len(inputs) == 0:
            order = torch.randperm(len(inputs), generator=generator).tolist()
        sample = order[step % len(inputs)]
        _loss(run(sample, inputs[sample]), targets[sample]).backward()  # type: ignore[no-untyped-call]
        for name, mask in keep_masks.items():
            gradient = parameters[name].grad
            assert gradient is not None
            gradient.mul_(mask)
        for group in adam.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        adam.step()
        adam.zero_grad(set_to_none=True)
        tick()
    for parameter in parameters.values():
        parameter.requires_grad_(False).grad = None
    if not _loss_of_all(run, inputs, targets) < start:
        for name, parameter in parameters.items():
            parameter.copy_(before[name])


def _loss(out: Tensor, target: Tensor) -> Tensor:
    target = target.to(out.device)  # hidden states of many samples may be kept elsewhere
    return ((out - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()
def _loss_of_all(run: Callable[[int, Tensor], Tensor], inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    return sum(
        float(_loss(run(sample, hidden), target))
        for sample, (hidden, target) in enumerate(zip(inputs, targets, strict=True))
    )
