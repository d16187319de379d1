"""``bitwright mix``: one command from the float model to the shipped one, continued where it was."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bitwright as bw
from test_cli import folder, ok, run  # noqa: F401

MIX = ("mix", "mymodel:build", "--data", "mymodel:batches")
CHOICES = ("--set", "[03].weight=int2/channel,int4/channel,int8/channel")


def test_a_process_mixes_trains_and_ships_and_goes_on(folder: Path) -> None:  # noqa: F811
    arguments = (
        *MIX, *CHOICES, "--bytes", "6250", "--training", "mymodel:train_batches", "--loss", "mymodel:loss",
        "--validation", "mymodel:train_batches", "--steps", "4", "--work", "mix", "-o", "mixed",
    )  # fmt: skip
    code = "import torch; torch.set_num_threads(1); from bitwright.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Bits by layer" in done.stdout
    assert "training kept step" in done.stdout
    assert re.search(r"^harm .* 6/6", done.stdout, re.MULTILINE)
    assert re.search(r"^training .* 4/4", done.stdout, re.MULTILINE)
    assert "wrote mixed: " in done.stdout
    for name in ("harm.json", "trials/state.json", "plan.toml", "calibrated/plan.toml", "trained/model.safetensors"):
        assert (folder / "mix" / name).exists()
    specs = bw.Plan.load(folder / "mixed" / "plan.toml").sites
    assert specs == bw.Plan.load(folder / "mix" / "plan.toml").sites
    assert (folder / "mixed" / "model.safetensors").exists()


def test_a_drop_of_the_score_and_the_machine_of_the_latency(folder: Path, ok: Callable[..., str]) -> None:  # noqa: F811
    arguments = (
        *MIX, *CHOICES, "--preset", "w8a8", "--method", "bias_correction", "--drop", "0.2", "--latency", "1",
        "--machine", "raspberry-pi-5", "--judge", "mymodel:evaluation", "--score", "mymodel:right", "--work", "drop",
        "-o", "dropped",
    )  # fmt: skip
    told = ok(*arguments)
    assert "at most" in told
    assert "on 800 items" in told
    again = ok(*arguments)
    assert "harm: " not in again
    assert again.splitlines()[-1] == told.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "mix needs a limit: --bytes"),
        (("--bytes", "10"), "nothing meets the budget of bytes 10; the smallest"),
        (("--bytes", "9000", "--loss", "mymodel:loss"), "needs both --training and --loss"),
        (("--bytes", "9000", "--validation", "mymodel:train_batches"), "needs both --training and --loss"),
        (("--bytes", "9000", "--score", "mymodel:right"), "needs judge=batches"),
        (("--bytes", "9000", "--plan", "missing.toml"), "cannot read plan"),
        (("--bytes", "9000", "--plan", "missing.toml", "--preset", "w4a8"), "leave out --preset"),
        (("--bytes", "9000", "--set", "*.weight=int4/channel,int8/channel"), "6.weight is float in the plan"),
        (("--bytes", "9000", "--set", "3.weight"), "--set takes PATTERN=SPEC"),
        (("--bytes", "9000", "--minimize", "bytes"), "without a limit on the drop"),
        (("--energy", "1"), "energy is limited or minimized, but no choice has one"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    run: Callable[..., tuple[int, str, str]],  # noqa: F811
    tmp_path: Path,
) -> None:
    few = () if "--set" in arguments else ("--set", "3.weight=int4/channel,int8/channel")
    code, _, err = run(*MIX, *few, *arguments, "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out"))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()
