"""`train`: a plain loop over a `Schedule` that keeps the best model seen, the calibrated start included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitwright.errors import TrainingError
from bitwright.observe.ranks import world_size
from bitwright.train.history import History, Score
from bitwright.train.interrupt import Interrupts
from bitwright.train.parallel import check_wrapped
from bitwright.train.resume import load_run, save_run
from bitwright.train.run import Run
from bitwright.train.schedule import Schedule
from bitwright.train.stream import Batches, Stream


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Batches,
    *,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer | None = None,
    score: Score | None = None,
    score_every: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    on_nan: Literal["stop", "skip"] = "stop",
    autocast: torch.dtype | None = None,
) -> History:
    """Quantization-aware training of a prepared and calibrated model, in place.

    ``loss(model, batch)`` returns a scalar; ``batches`` (a list or DataLoader, read again when exhausted, or a function
    from the epoch's number to one) yields what it takes. ``score(model)``, larger is better, is asked at the start,
    every ``score_every`` steps (default: a tenth of the schedule) and at the end; the model ends with the best state
    seen, so never below its calibrated start. It returns a number, or better the scores of single items (see
    `item_scores`): then the latest state is kept that is not worse than the highest score with 95 % confidence,
    because the highest of noisy scores is often luck. Score on data that is kept apart from the final test. While
    ``Schedule(precision=...)`` has other bits than the plan, nothing is scored. ``on_step(step, loss)`` shows progress.

    ``checkpoint`` is a folder that holds the whole state of the run, written every ``checkpoint_every`` steps (default:
    a tenth) and at an interrupt. The same call again continues from there, after a kill too, and ends with the same
    bits; a finished run is only loaded. The order of the batches must follow from the epoch and the random state, as in
    lists and in a DataLoader. To start anew, choose another folder. Ctrl-C ends the current step first; a second one
    stops at once.

    ``on_nan="skip"`` leaves out steps whose loss or gradient is not finite: weights, statistics and ranges stay.
    ``autocast`` runs the forward in bfloat16 or float16 where layers are not simulated (float16 with a `LossScale`);
    codes, scales and weights stay float32.

    Under ``torch.distributed`` pass the model in ``DistributedDataParallel(..., find_unused_parameters=True)`` or
    sharded by ``fully_shard``; scores are averaged over ranks, rank 0 writes the checkpoint.

    An interrupt leaves the best state so far in the model. Raises `TrainingError` for a loss that is not finite, for
    batches that run out, and for a checkpoint of another plan or schedule; `CheckpointError` for a damaged one.
    """
    if on_nan not in ("stop", "skip"):
        raise TrainingError(f"on_nan must be 'stop' or 'skip', got {on_nan!r}")
    check_wrapped(model)
    run = Run(model, loss, Stream(batches), schedule, optimizer, score, skip=on_nan == "skip", autocast=autocast)
    folder = None if checkpoint is None else Path(checkpoint)
    tenth = max(1, schedule.steps // 10)
    resumed = folder is not None and load_run(run, folder)
    try:
        with Interrupts(folder is not None) as interrupts:
            _to_the_end(run, folder, score_every or tenth, checkpoint_every or tenth, resumed, on_step, interrupts)
    finally:
        run.restore_best()
        model.eval()
    return run.history


def _to_the_end(
    run: Run,
    folder: Path | None,
    score_every: int,
    save_every: int,
    resumed: bool,
    on_step: Callable[[int, float], None] | None,
    interrupts: Interrupts,
) -> None:
    steps, saved, between_steps = run.schedule.steps, run.done if resumed else None, True
    try:
        while True:
            ended = run.done == steps
            if run.done % score_every == 0 or ended:
                run.consider()
            if folder is not None and run.done != saved and (run.done % save_every == 0 or ended):
                save_run(run, folder)
                saved = run.done
            if ended:
                return
            between_steps = False
            run.step()
            between_steps = True
            if on_step is not None:
                on_step(run.done - 1, run.history.losses[-1])
            interrupts.check()
    except KeyboardInterrupt:
        if folder is not None and between_steps and world_size() == 1:  # ranks are not interrupted alike
            save_run(run, folder)
        raise
