"""`LowbitMatMul`, `LowbitCat` and `LowbitAttention`: shipped operations of activations only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.graph.calls import attend
from bitwright.kernels import table
from bitwright.kernels.row import Activation, Kernel, decoded_input
from bitwright.numerics.spec import QParams


class Operand(nn.Module):
    """How one activation is encoded: its spec, and its scale and zero point as buffers (None for dynamic specs)."""

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.spec, qparams = activation
        self.register_buffer("scale", None if qparams is None else qparams.scale.detach().clone())
        zero_point = None if qparams is None or qparams.zero_point is None else qparams.zero_point.detach().clone()
        self.register_buffer("zero_point", zero_point)

    @property
    def activation(self) -> Activation:
        """Spec and parameters as kernels take them."""
        return Activation(self.spec, None if self.scale is None else QParams(self.scale, self.zero_point))

    def extra_repr(self) -> str:
        """The spec, for ``print(model)``."""
        return str(self.spec)


class LowbitOperation(nn.Module):
    """An operation of activations; its children are the `Operand` of each slot, ``.`` as ``_``; None = float."""

    def __init__(self, operands: dict[str, Activation | None]) -> None:
        super().__init__()
        for slot, activation in operands.items():
            operand = None if activation is None else Operand(activation)
            self.add_module(slot.replace(".", "_"), operand)

    @property
    def specs(self) -> str:
        """Specs of all operands, for reports."""
        return ", ".join("float" if child is None else str(child.spec) for child in self._modules.values())  # type: ignore[union-attr]


class LowbitMatMul(LowbitOperation):
    """``a @ b`` of two quantized activations, bit for bit what `nn.attention.QMatMul` simulates."""

    input_0: Operand
    input_1: Operand

    def __init__(self, operands: dict[str, Activation | None], features: frozenset[str]) -> None:
        super().__init__(operands)
        self.kernel = _kernel(self.input_0, self.input_1, features)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``[..., m, k] x [..., k, n] -> [..., m, n]``, float32."""
        return _run(self.kernel, self.input_0, self.input_1, a, b)


class LowbitCat(LowbitOperation):
    """A concatenation of tensors that share one scale, bit for bit what `nn.elementwise.QCat` simulates."""

    input: Operand

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The tensors joined along ``dim``, float32."""
        return torch.cat([decoded_input(x, self.input.activation) for x in tensors], dim)


class LowbitAttention(LowbitOperation):
    """The shipped attention, bit for bit what `nn.attention.QAttention` simulates."""

    query: Operand | None
    key: Operand | None
    value: Operand | None
    probs: Operand | None

    def __init__(self, operands: dict[str, Activation | None], features: frozenset[str]) -> None:
        super().__init__(operands)
        self.score_kernel = _kernel(self.query, self.key, features)
        self.mix_kernel = _kernel(self.probs, self.value, features)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        need_weights: bool = False,
    ) -> Any:
        """Arguments and results of `graph.calls.Attention`."""

        def score(a: Tensor, b: Tensor) -> Tensor:
            return _run(self.score_kernel, self.query, self.key, a, b)

        def mix(a: Tensor, b: Tensor) -> Tensor:
            return _run(self.mix_kernel, self.probs, self.value, a, b)

        out = attend(score, mix, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return out if need_weights else out[0]


def _kernel(left: Operand | None, right: Operand | None, features: frozenset[str]) -> Kernel | None:
    """The kernel of one product, None where it stays in float."""
    if left is None or right is None:
        return None
    return table.select("matmul", left.spec, right.spec, (), features)


def _run(kernel: Kernel | None, left: Operand | None, right: Operand | None, a: Tensor, b: Tensor) -> Tensor:
    if kernel is None or left is None or right is None:
        return a @ b
    return kernel.run(a, b, left.activation, right.activation)
