"""The grid of a layer's weight, column by column: what a method that walks over input columns rounds to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import simulate
from bitwright.numerics.spec import Granularity, QParams, QuantSpec
from bitwright.observe.fit import weight_qparams


@dataclass(frozen=True, slots=True)
class Grid:
    """Scale and zero point of every weight, ``[groups, k, o]``, where a column is an entry of axis 1.

    ``spec`` is that of one column: each row has its own scale. ``size`` columns share a scale (0: all of a row do).
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor | None
    codebook: Tensor | None
    size: int

    @classmethod
    def of(cls, quantizer: Quantizer, weight: Tensor, groups: int) -> Grid:
        """The grid that a calibrated quantizer rounds ``weight [o, ...]`` to."""
        spec, qparams = quantizer.spec, quantizer.qparams
        assert qparams is not None
        size = spec.granularity.size

        def spread(values: Tensor) -> Tensor:
            values = values.repeat_interleave(size, -1) if size else values.expand(weight.shape)
            return values.reshape(groups, len(weight) // groups, -1).mT.contiguous()

        zero_point = None if qparams.zero_point is None else spread(qparams.zero_point)
        column = QuantSpec(spec.format, Granularity("channel"), spec.symmetric)
        return cls(column, spread(qparams.scale), zero_point, qparams.codebook, size)

    def in_order(self, order: Tensor) -> Grid:
        """The grid of the columns ``order [groups, k]``."""

        def picked(values: Tensor) -> Tensor:
            return values.gather(1, order.unsqueeze(-1).expand(values.shape))

        zero_point = None if self.zero_point is None else picked(self.zero_point)
        return Grid(self.spec, picked(self.scale), zero_point, self.codebook, self.size)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """``values [groups, o]`` on the grid of a column."""
        zero_point = None if self.zero_point is None else self.zero_point[:, column].reshape(-1, 1)
        qparams = QParams(self.scale[:, column].reshape(-1, 1), zero_point, self.codebook)
        return simulate(values.reshape(-1, 1), self.spec, qparams).view(values.shape)

    def refit(self, values: Tensor, column: int, observer: str) -> None:
        """Take the scales of the columns from ``column`` on from their ``values [groups, n, o]``, in place."""
        found = weight_qparams(values.mT.flatten(0, 1), self.spec, observer)
        part = slice(column, column + values.shape[1])
        self.scale[:, part] = found.scale.view(len(values), 1, -1)
        if self.zero_point is not None and found.zero_point is not None:
            self.zero_point[:, part] = found.zero_point.view(len(values), 1, -1)

    def grouped(self, values: Tensor) -> Tensor:
        """One value per group of columns, ``[o, k / size]``, of a scale or zero point of this grid."""
        return values[0, :: self.size].t()
