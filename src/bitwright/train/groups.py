"""What training moves: the prepared part of a model, its learned ranges, its optimizer groups, its layers' weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitwright.errors import ModelError, TrainingError
from bitwright.flow.prepare import plan_of
from bitwright.nn.layer import Simulated
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.plan.plan import Plan


def prepared_part(model: nn.Module) -> nn.Module:
    """The module that `prepare` made, out of whatever wraps it (data parallel, compiled, a Lightning module).

    Raises `ModelError` where there is none, or more than one.

    >>> from bitwright.flow.prepare import prepare
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prepared = prepare(net, Plan.preset("w8a8", net, torch.zeros(1, 8)))
    >>> prepared_part(nn.Sequential(prepared)) is prepared
    True
    """
    found = [module for module in model.modules() if isinstance(vars(module).get("bitwright_plan"), Plan)]
    if len(found) > 1:
        raise ModelError(f"{type(model).__name__} holds {len(found)} prepared models; train them one at a time")
    if not found:
        plan_of(model)
    return found[0]


def param_groups(model: nn.Module, weight_decay: float = 1e-4) -> list[dict[str, object]]:
    """Three optimizer groups: weights (with decay), biases and norms (without), quantizer ranges (without).

    Ranges are listed although they train only in the joint phase; those of rule ``pact``, which asks for decay, are in
    the first group. Parameters that you froze yourself are left out.
    """
    model = prepared_part(model)
    ranges = ranges_of(model)
    taken = {id(parameter) for parameter in ranges}
    decaying = {id(q.scale) for q in quantizers_of(model) if q.rule.decays}
    trainable = trainable_names(model)
    own = [p for name, p in model.named_parameters() if name in trainable and id(p) not in taken]
    return [
        {
            "params": [p for p in own if p.dim() > 1] + [p for p in ranges if id(p) in decaying],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in own if p.dim() <= 1], "weight_decay": 0.0},
        {"params": [p for p in ranges if id(p) not in decaying], "weight_decay": 0.0},
    ]


def quantizers_of(model: nn.Module) -> Iterator[Quantizer]:
    """Every quantizer once."""
    return (module for module in model.modules() if isinstance(module, Quantizer))


def scales_of(model: nn.Module) -> list[nn.Parameter]:
    """Every learnable scale once; float formats have none, codebooks and fixed ranges keep theirs."""
    found = [q.scale for q in quantizers_of(model) if q.scale is not None and _learns(q)]
    return list(dict.fromkeys(found))


def ranges_of(model: nn.Module) -> list[nn.Parameter]:
    """Every learnable scale, then every learnable offset, once."""
    offsets = [q.offset for q in quantizers_of(model) if q.offset is not None and _learns(q)]
    return scales_of(model) + list(dict.fromkeys(offsets))


def _learns(quantizer: Quantizer) -> bool:
    return quantizer.rule.learns and quantizer.spec.format.is_integer


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that were trainable when training was set up: what the user froze stays frozen."""
    names = getattr(model, "bitwright_trainable", None)
    if names is None:
        names = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        model.bitwright_trainable = names  # type: ignore[assignment]
    return names


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, Simulated, str, Tensor, Quantizer]]:
    """``(path, layer, slot, weight, quantizer)`` of every quantized weight; the weight as it is encoded, `[o, ...]`."""
    for path, layer in model.named_modules():
        if isinstance(layer, Simulated):
            for slot, weight in layer.quantized_weights().items():
                quantizer = layer.quantizer(slot)
                if quantizer is not None:
                    yield path, layer, slot, weight, quantizer


@torch.no_grad()
def weight_errors(model: nn.Module) -> dict[str, float]:
    """``{path: |Q(W) - W|^2 / |W|^2}`` for every layer with a quantized weight (several weights: their sum)."""
    errors: dict[str, float] = {}
    with unsharded(model):
        for path, _, _, weight, quantizer in quantized_weights(model):
            noise = (quantizer.simulate(weight) - weight).square().sum()
            errors[path] = errors.get(path, 0.0) + (noise / weight.square().sum().clamp(min=1e-30)).item()
    return errors


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole parameters instead of shards, for code that reads them outside a forward."""
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()  # type: ignore[operator]


def check_ready(model: nn.Module) -> None:
    """Raise `TrainingError` unless every quantizer of a prepared model simulates."""
    plan_of(model)
    if not any(isinstance(module, Simulated) for module in model.modules()):
        raise TrainingError("this model has no simulated layers: it was converted already; train the prepared model")
    waiting = [q.site for q in quantizers_of(model) if q.stage is not Stage.SIMULATE]
    if waiting:
        raise TrainingError(f"{waiting[0]} has no scale yet; call bitwright.calibrate before training")


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, ranges: bool) -> None:
    """Raise `TrainingError` for an optimizer of another model, or (with ``ranges``) one without the learned ranges."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    rebuild = "build it after prepare, from bitwright.param_groups(model) or schedule.optimizer(model)"
    names = trainable_names(model)
    own = [id(parameter) for name, parameter in model.named_parameters() if name in names]
    if own and not held.intersection(own):
        raise TrainingError(f"the optimizer holds none of this model's parameters; {rebuild}")
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    missing = [known[id(parameter)] for parameter in ranges_of(model) if id(parameter) not in held]
    if ranges and missing:
        raise TrainingError(
            f"the optimizer lacks {len(missing)} learned ranges, {missing[0]} first; {rebuild}, "
            "or give the joint phase no share to keep the ranges fixed"
        )
