"""`QConv3d`: a volume convolution that computes with codes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitwright.kernels import reference
from bitwright.nn.conv import as_images, geometry_of, pad
from bitwright.nn.layer import QLayer


class QConv3d(QLayer, nn.Conv3d):
    """`nn.Conv3d` on codes."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """``[n, c, d, h, w] -> [n, o, d', h', w']`` (a missing batch axis is allowed, as in `nn.Conv3d`)."""
        weight, bias = self.operands()
        quantize_weight, quantize_input = self.weight_quantizer, self.input_quantizer
        if not self.simulating:
            if quantize_input is not None:
                quantize_input.observe(input)
            return self.normalized(self._conv_forward(input, weight, bias))
        if not self.integer_product:
            values = input if quantize_input is None else quantize_input.simulate(input)
            out = self._conv_forward(values, quantize_weight.simulate(weight), bias)
        else:
            volumes, restore = as_images(self, pad(self, input))
            codes = quantize_input(volumes), quantize_weight(weight)
            out = restore(reference.conv3d(*codes, self.on_grid(bias), geometry_of(self)))
        return self.normalized(out)
