"""`QConv1d`, `QConv2d` and `QConv3d`: convolutions that compute with codes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.kernels.reference import Geometry
from bitwright.nn.layer import QLayer


def geometry_of(conv: nn.Conv1d | nn.Conv2d) -> Geometry:
    """The 2-d geometry of a convolution whose input went through `pad`; a 1-d one has height 1.

    >>> geometry_of(nn.Conv1d(4, 8, 3, padding=1)).padding
    (0, 1)
    """
    inside = isinstance(conv.padding, tuple) and conv.padding_mode == "zeros"
    padding = conv.padding if inside else (0,) * len(conv.kernel_size)

    def two(values: Any, fill: int) -> tuple[int, int]:
        values = tuple(int(value) for value in values)
        return (fill, *values) if len(values) == 1 else values

    return Geometry(two(conv.kernel_size, 1), two(conv.stride, 1), two(padding, 0), two(conv.dilation, 1), conv.groups)


def prepad_of(conv: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, ...], str] | None:
    """Sizes and mode of the padding that must be done before a convolution, None where it pads zeros by itself.

    >>> prepad_of(nn.Conv2d(3, 4, (1, 2), padding="same"))
    ((0, 1, 0, 0), 'constant')
    """
    if isinstance(conv.padding, tuple) and conv.padding_mode == "zeros":
        return None
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return tuple(conv._reversed_padding_repeated_twice), mode


def pad(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Pad ``x`` where the convolution itself cannot: named padding (``same``) and modes other than zeros."""
    prepad = prepad_of(conv)
    return x if prepad is None else F.pad(x, prepad[0], mode=prepad[1])


class _QConv(QLayer):
    """The forward of all: 1-d inputs are treated as images of height 1."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """``[n, c, ...] -> [n, o, ...]`` (a missing batch axis is allowed, as in `nn.Conv2d`)."""
        weight, bias = self.operands()
        quantize_weight, quantize_input = self.weight_quantizer, self.input_quantizer
        if not self.simulating:
            if quantize_input is not None:
                quantize_input.observe(input)
            return self.normalized(self._conv_forward(input, weight, bias))
        if not self.integer_product:
            values = input if quantize_input is None else quantize_input.simulate(input)
            out = self._conv_forward(values, quantize_weight.simulate(weight), bias)
        else:
            images, restore = as_images(self, pad(self, input))
            out = restore(self.product(images, weight, self.on_grid(bias), geometry_of(self)))
        return self.normalized(out)


def as_images(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, Any]:
    """``x`` as ``[n, c, h, w]`` and the function that takes the result back to the layout of ``x``."""
    spatial = len(conv.kernel_size)
    batched = x.dim() == spatial + 2
    images = x if batched else x.unsqueeze(0)
    images = images.unsqueeze(2) if spatial == 1 else images

    def restore(out: Tensor) -> Tensor:
        out = out.squeeze(2) if spatial == 1 else out
        return out if batched else out.squeeze(0)

    return images, restore


class QConv1d(_QConv, nn.Conv1d):
    """`nn.Conv1d` on codes."""


class QConv2d(_QConv, nn.Conv2d):
    """`nn.Conv2d` on codes."""


class QConv3d(_QConv, nn.Conv3d):
    """`nn.Conv3d` on codes."""
