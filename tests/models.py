"""Small models that the tests share. Nothing here is downloaded; all weights are random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Residual block with functional ReLUs; a 1x1 convolution with batch norm where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.down is not None:
            x = self.down(x)
        return F.relu(x + y)


class SharedReluBlock(nn.Module):
    """Residual block as torchvision writes it: one ReLU module for all places, in-place add, everything in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResidualCnn(nn.Module):
    """Stem with a module ReLU, three residual blocks (plain, with a downsample, with a shared ReLU), linear head."""

    def __init__(self, width: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layers = nn.Sequential(Block(width, width), Block(width, 2 * width, 2), SharedReluBlock(2 * width))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class ConvNorm(nn.Module):
    """One convolution with a batch norm to fold; images of two channels to two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Mlp(nn.Sequential):
    """Linear layers with module ReLUs: paths ``0`` to ``4``."""

    def __init__(self, inputs: int = 16, hidden: int = 32, classes: int = 4) -> None:
        super().__init__(
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )


class Conv1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 8, 5, padding=2)
        self.norm1 = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.conv2(x)).mean(-1))


class EmbeddingNet(nn.Module):
    """Token and position embeddings are added: not a residual add."""

    def __init__(self, words: int = 20, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.positions = nn.Embedding(16, width)
        self.hidden = nn.Linear(width, width)
        self.fc = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.zeros_like(ids).cumsum(-1)
        x = self.words(ids) + self.positions(places)
        return self.fc(F.gelu(self.hidden(x)).mean(1))


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding: adds two products of one tensor."""
    width = x.shape[-1]
    rates = 1.0 / 100 ** (torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * torch.cat([rates, rates])
    left, right = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()


class Encoder(nn.Module):
    """Pre-norm transformer encoder layer with explicit q, k, v, rotary positions and a classifier."""

    def __init__(self, width: int = 16, heads: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm1(x)))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.classifier(self.norm3(x)[:, 0])

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotary(q), rotary(k)
        shares = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        return (shares @ v).transpose(1, 2).flatten(2)


class ControlFlow(nn.Module):
    """The data decides which layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.positive = nn.Linear(8, 8)
        self.negative = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        branch = self.positive if x.sum() > 0 else self.negative
        for _ in range(2):
            h = F.relu(branch(h))
        return self.fc(h)


class TiedLm(nn.Module):
    """A language model whose head is the embedding table, as a module with one Parameter or as a function call."""

    def __init__(self, words: int = 20, width: int = 8, *, functional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.hidden = nn.Linear(width, width)
        self.head: nn.Linear | None = None
        if not functional:
            self.head = nn.Linear(width, words, bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = F.gelu(self.hidden(self.embedding(ids)))
        return F.linear(h, self.embedding.weight) if self.head is None else self.head(h)


class TiedLayers(nn.Module):
    """Two hidden layers with one Parameter, fed by different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))))


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


@dataclass(slots=True)
class SlimAnswer:
    logits: Tensor
    features: list[Tensor]


class Heads(nn.Module):
    """Two heads over one trunk; ``kind`` decides how they are returned."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.trunk, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> object:
        h = F.relu(self.trunk(x))
        left, right = self.left(h), self.right(h)
        if self.kind == "dict":
            return {"left": left, "right": [right]}
        if self.kind == "slots":
            return SlimAnswer(left, [right])
        return Answer(left, right) if self.kind == "dataclass" else (left, right)


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm that applies a ReLU too, as in timm."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def image(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size)


def with_statistics(model: nn.Module) -> nn.Module:
    """``model`` with batch norms as after training: no statistic, gain or offset has its initial value."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return model
