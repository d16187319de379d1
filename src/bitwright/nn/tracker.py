"""`Tracker`: the mean of batch extremes that a range follows in training.

``r <- a r + (1 - a) r_batch`` with ``a`` = 0.99 remembers about the last 69 batches (Jacob 2018, section 3.1). The
calibrated range is the first r, so nothing starts from zero. All ranks of a distributed run use the extremes of the
whole batch, so all of them must run the forward, as with synchronised batch norm.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.observe.ranks import all_reduce


class Tracker(nn.Module):
    """Buffer ``ends``, float32 ``[2]``: the moving average of the smallest and the largest value.

    Written with tensor operations only, so that it can be compiled. A batch with values that are not finite moves
    nothing.
    """

    ends: Tensor
    publishes = True
    """Whether every training forward sets the range to ``ends``."""

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("ends", torch.zeros(2))

    def start(self, ends: Tensor) -> None:
        """Begin anew from a range ``[low, high]``."""
        self.ends.copy_(ends)

    def update(self, x: Tensor, consumers: int) -> None:
        """Take in one batch; a tensor that ``consumers`` layers read comes that often, and counts once."""
        batch = _agreed(_extremes(x))
        decay = self.decay ** (1.0 / consumers)
        moved = decay * self.ends + (1 - decay) * batch
        self.ends.copy_(torch.where(batch.isfinite().all(), moved, self.ends))


def range_ends(qparams: QParams, spec: QuantSpec) -> Tensor:
    """The range ``[low, high]`` from which `affine.choose_qparams` makes these parameters of a whole tensor.

    >>> range_ends(QParams(torch.tensor([0.5])), QuantSpec.parse("int4")).tolist()
    [-3.5, 3.5]
    >>> range_ends(QParams(torch.tensor([0.5]), torch.tensor([3.0])), QuantSpec.parse("uint4/asym")).tolist()
    [-1.5, 6.0]
    """
    fmt, scale = spec.format, qparams.scale
    if qparams.zero_point is not None:
        return torch.cat([(fmt.qmin - qparams.zero_point) * scale, (fmt.qmax - qparams.zero_point) * scale])
    high = fmt.largest * scale
    unsigned = fmt.is_integer and fmt.qmin >= 0
    return torch.cat([0.0 * high if unsigned else -high, high])


def _extremes(x: Tensor) -> Tensor:
    if not x.numel():
        return torch.tensor([torch.inf, -torch.inf], device=x.device)
    return torch.stack(x.aminmax()).float()


def _agreed(ends: Tensor) -> Tensor:
    """The smallest and the largest over all ranks."""
    outward = ends * ends.new_tensor([-1.0, 1.0])
    all_reduce(outward, dist.ReduceOp.MAX)
    return outward * ends.new_tensor([-1.0, 1.0])
