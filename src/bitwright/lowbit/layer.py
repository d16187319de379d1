"""What all shipped layers share: one copy of the weight, laid out for a kernel, and the way back to what files hold.

Files hold ``packed``, ``weight_scale``, ``weight_zero_point``, ``weight_codebook``, ``bias``, ``input_scale`` and
``input_zero_point`` (see `numerics.packing` for the bytes). Where scales are quantized themselves, ``weight_scale`` is
None and they are ``weight_scale_packed``, ``weight_scale_scale`` and ``weight_scale_zero_point``.
In memory the first four are the constants of the kernel's row, ``kernel_layout`` and so on; they are computed from
those whenever they are asked for or saved, and loading lays them out again. No other copy of the weight is left.
A layer that moves to another kind of device takes the row of the kernel table that serves it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitwright.kernels import table
from bitwright.kernels.device import device_features
from bitwright.kernels.row import Activation, Kernel, Packed
from bitwright.lowbit.shared import Shared, shared_by
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.spec import QParams

_Stored = tuple[tuple[int, ...], torch.dtype]


class LowbitLayer(nn.Module):
    """A layer of packed codes; subclasses add the forward."""

    op: str
    groups: int = 1
    kernel_layout: Tensor
    kernel_scale: Tensor
    weight_scale_packed: Tensor
    weight_scale_scale: Tensor | None
    weight_scale_zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    shared: Shared

    def __init__(
        self, weight: QTensor, bias: Tensor | None, input: Activation | None, features: frozenset[str]
    ) -> None:
        super().__init__()
        self.weight_spec, self.shape = weight.spec, weight.shape
        self.input_spec = None if input is None else input.spec
        for name, part in _scale_parts(weight.scale).items():
            self.register_buffer(name, part)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        qparams = None if input is None else input.qparams
        self.register_buffer("input_scale", None if qparams is None else qparams.scale.detach().clone())
        zero_point = None if qparams is None or qparams.zero_point is None else qparams.zero_point.detach().clone()
        self.register_buffer("input_zero_point", zero_point)
        self._shapes = {name: tuple(part.shape) for name, part in _parts(weight).items()}
        self.kernel = self._select(features)
        self.lay_out(weight)

    def _select(self, features: frozenset[str]) -> Kernel:
        return table.select(self.op, self.weight_spec, self.input_spec, self.shape, features)

    def lay_out(self, weight: QTensor, *, copied: bool = False) -> None:
        """Hold another weight of the same spec and shape, as constants of the layer's kernel.

        Where a kernel reads a part as it is stored, that tensor itself is held, with ``copied`` a copy of it.
        """
        parts = [*_parts(weight).values(), *_scale_parts(weight.scale).values()]
        packed, *others = (part for part in parts if part is not None)
        self.shared = shared_by(packed, others)
        places = {part.untyped_storage().data_ptr() for part in parts if copied and part is not None}

        def made() -> list[Tensor | None]:
            constants = self.kernel.pack(weight, self.groups, self.input_spec)
            return [x.clone() if x is not None and x.untyped_storage().data_ptr() in places else x for x in constants]

        constants = self.shared.get((self.kernel.name, self.groups, self.input_spec), made)
        for name, value in zip(Packed._fields, constants, strict=True):
            self.register_buffer(f"kernel_{name}", value, persistent=False)

    @property
    def constants(self) -> Packed:
        """The kernel's constants."""
        return Packed(*(getattr(self, f"kernel_{name}") for name in Packed._fields))

    @property
    def weight(self) -> QTensor:
        """The weight as files hold it."""
        scale = self.weight_scale if self.weight_spec.scale is None else self._stored_scale()
        return QTensor(self.packed, scale, self.weight_zero_point, self.weight_spec, self.shape, self.weight_codebook)

    @property
    def packed(self) -> Tensor:
        """The codes as files hold them: uint8 ``[rows, bytes]``."""
        shape, dtype = self.stored_as["packed"]
        if self.kernel_layout.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._part("packed", lambda: self._unpacked(self.constants))

    @property
    def weight_scale(self) -> Tensor:
        """The scale as files hold it; None where scales are quantized, see `weight`."""
        return self._part("weight_scale", lambda: self._qparams.scale)

    @property
    def weight_zero_point(self) -> Tensor | None:
        """The zero point as files hold it."""
        return self._part("weight_zero_point", lambda: self._qparams.zero_point)

    @property
    def weight_codebook(self) -> Tensor | None:
        """The fitted table as files hold it."""
        return self._part("weight_codebook", lambda: self._qparams.codebook)

    def _part(self, name: str, make: Callable[[], Tensor | None]) -> Any:
        return self.shared.get(name, lambda: (make(),))[0] if name in self._shapes else None

    def _unpacked(self, constants: Packed) -> Tensor:
        return self.kernel.unpack(constants, self.weight_spec, self.shape, self.groups)

    @property
    def _qparams(self) -> QParams:
        return self.kernel.qparams(self.constants, self.weight_spec, self.shape)

    def _stored_scale(self) -> QTensor:
        spec, count = self.weight_spec.scale, math.prod(self.weight_spec.granularity.scale_shape(self.shape))
        assert spec is not None
        packed, step = self.weight_scale_packed, self.weight_scale_scale
        step = torch.ones(1, device=packed.device) if step is None else step
        return QTensor(packed, step, self.weight_scale_zero_point, spec, (1, count))

    @property
    def stored_as(self) -> dict[str, _Stored]:
        """Shape and type of what is computed for files, by name; costs nothing."""
        floats = self.kernel_scale.dtype
        return {name: (shape, torch.uint8 if name == "packed" else floats) for name, shape in self._shapes.items()}

    @property
    def input(self) -> Activation | None:
        """How the input is encoded; None for float inputs."""
        if self.input_spec is None:
            return None
        qparams = None if self.input_scale is None else QParams(self.input_scale, self.input_zero_point)
        return Activation(self.input_spec, qparams)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self._shapes:
            destination[prefix + name] = getattr(self, name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ours = {prefix + name for name in self._shapes}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in ours]
        if strict:
            missing_keys += [prefix + name for name in self._shapes if prefix + name not in state_dict]
        given: dict[str, Tensor] = {}
        for name, (shape, _) in self.stored_as.items():
            value: Any = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and tuple(value.shape) == shape:
                given[name] = value.detach() if value.requires_grad else value
            elif prefix + name in state_dict:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                error_msgs.append(f"size mismatch for {prefix}{name}: the layer has {list(shape)}, given {found}")
        scales = any(prefix + name in state_dict for name in self._buffers if name.startswith("weight_scale_"))
        if given or scales:
            self._load_parts(given, bool(local_metadata.get("assign_to_params_buffers")))

    def _load_parts(self, given: dict[str, Tensor], assign: bool) -> None:
        """Lay out a weight of new parts, and of the old ones where there is none."""
        device = self.kernel_layout.device
        if device.type == "meta":
            if not assign or len(given) < len(self._shapes):
                return  # nothing to write to, as torch warns
            device = given["packed"].device
        parts = {
            name: given[name].to(device, dtype) if name in given else getattr(self, name)
            for name, (_, dtype) in self.stored_as.items()
        }
        self.lay_out(self._weight_of(parts), copied=not assign)

    def _weight_of(self, parts: Mapping[str, Tensor]) -> QTensor:
        scale = parts["weight_scale"] if "weight_scale" in parts else self._stored_scale()
        zero_point, codebook = parts.get("weight_zero_point"), parts.get("weight_codebook")
        return QTensor(parts["packed"], scale, zero_point, self.weight_spec, self.shape, codebook)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before, qparams = self.constants, self._qparams
        super()._apply(fn, recurse)
        if all(old is new for old, new in zip(before, self.constants, strict=True)):
            return self
        self.shared = Shared()
        start, end = before.layout.device, self.kernel_layout.device
        if end.type in (start.type, "meta"):
            return self
        if start.type == "meta":  # there are no codes yet, loading will bring them
            parts = {
                name: torch.zeros(shape, dtype=dtype, device=end) for name, (shape, dtype) in self.stored_as.items()
            }
        else:
            values = {"weight_scale": qparams.scale, "weight_zero_point": qparams.zero_point}
            values |= {"packed": self._unpacked(before), "weight_codebook": qparams.codebook}
            parts = {name: fn(value) for name, value in values.items() if name in self._shapes and value is not None}
        self.kernel = self._select(device_features(end))
        self.lay_out(self._weight_of(parts))
        return self

    def extra_repr(self) -> str:
        """Shape, specs and kernel, for ``print(model)``."""
        specs = f"weight={self.weight_spec}, input={self.input_spec or 'float'}"
        return f"{list(self.shape)}, {specs}, kernel={self.kernel.name}"


def _parts(weight: QTensor) -> dict[str, Tensor]:
    """The tensors of a weight that a kernel's constants hold too, by their names in files."""
    scale = weight.scale if isinstance(weight.scale, Tensor) else None
    parts = {"packed": weight.packed, "weight_scale": scale}
    parts |= {"weight_zero_point": weight.zero_point, "weight_codebook": weight.codebook}
    return {name: part for name, part in parts.items() if part is not None}


def _scale_parts(scale: Tensor | QTensor) -> dict[str, Tensor | None]:
    """The tensors of quantized scales by the names of their buffers; a step that is 1 by definition is not stored."""
    if isinstance(scale, Tensor):
        return {}
    step = scale.qparams.scale if scale.spec.format.is_scaled else None
    return {
        "weight_scale_packed": scale.packed,
        "weight_scale_scale": step,
        "weight_scale_zero_point": scale.zero_point,
    }
