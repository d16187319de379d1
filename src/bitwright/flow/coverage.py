"""`coverage`: what became of every tensor of a model, and what it weighs. Nothing is left unsaid."""

from __future__ import annotations

import math
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
    plan = plan_of(model)
    rows, once = [], _Once()
    for path, module in model.named_modules():
        if isinstance(module, LowbitLayer):
            site = _site(path, plan)
            scales = [part for name, part in module.named_buffers() if name.startswith("weight_scale_")]
            stored = once.weight(module) + once(*scales)
            ranges = once(module.input_scale, module.input_zero_point)
            elements = math.prod(module.shape)
            rows.append(
                Covered(
                    str(site), str(module.weight_spec), spelled(module.input_spec), stored + ranges, elements,
                    plan.why.get(site, ""),
                )
            )  # fmt: skip
            if module.bias is not None:
                rows.append(
                    Covered(
                        str(replace(site, slot=site.slot.replace("weight", "bias"))),
                        "float",
                        "",
                        once(module.bias),
                        module.bias.numel(),
                        "biases stay float",
                    )
                )
        elif isinstance(module, LowbitAdd):
            stored = once(*(buffer for _, buffer in module.named_buffers()))
            specs = ", ".join(str(spec) for spec in module.input_specs)
            rows.append(Covered(path, "", specs, stored, 0, plan.why.get(Site(path, "input.0"), "")))
        elif isinstance(module, LowbitOperation):
            stored = once(*module.buffers())
            rows.append(Covered(path, "", module.specs, stored, 0, _why_operation(path, plan)))
        elif not isinstance(module, Operand):
            for name, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                full, site = f"{path}.{name}" if path else name, _site(path, plan)
                if site.path != path:  # a product that stays in float, inside a shipped module
                    full = str(replace(site, slot=site.slot.replace("weight", name)))
                why = plan.why.get(site, f"{type(module).__name__} has no quantized form")
                rows.append(Covered(full, "float", "", once(tensor), tensor.numel(), why))
    return rows


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
