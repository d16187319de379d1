"""A real Trainer of transformers goes through the phases and ends with a model that ships bit for bit."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitwright.errors import MissingExtraError, TrainingError
from bitwright.plan.plan import Plan
from bitwright.train.loop import train
from bitwright.train.schedule import Phase, Schedule
from nets import calibrated, one_thread, unequal_kernels  # noqa: F401

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(1, 6, 3, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.fc(self.norm(self.conv(x)).relu().mean(-1))
        return logits if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def items() -> list[dict[str, Tensor]]:
    x = torch.randn(64, 1, 12, generator=torch.Generator().manual_seed(2))
    return [{"x": row, "labels": (row.mean() > 0).long()} for row in x]


def ready() -> nn.Module:
    torch.manual_seed(0)
    net, x = Net(), torch.stack([item["x"] for item in items()])
    for _ in range(10):
        net(x)
    rules = {"*.weight": "int4/channel", "*.input": "int8"}
    return calibrated(net, Plan.preset("w8a8", net, x[:2], sites=rules), [x])


def score(model: nn.Module) -> float:
    batch = torch.utils.data.default_collate(items())
    with torch.no_grad():
        return -cross_entropy(model(batch["x"]), batch["labels"]).item()


def trainer(model: nn.Module, folder: Path, schedule: Schedule, callbacks: list[Any], **arguments: Any) -> Any:
    settings = {"max_steps": schedule.steps, "per_device_train_batch_size": 8, "save_strategy": "no", **arguments}
    args = transformers.TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **settings
    )
    return transformers.Trainer(
        model, args, train_dataset=items(), callbacks=callbacks, optimizers=(schedule.optimizer(model), None)
    )


class Watch(transformers.TrainerCallback):
    """Notes what trains while a step runs."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, bool, bool, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, rates = kwargs["model"], {group["lr"] for group in kwargs["optimizer"].param_groups}
        [rate] = rates
        scale = model.conv.weight_quantizer.scale
        self.seen.append((model.bitwright_phase, scale.grad is not None, model.conv.freeze_norm, rate))


@pytest.mark.slow
def test_the_trainer_goes_through_the_phases_and_ships_what_it_trained(tmp_path: Path) -> None:
    from bitwright.train.huggingface import ScheduleCallback

    model, schedule, watch = ready(), Schedule(steps=20, lr=10.0), Watch()
    callback = ScheduleCallback(schedule, score=score, score_every=5)
    before = score(model)
    trainer(model, tmp_path, schedule, [callback, watch]).train()
    phases = [Phase.WARMUP] * 5 + [Phase.JOINT] * 10 + [Phase.FINETUNE] * 5
    assert [row[0] for row in watch.seen] == phases
    assert [row[1] for row in watch.seen] == [phase is Phase.JOINT for phase in phases]
    assert [row[2] for row in watch.seen] == [phase is Phase.FINETUNE for phase in phases]
    assert [row[3] for row in watch.seen] == pytest.approx([schedule.lr_at(step) for step in range(20)])
    assert [step for step, _ in callback.history.scores] == [0, 5, 10, 15, 20]
    assert callback.history.scores[0][1] == before
    assert score(model) == callback.history.best_score > before
    assert not model.training
    assert unequal_kernels(model, [torch.stack([item["x"] for item in items()])]) == []


@pytest.mark.slow
def test_it_trains_what_our_own_loop_trains(tmp_path: Path) -> None:
    from bitwright.train.huggingface import ScheduleCallback

    theirs, ours, schedule = ready(), ready(), Schedule(steps=12, lr=5.0)
    batches = [torch.utils.data.default_collate(items()[start : start + 8]) for start in range(0, 64, 8)]
    hub = trainer(
        theirs,
        tmp_path,
        schedule,
        [ScheduleCallback(schedule)],
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    hub.train()
    train(ours, lambda m, batch: m(**batch)["loss"], batches, schedule=schedule)
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name


@pytest.mark.slow
def test_accumulated_gradients_make_one_step(tmp_path: Path) -> None:
    from bitwright.train.huggingface import ScheduleCallback

    model, schedule, watch = ready(), Schedule(steps=6, lr=5.0), Watch()
    callback = ScheduleCallback(schedule)
    trainer(model, tmp_path, schedule, [callback, watch], gradient_accumulation_steps=2).train()
    assert len(watch.seen) == 6
    assert callback.history.best_step == 6


@pytest.mark.slow
def test_mistakes_are_explained(tmp_path: Path) -> None:
    from bitwright.train.huggingface import ScheduleCallback

    model, schedule = ready(), Schedule(steps=6)
    with pytest.raises(TrainingError, match="the Trainer takes 7 steps, the schedule 6; make them equal"):
        trainer(model, tmp_path, schedule, [ScheduleCallback(schedule)], max_steps=7).train()
    wrong = trainer(model, tmp_path, schedule, [ScheduleCallback(schedule)])
    wrong.optimizer = schedule.optimizer(ready())
    with pytest.raises(TrainingError, match="the optimizer holds none of this model's parameters"):
        wrong.train()


def without(monkeypatch: pytest.MonkeyPatch, package: str, module: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, module, raising=False)
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".", 1)[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "bitwright.train.huggingface"
    without(monkeypatch, "transformers", module)
    with pytest.raises(MissingExtraError, match=r"pip install 'bitwright\[transformers\]'"):
        __import__(module)
