"""Measured harm: each candidate runs on all batches, and what it returns is compared with what the float model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from bitwright.costs.choices import sharing
from bitwright.graph.dataflow import evaluating
from bitwright.harm.alone import Activations, Forward, Weights
from bitwright.harm.prefix import Prefix, See
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site

Loss = Callable[[nn.Module, Any], Tensor]
Rows = Sequence[tuple[Site, str]]
Changing = Callable[[Site, str], AbstractContextManager[nn.Module]]


def harms(
    method: str,
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    todo: Rows,
    loss: Loss | None,
    forward: Forward,
) -> Iterator[tuple[Site, str, Tensor]]:
    """One value per batch for each site and spec, by method ``kl``, ``loss`` or ``sqnr``."""
    see, compare = seeing(method, loss, forward), comparing(method)
    weights = [(site, text) for site, text in todo if site.is_weight]
    hidden = [(site, text) for site, text in todo if not site.is_weight]
    with torch.no_grad():
        base = [see(model, batch) for batch in batches]
        rounded = Weights(model, plan, batches, forward)
        alone: list[tuple[Rows, nn.Module, Changing]] = [
            (weights, model, lambda *row: nullcontext(rounded.alone(*row)))
        ]
        if hidden:
            seen = Activations(model, plan, hidden, batches, forward)
            alone.append((hidden, seen.model, seen.alone))
        for rows, unchanged, changing in alone:
            prefix = Prefix(unchanged, batches, see)
            for site, texts in groupby(rows, itemgetter(0)):
                prefix.reach([other.path for other in sharing(plan, site)])
                for _, text in texts:
                    with changing(site, text) as changed, evaluating(changed):
                        outputs = prefix.seen(changed)
                        values = [compare(*pair) for pair in zip(base, outputs, strict=True)]
                    yield site, text, torch.tensor(values, dtype=torch.float64)


def seeing(method: str, loss: Loss | None, forward: Forward) -> See:
    """What a method looks at: the loss, or the outputs, in float64."""
    if method == "loss" and loss is not None:
        return lambda model, batch: [loss(model, batch).detach().double()]

    def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
        leaves = tree_leaves(forward(model, batch))
        return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    return outputs


def comparing(method: str) -> Callable[[list[Tensor], list[Tensor]], float]:
    """The harm on one batch from what is seen of the float model and of the changed one."""
    return {"loss": _rise, "sqnr": _noise, "kl": _divergence}[method]


def _rise(before: list[Tensor], after: list[Tensor]) -> float:
    return (after[0] - before[0]).item()


def _noise(before: list[Tensor], after: list[Tensor]) -> float:
    noise = sum((a - b).square().sum().item() for a, b in zip(before, after, strict=True))
    return noise / max(sum(b.square().sum().item() for b in before), 1e-300)


def _divergence(before: list[Tensor], after: list[Tensor]) -> float:
    """Mean over items (all axes but the last) of KL of the softmaxes, summed over outputs."""
    total = 0.0
    for old, new in zip(before, after, strict=True):
        p, q = (F.log_softmax(x.flatten(0, -2), -1) for x in (old, new))
        total += F.kl_div(q, p, reduction="batchmean", log_target=True).item()
    return total
