"""Harm by HAWQ's Omega: the trace of the Hessian of a site, shared out evenly, times the squared rounding error.

``Omega(b) = 1/2 tr(H) / n ||Q_b(x) - x||^2`` (Dong et al., HAWQ-V2, 1911.03852; the paper leaves out the 1/2, which
makes it the second order of the loss and changes no rank). x is what is quantized: a weight with its batch norm folded
in, n elements, or an activation, all items of a batch. It takes the gradient to be 0 on average and, within one tensor,
the Hessian to be a multiple of the identity: rounding errors that cancel, or that hit the steeper part, are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import SearchError
from bitwright.harm.alone import Activations, Forward, Weights
from bitwright.harm.fisher import Todo
from bitwright.harm.hessian_draws import estimates
from bitwright.harm.hessian_products import Loss, Vectors, differentiable_twice
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site

STOP: dict[str, Any] = {"precision": 0.1, "most": 24}
"""When draws end: batches differ by more than the noise that is left then."""

Key = tuple[Site, int]
"""A site, and which of its tensors in one forward: 0 for a weight, the number of the call for an activation."""


def harms(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    todo: Todo,
    loss: Loss | None,
    forward: Forward,
) -> Iterator[tuple[Site, str, Tensor]]:
    """One value per batch for each site and spec: trace by `estimates`, whose noise is in the spread over batches."""
    rounded = Weights(model, plan, batches, forward)
    factors = {site: rounded.factor(site, text) for site, text in todo if site.is_weight}
    shown = _Shown(Activations(model, plan, todo, batches, forward), list(factors))
    noise = shown.noise(batches, forward)
    scales = {(site, 0): _inverse(factor) for site, factor in factors.items() if factor is not None}
    with differentiable_twice(shown.held.model, shown.weights.values()):
        dots = estimates(shown.weighted, batches, loss, forward, scales=scales, **STOP) if factors else {}
        if shown.hidden:
            dots |= estimates(shown.shifted, batches, loss, forward, **STOP)
    for key in [*shown.weights, *(key for key, _ in noise)]:
        if key not in dots:
            raise SearchError(f"the loss does not depend on {key[0]} on any batch; leave it out, or look at the data")
    for site, text in todo:
        if site.is_weight:
            change, factor = rounded.change(site, text).double(), factors[site]
            change = change if factor is None else change * factor
            yield site, text, 0.5 * dots[site, 0].mean(1) * change.square().mean()
        else:
            parts = [
                dots[key].mean(1) * square for (key, other), square in noise.items() if (key[0], other) == (site, text)
            ]
            yield site, text, 0.5 * torch.stack(parts).sum(0)


def _inverse(factor: Tensor) -> Tensor:
    return torch.where(factor == 0, 0.0, 1 / factor)


class _Shown:
    """A prepared model whose weights and activations are the variables of a Hessian."""

    def __init__(self, held: Activations, weights: Sequence[Site]) -> None:
        self.held, self.hidden = held, list(dict.fromkeys(site for site, _ in held.quantizers))
        self.weights = {(site, 0): held.model.get_submodule(site.path).get_parameter(site.slot) for site in weights}

    def weighted(self, loss: Loss, batch: Any) -> tuple[Tensor, Vectors]:
        """Loss of a batch, and the weights."""
        return loss(self.held.model, batch), dict(self.weights)

    def shifted(self, loss: Loss, batch: Any) -> tuple[Tensor, Vectors]:
        """Loss of a batch, and for each activation a 0 that is added to it on its way into its modules."""
        with self.held.shifted() as seen:
            value = loss(self.held.model, batch)
        return value, {(site, call): pair[1] for site, pairs in seen.items() for call, pair in enumerate(pairs)}

    @torch.no_grad()
    def noise(self, batches: Sequence[Any], forward: Forward) -> dict[tuple[Key, str], Tensor]:
        """Mean squared rounding error of each activation as each of its specs, ``[batches]`` in float64."""
        found: dict[tuple[Key, str], Tensor] = {}
        seen: dict[Site, list[Tensor]] = {}

        def keep(site: Site, x: Tensor) -> None:
            if not any(x is other for other in seen.setdefault(site, [])):
                seen[site].append(x)

        for index, batch in enumerate(batches):
            seen.clear()
            with self.held.at(self.hidden, keep):
                forward(self.held.model, batch)
            for (site, text), quantizer in self.held.quantizers.items():
                for call, x in enumerate(seen.get(site, ())):
                    into = found.setdefault(((site, call), text), torch.zeros(len(batches), dtype=torch.float64))
                    into[index] = (quantizer.simulate(x) - x).double().square().mean()
        return found
