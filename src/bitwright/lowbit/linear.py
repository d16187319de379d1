"""`LowbitLinear`: the shipped linear layer."""

from __future__ import annotations

from torch import Tensor

from bitwright.lowbit.layer import LowbitLayer


class LowbitLinear(LowbitLayer):
    """``[..., in_features] -> [..., out_features]`` from packed codes, bit for bit what `QLinear` simulates."""

    op = "linear"

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, float32."""
        return self.kernel.run(input, self.constants, self.weight_spec, self.bias, self.input)
