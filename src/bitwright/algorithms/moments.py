"""Second moments of the rows that a layer's weight multiplies, streamed over the calibration batches.

Every fifth example is kept apart, so that what is fitted to the others can be judged on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.algorithms.layers import Layer, NotApplicableError, check_rows, rows_of
from bitwright.nn.layer import QLayer
from bitwright.observe import ranks

ROWS = 2**16  # more rows of one layer are thinned out to about so many
_APART = 5  # every fifth example is kept apart
_PART = 2**24  # elements of rows that are built at a time
_FEW = 2**10  # the products of a layer with so few rows are computed in float64


@dataclass(frozen=True, slots=True)
class Moments:
    """Means over rows x: ``inputs = E[x x^T]`` and ``drift = E[(x_float - x) x^T]``, float64 ``[groups, k, k]``.

    ``x_float`` is the row that the float model has in the place of x; without drift the two count as equal.
    """

    inputs: Tensor
    drift: Tensor | None = None

    def error(self, weight: Tensor, found: Tensor) -> Tensor:
        """``E |W x_float - Q x|^2`` of each output channel, less what no Q changes; weights ``[groups, o, k]``.

        >>> moments = Moments(torch.eye(2, dtype=torch.float64).unsqueeze(0))
        >>> moments.error(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.5, 2.0]]])).tolist()
        [0.25]
        """
        change = (found - weight).double()
        error = (change @ self.inputs * change).sum(-1)
        if self.drift is not None:
            error -= 2 * (weight.double() @ self.drift * change).sum(-1)
        return error.flatten()


@torch.no_grad()
def moments(layer: Layer, *, drift: bool) -> tuple[Moments, Moments]:
    """Moments of the examples to fit and of those kept apart; of all rows twice where these are fewer than five.

    An example is an entry of axis 0 of the input, or a row where there are fewer than five of those. Of layers with
    more than `ROWS` rows, evenly spaced ones are used. Raises `NotApplicableError` for inputs that are not finite and
    for layers whose rows are not built.
    """
    module, outputs = layer.module, len(layer.weight)
    check_rows(module)
    rows = sum(out.numel() for out in layer.float_outputs()) // outputs
    examples = sum(_examples(module, x) for x in layer.float_inputs())
    total, all_examples = ranks.sums(rows, examples)
    step = (total // (ROWS + 1)) | 1  # odd: it meets all columns of images whose width is even
    dtype = torch.float64 if total <= _FEW else torch.float32
    few = all_examples < _APART
    sums, counts, start = [Tensor(), Tensor()], [0, 0], ranks.before(rows if few else examples)
    for x, wanted, out in zip(layer.inputs(), layer.float_inputs(), layer.float_outputs(), strict=True):
        count = out.numel() // outputs
        each = 1 if few else count // _examples(module, x)
        apart = (start + torch.arange(count) // each) % _APART == _APART - 1
        start += count // each
        for side, chosen in enumerate((~apart, apart)):
            at = chosen.nonzero().flatten()[::step]
            if len(at):
                found = _products(module, (x, wanted - x) if drift else (x,), at, dtype)
                sums[side] = sums[side] + found if counts[side] else found
                counts[side] += len(at)
    sums, counts = [ranks.total(found) for found in sums], ranks.sums(*counts)
    if not counts[1]:
        sums[1], counts[1] = sums[0], counts[0]
    if not all(bool(found.isfinite().all()) for found in sums):
        raise NotApplicableError("its inputs are not finite")
    fit, other = (Moments(*(found / count).unbind()) for found, count in zip(sums, counts, strict=True))
    return fit, other


def _examples(module: QLayer, x: Tensor) -> int:
    return len(x) if x.dim() >= module.weight.dim() else 1


def _products(module: QLayer, sides: tuple[Tensor, ...], at: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the rows ``at`` of ``x x^T`` and ``(x_float - x) x^T``, ``[1 or 2, groups, k, k]`` float64."""
    size = max(1, _PART // (module.as_rows(module.weight)[0].numel() * int(getattr(module, "groups", 1))))
    total: Tensor | float = 0.0
    for part in at.split(size):
        rows = [rows_of(module, side, part).to(dtype) for side in sides]
        total = total + torch.stack([side.mT @ rows[0] for side in rows]).double()
    assert isinstance(total, Tensor)
    return total
