"""The three phases, read from the model at every boundary, and the learning rate."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, TrainingError
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.nn.quantizer import Quantizer
from bitwright.plan.plan import Plan
from bitwright.train.schedule import Phase, Schedule, param_groups, weight_errors
from models import Mlp
from nets import calibrated, layers_of, one_thread, trained, unequal_kernels  # noqa: F401


class Net(nn.Module):
    """Folded and lonely batch norms, and a float head: everything that a phase can switch."""

    def __init__(self) -> None:
        super().__init__()
        self.lonely = nn.BatchNorm2d(3)
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(self.lonely(x))).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def ready() -> tuple[nn.Module, Tensor]:
    net, x = Net(), torch.randn(8, 3, 9, 9)
    for _ in range(20):
        net(x)
    return calibrated(net, "w4a4", [x]), x


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


SCALES = {f"conv{n}.{kind}_quantizer.scale" for n in (1, 2) for kind in ("weight", "input")}
WEIGHTS = {
    *(f"{norm}.{kind}" for norm in ("lonely", "norm1", "norm2") for kind in ("weight", "bias")),
    *("conv1.weight", "conv2.weight", "conv2.bias", "fc.weight", "fc.bias"),
}


def test_each_phase_trains_what_its_row_of_the_table_says() -> None:
    model, _ = ready()
    schedule = Schedule(steps=8, sensitivity={"conv1": 1.0, "conv2": 9.0})
    expected = {
        Phase.WARMUP: (WEIGHTS, False),
        Phase.JOINT: (WEIGHTS | SCALES, False),
        Phase.FINETUNE: ({"conv2.weight", "conv2.bias", "norm2.bias"}, True),
    }
    phases = []
    for step in range(10):
        model.train()
        phases.append(schedule.apply(model, step))
        names, frozen = expected[phases[-1]]
        assert trainable(model) == names, step
        assert {layer.freeze_norm for layer in layers_of(model).values()} == {frozen}
        assert model.lonely.training is not frozen
        assert model.training
    assert phases == [Phase.WARMUP] * 2 + [Phase.JOINT] * 4 + [Phase.FINETUNE] * 4
    schedule.apply(model, 0)  # going back works too
    assert trainable(model) == WEIGHTS


def test_each_phase_moves_what_its_row_of_the_table_says() -> None:
    model, x = ready()
    schedule = Schedule(steps=8, lr=2.0, sensitivity={"conv1": 1.0, "conv2": 9.0})
    optimizer = schedule.optimizer(model)
    for step in range(8):
        model.train()
        phase = schedule.apply(model, step, optimizer)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        statistics = {name for name in before if "running" in name or "tracked" in name}
        assert bool(moved & SCALES) == (phase is Phase.JOINT)
        assert (statistics <= moved) == (phase is not Phase.FINETUNE)
        if phase is Phase.FINETUNE:
            assert not moved & statistics
            assert not any(name.startswith(("conv1", "fc", "lonely", "norm1")) for name in moved)
        assert {"conv2.weight", "norm2.bias"} <= moved
        assert ("norm2.weight" in moved) == (phase is not Phase.FINETUNE)


def test_entering_a_phase_drops_the_gradients_of_what_it_freezes() -> None:
    model, x = ready()
    schedule = Schedule(steps=8, sensitivity={"conv2": 1.0})
    schedule.apply(model, 5)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    schedule.apply(model, 6)  # as in a loop that sets its gradients to zero only afterwards
    left = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert left == trainable(model) == {"conv2.weight", "conv2.bias", "norm2.bias"}


def test_the_most_sensitive_layers_go_on_training() -> None:
    model, _ = ready()
    errors = weight_errors(model)
    assert set(errors) == {"conv1", "conv2"}
    weight = model.conv2.folded()[0]
    relative = (model.conv2.weight_quantizer.simulate(weight) - weight).square().sum() / weight.square().sum()
    assert errors["conv2"] == pytest.approx(relative.item(), rel=1e-5)
    assert Schedule(steps=4).sensitive_layers(model)[0] == max(errors, key=lambda path: errors[path])
    assert Schedule(steps=4, keep=1.0).sensitive_layers(model) == sorted(errors, key=lambda path: -errors[path])
    scores = {"conv1": 5.0, "conv2": 3.0, "fc": 2.0}
    found = {
        keep: Schedule(steps=4, keep=keep, sensitivity=scores).sensitive_layers(model) for keep in (0.1, 0.5, 0.6, 0.9)
    }
    assert found == {0.1: ["conv1"], 0.5: ["conv1"], 0.6: ["conv1", "conv2"], 0.9: ["conv1", "conv2", "fc"]}


def test_a_sensitivity_for_a_module_that_does_not_exist_is_refused_at_the_start() -> None:
    model, _ = ready()
    with pytest.raises(TrainingError, match=r"Schedule\(sensitivity=\.\.\.\) names 'conv9', but the model has no such"):
        Schedule(steps=8, sensitivity={"conv9": 1.0}).apply(model, 0)


@pytest.mark.parametrize("steps", [2, 20, 1000])
def test_the_rate_falls_from_a_hundredth_to_a_ten_thousandth(steps: int) -> None:
    schedule = Schedule(steps=steps, lr=0.4, ramp=0.0)
    rates = [schedule.lr_at(step) for step in range(steps)]
    assert rates[0] == pytest.approx(0.01 * 0.4)
    assert rates[-1] == pytest.approx(0.0001 * 0.4)
    assert all(after < before for before, after in pairwise(rates))
    middle = 0.0001 * 0.4 + (0.01 - 0.0001) * 0.4 * 0.5 * (1 + math.cos(math.pi * (steps // 2) / (steps - 1)))
    assert rates[steps // 2] == pytest.approx(middle)
    assert schedule.lr_at(steps + 50) == pytest.approx(rates[-1])


def test_the_ramp_rises_to_the_cosine_and_leaves_it_alone_afterwards() -> None:
    ramped, plain = Schedule(steps=100, lr=1.0, ramp=0.05), Schedule(steps=100, lr=1.0, ramp=0.0)
    rates = [ramped.lr_at(step) for step in range(100)]
    assert all(after > before for before, after in pairwise(rates[:6]))
    assert rates[0] == pytest.approx(plain.lr_at(0) / 6)
    assert rates[5:] == [plain.lr_at(step) for step in range(5, 100)]


def test_the_rate_is_set_in_every_group() -> None:
    model, _ = ready()
    schedule = Schedule(steps=40, lr=0.3)
    optimizer = schedule.optimizer(model)
    schedule.apply(model, 25, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [schedule.lr_at(25)] * 3


def test_groups_hold_every_parameter_once_and_only_weights_decay() -> None:
    model, _ = ready()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups(model, weight_decay=0.01)
    found = [{names[p] for p in group["params"]} for group in groups]
    assert found[0] == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert found[1] == WEIGHTS - found[0]
    assert found[2] == SCALES
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert [group["weight_decay"] for group in Schedule(steps=4).optimizer(model).param_groups] == [1e-4, 0.0, 0.0]


def test_scales_of_codebooks_and_dynamic_inputs_are_not_learned() -> None:
    net, x = Mlp(), torch.randn(4, 16)
    rules = {"0.weight": "nf4/channel", "0.input": "float", "2.input": "int8/token/dynamic"}
    model = calibrated(net, Plan.preset("w8a8", net, x, sites=rules), [x])
    assert [tuple(p.shape) for p in param_groups(model)[2]["params"]] == [(32, 1)]
    Schedule(steps=4).apply(model, 2)
    assert model[2].weight_quantizer.scale.requires_grad
    assert not model[0].weight_quantizer.scale.requires_grad


def test_what_the_user_froze_stays_frozen() -> None:
    net, x = Net(), torch.randn(8, 3, 9, 9)
    net.conv2.weight.requires_grad_(False)
    net.norm1.requires_grad_(False)
    model = calibrated(net, "w4a4", [x])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = {"conv2.weight", "norm1.weight", "norm1.bias"}
    schedule = Schedule(steps=8, sensitivity={"conv2": 1.0})
    listed = {id(p) for group in param_groups(model) for p in group["params"]}
    for step in range(8):
        schedule.apply(model, step)
        assert not trainable(model) & frozen
    trained(model, [x])
    for name in frozen:
        assert torch.equal(model.get_parameter(name), before[name])
        assert id(model.get_parameter(name)) not in listed
    assert not torch.equal(model.conv1.weight, before["conv1.weight"])


def test_a_loop_of_the_users_own_ships_what_it_trained() -> None:
    model, x = ready()
    schedule = Schedule(steps=12, lr=1.0)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-3)
    before = model(x).detach()
    for epoch in range(12):
        model.train()
        schedule.apply(model, epoch)
        for batch in x.split(4):
            optimizer.zero_grad()
            (model(batch) - 1).square().mean().backward()
            optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1e-3
    model.eval()
    assert not torch.equal(model(x), before)
    assert unequal_kernels(model, [x, 3 * x]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "a schedule needs at least 1 step, got 0"),
        ({"shares": (0.5, 0.5, 0.5)}, r"the shares of the three phases must add up to 1, got \(0\.5, 0\.5, 0\.5\)"),
        ({"shares": (1.5, -0.5, 0.0)}, "must add up to 1"),
        ({"lr": 0.0}, "expected lr > 0, 0 < keep <= 1, 0 <= ramp < 1; got 0.0, 0.8, 0.02"),
        ({"lr": math.nan}, "expected lr > 0"),
        ({"keep": 0.0}, "0 < keep <= 1"),
        ({"ramp": 1.0}, "0 <= ramp < 1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Schedule(**{"steps": 10, **change})  # type: ignore[arg-type]


def test_only_calibrated_models_are_trained() -> None:
    net, x = Mlp(), torch.randn(4, 16)
    prepared = prepare(net, Plan.preset("w8a8", net, x))
    with pytest.raises(TrainingError, match=r"0\.weight has no scale yet; call bitwright\.calibrate before training"):
        Schedule(steps=4).apply(prepared, 0)
    with pytest.raises(BitwrightError, match="Mlp was not prepared by bitwright"):
        Schedule(steps=4).apply(net, 0)
    with pytest.raises(TrainingError, match="no simulated layers: it was converted already"):
        Schedule(steps=4).apply(convert(calibrated(net, "w8a8", [x])), 0)
    assert not any(q.scale.requires_grad for q in prepared.modules() if isinstance(q, Quantizer))
