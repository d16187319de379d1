"""Second moments of the rows that a layer's weight multiplies, streamed over the calibration batches.

Every fifth example is kept apart, so that what is fitted to the others can be judged on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.algorithms.layers import Layer, NotApplicableError, check_rows, rows_of
from bitwright.nn.conv import as_images, geometry_of, pad
from bitwright.nn.layer import QLayer
from bitwright.nn.library import QInOutLinear
from bitwright.observe import ranks

ROWS = 2**16  # more rows of one layer are thinned out to about so many
BLOCK = 256  # columns of a symmetric matrix that are computed together
_APART = 5  # every fifth example is kept apart
_PART = 2**22  # elements of rows that are built at a time
_FEW = 2**10  # the products of a layer with so few rows are computed in float64
_LARGE = 2**22  # sums of more elements are float32


@dataclass(frozen=True, slots=True)
class Moments:
    """Means over rows x: ``inputs = E[x x^T]``, ``[groups, k, k]``, and ``shift = W E[(x_float - x) x^T]``,
    ``[groups, o, k]``; each in float64, or in float32 where it has more than 4 million elements.

    ``x_float`` is the row that the float model has in the place of x; without shift the two count as equal.
    """

    inputs: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Split:
    """Which examples are kept apart: every fifth, or every fifth row where there are ``few`` examples."""

    few: bool
    start: int
    total: int

    @classmethod
    def of(cls, layer: Layer) -> _Split:
        module = layer.module
        check_rows(module)
        rows = sum(out.numel() for out in layer.float_outputs()) // len(layer.weight)
        examples = sum(_examples(module, x) for x in layer.float_inputs())
        total, all_examples = ranks.sums(rows, examples)
        few = all_examples < _APART
        return cls(few, ranks.before(rows if few else examples), total)

    def side(self, layer: Layer, *, apart: bool, step: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs, float inputs and which of their rows to take (None: all) of one side, every ``step``-th row."""
        module, weight, start = layer.module, layer.weight, self.start
        width = weight[0].numel() * _groups(module)
        for x, wanted, out in zip(layer.inputs(), layer.float_inputs(), layer.float_outputs(), strict=True):
            rows = out.numel() // len(weight)
            if not rows:
                continue
            examples = _examples(module, x)
            count = rows if self.few else examples
            chosen = (((start + torch.arange(count)) % _APART == _APART - 1) == apart).nonzero().flatten()
            start += count
            if self.few and len(chosen):
                yield x, wanted, chosen[::step]
            if self.few:
                continue
            shape, each = (examples, *x.shape[x.dim() >= weight.dim() :]), rows // examples
            for part in chosen.split(max(1, _PART * step // (each * width))):
                if len(part):
                    at = torch.arange(0, len(part) * each, step) if step > 1 else None
                    yield x.reshape(shape)[part], wanted.reshape(shape)[part], at


@torch.no_grad()
def moments(layer: Layer, *, drift: bool) -> Moments:
    """Moments of the examples to fit; ``shift`` only with ``drift``.

    An example is an entry of axis 0 of the input, or a row where there are fewer than five of those. Of layers with
    more than `ROWS` rows, evenly spaced ones are used. Raises `NotApplicableError` for inputs that are not finite and
    for layers whose rows are not built.
    """
    module, weight, split = layer.module, layer.weight, _Split.of(layer)
    step = (split.total // (ROWS + 1)) | 1  # odd: it meets all columns of images whose width is even
    dtype = torch.float64 if split.total <= _FEW else torch.float32
    groups, k = _groups(module), weight[0].numel()
    sums, shift = _zeros(groups, k, k), _zeros(groups, len(weight) // groups if drift else 0, k)
    count = 0
    for x, wanted, at in split.side(layer, apart=False, step=step):
        rows = rows_of(module, x, at).to(dtype)
        add_square(sums, rows)
        if drift:
            change = outputs_of(module, wanted - x, weight, at).unflatten(1, (groups, -1)).transpose(0, 1)
            shift += change.mT.to(dtype) @ rows
        count += rows.shape[1]
    sums, shift, [count] = ranks.total(sums), ranks.total(shift), ranks.sums(count)
    found = Moments(symmetric(sums.div_(count)), shift.div_(count) if drift else None)
    if not (found.inputs.diagonal(dim1=1, dim2=2).isfinite().all() and shift.isfinite().all()):
        raise NotApplicableError("its inputs are not finite")
    return found


@torch.no_grad()
def errors(layer: Layer, candidates: Sequence[Tensor], *, drift: bool) -> Tensor:
    """Sums over the rows kept apart of ``|W x_float - Q x|^2``, without ``drift`` of ``|W x - Q x|^2``.

    ``[len(candidates), o]``, float64, for candidates Q of the shape of the weight. Where there are fewer than five rows
    these are the ones that were fitted to.
    """
    module, weight, split = layer.module, layer.weight, _Split.of(layer)
    sums, seen = torch.zeros(len(candidates), len(weight), dtype=torch.float64), 0
    for apart in (True, False):
        for x, wanted, at in split.side(layer, apart=apart):
            for i, candidate in enumerate(candidates):
                noise = outputs_of(module, x, weight - candidate, at)
                if drift:
                    noise += outputs_of(module, wanted - x, weight, at)
                sums[i] += noise.square().sum(0)
            seen += 1
        sums, [seen] = ranks.total(sums), ranks.sums(seen)
        if seen:
            break
    return sums


def outputs_of(module: QLayer, x: Tensor, weight: Tensor, at: Tensor | None) -> Tensor:
    """The layer's float product of an input with ``weight [o, ...]``, no bias: the rows ``at`` of ``[rows, o]``."""
    if isinstance(module, (nn.Linear, QInOutLinear)):
        out = F.linear(x, weight)
    else:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d))
        images, kernel = as_images(module, pad(module, x))[0], weight.unsqueeze(2) if weight.dim() == 3 else weight
        geometry = geometry_of(module)
        out = F.conv2d(
            images, kernel, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        ).permute(0, 2, 3, 1)
    out = out.reshape(-1, len(weight))
    return out if at is None else out[at]


def add_square(sums: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to the lower triangle of ``sums [groups, k, k]``, in place; rows ``[groups, n, k]``."""
    for start in range(0, sums.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        if sums.dtype == rows.dtype:
            sums[:, start:, block].baddbmm_(rows[..., start:].mT, rows[..., block])
        else:
            sums[:, start:, block] += rows[..., start:].mT @ rows[..., block]


def symmetric(lower: Tensor) -> Tensor:
    """Copy the lower triangle of ``[groups, k, k]`` over the upper one, in place.

    >>> symmetric(torch.tensor([[[1.0, 7.0], [2.0, 3.0]]])).tolist()
    [[[1.0, 2.0], [2.0, 3.0]]]
    """
    for start in range(0, lower.shape[-1], BLOCK):
        stop = start + BLOCK
        block = lower[:, start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)
        lower[:, start:stop, stop:] = lower[:, stop:, start:stop].mT
    return lower


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64 if math.prod(shape) <= _LARGE else torch.float32)


def _examples(module: QLayer, x: Tensor) -> int:
    return len(x) if x.dim() >= module.weight.dim() else 1


def _groups(module: QLayer) -> int:
    return int(getattr(module, "groups", 1))
