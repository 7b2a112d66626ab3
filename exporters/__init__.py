"""Pruned checkpoints on disk, in the forms that engines load.

>>> from exporters import export
>>> from swiftprune import PruneSettings
>>> report = export("./my-model", "./my-model-2of4", PruneSettings(calibration="text.txt"))  # doctest: +SKIP
"""

from exporters.checkpoint import ExportReport, Target, export

__all__ = ["ExportReport", "Target", "export"]
