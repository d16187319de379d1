"""What quantization did to the statistics of a layer, put right without moving a code.

A factor per output channel goes into the scales of the weight (and into the batch norm, so that the float weight
follows), a shift into the bias. Statistics are those of all calibration batches at once, not averages over batches.

=============== ================================================== ==============================================
method          output per channel                                 what it needs
=============== ================================================== ==============================================
bn_reestimation mean ``beta``, spread ``|gamma|``: the norm again   a folded norm (Sun 2019; Hubara 2020, 2006.10518)
affine_repair   ``(y - mu_q) sigma / sigma_q + mu``                 the float model's mu and sigma on the same data
=============== ================================================== ==============================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.algorithms.bias import channels_last, rounding_of_bias
from bitwright.algorithms.layers import Layer, NotApplicableError, add_to_bias, write_weight
from bitwright.nn.norm import factor_of
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import decode, encode
from bitwright.numerics.spec import QParams
from bitwright.observe import ranks
from bitwright.observe.observer import make_observer
from bitwright.plan.step import Value

_NARROWER = 0.95
_LARGEST = 2.0  # a channel that would need a larger factor is broken in another way


@torch.no_grad()
def bn_reestimation(layer: Layer, options: Mapping[str, Value]) -> None:
    """Take the running statistics of the folded norm from the quantized layer's outputs (variance unbiased, as torch).

    With ``y = (a - mean) f + beta`` the statistics of a follow from those of y. Channels of gamma 0 keep theirs; the
    spread of a channel changes by at most a factor of 2.
    """
    module = layer.module
    _check_scales(layer)
    if not module.norm:
        raise NotApplicableError("no batch norm is folded into it")
    [norm] = module.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    (mean, var, count), factor = _moments(layer.outputs(), layer), factor_of(norm)
    mean = mean - rounding_of_bias(module)
    beta = 0.0 if norm.bias is None else norm.bias.double()
    alive = factor != 0
    own_mean = torch.where(alive, (mean - beta) / factor + norm.running_mean, norm.running_mean.double())
    own_var = torch.where(alive, var * (count / max(count - 1, 1)) / factor.square(), norm.running_var.double())
    old = norm.running_var.double() + norm.eps
    ratio = _within((old / (own_var + norm.eps)).sqrt())

    def change() -> None:
        norm.running_mean.copy_(own_mean)  # type: ignore[union-attr]
        norm.running_var.copy_(old / ratio.square() - norm.eps)  # type: ignore[union-attr]

    _with_rows_scaled(layer, ratio, change)


@torch.no_grad()
def affine_repair(layer: Layer, options: Mapping[str, Value]) -> None:
    """Give each output channel the mean and the spread that it has in the float model.

    A channel whose quantized output is constant keeps its spread; others change theirs by at most a factor of 2.
    """
    module = layer.module
    _check_scales(layer)
    if module.norm and module.norm[0].weight is None:
        raise NotApplicableError("its batch norm has no gamma and beta")
    add_to_bias(module, torch.zeros(1, device=module.weight.device))  # raises where there is no bias
    (mean, var, _), (wanted, wanted_var, _) = (_moments(y, layer) for y in (layer.outputs(), layer.float_outputs()))
    ratio = _within((wanted_var / var).sqrt())
    bias = module.folded()[1]
    assert bias is not None
    shift = wanted - ratio * (mean - bias.double() - rounding_of_bias(module))

    def change() -> None:
        if module.norm:
            gamma = module.norm[0].weight
            gamma.copy_(gamma * ratio)
        else:
            rows = module.as_rows(module.weight)
            module.weight.copy_(module.from_rows(rows * ratio.view(-1, *[1] * (rows.dim() - 1))))

    _with_rows_scaled(layer, ratio, change)
    scaled = module.folded()[1]
    assert scaled is not None
    add_to_bias(module, shift - scaled.double())


@torch.no_grad()
def ranges(layer: Layer, options: Mapping[str, Value]) -> None:
    """Choose the range of the layer's input again, from what the quantized layers before it produce now.

    With ``by_output`` the range found so far is made narrower or wider while the error of the layer's output falls.
    """
    quantizer = layer.module.input_quantizer
    if quantizer is None:
        raise NotApplicableError("its input stays float")
    if quantizer.spec.dynamic:
        raise NotApplicableError("its input takes its range from each live tensor")
    if options["by_output"]:
        _by_output(layer, quantizer)
        return
    observer = make_observer(quantizer.observer_name)
    for x in layer.raw_inputs():
        observer.update(x)
    observer.reduce()
    quantizer.set_qparams(observer.qparams(quantizer.spec))


def _by_output(layer: Layer, quantizer: Quantizer) -> None:
    """Multiply the input's scale by 0.95 or by its reciprocal while that lowers the error of the output."""
    if quantizer.consumers > 1:
        raise NotApplicableError(f"{quantizer.consumers} readers share the range of its input")
    if quantizer.spec.scale is not None or not quantizer.spec.format.is_scaled:
        raise NotApplicableError(f"scales of {quantizer.spec} cannot take any value")
    best, least = quantizer.qparams, layer.error()
    assert best is not None
    for factor in (_NARROWER, 1 / _NARROWER):
        while True:
            quantizer.set_qparams(replace(best, scale=best.scale * factor))
            error = layer.error()
            if not error < least:
                break
            least, best = error, replace(best, scale=best.scale * factor)
    quantizer.set_qparams(best)


def _check_scales(layer: Layer) -> None:
    """Raise `NotApplicableError` unless every output channel has weight scales of its own."""
    spec = layer.quantizer.spec
    if spec.granularity.kind not in ("channel", "group"):
        raise NotApplicableError("one scale serves all channels of its weight")
    if spec.scale is not None or not spec.format.is_scaled:
        raise NotApplicableError(f"weight scales of {spec} cannot take any value")


def _with_rows_scaled(layer: Layer, ratio: Tensor, change: Callable[[], None]) -> None:
    """Scale the rows of the float weight by ``change`` and the weight scales by the same ``ratio``; codes stay."""
    module, quantizer = layer.module, layer.quantizer
    before = quantizer.raw_qparams
    assert before is not None
    codes = encode(module.folded()[0], quantizer.spec, before)
    change()
    scale = before.scale * ratio.view(-1, *[1] * (before.scale.dim() - 1))
    quantizer.move_to(QParams(scale.float(), before.zero_point, before.codebook))
    after = quantizer.raw_qparams
    assert after is not None
    if not torch.equal(encode(module.folded()[0], quantizer.spec, after), codes):  # a weight on the edge of its cell
        write_weight(module, decode(codes, quantizer.spec, after), quantizer)


def _within(ratio: Tensor) -> Tensor:
    """Factors of channels without spread are 1, others lie in [1/2, 2]."""
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).clamp(1 / _LARGEST, _LARGEST)


_Part = tuple[int, Tensor, Tensor]  # number of rows, their mean, their sum of squares about it


def _moments(outputs: Iterable[Tensor], layer: Layer) -> tuple[Tensor, Tensor, int]:
    """Mean and (biased) variance per output channel over all batches of all ranks, float64 ``[o]``; number of rows."""
    own = _merged(_part(channels_last(out, layer).double()) for out in outputs)
    count, mean, squares = _merged(ranks.gathered(own))
    if not count:
        raise NotApplicableError("no batch reached it")
    return mean, squares / count, count


def _part(rows: Tensor) -> _Part:
    mean = rows.mean(0)
    return len(rows), mean, (rows - mean).square().sum(0)


def _merged(parts: Iterable[_Part]) -> _Part:
    """Chan's rule, part after part."""
    count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for more, own_mean, own_squares in parts:
        if not more:
            continue
        delta, total = own_mean - mean, count + more
        squares = squares + own_squares + delta.square() * (count * more / total)
        mean, count = mean + delta * (more / total), total
    return count, mean, squares
