"""A decoder of the Llama architecture in plain PyTorch; single tokens go through layers that torch compiles."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.lowbit.layer import LowbitLayer

PROMPT, DECODED, PREFILL = 32, 32, 512  # tokens; the cache holds so many
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    layers: int = 22
    width: int = 2048
    hidden: int = 5632
    heads: int = 32
    kv_heads: int = 4
    words: int = 32000

    @property
    def size(self) -> int:
        return self.width // self.heads


class Block(nn.Module):
    """One decoder layer on tokens ``[t, width]``; one product makes queries, keys and values, one both halves."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, width + 2 * shape.kv_heads * shape.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, cache: Tensor, at: int) -> Tensor:
        x = x + self.out(self.attend(self.qkv(self.norm1(x)), turn, cache, at))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def attend(self, qkv: Tensor, turn: Tensor, cache: Tensor, at: int) -> Tensor:
        """Turn pairs of neighbouring channels of queries and keys, append to the cache, attend."""
        s, t = self.shape, len(qkv)
        heads = qkv.view(t, -1, s.size)
        real, imaginary = heads[:, : s.heads + s.kv_heads].unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turn.unbind(-1)
        turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)
        cache[at : at + t, : s.kv_heads] = turned[:, s.heads :]
        cache[at : at + t, s.kv_heads :] = heads[:, s.heads + s.kv_heads :]
        seen = cache[: at + t].transpose(0, 1).unsqueeze(0)
        keys, values = seen[:, : s.kv_heads], seen[:, s.kv_heads :]
        queries = turned[:, : s.heads]
        if t == 1:  # heads that share keys are rows of one product
            queries = queries.view(1, s.kv_heads, -1, s.size)
            return F.scaled_dot_product_attention(queries, keys, values).view(1, -1)
        queries = queries.transpose(0, 1).unsqueeze(0)
        found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return found[0].transpose(0, 1).flatten(1)


torch._dynamo.config.recompile_limit = 64  # one_token is compiled twice for every format: for a position, for any
one_token = torch.compile(Block.forward, fullgraph=True, options={"cpp.threads": 1})  # its own loops are short


class Llama(nn.Module):
    """Logits ``[words]`` of the token behind ``ids [t]``; one token after others, or many at the beginning."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.words, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.head = nn.Linear(shape.width, shape.words, bias=False)

    def forward(self, ids: Tensor, turns: Tensor, cache: Tensor, at: int) -> Tensor:
        x, turn = self.embed(ids), turns[at : at + len(ids)]
        for i, block in enumerate(self.blocks):
            x = one_token(block, x, turn, cache[i], at) if len(ids) == 1 else block(x, turn, cache[i], at)
        return self.head(self.norm(x[-1:]))[0]


def start(s: Shape) -> tuple[Tensor, Tensor, int]:
    """Arguments behind the tokens for a new text: turns of positions ``[p, 1, size / 2, 2]``, an empty cache, 0."""
    longest = max(PREFILL, PROMPT + DECODED)
    frequency = 10000.0 ** (-torch.arange(0, s.size, 2) / s.size)
    angles = torch.arange(longest)[:, None] * frequency
    cache = torch.zeros(s.layers, longest, 2 * s.kv_heads, s.size)
    return torch.stack([angles.cos(), angles.sin()], -1).unsqueeze(1), cache, 0


def model_of(weights: Weights, shape: Shape) -> Llama:
    """The float model of one layer on these very tensors."""
    with torch.device("meta"):
        model = Llama(replace(shape, layers=1))
    model.load_state_dict(weights, assign=True)
    return model.eval()


def random_weights(shape: Shape) -> Weights:
    """Of the model with one layer."""
    with torch.device("meta"):
        empty = Llama(replace(shape, layers=1)).state_dict()
    found = {name: torch.randn(t.shape) for name, t in empty.items()}
    for name, tensor in found.items():
        if tensor.dim() == 1:
            tensor.mul_(0.1).add_(1)
        elif name != "embed.weight":
            tensor.mul_(tensor.shape[1] ** -0.5)
    return found


def repeat(model: nn.Module, shape: Shape) -> nn.Module:
    """All layers, each with memory of its own, from a model of one, float or low-bit."""
    (block,) = model.blocks
    kept = [
        part for m in block.modules() if isinstance(m, LowbitLayer) for part in (m.kernel, m.weight_spec, m.input_spec)
    ]
    model.blocks.extend(copy.deepcopy(block, {id(part): part for part in kept}) for _ in range(shape.layers - 1))
    return model
