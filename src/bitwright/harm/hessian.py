"""Curvature of the loss at the trained weights, layer by layer: top eigenvalues and traces of the Hessian.

======================= ==================== =====================================================================
top eigenvalue          HAWQ, 1905.03696     power iteration: the largest by magnitude, its sign kept
trace                   HAWQ-V2, 1911.03852  Hutchinson: ``tr H = E v' H v`` for random signs v; the part of a layer
                                             is ``E v_l' (H v)_l``, as the signs of other layers average out
======================= ==================== =====================================================================

The model is in eval mode and left as it was; the loss is the mean over all items of all batches. Without a loss it is
the KL divergence from the model's own answers. See `hessian_products` for how H is multiplied, `hessian_draws` for how
the noise of a trace is kept small.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import SearchError
from bitwright.graph.dataflow import call
from bitwright.harm.alone import Forward
from bitwright.harm.hessian_draws import FEWEST, MOST, PRECISION, check_finite, estimates, shares_of
from bitwright.harm.hessian_products import (
    Loss,
    Run,
    Vectors,
    differentiable_twice,
    gradients,
    own_answers,
    products,
)


@dataclass(frozen=True, slots=True)
class Eigenvalue:
    """The eigenvalue of largest magnitude, as power iteration left it.

    ``residual`` is ``|H v - value v|``: some eigenvalue lies within that distance of ``value``.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """Mean of ``draws`` estimates of a trace, its standard error, and the number of ``elements`` on the diagonal."""

    value: float
    error: float
    draws: int
    elements: int

    @property
    def average(self) -> float:
        """Mean of the diagonal, by which HAWQ-V2 orders layers."""
        return self.value / self.elements


@dataclass(frozen=True, slots=True)
class Traces:
    """Traces of the blocks of single weights, by name, and of all of them together, from the same probes."""

    layers: dict[str, Trace]
    whole: Trace


def top_eigenvalues(
    model: nn.Module,
    batches: Sequence[Any],
    weights: Sequence[str] = (),
    *,
    whole: bool = False,
    loss: Loss | None = None,
    forward: Forward | None = None,
    tolerance: float = 1e-3,
    most: int = 100,
    seed: int = 0,
) -> dict[str, Eigenvalue]:
    """Top eigenvalue of the Hessian of each weight alone or, under ``""``, of all together (``whole``).

    Power iteration stops when ``v' H v`` changes by less than ``tolerance`` of itself, or after ``most`` products. As a
    mixture of vectors can stand still by chance too, the residual must be below ``sqrt(tolerance)`` of ``|H v|``: the
    error of the value goes with its square. Arguments and errors are otherwise those of `traces`.

    >>> model, x = nn.Linear(3, 1, bias=False), torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    >>> found = top_eigenvalues(model, [x], loss=lambda m, x: m(x).square().mean())   # H = 2/3 diag(1, 4, 16)
    >>> round(found["weight"].value, 2), found["weight"].converged
    (10.67, True)
    """
    batches, named = list(batches), _chosen(model, weights)
    run, measure = _run(model, named), loss or own_answers(forward or call)
    blocks = {"": list(named)} if whole else {name: [name] for name in named}
    generator = torch.Generator().manual_seed(seed)
    vectors = {name: torch.randn(w.shape, generator=generator).to(w) for name, w in named.items()}
    found: dict[str, Eigenvalue] = {}
    with differentiable_twice(model, named.values()):
        for iteration in range(1, most + 1):
            active = {key: block for key, block in blocks.items() if key not in found or not found[key].converged}
            for block in active.values():
                norm = _norm(vectors, block)
                vectors |= {name: vectors[name] / norm for name in block}
            after = _block_products(run, measure, batches, vectors, active)
            for key, block in active.items():
                last = found[key].value if key in found else math.inf
                found[key] = _eigenvalue(vectors, after, block, last, iteration, tolerance)
                if not found[key].converged:
                    vectors |= {name: after[name].to(vectors[name]) for name in block}
            if all(value.converged for value in found.values()):
                break
    return found


def traces(
    model: nn.Module,
    batches: Sequence[Any],
    weights: Sequence[str] = (),
    *,
    loss: Loss | None = None,
    forward: Forward | None = None,
    precision: float = PRECISION,
    fewest: int = FEWEST,
    most: int = MOST,
    seed: int = 0,
) -> Traces:
    """Trace of the Hessian of each weight, all from the same probes, with standard errors over draws.

    ``weights`` are names of parameters or patterns, by default all with two axes or more. ``loss(model, batch)`` is the
    mean over the items of a batch, ``forward(model, batch)`` gives outputs; without a loss it is `own_answers` of them,
    with both they take away noise. Draws go on, ``fewest`` at a time and at most ``most``, until each standard error is
    below ``precision`` of its trace (of 1 % of all traces where one is smaller than that). A draw has other signs for
    each batch, so that batches average out noise too.

    Raises `SearchError` for a loss that is not finite or does not depend on a weight, for an operation without a second
    derivative (named), for a pattern that matches nothing, for weights in 16 bits, and for fewer than 2 draws.

    >>> model, x = nn.Linear(3, 1, bias=False), torch.eye(3)
    >>> found = traces(model, [x], loss=lambda m, x: m(x).square().mean())   # H = 2/3 of the identity
    >>> round(found.layers["weight"].value, 4), found.whole.elements
    (2.0, 3)
    """
    batches, named = list(batches), _chosen(model, weights)
    forward = call if loss is None and forward is None else forward
    stop: dict[str, Any] = {"precision": precision, "fewest": fewest, "most": most}
    with differentiable_twice(model, named.values()):
        dots = estimates(_run(model, named), batches, loss, forward, seed=seed, **stop)
    _all_reached(named, dots)
    shares = shares_of(batches)
    totals = {name: shares @ dots[name] for name in named}
    layers = {name: _trace(totals[name], weight.numel()) for name, weight in named.items()}
    everything = torch.stack(list(totals.values())).sum(0)
    return Traces(layers, _trace(everything, sum(trace.elements for trace in layers.values())))


def _trace(draws: Tensor, elements: int) -> Trace:
    return Trace(draws.mean().item(), draws.std().item() / math.sqrt(len(draws)), len(draws), elements)


def _block_products(
    run: Run, loss: Loss, batches: Sequence[Any], vectors: Vectors, blocks: Mapping[str, list[str]]
) -> Vectors:
    """``H v`` with the Hessian of each block alone, summed over batches in float64."""
    found: Vectors = {}
    for share, batch in zip(shares_of(batches).tolist(), batches, strict=True):
        variables, gradient = gradients(run, loss, batch)
        for block in blocks.values():
            part = {name: variables[name] for name in block if name in variables}
            for name, product in products(part, gradient, vectors).items():
                found[name] = found.get(name, 0.0) + share * product
    _all_reached([name for block in blocks.values() for name in block], found)
    for name, product in found.items():
        check_finite(name, product)
    return found


def _eigenvalue(
    vectors: Vectors, after: Vectors, block: list[str], last: float, iteration: int, tolerance: float
) -> Eigenvalue:
    value = sum((vectors[name] * after[name]).sum().item() for name in block)
    residual = _norm({name: after[name] - value * vectors[name] for name in block}, block)
    length = _norm(after, block)
    settled = abs(value - last) <= tolerance * abs(value) and residual <= math.sqrt(tolerance) * length
    return Eigenvalue(value, residual, iteration, settled or length == 0.0)


def _norm(vectors: Vectors, block: list[str]) -> float:
    return math.sqrt(sum(vectors[name].double().square().sum().item() for name in block))


def _run(model: nn.Module, named: Vectors) -> Run:
    return lambda loss, batch: (loss(model, batch), named)


def _chosen(model: nn.Module, weights: Sequence[str]) -> dict[str, Tensor]:
    every: dict[str, Tensor] = dict(model.named_parameters())
    found = {} if weights else {name: weight for name, weight in every.items() if weight.dim() > 1}
    for pattern in weights:
        some = {name: weight for name, weight in every.items() if name == pattern or fnmatchcase(name, pattern)}
        if not some:
            near = ", ".join(difflib.get_close_matches(pattern, every, n=3, cutoff=0.3)) or "none"
            raise SearchError(f"{pattern!r} matches none of the {len(every)} parameters; near names: {near}")
        found |= some
    if not found:
        raise SearchError("the model has no parameter with two axes or more; name the ones that are meant")
    for name, weight in found.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise SearchError(f"{name} is {weight.dtype}; second derivatives need float32: call model.float() first")
    return found


def _all_reached(names: Iterable[str], reached: Mapping[str, Tensor]) -> None:
    for name in names:
        if name not in reached:
            raise SearchError(f"the loss does not depend on {name} on any batch; leave it out, or look at the data")
