"""Shapes of convolutions and the memory of their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitwright.errors import KernelError


def conv2d_sizes(
    x: Sequence[int], o: int, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:  # fmt: skip
    """The shape ``[n, o, h', w']`` that a convolution makes of ``[n, c, h, w]``."""
    if stride[0] < 1 or stride[1] < 1:
        raise KernelError(f"conv2d: stride must be positive, got {list(stride)}")
    n, _, h, w = x
    span_h, span_w = (kernel_size[0] - 1) * dilation[0] + 1, (kernel_size[1] - 1) * dilation[1] + 1
    ho = (h + 2 * padding[0] - span_h) // stride[0] + 1
    wo = (w + 2 * padding[1] - span_w) // stride[1] + 1
    if ho < 1 or wo < 1:
        raise KernelError(f"conv2d: a filter that spans {span_h} x {span_w} does not fit an image of {h} x {w}")
    return n, o, ho, wo


def conv2d_out(
    x: Tensor, o: int, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """An empty result of a convolution, in channels-last memory; raises `KernelError` for impossible shapes."""
    sizes = conv2d_sizes(x.shape, o, kernel_size, stride, padding, dilation)
    return torch.empty(sizes, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
