"""The ladder stops at the first recipe that holds, keeps the best, and can be stopped and continued at any point."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.algorithms.pipeline import calibrate
from bitwright.errors import CalibrationError, CheckpointError, PlanError
from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert
from bitwright.flow.prepare import plan_of, prepare
from bitwright.plan.plan import Plan
from bitwright.search import ladder
from bitwright.search.journal import STATE
from bitwright.search.ladder import RUNGS as ALL
from bitwright.search.ladder import Goal, Rung, known_rungs
from ladders import RUNGS, data, labelled, made, paired, pointwise, right, told

PROGRAM = Path(__file__).parents[1] / "ladders.py"


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(found: Any) -> list[str]:
    return [trial.name for trial in found.trials]


def test_the_cheapest_recipe_that_holds_is_the_answer() -> None:
    found = paired(made(), 0.3)
    assert names(found) == ["nearest"]
    assert found.best.holds
    assert found.best.high is not None
    assert found.best.high <= 0.3
    assert plan_of(found.model).steps == ()


def test_a_more_expensive_recipe_is_tried_where_the_cheapest_does_not_hold() -> None:
    found = pointwise(made(), Goal(0.12))
    assert names(found) == ["nearest", "bias correction"]
    assert [trial.holds for trial in found.trials] == [False, True]
    assert found.best == found.trials[-1]
    assert [step.name for step in plan_of(found.model).steps] == ["bias_correction"]


def test_bits_come_after_all_recipes_at_the_one_nearest_to_float() -> None:
    found = paired(made(), 0.1)
    nearest, corrected = found.trials[:2]
    assert corrected.error is not None
    assert nearest.error is not None
    assert corrected.error < nearest.error
    assert all(trial.name.startswith("bias correction, ") for trial in found.trials[2:])
    assert found.best.raised == min(trial.raised for trial in found.trials if trial.holds) == 2
    bits = [
        spec.format.bits for site, spec in plan_of(found.model).sites.items() if site.is_weight and spec is not None
    ]
    assert sorted(bits) == [4, 8, 8, 8]


def test_the_answer_is_what_the_straight_line_gives_for_its_plan() -> None:
    net = made()
    found = pointwise(net, Goal(0.12))
    again = prepare(net, plan_of(found.model))
    calibrate(again, data())
    assert same(convert(again), found.model)


def test_an_impossible_goal_returns_the_model_that_loses_least() -> None:
    found = pointwise(made(), Goal(-1.0))
    assert not found.best.holds
    assert found.best.drop == min(trial.drop for trial in found.trials)
    assert found.best.raised == 3


def test_a_limit_on_bytes_alone_takes_the_recipe_that_scores_best() -> None:
    sizes = {trial.raised: trial.bytes for trial in pointwise(made(), Goal(0.05)).trials}
    limit = (sizes[1] + sizes[2]) // 2
    found = pointwise(made(), Goal(max_bytes=limit))
    assert found.best.bytes <= limit
    assert {trial.raised for trial in found.trials if trial.name.startswith("bias correction")} == {1}
    assert found.best.score == max(trial.score for trial in found.trials if trial.bytes <= limit)


def test_without_a_goal_the_first_rung_is_the_answer() -> None:
    assert names(pointwise(made(), Goal())) == ["nearest"]


def test_a_plan_with_eight_bits_everywhere_has_no_bits_to_spend() -> None:
    assert names(pointwise(made(), Goal(-1.0), preset="w8a8")) == ["nearest", "bias correction"]


def test_a_recipe_that_cannot_be_done_is_named_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if plan_of(model).steps:
            raise CalibrationError("not on this model")
        return calibrate(model, *args, **kwargs)

    monkeypatch.setattr(ladder, "calibrate", refuses)
    lines: list[str] = []
    found = pointwise(made(), Goal(-1.0), say=lines.append)
    assert found.trials[1].failed == "not on this model"
    assert "bias correction: cannot be done here: not on this model" in lines
    assert all(trial.name.startswith("nearest") for trial in found.trials[2:])
    assert found.best.raised == 3


def test_an_error_of_the_first_recipe_is_not_hidden() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        paired(made(), batches=[torch.full((2, 16), float("nan"))])


def test_a_finished_search_is_only_loaded(tmp_path: Path) -> None:
    net, lines = made(), []
    first = paired(net, 0.1, work=tmp_path / "work")
    again = paired(net, 0.1, work=tmp_path / "work", say=lines.append)
    assert told(first.trials) == told(again.trials)
    assert first.trials == again.trials
    assert same(first.model, again.model)
    assert lines
    assert all("done before" in line for line in lines)
    assert sorted(entry.name for entry in (tmp_path / "work").iterdir()) == [first.folder.name, STATE]
    assert same(load(first.folder, made()), first.model)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_search_that_was_stopped_goes_on_and_ends_alike(after: int, tmp_path: Path) -> None:
    net, seen = made(), []

    def stop(text: str) -> None:
        seen.append(text)
        if len(seen) == after:
            raise Stop

    whole = paired(net, 0.1)
    with pytest.raises(Stop):
        paired(net, 0.1, work=tmp_path, say=stop)
    assert len(json.loads((tmp_path / STATE).read_text())["trials"]) == after
    rest: list[str] = []
    found = paired(net, 0.1, work=tmp_path, say=rest.append)
    assert told(found.trials) == told(whole.trials)
    assert same(found.model, whole.model)
    assert ["done before" in line for line in rest] == [n < after for n in range(len(whole.trials))]


def test_a_kill_between_checkpoint_and_state_loses_one_trial_only(tmp_path: Path) -> None:
    net = made()
    whole = paired(net, 0.1, work=tmp_path)
    state = json.loads((tmp_path / STATE).read_text())
    state["trials"], state["best"] = state["trials"][:1], "nearest"
    (tmp_path / STATE).write_text(json.dumps(state))
    (tmp_path / ".best-nearest.abc").mkdir()
    one = paired(net, 0.3)  # the first trial alone leaves the checkpoint that the state names
    save(one.model, tmp_path / "best-nearest")
    found = paired(net, 0.1, work=tmp_path)
    assert told(found.trials) == told(whole.trials)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [found.folder.name, STATE]


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_process_goes_on_and_ends_alike(after: int, tmp_path: Path) -> None:
    def run(folder: Path, kill_after: int | None) -> list[str]:
        lines = []
        with subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            if kill_after == 0:
                while not (folder / STATE).exists() and process.poll() is None:
                    pass
                process.kill()
            for line in process.stdout:
                lines.append(line)
                if len(lines) == kill_after:
                    process.kill()
                    break
            process.stdout.read()
        assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
        return lines

    run(tmp_path / "work", after)
    lines = run(tmp_path / "work", None)
    whole, killed = paired(made(), 0.02), torch.load(tmp_path / "work.pt")
    assert killed["told"] == told(whole.trials)
    assert all(torch.equal(value, killed["model"][name]) for name, value in whole.model.state_dict().items())
    assert sum("done before" in line for line in lines) >= after
    assert len(lines) == len(whole.trials)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": made(5)}, "model: Net"),
        ({"preset": "w4a8"}, r"plan: .*uint4/asym.*; now it is: .*uint8/asym"),
        ({"batches": data(3)}, "calibration data: 4 batches"),
        ({"evaluation": labelled(made(), 30)}, "evaluation data: 40 batches"),
        ({"score": lambda m, b: right(m, b) * 0.5}, "scores of the float model"),
        ({"max_drop": 0.2}, "max_drop: 0.3; now it is: 0.2"),
        ({"rungs": RUNGS[:1]}, "recipes: bias correction: bias_correction; now it is: no such line"),
    ],
)
def test_a_folder_of_another_search_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    net = made()
    paired(net, 0.3, work=tmp_path)
    before = (tmp_path / STATE).read_text()
    settings = {"max_drop": 0.3, "net": net, "evaluation": labelled(net), **changes}
    with pytest.raises(CheckpointError, match=message):
        paired(settings.pop("net"), work=tmp_path, **settings)
    assert (tmp_path / STATE).read_text() == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "identity": {}, "best": "x", "trials": []}']
)
def test_a_damaged_state_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / STATE).write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        paired(made(), 0.3, work=tmp_path)


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds thesis\.txt: no search"):
        paired(made(), 0.3, work=tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        paired(made(), 0.3, work=tmp_path / "thesis.txt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_files_beside_a_search_are_left_alone(tmp_path: Path) -> None:
    net = made()
    paired(net, 0.3, work=tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "plan.toml").write_text("mine")
    paired(net, 0.3, work=tmp_path)
    assert (tmp_path / "notes" / "plan.toml").exists()


def test_time_ends_the_climb_before_a_trial_that_does_not_fit() -> None:
    lines: list[str] = []
    found = pointwise(made(), Goal(-1.0), time_budget=1e-3, say=lines.append)
    assert names(found) == ["nearest"]
    assert "bias correction was not begun" in found.stopped
    assert lines[-1] == f"stopped: {found.stopped}"
    assert found.best.name == "nearest"


def test_time_ends_a_trial_in_the_middle_and_the_next_call_repeats_it(tmp_path: Path) -> None:
    net = made()
    late = Late(net, seconds=0.5)
    found = paired(net, 0.1, score=late, work=tmp_path, time_budget=late.first + 1.0)
    assert names(found) == ["nearest"]
    assert "middle of a trial" in found.stopped
    assert told(paired(net, 0.1, work=tmp_path).trials) == told(paired(net, 0.1).trials)


class Late:
    """Scores that take long from the second candidate on; ``first`` is about what the first one takes."""

    def __init__(self, net: nn.Module, seconds: float) -> None:
        self.net, self.seconds, self.models = net, seconds, []
        self.first = paired(net, 0.3).best.seconds * 4

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if model is not self.net and id(model) not in self.models:
            self.models.append(id(model))
        if len(self.models) > 1:
            time.sleep(self.seconds)
        return right(model, batch)


def test_ctrl_c_returns_the_best_so_far(tmp_path: Path) -> None:
    net, calls = made(), []

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        if model is not net:
            calls.append(id(model))
            if len(set(calls)) == 2:
                signal.raise_signal(signal.SIGINT)
        return right(model, batch)

    found = paired(net, 0.1, score=interrupted, work=tmp_path)
    assert found.stopped == "interrupted"
    assert names(found) == ["nearest"]
    assert same(found.model, load(tmp_path / "best-nearest", made()))


def test_ctrl_c_before_the_first_trial_is_passed_on() -> None:
    net = made()

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        if model is not net:
            raise KeyboardInterrupt
        return right(model, batch)

    with pytest.raises(KeyboardInterrupt):
        paired(net, 0.1, score=interrupted)


def test_trials_do_not_touch_the_random_state_or_the_model() -> None:
    net = made()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    pointwise(net, Goal(0.12))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_rungs_are_known_by_name() -> None:
    assert known_rungs(("bias correction", "nearest")) == RUNGS
    assert known_rungs()[: len(RUNGS)] == RUNGS
    with pytest.raises(PlanError, match="unknown recipe 'magic'; the ladder has nearest, bias correction"):
        known_rungs(("magic",))
    with pytest.raises(PlanError, match="unknown recipe"):
        known_rungs(())
    with pytest.raises(PlanError, match="calibration data"):
        known_rungs(("bias correction",), data=False)


def test_every_rung_of_the_ladder_is_a_valid_recipe() -> None:
    net = made()
    for rung in known_rungs():
        plan = Plan.preset("w4a8", net, data()[0], steps=rung.steps)
        assert tuple(plan.steps) == rung.steps
    assert ALL[0] == Rung("nearest")
