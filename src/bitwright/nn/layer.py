"""What all simulated layers share: their quantizers, their stage, and a batch norm folded into the forward.

A simulated layer *is* the user's module with its class changed, so parameters, state-dict keys, hooks and
``isinstance`` are kept. Where the dataflow showed a batch norm behind the layer, the layer computes both: the weight
that is quantized is the folded one, with running statistics, so the training forward is the function that ships.

The running statistics go on learning from the output of the *quantized* layer (batch norm re-estimation): with
``y = (z - mean) * f + beta`` and ``f = gamma / sqrt(var + eps)``, the statistics of z follow from those of y. A channel
with gamma = 0 carries no information about z, and its output does not depend on z either: its statistics stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitwright.kernels import reference, training
from bitwright.kernels.reference import Geometry
from bitwright.kernels.training import moments
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.affine import round_ste


class Simulated(nn.Module):
    """Mixin of every module that computes with codes. Created by class swap, never by its constructor.

    Its quantizers are children named after their slots: ``weight_quantizer``, ``input_quantizer``,
    ``input_0_quantizer``; a slot that stays in float is None.
    """

    def attach(self, quantizers: Mapping[str, Quantizer | None]) -> None:
        """Give the module its quantizers, by slot; None leaves that operand in float."""
        for slot, quantizer in quantizers.items():
            setattr(self, quantizer_name(slot), quantizer)

    def quantizer(self, slot: str) -> Quantizer | None:
        """The quantizer of a slot, None where that operand stays in float."""
        return getattr(self, quantizer_name(slot))

    def quantized_weights(self) -> dict[str, Tensor]:
        """The float weights that are quantized, by slot, as they are encoded (batch norm folded in)."""
        return {}

    def as_rows(self, weight: Tensor) -> Tensor:
        """A stored weight as it is encoded: its output channel is axis 0."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `as_rows`."""
        return rows

    def unreached(self) -> list[str]:
        """Parts of the module that nothing reached while ranges were observed."""
        return []

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """The float parameters that this module trains."""
        return self.parameters(recurse=False)


def quantizer_name(slot: str) -> str:
    """Name of the child that quantizes a slot.

    >>> quantizer_name("input.0")
    'input_0_quantizer'
    """
    return slot.replace(".", "_") + "_quantizer"


def integer_product(weight: Quantizer | None, input: Quantizer | None) -> bool:
    """Whether two operands are integer codes whose scales leave the sum (contract C2); else they are decoded."""
    return (
        weight is not None
        and input is not None
        and weight.spec.format.is_integer
        and weight.spec.symmetric
        and weight.spec.granularity.kind in ("tensor", "channel")
    )


class QLayer(Simulated):
    """Mixin of simulated layers with one weight, one input, and possibly a batch norm folded into their forward."""

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    norm: tuple[_BatchNorm, ...]
    freeze_norm: bool

    def attach(self, quantizers: Mapping[str, Quantizer | None]) -> None:
        """Give the layer its quantizers; None leaves that side in float."""
        super().attach({"weight": None, "input": None, **quantizers})
        self.norm, self.freeze_norm = (), False

    def quantized_weights(self) -> dict[str, Tensor]:
        """The weight with the batch norm folded in, where it is quantized."""
        return {} if self.weight_quantizer is None else {"weight": self.folded()[0]}

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """The layer's parameters and those of the batch norm that it holds."""
        yield from self.parameters(recurse=False)
        for norm in self.norm:
            yield from norm.parameters()

    def fold(self, norm: _BatchNorm) -> None:
        """Compute ``norm`` inside this layer; the norm becomes an identity that keeps its parameters and keys."""
        self.norm = (norm,)  # in a tuple, so that it stays registered (and named) at its own place only
        norm.__class__ = _identity_norm(type(norm))

    @property
    def simulating(self) -> bool:
        """Whether the forward computes with codes."""
        return self.weight_quantizer is not None and self.weight_quantizer.stage is Stage.SIMULATE

    @property
    def integer_product(self) -> bool:
        """Whether both operands are integer codes whose scales leave the sum (contract C2); else they are decoded."""
        return integer_product(self.weight_quantizer, self.input_quantizer)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Float weight and bias with the batch norm folded in, as they are quantized, trained and shipped."""
        weight = self.as_rows(self.weight)
        if not self.norm:
            return weight, self.bias
        norm = self.norm[0]
        factor = _factor(norm)
        assert norm.running_mean is not None
        mean = norm.running_mean.double()
        start = -mean if self.bias is None else self.bias.double() - mean
        bias = start * factor + (0.0 if norm.bias is None else norm.bias.double())
        shape = (-1, *[1] * (weight.dim() - 1))
        return weight * factor.float().view(shape), bias.float()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
        """The product of the codes of input and weight: by the shipped kernel or, with the same bits, in torch."""
        quantize_input, quantize_weight = self.input_quantizer, self.weight_quantizer
        assert quantize_input is not None
        assert quantize_weight is not None
        x, flat = x.float(), geometry is not None and weight.dim() == 3
        if training.serves(x, weight, quantize_input.spec, quantize_weight.spec):
            operands = quantize_input.operand(x), quantize_weight.operand(weight)
            return training.product(x, weight.unsqueeze(2) if flat else weight, bias, *operands, geometry)
        filters = quantize_weight(weight)
        if flat:
            filters = filters._replace(values=filters.values.unsqueeze(2))
        if geometry is None:
            return reference.linear(quantize_input(x), filters, bias)
        return reference.conv2d(quantize_input(x), filters, bias, geometry)

    def on_grid(self, bias: Tensor | None) -> Tensor | None:
        """The bias as an integer runtime holds it: a multiple of ``s_x * s_w``, the step of the accumulator.

        Layers whose input scale is not known before the call keep their float bias.
        """
        weight, input = self.weight_quantizer, self.input_quantizer
        if bias is None or not self.integer_product or weight is None or input is None or input.spec.dynamic:
            return bias
        step_w, step_x = weight.qparams, input.qparams
        assert step_w is not None
        assert step_x is not None
        step = step_x.scale * step_w.scale.view(-1)
        return round_ste(bias / step) * step

    @torch.no_grad()
    def track(self, out: Tensor) -> None:
        """Update the folded norm's running statistics from this layer's output, while training and not frozen."""
        if not self.norm or not self.training or self.freeze_norm or not self.simulating:
            return
        if out.numel() < 2 * out.shape[1]:  # one value per channel has no variance
            return
        norm = self.norm[0]
        beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
        var, mean = moments(out, beta)
        factor = _factor(norm)
        alive = factor.abs() > 1e-12
        factor = torch.where(alive, factor, 1.0)
        assert norm.running_mean is not None
        assert norm.num_batches_tracked is not None
        mean = norm.running_mean + (mean - beta.double()) / factor
        norm.num_batches_tracked += 1
        share = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.double()
        for running, batch in ((norm.running_mean, mean), (norm.running_var, var / factor.square())):
            assert running is not None
            running.copy_(torch.where(alive, running + share * (batch - running), running))


def _factor(norm: _BatchNorm) -> Tensor:
    """``gamma / sqrt(var + eps)`` per channel in float64."""
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.double()


class _IdentityNorm(_BatchNorm):
    """A batch norm whose work is done by the layer before it."""

    def forward(self, input: Tensor) -> Tensor:
        return input


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


def _identity_norm(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    return next(folded for norm, folded in FOLDED.items() if issubclass(cls, norm))
