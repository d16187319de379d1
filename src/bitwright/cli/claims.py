"""Subcommands that state and check what is claimed of a model: ``certify``, ``verify``, ``matrix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitwright.bench.report import write_text
from bitwright.claims.certify import certify as certify_model
from bitwright.claims.matrix import matrix as compare_versions
from bitwright.claims.splits import first_entry
from bitwright.claims.verify import verify as verify_certificate
from bitwright.errors import BitwrightError
from bitwright.flow.checkpoint import load
from bitwright.harm.sensitivity import Sensitivity
from bitwright.train.schedule import Schedule
from bitwright.train.training import Training
from bitwright.userspec import batches_of, load_object, model_of, shipped_of

console = Console()

Model = Annotated[str, typer.Argument(help="float model as package.module:factory")]
Folder = Annotated[Path, typer.Argument(help="converted model")]
Weights = Annotated[Path | None, typer.Option(help="float weights: .safetensors or a state dict")]
Test = Annotated[str, typer.Option(help="batches that score gets one by one, as package.module:function")]
Score = Annotated[str, typer.Option(help="score(model, batch) -> [n], larger is better, as package.module:function")]
Seen = Annotated[list[str] | None, typer.Option(help="NAME=package.module:function, data seen before, repeatable")]
Inputs = Annotated[str | None, typer.Option(help="inputs(batch), what the model sees [default: the first entry]")]
Simulated = Annotated[Path | None, typer.Option(help="calibrated or trained model, to compare bit for bit")]
Onnx = Annotated[Path | None, typer.Option(help="file exported from the model, to compare in ONNX Runtime")]
Rounds = Annotated[int, typer.Option(help="alternating runs for the latency; 0: none")]


def certify(
    model: Model,
    folder: Folder,
    test: Test,
    score: Score,
    out: Annotated[Path, typer.Option("--out", "-o", help="certificate.json; the page is written beside it")],
    weights: Weights = None,
    max_drop: Annotated[float | None, typer.Option(help="claim that less is lost, with 95 % confidence")] = None,
    seen: Seen = None,
    inputs: Inputs = None,
    simulated: Simulated = None,
    onnx: Onnx = None,
    sensitivity: Annotated[Path | None, typer.Option(help="harm.json that the bits were allocated by")] = None,
    rounds: Rounds = 0,
) -> None:
    """State what a converted model loses, weighs and takes, on items that no step before has seen."""
    issued = certify_model(
        model_of(model, weights), shipped_of(folder, model), batches_of(test), load_object(score), max_drop=max_drop,
        seen=_seen(seen), inputs=_inputs(inputs), simulated=None if simulated is None else _loaded(simulated, model),
        onnx=onnx, sensitivity=None if sensitivity is None else Sensitivity.load(sensitivity), rounds=rounds,
    )  # fmt: skip
    issued.save(out)
    write_text(out.with_suffix(".html"), issued.to_html())
    found = issued.score
    console.print(f"drop {found.drop:+.4f} [{found.low:+.4f}, {found.high:+.4f}] on {found.items:,} items")
    console.print(f"wrote {out} and {out.with_suffix('.html')}")
    if issued.claim.holds is False:
        console.print(f"that the drop is below {max_drop:g} does not hold", highlight=False)
        raise typer.Exit(1)


def verify(
    certificate: Annotated[Path, typer.Argument(help="certificate.json")],
    model: Annotated[str | None, typer.Argument(help="float model as package.module:factory")] = None,
    folder: Annotated[Path | None, typer.Argument(help="converted model")] = None,
    test: Annotated[str | None, typer.Option(help="batches that score gets one by one")] = None,
    score: Annotated[str | None, typer.Option(help="score(model, batch) -> [n]")] = None,
    weights: Weights = None,
    seen: Seen = None,
    inputs: Inputs = None,
    simulated: Simulated = None,
    onnx: Onnx = None,
    rounds: Rounds = 0,
) -> None:
    """Check a certificate: that nobody edited it, and that what it says of this model and data still holds."""
    if simulated is not None and model is None:
        raise BitwrightError("--simulated needs the float model too: verify CERTIFICATE MODEL")
    found = verify_certificate(
        certificate,
        None if model is None else model_of(model, weights),
        None if model is None or folder is None else shipped_of(folder, model),
        None if test is None else batches_of(test),
        None if score is None else load_object(score),
        seen=_seen(seen), inputs=_inputs(inputs), onnx=onnx, rounds=rounds,
        simulated=None if simulated is None or model is None else _loaded(simulated, model),
    )  # fmt: skip
    table = Table("what", "", "found", title=str(certificate), show_lines=False)
    colours = {"holds": "green", "no longer holds": "red", "not checked": "dim"}
    for line in found.lines:
        table.add_row(escape(line.what), f"[{colours[line.state]}]{line.state}[/]", escape(line.detail))
    console.print(table)
    if not found.holds:
        raise typer.Exit(1)


def matrix(
    model: Model,
    data: Annotated[str, typer.Option(help="calibration batches of model inputs")],
    score: Score,
    evaluation: Test,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for matrix.json and matrix.html")] = Path("matrix"),
    weights: Weights = None,
    training: Annotated[str | None, typer.Option(help="training batches; without them there is no QAT row")] = None,
    loss: Annotated[str | None, typer.Option(help="loss(model, batch) -> scalar, for the QAT row")] = None,
    validation: Annotated[str | None, typer.Option(help="batches that choose the best trained state")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of the QAT row")] = 300,
    lr: Annotated[float, typer.Option(help="initial rate of the original training")] = 0.1,
    wide: Annotated[str, typer.Option(help="preset of the first PTQ row")] = "w8a8",
    narrow: Annotated[str, typer.Option(help="preset of the second one, of QAT, and the size of mixed")] = "w4a8",
    method: Annotated[list[str] | None, typer.Option(help="step of calibration, e.g. gptq, repeatable")] = None,
    target: Annotated[str, typer.Option(help="where the model will run")] = "cpu",
    inputs: Inputs = None,
    work: Annotated[Path | None, typer.Option(help="folder that keeps finished rows; the same call goes on")] = None,
    rounds: Rounds = 30,
) -> None:
    """One model in float, after training quantized, trained, and mixed: what each loses, weighs and takes."""
    if (training is None) != (loss is None):
        raise BitwrightError("the QAT row needs both --training and --loss; leave both out to do without it")
    how = None
    if training is not None and loss is not None:
        held = [] if validation is None else list(batches_of(validation))
        how = Training(load_object(loss), list(batches_of(training)), Schedule(steps=steps, lr=lr), held)
    found = compare_versions(
        model_of(model, weights), batches_of(data), load_object(score), batches_of(evaluation), training=how,
        presets=(wide, narrow), steps=method or [], target=target, inputs=_inputs(inputs), work=work, rounds=rounds,
        say=lambda text: console.print(text, highlight=False),
    )  # fmt: skip
    found.save(out)
    console.print(found.table())
    console.print(f"wrote {out / 'matrix.json'} and {out / 'matrix.html'}")


def _loaded(folder: Path, model: str) -> Any:
    return load(folder, model_of(model)).eval()


def _inputs(name: str | None) -> Any:
    return first_entry if name is None else load_object(name)


def _seen(texts: list[str] | None) -> dict[str, Any]:
    for text in texts or ():
        if "=" not in text:
            raise BitwrightError(f"--seen takes NAME=package.module:function, got {text!r}")
    return {name: batches_of(data) for name, data in (text.split("=", 1) for text in texts or ())}


def register(app: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    for command in (certify, verify, matrix):
        app.command()(command)
