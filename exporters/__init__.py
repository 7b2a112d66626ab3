"""Pruned checkpoints on disk, in the forms that engines load.

>>> from exporters import export
>>> from swiftprune import PruneSettings
>>> report = export("./my-model", "./my-model-2of4", PruneSettings(calibration="text.txt"))  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.checkpoint import ExportReport, Target, export

__all__ = ["ExportReport", "Target", "export"]


def __getattr__(name: str) -> Any:
    """On first use, so that `exporters.start` comes before torch."""
    if name not in __all__:
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    return getattr(importlib.import_module("exporters.checkpoint"), name)
