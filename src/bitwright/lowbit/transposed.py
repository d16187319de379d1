"""`LowbitConvTranspose`: the shipped transposed convolution of any dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.kernels.reference import Geometry
from bitwright.kernels.row import Activation
from bitwright.lowbit.layer import LowbitLayer
from bitwright.numerics.qtensor import QTensor


class LowbitConvTranspose(LowbitLayer):
    """``[n, c, ...] -> [n, o, ...]`` from packed codes, bit for bit what `nn.transposed` simulates.

    The packed weight is ``[out, in / groups, *kernel]``: its rows are output channels.
    """

    op = "conv_transpose"

    def __init__(
        self,
        weight: QTensor,
        bias: Tensor | None,
        input: Activation | None,
        features: frozenset[str],
        geometry: Geometry,
        output_padding: tuple[int, ...],
    ) -> None:
        self.groups = geometry.groups
        super().__init__(weight, bias, input, features)
        self.geometry, self.output_padding = geometry, output_padding

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The layer's output, float32; ``output_size`` as in torch."""
        extra = self.output_padding if output_size is None else self._extra(input, output_size)
        return self.kernel.run(input, self.constants, self.weight_spec, self.bias, self.input, self.geometry, extra)

    def _extra(self, input: Tensor, output_size: list[int]) -> tuple[int, ...]:
        g, count = self.geometry, len(self.geometry.stride)
        with torch.device("meta"):  # torch keeps this rule in a method of its layers
            layer: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[count - 1](1, 1, 1)
        return tuple(layer._output_padding(input, output_size, g.stride, g.padding, g.kernel_size, count, g.dilation))
