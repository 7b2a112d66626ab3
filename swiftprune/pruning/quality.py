"""One dial for all stages: how long a user wants to wait for how good a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from swiftprune.errors import SettingsError
from swiftprune.pruning.pipeline import PruneSettings

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
        "seconds, masks only",
        {"method": "swiftprune-pairs", "one_pass": True, "samples": 12, "seqlen": 256},
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
