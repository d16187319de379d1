"""Distributions are those of the tensors themselves."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import SearchError
from bitwright.harm.distributions import QUANTILES, distribution_table, distributions
from bitwright.plan.plan import Plan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 32), nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) + self.c(h)


def plan_of(model: nn.Module, x: Tensor) -> Plan:
    return Plan.preset("w8a8", model, x)


def test_each_activation_is_described_over_all_batches() -> None:
    model, batches = Net().train(), [torch.randn(50, 4), 3 * torch.randn(20, 4)]
    found = distributions(model, plan_of(model, batches[0]), batches)
    assert model.training
    assert "a.input" in found
    assert ("b.input" in found) != ("c.input" in found)  # one tensor, one quantizer
    hidden = torch.cat([F.relu(model.a(x)).detach().flatten() for x in batches])
    for site, values in (("a.input", torch.cat(batches).flatten()), ("b.input", hidden)):
        one = found[site]
        assert (one.count, one.least, one.most) == (len(values), values.min().item(), values.max().item())
        assert one.mean == pytest.approx(values.double().mean().item(), rel=1e-6)
        assert one.deviation == pytest.approx(values.double().std(correction=0).item(), rel=1e-6)
        assert one.zeros == pytest.approx((values == 0).double().mean().item())
        width = (one.most - min(one.least, 0.0)) / 2048
        exact = [values.sort().values[math.ceil(share * len(values)) - 1].item() for share in QUANTILES]
        assert one.quantiles == pytest.approx(exact, abs=2 * width)
    console = Console(width=160)
    with console.capture() as text:
        console.print(distribution_table(found))
    assert "b.input" in text.get()
    assert "99.9 %" in text.get()


def test_what_cannot_be_described() -> None:
    model, x = Net(), torch.randn(5, 4)
    plan = plan_of(model, x)
    assert list(distributions(model, plan, [x], "a.*")) == ["a.input"]
    with pytest.raises(SearchError, match="selects no activation"):
        distributions(model, plan, [x], "a.weight")
    with pytest.raises(SearchError, match=r"a\.input never occurred"):
        distributions(model, plan, [], "a.input")
    with pytest.raises(SearchError, match=r"a\.input has values that are not finite"):
        distributions(model, plan, [x / 0], "a.input")
