"""Harm by the diagonal of the Fisher matrix: one backward pass per sample serves every spec of every site.

``1/2 E sum_i g_i^2 d_i^2`` with the gradient g of one sample's loss and the change d that rounding makes: the second
order of the loss where its gradient is 0 on average, the Hessian replaced by the diagonal of ``E g g^T``. Squaring the
gradient of a batch instead would be wrong by about its size, so samples are taken one by one. Without a loss a class is
drawn from the model's own softmax (true Fisher); changes of neighbouring weights that cancel are not seen to cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from bitwright.errors import SearchError
from bitwright.harm.alone import Activations, Forward, Weights
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site

Todo = Sequence[tuple[Site, str]]


def harms(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    todo: Todo,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    forward: Forward,
) -> Iterator[tuple[Site, str, Tensor]]:
    """One value per batch for each site and spec; ``loss`` is the mean over items, called with batches of one."""
    held = Activations(model, plan, todo, batches, forward)
    held.model.requires_grad_(True)
    weights = {site: held.model.get_submodule(site.path).get_parameter(site.slot) for site, _ in todo if site.is_weight}
    squares = {site: torch.zeros(len(batches), *weight.shape) for site, weight in weights.items()}
    hidden = {key: torch.zeros(len(batches), dtype=torch.float64) for key in held.quantizers}
    generator = torch.Generator().manual_seed(0)
    for index, batch in enumerate(batches):
        items = samples_of(batch)
        for item in items:
            seen = _backward(held, item, lambda m, x: _loss(m, x, loss, forward, generator))
            for site, weight in weights.items():
                if weight.grad is not None:
                    squares[site][index] += weight.grad.square() / len(items)
            for (site, text), quantizer in held.quantizers.items():
                for x, gradient in seen.get(site, ()):
                    change = quantizer.simulate(x) - x
                    hidden[site, text][index] += 0.5 * (gradient * change).square().sum().item() / len(items)
    rounded = Weights(model, plan, batches, forward)
    for site, text in todo:
        if site.is_weight:
            change = rounded.change(site, text)
            yield site, text, 0.5 * (squares[site].double() * change.double().square()).flatten(1).sum(1)
        else:
            yield site, text, hidden[site, text]


def samples_of(batch: Any) -> list[Any]:
    """A batch as batches of one item: every tensor is cut along its first axis.

    >>> samples_of((torch.zeros(2, 3), torch.tensor([5, 6])))[1]
    (tensor([[0., 0., 0.]]), tensor([6]))
    """
    cut = [
        tree_map(lambda x, i=i: x[i : i + 1] if isinstance(x, Tensor) and x.dim() else x, batch)
        for i in range(items_of(batch))
    ]
    return cut


def items_of(batch: Any) -> int:
    """Number of items of a batch; raises `SearchError` where its tensors disagree on it.

    >>> items_of((torch.zeros(2, 3), torch.tensor([5, 6])))
    2
    """
    sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        raise SearchError(f"tensors of a batch must have one first axis, its items; found lengths {sorted(sizes)}")
    return sizes.pop()


def _backward(
    held: Activations, item: Any, loss: Callable[[nn.Module, Any], Tensor]
) -> dict[Site, list[tuple[Tensor, Tensor]]]:
    """Gradients of one item; returns the activations with the gradients at their modules."""
    held.model.zero_grad()
    with torch.enable_grad(), held.shifted() as seen:
        loss(held.model, item).backward()
    return {
        site: [(x.detach(), offset.grad) for x, offset in pairs if offset.grad is not None]
        for site, pairs in seen.items()
    }


def _loss(
    model: nn.Module,
    item: Any,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    forward: Forward,
    generator: torch.Generator,
) -> Tensor:
    if loss is not None:
        return loss(model, item)
    logits = [x for x in tree_leaves(forward(model, item)) if isinstance(x, Tensor) and x.is_floating_point()]
    total = torch.zeros(())
    for rows in (x.flatten(0, -2) for x in logits):
        drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
        total = total + F.cross_entropy(rows, drawn)
    return total
