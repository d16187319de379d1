"""A run that was killed and started again ends with the bits of one that was not; damaged files are refused."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resumable import STEPS, batches, loss, result, schedule, score, start
from torch import Tensor, nn

from bitwright.errors import CheckpointError, TrainingError
from bitwright.train.loop import train
from bitwright.train.schedule import Schedule
from bitwright.train.state import NAME, read_state, write_state
from nets import one_thread  # noqa: F401

PROGRAM = Path(__file__).with_name("resumable.py")


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def run(folder: Path, kind: str, kill_at: int | None = None) -> int:
    """The program's exit code; killed with SIGKILL when it has reported a step."""
    command = [sys.executable, str(PROGRAM), str(folder), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if kill_at is not None and int(line) >= kill_at:
                process.kill()
                break
        process.stdout.read()
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loader", "generator", "epochs"])
def test_a_run_that_was_killed_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    assert run(tmp_path / "whole", kind) == 0
    kills = sorted(random.sample(range(3, STEPS - 1), 2))
    for step in kills:
        assert run(tmp_path / "killed", kind, step) == -signal.SIGKILL, kills
    assert run(tmp_path / "killed", kind) == 0
    whole, killed = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "killed"))
    assert equal(whole, killed), kills
    assert len(whole["losses"]) == STEPS


class Stop(Exception):
    pass


def partly(
    folder: Path, stop: int | None, kind: str = "loader", error: type[BaseException] = Stop, **changes: Any
) -> Any:
    """A run in this process that an exception ends after some step; what a whole one returns."""
    model = changes.pop("model", None) or start()
    torch.manual_seed(2), random.seed(2), np.random.seed(2)

    def on_step(step: int, _: float) -> None:
        if step == stop:
            raise error

    settings: dict[str, Any] = {"schedule": schedule(), "checkpoint": folder, "checkpoint_every": 3, **changes}
    history = train(model, loss, batches(kind), score=score, score_every=4, on_step=on_step, **settings)
    return result(model, history)


@pytest.mark.parametrize("kind", ["list", "epochs"])
@pytest.mark.parametrize("stop", [3, 19, 20, 33])
def test_a_run_that_was_stopped_goes_on_from_its_last_checkpoint(kind: str, stop: int, tmp_path: Path) -> None:
    whole = partly(tmp_path / "whole", None, kind)
    with pytest.raises(Stop):
        partly(tmp_path / "parts", stop, kind)
    assert equal(partly(tmp_path / "parts", None, kind), whole)


def test_without_a_checkpoint_the_bits_are_the_same(tmp_path: Path) -> None:
    assert equal(partly(tmp_path, None), partly(tmp_path, None, checkpoint=None))


def test_an_interrupt_saves_the_step_it_came_in(tmp_path: Path) -> None:
    whole = partly(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        partly(tmp_path / "parts", 7, error=KeyboardInterrupt, checkpoint_every=1000)
    saved = read_state(tmp_path / "parts")
    assert saved is not None
    assert saved["run"]["done"] == 8
    assert equal(partly(tmp_path / "parts", None), whole)


def test_ctrl_c_ends_the_step_first(tmp_path: Path) -> None:
    model, seen = start(), []

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(model, interrupted, batches("list"), schedule=schedule(), checkpoint=tmp_path, checkpoint_every=1000)
    state = read_state(tmp_path)
    assert state is not None
    assert state["run"]["done"] == len(seen) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    whole = partly(tmp_path, None)
    again = partly(tmp_path, 0)  # would stop after its first step
    assert equal(whole, again)


def test_the_same_model_can_go_on_after_an_interrupt(tmp_path: Path) -> None:
    whole = partly(tmp_path / "whole", None)
    model = start()
    with pytest.raises(KeyboardInterrupt):
        partly(tmp_path / "parts", 33, error=KeyboardInterrupt, model=model)
    assert equal(partly(tmp_path / "parts", None, model=model), whole)


def test_another_plan_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        partly(tmp_path, 5)
    model = start()
    model.bitwright_plan = model.bitwright_plan.with_sites({"fc.weight": "int3/channel"})  # type: ignore[operator]
    message = (
        r"was written with int4/channel, but the plan of this model has fc\.weight = int3/channel; repeat the call"
    )
    with pytest.raises(TrainingError, match=message):
        partly(tmp_path, None, model=model)
    model = start()
    model.bitwright_plan.ranges["fc.input"] = "pact"  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match=r"was written with lsq.*, but .* trains the range of fc\.input by pact"):
        partly(tmp_path, None, model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": schedule(lr=1.0)}, r"was written with 3\.0, but this call has Schedule\(lr=1\.0\)"),
        ({"schedule": schedule(steps=41)}, r"was written with 40, but this call has Schedule\(steps=41\)"),
        ({"schedule": schedule(precision=None)}, r"'Progressive'.* but this call has Schedule\(precision=None\)"),
        ({"autocast": torch.bfloat16}, r"was written with autocast None, now it is torch\.bfloat16"),
    ],
)
def test_another_run_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        partly(tmp_path, 5)
    with pytest.raises(TrainingError, match=message):
        partly(tmp_path, None, **change)


def test_another_optimizer_and_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        partly(tmp_path, 5)
    model = start()
    with pytest.raises(TrainingError, match="was written with optimizer SGD over groups of"):
        partly(tmp_path, None, model=model, optimizer=torch.optim.AdamW(schedule().optimizer(model).param_groups))
    model.fc.register_buffer("extra", torch.zeros(3))  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"does not fit the model: fc\.extra is missing there and \[3\] here"):
        partly(tmp_path, None, model=model)


def test_fewer_batches_than_were_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        partly(tmp_path, 5, "list")
    with pytest.raises(TrainingError, match="epoch 0 now ends after 2 batches, but the run had read 3 of it"):
        train(start(), loss, batches("list")[:2], schedule=schedule(), checkpoint=tmp_path)


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[-5] ^= 1
    elif how == "header":
        place = data.index(b"done")
        data[place] ^= 1
    else:
        data = bytearray(b"")
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flipped", "header", "empty"])
def test_a_damaged_file_is_refused_and_nothing_is_lost(how: str, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        partly(tmp_path, 8)
    damaged(tmp_path / NAME, how)
    before, model = (tmp_path / NAME).read_bytes(), start()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        partly(tmp_path, None, model=model)
    assert (tmp_path / NAME).read_bytes() == before
    assert equal(dict(model.state_dict()), state)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=r"was not written by this version of bitwright\.train"):
        partly(tmp_path, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is no folder"):
        partly(tmp_path / "file", None)


def test_a_kill_while_writing_leaves_the_earlier_file(tmp_path: Path) -> None:
    whole = partly(tmp_path / "whole", None)
    with pytest.raises(Stop):
        partly(tmp_path / "parts", 10)
    (tmp_path / "parts" / (NAME + ".part")).write_bytes(b"half")
    assert equal(partly(tmp_path / "parts", None), whole)


def test_trees_come_back_as_they_were(tmp_path: Path) -> None:
    tree = {
        "a": {"b": torch.arange(3), 0: (1, 2.5, None), "c": []},
        "a.b": torch.zeros(2, 0),
        "t": [torch.tensor(True), torch.ones(2, dtype=torch.bfloat16), float("inf"), "text"],
    }
    write_state(tmp_path / "new" / "folder", tree)
    assert equal(read_state(tmp_path / "new" / "folder"), tree)
    with pytest.raises(CheckpointError, match=r"state\.f is a function; a checkpoint holds"):
        write_state(tmp_path, {"f": equal})
    assert read_state(tmp_path) is None


def test_the_order_of_epochs_follows_the_sampler(tmp_path: Path) -> None:
    data = batches("loader").dataset
    epochs: list[int] = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    loader = torch.utils.data.DataLoader(data, 25, sampler=Sampler(data))
    train(start(), loss, loader, schedule=Schedule(steps=6))
    assert epochs == [0, 1, 2]
