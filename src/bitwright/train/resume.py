"""`save_run` and `load_run`: the checkpoint of `bitwright.train`, and the checks that it belongs to the same run."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from bitwright.errors import CheckpointError, TrainingError
from bitwright.flow.prepare import plan_of
from bitwright.observe.ranks import world_size
from bitwright.plan.target import spelled
from bitwright.train.parallel import is_sharded
from bitwright.train.run import Run
from bitwright.train.state import NAME, read_state, write_state
from bitwright.train.stream import random_state, set_random_state


def save_run(run: Run, folder: Path) -> None:
    """Write the whole state of a run; rank 0 writes, with the position and random state of every rank."""
    mine = {"stream": run.stream.state_dict(), "random": random_state()}
    ranks: list[Any] = [mine]
    if world_size() > 1:
        if is_sharded(run.model):
            raise TrainingError("train(checkpoint=...) needs whole weights; leave it out for sharded models")
        ranks = [None] * world_size()
        dist.all_gather_object(ranks, mine)
        if dist.get_rank() != 0:
            return
    write_state(folder, {"identity": _identity(run), "run": run.state_dict(), "ranks": ranks})


def load_run(run: Run, folder: Path) -> bool:
    """Continue from a checkpoint where there is one; the model stays as it is when this raises.

    Raises `TrainingError` when it belongs to another plan, schedule, optimizer or number of processes, and
    `CheckpointError` when it is damaged or does not fit the model.
    """
    state = read_state(folder)
    if state is None:
        return False
    _check_identity(state["identity"], _identity(run), folder)
    _check_shapes(run, state["run"]["model"], folder)
    mine = state["ranks"][dist.get_rank() if world_size() > 1 else 0]
    run.stream.load_state_dict(mine["stream"])
    run.load_state_dict(state["run"])
    set_random_state(mine["random"])
    return True


def _identity(run: Run) -> dict[str, Any]:
    """What a run must have in common with the one that wrote its checkpoint."""
    plan = plan_of(run.prepared)
    groups = [len(group["params"]) for group in run.optimizer.param_groups]
    return {
        "plan": {str(site): spelled(spec) for site, spec in plan.sites.items()},
        "ranges": {str(site): plan.range_rule(site) for site, spec in plan.sites.items() if spec is not None},
        "schedule": _fields(run.schedule),
        "optimizer": f"{type(run.optimizer).__name__} over groups of {groups} parameters",
        "processes": world_size(),
        "autocast": str(run.autocast),
    }


def _fields(value: Any) -> Any:
    """A frozen dataclass as plain values, with its name."""
    if not is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    return {"": type(value).__name__, **{f.name: _fields(getattr(value, f.name)) for f in fields(value)}}


def _check_identity(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    advice = "repeat the call that started it, or choose another folder"
    said = {
        "plan": "the plan of this model has {} = {}",
        "ranges": "the plan of this model trains the range of {} by {}",
        "schedule": "this call has Schedule({}={})",
    }
    for kind, what in said.items():
        for name in (*old[kind], *new[kind]):
            was, now = old[kind].get(name, "no such site"), new[kind].get(name, "no such site")
            if was != now:
                raise TrainingError(f"{folder / NAME} was written with {was}, but {what.format(name, now)}; {advice}")
    for name in ("optimizer", "processes", "autocast"):
        if old[name] != new[name]:
            raise TrainingError(f"{folder / NAME} was written with {name} {old[name]}, now it is {new[name]}; {advice}")


def _check_shapes(run: Run, saved: dict[str, Tensor], folder: Path) -> None:
    here = run.prepared.state_dict()
    for name in (*saved, *here):
        was, now = (list(state[name].shape) if name in state else "missing" for state in (saved, here))
        if was != now:
            raise CheckpointError(f"{folder / NAME} does not fit the model: {name} is {was} there and {now} here")
