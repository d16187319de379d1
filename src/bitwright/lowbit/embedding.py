"""`LowbitEmbedding`: the shipped embedding table."""

from __future__ import annotations

from torch import Tensor

from bitwright.lowbit.layer import LowbitLayer


class LowbitEmbedding(LowbitLayer):
    """Indices ``[...] -> [..., embedding_dim]``: gathers codes, then decodes the touched rows only."""

    op = "embedding"

    def forward(self, input: Tensor) -> Tensor:
        """The rows, float32."""
        return self.kernel.run(input, self.constants, self.weight_spec)
