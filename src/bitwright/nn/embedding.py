"""`QEmbedding` and `QEmbeddingBag`: embedding tables of low-bit rows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.kernels.reference import Bags, bag, row_qparams
from bitwright.nn.layer import QLayer
from bitwright.numerics.ste import simulated


class QEmbedding(QLayer, nn.Embedding):
    """`nn.Embedding` that encodes rows after the lookup: the result of encoding the table, for touched rows only."""

    bias = None

    def forward(self, input: Tensor) -> Tensor:
        """Indices ``[...] -> [..., embedding_dim]``; indices themselves are never quantized."""
        rows = F.embedding(input, self.weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        return _encoded(self, rows, input)


class QEmbeddingBag(QLayer, nn.EmbeddingBag):
    """`nn.EmbeddingBag` that reduces encoded rows."""

    bias = None

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Indices ``[bags, n]``, or ``[n]`` with the start of each bag, ``-> [bags, embedding_dim]``."""
        if self.weight_quantizer is None or not self.simulating:
            return nn.EmbeddingBag.forward(self, input, offsets, per_sample_weights)
        ids = input.flatten()
        rows = F.embedding(ids, self.weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        return bag(_encoded(self, rows, ids), input, offsets, per_sample_weights, bags_of(self))


def bags_of(layer: nn.EmbeddingBag) -> Bags:
    """How an embedding bag reduces the rows of a bag."""
    return Bags(layer.mode, layer.include_last_offset, layer.padding_idx)


def _encoded(layer: QLayer, rows: Tensor, ids: Tensor) -> Tensor:
    """The values of the codes of rows that were looked up by ``ids``."""
    quantizer = layer.weight_quantizer
    if quantizer is None or not layer.simulating:
        return rows
    qparams, scale, offset, flat = quantizer.qparams, quantizer.scale, quantizer.offset, ids.flatten()
    assert qparams is not None
    assert scale is not None
    learning = quantizer.learning(layer.weight)
    if quantizer.spec.granularity.kind != "tensor":
        scale = F.embedding(flat, scale)
        offset = None if offset is None else F.embedding(flat, offset)
    qparams = row_qparams(qparams, quantizer.spec, flat)
    matrix = rows.reshape(-1, rows.shape[-1])
    return simulated(matrix, quantizer.spec, qparams, learning, scale, offset).view(rows.shape)
