"""Cross-layer equalization (Nagel 2019, section 4.1) and high-bias absorption (section 4.2), before ranges are chosen.

One scale for a whole weight serves its largest channel and starves the others. Behind a ReLU a channel may be divided
by s > 0 in the layer that makes it and multiplied by s in the layer that reads it: the network computes the same. With
``s = sqrt(r1 / r2)`` both layers have the range ``sqrt(r1 r2)`` in that channel. Ranges are those of the weights as
they are encoded, batch norm folded in; a factor on such a row goes into the norm's gamma and beta.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.algorithms.lockstep import Forward, computing_in_float
from bitwright.algorithms.outcome import Outcome
from bitwright.graph.dataflow import evaluating, record
from bitwright.graph.paths import Path, homogeneous_pairs
from bitwright.nn.layer import QLayer
from bitwright.observe import ranks
from bitwright.plan.step import Value

SWEEPS, CLOSE = 50, 1e-3
_DEAD = 1e-8  # channels that small beside the largest one are left alone
_UNCHANGED = 1e-3  # of the largest output: rounding in float32 stays far below, a wrong factor does not
_PASS_A_CONSTANT = (
    *"identity relu leaky_relu prelu dropout contiguous clone detach float to type_as mean amax".split(),
    *"flatten view reshape squeeze unsqueeze max_pool adaptive_".split(),
)


@torch.no_grad()
def equalize(model: nn.Module, batches: Sequence[Any], forward: Forward, options: Mapping[str, Value]) -> list[Outcome]:
    """Equalize all pairs of layers of a prepared model, until no factor differs from 1 by more than 1e-3.

    What the model computes in float is compared on the first and the last batch (of each rank); where it is not what it
    was, all weights are put back and every pair is reported as skipped.
    """
    with computing_in_float(model), evaluating(model):
        joints, found = _joints(model, batches[0], forward)
        before, probes = _saved(joints), (batches[0], batches[-1])
        expected = [_outputs(model, batch, forward) for batch in probes]
        _scale(joints)
        own = [_change(a, _outputs(model, batch, forward)) for a, batch in zip(expected, probes, strict=True)]
        changes = [change for part in ranks.gathered(own) for change in part]
        if not all(change < _UNCHANGED for change in changes):
            for tensor, value in before:
                tensor.copy_(value)
            reason = f"the model would compute something else: its outputs changed by {max(changes):.1g} of the largest"
            return found + [Outcome("cle", joint.path.second, skipped=reason) for joint in joints]
    return found + [Outcome("cle", joint.path.second, note=f"with {joint.path.first}") for joint in joints]


@torch.no_grad()
def absorb_high_bias(
    model: nn.Module, batches: Sequence[Any], forward: Forward, options: Mapping[str, Value]
) -> list[Outcome]:
    """Move ``c = max(0, beta - 3 gamma)`` of a channel from one bias through the ReLU into the next: ``b2 += W2 c``.

    Exact where the channel exceeds c: all but 0.13 % of a normal one. Zero padding between the layers does not know of
    c, so such pairs are refused unless ``borders`` is set; then outputs at the borders change.
    """
    with computing_in_float(model), evaluating(model):
        joints, found = _joints(model, batches[0], forward)
        for joint in joints:
            reason = joint.why_not_absorbed(borders=bool(options["borders"]))
            share = 0.0 if reason else joint.absorb()
            note = "" if reason else f"{100 * share:.0f} % of the channels of {joint.path.first}"
            found.append(Outcome("absorb_high_bias", joint.path.second, skipped=reason, note=note))
    return [replace(outcome, step="absorb_high_bias") for outcome in found]


def _scale(joints: Sequence[_Joint]) -> None:
    """Balance pair after pair until all are balanced, on magnitudes; weights are touched once, by the product.

    In a long chain what is left after `SWEEPS` rounds is a factor common to all channels, which changes no code.
    """
    layers = {id(end): end for joint in joints for end in (joint.first, joint.second)}
    magnitudes = {key: layer.folded()[0].abs() for key, layer in layers.items()}
    silent = [joint.silent() for joint in joints]
    totals = [torch.ones(len(mask), dtype=torch.float64, device=mask.device) for mask in silent]
    for _ in range(SWEEPS):
        largest = 0.0
        for joint, mask, total in zip(joints, silent, totals, strict=True):
            first, second = id(joint.first), id(joint.second)
            factor = joint.factor(magnitudes[first], magnitudes[second], mask)
            total.mul_(factor)
            magnitudes[first] /= factor.view(-1, *[1] * (magnitudes[first].dim() - 1))
            magnitudes[second] = joint.multiplied(magnitudes[second], factor.float())
            largest = max(largest, (factor - 1).abs().max().item())
        if largest < CLOSE:
            break
    for joint, total in zip(joints, totals, strict=True):
        joint.apply(total)


@dataclass(frozen=True, slots=True)
class _Joint:
    """Two simulated layers and how the first one's channels reach the second."""

    first: QLayer
    second: QLayer
    path: Path

    def columns(self, weight: Tensor) -> Tensor:
        """Rows ``[o, i / groups, ...]`` by channels of the first layer: ``[groups, o / groups, c / groups, k]``."""
        groups = getattr(self.second, "groups", 1)
        channels = len(self.first.as_rows(self.first.weight))
        return weight.reshape(groups, len(weight) // groups, channels // groups, -1)

    def factor(self, first: Tensor, second: Tensor, silent: Tensor) -> Tensor:
        """What to divide the first layer's channels by, float64, from the magnitudes of both weights as encoded.

        Channels without weights on one side only must not have the largest weights on the other: those that nobody
        reads in the first layer, those of ``silent`` ones (0 whatever comes in) in the second. Others keep theirs.
        """
        rows, columns = first.flatten(1).amax(1).double(), self.columns(second).amax((1, 3)).flatten().double()
        no_rows, no_columns = (side <= _DEAD * side.max() for side in (rows, columns))
        alive = ~(no_rows | no_columns)
        factor = torch.where(alive, (rows / columns).sqrt(), 1.0)
        if not alive.any():
            return factor
        common = (rows * columns).sqrt()[alive].max()
        factor = torch.where(silent & no_rows, (common / columns).clamp(max=1.0), factor)
        return torch.where(no_columns & ~no_rows, (rows / common).clamp(min=1.0), factor)

    def silent(self) -> Tensor:
        """Channels of the first layer without weights, whose bias a ReLU makes 0."""
        weight, bias = self.first.folded()
        rows = weight.abs().flatten(1).amax(1)
        negative = torch.zeros_like(rows, dtype=torch.bool) if bias is None else bias <= 0
        return negative & (rows <= _DEAD * rows.max()) & ("relu" in self.path.between)

    def apply(self, factor: Tensor) -> None:
        """Divide the channels of the first layer, multiply them in the second."""
        layer = self.first
        if layer.norm:
            divided = [layer.norm[0].weight, layer.norm[0].bias]
        else:
            weight = layer.as_rows(layer.weight)
            weight = weight / factor.view(-1, *[1] * (weight.dim() - 1))
            layer.weight.copy_(layer.from_rows(weight))
            divided = [layer.bias]
        for tensor in divided:
            if tensor is not None:
                tensor.copy_(tensor / factor)
        weight = self.second.as_rows(self.second.weight)
        self.second.weight.copy_(self.second.from_rows(self.multiplied(weight, factor)))

    def multiplied(self, weight: Tensor, factor: Tensor) -> Tensor:
        """``weight``, rows of the second layer, with each channel of the first multiplied."""
        columns = self.columns(weight)
        return (columns * factor.view(len(columns), 1, -1, 1)).reshape(weight.shape)

    def why_not_absorbed(self, *, borders: bool) -> str:
        """Why a constant cannot go from the first layer's bias into the second's; empty if it can."""
        norm, second = (self.first.norm[0] if self.first.norm else None), self.second
        if norm is None:
            return f"{self.path.first} has no batch norm that tells how its outputs are distributed"
        if not second.norm and second.bias is None:
            return "it has no bias"
        other = [name for name in self.path.between if not name.startswith(_PASS_A_CONSTANT)]
        if other != ["pad"] * len(other):
            return f"{other[0]} lies between, which does not pass a constant on"
        padded = "pad" in other or (any(_padding(second)) and getattr(second, "padding_mode", "zeros") == "zeros")
        return "zero padding lies between" if padded and not borders else ""

    def absorb(self) -> float:
        """Move the constants; the share of channels that have one."""
        norm = self.first.norm[0]
        constant = (norm.bias.double() - 3 * norm.weight.double().abs()).clamp(min=0.0)
        columns = self.columns(self.second.as_rows(self.second.weight).double())
        shift = (columns * constant.view(columns.shape[0], 1, -1, 1)).sum((2, 3)).flatten()
        norm.bias.sub_(constant.to(norm.bias.dtype))
        if self.second.norm:
            mean = self.second.norm[0].running_mean
            assert mean is not None
            mean.sub_(shift.to(mean.dtype))
        elif self.second.bias is not None:
            self.second.bias.add_(shift.to(self.second.bias.dtype))
        return (constant > 0).double().mean().item()


def _padding(layer: nn.Module) -> tuple[int, ...]:
    padding = getattr(layer, "padding", ())
    return (1,) if padding == "same" else () if padding == "valid" else tuple(padding)


def _joints(model: nn.Module, batch: Any, forward: Forward) -> tuple[list[_Joint], list[Outcome]]:
    """The pairs that a method can work on, and the outcome of all other layers."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    joints, found = [], []
    for path in homogeneous_pairs(ranks.first(record(model, batch, forward)), model):
        first, second = model.get_submodule(path.first), model.get_submodule(path.second)
        if reason := path.reason or _why_not(path.first, first, holders) or _why_not(path.second, second, holders):
            found.append(Outcome("cle", path.second, skipped=reason))
            continue
        assert isinstance(first, QLayer)
        assert isinstance(second, QLayer)
        if first.norm and (first.norm[0].weight is None or first.norm[0].bias is None):
            reason = f"the batch norm of {path.first} has no gamma and beta"
            found.append(Outcome("cle", path.second, skipped=reason))
        else:
            joints.append(_Joint(first, second, path))
    return joints, found


def _why_not(path: str, layer: nn.Module, holders: Counter[int]) -> str:
    if not isinstance(layer, QLayer) or layer.weight_quantizer is None:
        return f"the weight of {path} stays float"
    shared = any(holders[id(parameter)] > 1 for parameter in layer.own_parameters())
    return f"{path} shares a parameter with another module" if shared else ""


def _saved(joints: Sequence[_Joint]) -> list[tuple[Tensor, Tensor]]:
    layers = {id(end): end for joint in joints for end in (joint.first, joint.second)}
    return [(tensor, tensor.clone()) for layer in layers.values() for tensor in layer.own_parameters()]


def _outputs(model: nn.Module, batch: Any, forward: Forward) -> list[Tensor]:
    return list(_floats(forward(model, batch)))


def _floats(out: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    changes = [
        ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(before, after, strict=True)
        if a.numel()
    ]
    return max(changes, default=0.0)
