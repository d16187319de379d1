"""Changes to a module that are taken back: its tensors as they were, and other children for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from bitwright.nn.layer import QLayer


@contextmanager
def standing_in(stand_ins: Mapping[tuple[nn.Module, str], nn.Module]) -> Iterator[None]:
    """Children replaced inside the block."""
    held = {place: getattr(*place) for place in stand_ins}
    try:
        for (module, name), part in stand_ins.items():
            setattr(module, name, part)
        yield
    finally:
        for (module, name), part in held.items():
            setattr(module, name, part)


class Snapshot:
    """The tensors of a module, and of batch norms that its layers hold, as they were."""

    def __init__(self, module: nn.Module) -> None:
        norms = [norm for part in module.modules() if isinstance(part, QLayer) for norm in part.norm]
        self.parameters = [p for part in (module, *norms) for p in part.parameters()]
        self.values = [
            (t, t.detach().clone()) for part in (module, *norms) for t in (*part.parameters(), *part.buffers())
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Write them back."""
        for tensor, value in self.values:
            tensor.copy_(value)

    @contextmanager
    def only_training(self, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside the block ``chosen`` have gradients and all others of the module have none."""
        held = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
            for parameter in chosen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, wanted, grad in held:
                parameter.requires_grad_(wanted)
                parameter.grad = grad
