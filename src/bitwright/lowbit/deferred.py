"""`Deferred`: a shipped layer's result before anybody has asked for it.

A convolution between quantized layers need not write float32 that a ReLU reads and writes and the next layer reads
again. It encodes its input, which fixes what it will compute, and answers with a `Deferred`. ReLU and other bounds are
noted there; the next shipped layer asks for bytes in its own encoding, and the kernel runs once, straight to them.
Whoever else touches it gets the float32 tensor. Results are bit for bit those of running every step at once, whatever
the model's Python code does in between: only speed depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from bitwright.kernels import images
from bitwright.kernels.images import Encoding, Request, Window, pooled_size

_UNBOUNDED = (-torch.inf, torch.inf)


class Asked:
    """A layer's memory of what its results were asked for, and the same of their poolings."""

    def __init__(self) -> None:
        self.requests: set[Request] = set()
        self.pooled: dict[Window, Asked] = {}


class Call:
    """One pending run of a layer: ``produce(request)`` computes bytes or float32.

    Where results were asked for in different ways, as those that two quantizers read, float32 is computed once and
    serves all.
    """

    def __init__(self, produce: Callable[[Request], Tensor], asked: Asked) -> None:
        self.produce, self.asked = produce, asked
        self.base: Tensor | None = None
        self.found: dict[Request, Tensor] = {}

    def bytes(self, request: Request) -> Tensor:
        """The image of bytes for a request, which nobody may change."""
        if request not in self.found:
            shared = self._shared(request)
            self.found[request] = self.produce(request) if shared is None else images.encode(shared, request)
        return self.found[request]

    def values(self, low: float, high: float) -> Tensor:
        """The result in float32 and clamped: a tensor that belongs to the caller."""
        request = Request(None, low, high)
        shared = self._shared(request)
        if shared is None:
            return self.produce(request)
        return shared.clone() if (low, high) == _UNBOUNDED else shared.clamp(low, high)

    def _shared(self, request: Request) -> Tensor | None:
        self.asked.requests.add(request)
        if len(self.asked.requests) > 1 and self.base is None:
            self.base = self.produce(Request(None, *_UNBOUNDED))
        return self.base


class Deferred(Tensor):
    """A float32 tensor ``[n, c, h, w]`` in channels-last memory whose values a `Call` has yet to compute."""

    call: Call
    sizes: tuple[int, ...]
    low: float
    high: float
    value: Tensor | None

    @staticmethod
    def __new__(cls, call: Call, shape: tuple[int, ...], bounds: tuple[float, float] = _UNBOUNDED) -> Deferred:
        """A tensor of a shape without memory; see `settled`."""
        _, c, h, w = shape
        strides = (c * h * w, 1, w * c, c)
        deferred = Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=torch.float32)
        deferred.call, deferred.sizes, deferred.value = call, shape, None
        deferred.low, deferred.high = bounds
        return deferred

    def settled(self) -> Tensor:
        """The ordinary tensor that this one stands for from now on."""
        if self.value is None:
            self.value = self.call.values(self.low, self.high)
        return self.value

    def bytes(self, encoding: Encoding) -> Tensor:
        """The image of bytes that a layer with this encoding reads."""
        if self.value is not None:
            return images.encode(self.value, Request(encoding, *_UNBOUNDED))
        return self.call.bytes(Request(encoding, self.low, self.high))

    def bounded(self, low: float, high: float, inplace: bool) -> Tensor:
        """This tensor clamped, still without values."""
        if self.value is not None:
            return self.value.clamp_(low, high) if inplace else self.value.clamp(low, high)
        low, high = (min(max(bound, low), high) for bound in (self.low, self.high))
        if not inplace:
            return Deferred(self.call, self.sizes, (low, high))
        self.low, self.high = low, high
        return self

    def pooled(self, window: Window) -> Deferred:
        """This tensor max-pooled, still without values: bounds and encodings are monotone, so bytes can be pooled."""
        n, c, *size = self.sizes
        low, high, call = self.low, self.high, self.call

        def produce(request: Request) -> Tensor:
            bounds = (min(max(bound, request.low), request.high) for bound in (low, high))
            if request.encoding is None:
                return F.max_pool2d(call.values(*bounds), *window)
            return images.max_pool(call.bytes(Request(request.encoding, *bounds)), window)

        asked = call.asked.pooled.setdefault(window, Asked())
        return Deferred(Call(produce, asked), (n, c, *pooled_size((size[0], size[1]), window)))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """That of the values."""
        return repr(self.settled())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Bounds and poolings are noted, questions about shape and type answered; everything else gets the values."""
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _STAY_DEFERRED and args and isinstance(args[0], Deferred):
            return _STAY_DEFERRED[func](*args, **kwargs)
        return func(*settle(args), **settle(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """For operators that are reached without passing `__torch_function__`."""
        return func(*settle(args), **settle(kwargs or {}))


def may_wait(x: Tensor) -> bool:
    """Whether a result of this input can be deferred: images on the CPU, outside of compiled and traced code."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if type(x) is Deferred:
        return True
    if x.requires_grad and torch.is_grad_enabled():
        return False  # torch warns that the operator has none
    return type(x) is Tensor and x.dim() == 4 and x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0


def sizes_of(x: Tensor) -> tuple[int, ...]:
    """The shape of a tensor; that of a deferred one costs no call into torch."""
    return x.sizes if isinstance(x, Deferred) else tuple(x.shape)


def bytes_of(x: Tensor, encoding: Encoding) -> Tensor:
    """The image of bytes that a layer reads: a copy, so that what happens to ``x`` later does not matter."""
    return x.bytes(encoding) if isinstance(x, Deferred) else images.encode(x, Request(encoding, *_UNBOUNDED))


def ordinary(x: Tensor) -> Tensor:
    """A deferred tensor's ordinary one, in front of compiled code too; any other tensor as it is."""
    return _outside_of_graphs(x) if isinstance(x, Deferred) else x


_outside_of_graphs: Any = torch.compiler.disable(Deferred.settled)


def settle(tree: Any) -> Any:
    """A nest of containers with ordinary tensors in place of deferred ones."""
    return tree_map_only(Deferred, lambda deferred: deferred.settled(), tree)


def settle_outputs(model: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a shipped model: who calls it sees ordinary tensors only."""
    return output if torch.compiler.is_compiling() else settle(output)


def _relu(x: Deferred, inplace: bool = False) -> Tensor:
    return x.bounded(0.0, torch.inf, inplace)


def _hardtanh(x: Deferred, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return x.bounded(min_val, max_val, inplace)


def _relu6(x: Deferred, inplace: bool = False) -> Tensor:
    return x.bounded(0.0, 6.0, inplace)


def _max_pool2d(
    x: Deferred, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:  # fmt: skip
    window = Window(_pair(kernel_size), _pair(stride or kernel_size), _pair(padding))
    plain = _pair(dilation) == (1, 1) and not ceil_mode and not return_indices
    if x.value is None and plain and _possible(window, x.sizes):
        return x.pooled(window)
    return F.max_pool2d(x.settled(), kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _pair(value: Any) -> tuple[int, int]:
    """Height and width, as torch reads them: one number or a sequence of one or two."""
    first, *rest = value if isinstance(value, Sequence) else [value]
    return first, rest[0] if rest else first


def _possible(window: Window, sizes: tuple[int, ...]) -> bool:
    """Whether torch pools such images and does not raise an error that it words itself."""
    kernels, strides, pads = window
    inside = all(0 <= 2 * pad <= kernel for pad, kernel in zip(pads, kernels, strict=True))
    return inside and min(strides) > 0 and min(pooled_size((sizes[2], sizes[3]), window)) > 0


_STAY_DEFERRED: dict[Any, Callable[..., Any]] = {
    F.max_pool2d: _max_pool2d,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), lambda x: _relu(x, inplace=True)),
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
}
_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_contiguous),
}
