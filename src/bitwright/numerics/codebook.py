"""Tables of levels at work: the nearest level of a value, the level of a code, and tables fitted to a tensor.

A constant table belongs to its format (`formats.Format`). A fitted one is stored with the tensor: one for the whole
tensor, or with granularity ``channel`` one per index of axis 0. Fitted tables hold levels of ``x / scale``, ascending.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.formats import Format
from bitwright.numerics.spec import Granularity, QuantSpec

_ITERATIONS = 300
_ROWS = Granularity("channel")
_PART = 2**22  # elements that are sorted at a time: the temporaries are float64


def nearest_code(x: Tensor, fmt: Format, codebook: Tensor | None = None) -> Tensor:
    """Code of the level nearest to each value, as float32; ties by the format (`levels.decision_points`).

    ``codebook`` is a fitted table ``[levels]`` or ``[rows, levels]`` (x then has the rows on axis 0), ascending; a
    value half-way between two of its levels takes the lower one.

    >>> from bitwright.numerics.formats import FORMATS
    >>> nearest_code(torch.tensor([-2.0, 0.04, 0.9]), FORMATS["nf4"]).tolist()
    [0.0, 8.0, 15.0]
    """
    x = x.detach().contiguous()
    if fmt.fit:
        table = _present(fmt, codebook)
        middles = (table[..., 1:] + table[..., :-1]) / 2
        if table.dim() == 1:
            return torch.bucketize(x, middles).float()
        return torch.searchsorted(middles, _ROWS.blocks(x)).view(x.shape).float()
    found = torch.bucketize(x, torch.tensor(fmt.thresholds, dtype=torch.float32, device=x.device))
    return torch.tensor(fmt.order, dtype=torch.float32, device=x.device)[found]


def look_up(codes: Tensor, fmt: Format, codebook: Tensor | None = None) -> Tensor:
    """Level of each code before the scale, float32, same shape; ``codebook`` as in `nearest_code`.

    >>> from bitwright.numerics.formats import FORMATS
    >>> look_up(torch.tensor([1, 15]), FORMATS["fp4"]).tolist()
    [0.5, -6.0]
    """
    if not fmt.fit:
        return torch.tensor(fmt.codebook, dtype=torch.float32, device=codes.device)[codes.long()]
    table = _present(fmt, codebook)
    if table.dim() == 1:
        return table[codes.long()]
    return table.gather(1, _ROWS.blocks(codes.long())).view(codes.shape)


def _present(fmt: Format, codebook: Tensor | None) -> Tensor:
    if codebook is None:
        raise NumericsError(f"{fmt} needs a table that is fitted to the tensor; see affine.with_codebook")
    return codebook


def fit_codebook(x: Tensor, spec: QuantSpec, weights: Tensor) -> Tensor:
    """The table of a fitted format for ``x`` (divided by its scales already), ``[levels]`` or ``[rows, levels]``.

    ``weights`` has the shape of x; `kmeans` uses them, `quantile_levels` does not.

    >>> x = torch.tensor([[0.0, 0.1, 0.5, 1.0, 1.0]])
    >>> fit_codebook(x, QuantSpec.parse("kmeans2"), torch.ones_like(x)).tolist()
    [0.0, 0.10000000149011612, 0.5, 1.0]
    """
    levels = spec.format.qmax + 1
    by_row = spec.granularity.kind == "channel"
    rows, weights = (t.reshape(t.shape[0] if by_row else 1, -1) for t in (x, weights))
    size = max(1, _PART // rows.shape[1])
    parts = [
        kmeans(part, levels, weight) if spec.format.fit == "kmeans" else quantile_levels(part, levels)
        for part, weight in zip(rows.split(size), weights.split(size), strict=True)
    ]
    return torch.cat(parts) if by_row else parts[0][0]


def kmeans(values: Tensor, levels: int, weights: Tensor | None = None, iterations: int = _ITERATIONS) -> Tensor:
    """Ascending levels ``[rows, levels]`` of ``values [rows, n]`` with little (weighted) squared error, float32.

    Lloyd's algorithm from evenly spaced levels, which serve the tails better than random ones (Deep Compression, Han
    2016, section 3.2), and from levels as dense as the cube root of the density of the values, the limit for many
    levels (Panter and Dite 1951), near which the former arrive slowly; per row the better end is taken. The error
    never rises from one iteration to the next. A level without values stays where it is. ``weights`` >= 0 has the
    shape of ``values``.

    >>> kmeans(torch.tensor([[0.0, 0.0, 1.0, 5.0]]), 2).round(decimals=3)
    tensor([[0.3330, 5.0000]])
    """
    x, order = values.detach().double().sort(dim=-1)
    mass = torch.ones_like(x) if weights is None else weights.double().gather(-1, order)
    zero = torch.zeros_like(x[:, :1])
    # sums over the values of a cell are differences of running sums, since a cell is an interval
    running = torch.stack([torch.cat([zero, part.cumsum(-1)], -1) for part in (mass, mass * x)])
    ends = [_lloyd(x, running, start, iterations) for start in (_evenly(x, levels), _by_density(x, levels))]
    errors = [_excess(x, running, end) for end in ends]
    return torch.where(errors[0] <= errors[1], *ends).sort(-1).values.float()


def _evenly(x: Tensor, levels: int) -> Tensor:
    share = torch.linspace(0, 1, levels, dtype=x.dtype, device=x.device)
    return x[:, :1] + (x[:, -1:] - x[:, :1]) * share


def _by_density(x: Tensor, levels: int) -> Tensor:
    """Levels as dense as the cube root of the density of sorted ``x``, seen in four bins per level."""
    edges = _evenly(x, 4 * levels + 1)
    below = torch.searchsorted(x, edges[:, 1:].contiguous(), right=True).double()
    counts = below.diff(dim=-1, prepend=torch.zeros_like(x[:, :1]))
    share = torch.cat([torch.zeros_like(x[:, :1]), counts.pow(1 / 3).cumsum(-1)], -1)
    wanted = (torch.arange(levels, dtype=x.dtype, device=x.device) + 0.5) / levels * share[:, -1:]
    bin = torch.searchsorted(share, wanted).clamp(1, 4 * levels)
    low, high = share.gather(-1, bin - 1), share.gather(-1, bin)
    part = (wanted - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
    return edges.gather(-1, bin - 1) + part * (edges.gather(-1, bin) - edges.gather(-1, bin - 1))


def _cells(x: Tensor, running: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and sum of the values nearest to each level."""
    middles = (table[:, 1:] + table[:, :-1]) / 2
    start = torch.zeros_like(table[:, :1], dtype=torch.long)
    edges = torch.cat([start, torch.searchsorted(x, middles, right=True), start + x.shape[-1]], -1)
    mass, total = running.gather(-1, edges.expand(2, *edges.shape)).diff(dim=-1)
    return mass, total


def _lloyd(x: Tensor, running: Tensor, table: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        mass, total = _cells(x, running, table)
        moved = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(x.dtype).tiny), table)
        if torch.equal(moved, table):
            break
        table = moved
    return table


def _excess(x: Tensor, running: Tensor, table: Tensor) -> Tensor:
    """Squared error per row, less the sum of squares that all tables share."""
    mass, total = _cells(x, running, table)
    return (mass * table.square() - 2 * total * table).sum(-1, keepdim=True)


def quantile_levels(values: Tensor, levels: int) -> Tensor:
    """Ascending levels ``[rows, levels]`` at the quantiles ``(i + 1/2) / levels`` of ``values [rows, n]``, float32.

    Every code is used equally often: most entropy, not least error (NF4 is this for N(0, 1), with changes).

    >>> quantile_levels(torch.arange(8.0).view(1, 8), 4)
    tensor([[0.5000, 2.5000, 4.5000, 6.5000]])
    """
    x = values.detach().double().sort(dim=-1).values
    place = (torch.arange(levels, dtype=x.dtype, device=x.device) + 0.5) / levels * x.shape[-1] - 0.5
    place = place.clamp(0, x.shape[-1] - 1)
    below, above = x[:, place.floor().long()], x[:, place.ceil().long()]
    return (below + (above - below) * (place - place.floor())).float()
