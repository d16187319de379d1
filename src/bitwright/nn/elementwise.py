"""`QAdd` and `QCat`: operations on values, whose inputs are quantized each, or with one scale for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitwright.graph.calls import Add, Cat
from bitwright.kernels import reference, training
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
        if training.serves_add(a, b, left.spec, right.spec):
            return training.add(a, b, left.operand(a), right.operand(b))
        return reference.add(left(a), right(b))


class QCat(Simulated, Cat):
    """A concatenation whose tensors share one scale, so that their codes can be joined as they are."""

    input_quantizer: Quantizer

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The tensors joined along ``dim``."""
        quantizer = self.input_quantizer
        if quantizer.stage is Stage.SIMULATE:
            return torch.cat([quantizer.simulate(x) for x in tensors], dim)
        for x in tensors:
            quantizer.observe(x)
        return torch.cat(list(tensors), dim)
