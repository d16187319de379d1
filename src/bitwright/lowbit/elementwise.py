"""`LowbitAdd`: the shipped residual add."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from bitwright.kernels import table
from bitwright.kernels.device import device_features
from bitwright.kernels.images import Encoding, encoding_of
from bitwright.kernels.row import Activation
from bitwright.lowbit.deferred import Asked, Call, Deferred, bytes_of, may_wait, ordinary, sizes_of
from bitwright.numerics.spec import QParams


class LowbitAdd(nn.Module):
    """``a + b`` of two quantized inputs, bit for bit what `nn.elementwise.QAdd` simulates."""

    input_scale_0: Tensor
    input_scale_1: Tensor
    input_zero_point_0: Tensor | None
    input_zero_point_1: Tensor | None

    def __init__(self, inputs: tuple[Activation, Activation], features: frozenset[str]) -> None:
        super().__init__()
        self.input_specs = tuple(spec for spec, _ in inputs)
        for number, (_, qparams) in enumerate(inputs):
            assert qparams is not None
            zero_point = qparams.zero_point
            self.register_buffer(f"input_scale_{number}", qparams.scale.detach().clone())
            self.register_buffer(
                f"input_zero_point_{number}", None if zero_point is None else zero_point.detach().clone()
            )
        self._select(features)
        self.asked = Asked()
        self._gather()

    def _select(self, features: frozenset[str]) -> None:
        self.kernel = table.select("add", self.input_specs[0], self.input_specs[1], (), features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.input_scale_0.device.type
        super()._apply(fn, recurse)
        if self.input_scale_0.device.type not in (before, "meta"):
            self._select(device_features(self.input_scale_0.device))
        self._gather()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._gather()

    def _gather(self) -> None:
        """The encodings of both inputs as the kernel for images takes them; None where it cannot serve."""
        self.encodings: tuple[Encoding, Encoding] | None = None
        if self.kernel.run_images is not None and not self.input_scale_0.is_meta:
            left, right = (encoding_of(input) for input in self.inputs)
            self.encodings = None if left is None or right is None else (left, right)

    @property
    def inputs(self) -> tuple[Activation, Activation]:
        """How both inputs are encoded."""
        return (
            Activation(self.input_specs[0], QParams(self.input_scale_0, self.input_zero_point_0)),
            Activation(self.input_specs[1], QParams(self.input_scale_1, self.input_zero_point_1)),
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of two tensors of one shape, float32; of images that other layers deferred a `Deferred`."""
        waits = (type(a) is Deferred or type(b) is Deferred) and may_wait(a) and may_wait(b)
        if waits and self.encodings is not None and sizes_of(a) == sizes_of(b):
            assert self.kernel.run_images is not None
            left, right = self.encodings
            sides = bytes_of(a, left), bytes_of(b, right)
            produce = partial(self.kernel.run_images, *sides, sizes_of(a), left, right)
            return Deferred(Call(produce, self.asked), sizes_of(a))
        return self.kernel.run(ordinary(a), ordinary(b), *self.inputs)

    def extra_repr(self) -> str:
        """Specs and kernel, for ``print(model)``."""
        return f"inputs={self.input_specs[0]}, {self.input_specs[1]}, kernel={self.kernel.name}"
