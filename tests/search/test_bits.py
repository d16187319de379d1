"""Layers of every kind can be moved to 8 bits, those that share a weight together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitwright.algorithms.pipeline import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.plan.plan import Plan
from bitwright.search.bits import (
    first_that_holds,
    last_that_holds,
    levels,
    most_sensitive_first,
    narrow_layers,
    output_error,
    with_eight_bits,
)
from bitwright.search.judge import PointJudge
from bitwright.search.ladder import Goal, Task, climb, known_rungs

FAST = {"weight": "minmax", "input": "minmax"}


class Recurrent(nn.Module):
    """An LSTM between a linear layer and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.lstm, self.mid, self.out = nn.Linear(6, 8), nn.LSTM(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mid(self.lstm(self.into(x))[0]).relu().mean(0))


class Attending(nn.Module):
    """Self-attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention, self.mid = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(self.mid(self.attention(x, x, x)[0]).relu().mean(0))


class Tied(nn.Module):
    """Two layers with one weight, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.one, self.two, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(self.into(x)).relu()).relu().mean(0))


@pytest.fixture(params=[Recurrent, Attending, Tied])
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, 6, generator=generator) for _ in range(2)]


def plan_of_preset(net: nn.Module, preset: str) -> Plan:
    return Plan.preset(preset, net, batches()[0], observers=FAST)


def test_modules_of_every_kind_are_found() -> None:
    found = {kind: narrow_layers(plan_of_preset(kind(), "w4a8")) for kind in (Recurrent, Attending, Tied)}
    assert found[Recurrent] == [("lstm",), ("mid",)]
    assert found[Attending] == [("attention",), ("attention.out_proj",), ("mid",)]
    assert found[Tied] == [("one", "two")]


def test_eight_bit_presets_have_nothing_to_move(net: nn.Module) -> None:
    for preset in ("w8a8", "w8a8-dynamic", "fp16", "fp8"):
        plan = plan_of_preset(net, preset)
        assert narrow_layers(plan) == []
        assert with_eight_bits(plan, []) == plan


@pytest.mark.parametrize("preset", ["w4a8", "w4a4", "w4a16", "nf4"])
def test_every_module_can_be_moved_and_ships(net: nn.Module, preset: str) -> None:
    plan = plan_of_preset(net, preset)
    layers = narrow_layers(plan)
    errors = []
    for count in (0, len(layers)):
        changed = with_eight_bits(plan, layers[:count])
        prepared = prepare(net, changed)
        calibrate(prepared, batches())
        errors.append(output_error(net, convert(prepared), batches()))
        left = [spec.format.bits for s, spec in changed.sites.items() if spec is not None and s.is_weight]
        assert (min(left) >= 8) == (count > 0)
    assert errors[1] < errors[0] / 4


def test_moving_some_leaves_the_others_as_they_were(net: nn.Module) -> None:
    plan = plan_of_preset(net, "w4a4")
    layers = narrow_layers(plan)
    changed = with_eight_bits(plan, layers[:1])
    for site, spec in plan.sites.items():
        if site.path in layers[0]:
            assert changed.sites[site].format.bits == 8
            assert "most sensitive" in changed.why[site] or spec.format.bits == 8
        else:
            assert changed.sites[site] == spec


def test_float_inputs_stay_float_when_weights_move(net: nn.Module) -> None:
    plan = plan_of_preset(net, "w4a16")
    changed = with_eight_bits(plan, narrow_layers(plan))
    assert {s for s, spec in plan.sites.items() if spec is None} == {s for s, x in changed.sites.items() if x is None}


def test_the_order_is_that_of_the_errors_of_models_with_one_quantized_module(net: nn.Module) -> None:
    plan, errors = plan_of_preset(net, "w4a8"), {}
    for layers in narrow_layers(plan):
        others = {str(site): None for site in plan.sites if site.path not in layers}
        prepared = prepare(net, plan.with_sites(others))
        calibrate(prepared, batches())
        errors[layers] = output_error(net, prepared, batches()[:1])
    expected = sorted(errors, key=lambda layers: -errors[layers])
    assert most_sensitive_first(net, plan, batches(), batches()[0]) == expected
    assert len(set(errors.values())) == len(errors)


def test_the_error_of_an_equal_model_is_zero(net: nn.Module) -> None:
    assert output_error(net, net, batches()) == 0.0


def test_the_cheap_rungs_run_on_modules_of_every_kind(net: nn.Module) -> None:
    rungs = [rung for rung in known_rungs() if "brecq" not in rung.steps]  # brecq takes its time
    goal = Goal(max_drop=-1.0)
    task = Task(net, plan_of_preset(net, "w4a8"), batches(), batches()[0], goal)
    found = climb(task, PointJudge(net, lambda m: 1.0, goal.max_drop), rungs)
    assert [trial.name for trial in found.trials[: len(rungs)]] == [rung.name for rung in rungs]
    assert [trial.failed for trial in found.trials] == [""] * len(found.trials)
    assert found.trials[len(rungs)].raised == len(narrow_layers(task.plan))


def test_levels_are_all_counts_or_eighths() -> None:
    assert levels(0, paired=True) == levels(0, paired=False) == []
    assert levels(5, paired=True) == [1, 2, 3, 4, 5]
    assert len(levels(1000, paired=True)) == 8
    assert levels(1000, paired=True)[-1] == 1000


@pytest.mark.parametrize("border", range(6))
def test_bisection_finds_the_border(border: int) -> None:
    assert first_that_holds(5, lambda n: n >= border) == border
    assert last_that_holds(5, lambda n: n <= border) == border
    assert first_that_holds(5, lambda n: False) == 5
    assert last_that_holds(5, lambda n: False) == 0
