"""Factors per input channel of linear layers: at which points of a model they fold, and the folding itself.

``x / s`` and ``W * s`` have the same product in float, and another after quantization. Every fold point is tried before
it is used: with factors that are powers of two, which no float computation rounds, the model must compute the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.algorithms.lockstep import Forward
from bitwright.graph.dataflow import Dataflow, evaluating, record
from bitwright.graph.foldable import FoldPoint, features, fold_points
from bitwright.nn.layer import QLayer
from bitwright.nn.library import QInOutLinear
from bitwright.observe import ranks

Refused = dict[tuple[str, ...], str]


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of a prepared model, quantized or not, whose parameters nothing else holds."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, QInOutLinear))
        and all(holders[id(parameter)] == 1 for parameter in module.parameters(recurse=False))
        and not (isinstance(module, QLayer) and module.norm)
    }


def find_points(model: nn.Module, batch: Any, forward: Forward) -> tuple[Dataflow, list[FoldPoint], Refused]:
    """The record of one forward, the fold points that hold, and groups of linear layers without one, with reasons."""
    flow, linears = ranks.first(record(model, batch, forward)), linears_of(model)
    points, refused = fold_points(flow, model, linears)
    for point in points:
        if point.source not in linears and not _sole_holder(model, point.source):
            refused[point.consumers] = f"{point.source!r} shares its parameters with another module"
    points = [point for point in points if point.consumers not in refused]
    if not _holds(model, batch, forward, points):
        for point in points:
            if not _holds(model, batch, forward, [point]):
                refused[point.consumers] = f"what {point.source!r} absorbs changes what the model computes"
    return flow, [point for point in points if point.consumers not in refused], refused


def _sole_holder(model: nn.Module, path: str) -> bool:
    own = {id(p) for p in model.get_submodule(path).parameters(recurse=False)}
    return sum(id(p) in own for module in model.modules() for p in module.parameters(recurse=False)) == len(own)


def _holds(model: nn.Module, batch: Any, forward: Forward, points: Sequence[FoldPoint]) -> bool:
    """Whether factors of 1/4 to 4 leave the outputs of the model and of the last layers of fold points as they were.

    They must on every rank.
    """
    sources = {point.source for point in points}
    watched = [path for point in points for path in point.consumers if path not in sources]
    generator = torch.Generator().manual_seed(0)
    before = outputs_of(model, batch, forward, watched)
    with restored(model, [path for point in points for path in (point.source, *point.consumers)]):
        for point in points:
            factors = torch.randint(-2, 3, (width_of(model, point),), generator=generator)
            fold(model, point, torch.exp2(factors.float()))
        after = outputs_of(model, batch, forward, watched)
    same = len(before) == len(after) and all(close(a, b) for a, b in zip(after, before, strict=True))
    return all(ranks.gathered(same))


def close(found: Tensor, wanted: Tensor, within: float = 1e-5) -> bool:
    """Whether two tensors agree up to ``within`` of the largest finite magnitude."""
    if found.shape != wanted.shape or not wanted.numel():
        return found.shape == wanted.shape
    most = wanted[wanted.isfinite()].abs().amax() if wanted.isfinite().any() else wanted.new_zeros(())
    return torch.allclose(found, wanted, rtol=0.0, atol=within * most.item(), equal_nan=True)


def outputs_of(model: nn.Module, batch: Any, forward: Forward, watched: Sequence[str] = ()) -> list[Tensor]:
    """What the modules at ``watched`` and the model make of a batch, in eval mode: all tensors of floats."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: object, out: Tensor) -> None:
        seen.append(out)

    hooks = [model.get_submodule(path).register_forward_hook(see) for path in watched]
    try:
        with torch.no_grad(), evaluating(model):
            out = forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [*seen, *(t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())]


@contextmanager
def restored(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """The parameters of the modules at ``paths`` are afterwards what they were before."""
    held = [p for path in dict.fromkeys(paths) for p in model.get_submodule(path).parameters(recurse=False)]
    kept = [p.detach().clone() for p in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(held, kept, strict=True):
                parameter.copy_(value)


def width_of(model: nn.Module, point: FoldPoint) -> int:
    """How many channels the source of a fold point makes."""
    source = model.get_submodule(point.source)
    return features(source)[0] if isinstance(source, (nn.Linear, QInOutLinear)) else len(source.get_parameter("weight"))


@torch.no_grad()
def fold(model: nn.Module, point: FoldPoint, scale: Tensor) -> None:
    """Divide what the source makes by ``scale [c]`` and multiply the columns of its consumers, in place."""
    source, scale = model.get_submodule(point.source), scale.double()
    if isinstance(source, (nn.Linear, QInOutLinear)):
        store_rows(source, rows_of_weight(source).double() / scale.unsqueeze(1))
    else:
        source.get_parameter("weight").div_(scale)
    if getattr(source, "bias", None) is not None:
        source.get_parameter("bias").div_(scale)
    for path in point.consumers:
        layer = model.get_submodule(path)
        store_rows(layer, rows_of_weight(layer).double() * scale[point.channels(len(scale))])


def rows_of_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer ``[o, k]``, detached."""
    weight = layer.get_parameter("weight").detach()
    return layer.as_rows(weight) if isinstance(layer, QLayer) else weight


@torch.no_grad()
def store_rows(layer: nn.Module, rows: Tensor) -> None:
    """Store ``rows [o, k]`` as the weight of a linear layer."""
    layer.get_parameter("weight").copy_(layer.from_rows(rows) if isinstance(layer, QLayer) else rows)
