"""`QConvTranspose1d`, `QConvTranspose2d` and `QConvTranspose3d`: transposed convolutions that compute with codes.

Torch stores their weight as ``[in, out / groups, *kernel]``. It is encoded, packed and shipped as rows
``[out, in / groups, *kernel]``, so that axis 0 is the output channel as in every other layer: ``channel`` means one
scale per output channel, which leaves the sum, and a batch norm behind the layer folds into rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitwright.kernels import reference
from bitwright.kernels.reference import Geometry, input_major, output_major
from bitwright.nn.layer import QLayer


class _QConvTranspose(QLayer):
    """The forward of all three."""

    def as_rows(self: Any, weight: Tensor) -> Tensor:
        """``[in, out / groups, *kernel] -> [out, in / groups, *kernel]``."""
        return output_major(weight, self.groups)

    def from_rows(self: Any, rows: Tensor) -> Tensor:
        """``[out, in / groups, *kernel] -> [in, out / groups, *kernel]``."""
        return input_major(rows, self.groups)

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``[n, c, ...] -> [n, o, ...]``; ``output_size`` is one of the sizes that a stride allows, as in torch."""
        weight, bias = self.operands()
        quantize_weight, quantize_input = self.weight_quantizer, self.input_quantizer
        geometry, extra = geometry_of(self), output_padding_of(self, input, output_size)
        if not self.simulating:
            if quantize_input is not None:
                quantize_input.observe(input)
            return self.normalized(reference.float_conv_transpose(input, weight, bias, geometry, extra))
        if not self.integer_product:
            values = input if quantize_input is None else quantize_input.simulate(input)
            weight = quantize_weight.simulate(weight)
            out = reference.float_conv_transpose(values, weight, bias, geometry, extra)
        else:
            codes = quantize_input(input), quantize_weight(weight)
            out = reference.conv_transpose(*codes, self.on_grid(bias), geometry, extra)
        return self.normalized(out)


def geometry_of(conv: Any) -> Geometry:
    """Everything about a transposed convolution but its weight and its output padding."""
    return Geometry(conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)


def output_padding_of(conv: Any, x: Tensor, output_size: list[int] | None) -> tuple[int, ...]:
    """Rows and columns to add at the far ends, for an ``output_size`` asked for or as the layer says.

    Raises torch's `ValueError` for a size that the stride does not allow.
    """
    count = len(conv.kernel_size)
    return tuple(
        conv._output_padding(x, output_size, conv.stride, conv.padding, conv.kernel_size, count, conv.dilation)
    )


class QConvTranspose1d(_QConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on codes."""


class QConvTranspose2d(_QConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on codes."""


class QConvTranspose3d(_QConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on codes."""
