"""GPTQ (Frantar 2023): the codes of a layer column by column, each column's error made up for by those still to come.

With rows x of the layer's input, rounding ``W`` to ``Q`` costs ``E |W x - Q x|^2 = tr((Q - W) H (Q - W)^T)``, where
``H = E[x x^T]``. Column i is rounded to nearest; its error times ``U_ij / U_ii`` is taken from every later column j,
with ``H^-1 = U^T U`` and U upper triangular: what is best for the columns that are still free (section 3).

With ``match_float`` the layer should reproduce what the float model computes from its own inputs instead:
``E |W x_float - Q x|^2``. The weight first moves to ``W + W E[(x_float - x) x^T] (H + damping)^-1``, the float weight
that does so best, and the sweep starts there.

An output channel takes its new codes only where they are better than rounding to nearest on examples kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.algorithms.grid import Grid
from bitwright.algorithms.layers import Layer, NotApplicableError, nearest, write_weight
from bitwright.algorithms.moments import Moments, moments
from bitwright.errors import PlanError
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.step import Value

COLUMNS = 128  # swept at a time; what they change in later columns is one product
_LEAST = 1e-8  # a damping of 0 that is too little becomes this


@torch.no_grad()
def gptq(layer: Layer, options: Mapping[str, Value]) -> str:
    """Choose the codes of a layer's weight; returns how many channels stay rounded to nearest, if any.

    Options: ``damping`` is added to the diagonal of H, as a share of its mean; ``act_order`` sweeps the columns by
    falling ``H_ii`` (each keeps its scale); ``match_float``: see above; ``rescale`` finds the scale of a group anew
    when the sweep reaches it. Raises `NotApplicableError` where nothing becomes better, for layers whose rows are not
    built, and where options do not fit; `PlanError` for a damping below 0.
    """
    damping, act_order, rescale = float(options["damping"]), bool(options["act_order"]), bool(options["rescale"])
    if not (math.isfinite(damping) and damping >= 0):
        raise PlanError(f"step gptq: damping must be a number of at least 0, got {damping}")
    quantizer, weight = layer.quantizer, layer.weight
    if rescale:
        _check_rescale(quantizer.spec, act_order=act_order)
    fit, apart = moments(layer, drift=bool(options["match_float"]))
    rows = weight.reshape(len(fit.inputs), -1, fit.inputs.shape[-1])
    grid = Grid.of(quantizer, weight, len(rows))
    found = solve(fit, rows, grid, damping, act_order=act_order, observer=quantizer.observer_name if rescale else "")
    rounded = nearest(weight, quantizer)
    better = apart.error(rows, found) < apart.error(rows, rounded.reshape(rows.shape))
    better &= rows.any(-1).flatten()  # behind a channel of zeros may stand a norm that multiplies by 0
    if not better.any():
        raise NotApplicableError("rounding to nearest is as good on the examples kept apart")
    if rescale:
        _store(grid, quantizer, better)
    chosen = better.view(-1, *[1] * (weight.dim() - 1))
    write_weight(layer.module, torch.where(chosen, found.reshape(weight.shape), rounded), quantizer)
    kept = int((~better).sum())
    return f"{kept} of {len(better)} channels stay rounded to nearest" if kept else ""


def _check_rescale(spec: QuantSpec, *, act_order: bool) -> None:
    if act_order:
        raise NotApplicableError("rescale needs the columns of a group in sequence; set act_order to false")
    if spec.granularity.kind != "group" or spec.scale is not None:
        raise NotApplicableError(f"rescale needs groups with float scales, found {spec}")


def _store(grid: Grid, quantizer: Quantizer, chosen: Tensor) -> None:
    """Let the quantizer take the scales of the chosen channels from the grid."""
    qparams = quantizer.qparams
    assert qparams is not None
    scale, zero_point, at = grid.grouped(grid.scale), qparams.zero_point, chosen.view(-1, 1)
    if zero_point is not None and grid.zero_point is not None:
        zero_point = torch.where(at, grid.grouped(grid.zero_point), zero_point)
    quantizer.set_qparams(replace(qparams, scale=torch.where(at, scale, qparams.scale), zero_point=zero_point))


def solve(
    fit: Moments, weight: Tensor, grid: Grid, damping: float, *, act_order: bool = False, observer: str = ""
) -> Tensor:
    """Values on the grid for ``weight [groups, o, k]``, swept in the order of the columns or by falling ``H_ii``.

    With ``observer`` the grid's groups take their scales anew, in place.
    """
    hessian, columns = fit.inputs, weight.double()
    change = None if fit.drift is None else columns @ fit.drift
    order = torch.arange(weight.shape[-1]).expand(len(weight), -1)
    if act_order:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True)
        hessian = hessian.gather(1, order.unsqueeze(-1).expand_as(hessian))
        hessian = hessian.gather(2, order.unsqueeze(1).expand_as(hessian))
        grid = grid.in_order(order)
    at = order.unsqueeze(1).expand_as(weight)
    factor = inverse_factor(hessian, damping)
    columns = columns.gather(2, at)
    if change is not None:
        columns = columns + change.gather(2, at) @ factor.mT @ factor
    steps = factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    found = sweep(columns.mT.float(), steps.float(), grid, observer).mT
    return torch.empty_like(found).scatter_(2, at, found)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with ``U^T U = (H + damping mean(diag H))^-1``, for ``H [groups, k, k]``, float64.

    Columns that no row uses get a diagonal of 1 if damping leaves 0: they stay as they would be rounded alone. While
    the matrix of a group is not positive definite, its damping is multiplied by 10.

    >>> inverse_factor(torch.tensor([[[4.0, 0.0], [0.0, 16.0]]], dtype=torch.float64), 0.0)[0].tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    share = torch.full_like(mean, damping)
    while True:
        damped = hessian.clone()
        diagonal = damped.diagonal(dim1=1, dim2=2)
        diagonal += (share * mean).unsqueeze(-1)
        diagonal[diagonal == 0] = 1.0
        # the factor of the matrix read backwards: J H J = L L^T gives H^-1 = U^T U with U = J L^-1 J
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            break
        share = torch.where(failed > 0, (share * 10).clamp(min=_LEAST), share)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype).expand_as(hessian)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(1, 2)


def sweep(columns: Tensor, steps: Tensor, grid: Grid, observer: str = "") -> Tensor:
    """Round ``columns [groups, k, o]`` one by one; ``steps = U_ij / U_ii``; blocks of `COLUMNS` (Frantar 2023, 3.3)."""
    columns, found = columns.clone(), torch.empty_like(columns)
    count, width = columns.shape[1], COLUMNS
    if observer:
        width = grid.size * max(1, COLUMNS // grid.size)  # a group must not reach into columns that are behind
    for start in range(0, count, width):
        stop = min(start + width, count)
        errors = torch.empty_like(columns[:, start:stop])
        for i in range(start, stop):
            if observer and i % grid.size == 0:
                grid.refit(columns[:, i : i + grid.size], i, observer)
            found[:, i] = grid.nearest(columns[:, i], i)
            errors[:, i - start] = error = columns[:, i] - found[:, i]
            columns[:, i + 1 : stop].baddbmm_(steps[:, i, i + 1 : stop, None], error.unsqueeze(1), alpha=-1)
        columns[:, stop:].baddbmm_(steps[:, start:stop, stop:].mT, errors, alpha=-1)
    return found
