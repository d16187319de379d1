"""A study of FP8 training: e4m3 in the forward, e5m2 for gradients, computed in float32 (Micikevicius 2022).

This is emulation. It answers what accuracy FP8 training would reach, and says nothing about its speed. Weights stay
float32 (master weights); the first and the last linear layer stay as they are.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import TrainingError

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2

Scaling = Literal["delayed", "current"]


def cast_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to FP8 and back to float32; what is too large saturates (devices differ in their own casts).

    >>> cast_fp8(torch.tensor([0.3, 463.0, -1e6]), torch.float8_e4m3fn).tolist()
    [0.3125, 448.0, -448.0]
    """
    limit = torch.finfo(dtype).max
    return x.float().clamp(-limit, limit).to(dtype).float()


class Fp8Scale:
    """The factor that brings a tensor into the range of FP8: ``largest / (2**margin * amax)``.

    With delayed scaling ``amax`` is the largest magnitude among the last ``length`` tensors, the present one not
    included (the very first one uses its own); with current scaling (``length`` = 0) it is that of the tensor itself.
    Magnitudes that are not finite are not remembered.

    >>> scale = Fp8Scale(torch.float8_e4m3fn, length=2)
    >>> [scale.factor_for(torch.tensor([amax])) for amax in (448.0, 56.0, 7.0, 7.0)]
    [1.0, 1.0, 1.0, 8.0]
    """

    def __init__(self, dtype: torch.dtype, length: int = 16, margin: int = 0) -> None:
        if length < 0 or margin < 0:
            raise TrainingError(f"expected length >= 0 and margin >= 0, got {length} and {margin}")
        self.dtype, self.margin = dtype, margin
        self.delayed = length > 0
        self.history: deque[float] = deque(maxlen=max(length, 1))

    def factor_for(self, x: Tensor) -> float:
        """The factor for ``x``, whose magnitude is then remembered."""
        amax = x.detach().abs().max().item() if x.numel() else 0.0
        known = max(self.history) if self.delayed and self.history else amax
        if amax < float("inf"):
            self.history.append(amax)
        factor = torch.finfo(self.dtype).max / (2.0**self.margin * known) if 0 < known < float("inf") else 1.0
        return min(factor, torch.finfo(torch.float32).max)

    def cast(self, x: Tensor) -> Tensor:
        """``x`` as FP8 holds it: scaled, cast, and scaled back."""
        factor = self.factor_for(x)
        return cast_fp8(x.float() * factor, self.dtype) / factor


class Fp8Linear(nn.Linear):
    """`nn.Linear` whose operands are e4m3 and whose incoming gradient is e5m2; made by `simulate_fp8`."""

    scales: dict[str, Fp8Scale]

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``, float32."""
        x, weight = (_Cast.apply(value, self.scales[name]) for name, value in (("x", input), ("w", self.weight)))
        return _CastGradient.apply(F.linear(x, weight, self.bias), self.scales["g"])  # type: ignore[no-any-return]


def simulate_fp8(model: nn.Module, *, scaling: Scaling = "delayed", length: int = 16, margin: int = 0) -> list[str]:
    """Let every `nn.Linear` but the first and the last train as in FP8, in place; returns their paths.

    Raises `TrainingError` for a model with fewer than three, and for an unknown ``scaling``.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> simulate_fp8(net), type(net[1]).__name__
    (['1'], 'Fp8Linear')
    """
    if scaling not in ("delayed", "current"):
        raise TrainingError(f"scaling must be 'delayed' or 'current', got {scaling!r}")
    if scaling == "delayed" and length < 1:
        raise TrainingError(f"delayed scaling needs a history of at least 1, got {length}")
    layers = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    if len(layers) < 3:
        raise TrainingError(f"the first and the last linear layer stay in float, and this model has {len(layers)}")
    inner = list(layers)[1:-1]
    for path in inner:
        layer: Any = layers[path]
        layer.__class__ = Fp8Linear
        size = length if scaling == "delayed" else 0
        layer.scales = {name: Fp8Scale(dtype, size, margin) for name, dtype in _ROLES.items()}
    return inner


_ROLES = {"x": FORWARD, "w": FORWARD, "g": BACKWARD}


class _Cast(torch.autograd.Function):
    """Cast in the forward; the gradient passes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Fp8Scale) -> Tensor:
        return scale.cast(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _CastGradient(torch.autograd.Function):
    """The identity whose gradient is cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Fp8Scale) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.scale.cast(grads[0]), None
