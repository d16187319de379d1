"""The automaton of the loss scale, and training under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.train.amp import LossScale, finite_gradients
from bitwright.train.loop import train
from bitwright.train.schedule import Schedule
from models import Mlp, ResidualCnn, image, with_statistics
from nets import calibrated, one_thread, unequal_kernels  # noqa: F401


def test_the_scale_starts_at_65536_doubles_after_2000_good_steps_and_halves_on_infinity() -> None:
    scale, factors = LossScale(), []
    for step in range(6500):
        scale.update(finite=step not in (1500, 1501, 4000))
        factors.append(scale.factor)
    assert factors[0] == factors[1499] == 65536
    assert (factors[1500], factors[1501]) == (32768, 16384)
    assert (factors[3500], factors[3501], factors[3999]) == (16384, 32768, 32768)
    assert (factors[4000], factors[5999], factors[6000], factors[6499]) == (16384, 16384, 32768, 32768)


def test_gradients_are_divided_before_they_are_used() -> None:
    net, scale = nn.Linear(2, 1, bias=False), LossScale(8.0)
    (net(torch.ones(1, 2)).sum() * 8).backward()
    scale.unscale(net)
    assert torch.equal(net.weight.grad, torch.ones(1, 2))
    assert finite_gradients(net)
    net.weight.grad[0, 0] = torch.inf
    assert not finite_gradients(net)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_follows_the_float32_run(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    net, x, y = with_statistics(ResidualCnn()), image(16, 12), torch.randint(5, (16,))
    losses, seen = {}, []

    def noted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(model.fc(torch.zeros(1, 8)).dtype)
        return loss(model, batch)

    for kind in (None, dtype):
        model = calibrated(net, "w4a8", [x])
        history = train(model, noted, [(x, y)], schedule=Schedule(steps=30, lr=1.0), autocast=kind)
        losses[kind] = torch.tensor(history.losses)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert unequal_kernels(model, [x]) == []
    assert seen[0] == torch.float32
    assert seen[-1] == dtype
    assert losses[None][-1] < losses[None][0] - 0.05
    assert (losses[None] - losses[dtype])[len(history.skipped) :].abs().max() < 0.05
    assert not torch.equal(losses[None], losses[dtype])


def test_an_overflow_under_float16_is_skipped_and_the_scale_halved() -> None:
    net, x, y = Mlp(), torch.randn(8, 16), torch.randint(4, (8,))
    model = calibrated(net, "w8a8", [x])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed: list[bool] = []

    def on_step(step: int, value: float) -> None:
        changed.append(any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()))

    big = lambda m, b: 300 * loss(m, b)  # noqa: E731
    history = train(model, big, [(x, y)], schedule=Schedule(steps=30, lr=1e-3), autocast=torch.float16, on_step=on_step)
    assert history.skipped == list(range(len(history.skipped)))
    assert 0 < len(history.skipped) < 20
    assert changed == [step >= len(history.skipped) for step in range(30)]
