import subprocess
import sys
import textwrap

import pytest
import torch

from bitwright.cli.main import main
from bitwright.kernels.table import KERNELS

USER_CODE = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 36, 5),
        )

    def batches():
        g = torch.Generator().manual_seed(1)
        return [torch.randn(16, 3, 8, 8, generator=g) for _ in range(4)]

    def train_batches():
        model = build().eval()
        return [(x, model(x).argmax(1)) for x in batches()]

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluation():
        model, g = build().eval(), torch.Generator().manual_seed(2)
        with torch.no_grad():
            return [(x, model(x).argmax(1)) for x in torch.randn(800, 3, 8, 8, generator=g).split(50)]

    def right(model, batch):
        return (model(batch[0]).argmax(1) == batch[1]).float()

    calls = []

    def interrupted(model):
        calls.append(model)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return accuracy(model)

    def accuracy(model):
        with torch.no_grad():
            return sum((model(x).argmax(1) == y).float().mean().item() for x, y in train_batches()) / 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    (path / "mymodel.py").write_text(textwrap.dedent(USER_CODE))
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command line inside this process, in the user's folder: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["bitwright", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def ok(run):
    def call(*arguments: str) -> str:
        code, out, err = run(*arguments)
        assert code == 0, err
        return out

    return call


def test_the_whole_line_in_the_shell(ok):
    data = ("--data", "mymodel:batches")
    assert "4 of 6 sites" in ok("plan", "mymodel:build", *data, "--preset", "w4a8", "-o", "plan.toml")
    ok("calibrate", "mymodel:build", *data, "--plan", "plan.toml", "-o", "work")
    trained = ok(
        "train", "mymodel:build", "work", "--data", "mymodel:train_batches", "--loss", "mymodel:loss",
        "--score", "mymodel:accuracy", "--steps", "8", "-o", "trained",
    )  # fmt: skip
    assert "kept step" in trained
    assert "int4/channel" in ok("convert", "mymodel:build", "trained", "-o", "shipped")
    simulated = ok("evaluate", "mymodel:build", "trained", "--score", "mymodel:accuracy")
    assert ok("evaluate", "mymodel:build", "shipped", "--score", "mymodel:accuracy") == simulated
    assert "speed" in ok("bench", "mymodel:build", "shipped", *data, "--rounds", "2")
    explained = ok("explain", "plan.toml", "3.weight", "--model", "mymodel:build")
    assert "int4/channel" in explained
    assert "taken" in explained


def test_export_compares_with_onnx_runtime(folder, ok):
    pytest.importorskip("onnxruntime")
    ok("plan", "mymodel:build", "--data", "mymodel:batches", "-o", "w8a8.toml")
    ok("calibrate", "mymodel:build", "--data", "mymodel:batches", "--plan", "w8a8.toml", "-o", "w8")
    ok("convert", "mymodel:build", "w8", "-o", "w8-shipped")
    told = ok("export", "mymodel:build", "w8-shipped", "--data", "mymodel:batches", "-o", "model.onnx")
    assert "same answers" in told
    assert (folder / "model.onnx").stat().st_size > 1000


def test_goal_that_cannot_be_met_exits_1_and_saves_the_best(folder, run):
    code, out, _ = run(
        "quantize", "mymodel:build", "--data", "mymodel:batches", "--score", "mymodel:accuracy",
        "--max-bytes", "5", "-o", "best",
    )  # fmt: skip
    assert code == 1
    assert "is the best answer found" in " ".join(out.split())
    assert (folder / "best" / "plan.toml").exists()


QUANTIZE = ("quantize", "mymodel:build", "--data", "mymodel:batches")
ITEMS = ("--score", "mymodel:right", "--evaluation", "mymodel:evaluation")


def test_the_ladder_prints_its_rungs_and_goes_on_where_it_was(folder, ok):
    arguments = (*QUANTIZE, *ITEMS, "--max-drop", "0.1", "--work", "climb", "--time-budget", "600", "-o", "climbed")
    told = ok(*arguments)
    assert "The ladder" in told
    assert "nearest (best)" in told
    assert "at most" in told
    assert (folder / "climb" / "state.json").exists()
    assert (folder / "climb" / "best-nearest" / "plan.toml").exists()
    assert (folder / "climbed" / "plan.toml").exists()
    assert "done before" in ok(*arguments)


def test_a_goal_that_needs_more_time_exits_1_and_names_the_best(folder, run):
    code, out, _ = run(
        *QUANTIZE, "--score", "mymodel:accuracy", "--max-drop=-1", "--time-budget", "0.001", "-o", "short"
    )
    assert code == 1
    assert "stopped: " in out
    assert "the goal was not met; nearest in short is the best answer found" in " ".join(out.split())
    assert (folder / "short" / "model.safetensors").exists()


def test_an_interrupted_climb_saves_the_best_and_exits_130(folder, run):
    code, out, _ = run(*QUANTIZE, "--score", "mymodel:interrupted", "--max-drop=-1", "-o", "half")
    assert code == 130
    assert "stopped: interrupted" in out
    assert (folder / "half" / "plan.toml").exists()


@pytest.mark.parametrize("level", ["fp32", "fp16", "int8", "int4"])
def test_levels_by_name(folder, ok, level):
    told = ok(*QUANTIZE, "--score", "mymodel:accuracy", "--level", level, "-o", f"level-{level}")
    assert "The ladder" in told
    assert (folder / f"level-{level}" / "plan.toml").exists() == (level != "fp32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "mymodel:buil", "--data", "mymodel:batches"), "has no 'buil'"),
        (("plan", "nomodel:build", "--data", "mymodel:batches"), "cannot import 'nomodel'"),
        (("plan", "mymodel", "--data", "mymodel:batches"), "package.module:name"),
        (("plan", "mymodel:build", "--data", "mymodel:batches", "--preset", "w9"), "unknown preset 'w9'"),
        (("plan", "mymodel:build", "--data", "mymodel:batches", "--set", "foo.*=int8"), "matches none"),
        (("plan", "mymodel:build", "--data", "mymodel:batches", "--set", "foo"), "PATTERN=SPEC"),
        (("convert", "mymodel:build", "missing", "-o", "x"), "does not exist"),
        ((*QUANTIZE, "--score", "mymodel:accuracy", "--level", "int5", "-o", "x"), "unknown level 'int5'"),
        (
            (*QUANTIZE, "--score", "mymodel:accuracy", "--max-drop", "1", "--recipe", "x", "-o", "x"),
            "unknown recipe 'x'",
        ),
        ((*QUANTIZE, *ITEMS, "--max-drop", "0.001", "-o", "x"), "evaluation has 800"),
        (("explain", "missing.toml", "a.weight"), "cannot read plan"),
        (("list", "layers"), "bitwright list knows machines and kernels, got 'layers'"),
        (
            ("measure-machine", "mymodel:build", "--data", "mymodel:batches", "--plan", "x", "--set", "3.weight"),
            "--set takes PATTERN=SPEC,SPEC,...",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_real_process_reports_the_exit_code_without_a_traceback(folder):
    code = "from bitwright.cli.main import main; main()"
    command = [sys.executable, "-c", code, "explain", "missing.toml", "a.weight"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore:this process had the processor")
def test_layers_are_timed_once_for_each_choice(folder, ok):
    ok("plan", "mymodel:build", "--data", "mymodel:batches", "-o", "timed.toml")
    command = ("measure-machine", "mymodel:build", "--data", "mymodel:batches", "--plan", "timed.toml")
    arguments = (*command, "--set", "3.weight=int4/channel,int8/channel", "--cache", "tables", "--seconds", "0")
    first = " ".join(ok(*arguments).split())
    assert "whole Sequential" in first
    assert first.count("us +-") == 4  # the whole, both widths, float
    assert "int4/channel" in first.partition("choice")[2]
    assert len(list((folder / "tables").glob("latency-*.json"))) == 1
    assert "us +-" not in ok(*arguments)


def test_described_machines_are_listed(ok):
    told = ok("list", "machines")
    assert "raspberry-pi-5" in told
    assert "h100" in told


def test_kernels_are_listed_in_the_order_they_are_tried(ok):
    lines = ok("list", "kernels").splitlines()
    places = {row.name: next(i for i, line in enumerate(lines) if row.name in line.split()) for row in KERNELS}
    assert list(places.values()) == sorted(places.values())
    assert "yes" in lines[places["linear/reference"]]
    if not torch.cuda.is_available():
        assert "needs cuda, triton" in lines[places["linear/triton"]]


def test_doctor_names_the_kernels(ok):
    assert "linear/reference" in ok("doctor")
