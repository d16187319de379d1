"""`QEmbedding`: an embedding table of low-bit rows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.nn.layer import QLayer
from bitwright.numerics.spec import QParams
from bitwright.numerics.ste import simulated


class QEmbedding(QLayer, nn.Embedding):
    """`nn.Embedding` that encodes rows after the lookup: the result of encoding the table, for touched rows only."""

    bias = None

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``[...] -> [..., embedding_dim]``; indices themselves are never quantized."""
        rows = F.embedding(input, self.weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        quantizer = self.weight_quantizer
        if quantizer is None or not self.simulating:
            return rows
        qparams, scale, offset = quantizer.qparams, quantizer.scale, quantizer.offset
        assert qparams is not None
        assert scale is not None
        learning = quantizer.learning(self.weight)
        if quantizer.spec.granularity.kind != "tensor":
            scale = F.embedding(input, scale)
            offset = None if offset is None else F.embedding(input, offset)
            zero_point = None if qparams.zero_point is None else F.embedding(input, qparams.zero_point)
            qparams = QParams(F.embedding(input, qparams.scale), zero_point)
        return simulated(rows, quantizer.spec, qparams, learning, scale, offset)
