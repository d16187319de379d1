"""A small decoder with grouped-query attention, and sequences for it, that tests of transformer methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


class Block(nn.Module):
    """4 query heads on 2 key heads; a gated feed-forward layer; both norms before, in the residual branches."""

    def __init__(self, width: int, norm: type[nn.Module], bias: bool) -> None:
        super().__init__()
        self.size = width // 4
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.o = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.k, self.v = nn.Linear(width, width // 2, bias), nn.Linear(width, width // 2, bias)
        self.gate, self.up = nn.Linear(width, 2 * width, bias), nn.Linear(width, 2 * width, bias)
        self.down = nn.Linear(2 * width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Embedding, blocks, norm and head; channel 3 of the residual stream is an outlier."""

    def __init__(
        self, width: int = 32, blocks: int = 2, norm: type[nn.Module] = RMSNorm, bias: bool = False, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width, norm, bias) for _ in range(blocks))
        self.norm, self.head = norm(width), nn.Linear(width, 50, bias=False)
        with torch.no_grad():
            self.embed.weight[:, 3] += 20.0
            for block in self.blocks:
                for name in ("norm1", "norm2"):
                    getattr(block, name).weight[5] = 12.0
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = list(torch.randint(0, 50, (3, 4, 12), generator=torch.Generator().manual_seed(1)))


def decoder(**options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(**options).eval()


def prepared(net: nn.Module, example: Tensor, preset: str = "w8a8", **options: Any) -> nn.Module:
    """Ready to be calibrated, with extremes as ranges, which are fast to find."""
    observers = {"weight": "minmax", "input": "minmax"}
    return bw.prepare(net, bw.Plan.preset(preset, net, example, observers=observers, **options))


@torch.no_grad()
def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).square().sum() / wanted.square().sum()).item()
