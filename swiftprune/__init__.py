"""swiftprune: prune LLM checkpoints to 2:4 structured sparsity, pack them, and serve them faster.

    import swiftprune
    for done in swiftprune.prune("./my-model", swiftprune.PruneSettings(calibration="text.txt")):
        print(done.block.name, [layer.output_error for layer in done.results])

`prune` gives pruned weights block by block; `exporters.export` writes a checkpoint that engines load. `prune_module`
prunes any other torch module in place. transformers loads packed checkpoints once `swiftprune` is imported. Names are
imported on first use, so that `import swiftprune` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from swiftprune.serve.on_import import register_with_transformers

if TYPE_CHECKING:
    from swiftprune.config import PruneSettings
    from swiftprune.errors import SwiftpruneError
    from swiftprune.formats.spec import Packed24, validate
    from swiftprune.kernels.packing import pack, unpack
    from swiftprune.module import ModuleReport, prune_module
    from swiftprune.results import PrunedBlock
    from swiftprune.stages.run import prune

__version__ = "0.1.0"

__all__ = [
    "ModuleReport",
    "Packed24",
    "PruneSettings",
    "PrunedBlock",
    "SwiftpruneError",
    "__version__",
    "pack",
    "prune",
    "prune_module",
    "unpack",
    "validate",
]

_HOMES = {
    "SwiftpruneError": "swiftprune.errors",
    "ModuleReport": "swiftprune.module",
    "prune_module": "swiftprune.module",
    "PruneSettings": "swiftprune.config",
    "PrunedBlock": "swiftprune.results",
    "prune": "swiftprune.stages.run",
    "Packed24": "swiftprune.formats.spec",
    "pack": "swiftprune.kernels.packing",
    "unpack": "swiftprune.kernels.packing",
    "validate": "swiftprune.formats.spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'swiftprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


register_with_transformers()
