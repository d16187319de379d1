"""A batch norm folded into the layer before it (Jacob 2018, section 3.2; Krishnamoorthi 2018, section 3.2.2).

The weight that is quantized is always the one that ships, ``W f`` with ``f = gamma / sqrt(running_var + eps)``; so its
scale does not jitter with the batch. With ``a`` the layer's output without bias:

==================== ===========================================================================================
evaluation, frozen   ``y = a + beta - gamma running_mean / sqrt(running_var + eps)``: what ships
training             ``y = gamma' (a - mean(a)) / sqrt(var(a) + eps f**2) + beta``: batch norm of ``a / f``, exactly
==================== ===========================================================================================

f is a constant of the training form (the result does not depend on its size), and ``gamma' = gamma sign(f)``. A channel
with gamma = 0 is folded with ``f = 1 / sqrt(running_var + eps)`` while training, so that gamma gets the gradient of an
unfolded norm. Statistics are those of the *quantized* layer, which is what they will meet when shipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bitwright.kernels.training import moments

_DEAD = 1e-12


def factor_of(norm: _BatchNorm) -> Tensor:
    """``gamma / sqrt(running_var + eps)`` per channel in float64."""
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.double()


@torch.no_grad()
def training_factor(norm: _BatchNorm) -> Tensor:
    """`factor_of`, float64, with the channels of gamma = 0 folded as if gamma were 1."""
    factor = factor_of(norm)
    assert norm.running_var is not None
    alive = torch.where(factor.abs() > _DEAD, factor, (norm.running_var.double() + norm.eps).rsqrt())
    # A compiled backward would compute it again, from the running variance that the forward has updated by then.
    return torch.ops.bitwright.snapshot(alive)


def normalize(norm: _BatchNorm, a: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """The training form for ``a [n, c, ...]``; updates the running statistics. ``bias`` is the layer's own, or None."""
    assert norm.running_mean is not None
    count = a.numel() // a.shape[1]
    own_bias = torch.zeros_like(factor) if bias is None else bias.detach().double()
    with torch.no_grad():
        var, mean = moments(a.detach(), ((norm.running_mean.double() - own_bias) * factor).float())
        spread = var * ((count - 1) / count) + norm.eps * factor.square()
        _update(norm, mean / factor + own_bias, var / factor.square())
    gamma = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    return _Normalize.apply(a, gamma * factor.sign().float(), beta, mean.float(), spread.float())  # type: ignore[no-any-return]


def _update(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    share = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.double()
    for running, batch in ((norm.running_mean, mean), (norm.running_var, var)):
        assert running is not None
        running.copy_(running + share * (batch - running))


class _Normalize(torch.autograd.Function):
    """``gamma (a - mean) / sqrt(var) + beta`` whose backward knows that mean and var are those of ``a``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        ctx.save_for_backward(a, gamma, mean, var)
        return F.batch_norm(a, mean, var, gamma, beta, training=False, eps=0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, gamma, mean, var = ctx.saved_tensors
        found = torch.ops.aten.native_batch_norm_backward(
            grads[0], a, gamma, None, None, mean, var.rsqrt(), True, 0.0, [True, True, True]
        )
        return (*found, None, None)


class _IdentityNorm(nn.Identity, _BatchNorm):
    """A batch norm whose work is done by the layer before it."""


class FoldedBatchNorm1d(_IdentityNorm, nn.BatchNorm1d):
    """An `nn.BatchNorm1d` folded into the layer before it."""


class FoldedBatchNorm2d(_IdentityNorm, nn.BatchNorm2d):
    """An `nn.BatchNorm2d` folded into the layer before it."""


class FoldedBatchNorm3d(_IdentityNorm, nn.BatchNorm3d):
    """An `nn.BatchNorm3d` folded into the layer before it."""


FOLDED = {
    nn.BatchNorm1d: FoldedBatchNorm1d,
    nn.BatchNorm2d: FoldedBatchNorm2d,
    nn.BatchNorm3d: FoldedBatchNorm3d,
}
"""What a batch norm becomes when it is folded."""


def folded_class(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    """The identity that takes the place of a norm of class ``cls``."""
    return next(folded for norm, folded in FOLDED.items() if issubclass(cls, norm))
