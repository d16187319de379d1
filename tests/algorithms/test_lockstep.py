"""Stopping at every layer of a running model: the order, what is seen, and what later layers see."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms.lockstep import run_counts, visits
from bitwright.algorithms.pipeline import outcomes
from bitwright.graph.dataflow import call
from nets import one_thread  # noqa: F401


class Net(nn.Module):
    """Two layers of which the second runs for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if len(x) > 2:
            x = self.second(x).relu()
        return self.last(x)


def prepared(sizes: tuple[int, ...] = (4, 3)) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(3)
    net, batches = Net(), [torch.randn(size, 6) for size in sizes]
    plan = bw.Plan.preset("w4a8", net, batches[0], sites={"*.weight": "int4/channel", "*.input": "uint8/asym"})
    model = bw.prepare(net, plan)
    bw.calibrate(model, batches)
    return model, batches


PATHS = ("last", "first", "second")


def test_layers_are_visited_in_the_order_they_run_with_both_inputs() -> None:
    model, batches = prepared()
    floating = [b.clone() for b in batches]
    simulated = [b.clone() for b in batches]
    seen = []
    for visit in visits(model, batches, call, PATHS):
        seen.append(visit.path)
        for i, at in enumerate(visit.calls):
            assert torch.equal(at.args[0], simulated[i])
            assert torch.allclose(at.float_args[0], floating[i])
            with torch.no_grad():
                simulated[i] = visit.module(simulated[i]).relu()
            floating[i] = at.float_output.relu()
    assert seen == ["first", "second", "last"]
    assert not torch.equal(floating[0], simulated[0])


def test_later_layers_see_what_was_changed_and_the_float_run_does_not() -> None:
    model, batches = prepared()
    floating, moved = [], []
    for visit in visits(model, batches, call, PATHS):
        if visit.path == "first":
            floating = [at.float_output.relu() for at in visit.calls]
            with torch.no_grad():
                visit.module.bias.add_(1.0)
                moved = [visit.module(b).relu() for b in batches]
        if visit.path == "second":
            assert all(torch.equal(at.args[0], x) for at, x in zip(visit.calls, moved, strict=True))
            assert all(torch.equal(at.float_args[0], x) for at, x in zip(visit.calls, floating, strict=True))


def test_batches_may_take_other_ways() -> None:
    model, batches = prepared((4, 2, 3))
    found = [(v.path, len(v.calls)) for v in visits(model, batches, call, PATHS)]
    assert sorted(found) == [("first", 3), ("last", 3), ("second", 2)]


def test_no_thread_stays_behind_when_the_caller_stops_or_the_model_fails() -> None:
    model, batches = prepared()
    before = threading.active_count()
    for _ in visits(model, batches, call, PATHS):
        break
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(visits(model, [torch.randn(2, 5)], call, PATHS))
    assert threading.active_count() == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_run_counts_tell_order_and_repetition() -> None:
    model, batches = prepared()
    counts = run_counts(model, batches[0], lambda m, b: m.last(m.first(m.first(b))), PATHS)
    assert list(counts.items()) == [("first", 2), ("last", 1)]


class Turning(nn.Module):
    """Takes another layer in simulation than in float: the sign of a value that rounds to 0 decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(2, 1, bias=False), nn.Linear(1, 2), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.up(x) if float(x.abs().sum()) > 0 else self.down(x)


def test_layers_that_only_the_simulated_run_reaches_are_named_and_left_alone() -> None:
    net = Turning()
    with torch.no_grad():
        net.first.weight.copy_(torch.tensor([[1.0, 0.0]]))
    small, large = torch.tensor([[1e-6, 0.0]]), torch.tensor([[1.0, 1.0]])
    sites = {"*.weight": "int8/channel", "*.input": "uint8/asym"}
    plan = bw.Plan.preset("w8a8", net, large, sites=sites, steps=["bias_correction", "gptq"])
    model = bw.prepare(net, plan)
    bw.calibrate(model, [small, large], unseen="dynamic")
    found = {(o.step, o.path): o.skipped for o in outcomes(model)}
    reason = "no batch reached it both in float and in simulation"
    assert found["gptq", "down"] == found["bias_correction", "down"] == reason
    assert found["gptq", "up"] != reason
