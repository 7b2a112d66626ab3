"""What every way to multiply by a packed weight offers, on CPUs and GPUs alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from swiftprune.formats.spec import Packed24, Quantized, WeightSpec
from swiftprune.kernels import packing


class LinearKernel(ABC):
    """A matrix product with a packed weight, from tensors that are laid out once."""

    name: str
    """What users ask for it by, and what is reported of a layer that runs on it."""

    quantized_values: Quantized | None = None
    """How the values are stored that it multiplies by; None: in the type of its inputs."""
    buffer_names: tuple[str, ...]
    """Of the tensors that `prepare` makes."""

    @abstractmethod
    def prepare(self, packed: Packed24, name: str = "weight") -> dict[str, Tensor]:
        """The tensors that `apply` reads, laid out from `packed`, on its device.

        Raises FormatError with `name` for a weight that it cannot lay out.
        """

    @abstractmethod
    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x W^T + bias: (..., N) in the dtype of `x` (..., K). `buffers` are those of `prepare`."""

    @abstractmethod
    def restore(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
        """The weight that `buffers` were made from, bit for bit.

        Raises SettingsError where the layout has lost what is needed for that.
        """

    def unpack(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        """The dense weight (N, K) in the type of its values."""
        return packing.unpack(self.restore(buffers, spec))
