"""Flips are counted by the paper's rule; what is frozen stays frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import TrainingError
from bitwright.numerics.affine import encode
from bitwright.plan.plan import Plan
from bitwright.train.loop import train
from bitwright.train.oscillation import Oscillation, OscillationTracker, dampening
from bitwright.train.schedule import Schedule
from bitwright.train.step import StepRules
from models import ConvNorm, Mlp, with_statistics
from nets import calibrated, layers_of, one_thread, unequal_kernels  # noqa: F401


def ready(net: nn.Module, x: Tensor) -> nn.Module:
    rules = {"*.weight": "int3/channel", "*.input": "int8"}
    return calibrated(net, Plan.preset("w8a8", net, x, sites=rules), [x])


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.weight": encode(
            layer.folded()[0].detach(), layer.weight_quantizer.spec, layer.weight_quantizer.qparams
        )  # type: ignore
        for path, layer in layers_of(model).items()
    }


def test_the_frequency_is_the_papers() -> None:
    """Codes 0 1 0 1 1 2 1: changes + - + . + -, flips at the 2nd, 3rd and last."""
    model = ready(Mlp(), torch.randn(8, 16))
    layer, tracker = model[0], OscillationTracker(Oscillation(momentum=0.1))
    scale = layer.weight_quantizer.scale.detach()
    expected = average = 0.0
    for index, (code, flip) in enumerate(zip([0, 1, 0, 1, 1, 2, 1], [0, 0, 1, 1, 0, 0, 1], strict=True)):
        with torch.no_grad():
            layer.weight.copy_((code * scale).expand_as(layer.weight))
        tracker.step(model, freeze=False)
        expected = 0.9 * expected + 0.1 * flip
        average = code if index == 0 else 0.9 * average + 0.1 * code
    seen = tracker.weights["0.weight"]
    assert torch.allclose(seen["frequency"], torch.tensor(expected))
    assert torch.allclose(seen["average"], torch.tensor(average))
    assert tracker.frozen == 0


def test_what_is_frozen_keeps_its_code_whatever_happens_to_it() -> None:
    model = ready(Mlp(), torch.randn(8, 16))
    layer, tracker = model[0], OscillationTracker(Oscillation(threshold=0.15, momentum=0.1))
    scale = layer.weight_quantizer.scale.detach()
    restless = torch.zeros_like(layer.weight, dtype=torch.bool)
    restless[:, ::3] = True
    for step in range(12):
        with torch.no_grad():
            layer.weight.copy_(torch.where(restless, (0.49 + 0.1 * (step % 2)) * scale, 0.2 * scale))
        tracker.step(model, freeze=step >= 8)
    seen = tracker.weights["0.weight"]
    assert torch.equal(seen["frozen"], restless)
    assert tracker.frozen == int(restless.sum())
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))
    moved = layer.weight.detach().clone()
    tracker.step(model, freeze=True)
    assert torch.equal(layer.weight[restless], kept[restless])
    assert torch.equal(layer.weight[~restless], moved[~restless])


def test_codes_under_a_batch_norm_that_goes_on_training_stay() -> None:
    x, net = torch.randn(8, 2, 6, 6), with_statistics(ConvNorm())
    with torch.no_grad():
        net.norm.weight[0] = 0.0  # a dead channel has no code to hold
    model = ready(net, x)
    tracker = OscillationTracker(Oscillation(threshold=0.15, momentum=0.1))
    before = model.conv.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model.conv.weight.copy_(before * (-1) ** step)
        tracker.step(model, freeze=step == 11)
    frozen = tracker.weights["conv.weight"]["frozen"].clone()
    assert int(frozen.sum()) > 20
    kept = codes(model)["conv.weight"][frozen]
    for _ in range(5):
        with torch.no_grad():
            model.conv.weight.add_(torch.randn_like(model.conv.weight))
            model.norm.weight.mul_(-1.3)
        assert not torch.equal(codes(model)["conv.weight"][frozen], kept)
        tracker.step(model, freeze=True)
        assert torch.equal(codes(model)["conv.weight"][frozen], kept)
    assert model.conv.weight.isfinite().all()
    assert unequal_kernels(model.eval(), [x]) == []


def test_nothing_is_frozen_before_the_last_phase() -> None:
    model = ready(Mlp(), torch.randn(8, 16))
    schedule = Schedule(steps=12, oscillation=Oscillation(1e-6, 1.0))
    rules = StepRules(model, schedule)
    for step in range(12):
        with torch.no_grad():
            model[0].weight.mul_(-1)
        rules.after(step)
        assert rules.tracker is not None
        assert (rules.tracker.frozen > 0) == (step >= 9)


def test_the_dampening_loss_pulls_weights_to_their_codes() -> None:
    model = ready(Mlp(), torch.randn(8, 16))
    value = dampening(model)
    value.backward()
    for layer in layers_of(model).values():
        weight, quantizer = layer.weight, layer.weight_quantizer
        quantized = quantizer.simulate(weight.detach())  # type: ignore[union-attr]
        scale = quantizer.scale.detach()  # type: ignore[union-attr]
        inside = (weight <= 3 * scale) & (weight >= -4 * scale)
        assert torch.allclose(weight.grad[inside], 2 * (weight - quantized)[inside].detach(), atol=1e-6)
        assert (weight.grad[~inside] == 0).all()
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.weight.copy_(layer.weight_quantizer.simulate(layer.weight))  # type: ignore[union-attr]
    assert dampening(model).item() < 1e-10 < value.item()


def test_training_with_it_ships_what_it_trained() -> None:
    x = torch.randn(8, 16)
    model = ready(Mlp(), x)
    schedule = Schedule(steps=24, lr=5.0, oscillation=Oscillation(0.02, 0.3))
    train(model, lambda m, b: (m(b) - 1).square().mean(), [x], schedule=schedule)
    assert unequal_kernels(model, [x]) == []


@pytest.mark.parametrize("values", [(0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (0.1, 1.5)])
def test_rates_out_of_range_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(TrainingError, match="expected 0 < threshold < 1 and 0 < momentum <= 1"):
        Oscillation(*values)


def test_a_frozen_transposed_convolution_keeps_its_codes() -> None:
    x, net = torch.randn(3, 4, 5, 5), nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ReLU())
    model = ready(net, x)
    tracker = OscillationTracker(Oscillation(threshold=0.15, momentum=0.1))
    before = model[0].weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model[0].weight.copy_(before * (-1) ** step)
        tracker.step(model, freeze=step == 11)
    frozen = tracker.weights["0.weight"]["frozen"].clone()
    assert int(frozen.sum()) > 20
    kept = codes(model)["0.weight"][frozen]
    with torch.no_grad():
        model[0].weight.add_(torch.randn_like(model[0].weight))
    assert not torch.equal(codes(model)["0.weight"][frozen], kept)
    tracker.step(model, freeze=True)
    assert torch.equal(codes(model)["0.weight"][frozen], kept)
