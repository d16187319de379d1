"""Route `scaled_dot_product_attention` in a module's forward to named children, whatever Python is around it.

Attention modules of model libraries call it behind dispatch tables and caches that no tracer follows. So their forward
stays as it is and runs under a function mode that hands these calls, and nothing else, to ``attention_0``, ... .
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bitwright.errors import ModelError
from bitwright.graph.calls import Attention


class _Route(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.count = module, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = getattr(self.module, f"attention_{self.count}", func)
            self.count += 1
        return func(*args, **(kwargs or {}))


def why_not_routable(module: nn.Module, count: int) -> str:
    """Empty if the ``count`` attentions in ``module.forward`` can be routed, else the reason in a few words."""
    taken = next((f"attention_{i}" for i in range(count) if hasattr(module, f"attention_{i}")), "")
    return f"{type(module).__name__} has an attribute {taken} already" if taken else ""


def route_attention(module: nn.Module, ordinals: Iterable[int]) -> None:
    """Give ``module`` children `Attention` for these calls of its forward, in place; its class becomes a subclass.

    Raises `ModelError` when the module has such an attribute already.
    """
    ordinals = list(ordinals)
    if reason := why_not_routable(module, max(ordinals) + 1):
        raise ModelError(f"{reason}; write the call as bitwright.Attention")
    for ordinal in ordinals:
        module.add_module(f"attention_{ordinal}", Attention())
    module.__class__ = _routed(type(module))


def _routed(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Route(self):
            return cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
