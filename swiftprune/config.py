"""What a run is asked for: its settings, and presets of them by how long a user wants to wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from swiftprune.calibration.text_files import DEFAULT_COLUMN
from swiftprune.compute import ComputeName, faster_type, find_device
from swiftprune.errors import SettingsError
from swiftprune.formats.spec import FORMAT, Quantized
from swiftprune.methods.mask import Pattern
from swiftprune.methods.scores import KEEP, find_method
from swiftprune.models.ignore import DEFAULT_IGNORE, compile_ignore

DtypeName = Literal["bfloat16", "float16", "float32"]
DTYPES: dict[DtypeName, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Refinement = Literal["weights", "blocks", "distill"]


class PruneSettings(BaseModel):
    """What to prune and how; equal settings on an equal checkpoint give equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = "2:4"
    method: str = ""
    """A key of METHODS. Empty: `keep` for a checkpoint that declares the pattern, or with `mask`; else `admm`, or
    `swiftprune-data-free` without calibration."""
    calibration: str = "self"
    """`none`, `self`, a text file or a folder of them (see `text_files`), or a data set id."""
    text_column: str = DEFAULT_COLUMN
    """Where the text stands in the rows of JSON, Parquet and data sets."""
    mask: str = ""
    """For method `keep`: a file of masks that were made elsewhere (see `keep`)."""
    strict: bool = False
    """For method `keep`: stop at a linear that does not fit the pattern, rather than leave it dense."""
    samples: int = Field(default=64, ge=1)
    seqlen: int = Field(default=256, ge=2)
    conversations: int | None = Field(default=None, ge=0)
    """Sequences more that a model with a chat template samples as conversations, to keep it able to hold them. None: a
    quarter as many as `samples` beside a text from elsewhere, which alone makes a chat model forget its format."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    ignore: str = DEFAULT_IGNORE
    dtype: DtypeName | None = None
    """Type of the written weights; None keeps that of the checkpoint."""
    values: Quantized | None = None
    """Round the kept weights to 8 or 4 bits: see `rounding`, and `quantize` without calibration."""
    one_pass: bool = False
    """Calibrate on the dense model's hidden states, in one pass, and not on those of the blocks pruned so far."""
    compute: ComputeName | Literal["auto"] = "auto"
    """Type in which calibration and training multiply, `auto`: the faster one here. All else is float32."""
    device: str = "auto"
    """Where calibration, solving, training and measuring compute: `auto`, `cpu`, `cuda` or `cuda:N`."""
    permute: bool = False
    """Reorder input channels first, at no cost at run time: see `permute`."""
    refine: tuple[Refinement, ...] = ()
    """Stages after the mask: see `least_squares`, `refine_blocks` and `distill`."""
    minutes: float | None = Field(default=None, gt=0)
    """For distillation: how long the whole run may take, what comes before it included."""
    steps: int | None = Field(default=None, ge=1)
    """For distillation, instead of minutes: so many, which is reproducible."""
    max_perplexity_ratio: float | None = Field(default=None, gt=1)
    """Leave linears dense until perplexity, on calibration text, is at most so many times the dense model's."""
    from_preset: frozenset[str] = Field(default=frozenset(), exclude=True)
    """Names of fields that a preset has set: of these, what cannot be had is left out with a word, not refused."""

    def resolved(self) -> PruneSettings:
        """The same with defaults that depend on each other filled in. Raises SettingsError where they clash."""
        Pattern.parse(self.pattern)
        compile_ignore(self.ignore)
        name = self.method or (KEEP if self.mask else "swiftprune-data-free" if self.calibration == "none" else "admm")
        method = find_method(name)
        for option, given in (("--mask", self.mask), ("--strict", self.strict)):
            if given and name != KEEP:
                raise SettingsError(f"{option} is for --method {KEEP}, not for {name}")
        if name == KEEP and self.permute:
            raise SettingsError(f"--permute moves zeros out of their groups, so it does not go with --method {KEEP}")
        if method.only not in (None, self.pattern):
            raise SettingsError(f"--method {name} prunes to --format {method.only} only")
        if self.values and self.pattern != FORMAT:
            raise SettingsError(f"--values {self.values} is for --format {FORMAT} only")
        if self.permute and self.pattern != FORMAT:
            raise SettingsError(f"--permute finds orders for --format {FORMAT} only")
        if self.calibration == "none" and (self.refine or self.permute):
            what = f"--refine {self.refine[0]}" if self.refine else "--permute"
            raise SettingsError(f"{what} needs calibration data; give --calibration self or a text file")
        limited = (self.minutes is not None) + (self.steps is not None)
        if "distill" in self.refine and limited != 1:
            raise SettingsError("--refine distill needs a budget: give either --minutes or --steps")
        if "distill" not in self.refine and limited:
            raise SettingsError("--minutes and --steps limit distillation: add --refine distill")
        if method.needs == "nothing" and not (self.refine or self.permute or self.max_perplexity_ratio):
            return self.model_copy(
                update={"method": name, "calibration": "none", "compute": "float32", "device": _resolved(self.device)}
            )
        if self.calibration == "none" and self.max_perplexity_ratio is not None:
            raise SettingsError("--sparsity auto measures perplexity: give --calibration self or a text file")
        if self.calibration == "none":
            raise SettingsError(
                f"--method {name} needs calibration data; give --calibration self or a text file, "
                "or use a data-free method (swiftprune-data-free, magnitude)"
            )
        if self.one_pass and "blocks" in self.refine:
            raise SettingsError("--refine blocks works on the blocks pruned so far: leave out --one-pass")
        ordered = tuple(stage for stage in get_args(Refinement) if stage in self.refine)
        device = _resolved(self.device)
        compute = faster_type(torch.device(device)) if self.compute == "auto" else self.compute
        return self.model_copy(update={"method": name, "refine": ordered, "compute": compute, "device": device})


def _resolved(device: str) -> str:
    return str(find_device(device))


QualityName = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class Quality:
    """A point of the trade-off: what it is in words, and the settings of the pipeline that make it."""

    summary: str
    settings: dict[str, Any]


# Short windows, since attention takes a third of a forward over 512 tokens. What is solved for gains more from another
# 16,000 tokens than late training does from the minutes they take, so the longer the run, the more of them.
_SOLVED: dict[str, Any] = {"method": "admm", "seqlen": 256, "refine": ("distill",)}
QUALITIES: dict[QualityName, Quality] = {
    "fast": Quality(
        "masks only, under a minute; rounding values, the check and ONNX files come on top",
        {"method": "swiftprune-pairs", "one_pass": True, "samples": 12, "seqlen": 256, "conversations": 0},
    ),
    "balanced": Quality(
        "ten minutes, also distilled from the dense model",
        _SOLVED | {"samples": 96, "conversations": 32, "minutes": 10.0},
    ),
    "best": Quality(
        "an hour: more text, channels reordered, distilled for longer",
        _SOLVED | {"samples": 256, "conversations": 128, "permute": True, "minutes": 60.0},
    ),
}


def make_settings(quality: QualityName | None, given: Mapping[str, Any]) -> PruneSettings:
    """Settings from what the dial sets and what was `given` by name, which wins. Raises SettingsError."""
    chosen: dict[str, Any] = dict(QUALITIES[quality].settings) if quality else {}
    if "steps" in given:
        chosen.pop("minutes", None)
    try:
        return PruneSettings(**(chosen | dict(given)), from_preset=frozenset(chosen) - frozenset(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{first['loc'][0]}: {first['msg']}, not {first['input']!r}") from None


def output_name(model: str, pattern: str) -> str:
    """The name of the output folder of `model` where no other is asked for."""
    return f"{model}-{pattern.replace(':', 'of' if pattern[:1].isdigit() else '-')}"
