"""A linear layer over a packed 2:4 weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from swiftprune.errors import SettingsError
from swiftprune.formats import spec
from swiftprune.formats.spec import SCALE_DTYPE, Packed24, Quantized, WeightSpec
from swiftprune.kernels import dispatch
from swiftprune.kernels.base import LinearKernel
from swiftprune.kernels.cpu import METADATA, SCALES, NativeKernel


class Linear24(nn.Linear):
    """y = x W^T + b over a packed W (N, K). x is (..., K) and y (..., N), both of the dtype of the weight.

    It is an nn.Linear, so that what is put on top of one, as adapters are, goes on top of it.

    It starts on the backend `reference`, holding the packed weight as the parameters `weight` (N, K/2) and
    `weight_meta` (N, ceil(K/8)), and `weight_scale` of `quantized` values, ready to be filled by a loader: the weight
    is unpacked for every call and multiplied densely, so this is right everywhere and faster nowhere. `use_backend`
    moves the weight into the buffers of a fast kernel, or those of a plan for GPUs, and drops the parameters, of which
    an empty `weight` stays that tells type and device; `packed` and `state_dict` still give them, bit for bit, unless
    a backend of GPUs has rounded the values to 8 bits. CPU kernels for quantized values round x to 8 bits.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        quantized: Quantized | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.quantized = quantized
        self._kernel: LinearKernel = dispatch.linear_kernel(self._reference)
        shape, values = self.spec.values
        scales = torch.empty(self.spec.scales, dtype=SCALE_DTYPE, device=device) if self.spec.scales else None
        metadata = torch.empty(self.spec.metadata, dtype=torch.uint8, device=device)
        self._hold(Packed24(torch.empty(shape, dtype=values, device=device), metadata, scales))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None,
        )

    @classmethod
    def from_packed(
        cls,
        packed: Packed24,
        bias: Tensor | None = None,
        backend: str | None = None,
        name: str = "weight",
        dtype: torch.dtype | None = None,
    ) -> Linear24:
        """A layer over `packed`, checked, on `backend` (default: the fastest here). `name` is for error messages.

        `dtype` is what a layer over quantized values computes in, by default float32.
        """
        spec.check_shapes(packed, name)
        rows, cols = packed.shape
        dtype = dtype if packed.quantized and dtype else packed.spec.dtype
        meta = torch.device("meta")
        layer = cls(cols, rows, bias=bias is not None, dtype=dtype, device=meta, quantized=packed.quantized)
        layer._hold(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype).contiguous(), requires_grad=False)
        return layer.use_checked(backend, name)

    def use_checked(self, backend: str | None = None, name: str = "weight") -> Linear24:
        """As `use_backend`, of a pair that comes from a file: FormatError when it breaks the format, on any backend."""
        packed = self.packed
        self.use_backend(backend, name)
        if not isinstance(self._kernel, NativeKernel):  # these check what they lay out
            spec.validate(packed, name)
        return self

    @property
    def backend(self) -> str:
        """The kernel or plan that it runs on."""
        return self._kernel.name

    @property
    def spec(self) -> WeightSpec:
        return WeightSpec((self.out_features, self.in_features), self.dtype, self.quantized)

    @property
    def _reference(self) -> str:
        return dispatch.QUANTIZED_REFERENCE if self.quantized else dispatch.REFERENCE

    @property
    def packed(self) -> Packed24:
        """The weight in the canonical format."""
        return self._kernel.restore(self._held(), self.spec)

    def use_backend(self, backend: str | None = None, name: str = "weight") -> Linear24:
        """Lays the weight out for `backend`, by default the fastest on this machine. Returns the layer itself.

        Raises SettingsError when the backend is unknown or cannot run here (see `dispatch.linear_backend`), and when
        the present one holds 8-bit values, from which no other can be filled. Laying a pair out for a native kernel
        checks it, and raises FormatError with `name` when it breaks the format; see `use_checked`.
        """
        shape = (self.out_features, self.in_features)
        found = dispatch.linear_backend(self.dtype, backend, self._device(), shape, self.quantized)
        kernel = dispatch.linear_kernel(found)
        if kernel.buffer_names == self._kernel.buffer_names:  # as of all native kernels
            self._kernel = kernel
            return self
        packed = self.packed
        if kernel.name == self._reference:
            self._drop()
            self._kernel = kernel
            self._hold(packed)
            return self
        buffers = kernel.prepare(packed, name)
        self._drop()
        self._kernel = kernel
        for held, tensor in buffers.items():
            self.register_buffer(held, tensor, persistent=False)
        self.weight = nn.Parameter(packed.values.new_empty(0, dtype=self.dtype), requires_grad=False)
        return self

    def reset_parameters(self) -> None:
        """Packed weights are made elsewhere, so there is nothing to draw."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self._parameters.get("bias"))

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, with `bias` (N,) in the place of the layer's own."""
        if x.dtype != self.dtype and x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
            # The weight cannot be cast, so x is; what comes out is what autocast gives of dense linears.
            return self.multiply(x.to(self.dtype), bias).to(torch.get_autocast_dtype(x.device.type))
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected x of shape (..., {self.in_features}) and {self.dtype}, got {tuple(x.shape)} {x.dtype}"
            )
        forward_ad = torch.autograd.forward_ad
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError("a packed layer has no forward-mode derivative; use reverse mode")
        kernel = self._kernel
        # Dispatch costs as much as a small layer, so it is paid only where something needs it.
        if _is_recorded() or (
            torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        ):
            held = self._held()
            y: Tensor = torch.ops.swiftprune.linear24(
                x, [held[name] for name in kernel.buffer_names], bias, self.out_features, kernel.name
            )
            return y
        return kernel.apply(x, self._held(), bias, self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.dtype}, backend={self.backend}"
        )

    def _hold(self, packed: Packed24) -> None:
        """As the parameters that a loader fills."""
        for name, tensor in zip(self._kernel.buffer_names, packed.tensors, strict=True):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def _held(self) -> Any:
        """By name, what the kernel reads: buffers, or of the reference the parameters that a loader fills."""
        return self._buffers if METADATA not in self._parameters else self._parameters

    def _device(self) -> torch.device:
        device: torch.device = self._held()[self._kernel.buffer_names[0]].device
        return device

    def _drop(self) -> None:
        for name in {"weight", *self._kernel.buffer_names}:
            delattr(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A change of dtype or device goes through the canonical pair: a layout is for one of each."""
        before = torch.empty(0, dtype=self.dtype, device=self._device())
        after = fn(before)
        if (after.dtype, after.device) == (before.dtype, before.device):
            self._apply_but_for_scales(fn, recurse)
            return self
        if after.dtype not in spec.VALUE_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in spec.VALUE_DTYPES)
            raise SettingsError(f"a packed layer computes in {known}, not in {str(after.dtype).removeprefix('torch.')}")
        fast, packed, bias = self.backend != self._reference, self.packed, self._parameters.get("bias")
        bias_before = None if bias is None else bias.data
        before_dtype = self.dtype
        self.use_backend(dispatch.REFERENCE)
        try:
            self._apply_but_for_scales(fn, recurse)
            self.dtype = after.dtype
            if fast:
                self.use_backend()
        except Exception:  # values that the new type cannot hold: all stays as it was
            self._hold(packed)
            self.dtype = before_dtype
            if bias is not None and bias_before is not None:
                bias.data = bias_before
            if fast:
                self.use_backend()
            raise
        return self

    def _apply_but_for_scales(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """The format fixes the type of scales, whatever type the layer computes in."""
        scales = self._parameters.get(SCALES)
        kept = None if scales is None else scales.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None and kept is not None:
            setattr(self, SCALES, nn.Parameter(kept.to(self.get_parameter(METADATA).device), requires_grad=False))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.backend != self._reference:
            for name, tensor in zip(("weight", METADATA, SCALES), self.packed.tensors, strict=False):
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any) -> None:
        backend = self.backend
        self.use_backend(dispatch.REFERENCE)
        super()._load_from_state_dict(*args)
        if self.quantized is None and self.weight.dtype != self.dtype:  # assigned, and not copied
            self.dtype = self.weight.dtype
            self.use_backend(None if backend != self._reference else backend)
        else:
            self.use_backend(backend)


def _is_recorded() -> bool:
    """Whether something follows what operators are called: a compiler, a tracer, a dispatch mode."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0


# The product as an operator, for torch.compile and autograd. The library must live as long as the process.
_library = torch.library.Library("swiftprune", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear24(Tensor x, Tensor[] held, Tensor? bias, int out_features, str kernel) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("unpack24(Tensor[] held, ScalarType dtype, int rows, int cols, str kernel) -> Tensor")  # type: ignore[no-untyped-call]


def _by_name(kernel: LinearKernel, held: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(kernel.buffer_names, held, strict=True))


@torch.library.impl(_library, "linear24", "CompositeExplicitAutograd")
def _linear24(x: Tensor, held: list[Tensor], bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    found = dispatch.linear_kernel(kernel)
    return found.apply(x, _by_name(found, held), bias, out_features)


@torch.library.register_fake("swiftprune::linear24")  # type: ignore[untyped-decorator]
def _linear24_fake(x: Tensor, held: list[Tensor], bias: Tensor | None, out_features: int, kernel: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl(_library, "unpack24", "CompositeExplicitAutograd")
def _unpack24(held: list[Tensor], dtype: torch.dtype, rows: int, cols: int, kernel: str) -> Tensor:
    found = dispatch.linear_kernel(kernel)
    return found.unpack(_by_name(found, held), WeightSpec((rows, cols), dtype, found.quantized_values)).to(dtype)


@torch.library.register_fake("swiftprune::unpack24")  # type: ignore[untyped-decorator]
def _unpack24_fake(held: list[Tensor], dtype: torch.dtype, rows: int, cols: int, kernel: str) -> Tensor:
    return held[0].new_empty(rows, cols, dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Tensor, list[Tensor], Tensor | None, int, str], output: Tensor) -> None:
    x, held, _, ctx.out_features, ctx.kernel = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*held)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    held = list(ctx.saved_tensors)
    weight = torch.ops.swiftprune.unpack24(held, gradient.dtype, ctx.out_features, ctx.in_features, ctx.kernel)
    bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
    return gradient @ weight, [None] * len(held), bias, None, None


torch.library.register_autograd("swiftprune::linear24", _backward, setup_context=_remember)
