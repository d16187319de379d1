"""`QAdd`: a residual add whose two inputs are quantized as a pair."""

from __future__ import annotations

from torch import Tensor

from bitwright.graph.rewrite import Add
from bitwright.kernels import reference
from bitwright.nn.layer import Simulated
from bitwright.nn.quantizer import Quantizer, Stage


class QAdd(Simulated, Add):
    """``a + b`` on codes: ``q_a * s_a + q_b * s_b``."""

    input_0_quantizer: Quantizer
    input_1_quantizer: Quantizer

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of two tensors of one shape."""
        left, right = self.input_0_quantizer, self.input_1_quantizer
        if left.stage is not Stage.SIMULATE:
            left.observe(a)
            right.observe(b)
            return a + b
        return reference.add(left(a), right(b))
