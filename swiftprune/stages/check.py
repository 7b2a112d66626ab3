"""How good the result is, on calibration text that was held back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from swiftprune.calibration.text import load_tokenizer
from swiftprune.errors import CheckpointError, first_line
from swiftprune.models.distance import Distance
from swiftprune.models.load import FP32_PARAMETERS, vocabulary_size
from swiftprune.models.perplexity import dense_perplexity, perplexity
from swiftprune.results import Check, Continuation
from swiftprune.stages import memory
from swiftprune.stages.store import BlockStore

if TYPE_CHECKING:
    from swiftprune.stages.context import Run

logger = logging.getLogger(__name__)

# Of perplexity over the dense model's: beyond, text is poor enough to say so.
POOR_RATIO = 3.0
# Of the windows held back, so many are shown with so many tokens of their beginning and of what both models go on with.
_SHOWN = 3
_SHOWN_TOKENS = 24


def check(run: Run, store: BlockStore) -> Check | None:
    """Perplexity of the dense and of the pruned model on the windows held back; None, and why is said, without."""
    if run.data is None or not run.targets.head:
        return None
    held_back = run.data.held_back
    if not len(held_back):
        run.notify("Not checked: there is too little calibration text to hold any back.")
        return None
    count = run.checkpoint.parameter_count
    dtype = torch.float32 if count <= FP32_PARAMETERS else torch.bfloat16
    windows, seqlen = held_back.shape
    needed = dtype.itemsize * count + Distance.nbytes(windows, seqlen, vocabulary_size(run.model))
    free = memory.available_bytes(run.compute)
    if needed > free:
        run.notify(f"Not checked: that needs the whole model, {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")
        return None
    with run.clock("check"), run.compute.autocast():
        try:
            model = run.load_whole(dtype)
        except CheckpointError as error:
            run.notify(f"Not checked: {error}")
            return None
        distance, written = Distance(windows), []
        dense = dense_perplexity(model, held_back, stage="check dense", progress=run.progress, watch=distance.add_dense)
        written.append(_continued(run, model))
        run.put_pruned(model, store.load)
        pruned = perplexity(model, held_back, stage="check pruned", progress=run.progress, watch=distance.add_pruned)
        written.append(_continued(run, model))
    found = Check(
        windows=windows,
        seqlen=seqlen,
        dense=round(dense, 3),
        pruned=round(pruned, 3),
        divergence=round(distance.divergence, 4),
        agreement=round(distance.agreement, 4),
        continuations=[
            Continuation(text=text, dense=by_dense, pruned=by_pruned)
            for (text, by_dense), (_, by_pruned) in zip(*written, strict=False)
        ],
    )
    if not found.ratio <= POOR_RATIO:
        run.notify(
            f"Perplexity on held-back text is {found.ratio:.1f} times the dense model's, so expect poor text. "
            f"Next: {_next_step(run)}."
        )
    return found


def _continued(run: Run, model: Any) -> list[tuple[str, str]]:
    """Beginnings of windows held back, and what `model` writes after each."""
    assert run.data is not None
    begin = run.data.held_back[:_SHOWN, :_SHOWN_TOKENS].to(model.device)
    ends = model.generation_config.eos_token_id
    first_end = (ends[0] if isinstance(ends, list) else ends) or 0
    try:
        tokenizer = load_tokenizer(run.checkpoint)
        both = model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=False,
            max_new_tokens=_SHOWN_TOKENS,
            pad_token_id=first_end,
        )
    except Exception as error:  # of many types: not every model that gives logits has all that writing needs
        logger.info("nothing was written to compare: %s", first_line(error))
        return []
    before, after = both.cpu().tensor_split([begin.shape[1]], dim=1)
    texts = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in (before, after))
    return list(zip(*texts, strict=True))


def _next_step(run: Run) -> str:
    s = run.settings
    if run.method.needs not in ("gram", "drift"):
        given = "without --quality fast" if "method" in s.from_preset else f"without --method {s.method}"
        return f"the same {given}: by default the kept weights are solved for as well"
    if s.calibration == "self":
        return "--calibration FILE, with text like that which the model is to read and write"
    if "distill" not in s.refine:
        return "--quality balanced, which also trains the kept weights, in ten minutes"
    return "--quality best, or --sparsity auto, which leaves the most sensitive linears dense"
