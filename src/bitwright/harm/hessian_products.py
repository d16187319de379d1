"""Hessian-vector products by two backward passes: ``H v`` is the gradient of ``g . v``, g that of the loss.

Pearlmutter, "Fast exact multiplication by the Hessian" (1994); H itself is never formed. Attention runs under the math
kernel, as fused ones have no second derivative. Kinks of ReLU count as flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from bitwright.errors import SearchError
from bitwright.graph.dataflow import evaluating
from bitwright.harm.alone import Forward

Loss = Callable[[nn.Module, Any], Tensor]
Vectors = dict[Any, Tensor]
Run = Callable[[Loss, Any], tuple[Tensor, Vectors]]
"""Loss and batch to the value of the loss and the tensors to differentiate by, under keys that can be printed."""


def own_answers(forward: Forward) -> Loss:
    """``KL(p || softmax(outputs))``, p being the model's own answer, held fixed: 0, its gradient too.

    Its Hessian H is the Fisher matrix with the expectation over classes taken exactly, ``1/2 d' H d`` the second order
    of the KL divergence that a change d makes. The mean is over items (all axes but the last), outputs are summed.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logs = [F.log_softmax(rows, -1) for rows in rows_of(forward(model, batch))]
        parts = [F.kl_div(log, log.detach(), reduction="batchmean", log_target=True) for log in logs]
        return torch.stack(parts).sum()

    return loss


def rows_of(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among outputs, as rows ``[items, classes]``."""
    leaves = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.flatten(0, -2) for x in leaves]


def gradients(run: Run, loss: Loss, batch: Any) -> tuple[Vectors, Vectors]:
    """Variables and gradients of one batch, which can be differentiated again; those it does not reach are left out.

    Raises `SearchError` for a loss that is no single finite number or depends on no variable, and for custom functions
    whose backward cannot be differentiated.
    """
    value, variables = run(loss, batch)
    if value.numel() != 1 or not value.isfinite().all():
        raise SearchError(f"the loss of a batch is {value.tolist()}; it must be one finite number")
    if not value.requires_grad:
        raise SearchError(f"the loss depends on none of {', '.join(map(str, variables))}")
    _check_second(value)
    found = torch.autograd.grad(value, list(variables.values()), create_graph=True, allow_unused=True)
    gradient = {key: g for key, g in zip(variables, found, strict=True) if g is not None}
    return {key: variables[key] for key in gradient}, gradient


def products(variables: Vectors, gradient: Vectors, vectors: Vectors) -> Vectors:
    """``H v`` of one batch in float64, H that of the given ``variables`` alone; zeros where a gradient is constant.

    Raises `SearchError` that names an operation without a second derivative.
    """
    curved = [key for key in variables if gradient[key].requires_grad]
    found: Sequence[Tensor | None] = [None] * len(variables)
    if curved:
        inner, outer = [gradient[key] for key in curved], [vectors[key] for key in curved]
        try:
            found = torch.autograd.grad(inner, list(variables.values()), outer, retain_graph=True, allow_unused=True)
        except RuntimeError as cause:
            if "derivative" not in str(cause) and "double backward" not in str(cause):
                raise
            raise SearchError(f"no second derivative: {cause}; measure 'fisher' or 'kl' instead") from cause
    pairs = zip(variables.items(), found, strict=True)
    return {key: (torch.zeros_like(x) if h is None else h).double() for (key, x), h in pairs}


def _check_second(loss: Tensor) -> None:
    """Refuse functions that are differentiable once: torch takes their gradients for constants where it can."""
    custom = [node._forward_cls for node in _nodes(loss) if hasattr(node, "_forward_cls")]
    once = {cls.__qualname__ for cls in custom if _wrapped_by_torch(cls.backward)}
    if once:
        raise SearchError(
            f"no second derivative: {', '.join(sorted(once))} is marked once_differentiable; measure 'fisher' or 'kl' "
            "instead"
        )


def _wrapped_by_torch(function: Any) -> bool:
    """Whether a backward lies in the module that ``once_differentiable`` is from."""
    return getattr(function, "__globals__", {}).get("__name__") == "torch.autograd.function"


def _nodes(tensor: Tensor) -> Iterator[Any]:
    """The nodes of an autograd graph, each once."""
    todo: list[Any] = [tensor.grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
            yield node


@contextmanager
def differentiable_twice(model: nn.Module, wanted: Iterable[Tensor]) -> Iterator[None]:
    """Eval mode, gradients of ``wanted`` parameters only, kernels with second derivatives; all as before afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in wanted}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
