"""What all shipped layers share: packed codes as buffers, and a kernel that reads them in its own layout.

The buffers ``packed``, ``weight_scale``, ``weight_zero_point``, ``weight_codebook``, ``bias``, ``input_scale`` and
``input_zero_point`` are what files hold (see `numerics.packing` for the bytes). Where scales are quantized themselves,
``weight_scale`` is None and they are ``weight_scale_packed``, ``weight_scale_scale`` and ``weight_scale_zero_point``.
The kernel's layout is derived from them, is never saved, and is rebuilt after loading. No float weight is left.
A layer that moves to another kind of device takes the row of the kernel table that serves it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from bitwright.kernels import table
from bitwright.kernels.device import device_features
from bitwright.kernels.row import Activation, Kernel, Packed
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.spec import QParams, QuantSpec


class LowbitLayer(nn.Module):
    """A layer of packed codes; subclasses add the forward."""

    op: str
    groups: int = 1
    packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_codebook: Tensor | None
    weight_scale_packed: Tensor
    weight_scale_scale: Tensor | None
    weight_scale_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self, weight: QTensor, bias: Tensor | None, input: Activation | None, features: frozenset[str]
    ) -> None:
        super().__init__()
        self.weight_spec, self.shape = weight.spec, weight.shape
        self.input_spec = None if input is None else input.spec
        for name, part in _parts(weight).items():
            self.register_buffer(name, part)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        qparams = None if input is None else input.qparams
        self.register_buffer("input_scale", None if qparams is None else qparams.scale.detach().clone())
        zero_point = None if qparams is None or qparams.zero_point is None else qparams.zero_point.detach().clone()
        self.register_buffer("input_zero_point", zero_point)
        self.kernel = self._select(features)
        self.lay_out()
        self.register_load_state_dict_post_hook(_lay_out_again)

    def _select(self, features: frozenset[str]) -> Kernel:
        return table.select(self.op, self.weight_spec, self.input_spec, self.shape, features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.packed.device.type
        super()._apply(fn, recurse)
        after = self.packed.device.type
        if after not in (before, "meta"):
            self.kernel = self._select(device_features(self.packed.device))
            if before != "meta":  # else there are no codes yet, and loading them lays out
                self.lay_out()
        return self

    @property
    def weight_parts(self) -> list[Tensor]:
        """The tensors that the weight is stored as."""
        return [part for part in _parts(self.weight).values() if part is not None]

    def lay_out(self) -> None:
        """Derive the kernel's own constants from the packed codes."""
        packed = self.kernel.pack(self.weight, self.groups)
        for name, value in packed._asdict().items():
            self.register_buffer(f"kernel_{name}", value, persistent=False)

    @property
    def weight(self) -> QTensor:
        """The stored weight."""
        spec = self.weight_spec
        scale = self.weight_scale if spec.scale is None else self._stored_scale(spec.scale)
        return QTensor(self.packed, scale, self.weight_zero_point, spec, self.shape, self.weight_codebook)

    def _stored_scale(self, spec: QuantSpec) -> QTensor:
        count = math.prod(self.weight_spec.granularity.scale_shape(self.shape))
        packed, step = self.weight_scale_packed, self.weight_scale_scale
        step = torch.ones(1, device=packed.device) if step is None else step
        return QTensor(packed, step, self.weight_scale_zero_point, spec, (1, count))

    @property
    def constants(self) -> Packed:
        """The kernel's constants."""
        return Packed(*(getattr(self, f"kernel_{name}") for name in Packed._fields))

    @property
    def input(self) -> Activation | None:
        """How the input is encoded; None for float inputs."""
        if self.input_spec is None:
            return None
        qparams = None if self.input_scale is None else QParams(self.input_scale, self.input_zero_point)
        return Activation(self.input_spec, qparams)

    def extra_repr(self) -> str:
        """Shape, specs and kernel, for ``print(model)``."""
        specs = f"weight={self.weight_spec}, input={self.input_spec or 'float'}"
        return f"{list(self.shape)}, {specs}, kernel={self.kernel.name}"


def _parts(weight: QTensor) -> dict[str, Tensor | None]:
    """The tensors of a weight by the names of their buffers; a step of scales that is 1 by definition is not stored."""
    scale = weight.scale
    parts = {"packed": weight.packed, "weight_scale": scale if isinstance(scale, Tensor) else None}
    parts |= {"weight_zero_point": weight.zero_point, "weight_codebook": weight.codebook}
    if isinstance(scale, QTensor):
        step = scale.qparams.scale if scale.spec.format.is_scaled else None
        parts |= {"weight_scale_packed": scale.packed, "weight_scale_scale": step}
        parts["weight_scale_zero_point"] = scale.zero_point
    return parts


def _lay_out_again(layer: nn.Module, incompatible: object) -> None:
    assert isinstance(layer, LowbitLayer)
    layer.lay_out()
