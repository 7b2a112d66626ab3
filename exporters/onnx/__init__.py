"""ONNX: packed models that any runtime reads and ours runs sparse, and dense ones whose zeros TensorRT looks for.

>>> from pathlib import Path
>>> from exporters.onnx import check_weights, export_module, pack_model
>>> export_module(pruned_vit, images, Path("vit.onnx"))  # doctest: +SKIP
>>> pack_model(Path("dense.onnx"), Path("packed.onnx")).packed  # doctest: +SKIP
{'encoder.layer.0.query.weight': (768, 768), ...}
"""

from exporters.onnx.check import WeightCheck, check_weights
from exporters.onnx.module import ModuleExport, export_module
from exporters.onnx.pack import PackReport, pack_model

__all__ = ["ModuleExport", "PackReport", "WeightCheck", "check_weights", "export_module", "pack_model"]
