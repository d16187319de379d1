"""`distill`: the task's loss together with what the float model says about the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import TrainingError

Loss = Callable[[nn.Module, Any], Tensor]


def distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0, *, dim: int = -1) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))`` over ``dim``, mean over all else (Hinton 2015).

    The factor keeps gradients of one size for every temperature. Computed in float32.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> distillation(logits, logits).item(), round(distillation(torch.zeros(1, 3), logits, 1.0).item(), 4)
    (0.0, 0.5743)
    """
    if student.shape != teacher.shape:
        raise TrainingError(f"the teacher's logits are {list(teacher.shape)}, the student's {list(student.shape)}")
    ours, theirs = (F.log_softmax(logits.float() / temperature, dim) for logits in (student, teacher))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(dim).mean()


def distill(loss: Loss, teacher: nn.Module, *, alpha: float = 0.5, temperature: float = 4.0, dim: int = -1) -> Loss:
    """``loss`` for `bitwright.train` that becomes ``(1 - alpha) * loss + alpha * distillation``.

    The teacher, usually the float model, sees the arguments that ``loss`` gives to the student; it runs in eval mode
    and without gradients. Outputs are tensors, or objects or dicts with ``logits``; ``dim`` is their class axis.
    Raises `TrainingError` when ``loss`` does not call the model exactly once, and for outputs without logits.
    """
    if not 0 < alpha <= 1 or not temperature > 0:
        raise TrainingError(f"expected 0 < alpha <= 1 and temperature > 0, got {alpha} and {temperature}")

    def combined(model: nn.Module, batch: Any) -> Tensor:
        calls: list[tuple[Any, Any, Any]] = []

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((args, kwargs, output))

        hook = model.register_forward_hook(note, with_kwargs=True)
        try:
            task = loss(model, batch)
        finally:
            hook.remove()
        if len(calls) != 1:
            raise TrainingError(f"distill needs a loss that calls the model once; it called it {len(calls)} times")
        args, kwargs, output = calls[0]
        teacher.eval()
        with torch.no_grad():
            target = logits_of(teacher(*args, **kwargs))
        return (1 - alpha) * task + alpha * distillation(logits_of(output), target, temperature, dim=dim)

    return combined


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, its ``logits``, or its entry ``"logits"``."""
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TrainingError(f"distill needs an output that is a tensor or has logits, got {type(output).__name__}")
    return found
