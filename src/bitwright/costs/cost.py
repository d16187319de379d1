"""What a plan costs: stored bytes, exactly; operations of each layer, from one forward.

Sizes of files are known before anything is calibrated: `plan_bytes` ships the model with scales of 1, which are as long
as any others, and counts. `site_bytes` is the part of it that the spec of one site decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from bitwright.bench.measure import model_bytes
from bitwright.errors import SearchError
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.graph.dataflow import call, evaluating
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site, operator_of, parts_of, rows_shape, scales_shape

FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Cost:
    """What one choice costs: stored bytes, seconds, joules, bit operations, and live bytes while its layer runs.

    All but ``live`` add up over layers; the peak is the stored bytes of all and the largest ``live``.

    >>> Cost(bytes=3, live=5) + Cost(bytes=1, live=2)
    Cost(bytes=4, latency=0.0, energy=0.0, bops=0.0, live=5)
    """

    bytes: float = 0.0
    latency: float = 0.0
    energy: float = 0.0
    bops: float = 0.0
    live: float = 0.0

    def __post_init__(self) -> None:
        bad = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if not math.isfinite(getattr(self, f.name))]
        if bad:
            raise SearchError(f"a cost must be a finite number, found {', '.join(bad)}")

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.latency + other.latency,
            self.energy + other.energy,
            self.bops + other.bops,
            max(self.live, other.live),
        )

    @property
    def peak_memory(self) -> float:
        """Stored bytes and the largest ``live``."""
        return self.bytes + self.live


@dataclass(frozen=True, slots=True)
class Work:
    """What a module did in one forward: multiplications with additions, and elements read and returned."""

    macs: int
    inputs: int
    outputs: int


def plan_bytes(model: nn.Module, plan: Plan) -> int:
    """Bytes of all tensors in the file of ``model`` once shipped by ``plan``: what `coverage` adds up to.

    ``model`` is the float model. Raises what `prepare` raises.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> plan_bytes(net, Plan.preset("w4a8", net, torch.zeros(1, 8)))
    208
    """
    prepared = prepare(model, replace(plan, steps=()))
    for module in prepared.modules():
        if isinstance(module, Quantizer):
            module.stage = Stage.SIMULATE
    return model_bytes(convert(prepared, inplace=True, features=frozenset()))


def site_bytes(module: nn.Module, slot: str, spec: QuantSpec | None) -> int:
    """Bytes that the spec of a site decides: a weight's codes, scales, zero points and table; an activation's range.

    ``module`` is the float module, or a functional call (None stands for it).

    >>> site_bytes(nn.Linear(10, 4), "weight", QuantSpec.parse("int3/channel"))
    32
    """
    if not Site("", slot).is_weight:
        return 0 if spec is None or spec.dynamic else 4 * (1 if spec.symmetric else 2)
    shape = rows_shape(module, slot)
    if spec is None:
        return 4 * math.prod(shape)
    codes = shape[0] * spec.format.packed_bytes(math.prod(shape[1:]))
    parts = 1 if spec.granularity.kind == "tensor" else parts_of(module, slot)  # one scale of all is stored once
    table = (spec.format.qmax + 1) * (shape[0] if spec.granularity.kind == "channel" else 1) if spec.format.fit else 0
    return codes + 4 * table + parts * _scales_bytes(spec, math.prod(scales_shape(spec, module, slot)))


def _scales_bytes(spec: QuantSpec, count: int) -> int:
    """Bytes of ``count`` scales and their zero points; a scale that is 1 by definition is stored too."""
    zero_points = 0 if spec.symmetric else 4 * count
    if spec.scale is None:
        return zero_points + 4 * count
    inner = spec.scale
    groups = math.prod(inner.granularity.scale_shape((1, count)))
    own = int(inner.format.is_scaled) + int(not inner.symmetric)
    return zero_points + inner.format.packed_bytes(count) + 4 * groups * own


@torch.no_grad()
def work_of(model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] = call) -> dict[str, Work]:
    """`Work` of every module that has a quantized form, from one forward on ``example``, in eval mode.

    Counts are those of the whole batch: pass one item for numbers per item. A module that runs several times adds up;
    ``inputs`` and ``outputs`` are those of its largest call.

    >>> work_of(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 6, 6))
    {'0': Work(macs=3456, inputs=108, outputs=128)}
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton where that is installed: not at import

    found: dict[str, Work] = {}
    modules = {path: module for path, module in model.named_modules() if operator_of(module)}
    counter = FlopCounterMode(display=False)
    starts: dict[str, int] = {}

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: starts.update({path: counter.get_total_flops()})

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            old = found.get(path, Work(0, 0, 0))
            macs = old.macs + (_recurrent(module, args) or (counter.get_total_flops() - starts[path]) // 2)
            found[path] = Work(macs, max(old.inputs, _elements((args, kwargs))), max(old.outputs, _elements(out)))

        return hook

    hooks = [module.register_forward_pre_hook(enter(path)) for path, module in modules.items()]
    hooks += [module.register_forward_hook(leave(path), with_kwargs=True) for path, module in modules.items()]
    try:
        with evaluating(model), counter:
            forward(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _recurrent(module: nn.Module, args: Any) -> int:
    """What torch computes in one opaque call: every weight with every row; 0 for modules of other kinds."""
    if not isinstance(module, nn.RNNBase):
        return 0
    rows = args[0].data if isinstance(args[0], PackedSequence) else args[0]
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
    return rows.numel() // module.input_size * weights


def _elements(values: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def bits_of(spec: QuantSpec | None) -> int:
    """Width of a code; 32 for float."""
    return FLOAT_BITS if spec is None else spec.format.bits


def layer_cost(module: nn.Module, work: Work, specs: dict[str, QuantSpec | None]) -> Cost:
    """Cost of a layer whose slots have these specs: bytes, bit operations and live bytes; no latency, no energy.

    Bit operations are ``macs * weight bits * activation bits`` (HAWQ-V3, absolute: float against float counts 32 * 32);
    ``live`` is the input in its bits (the widest of several) and the output in float32.
    """
    weights = [bits_of(spec) for slot, spec in specs.items() if Site("", slot).is_weight]
    inputs = [bits_of(spec) for slot, spec in specs.items() if not Site("", slot).is_weight]
    width = max(inputs, default=FLOAT_BITS)
    bops = work.macs * max(weights, default=width) * width
    live = work.inputs * width / 8 + work.outputs * 4
    return Cost(sum(site_bytes(module, slot, spec) for slot, spec in specs.items()), bops=bops, live=live)
