"""A linear layer over a packed 2:4 weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftprune.formats import spec
from swiftprune.formats.spec import GROUP, KEPT, METADATA_SUFFIX, Packed24, metadata_width
from swiftprune.kernels import dispatch, gpu, native, packing, reference
from swiftprune.kernels.plan import Plan


class Linear24(nn.Linear):
    """y = x W^T + b over a packed W (N, K). x is (..., K) and y (..., N), both of the dtype of the weight.

    It is an nn.Linear, so that what is put on top of one, as adapters are, goes on top of it.

    It starts on the backend `reference`, holding the packed pair as the parameters `weight` (N, K/2) and `weight_meta`
    (N, ceil(K/8)), ready to be filled by a loader: the weight is unpacked for every call and multiplied densely, so
    this is right everywhere and faster nowhere. `use_backend` moves the weight into the layout of a fast backend, or
    those of a plan for GPUs, and drops the pair, of which an empty `weight` stays that tells type and device; `packed`
    and `state_dict` still give the pair, bit for bit, unless the backend holds 8-bit values.
    """

    weight: nn.Parameter
    weight_meta: nn.Parameter
    tiled: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.backend = dispatch.REFERENCE
        self._laid_out: tuple[str, ...] = ()
        """Names of the buffers that a plan for GPUs holds."""
        values = torch.empty(out_features, in_features // GROUP * KEPT, dtype=dtype, device=device)
        metadata = torch.empty(out_features, metadata_width(in_features), dtype=torch.uint8, device=device)
        self._hold_pair(Packed24(values, metadata))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None,
        )

    @classmethod
    def from_packed(
        cls, packed: Packed24, bias: Tensor | None = None, backend: str | None = None, name: str = "weight"
    ) -> Linear24:
        """A layer over `packed`, checked, on `backend` (default: the fastest here). `name` is for error messages."""
        spec.check_shapes(packed, name)
        rows, cols = packed.shape
        layer = cls(cols, rows, bias=bias is not None, dtype=packed.values.dtype, device=torch.device("meta"))
        layer._hold_pair(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(packed.values.dtype).contiguous(), requires_grad=False)
        return layer.use_checked(backend, name)

    def use_checked(self, backend: str | None = None, name: str = "weight") -> Linear24:
        """As `use_backend`, of a pair that comes from a file: FormatError when it breaks the format, on any backend."""
        packed = self.packed
        self.use_backend(backend, name)
        if self.backend not in native.LINEAR_ISAS:  # these check what they lay out
            spec.validate(packed, name)
        return self

    @property
    def packed(self) -> Packed24:
        """The weight in the canonical format."""
        if self.backend == dispatch.REFERENCE:
            return Packed24(self.weight, self.weight_meta)
        if self._laid_out:
            found = gpu.pair_of(self._gpu_tensors(), self.out_features, self.in_features)
            if isinstance(found, Tensor):
                packed = packing.pack(found.cpu())
                return Packed24(packed.values.to(found.device), packed.metadata.to(found.device))
            return Packed24(*found)
        return Packed24(*native.from_tiled(self.tiled, self.dtype, self.out_features, self.in_features))

    def use_backend(self, backend: str | None = None, name: str = "weight") -> Linear24:
        """Repacks the weight for `backend`, by default the fastest on this machine. Returns the layer itself.

        Raises SettingsError when the backend is unknown or cannot run here (see `dispatch.linear_backend`), and when
        the present one holds 8-bit values, from which no other can be filled. Laying a pair out for a native kernel
        checks it, and raises FormatError with `name` when it breaks the format; see `use_checked`.
        """
        shape = (self.out_features, self.in_features)
        backend = dispatch.linear_backend(self.dtype, backend, self._held().device, shape)
        native_next = backend in dispatch.BACKENDS[:-1]
        native_before = self.backend != dispatch.REFERENCE and not self._laid_out
        if backend == self.backend or (native_before and native_next):
            self.backend = backend  # all native ones have one layout
            return self
        packed = self.packed
        if native_next and (tiled := native.to_tiled(packed.values, packed.metadata)) is None:
            spec.validate(packed, name)
            raise AssertionError(f"{name}: the native check and the slow one disagree")
        for held in ("weight", "weight_meta", "tiled", *self._laid_out):
            if held in self._parameters or held in self._buffers:
                delattr(self, held)
        self._laid_out = ()
        self.backend = backend
        if backend == dispatch.REFERENCE:
            self._hold_pair(packed)
        elif backend in dispatch.BACKENDS:
            self.register_buffer("tiled", tiled, persistent=False)
        else:
            tensors = gpu.lay_out(Plan.parse(backend).backends, packed.values.detach(), packed.metadata.detach())
            for held, tensor in tensors.items():
                self.register_buffer(held, tensor, persistent=False)
            self._laid_out = tuple(tensors)
        if backend != dispatch.REFERENCE:
            self.weight = nn.Parameter(packed.values.new_empty(0), requires_grad=False)
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
        if self.backend == dispatch.REFERENCE:
            return F.linear(x, torch.ops.swiftprune.unpack24(self.weight, self.weight_meta), bias)
        if self._laid_out:
            held = [self._buffers[name] for name in self._laid_out]
            product: Tensor = torch.ops.swiftprune.linear24_gpu(x, held, bias, self.out_features, self.backend)
            return product
        # Dispatch costs as much as a small layer, so it is paid only where something needs it.
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            y: Tensor = torch.ops.swiftprune.linear24(x, self.tiled, bias, self.out_features, self.backend)
            return y
        tiled: Any = self._buffers["tiled"]  # nn.Module.__getattr__ is slow
        return native.linear24(self.backend, x, tiled, bias, self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.dtype}, backend={self.backend}"
        )

    def _hold_pair(self, packed: Packed24) -> None:
        self.weight = nn.Parameter(packed.values, requires_grad=False)
        self.weight_meta = nn.Parameter(packed.metadata, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A change of dtype or device goes through the canonical pair: the tiled layout is for both."""
        before = torch.empty(0, dtype=self.dtype, device=self._held().device)
        after = fn(before)
        if (after.dtype, after.device) == (before.dtype, before.device):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        laid_out = self.backend != dispatch.REFERENCE
        self.use_backend(dispatch.REFERENCE)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = self.weight.dtype
        if laid_out:
            self.use_backend()
        return self

    def _held(self) -> Tensor:
        if self._laid_out:
            return self.get_buffer(self._laid_out[0])
        return self.weight if self.backend == dispatch.REFERENCE else self.tiled

    def _gpu_tensors(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self._laid_out}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.backend != dispatch.REFERENCE:
            packed = self.packed
            destination[f"{prefix}weight"] = packed.values
            destination[f"{prefix}weight{METADATA_SUFFIX}"] = packed.metadata

    def _load_from_state_dict(self, *args: Any) -> None:
        backend = self.backend
        self.use_backend(dispatch.REFERENCE)
        super()._load_from_state_dict(*args)
        self.use_backend(backend)


# The same products as operators, for torch.compile and autograd. The library must live as long as the process.
_library = torch.library.Library("swiftprune", "DEF")  # type: ignore[no-untyped-call]
_library.define("unpack24(Tensor values, Tensor metadata) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("linear24(Tensor x, Tensor tiled, Tensor? bias, int out_features, str backend) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("linear24_gpu(Tensor x, Tensor[] held, Tensor? bias, int out_features, str plan) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("unpack24_gpu(Tensor[] held, int rows, int cols, str plan) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("unpack24_tiled(Tensor tiled, ScalarType dtype, int rows, int cols) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(_library, "unpack24", "CPU")
def _unpack24(values: Tensor, metadata: Tensor) -> Tensor:
    return packing.unpack(Packed24(values, metadata))


@torch.library.impl(_library, "unpack24", "CUDA")
def _unpack24_cuda(values: Tensor, metadata: Tensor) -> Tensor:
    """Without the checks, which would make the host wait: loaders check the pair. Not run on a GPU yet."""
    return reference.scatter(values, reference.stored_positions(values, metadata))


@torch.library.register_fake("swiftprune::unpack24")  # type: ignore[untyped-decorator]
def _unpack24_fake(values: Tensor, metadata: Tensor) -> Tensor:
    return values.new_empty(values.shape[0], 2 * values.shape[1])


@torch.library.impl(_library, "linear24", "CPU")
def _linear24(x: Tensor, tiled: Tensor, bias: Tensor | None, out_features: int, backend: str) -> Tensor:
    return native.linear24(backend, x, tiled, bias, out_features)


@torch.library.register_fake("swiftprune::linear24")  # type: ignore[untyped-decorator]
def _linear24_fake(x: Tensor, tiled: Tensor, bias: Tensor | None, out_features: int, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear24_gpu(x: Tensor, held: list[Tensor], bias: Tensor | None, out_features: int, plan: str) -> Tensor:
    """Chooses by the number of tokens, which under a compiler is known here only. On a CPU for Triton's interpreter."""
    if not x.numel():
        return x.new_empty((*x.shape[:-1], out_features))
    parsed = Plan.parse(plan)
    backend = parsed.backend(x.numel() // x.shape[-1])
    # Triton launches on the current device, whatever that of its tensors is.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return gpu.BACKENDS[backend].multiply(x, _by_name(held, parsed), bias)


def _unpack24_gpu(held: list[Tensor], rows: int, cols: int, plan: str) -> Tensor:
    found = gpu.pair_of(_by_name(held, Plan.parse(plan)), rows, cols)
    return found if isinstance(found, Tensor) else reference.scatter(found[0], reference.stored_positions(*found))


def _by_name(held: list[Tensor], plan: Plan) -> dict[str, Tensor]:
    return dict(zip(gpu.held_names(plan.backends), held, strict=True))


for _device in ("CPU", "CUDA"):
    torch.library.impl(_library, "linear24_gpu", _device)(_linear24_gpu)
    torch.library.impl(_library, "unpack24_gpu", _device)(_unpack24_gpu)


@torch.library.register_fake("swiftprune::linear24_gpu")  # type: ignore[untyped-decorator]
def _linear24_gpu_fake(x: Tensor, held: list[Tensor], bias: Tensor | None, out_features: int, plan: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("swiftprune::unpack24_gpu")  # type: ignore[untyped-decorator]
def _unpack24_gpu_fake(held: list[Tensor], rows: int, cols: int, plan: str) -> Tensor:
    return held[0].new_empty(rows, cols)


@torch.library.impl(_library, "unpack24_tiled", "CPU")
def _unpack24_tiled(tiled: Tensor, dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    return packing.unpack(Packed24(*native.from_tiled(tiled, dtype, rows, cols)))


@torch.library.register_fake("swiftprune::unpack24_tiled")  # type: ignore[untyped-decorator]
def _unpack24_tiled_fake(tiled: Tensor, dtype: torch.dtype, rows: int, cols: int) -> Tensor:
    return tiled.new_empty(rows, cols, dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int, str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.in_features = inputs[0].shape[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (tiled,) = ctx.saved_tensors
    weight = torch.ops.swiftprune.unpack24_tiled(tiled, gradient.dtype, gradient.shape[-1], ctx.in_features)
    return gradient @ weight, None, None, None, None


torch.library.register_autograd("swiftprune::linear24", _backward, setup_context=_remember)


def _remember_gpu(ctx: Any, inputs: tuple[Tensor, list[Tensor], Tensor | None, int, str], output: Tensor) -> None:
    x, held, _, ctx.out_features, ctx.plan = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*held)


def _backward_gpu(ctx: Any, gradient: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    held = list(ctx.saved_tensors)
    weight = torch.ops.swiftprune.unpack24_gpu(held, ctx.out_features, ctx.in_features, ctx.plan)
    return gradient @ weight, [None] * len(held), None, None, None


torch.library.register_autograd("swiftprune::linear24_gpu", _backward_gpu, setup_context=_remember_gpu)
