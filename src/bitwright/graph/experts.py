"""Mixtures of experts whose weights are stored as one 3-d parameter, as model libraries hold them.

The router stays as it is, in float. Simulated and shipped experts share this loop over the experts that were chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LIBRARY: dict[str, str] = {
    "transformers.pytorch_utils.Conv1D": "in_out_linear",
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts": "experts",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts": "experts",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts": "experts",
}
"""Operators of classes of model libraries, by name: a library that is not installed is not needed."""

Product = Callable[[int, Tensor], Tensor]


def library_operator(module: nn.Module) -> str | None:
    """The operator of a module of a model library, None for all others."""
    cls = type(module)
    return LIBRARY.get(f"{cls.__module__}.{cls.__qualname__}")


def mixture(
    x: Tensor, chosen: Tensor, shares: Tensor, count: int, gate_up: Product, down: Product, act: nn.Module
) -> Tensor:
    """Sum over a token's experts of ``share * down(act(gate) * up)``: ``[tokens, features] -> [tokens, features]``.

    ``chosen`` and ``shares`` are ``[tokens, k]``; numbers of ``count`` and above mean no expert.
    """
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        if expert >= count:
            continue
        tokens, places = torch.where(chosen == expert)
        gate, up = gate_up(expert, x[tokens]).chunk(2, -1)
        hidden = down(expert, act(gate) * up) * shares[tokens, places, None]
        out = out.index_add(0, tokens, hidden.to(out.dtype))
    return out
