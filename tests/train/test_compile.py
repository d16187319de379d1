"""Training under torch.compile: one graph without breaks, no recompilation from step to step, the eager numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from bitwright.flow.convert import convert
from bitwright.plan.plan import Plan
from bitwright.train.schedule import Phase, Schedule
from models import ResidualCnn
from nets import calibrated, one_thread  # noqa: F401

# torch's own compiler uses what torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def steps(forward: nn.Module, model: nn.Module, data: list[Tensor], schedule: Schedule, first: int) -> list[Tensor]:
    optimizer = schedule.optimizer(model)
    outputs = []
    for number, x in enumerate(data):
        model.train()
        schedule.apply(model, first + number, optimizer)
        optimizer.zero_grad()
        out = forward(x)
        out.square().mean().backward()
        optimizer.step()
        outputs.append(out.detach())
    return outputs


@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_a_compiled_step_is_one_graph_that_is_kept_and_computes_what_eager_does(preset: str) -> None:
    torch._dynamo.reset()
    net, data = ResidualCnn(), [torch.randn(4, 3, 8, 8) for _ in range(6)]
    eager = calibrated(net, preset, data[:2])
    compiled = copy.deepcopy(eager)
    schedule = Schedule(steps=1000, lr=0.1)
    first = 500
    assert schedule.phase(first) is schedule.phase(first + 6) is Phase.JOINT
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(compiled, fullgraph=True, backend=counter)
    found = steps(forward, compiled, data, schedule, first)
    expected = steps(eager, eager, data, schedule, first)
    assert counter.frame_count == 1
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):  # a rounding of the last bit moves codes of later steps
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm() + 1e-6, name


@pytest.mark.slow
def test_a_model_trained_in_compiled_steps_ships_what_it_computes() -> None:
    torch._dynamo.reset()
    net, data = ResidualCnn(), [torch.randn(4, 3, 8, 8) for _ in range(4)]
    model = calibrated(net, Plan.preset("w4a4", net, data[0]), data)
    steps(torch.compile(model, fullgraph=True), model, data, Schedule(steps=8, lr=0.1), 2)
    with torch.no_grad():
        assert torch.equal(model.eval()(data[0]), convert(model)(data[0]))
