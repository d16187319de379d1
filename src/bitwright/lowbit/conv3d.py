"""`LowbitConv3d`: the shipped volume convolution."""

from __future__ import annotations

from bitwright.lowbit.conv import LowbitConv


class LowbitConv3d(LowbitConv):
    """``[n, c, d, h, w] -> [n, o, d', h', w']`` from packed codes, bit for bit what `QConv3d` simulates."""

    op = "conv3d"
