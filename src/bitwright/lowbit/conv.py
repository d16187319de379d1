"""`LowbitConv`: the shipped 1-d or 2-d convolution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.kernels.conv_sizes import conv2d_sizes
from bitwright.kernels.images import encoding_of, filters_of
from bitwright.kernels.reference import Geometry
from bitwright.kernels.row import Activation
from bitwright.lowbit.deferred import Asked, Call, Deferred, bytes_of, may_wait, ordinary, sizes_of
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
        self.geometry, self.prepad, self.spatial = geometry, prepad, len(weight.shape) - 2
        super().__init__(weight, bias, input, features)
        self.asked = Asked()
        self.register_load_state_dict_post_hook(_gather_again)

    def lay_out(self, weight: QTensor, *, copied: bool = False) -> None:
        """Hold another weight, and gather what its kernel reads."""
        super().lay_out(weight, copied=copied)
        self._gather()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._gather()
        return self

    def _gather(self) -> None:
        """Constants and the encoding of the input as the kernel for images takes them; None where it cannot serve."""
        self.encoding, self.filters = None, None
        images = self.kernel.run_images is not None and self.spatial == 2 and self.prepad is None
        if images and not self.kernel_layout.is_meta:
            self.encoding = encoding_of(self.input)
        if self.encoding is not None:
            self.filters = filters_of(self.constants, self.weight_spec, self.bias, self.encoding, self.geometry)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, float32; 2-d outputs are in channels-last memory and may be a `Deferred`."""
        if self.filters is not None and may_wait(input) and sizes_of(input)[1] == self.shape[1] * self.groups:
            return self._deferred(input)
        input = ordinary(input)
        if self.prepad is not None:
            input = F.pad(input, self.prepad[0], mode=self.prepad[1])
        batched = input.dim() == self.spatial + 2
        images = input if batched else input.unsqueeze(0)
        images = images.unsqueeze(2) if self.spatial == 1 else images
        out = self.kernel.run(images, self.constants, self.weight_spec, self.bias, self.input, self.geometry)
        out = out.squeeze(2) if self.spatial == 1 else out
        return out if batched else out.squeeze(0)

    def _deferred(self, input: Tensor) -> Tensor:
        assert self.encoding is not None
        assert self.kernel.run_images is not None
        shape, g = sizes_of(input), self.geometry
        sizes = conv2d_sizes(shape, self.shape[0], g.kernel_size, g.stride, g.padding, g.dilation)
        image = bytes_of(input, self.encoding)
        return Deferred(Call(partial(self.kernel.run_images, self.filters, image, shape, sizes), self.asked), sizes)


def _gather_again(layer: nn.Module, incompatible: object) -> None:
    assert isinstance(layer, LowbitConv)
    layer._gather()
