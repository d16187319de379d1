"""The forward of `nn.MultiheadAttention` in the open: three projections, an `Attention` child, the output projection.

torch computes all of it in fused calls that read weights behind the backs of the modules that hold them. Simulated and
shipped modules share this forward instead; they differ in how they `project`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Side = Literal["query", "key", "value"]
SIDES: tuple[Side, ...] = ("query", "key", "value")
CHILD = "attention_0"


class Multihead(nn.Module):
    """Mixin with the arguments and results of `nn.MultiheadAttention`; subclasses say how they `project`."""

    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Tensor | None
    bias_v: Tensor | None
    attention_0: nn.Module
    out_proj: nn.Module

    def project(self, side: Side, x: Tensor) -> Tensor:
        """The input projection of one side, ``[..., features] -> [..., embed_dim]``."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of `nn.MultiheadAttention.forward`; ``is_causal`` only hints at what the mask is."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass the mask too")
        q, k, v = (self.project(side, x) for side, x in zip(SIDES, (query, key, value), strict=True))
        batched = q.dim() == 3
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mask = self._mask(q, attn_mask, key_padding_mask)
        k, v, mask = self._extended(k, v, mask)
        heads = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        out = self.attention_0(*heads, mask, dropout, need_weights=need_weights)
        out, weights = out if need_weights else (out, None)
        out = out.transpose(1, 2).flatten(2)
        if batched:
            out = self.out_proj(out if self.batch_first else out.transpose(0, 1))
        else:
            out, weights = self.out_proj(out.squeeze(0)), None if weights is None else weights.squeeze(0)
        return out, weights if weights is None or not average_attn_weights else weights.mean(-3)

    def _mask(self, query: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores, ``[n or 1, heads or 1, l or 1, s]``."""
        padding, mask = (_additive(m, query.dtype) for m in (key_padding_mask, attn_mask))
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (query.shape[0], self.num_heads))
        if padding is None:
            return mask
        padding = padding[:, None, None, :]
        return padding if mask is None else padding + mask

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values that the options add at the end of the sequence, open to every query."""
        before = k.shape[1]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v, None if mask is None else F.pad(mask, (0, k.shape[1] - before))


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of `nn.MultiheadAttention` (booleans: True = may not look) as numbers to add."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
