"""The joint flow: equal to its stages one by one, continued after kills, edited files respected, leftovers refused."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
import mixes
from bitwright.errors import CheckpointError, NumericsError, SearchError, TrainingError
from bitwright.flow.prepare import plan_of
from bitwright.joint import Mix
from bitwright.search.mixed_trials import mixed
from mixes import SPECS, budget, data, labelled, loss, net, right, run, training

PROGRAM = Path(mixes.__file__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Mix:
    return run(tmp_path_factory.mktemp("whole") / "work")


@pytest.fixture
def work(whole: Mix, tmp_path: Path) -> Path:
    """A copy of the finished folder."""
    return Path(shutil.copytree(whole.folder, tmp_path / "work"))


def equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def delete(work: Path, *names: str) -> None:
    for name in names:
        path = work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_it_is_its_stages_one_by_one(whole: Mix, tmp_path: Path) -> None:
    model, plan = net(), mixes.plan_of(net())
    inputs, judge = data(6, 1)[:4], data(6, 1)[4:]
    harm = bw.sensitivity(model, plan, inputs, SPECS)
    choices = bw.mixture(model, plan, inputs[0][:1], harm)
    found = mixed(model, plan, inputs, choices, budget(model), judge=judge)
    assert whole.trials is not None
    assert [(one.name, one.harm, one.plan) for one in whole.trials.tried] == [
        (one.name, one.harm, one.plan) for one in found.tried
    ]
    assert whole.plan == found.best.plan
    prepared, how = bw.prepare(model, found.best.plan), training(model)
    bw.calibrate(prepared, inputs)
    assert equal(prepared, bw.load(whole.folder / "calibrated", net()))
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout
        history = bw.train(
            prepared, loss, how.batches, schedule=how.schedule,
            score=lambda m: torch.stack([-loss(m, batch).detach().double() for batch in how.validation]),
        )  # fmt: skip
    assert whole.history is not None
    assert whole.history.scores == history.scores
    assert equal(prepared, bw.load(whole.folder / "trained", net()))
    assert equal(bw.convert(prepared), whole.model)
    assert torch.equal(prepared(judge[0]), whole.model(judge[0]))


def test_without_training_the_calibrated_model_ships(whole: Mix, tmp_path: Path) -> None:
    found = run(tmp_path / "work", training=None)
    assert found.history is None
    assert equal(bw.convert(bw.load(whole.folder / "calibrated", net())), found.model)
    assert not (tmp_path / "work" / "training").exists()
    with pytest.raises(CheckpointError, match=r"shipped was made from another trained; .* delete .*shipped$"):
        run(tmp_path / "work")


class _Stop(Exception):
    """Ends a call in the middle, as a kill between two writes does."""


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("harm: 3.weight as int4", "trials"),
        ("tried: least summed harm", "plan.toml"),
        ("wrote .*calibrated", "training"),
        ("training: step 4 ", "trained"),
        ("wrote .*trained", "shipped"),
        ("wrote .*shipped", ""),
    ],
)
def test_a_call_stopped_in_any_stage_goes_on_and_ends_alike(
    line: str, missing: str, whole: Mix, tmp_path: Path
) -> None:
    def stop(text: str) -> None:
        if re.match(line, text):
            raise _Stop

    with pytest.raises(_Stop):
        run(tmp_path / "work", say=stop)
    assert not missing or not (tmp_path / "work" / missing).exists()
    said: list[str] = []
    found = run(tmp_path / "work", say=said.append)
    assert equal(found.model, whole.model)
    assert found.plan == whole.plan
    assert not any(text.startswith("harm: 0.weight") for text in said)
    assert not (line.startswith("wrote") and any(re.match(line, text) for text in said))


@pytest.mark.slow
def test_a_process_killed_in_every_stage_ends_alike(whole: Mix, tmp_path: Path) -> None:
    there = {"harm": "harm.json", "tried": "trials", "training": "training", "wrote": "training"}
    for prefix, count in (("harm", 4), ("tried", 2), ("training", 3), ("wrote", 1)):
        command = [sys.executable, str(PROGRAM), str(tmp_path), prefix, str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (tmp_path / there[prefix]).exists()
    assert not (tmp_path / "shipped").exists()
    said: list[str] = []
    found = run(tmp_path, say=said.append)
    assert equal(found.model, whole.model)
    assert found.plan == whole.plan
    assert [line for line in said if line.startswith(("harm", "training"))] == []


def test_a_finished_folder_is_only_read(whole: Mix, work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    said: list[str] = []
    found = run(work, say=said.append)
    assert equal(found.model, whole.model)
    assert found.history is None
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == before
    assert all(line.startswith("tried: ") for line in said)


def test_an_edited_plan_is_taken_and_what_was_made_from_the_old_one_is_refused(whole: Mix, work: Path) -> None:
    edited = whole.plan.with_sites({"0.weight": "int8/channel"})
    edited.save(work / "plan.toml")
    with pytest.raises(CheckpointError, match=r"calibrated was made from another plan\.toml; .* delete") as told:
        run(work)
    named = str(told.value).partition("delete ")[2].split(", ")
    assert named == [str(work / name) for name in ("calibrated", "training", "trained", "shipped")]
    delete(work, "calibrated", "training", "trained", "shipped")
    said: list[str] = []
    found = run(work, say=said.append)
    assert found.trials is None
    assert plan_of(found.model).sites == edited.sites != whole.plan.sites
    assert any("edited" in line for line in said)
    assert not any(line.startswith(("harm", "tried")) for line in said)
    delete(work, "plan.toml", "calibrated", "training", "trained", "shipped")
    assert equal(run(work).model, whole.model)


def test_edited_harm_is_taken_by_new_trials(whole: Mix, work: Path) -> None:
    path = work / "harm.json"
    lines = path.read_text().splitlines()
    [at] = [i for i, line in enumerate(lines) if '"0.weight", "spec": "int2/channel"' in line]
    lines[at] = '  {"site": "0.weight", "spec": "int2/channel", "harm": 5.0, "error": 0.0},'
    path.write_text("\n".join(lines))
    with pytest.raises(
        CheckpointError, match=r"trials.state\.json was written with choices: 0\.weight.*delete the fold"
    ):
        run(work)
    delete(work, "trials")
    with pytest.raises(CheckpointError, match=r"plan\.toml was made from another harm or another budget; .* delete"):
        run(work)
    delete(work, "plan.toml", "calibrated", "training", "trained", "shipped")
    found = run(work)
    specs = {str(site): str(spec) for site, spec in found.plan.sites.items()}
    assert {str(site): str(spec) for site, spec in whole.plan.sites.items()}["0.weight"] == "int2/channel"
    assert specs["0.weight"] != "int2/channel"


def test_other_training_is_refused_until_its_files_are_deleted(whole: Mix, work: Path) -> None:
    other = training(net(), steps=6)
    with pytest.raises(CheckpointError, match="trained was made from another schedule") as told:
        run(work, training=other)
    named = str(told.value).partition("delete ")[2].split(", ")
    assert named == [str(work / name) for name in ("training", "trained", "shipped")]
    delete(work, "trained", "shipped")
    with pytest.raises(CheckpointError, match=r"delete \S+training$"):
        run(work, training=other)
    delete(work, "training")
    found = run(work, training=other)
    assert found.history is not None
    assert len(found.history.losses) == 6
    assert found.plan == whole.plan


def _other_model() -> nn.Module:
    other = net()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    return other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": _other_model()}, "written with model: Sequential"),
        ({"batches": data(6, 3)}, "calibration data: 4 batches"),
        ({"plan": mixes.plan_of(net()).with_sites({"0.weight": "int8/channel"})}, r"plan: .*0\.weight.*int4/channel"),
        ({"method": "loss", "loss": lambda m, b: m(b).square().mean()}, "method: kl; now it is: loss"),
        ({"budget": bw.Budget(bytes=10_000)}, r"trials.state\.json was written with budget"),
        ({"judge": data(4, 9), "batches": data(6, 1)[:4]}, r"judging data: 2 batches"),
    ],
)
def test_a_folder_of_another_call_is_refused(changes: dict[str, Any], message: str, work: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        run(work, **changes)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds thesis\.txt: no search"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": bw.Budget(bytes=10)}, SearchError, "nothing meets the budget of bytes 10; the smallest"),
        ({"budget": bw.Budget(drop=1e-12)}, SearchError, r"keeps to a drop of 1e-12 \(nats\); the smallest is"),
        ({"batches": data(3, 1)}, SearchError, "at least 4 calibration batches, got 3"),
        ({"judge": data(1, 2)}, SearchError, "at least 2 batches, got 1"),
        ({"method": "sqnr"}, SearchError, "harm by loss or kl, got 'sqnr'"),
        (
            {"specs": {"*.weight": ["int2/channel"]}},
            SearchError,
            "0.weight is int4/channel in the plan, and its choices",
        ),
        ({"score": right}, SearchError, r"score\(model, batch\) needs judge=batches"),
        (
            {"score": lambda m, b: right(m, b) / 0, "judge": labelled(net(), 3, 2)},
            NumericsError,
            "NaN|out of score_range",
        ),
        ({"score": right, "judge": labelled(net(), 3, 2), "budget": bw.Budget(drop=0.02)}, SearchError, "judge has 48"),
        ({"training": training(net(), loss=lambda m, b: m(b[0]))}, TrainingError, r"got a tensor of shape \[16, 5\]"),
        ({"training": training(net(), loss=lambda m, b: 1.0)}, TrainingError, "scalar tensor, got a float"),
        (
            {"training": training(net(), loss=lambda m, b: loss(m, b) * float("nan"))},
            TrainingError,
            "float model is nan",
        ),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "work", **changes)


def test_a_score_judges_plans_and_trained_states(tmp_path: Path) -> None:
    model = net()
    given: dict[str, Any] = {"score": right, "judge": labelled(model, 60, 2), "budget": bw.Budget(drop=0.2)}
    how = replace(training(model, steps=4), validation=labelled(model, 20, 8))
    found = run(tmp_path / "work", training=how, batches=data(4, 1), **given)
    assert found.trials is not None
    assert found.trials.best.high is not None
    assert found.trials.best.high <= 0.2
    assert found.trials.best.bytes == min(one.bytes for one in found.trials.tried if one.holds)
    assert found.history is not None
    scores: list[Tensor] = []
    for folder in ("calibrated", "trained"):
        simulated = bw.load(tmp_path / "work" / folder, net()).eval()
        with torch.no_grad():
            scores.append(torch.cat([right(simulated, batch) for batch in how.validation]).double().mean())
    assert found.history.scores[0][1] == pytest.approx(scores[0].item())
    assert found.history.best_score == pytest.approx(scores[1].item())


def test_choices_are_those_of_the_plan_by_default(tmp_path: Path) -> None:
    found = run(tmp_path / "work", specs=None, training=None)
    assert found.trials is not None
    widths = {str(spec) for one in found.trials.tried for site, spec in one.plan.sites.items() if site.is_weight}
    assert len(widths) > 3
    roof = run(
        tmp_path / "modelled", training=None, budget=bw.Budget(latency=1.0), latency=bw.get_machine("raspberry-pi-5")
    )
    assert roof.trials is not None
    assert roof.trials.best.fits
