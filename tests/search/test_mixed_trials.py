"""Plans are judged by what they do as a whole: the planned one is among them, and a wrong table of harm cannot win."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.costs.cost import plan_bytes
from bitwright.errors import SearchError
from bitwright.nn.quantizer import Quantizer
from bitwright.search.mixed import Mixture
from bitwright.search.mixed_trials import ALLOCATED, PLANNED, mixed
from bitwright.search.sensitivity import Sensitivity, harm_of_whole, sensitivity

FAST = {"weight": "minmax", "input": "minmax"}
SPECS = {"*.weight": [f"int{bits}/channel" for bits in (2, 3, 4, 5, 6, 8)]}


def net() -> nn.Module:
    """The first layers matter more than the last ones, which are larger."""
    torch.manual_seed(0)
    sizes = (6, 8, 8, 24, 24, 5)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).eval()


def data(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def plan_of(model: nn.Module, bits: int = 4) -> bw.Plan:
    sites = {"*.weight": f"int{bits}/channel"}
    return bw.Plan.preset("w4a16", model, data(1, 0)[0], sites=sites, observers=FAST, steps=["gptq"])


def choices_of(model: nn.Module, plan: bw.Plan, found: Sensitivity | None = None) -> Mixture:
    return bw.mixture(model, plan, data(1, 0)[0][:1], found or sensitivity(model, plan, data(4, 1), SPECS))


def test_the_best_one_is_within_the_budget_and_no_worse_than_the_planned_one() -> None:
    model = net()
    plan = plan_of(model, 3)
    limit = plan_bytes(model, plan)
    found = mixed(model, plan, data(4, 1), choices_of(model, plan), bw.Budget(bytes=limit), judge=data(4, 2))
    named = {one.name: one for one in found.tried}
    assert found.best is min((one for one in found.tried if one.fits), key=lambda one: one.harm)
    assert found.best.bytes <= limit
    assert found.best.harm < named[PLANNED].harm
    assert len({tuple(one.plan.sites.items()) for one in found.tried}) == len(found.tried)
    again = bw.prepare(model, found.best.plan)
    bw.calibrate(again, data(4, 1))
    for one in (found.model, again):
        values = harm_of_whole(model, data(4, 2))[0](one)
        assert values.mean().item() == pytest.approx(found.best.harm, rel=1e-9)
    expected = [
        F.kl_div(
            F.log_softmax(again.eval()(x).double(), -1),
            F.log_softmax(model(x).double(), -1),
            log_target=True,
            reduction="batchmean",
        ).item()
        for x in data(4, 2)
    ]
    assert found.best.harm == pytest.approx(sum(expected) / 4, rel=1e-6)


def test_a_table_of_harm_that_is_wrong_cannot_make_it_worse() -> None:
    model = net()
    plan = plan_of(model)
    truth = sensitivity(model, plan, data(4, 1), SPECS)
    largest = max(row.harm for row in truth.rows)
    wrong = replace(truth, rows=tuple(replace(row, harm=largest - row.harm) for row in truth.rows))
    limit = bw.Budget(bytes=plan_bytes(model, plan))
    found = mixed(model, plan, data(4, 1), choices_of(model, plan, wrong), limit, judge=data(4, 2), points=0)
    named = {one.name: one for one in found.tried}
    assert named[ALLOCATED].harm > 2 * named[PLANNED].harm
    assert found.best is named[PLANNED]


def test_what_is_over_the_budget_is_shown_and_not_taken() -> None:
    model = net()
    plan = plan_of(model, 8)
    limit, seen = bw.Budget(bytes=plan_bytes(model, plan_of(model))), []
    choices = choices_of(model, plan)
    found = mixed(model, plan, data(4, 1), choices, limit, judge=data(4, 2), points=3, say=seen.append)
    assert sorted(seen, key=lambda one: one.bytes) == list(found.tried)
    assert {one.name: one.fits for one in found.tried}[PLANNED] is False
    assert found.best.bytes <= limit.bytes
    assert [one.bytes for one in (found.tried[0], found.tried[-1])] == [
        choices.front()[at].cost.bytes for at in (0, -1)
    ]
    for one in found.front:
        assert not any(other.bytes <= one.bytes and other.harm < one.harm for other in found.tried if other is not one)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert text.count("over the budget") == sum(not one.fits for one in found.tried)
    assert f"{found.best.name} (best)" in text
    assert f"{found.best.bytes:,}" in text
    rows = [line.split() for line in text.splitlines()]
    assert sum(row[-1:] == ["yes"] for row in rows) == len(found.front)


def test_a_plan_is_an_allocation_of_its_own_bytes() -> None:
    model = net()
    plan = plan_of(model)
    choices = choices_of(model, plan)
    assert choices.of(plan).cost.bytes == plan_bytes(model, plan)
    assert set(choices.of(plan).sites.values()) == {"int4/channel"}
    with pytest.raises(SearchError, match=r"0\.weight: the plan has int7/channel, of which no harm is known"):
        choices.of(plan.with_sites({"0.weight": "int7/channel"}))


def test_what_cannot_be_judged() -> None:
    model = net()
    plan = plan_of(model)
    choices, limit = choices_of(model, plan), bw.Budget(bytes=plan_bytes(model, plan))
    with pytest.raises(SearchError, match="at least 2 batches, got 1"):
        mixed(model, plan, data(4, 1), choices, limit, judge=data(1, 2))
    with pytest.raises(SearchError, match="fisher is no harm of a whole model"):
        mixed(model, plan, data(4, 1), choices, limit, judge=data(2, 2), method="fisher")
    with pytest.raises(SearchError, match="needs loss"):
        mixed(model, plan, data(4, 1), choices, limit, judge=data(2, 2), method="loss")
    nan = lambda m, b: m(b).sum() * float("nan")  # noqa: E731
    with pytest.raises(SearchError, match="the harm of no plan is finite"):
        mixed(model, plan, data(4, 1), choices, limit, judge=data(2, 2), method="loss", loss=nan)


def test_a_plan_without_finite_harm_is_not_taken() -> None:
    model = net()
    plan = plan_of(model)
    choices, limit = choices_of(model, plan), bw.Budget(bytes=plan_bytes(model, plan))

    def loss(changed: nn.Module, batch: Tensor) -> Tensor:
        widths = {str(m.spec) for m in changed.modules() if isinstance(m, Quantizer)}
        error = F.mse_loss(changed(batch), model(batch))
        return error * float("nan") if widths == {"int4/channel"} else error

    found = mixed(model, plan, data(4, 1), choices, limit, judge=data(2, 2), method="loss", loss=loss, points=0)
    assert found.best.name != PLANNED
    assert {one.name: one.harm for one in found.tried}[PLANNED] == float("inf")
