"""GPTQ (Frantar 2023): the codes of a layer column by column, each column's error made up for by those still to come.

With rows x of the layer's input, rounding ``W`` to ``Q`` costs ``E |W x - Q x|^2 = tr((Q - W) H (Q - W)^T)``, where
``H = E[x x^T]``. A column is rounded to nearest behind what the errors of the columns before it ask of it, were the
columns behind it free: that is best for those (section 3). `sweep` does it with a factor of H itself.

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
from bitwright.algorithms.moments import BLOCK, Moments, errors, moments, symmetric
from bitwright.errors import PlanError
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.step import Value

COLUMNS = 128  # swept at a time; what they change in later columns is one product
_PART = 2**22  # weights that are swept at a time
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
    drift = bool(options["match_float"])
    fit = moments(layer, drift=drift)
    rows = weight.reshape(len(fit.inputs), -1, fit.inputs.shape[-1])
    grid = Grid.of(quantizer, weight, len(rows))
    observer = quantizer.observer_name if rescale else ""
    found = solve(fit, rows, grid, damping, act_order=act_order, observer=observer).reshape(weight.shape)
    del fit
    rounded = nearest(weight, quantizer)
    wrong = errors(layer, (found, rounded), drift=drift)
    better = wrong[0] < wrong[1]
    better &= rows.any(-1).flatten()  # behind a channel of zeros may stand a norm that multiplies by 0
    if not better.any():
        raise NotApplicableError("rounding to nearest is as good on the examples kept apart")
    if rescale:
        _store(grid, quantizer, better)
    found[~better] = rounded[~better]
    del rounded
    write_weight(layer.module, found, quantizer)
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
    shape, zero_point = qparams.scale.shape, qparams.zero_point
    at = chosen.view(-1, *[1] * (len(shape) - 1))
    if zero_point is not None and grid.zero_point is not None:
        zero_point = torch.where(at, grid.zero_point.mT.reshape(shape), zero_point)
    scale = torch.where(at, grid.scale.mT.reshape(shape), qparams.scale)
    quantizer.set_qparams(replace(qparams, scale=scale, zero_point=zero_point))


def solve(
    fit: Moments, weight: Tensor, grid: Grid, damping: float, *, act_order: bool = False, observer: str = ""
) -> Tensor:
    """Values on the grid for ``weight [groups, o, k]``, swept in the order of the columns or by falling ``H_ii``.

    Works in the memory of ``fit``, which is used up. With ``observer`` the grid's groups take their scales anew, in
    place.
    """
    hessian, count = fit.inputs, weight.shape[-1]
    order = torch.arange(count).expand(len(weight), -1)
    if act_order:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True)
    order = order.flip(1)  # see `sweep`
    lower, grid = factor(_permuted(hessian, order), damping), grid.in_order(order)
    in_place = fit.shift is not None and fit.shift.dtype == weight.dtype
    found = fit.shift if in_place else torch.empty_like(weight)
    assert found is not None
    for part in torch.arange(weight.shape[1]).split(max(1, _PART // (len(weight) * count))):
        chosen = slice(int(part[0]), int(part[-1]) + 1)  # output channels do not depend on each other
        at = order.unsqueeze(-1).expand(-1, -1, len(part))
        columns = weight[:, chosen].mT.gather(1, at)
        if fit.shift is None:
            shift = torch.zeros_like(columns)
        else:
            shift = _substituted(lower, fit.shift[:, chosen].mT.gather(1, at).to(lower.dtype))
            shift = shift.div_(lower.diagonal(dim1=1, dim2=2).unsqueeze(-1)).float()
        found[:, chosen] = columns.scatter_(1, at, sweep(columns, shift, lower, grid.of_rows(chosen), observer)).mT
    return found


def factor(hessian: Tensor, damping: float) -> Tensor:
    """L, lower triangular, with ``L L^T = H + damping mean(diag H)``, in place of ``H [groups, k, k]``.

    Columns that no row uses get a diagonal of 1 if damping leaves 0: they stay as they would be rounded alone. While
    the matrix of a group is not positive definite, its damping is multiplied by 10.

    >>> factor(torch.tensor([[[4.0, 0.0], [0.0, 16.0]]]), 0.0)[0].tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    own, mean = diagonal.clone(), diagonal.mean(1)
    share = torch.full_like(mean, damping)
    while True:
        diagonal.copy_(own + (share * mean).unsqueeze(-1))
        diagonal[diagonal == 0] = 1.0
        failed = _cholesky(hessian)
        if not failed.any():
            break
        share = torch.where(failed, (share * 10).clamp(min=_LEAST), share)
        symmetric(hessian.mT)  # the upper triangle is still that of H
    return hessian.tril_()


def _cholesky(matrix: Tensor) -> Tensor:
    """Factor ``[groups, k, k]`` in its lower triangle; which groups are not positive definite, at the first block."""
    failed = torch.zeros(len(matrix), dtype=torch.bool)
    for start in range(0, matrix.shape[-1], BLOCK):
        stop = start + BLOCK
        panel, before = matrix[:, start:, start:stop], matrix[:, start:, :start]
        top, rest = panel[:, : panel.shape[2]], panel[:, panel.shape[2] :]
        above = top.triu(1)
        if start:
            panel -= before @ before[:, : panel.shape[2]].mT
        lower, info = torch.linalg.cholesky_ex(top)
        top.copy_(lower + above)
        failed = info > 0
        if failed.any():
            break
        rest.copy_(torch.linalg.solve_triangular(lower.mT, rest, upper=True, left=False))
    return failed


def _substituted(lower: Tensor, right: Tensor) -> Tensor:
    """``L^-1 B`` for ``B [groups, k, o]``, in place."""
    for start in range(0, lower.shape[-1], BLOCK):
        rows = slice(start, start + BLOCK)
        if start:
            right[:, rows] -= lower[:, rows, :start] @ right[:, :start]
        right[:, rows] = torch.linalg.solve_triangular(lower[:, rows, rows], right[:, rows], upper=False)
    return right


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a symmetric ``[groups, k, k]`` in another order, in place."""
    for view in (matrix, matrix.mT):
        for start in range(0, matrix.shape[-1], BLOCK):
            for rows, chosen in zip(view[:, start : start + BLOCK], order, strict=True):
                rows.copy_(rows.index_select(1, chosen))
    return matrix


def sweep(columns: Tensor, shift: Tensor, lower: Tensor, grid: Grid, observer: str = "") -> Tensor:
    """Round ``columns [groups, k, o]`` one by one, the last first: ``w_i + shift_i + sum_j (w_j - q_j) L_ji / L_ii``.

    The sum is over the columns j > i that are rounded already. With ``H = L L^T`` that is what GPTQ rounds (as LDLQ:
    Chee 2023, theorem 6), without the inverse of H. Returns values in the memory of ``shift`` and leaves the errors
    ``w_j - q_j`` in that of ``columns``.
    """
    count, width = columns.shape[1], grid.size if observer else COLUMNS
    diagonal = lower.diagonal(dim1=1, dim2=2)
    for stop in range(count, 0, -width):
        start = max(stop - width, 0)
        steps = (lower[:, start:, start:stop] / diagonal[:, None, start:stop]).float()
        inside, behind = steps[:, : stop - start], steps[:, stop - start :]
        moved = shift[:, start:stop].baddbmm(behind.mT, columns[:, stop:])
        if observer:
            free = torch.linalg.solve_triangular(inside.mT, moved, upper=True, unitriangular=True)
            grid.refit(columns[:, start:stop] + free, start, observer)
        for i in range(stop - 1, start - 1, -1):
            at = i - start
            change = moved[:, at : at + 1].baddbmm(inside[:, at + 1 :, at].unsqueeze(1), columns[:, i + 1 : stop])
            shift[:, i] = found = grid.nearest(columns[:, i] + change[:, 0], i)
            columns[:, i] -= found
    return shift
