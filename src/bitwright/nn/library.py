"""Simulated layers of model libraries, which are not imported here: mixins that join the user's class when met."""

from __future__ import annotations

from torch import Tensor

from bitwright.nn.layer import QLayer
from bitwright.nn.linear import QLinear


class QInOutLinear(QLayer):
    """A linear layer whose weight is stored as ``[in, out]``, such as `transformers.pytorch_utils.Conv1D`.

    It is encoded, packed and shipped as rows ``[out, in]``; this is the only place that turns it.
    """

    forward = QLinear.forward  # type: ignore[assignment]

    def as_rows(self, weight: Tensor) -> Tensor:
        """``[in, out] -> [out, in]``."""
        return weight.t()

    def from_rows(self, rows: Tensor) -> Tensor:
        """``[out, in] -> [in, out]``."""
        return rows.t()
