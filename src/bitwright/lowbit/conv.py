"""`LowbitConv`: the shipped 1-d or 2-d convolution."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bitwright.kernels.reference import Geometry
from bitwright.kernels.row import Activation
from bitwright.lowbit.layer import LowbitLayer
from bitwright.numerics.qtensor import QTensor


class LowbitConv(LowbitLayer):
    """``[n, c, ...] -> [n, o, ...]`` from packed codes, bit for bit what `nn.conv` simulates.

    ``prepad`` holds (sizes, mode) of padding that is done on the float input (named padding, modes other than
    zeros), or None; ``spatial`` is 1 or 2.
    """

    op = "conv"

    def __init__(
        self,
        weight: QTensor,
        bias: Tensor | None,
        input: Activation | None,
        features: frozenset[str],
        geometry: Geometry,
        prepad: tuple[tuple[int, ...], str] | None,
    ) -> None:
        self.groups = geometry.groups
        super().__init__(weight, bias, input, features)
        self.geometry, self.prepad, self.spatial = geometry, prepad, len(weight.shape) - 2

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, float32; 2-d outputs are in channels-last memory."""
        if self.prepad is not None:
            input = F.pad(input, self.prepad[0], mode=self.prepad[1])
        batched = input.dim() == self.spatial + 2
        images = input if batched else input.unsqueeze(0)
        images = images.unsqueeze(2) if self.spatial == 1 else images
        out = self.kernel.run(images, self.constants, self.weight_spec, self.bias, self.input, self.geometry)
        out = out.squeeze(2) if self.spatial == 1 else out
        return out if batched else out.squeeze(0)
