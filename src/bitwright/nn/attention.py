"""`QMatMul` and `QAttention`: products of two activations on codes; `Probabilities`: the range of a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.graph.calls import Attention, MatMul, attend
from bitwright.kernels import reference
from bitwright.nn.layer import Simulated
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.affine import choose_qparams


class Probabilities(Quantizer):
    """A quantizer of probabilities: its range is [0, 1] whatever was observed, so ``uint8`` has the scale 1/255."""

    def finish(self) -> None:
        """Take the known range, and start to simulate."""
        self.set_qparams(choose_qparams(torch.zeros(1), torch.ones(1), self.spec))
        self.stage = Stage.SIMULATE


class QMatMul(Simulated, MatMul):
    """``a @ b`` on codes: ``(q_a @ q_b) * (s_a * s_b)``."""

    input_0_quantizer: Quantizer
    input_1_quantizer: Quantizer

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``[..., m, k] x [..., k, n] -> [..., m, n]``."""
        return product(self.input_0_quantizer, self.input_1_quantizer, a, b)


class QAttention(Simulated, Attention):
    """`Attention` whose products, scores and mixture, are computed on codes, each where its operands are quantized."""

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
        """Arguments and results of `Attention`; the softmax between the products stays in float."""

        def score(a: Tensor, b: Tensor) -> Tensor:
            return product(self.quantizer("query"), self.quantizer("key"), a, b)

        def mix(a: Tensor, b: Tensor) -> Tensor:
            return product(self.quantizer("probs"), self.quantizer("value"), a, b)

        out = attend(score, mix, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return out if need_weights else out[0]


def product(left: Quantizer | None, right: Quantizer | None, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` on codes; in float while the quantizers do not simulate, or where there are none."""
    if left is None or right is None:
        return a @ b
    if left.stage is not Stage.SIMULATE:
        left.observe(a)
        right.observe(b)
        return a @ b
    return reference.matmul(left(a), right(b))
