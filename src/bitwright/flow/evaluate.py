"""Score models, compare them item by item, and compare two models layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import NumericsError
from bitwright.graph.dataflow import call, evaluating

Metric = Callable[[Any, Any], Tensor]


def top1(output: Tensor, target: Tensor) -> Tensor:
    """1.0 where the largest logit of ``output [n, classes]`` is the class ``target [n]``, else 0.0.

    >>> top1(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).tolist()
    [1.0, 0.0]
    """
    return (output.argmax(-1) == target).float()


def item_scores(model: nn.Module, batches: Iterable[tuple[Any, Any]], metric: Metric = top1) -> Tensor:
    """One score per item, ``[items]``, from batches of (inputs, target); eval mode, no gradients."""
    with torch.no_grad(), evaluating(model):
        scores = [metric(call(model, inputs), target) for inputs, target in batches]
    if not scores:
        raise NumericsError("evaluation got no batches; a score of nothing does not exist")
    return torch.cat([score.reshape(-1) for score in scores])


def evaluate(model: nn.Module, batches: Iterable[tuple[Any, Any]], metric: Metric = top1) -> float:
    """Mean of ``metric(output, target)`` over all items of all (inputs, target) batches."""
    return item_scores(model, batches, metric).mean().item()


@dataclass(frozen=True, slots=True)
class Drop:
    """Score lost, ``mean(before - after)`` over ``items`` paired items, with its 95 % interval ``[low, high]``."""

    drop: float
    low: float
    high: float
    items: int

    def __str__(self) -> str:
        return f"{self.drop:+.4f} [{self.low:+.4f}, {self.high:+.4f}] on {self.items} items"


def paired_drop(before: Tensor, after: Tensor, *, resamples: int = 10_000, seed: int = 0) -> Drop:
    """The score lost between two models on the same items, by bootstrap over items (percentile interval).

    For right-or-wrong scores this is ``(b - c) / n``, with b and c the items that only the first or only the second
    model gets right. Raises `NumericsError` when the lengths differ.

    >>> paired_drop(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])).drop
    0.25
    """
    if before.shape != after.shape or not len(before):
        raise NumericsError(f"paired scores need the same items, found {len(before)} and {len(after)}")
    losses = before.double() - after.double()
    means = resampled_drops(losses, resamples=resamples, seed=seed)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Drop(losses.mean().item(), low, high, len(before))


def resampled_drops(losses: Tensor, *, resamples: int = 10_000, seed: int = 0) -> Tensor:
    """Means of bootstrap resamples of the losses ``[n]`` of items: ``[resamples]`` in float64."""
    values, counts = losses.unique(return_counts=True)
    generator = torch.Generator().manual_seed(seed)
    if len(values) <= 64:  # few distinct differences: draw how often each appears
        draws = _multinomial(counts, len(losses), resamples, generator)
        return (draws.double() @ values) / len(losses)
    return torch.stack(
        [losses[torch.randint(len(losses), (len(losses),), generator=generator)].mean() for _ in range(resamples)]
    )


def _multinomial(counts: Tensor, items: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each distinct difference appears in each resample of ``items`` items: one binomial after another."""
    left = torch.full((resamples,), float(items), dtype=torch.float64)
    share_left, columns = 1.0, []
    for share in (counts.double() / items).tolist():
        chance = min(1.0, share / share_left) if share_left > 0 else 1.0
        drawn = torch.binomial(left, torch.full_like(left, chance), generator=generator)
        columns.append(drawn)
        left, share_left = left - drawn, share_left - share
    return torch.stack(columns, 1)


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """How far one module's output differs between two models: largest difference, and signal to noise in dB."""

    path: str
    max_abs: float
    sqnr: float


def compare(model: nn.Module, other: nn.Module, batch: Any, paths: Iterable[str]) -> list[LayerDifference]:
    """Differences of the modules at ``paths`` between two models on one batch; sqnr is infinite where equal.

    Raises `NumericsError` for a path that one of the models does not have, or whose module gave no tensor.
    """
    paths = list(paths)
    left, right = outputs_of(model, batch, paths), outputs_of(other, batch, paths)
    if missing := [path for path in paths if path not in left or path not in right]:
        raise NumericsError(f"{missing[0]} gave no tensor in one of the models; compare modules that both of them run")
    return [difference(path, left[path], right[path]) for path in paths]


def difference(path: str, before: Tensor, after: Tensor) -> LayerDifference:
    """Largest difference and signal-to-noise ratio of two tensors of one shape."""
    error = (before.double() - after.double()).abs()
    noise = error.square().sum().item()
    sqnr = math.inf if noise == 0 else 10 * math.log10(max(before.double().square().sum().item(), 1e-300) / noise)
    return LayerDifference(path, error.max().item() if error.numel() else 0.0, sqnr)


def outputs_of(model: nn.Module, batch: Any, paths: Iterable[str]) -> dict[str, Tensor]:
    """Outputs (of their last call) of the modules at ``paths`` that exist and ran, in one forward in eval mode."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                found[path] = out.detach().clone()

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[path].register_forward_hook(keep(path)) for path in paths if path in modules]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
