"""What becomes of a preset's group sizes where they do not divide a layer."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from bitwright.errors import NumericsError
from bitwright.numerics.spec import Granularity, QuantSpec
from bitwright.plan.site import rows_shape, scales_shape


def fitted(spec: QuantSpec, module: nn.Module, slot: str) -> tuple[QuantSpec, str]:
    """The spec with groups that divide the weight, and what was changed (empty: nothing).

    A group size that does not divide the weight becomes one scale per channel; groups of scales that do not divide
    them become the largest ones that do, or float32 scales where there are none.

    >>> spec, why = fitted(QuantSpec.parse("nf4/group64/scale(int8/group256)"), nn.Linear(128, 9), "weight")
    >>> str(spec), why
    ('nf4/group64/scale(int8/group18)', 'groups of 256 do not divide 18 scales')
    """
    shape = rows_shape(module, slot)
    try:
        spec.granularity.scale_shape(shape)
    except NumericsError:
        channel = QuantSpec.parse(f"{spec.format}/channel")
        return channel, f"{spec} does not divide {shape[-1]} inputs, one scale per channel instead"
    size = 0 if spec.scale is None else spec.scale.granularity.size
    count = scales_shape(spec, module, slot)[1]
    if spec.scale is None or not size or count % size == 0:
        return spec, ""
    fitting = next((n for n in range(size, 1, -1) if count % n == 0), 0)
    scale = replace(spec.scale, granularity=Granularity("group", fitting)) if fitting else None
    return replace(spec, scale=scale), f"groups of {size} do not divide {count} scales"
