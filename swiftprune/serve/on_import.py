"""Registers the packed format with transformers as soon as a program loads both, in either order.

transformers has no entry points for quantizers. So `import swiftprune` waits for transformers' models, which it does
not load itself, and loads `swiftprune.serve.transformers` right after them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AWAITED = "transformers.modeling_utils"
"""What every `from_pretrained` of a model needs."""
_REGISTERS = "swiftprune.serve.transformers"


def register_with_transformers() -> None:
    """Registers the format now where transformers' models are loaded, else when they are."""
    if _AWAITED in sys.modules:
        importlib.import_module(_REGISTERS)
    else:
        sys.meta_path.insert(0, _Awaiting())


class _Awaiting(MetaPathFinder):
    """Finds the awaited module as Python does, and adds to what loading it does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            importlib.import_module(_REGISTERS)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
