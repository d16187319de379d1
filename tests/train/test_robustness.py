"""What users do between steps, bad batches, and models set up in the wrong order."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitwright.errors import NumericsError, TrainingError
from bitwright.flow.calibrate import calibrate
from bitwright.flow.prepare import prepare
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import EPS
from bitwright.plan.plan import Plan
from bitwright.train.groups import param_groups, prepared_part
from bitwright.train.loop import train
from bitwright.train.schedule import Phase, Schedule
from nets import calibrated, layers_of, one_thread, unequal_kernels  # noqa: F401

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lonely = nn.BatchNorm2d(2, affine=False)
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=None)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(self.lonely(x))).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def data(batches: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(8)
    return [
        (torch.randn(8, 2, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(batches)
    ]


def float_net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for x, _ in data():
        net(x)
    return net


def ready(rules: dict[str, str] | None = None) -> nn.Module:
    net = float_net()
    return calibrated(net, Plan.preset("w4a8", net, data()[0][0], sites=rules or {}), [x for x, _ in data()])


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Not a number where the batch holds one, whatever a kernel makes of it."""
    return cross_entropy(model(batch[0]), batch[1]) + 0.0 * batch[0].sum()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def poisoned(batch: Batch) -> Batch:
    x = batch[0].clone()
    x[0, 0, 0, 0] = torch.nan
    return x, batch[1]


@pytest.mark.parametrize("inputs", ["uint8/asym", "int8/token/dynamic"])
def test_a_batch_with_nan_is_skipped_and_changes_nothing(inputs: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    model = calibrated(net, Plan.preset("w8a8", net, x, sites={"0.input": inputs}), [x])
    bad = x.clone()
    bad[3, 3] = torch.nan
    states: list[dict[str, Tensor]] = [state(model)]
    history = train(
        model,
        loss,
        [(x, y), (bad, y)],
        schedule=Schedule(steps=12, lr=1.0),
        on_nan="skip",
        on_step=lambda step, value: states.append(state(model)),
    )
    assert history.skipped == [1, 3, 5, 7, 9, 11]
    for step, (before, after) in enumerate(pairwise(states)):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert bool(changed) == (step % 2 == 0), (step, changed)
    assert [value != value for value in history.losses] == [False, True] * 6
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_gradient_that_is_infinite_is_skipped_too() -> None:
    model, before = ready(), None
    before = state(model)

    def root(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) * 0.0).abs().sum().sqrt()  # 0 with an infinite gradient

    history = train(model, root, data(), schedule=Schedule(steps=4), on_nan="skip")
    assert history.skipped == [0, 1, 2, 3]
    assert moved(model, before) == set()
    with pytest.raises(TrainingError, match="a gradient is NaN or infinite at step 0; lower Schedule"):
        train(ready(), root, data(), schedule=Schedule(steps=4))


@pytest.mark.parametrize("rules", [{}, {"conv1.input": "int8/tensor/dynamic"}])
def test_stopping_at_nan_leaves_finite_statistics(rules: dict[str, str]) -> None:
    model = ready()
    with pytest.raises((TrainingError, NumericsError)):
        train(model, loss, [*data(2), poisoned(data()[0])], schedule=Schedule(steps=9))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_run_that_only_skips_is_stopped() -> None:
    with pytest.raises(TrainingError, match="the loss is nan at step 49, as in the 49 steps before; check the data"):
        train(ready(), loss, [poisoned(data()[0])], schedule=Schedule(steps=200), on_nan="skip")
    with pytest.raises(TrainingError, match="on_nan must be 'stop' or 'skip', got 'ignore'"):
        train(ready(), loss, data(), schedule=Schedule(steps=2), on_nan="ignore")  # type: ignore[arg-type]


def test_scales_that_a_step_drove_below_zero_are_put_back_and_counted() -> None:
    model = ready()
    quantizer = layers_of(model)["conv2"].weight_quantizer
    assert quantizer is not None
    schedule, counts = Schedule(steps=8, lr=1.0), []

    class Pushing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            if quantizer.scale.requires_grad:
                with torch.no_grad():
                    quantizer.scale[0] = -1.0
                    quantizer.scale[1] = 0.0

    history = train(
        model,
        loss,
        data(),
        schedule=schedule,
        optimizer=Pushing(param_groups(model), lr=0.1),
        on_step=lambda step, _: counts.append(quantizer.scale.min().item()),
    )
    assert history.clamped == 2 * 4
    assert counts[2:] == [pytest.approx(EPS)] * 6
    assert unequal_kernels(model, [data()[0][0]]) == []


def order(model: nn.Module, schedule: Schedule, step: int, how: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "train": model.train,
        "eval": model.eval,
        "apply": lambda: schedule.apply(model, step),
    }
    for name in how.split():
        calls[name]()


@pytest.mark.parametrize(
    "how", ["train apply", "apply train", "eval apply train", "apply eval train", "train apply train"]
)
def test_statistics_follow_the_schedule_in_any_order_of_calls(how: str) -> None:
    model, schedule = ready(), Schedule(steps=8)
    for step in range(8):
        order(model, schedule, step, how)
        before = state(model)
        loss(model, data()[0]).backward()
        statistics = {name for name in moved(model, before) if "running" in name}
        expected = {f"{norm}.running_{kind}" for norm in ("lonely", "norm1", "norm2") for kind in ("mean", "var")}
        assert statistics == (set() if step >= 6 else expected), step
    order(model, schedule, 0, "apply train")  # back to the start
    before = state(model)
    model(data()[0][0])
    assert "lonely.running_mean" in moved(model, before)
    assert not model.lonely._forward_pre_hooks


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_statistics_can_be_frozen_earlier(share: float) -> None:
    model, schedule = ready(), Schedule(steps=8, freeze_norms=share)
    for step in range(8):
        model.train()
        schedule.apply(model, step)
        before = state(model)
        model(data()[0][0])
        assert any("running" in name for name in moved(model, before)) == (step < 8 * share)
        assert schedule.norms_frozen(step) == (step >= 8 * share)


def test_the_schedule_wins_over_toggles_between_steps() -> None:
    model, schedule = ready(), Schedule(steps=8, sensitivity={"conv2": 1.0})
    reference = ready()
    for step in range(8):
        schedule.apply(model, step)
        schedule.apply(reference, step)
        wanted = {name for name, p in reference.named_parameters() if p.requires_grad}
        assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
        for parameter in model.parameters():
            parameter.requires_grad_(step % 2 == 0)
            parameter.grad = torch.zeros_like(parameter)
        schedule.apply(model, step)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
        assert {name for name, p in model.named_parameters() if p.grad is not None} <= wanted


def test_the_layers_of_the_last_phase_are_chosen_once() -> None:
    model, schedule = ready(), Schedule(steps=8, keep=0.1)
    schedule.apply(model, 6)
    chosen = model.bitwright_sensitive
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.weight.copy_(torch.randn_like(layer.weight))
    schedule.apply(model, 7)
    assert model.bitwright_sensitive is chosen


@pytest.mark.parametrize("inplace", [False, True])
def test_an_optimizer_from_before_prepare_is_refused(inplace: bool) -> None:
    net = float_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = prepare(net, Plan.preset("w4a8", net, data()[0][0]), inplace=inplace)
    calibrate(model, [x for x, _ in data()])
    message = r"the optimizer lacks 4 learned ranges, conv1\.weight_quantizer\.scale first; build it after prepare"
    with pytest.raises(TrainingError, match=message if inplace else "the optimizer holds none of this model's"):
        train(model, loss, data(), schedule=Schedule(steps=4), optimizer=optimizer)
    with pytest.raises(TrainingError, match="build it after prepare"):
        Schedule(steps=4).apply(model, 0, optimizer)
    if inplace:  # ranges that stay need no optimizer
        train(model, loss, data(), schedule=Schedule(steps=4, shares=(0.75, 0.0, 0.25)), optimizer=optimizer)


def test_a_loop_without_gradients_is_refused() -> None:
    model = ready()
    with (
        torch.no_grad(),
        pytest.raises(TrainingError, match=r"called without gradients; leave torch\.no_grad to train"),
    ):
        Schedule(steps=4).apply(model, 0)
    with torch.inference_mode(), pytest.raises(TrainingError, match="called without gradients"):
        train(model, loss, data(), schedule=Schedule(steps=4))


def test_norms_with_cumulative_averages_or_without_gains_train_and_ship() -> None:
    model = ready()
    before = state(model)
    train(model, loss, data(), schedule=Schedule(steps=12, lr=1.0))
    assert {"norm1.running_mean", "norm2.running_var", "lonely.running_mean"} <= moved(model, before)
    assert int(model.norm1.num_batches_tracked) == int(before["norm1.num_batches_tracked"]) + 9
    assert unequal_kernels(model, [data()[0][0]]) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when its compiler is loaded
def test_a_schedule_reaches_the_prepared_model_inside_others() -> None:
    model = ready()
    outer = nn.ModuleDict({"student": model, "head": nn.Linear(2, 2)})
    assert prepared_part(outer) is prepared_part(torch.compile(model)) is model  # type: ignore[arg-type]
    assert Schedule(steps=4).apply(outer, 1) is Phase.JOINT
    assert all(q.scale.requires_grad for q in model.modules() if isinstance(q, Quantizer) and q.scale is not None)
    assert outer["head"].weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": True}, "at least 1 step, got True"),
        ({"steps": 2.5}, r"at least 1 step, got 2\.5"),
        ({"shares": (0.5, 0.5)}, r"must add up to 1, got \(0\.5, 0\.5\)"),
        ({"shares": (float("nan"), 0.5, 0.5)}, "must add up to 1"),
        ({"lr": float("inf")}, "expected lr > 0"),
        ({"keep": float("nan")}, "0 < keep <= 1"),
        ({"sensitivity": {"conv1": float("nan")}}, "finite and not negative, got nan for 'conv1'"),
        ({"sensitivity": {"conv1": -1.0}}, r"got -1\.0 for 'conv1'"),
        ({"freeze_norms": 0.8}, r"between 0 and the end of the joint phase \(0\.75\), got 0\.8"),
        ({"freeze_norms": -0.1}, "freeze_norms must lie between"),
    ],
)
def test_states_that_make_no_sense_cannot_be_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Schedule(**{"steps": 10, **change})


def test_a_schedule_cannot_be_changed_afterwards() -> None:
    scores = {"conv1": 1.0}
    schedule = Schedule(steps=4, sensitivity=scores)
    scores["conv1"] = -5.0
    assert schedule.sensitivity == {"conv1": 1.0}
    with pytest.raises(AttributeError):
        schedule.steps = 5  # type: ignore[misc]
    with pytest.raises(TrainingError, match="steps count from 0, got -1"):
        schedule.phase(-1)
