"""`coverage`: what became of every tensor of a model, and what it weighs. Nothing is left unsaid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from bitwright.flow.prepare import plan_of
from bitwright.lowbit.attention import LowbitOperation, Operand
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.layer import LowbitLayer
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from bitwright.plan.target import spelled


@dataclass(frozen=True, slots=True)
class Covered:
    """One stored tensor or low-bit layer: its format, bytes (codes, scales, zero points, table), and the reason."""

    path: str
    format: str
    input: str
    bytes: int
    elements: int
    why: str


class _Once:
    """Counts bytes, those of shared tensors and weights for the first of their owners."""

    def __init__(self) -> None:
        self._seen: set[object] = set()

    def __call__(self, *tensors: Tensor | None) -> int:
        return sum(part.nbytes for part in tensors if part is not None and self._new(part.data_ptr()))

    def weight(self, layer: LowbitLayer) -> int:
        """What is computed for files from a layer's constants; what it holds as it is stored may be others' too."""
        if not self._new(layer.shared):
            return 0
        held = {part.data_ptr() for part in layer.constants if part is not None}
        total = 0
        for name, (shape, dtype) in layer.stored_as.items():
            part = None if name == "packed" else getattr(layer, name)
            shared = part is not None and part.data_ptr() in held
            total += self(part) if shared else math.prod(shape) * dtype.itemsize
        return total

    def _new(self, key: object) -> bool:
        new = key not in self._seen
        self._seen.add(key)
        return new


def coverage(model: nn.Module) -> list[Covered]:
    """One row per low-bit layer, its bias apart, and per other tensor of a converted model; bytes add up to the file's.

    Tied tensors are counted once. Raises `ModelError` for a model that was not prepared.
    """
    plan, once = plan_of(model), _Once()
    return [row for path, module in model.named_modules() for row in _rows(path, module, plan, once)]


def _rows(path: str, module: nn.Module, plan: Plan, once: _Once) -> Iterator[Covered]:
    """What one module stores itself."""
    if isinstance(module, LowbitLayer):
        yield from _layer(path, module, plan, once)
    elif isinstance(module, LowbitAdd):
        stored = once(*(buffer for _, buffer in module.named_buffers()))
        specs = ", ".join(str(spec) for spec in module.input_specs)
        yield Covered(path, "", specs, stored, 0, plan.why.get(Site(path, "input.0"), ""))
    elif isinstance(module, LowbitOperation):
        yield Covered(path, "", module.specs, once(*module.buffers()), 0, _why_operation(path, plan))
    elif not isinstance(module, Operand):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full, site = f"{path}.{name}" if path else name, _site(path, plan)
            if site.path != path:  # a product that stays in float, inside a shipped module
                full = str(replace(site, slot=site.slot.replace("weight", name)))
            why = plan.why.get(site, f"{type(module).__name__} has no quantized form")
            yield Covered(full, "float", "", once(tensor), tensor.numel(), why)


def _layer(path: str, layer: LowbitLayer, plan: Plan, once: _Once) -> Iterator[Covered]:
    site = _site(path, plan)
    scales = [part for name, part in layer.named_buffers() if name.startswith("weight_scale_")]
    stored = once.weight(layer) + once(*scales) + once(layer.input_scale, layer.input_zero_point)
    formats, why = (str(layer.weight_spec), spelled(layer.input_spec)), plan.why.get(site, "")
    yield Covered(str(site), *formats, stored, math.prod(layer.shape), why)
    if layer.bias is not None:
        bias = replace(site, slot=site.slot.replace("weight", "bias"))
        yield Covered(str(bias), "float", "", once(layer.bias), layer.bias.numel(), "biases stay float")


def _site(path: str, plan: Plan) -> Site:
    """The site of a layer's weight; a part of a module with several products is named after its slot there."""
    parent, _, slot = path.rpartition(".")
    part = Site(parent, slot)
    if part in plan.sites and part.is_weight:
        return part
    whole = Site(*parent.rpartition(".")[::2]) if parent else part  # one of the parts of ``in_proj_weight``
    return whole if whole in plan.sites and whole.is_weight else Site(path, "weight")


def _why_operation(path: str, plan: Plan) -> str:
    reasons = (why for site, why in plan.why.items() if site.path == path and plan.sites.get(site) is not None)
    return next(reasons, "")
