"""`LowbitLinear`: the shipped linear layer."""

from __future__ import annotations

from torch import Tensor

from bitwright.errors import KernelError
from bitwright.lowbit.layer import LowbitLayer


class LowbitLinear(LowbitLayer):
    """``[..., in_features] -> [..., out_features]`` from packed codes, bit for bit what `QLinear` simulates."""

    op = "linear"

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, float32; raises `KernelError` for another number of input features."""
        if input.shape[-1] != self.shape[1]:
            raise KernelError(f"this layer takes {self.shape[1]} input features, got a tensor of {list(input.shape)}")
        return self.kernel.run(input, self.constants, self.weight_spec, self.bias, self.input)
