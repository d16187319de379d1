"""Reconstruction: choose codes and ranges of a layer or block so that it computes what it computed in float.

One engine: random rows of the calls that reach the module from the quantized prefix, the squared error of its output as
the loss (summed over channels, averaged over the rest), Adam, and rows held out that decide whether the result is kept.
Ranks draw from their own rows and step with the mean of their gradients.
Three methods on it:

======== ====================== ============================================= ============================
method   works on               trains                                        source
======== ====================== ============================================= ============================
adaround a layer                which neighbour each weight becomes           Nagel 2020 (2004.10568)
adaquant a layer                weights, scales of weight and input, bias     Hubara 2020 (2006.10518)
brecq    a block (see `blocks`) adaround's variables and the ranges of inputs Li 2021 (2102.05426) with the
                                                                              dropping of Wei 2022 (QDrop)
======== ====================== ============================================= ============================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.algorithms.layers import Layer, NotApplicableError, write_weight
from bitwright.algorithms.lockstep import Call, Visit, holding
from bitwright.algorithms.rounding import Drop, DroppedInput, FreeWeight, SoftWeight, sharpness
from bitwright.algorithms.samples import Samples, first_tensor, squared_error
from bitwright.algorithms.snapshot import Snapshot, standing_in
from bitwright.nn.elementwise import QAdd, QCat
from bitwright.nn.layer import QLayer, Simulated
from bitwright.nn.quantizer import Quantizer
from bitwright.observe import ranks
from bitwright.plan.step import Value

PENALTY = 0.01
"""Weight of AdaRound's regulariser (lambda)."""
ROUNDING_TRAVEL = 20.0
"""How far Adam can take AdaRound's variables: BRECQ's rate of 1e-3 times its 20,000 iterations."""
WEIGHT_TRAVEL = 2.0
"""How far it can take AdaQuant's weights, in steps of the grid."""
BIAS_TRAVEL = 0.3
"""How far it can take a bias, as a fraction of the spread of the float output."""
RANGE_TRAVEL = 0.3
"""How far it can take a range, as a fraction of the scale."""
HELD_BATCH = 64


@dataclass(frozen=True, slots=True)
class Block:
    """A block whose turn it is: where it stands, its layers, and parameters as they were before earlier steps."""

    visit: Visit
    layers: Sequence[QLayer]
    floats: Mapping[nn.Parameter, Tensor]

    def error(self) -> float:
        """Mean squared error of its output, relative to the mean square of the float output."""
        power = sum(first_tensor(call.float_output).square().sum().item() for call in self.visit.calls)
        return squared_error(self.visit.calls, self.run) / max(*ranks.sums(power), 1e-30)

    def run(self, call: Call) -> Any:
        """What it computes now, simulated."""
        return self.visit.module(*call.args, **call.kwargs)


@dataclass(frozen=True, slots=True)
class Search:
    """How long and on what the engine searches; ``drop`` is the share of inputs that stay float (QDrop)."""

    iterations: int
    batch: int
    seed: int
    drop: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """What is searched: stand-ins for quantizers, by (module, name of the child), and groups of parameters for Adam.

    A group whose ``decays`` is set has a rate that falls to 0 along a cosine. ``start`` are values to begin with.
    """

    stand_ins: Mapping[tuple[nn.Module, str], nn.Module]
    groups: Sequence[dict[str, Any]]
    soft: Sequence[SoftWeight] = ()
    start: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)
    drop: Drop | None = None


def adaround(layer: Layer, options: Mapping[str, Value]) -> None:
    """AdaRound: round each weight of a layer up or down so that the output's error is least, not the weight's.

    It starts from the weight that it finds: after a step that chose codes (gptq) the neighbours of those.
    Raises `NotApplicableError` for formats that are not integers, and where held-out rows say that it was no gain.
    """
    search, soft = _search(options), SoftWeight(layer.weight, _integer_weight(layer.module))
    stand_ins: dict[tuple[nn.Module, str], nn.Module] = {(layer.module, "weight_quantizer"): soft}
    problem = Problem(stand_ins, [_rounding([soft], search)], [soft])
    _reconstruct(layer.visit, problem, {layer.module: soft}, search)


def adaquant(layer: Layer, options: Mapping[str, Value]) -> None:
    """AdaQuant: move a layer's weights, the scales of weight and input, and its bias, with straight-through gradients.

    Raises `NotApplicableError` as `adaround`.
    """
    search, module, quantizer = _search(options), layer.module, _integer_weight(layer.module)
    free = FreeWeight(layer.weight, quantizer)
    step = free.scale.detach().mean().item()
    groups = [
        {"params": [free.weight], "lr": WEIGHT_TRAVEL * step / search.iterations, "decays": True},
        *_ranges([free.scale] if free.scale.requires_grad else [], search),
        *_ranges(_learned([module]), search),
        *_biases([module], layer.visit, search),
    ]
    problem = Problem({(module, "weight_quantizer"): free}, groups)
    _reconstruct(layer.visit, problem, {module: free}, search)


def brecq(block: Block, options: Mapping[str, Value]) -> None:
    """BRECQ: AdaRound for all weights of a block at once, and then its input ranges, by the error of its output.

    Starts from the float weights whatever codes earlier steps chose; those are the result to beat. ``drop`` is QDrop's
    probability, for the block's input as for the quantized inputs inside it. Raises `NotApplicableError` as `adaround`.
    """
    search, layers = _search(options), [layer for layer in block.layers if _refusal(layer) is None]
    if not layers:
        raise NotApplicableError("none of its weights is an integer one")
    own = {p: v for layer in layers for p in layer.own_parameters() if (v := block.floats.get(p)) is not None}
    with holding(own):
        soft = {layer: SoftWeight(layer.folded()[0], _integer_weight(layer)) for layer in layers}
    inside = [module for module in block.visit.module.modules() if isinstance(module, (QLayer, QAdd, QCat))]
    stand_ins: dict[tuple[nn.Module, str], nn.Module] = {(m, "weight_quantizer"): part for m, part in soft.items()}
    drop = Drop(search.drop, search.seed)
    for module in inside:
        for name, child in module.named_children():
            if isinstance(child, Quantizer) and not child.is_weight:
                stand_ins[module, name] = DroppedInput(child, drop)
    groups = [_rounding(soft.values(), search), *_ranges(_learned(inside), search)]
    groups += _biases(layers, block.visit, search)
    problem = Problem(stand_ins, groups, list(soft.values()), own, drop)
    _reconstruct(block.visit, problem, soft, search)


def _search(options: Mapping[str, Value]) -> Search:
    return Search(
        int(options["iterations"]), int(options["batch"]), int(options["seed"]), float(options.get("drop", 0.0))
    )


def _refusal(module: QLayer) -> str | None:
    quantizer = module.weight_quantizer
    if quantizer is None:
        return "its weight stays float"
    if not quantizer.spec.format.is_integer:
        return f"{quantizer.spec} is no integer format: its codes are not spaced evenly"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "it looks rows up and multiplies nothing"
    return None


def _integer_weight(module: QLayer) -> Quantizer:
    if (reason := _refusal(module)) is not None:
        raise NotApplicableError(reason)
    assert module.weight_quantizer is not None
    return module.weight_quantizer


def _rounding(soft: Iterable[SoftWeight], search: Search) -> dict[str, Any]:
    return {"params": [part.variable for part in soft], "lr": ROUNDING_TRAVEL / search.iterations, "decays": False}


def _ranges(scales: Iterable[nn.Parameter], search: Search) -> list[dict[str, Any]]:
    """Adam takes steps of the size of its rate: here a fraction of each scale."""
    rate = RANGE_TRAVEL / search.iterations
    return [{"params": [s], "lr": rate * s.detach().abs().mean().item(), "decays": True} for s in scales]


def _biases(layers: Iterable[QLayer], visit: Visit, search: Search) -> list[dict[str, Any]]:
    """What is added to each channel, by the layer or by the batch norm that it holds."""
    held = [layer.norm[0].bias if layer.norm else layer.bias for layer in layers]
    spread = ranks.first(first_tensor(visit.calls[0].float_output).std().item())
    rate = BIAS_TRAVEL * spread / search.iterations
    return [{"params": [bias for bias in held if bias is not None], "lr": rate, "decays": True}]


def _learned(modules: Iterable[Simulated]) -> list[nn.Parameter]:
    """Scales (and offsets) of the activations that only these modules read, where the plan lets ranges move."""
    readers: dict[Quantizer, int] = {}
    for module in modules:
        for child in module.children():
            if isinstance(child, Quantizer) and not child.is_weight:
                readers[child] = readers.get(child, 0) + 1
    found = [
        (quantizer.scale, quantizer.offset)
        for quantizer, count in readers.items()
        if count == quantizer.consumers and quantizer.rule.learns and quantizer.spec.format.is_integer
    ]
    return [part for pair in found for part in pair if isinstance(part, nn.Parameter)]


def _reconstruct(
    visit: Visit, problem: Problem, weights: Mapping[QLayer, SoftWeight | FreeWeight], search: Search
) -> None:
    """Search, write what was found, and take it back unless it is better on the rows held out."""
    module = visit.module
    with ranks.together(NotApplicableError):
        samples = Samples(visit.calls)

    def error() -> float:
        return squared_error(samples.held_out(HELD_BATCH), lambda call: module(*call.args, **call.kwargs))

    before, kept = error(), Snapshot(module)
    try:
        for parameter, value in problem.start.items():
            parameter.data.copy_(value)
        with kept.only_training(parameter for group in problem.groups for parameter in group["params"]):
            with standing_in(problem.stand_ins):
                _optimise(module, samples, problem, search)
        for layer, found in weights.items():
            _write(layer, found)
        after = error()
    except BaseException:
        kept.restore()
        raise
    if not after <= before:
        kept.restore()
        raise NotApplicableError(
            f"held-out rows: the squared error would be {after / max(before, 1e-30):.3g} times as large"
        )


@torch.no_grad()
def _write(layer: QLayer, found: SoftWeight | FreeWeight) -> None:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    if isinstance(found, FreeWeight):
        quantizer.set_qparams(found.qparams)
    write_weight(layer, found.hard(), quantizer)


def _optimise(module: nn.Module, samples: Samples, problem: Problem, search: Search) -> None:
    generator = torch.Generator().manual_seed(search.seed)
    rates = [group["lr"] for group in problem.groups]
    optimizer = torch.optim.Adam(
        [{"params": group["params"], "lr": group["lr"]} for group in problem.groups], fused=True
    )
    axis = _channel_axis(module)
    with torch.inference_mode(False), torch.enable_grad():
        for iteration in range(search.iterations):
            progress = iteration / search.iterations
            for group, rate, given in zip(optimizer.param_groups, rates, problem.groups, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress)) if given["decays"] else rate
            call = _mixed(samples.draw(search.batch, generator), problem.drop)
            difference = first_tensor(module(*call.args, **call.kwargs)) - call.float_output
            loss = difference.square().sum(axis).mean()
            if beta := sharpness(progress):
                loss = loss + PENALTY * sum((part.penalty(beta) for part in problem.soft), torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            ranks.average_gradients(parameter for group in problem.groups for parameter in group["params"])
            optimizer.step()


def _channel_axis(module: nn.Module) -> int:
    layers = [part for part in module.modules() if isinstance(part, QLayer)]
    return 1 - layers[-1].weight.dim() if layers[-1].weight.dim() > 2 else -1


def _mixed(call: Call, drop: Drop | None) -> Call:
    """The call with a share of its input elements from the float model (QDrop)."""
    if drop is None:
        return call

    def mix(value: Any, other: Any) -> Any:
        same = isinstance(value, Tensor) and value.is_floating_point() and value.shape == other.shape
        return drop.mixed(value, other) if same else value

    args = tuple(mix(*pair) for pair in zip(call.args, call.float_args, strict=True))
    return replace(call, args=args, kwargs={key: mix(v, call.float_kwargs[key]) for key, v in call.kwargs.items()})
