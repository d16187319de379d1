"""Functional calls that a plan can address, as modules: `Add`, `MatMul`, `Cat` and `Attention`.

Where a module's own forward can be traced such calls get their names by `graph.rewrite`; elsewhere write these modules.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Add(nn.Module):
    """``a + b`` as a module: a residual add that can be named in a plan.

    >>> Add()(torch.ones(2), torch.ones(2)).tolist()
    [2.0, 2.0]
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of two tensors of one shape."""
        return a + b


class MatMul(nn.Module):
    """``a @ b`` of two activations as a module.

    >>> MatMul()(torch.ones(1, 2), torch.ones(2, 1)).tolist()
    [[2.0]]
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``[..., m, k] x [..., k, n] -> [..., m, n]``."""
        return a @ b


class Cat(nn.Module):
    """`torch.cat` as a module; where it is quantized all its tensors have one scale.

    >>> Cat()([torch.zeros(1), torch.ones(1)]).tolist()
    [0.0, 1.0]
    """

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The tensors joined along ``dim``."""
        return torch.cat(list(tensors), dim)


class Attention(nn.Module):
    """`torch.nn.functional.scaled_dot_product_attention` as a module: two products with a softmax between them.

    >>> Attention()(torch.ones(1, 3, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 5)).shape
    torch.Size([1, 3, 5])
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        need_weights: bool = False,
    ) -> Any:
        """``[..., l, d], [..., s, d], [..., s, e] -> [..., l, e]``, with ``need_weights`` also ``[..., l, s]``.

        A boolean mask is True where a query may look; a float mask is added to the scores. ``dropout_p`` applies
        whatever the mode, as in torch.
        """
        if need_weights:
            return attend(
                torch.matmul, torch.matmul, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


Product = Callable[[Tensor, Tensor], Tensor]


def attend(
    score: Product,
    mix: Product,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    """Attention from its two products, and the probabilities: ``mix(softmax(score(q, k.T) * scale + mask), v)``.

    A query that may look nowhere gets zeros, as in torch.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = score(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
    blind = (scores == -math.inf).all(-1, keepdim=True)
    probs = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    if dropout_p > 0.0:
        probs = F.dropout(probs, dropout_p)
    return mix(probs, value), probs


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of call: the module that replaces it, and how it is written in Python."""

    module: type[nn.Module]
    functions: tuple[Callable[..., Any], ...]
    methods: tuple[str, ...] = ()
    recorded: frozenset[str] = frozenset()  # names in a recorded dataflow


KINDS: dict[str, Kind] = {
    "add": Kind(
        Add,
        (operator.add, operator.iadd, torch.add),
        ("add", "add_", "__add__", "__iadd__", "__radd__"),
        frozenset({"add", "iadd", "add_"}),
    ),
    "matmul": Kind(
        MatMul,
        (operator.matmul, torch.matmul, torch.bmm),
        ("matmul", "bmm", "__matmul__"),
        frozenset({"matmul", "bmm"}),
    ),
    "cat": Kind(Cat, (torch.cat, torch.concat, torch.concatenate), (), frozenset({"cat", "concat", "concatenate"})),
    "attention": Kind(Attention, (), (), frozenset({"scaled_dot_product_attention"})),
}
"""The kinds by the stem of their children's names: ``add_0``, ``matmul_0``, ``cat_0``, ``attention_0``."""


def kind_of(name: str) -> str | None:
    """The kind of a recorded function, None for functions that get no name.

    >>> kind_of("bmm"), kind_of("relu")
    ('matmul', None)
    """
    return next((kind for kind, calls in KINDS.items() if name in calls.recorded), None)
