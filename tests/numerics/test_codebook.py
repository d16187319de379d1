"""NF4: the table, the nearest entry, and its error on Gaussian data (algorithms.md 14.5)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.numerics.affine import live_qparams, simulate
from bitwright.numerics.codebook import nearest_code
from bitwright.numerics.formats import FORMATS, Format
from bitwright.numerics.levels import decision_points
from bitwright.numerics.spec import QuantSpec

NF4 = FORMATS["nf4"].codebook


def sqnr(x: Tensor, y: Tensor) -> float:
    return 10 * torch.log10(x.double().square().sum() / (x - y).double().square().sum()).item()


def test_nf4_is_the_table_of_normal_quantiles_from_the_paper():
    offset = (31 / 32 + 29 / 30) / 2
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    quantiles = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    table = torch.tensor(NF4, dtype=torch.float64)
    assert (table - quantiles / quantiles.max()).abs().max() < 2.5e-7


def test_nf4_is_ascending_and_holds_minus_one_zero_and_one_exactly():
    assert list(NF4) == sorted(set(NF4))
    assert len(NF4) == 16
    assert (NF4[0], NF4[7], NF4[15]) == (-1.0, 0.0, 1.0)


def test_the_nearest_code_equals_a_search_over_all_entries():
    x = torch.cat([torch.randn(20_000), torch.linspace(-1.5, 1.5, 3001), torch.tensor(NF4)])
    table = torch.tensor(NF4)
    distance = (x.double().unsqueeze(1) - table.double()).abs()
    found = nearest_code(x, FORMATS["nf4"]).long()
    best = distance.min(1).values
    assert (distance.gather(1, found.unsqueeze(1)).squeeze(1) - best).abs().max() < 1e-7


def test_a_value_half_way_takes_the_lower_entry():
    order, thresholds = decision_points((-1.0, 0.0, 1.0, 2.0), ties_even=False)
    fmt = Format("test", 2, 0, 3, (-1.0, 0.0, 1.0, 2.0), None, order, thresholds)
    assert nearest_code(torch.tensor([-0.5, 0.5, 1.5]), fmt).tolist() == [0, 1, 2]


def test_values_beyond_the_ends_take_the_ends():
    assert nearest_code(torch.tensor([-1e9, 1e9]), FORMATS["nf4"]).tolist() == [0, 15]


@pytest.mark.parametrize(
    ("text", "decibel"),
    [("nf4/group64", 20.72), ("uint4/group64/asym", 20.81), ("fp4/group64", 19.51), ("int4/group64", 19.35)],
)
def test_four_bit_blocks_of_64_reach_the_published_error_on_gaussian_weights(text, decibel):
    x = torch.randn(8192, 64)
    spec = QuantSpec.parse(text)
    assert sqnr(x, simulate(x, spec, live_qparams(x, spec))) == pytest.approx(decibel, abs=0.1)
