"""What all simulated layers share: their quantizers, their stage, and a batch norm folded into the forward.

A simulated layer *is* the user's module with its class changed, so parameters, state-dict keys, hooks and
``isinstance`` are kept. Where the dataflow showed a batch norm behind the layer, the layer computes both; see
`nn.norm` for the two forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitwright.kernels import reference, training
from bitwright.kernels.reference import Geometry
from bitwright.nn.norm import factor_of, folded_class, normalize, training_factor
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
    """Whether two operands are integer codes that are multiplied as such (contract C2); else they are decoded."""
    return weight is not None and input is not None and not reference.not_integers(weight.spec, input.spec)


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
        norm.__class__ = folded_class(type(norm))

    @property
    def simulating(self) -> bool:
        """Whether the forward computes with codes."""
        return self.weight_quantizer is not None and self.weight_quantizer.stage is Stage.SIMULATE

    @property
    def integer_product(self) -> bool:
        """Whether both operands are integer codes that are multiplied as such (contract C2); else they are decoded."""
        return integer_product(self.weight_quantizer, self.input_quantizer)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Float weight and bias with the batch norm folded in, as they are quantized, trained and shipped."""
        weight = self.as_rows(self.weight)
        if not self.norm:
            return weight, self.bias
        norm = self.norm[0]
        factor = factor_of(norm)
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
        if weight.dim() < 5 and training.serves(x, weight, quantize_input.spec, quantize_weight.product_spec):
            if quantize_weight.spec.format.is_table:
                weight = quantize_weight.simulate(weight)  # codes of the integer format now, times the scale
            operands = quantize_input.operand(x), quantize_weight.operand(weight)
            return training.product(x, weight.unsqueeze(2) if flat else weight, bias, *operands, geometry)
        filters = quantize_weight(weight)
        if flat:
            filters = filters._replace(values=filters.values.unsqueeze(2))
        if geometry is None:
            return reference.linear(quantize_input(x), filters, bias)
        convolve = reference.conv3d if weight.dim() == 5 else reference.conv2d
        return convolve(quantize_input(x), filters, bias, geometry)

    def on_grid(self, bias: Tensor | None) -> Tensor | None:
        """The bias as an integer runtime holds it: a multiple of ``s_x * s_w``, the step of the accumulator.

        Layers whose input scale is not known before the call, or whose sums have several scales, keep their float bias.
        """
        weight, input = self.weight_quantizer, self.input_quantizer
        if bias is None or not self.integer_product or weight is None or input is None or input.spec.dynamic:
            return bias
        step_w, step_x = weight.qparams, input.qparams
        assert step_w is not None
        assert step_x is not None
        if step_w.scale.numel() > len(bias):
            return bias
        step = step_x.scale * step_w.scale.view(-1)
        return round_ste(bias / step) * step

    @property
    def normalizing(self) -> bool:
        """Whether the folded norm uses the statistics of the batch: in training mode until it is frozen."""
        return bool(self.norm) and self.training and not self.freeze_norm

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of this forward: `folded`, or while `normalizing` the folded weight alone."""
        if not self.normalizing:
            return self.folded()
        weight = self.as_rows(self.weight)
        factor = training_factor(self.norm[0]).float()
        return weight * factor.view(-1, *[1] * (weight.dim() - 1)), None

    def normalized(self, out: Tensor) -> Tensor:
        """The layer's output, normalized by the folded norm where `operands` left that to do."""
        if not self.normalizing:
            return out
        if out.numel() < 2 * out.shape[1]:  # one value per channel has no variance
            bias = self.folded()[1]
            assert bias is not None
            return out + bias.view(1, -1, *[1] * (out.dim() - 2))
        return normalize(self.norm[0], out, training_factor(self.norm[0]), self.bias)
