"""What methods that work on one layer share: the layer with its rows, its targets, and how new codes are written.

A layer's weight is seen as it is encoded: batch norm folded in, output channel first (`QLayer.folded`). Writing goes
the other way. A weight that lies on the grid of its scale encodes to the same codes afterwards, whatever the fold's
rounding does to it, because grid points are the centres of their cells; `write_weight` checks that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.algorithms.lockstep import Visit
from bitwright.errors import BitwrightError
from bitwright.nn.conv import as_images, geometry_of, pad
from bitwright.nn.layer import QLayer
from bitwright.nn.library import QInOutLinear
from bitwright.nn.norm import factor_of
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import encode, simulate
from bitwright.observe import ranks


class NotApplicableError(BitwrightError):
    """A method cannot work on a layer; the text is the reason that the report gives."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer whose turn it is: path, module, and the calls that reach it on this rank."""

    visit: Visit
    module: QLayer

    @property
    def path(self) -> str:
        """Where the layer stands in the model."""
        return self.visit.path

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of its weight; raises `NotApplicableError` for a layer whose weight stays float."""
        if self.module.weight_quantizer is None:
            raise NotApplicableError("its weight stays float")
        return self.module.weight_quantizer

    @property
    def weight(self) -> Tensor:
        """The weight as it is encoded, ``[o, ...]``, detached."""
        return self.module.folded()[0].detach()

    def inputs(self) -> Iterator[Tensor]:
        """Its input per batch, from the quantized prefix and as the layer's own input quantizer passes it on."""
        quantizer = self.module.input_quantizer
        for call in self.visit.calls:
            x = _first(call.args, call.kwargs)
            yield x if quantizer is None else quantizer.simulate(x).detach()

    def raw_inputs(self) -> Iterator[Tensor]:
        """Its input per batch, from the quantized prefix, before its own input quantizer."""
        return (_first(call.args, call.kwargs) for call in self.visit.calls)

    def float_inputs(self) -> Iterator[Tensor]:
        """Its input per batch in the float model."""
        return (_first(call.float_args, call.float_kwargs) for call in self.visit.calls)

    def float_outputs(self) -> Iterator[Tensor]:
        """Its output per batch in the float model: what it should compute."""
        return (call.float_output for call in self.visit.calls)

    def outputs(self) -> Iterator[Tensor]:
        """What it computes now per batch, simulated."""
        return (self.module(*call.args, **call.kwargs).detach() for call in self.visit.calls)

    def error(self) -> float:
        """Mean squared error of its output, relative to the mean square of the float output."""
        noise = power = 0.0
        for found, wanted in zip(self.outputs(), self.float_outputs(), strict=True):
            noise += (found - wanted).square().sum().item()
            power += wanted.square().sum().item()
        noise, power = ranks.sums(noise, power)
        return noise / max(power, 1e-30)


def _first(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


def rows_of(module: QLayer, x: Tensor, at: Tensor | None = None) -> Tensor:
    """The rows that the layer's weight rows are multiplied with, ``[groups, rows, k]``; k as in ``weight [o, k]``.

    With ``at`` only the rows of these indices, which is all that is built then. Raises `NotApplicableError` for
    transposed and 3-d convolutions.
    """
    if isinstance(module, (nn.Linear, QInOutLinear)):
        rows = x.reshape(1, -1, x.shape[-1])
        return rows if at is None else rows[:, at]
    check_rows(module)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    geometry = geometry_of(module)
    (rows_pad, columns_pad), images = geometry.padding, as_images(module, pad(module, x))[0]
    windows = F.pad(images, (columns_pad, columns_pad, rows_pad, rows_pad))
    for axis, stride, width, step in zip((2, 3), geometry.stride, geometry.kernel_size, geometry.dilation, strict=True):
        windows = windows.unfold(axis, step * (width - 1) + 1, stride)[..., ::step]
    windows = windows.unflatten(1, (geometry.groups, -1)).permute(0, 3, 4, 1, 2, 5, 6)  # [n, h, w, groups, c, kh, kw]
    places = windows.shape[:3]
    picked = windows if at is None else windows[torch.unravel_index(at, places)]
    return picked.reshape(-1, geometry.groups, windows.shape[4:].numel()).transpose(0, 1)


def check_rows(module: QLayer) -> None:
    """Raise `NotApplicableError` for a layer whose rows `rows_of` does not build."""
    if not isinstance(module, (nn.Linear, QInOutLinear, nn.Conv1d, nn.Conv2d)):
        raise NotApplicableError(f"rows of a {type(module).__name__} are not built")


@torch.no_grad()
def write_weight(module: QLayer, weight: Tensor, quantizer: Quantizer) -> None:
    """Store ``weight [o, ...]``, values on the grid of the quantizer, so that the layer encodes exactly its codes.

    The batch norm is divided out again; channels whose norm multiplies by 0 are left alone.
    """
    stored, shape = weight, (-1, *[1] * (weight.dim() - 1))
    if module.norm:
        factor = factor_of(module.norm[0]).view(shape)
        weight = torch.where(factor == 0, module.folded()[0], weight)
        stored = torch.where(factor == 0, module.as_rows(module.weight), (weight.double() / factor).float())
    qparams = quantizer.qparams
    assert qparams is not None
    wanted = encode(weight, quantizer.spec, qparams)
    module.weight.copy_(module.from_rows(stored))
    if not torch.equal(encode(module.folded()[0], quantizer.spec, qparams), wanted):
        raise AssertionError(f"{quantizer.site}: codes changed while they were written")


@torch.no_grad()
def add_to_bias(module: QLayer, change: Tensor) -> None:
    """Add ``change [o]`` to the layer's output per channel; raises `NotApplicableError` where there is no bias."""
    held = module.norm[0].bias if module.norm else module.bias
    if held is None:
        raise NotApplicableError("it has no bias")
    held.add_(change.to(held.dtype))


def nearest(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """``weight`` on the quantizer's grid by rounding to nearest."""
    qparams = quantizer.qparams
    assert qparams is not None
    return simulate(weight, quantizer.spec, qparams)
