"""The distillation loss, and how it wraps a task's loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import TrainingError
from bitwright.plan.plan import Plan
from bitwright.train.distill import distill, distillation, logits_of
from bitwright.train.loop import train
from bitwright.train.schedule import Schedule
from models import Mlp
from nets import calibrated, one_thread  # noqa: F401


def task(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(logits_of(model(batch[0])), batch[1])


def batch(items: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(items, 16), torch.randint(4, (items,))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_torchs_divergence_times_the_square_of_the_temperature(temperature: float) -> None:
    student, teacher = torch.randn(5, 7), 3 * torch.randn(5, 7)
    ours, theirs = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    expected = temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    assert distillation(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-6)


def test_tokens_and_pixels_are_averaged() -> None:
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    expected = torch.stack(
        [distillation(s, t) for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)]
    ).mean()
    assert distillation(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)
    moved = distillation(student.movedim(-1, 1), teacher.movedim(-1, 1), dim=1)
    assert moved.item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradients_at_high_temperature_are_those_of_matched_logits() -> None:
    """Hinton 2015, section 2.1: for high T and zero-mean logits the gradient tends to (student - teacher) / classes."""
    student, teacher = (x - x.mean(-1, keepdim=True) for x in torch.randn(2, 1, 6).double())
    student.requires_grad_()
    distillation(student, teacher, 1000.0).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, ((student - teacher) / 6).detach(), atol=1e-3)


def test_the_combined_loss_weighs_both_parts() -> None:
    student, teacher, data = Mlp(), Mlp().train(), batch()
    expected = 0.3 * task(student, data) + 0.7 * distillation(student(data[0]), teacher(data[0]), 2.0)
    found = distill(task, teacher, alpha=0.7, temperature=2.0)(student, data)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not teacher.training
    assert not student._forward_hooks


class Logits(Mlp):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, input: Tensor) -> Any:
        logits = super().forward(input)
        return {"logits": logits} if self.kind == "dict" else SimpleNamespace(logits=logits, loss=None)


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_outputs_may_carry_logits(kind: str) -> None:
    student, teacher, data = Logits(kind), Mlp(), batch()
    plain = Mlp()
    plain.load_state_dict(student.state_dict())
    assert distill(task, teacher)(student, data).item() == distill(task, teacher)(plain, data).item()


def test_mistakes_are_explained() -> None:
    data = batch()
    with pytest.raises(TrainingError, match=r"expected 0 < alpha <= 1 and temperature > 0, got 0 and 4\.0"):
        distill(task, Mlp(), alpha=0)
    with pytest.raises(TrainingError, match=r"teacher's logits are \[6, 9\], the student's \[6, 4\]"):
        distill(task, Mlp(classes=9))(Mlp(), data)
    with pytest.raises(TrainingError, match="calls the model once; it called it 2 times"):
        distill(lambda m, b: task(m, b) + task(m, b), Mlp())(Mlp(), data)
    with pytest.raises(TrainingError, match="called it 0 times"):
        distill(lambda m, b: torch.zeros((), requires_grad=True), Mlp())(Mlp(), data)
    with pytest.raises(TrainingError, match="an output that is a tensor or has logits, got list"):
        logits_of([torch.zeros(1)])


def test_training_with_the_float_model_as_teacher_comes_closer_to_it() -> None:
    net = Mlp()
    with torch.no_grad():
        net[4].weight.mul_(20)
    data = [batch(32) for _ in range(4)]
    plan = {"*.weight": "int3/channel", "*.input": "uint4/asym"}

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(distillation(model(x), net(x), 1.0).item() for x, _ in data)

    model = calibrated(net, Plan.preset("w8a8", net, data[0][0], sites=plan), [x for x, _ in data])
    before = distance(model)
    train(model, distill(task, net, alpha=1.0), data, schedule=Schedule(steps=40, lr=3.0))
    assert distance(model) < 0.5 * before
