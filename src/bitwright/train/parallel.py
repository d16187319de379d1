"""What several ranks must agree on in every step beyond what data-parallel wrappers average.

`DistributedDataParallel` averages the gradients of parameters that were trainable when it was built: learned ranges,
frozen until the joint phase, are not among them, so they are averaged here. Running statistics of batch norms (folded
ones included) are local to a rank: each step they are replaced by those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bitwright.errors import TrainingError
from bitwright.observe.ranks import world_size


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are sharded over ranks (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_wrapped(model: nn.Module) -> None:
    """Raise `TrainingError` for a model whose gradients nobody averages, or that cannot freeze parameters."""
    if world_size() == 1 or is_sharded(model):
        return
    wrapper = next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
    if wrapper is None:
        raise TrainingError(
            f"{world_size()} processes train one model: "
            "after calibrate, wrap it in DistributedDataParallel or fully_shard"
        )
    if not wrapper.find_unused_parameters:
        raise TrainingError(
            "the schedule freezes parameters on the way: "
            "build DistributedDataParallel(..., find_unused_parameters=True)"
        )


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on some rank."""
    if world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(value: float, device: torch.device) -> float:
    """The mean of a number over ranks."""
    if world_size() == 1:
        return value
    total = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over ranks of gradients, in one exchange; a missing one counts as zero, sharded parameters are left."""
    own = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if world_size() == 1 or not own:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
    dist.all_reduce(flat)
    for parameter, part in zip(own, (flat / world_size()).split([p.numel() for p in own]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Running statistics as if one process had seen the batches of all ranks, in one exchange.

    Ranks start a step with equal statistics and end it with ``r_i = r + m (b_i - r)``. The mean over ranks of the r_i
    is the update with the mean of the b_i. For variances the spread of the batch means is added: ``var = mean(var_i) +
    m * mean((b_i - mean(b))^2)``, and the b_i differ by ``(r_i - mean(r)) / m`` (law of total variance).
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if world_size() == 1 or not norms:
        return
    means = torch.cat([_buffer(norm.running_mean) for norm in norms])
    variances = torch.cat([_buffer(norm.running_var) for norm in norms])
    share = torch.cat([torch.full_like(_buffer(norm.running_mean), _share(norm)) for norm in norms])
    total = torch.stack([means, variances])
    dist.all_reduce(total)
    mean, variance = total / world_size()
    spread = (means - mean).square()
    dist.all_reduce(spread)
    variance += spread / world_size() / share
    sizes = [norm.num_features for norm in norms]
    for norm, m, v in zip(norms, mean.split(sizes), variance.split(sizes), strict=True):
        _buffer_of(norm.running_mean).copy_(m)
        _buffer_of(norm.running_var).copy_(v)


def _share(norm: _BatchNorm) -> float:
    """Weight of the newest batch in the running statistics."""
    if norm.momentum is not None:
        return norm.momentum if norm.momentum > 0 else math.inf
    seen = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked.item())
    return 1.0 / max(seen, 1)


def _buffer_of(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer


def _buffer(buffer: Tensor | None) -> Tensor:
    return _buffer_of(buffer).double()
