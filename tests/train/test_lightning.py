"""A real Trainer of Lightning goes through the phases and ends with a model that ships bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_huggingface import items, ready, score, without
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitwright.errors import MissingExtraError, TrainingError
from bitwright.train.loop import train
from bitwright.train.precision import Progressive
from bitwright.train.schedule import Phase, Schedule
from nets import one_thread, unequal_kernels  # noqa: F401

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and deprecations of its own


class Lit(lightning.LightningModule):
    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.model, self.schedule = model, schedule
        self.seen: list[tuple[Phase, bool, bool, float]] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        scale: Any = self.model.conv.weight_quantizer.scale
        rate = self.optimizers().param_groups[0]["lr"]
        self.seen.append((self.model.bitwright_phase, scale.requires_grad, self.model.conv.freeze_norm, rate))
        return cross_entropy(self.model(batch["x"]), batch["labels"])

    def configure_optimizers(self) -> Any:
        return self.schedule.optimizer(self.model)


def fit(
    model: nn.Module, schedule: Schedule, folder: Path, callbacks: list[Any], data: Any = None, **settings: Any
) -> Lit:
    lit, path = Lit(model, schedule), settings.pop("ckpt_path", None)
    settings = {"max_steps": schedule.steps, "accelerator": "cpu", "logger": False, **settings}
    trainer = lightning.Trainer(
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **settings},
    )
    trainer.fit(lit, torch.utils.data.DataLoader(data or items(), 8), ckpt_path=path)  # type: ignore[arg-type]
    return lit


@pytest.mark.slow
def test_the_trainer_goes_through_the_phases_and_ships_what_it_trained(tmp_path: Path) -> None:
    from bitwright.train.lightning import ScheduleCallback

    model, schedule = ready(), Schedule(steps=20, lr=10.0)
    callback, before = ScheduleCallback(schedule, score=score, score_every=5), score(model)
    lit = fit(model, schedule, tmp_path, [callback])
    phases = [Phase.WARMUP] * 5 + [Phase.JOINT] * 10 + [Phase.FINETUNE] * 5
    assert [row[0] for row in lit.seen] == phases
    assert [row[1] for row in lit.seen] == [phase is Phase.JOINT for phase in phases]
    assert [row[2] for row in lit.seen] == [phase is Phase.FINETUNE for phase in phases]
    assert [row[3] for row in lit.seen] == pytest.approx([schedule.lr_at(step) for step in range(20)])
    assert [step for step, _ in callback.history.scores] == [0, 5, 10, 15, 20]
    assert callback.history.scores[0][1] == before
    assert score(model) == callback.history.best_score > before
    assert not model.training
    assert unequal_kernels(model, [torch.stack([item["x"] for item in items()])]) == []


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_what_our_own_loop_trains(accumulate: int, tmp_path: Path) -> None:
    from bitwright.train.lightning import ScheduleCallback

    theirs, ours = ready(), ready()
    schedule = Schedule(steps=12, lr=5.0, precision=Progressive((8, 6), 0.5))
    lit = fit(theirs, schedule, tmp_path, [ScheduleCallback(schedule)], accumulate_grad_batches=accumulate)
    assert len(lit.seen) == 12 * accumulate
    if accumulate == 1:
        batches = list(torch.utils.data.DataLoader(items(), 8))  # type: ignore[arg-type]
        loss = lambda m, batch: cross_entropy(m(batch["x"]), batch["labels"])  # noqa: E731
        train(ours, loss, batches, schedule=schedule)
        for name, value in ours.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("judge", [None, score])
@pytest.mark.parametrize("stop", [0, 1])
def test_a_lightning_checkpoint_holds_what_the_schedule_remembers(stop: int, judge: Any, tmp_path: Path) -> None:
    """Stopped after an epoch of 8 steps, with other bits than the plan's, or after the second, in the last phase."""
    from bitwright.train.lightning import ScheduleCallback

    schedule = Schedule(steps=24, lr=20.0, shares=(0.25, 0.25, 0.5), precision=Progressive((8, 6), 0.5))
    data = items()[:8] * 8  # equal batches: Lightning itself goes on with another one
    whole, parts = ready(), ready()
    fit(whole, schedule, tmp_path, [ScheduleCallback(schedule, score=judge)], data)

    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == stop:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyError

    with pytest.raises(KeyError):
        fit(parts, schedule, tmp_path, [ScheduleCallback(schedule, score=judge), Stop()], data)
    parts = ready()
    lit = fit(
        parts, schedule, tmp_path, [ScheduleCallback(schedule, score=judge)], data, ckpt_path=tmp_path / "stopped.ckpt"
    )
    assert len(lit.seen) == 24 - 8 * (stop + 1)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


@pytest.mark.slow
def test_another_number_of_steps_is_refused(tmp_path: Path) -> None:
    from bitwright.train.lightning import ScheduleCallback

    schedule = Schedule(steps=6)
    with pytest.raises(TrainingError, match="the Trainer takes 7 steps with 1 optimizers, the schedule 6 with one"):
        fit(ready(), schedule, tmp_path, [ScheduleCallback(schedule)], max_steps=7)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "bitwright.train.lightning"
    without(monkeypatch, "lightning", module)
    with pytest.raises(MissingExtraError, match=r"pip install 'bitwright\[lightning\]'"):
        __import__(module)
