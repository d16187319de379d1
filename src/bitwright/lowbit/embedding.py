"""`LowbitEmbedding` and `LowbitEmbeddingBag`: the shipped embedding tables."""

from __future__ import annotations

from torch import Tensor

from bitwright.kernels.reference import Bags, bag
from bitwright.lowbit.layer import LowbitLayer
from bitwright.numerics.qtensor import QTensor


class LowbitEmbedding(LowbitLayer):
    """Indices ``[...] -> [..., embedding_dim]``: gathers codes, then decodes the touched rows only."""

    op = "embedding"

    def forward(self, input: Tensor) -> Tensor:
        """The rows, float32."""
        return self.kernel.run(input, self.constants, self.weight_spec)


class LowbitEmbeddingBag(LowbitLayer):
    """Indices ``[bags, n]``, or ``[n]`` with offsets, ``-> [bags, embedding_dim]``: sums, means or maxima of rows."""

    op = "embedding"

    def __init__(self, weight: QTensor, features: frozenset[str], bags: Bags) -> None:
        super().__init__(weight, None, None, features)
        self.bags = bags

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """The reduced rows, float32."""
        rows = self.kernel.run(input.flatten(), self.constants, self.weight_spec)
        return bag(rows, input, offsets, per_sample_weights, self.bags)
