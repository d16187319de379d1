"""Quantization error of GELU and SiLU computed, not sampled: inputs N(0, sigma^2), any set of levels.

``y = f(x)`` takes each level on one or two intervals of x, since f falls to a single minimum and rises behind it. With
the antiderivatives F0 of phi, F1 of f phi and F2 of f^2 phi the error is the sum of ``F2 - 2 r F1 + r^2 F0`` over the
intervals of all levels r. For GELU at sigma = 1 the antiderivatives are elementary::

    F1(x) = -phi Phi + Phi(sqrt2 x) / (2 sqrt pi)
    F2(x) = -x phi Phi^2 + Phi^3 / 3 - phi^2 Phi + Phi(sqrt3 x) / (2 pi sqrt3)

(differentiate and use ``phi' = -x phi``); SiLU and other sigma take Gauss-Legendre with 64 points per interval. All in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import SpecError
from bitwright.numerics.affine import choose_qparams, decode
from bitwright.numerics.spec import QuantSpec
from bitwright.observe.activations import fixed_low, lowest_at

_REACH = 12.0  # standard deviations: beyond lies a probability of 4e-33
_LONGEST = 0.5  # standard deviations between edges: 64 points integrate that to the last digits


def _gelu(x: Tensor) -> Tensor:
    return x * torch.special.ndtr(x)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": _gelu, "silu": _silu}


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def gelu_antiderivatives(x: Tensor) -> Tensor:
    """F0, F1 and F2 of GELU for a standard normal input, ``[3, n]`` float64.

    >>> ends = gelu_antiderivatives(torch.tensor([-40.0, 40.0]))
    >>> (ends[:, 1] - ends[:, 0]).round(decimals=7).tolist()  # 1, E[y], E[y^2]
    [1.0, 0.2820948, 0.4252215]
    """
    x = x.double()
    phi, cdf = _density(x), torch.special.ndtr(x)
    first = -phi * cdf + torch.special.ndtr(math.sqrt(2) * x) / (2 * math.sqrt(math.pi))
    third = torch.special.ndtr(math.sqrt(3) * x) / (2 * math.pi * math.sqrt(3))
    return torch.stack([cdf, first, -x * phi * cdf**2 + cdf**3 / 3 - phi**2 * cdf + third])


def moments(name: str, sigma: float = 1.0) -> tuple[float, float]:
    """``E[y]`` and ``E[y^2]`` of an activation (``gelu`` or ``silu``) behind N(0, sigma^2).

    >>> [round(moment, 7) for moment in moments("gelu", 2.0)]
    [0.7136496, 1.929865]
    """
    integrals = _quadrature(_function(name), _grid(sigma), sigma).sum(1)
    return integrals[1].item(), integrals[2].item()


def squared_error(name: str, levels: Tensor, sigma: float = 1.0) -> float:
    """Mean squared error of rounding an activation behind N(0, sigma^2) to the nearest of ``levels [n]``.

    ``name`` is ``gelu`` or ``silu``. The error of a spec is that of the values of its codes.

    >>> round(squared_error("gelu", torch.tensor([0.0])), 7)  # all becomes 0: E[y^2]
    0.4252215
    """
    f, levels = _function(name), levels.double().sort().values
    middles = (levels[1:] + levels[:-1]) / 2
    edges = _edges(f, lowest_at(name), middles, sigma)
    inner = (edges[1:] + edges[:-1]) / 2
    level = levels[torch.searchsorted(middles, f(inner))]
    if name == "gelu" and sigma == 1:
        f0, f1, f2 = gelu_antiderivatives(edges).diff(dim=1)
    else:
        f0, f1, f2 = _quadrature(f, edges, sigma)
    return (f2 - 2 * level * f1 + level.square() * f0).sum().item()


def best_upper_end(name: str, spec: QuantSpec, sigma: float = 1.0) -> tuple[float, float]:
    """Upper end M of the range with the least error for an integer format, and that error.

    The lower end is the activation's minimum where the format has a zero point, which is rounded as everywhere; else
    it follows from M.

    >>> [round(found, 4) for found in best_upper_end("gelu", QuantSpec.parse("uint4/asym"))]
    [2.59, 0.0035]
    """
    found: dict[float, float] = {}
    for middle, step, count in ((3.1, 0.05, 58), (None, 0.005, 10)):
        centre = min(found, key=found.__getitem__) if middle is None else middle * sigma
        for end in (centre + step * sigma * i for i in range(-count, count + 1)):
            found[end] = squared_error(name, _levels(fixed_low(name), end, spec), sigma)
    best = min(found, key=found.__getitem__)
    return best, found[best]


def _levels(low: float, high: float, spec: QuantSpec) -> Tensor:
    """The values of all codes for a range."""
    qparams = choose_qparams(torch.tensor([low]), torch.tensor([high]), spec)
    codes = torch.arange(spec.format.qmin, spec.format.qmax + 1).float()
    return decode(codes, spec, qparams)


def _function(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _FUNCTIONS:
        raise SpecError(f"the quantization error of {name!r} is not known analytically; known: {', '.join(_FUNCTIONS)}")
    return _FUNCTIONS[name]


def _edges(f: Callable[[Tensor], Tensor], lowest: float, thresholds: Tensor, sigma: float) -> Tensor:
    """Where ``f`` crosses the thresholds, its minimum, and a grid over the reach, ascending."""
    grid = _grid(sigma)
    bottom = torch.tensor(lowest, dtype=torch.float64)
    crossings = [grid, bottom.clamp(grid[0], grid[-1]).view(1)]
    for outer in (grid[0], grid[-1]):
        ends = f(torch.stack([bottom, outer]))
        inside = thresholds[(thresholds > ends[0]) & (thresholds < ends[1])]
        low, high = bottom.expand_as(inside), outer.expand_as(inside)  # f(low) < threshold < f(high)
        for _ in range(55):
            middle = (low + high) / 2
            above = f(middle) > inside
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        crossings.append((low + high) / 2)
    return torch.cat(crossings).clamp(grid[0], grid[-1]).sort().values


def _grid(sigma: float) -> Tensor:
    return torch.linspace(-_REACH, _REACH, int(2 * _REACH / _LONGEST) + 1, dtype=torch.float64) * sigma


def _quadrature(f: Callable[[Tensor], Tensor], edges: Tensor, sigma: float) -> Tensor:
    """Integrals of ``1, f, f^2`` times the density between neighbouring edges, ``[3, n - 1]``."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(64))
    width = edges.diff()[:, None]
    x = edges[:-1, None] + width * (nodes + 1) / 2
    density = _density(x / sigma) / sigma * weights * width / 2
    y = f(x)
    return torch.stack([density.sum(1), (density * y).sum(1), (density * y.square()).sum(1)])
