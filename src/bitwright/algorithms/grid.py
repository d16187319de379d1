"""The grid of a layer's weight, column by column: what a method that walks over input columns rounds to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import simulate
from bitwright.numerics.spec import Granularity, QParams, QuantSpec
from bitwright.observe.fit import weight_qparams


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of a weight, ``[groups, n, o]``, and which of the n a column has: ``places [groups, k]``.

    ``spec`` is that of one column: each row has its own scale. ``size`` columns share a scale (0: all of a row do).
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor | None
    codebook: Tensor | None
    size: int
    places: Tensor

    @classmethod
    def of(cls, quantizer: Quantizer, weight: Tensor, groups: int) -> Grid:
        """The grid that a calibrated quantizer rounds ``weight [o, ...]`` to."""
        spec, qparams = quantizer.spec, quantizer.qparams
        assert qparams is not None
        size, k = spec.granularity.size, weight[0].numel()

        def spread(values: Tensor) -> Tensor:
            values = values if size else values.expand(len(weight), *values.shape[1:])
            return values.reshape(groups, len(weight) // groups, -1).mT.contiguous()

        zero_point = None if qparams.zero_point is None else spread(qparams.zero_point)
        column = QuantSpec(spec.format, Granularity("channel"), spec.symmetric)
        places = torch.arange(k) // (size or k)
        return cls(column, spread(qparams.scale), zero_point, qparams.codebook, size, places.expand(groups, k))

    def in_order(self, order: Tensor) -> Grid:
        """The grid of the columns ``order [groups, k]``."""
        return replace(self, places=self.places.gather(1, order))

    def of_rows(self, chosen: slice) -> Grid:
        """The grid of some output channels of each group, in the memory of this one."""
        zero_point = None if self.zero_point is None else self.zero_point[..., chosen]
        return replace(self, scale=self.scale[..., chosen], zero_point=zero_point)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """``values [groups, o]`` on the grid of a column."""

        def picked(table: Tensor) -> Tensor:
            if table.shape[1] == 1:
                return table.reshape(-1, 1)
            return table[torch.arange(len(table)), self.places[:, column]].reshape(-1, 1)

        zero_point = None if self.zero_point is None else picked(self.zero_point)
        qparams = QParams(picked(self.scale), zero_point, self.codebook)
        return simulate(values.reshape(-1, 1), self.spec, qparams).view(values.shape)

    def refit(self, values: Tensor, column: int, observer: str) -> None:
        """Take the scale that a column shares with others from their ``values [groups, n, o]``, in place."""
        found, place = weight_qparams(values.mT.flatten(0, 1), self.spec, observer), int(self.places[0, column])
        self.scale[:, place] = found.scale.view(len(values), -1)
        if self.zero_point is not None and found.zero_point is not None:
            self.zero_point[:, place] = found.zero_point.view(len(values), -1)
