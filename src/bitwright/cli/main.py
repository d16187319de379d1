"""The command line: one subcommand per verb of the straight line, each reading and writing files that can be edited.

A model is named as ``package.module:factory`` (a function without arguments, or a module object), data as
``package.module:batches`` (a function that returns an iterable of model inputs). The current folder is importable.
Exit codes: 0 done, 1 the goal was not met (the best answer is saved and named), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bitwright.algorithms.pipeline import calibrate as calibrate_model
from bitwright.auto import LEVELS, quantize_model
from bitwright.bench.html import to_html
from bitwright.bench.measure import measure
from bitwright.bench.report import to_table, write_text
from bitwright.cli import claims, machines, mix
from bitwright.demo import run_demo
from bitwright.errors import BitwrightError
from bitwright.export.onnx import export as export_model
from bitwright.export.parity import parity
from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert as convert_model
from bitwright.flow.coverage import coverage
from bitwright.flow.prepare import prepare
from bitwright.kernels.cpu import cpu_features
from bitwright.kernels.operators import implementation
from bitwright.kernels.table import KERNELS
from bitwright.kernels.table import explain as explain_kernels
from bitwright.plan.plan import Plan
from bitwright.plan.presets import PRESETS
from bitwright.plan.site import Site, matching, operator_of, rows_shape
from bitwright.search.ladder import INTERRUPTED
from bitwright.search.table import trials_table
from bitwright.train.loop import train as train_model
from bitwright.train.schedule import Schedule
from bitwright.userspec import batches_of, first_of, load_object, model_of, shipped_of

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Model = Annotated[str, typer.Argument(help="float model as package.module:factory")]
Weights = Annotated[Path | None, typer.Option(help="float weights: .safetensors or a state dict")]
Data = Annotated[str, typer.Option(help="batches of model inputs as package.module:function")]
Score = Annotated[str, typer.Option(help="score(model) -> float, larger is better, as package.module:function")]
Out = Annotated[Path, typer.Option("--out", "-o", help="where to write")]
Folder = Annotated[Path, typer.Argument(help="folder written by an earlier step")]


@app.command()
def plan(
    model: Model,
    data: Data,
    preset: Annotated[str, typer.Option(help=f"one of {', '.join(PRESETS)}")] = "w8a8",
    target: Annotated[str, typer.Option(help="where the model will run")] = "cpu",
    rule: Annotated[list[str] | None, typer.Option("--set", help="PATTERN=SPEC, repeatable; later ones win")] = None,
    out: Out = Path("plan.toml"),
) -> None:
    """Run the model once and write a plan: one line per site."""
    made = Plan.preset(preset, model_of(model, None), first_of(data), target=target, sites=_rules(rule or []))
    made.save(out)
    quantized = sum(spec is not None for spec in made.sites.values())
    console.print(
        f"wrote {out}: {quantized} of {len(made.sites)} sites quantized, {len(made.folds)} batch norms folded"
    )
    for site, spec in made.sites.items():
        if spec is None:
            console.print(f"  {site} stays float: {made.why.get(site, '')}", highlight=False)


@app.command()
def calibrate(
    model: Model, data: Data, plan: Annotated[Path, typer.Option()], out: Out, weights: Weights = None
) -> None:
    """Choose all scales from batches of inputs and save the prepared model."""
    prepared = prepare(model_of(model, weights), Plan.load(plan), inplace=True)
    calibrate_model(prepared, track(list(batches_of(data)), "calibrating", console=console))
    save(prepared, out)
    console.print(f"wrote {out}")


@app.command()
def train(
    model: Model,
    folder: Folder,
    data: Annotated[str, typer.Option(help="training batches, as package.module:function")],
    loss: Annotated[str, typer.Option(help="loss(model, batch) -> scalar, as package.module:function")],
    steps: Annotated[int, typer.Option(help="optimizer steps")],
    out: Out,
    lr: Annotated[float, typer.Option(help="initial rate of the original training")] = 0.1,
    score: Annotated[str | None, typer.Option(help="score(model) on validation data; the best state is kept")] = None,
) -> None:
    """Quantization-aware training of a calibrated model, in three phases."""
    prepared = load(folder, model_of(model, None))
    batches = list(batches_of(data))
    judge = None if score is None else load_object(score)
    with typer.progressbar(length=steps, label="training") as bar:
        try:
            history = train_model(
                prepared, load_object(loss), batches, schedule=Schedule(steps=steps, lr=lr), score=judge,
                on_step=lambda step, value: bar.update(1),
            )  # fmt: skip
        except KeyboardInterrupt:
            save(prepared, out)
            console.print(f"\ninterrupted; the best state so far is in {out}")
            raise
    save(prepared, out)
    console.print(f"wrote {out}: kept step {history.best_step}, score {history.best_score:.4f}")


@app.command()
def convert(model: Model, folder: Folder, out: Out) -> None:
    """Turn a calibrated or trained model into packed low-bit layers."""
    shipped = convert_model(load(folder, model_of(model, None)), inplace=True)
    save(shipped, out)
    table = Table("tensor", "format", "input", "bytes", "why", title=str(out))
    for row in coverage(shipped):
        table.add_row(row.path, row.format, row.input, f"{row.bytes:,}", row.why)
    console.print(table)


@app.command()
def quantize(
    model: Model,
    data: Data,
    score: Annotated[str, typer.Option(help="score(model) -> float, or with --evaluation score(model, batch) -> [n]")],
    out: Out,
    weights: Weights = None,
    evaluation: Annotated[str | None, typer.Option(help="batches that score gets one by one; tells how sure")] = None,
    max_drop: Annotated[float | None, typer.Option(help="largest loss of score")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="largest file")] = None,
    level: Annotated[str | None, typer.Option(help=f"where to start: {', '.join(LEVELS)}")] = None,
    preset: Annotated[str | None, typer.Option(help="where to start, by preset [default: w4a8]")] = None,
    target: Annotated[str, typer.Option(help="where the model will run")] = "cpu",
    recipe: Annotated[list[str] | None, typer.Option(help="rung to climb, repeatable [default: all]")] = None,
    work: Annotated[Path | None, typer.Option(help="folder that keeps the best; the same call goes on there")] = None,
    time_budget: Annotated[float | None, typer.Option(help="seconds after which the best so far is taken")] = None,
) -> None:
    """The whole line in one call: recipes from cheap to expensive, then 8 bits, until the score is kept."""
    result = quantize_model(
        model_of(model, weights), list(batches_of(data)), load_object(score),
        evaluation=None if evaluation is None else batches_of(evaluation), max_drop=max_drop, max_bytes=max_bytes,
        level=level, preset=preset, target=target, recipes=recipe, work=work, time_budget=time_budget,
        on_trial=console.print,
    )  # fmt: skip
    console.print(trials_table(result.trials, result.best))
    if all(spec is None for spec in result.plan.sites.values()):
        console.print("level fp32 leaves the model as it is; nothing was written")
        raise typer.Exit(0 if result.met else 1)
    save(result.model, out)
    write_text(out.with_suffix(".html"), to_html(result.report))
    console.print(to_table(result.report))
    console.print(f"wrote {out} and {out.with_suffix('.html')}")
    if result.stopped == INTERRUPTED:
        raise KeyboardInterrupt
    if not result.met:
        console.print(f"the goal was not met; {result.best} in {out} is the best answer found", highlight=False)
        raise typer.Exit(1)


@app.command()
def export(model: Model, folder: Folder, data: Data, out: Out) -> None:
    """Write a converted model as a QDQ ONNX file and compare it, layer by layer, with ONNX Runtime."""
    shipped, example = shipped_of(folder, model), first_of(data)
    export_model(shipped, out, example)
    found = parity(shipped, out, example)
    table = Table("layer", "largest difference", "SQNR dB", title=f"{out} in ONNX Runtime")
    for row in (*found.layers, found.output):
        table.add_row(row.path, f"{row.max_abs:.3g}", f"{row.sqnr:.1f}")
    console.print(table)
    console.print(f"same answers: {100 * found.argmax_agreement:.2f} %")


@app.command()
def evaluate(
    model: Model,
    score: Score,
    folder: Annotated[
        Path | None, typer.Argument(help="prepared or converted model; without it, the float model")
    ] = None,
    weights: Weights = None,
) -> None:
    """Print score(model) of the float model or of a saved one."""
    judged = model_of(model, weights) if folder is None else load(folder, model_of(model, None))
    console.print(f"{load_object(score)(judged.eval()):.6f}")


@app.command()
def bench(
    model: Model,
    folder: Folder,
    data: Data,
    weights: Weights = None,
    rounds: Annotated[int, typer.Option()] = 30,
) -> None:
    """Time the float and the converted model in alternation on the first batch."""
    base = model_of(model, weights)
    shipped = shipped_of(folder, model)
    table = Table("model", "ms per call", "speed (10-90 %)", "bytes", title=f"{torch.get_num_threads()} threads")
    for row in measure({"float": base, str(folder): shipped}, first_of(data), rounds=rounds):
        table.add_row(row.name, f"{1e3 * row.seconds:.3f}", str(row.speed), f"{row.bytes:,}")
    console.print(table)


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="plan.toml")],
    site: Annotated[str, typer.Argument(help="a site, e.g. layer1.0.conv1.weight")],
    model: Annotated[str | None, typer.Option(help="package.module:factory, to list the kernels too")] = None,
) -> None:
    """Say what a site becomes, why, and which kernel computes it."""
    loaded = Plan.load(plan)
    [found] = matching(site, loaded.sites)[:1]
    console.print(loaded.explain(found), highlight=False)
    weight, input = (loaded.sites.get(Site(found.path, slot)) for slot in ("weight", "input"))
    if model is not None and weight is not None:
        layer = model_of(model, None).get_submodule(found.path)
        shape = rows_shape(layer, "weight")
        for name, reason in explain_kernels(operator_of(layer) or "", weight, input, shape, cpu_features()):
            console.print(f"  kernel {name}: {reason}", highlight=False)


@app.command()
def doctor() -> None:
    """Say what is installed, which kernels were built, and what this machine offers."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    table = Table(show_header=False, title="bitwright doctor")
    table.add_row("bitwright", installed("bitwright"))
    table.add_row("python, machine", f"{platform.python_version()}, {platform.machine()}")
    table.add_row("torch, threads", f"{torch.__version__}, {torch.get_num_threads()}")
    features = cpu_features()
    table.add_row(
        "native kernels",
        "built" if features else "not built: torch reference kernels run instead (install a C++ compiler)",
    )
    table.add_row("operators", f"in {implementation()}")
    table.add_row("instruction sets", ", ".join(sorted(features - {"native"})) or "portable")
    for op in dict.fromkeys(row.op for row in KERNELS):
        names = [row.name for row in KERNELS if row.op == op and row.requires <= features]
        table.add_row(f"{op} kernels", ", ".join(names))
    for package, extra in (
        ("onnx", "onnx"),
        ("onnxscript", "onnx"),
        ("onnxruntime", "onnx"),
        ("scikit-learn", "demo"),
    ):
        found = installed(package)
        table.add_row(package, found if found != "not installed" else f"{found}: pip install 'bitwright[{extra}]'")
    console.print(table)


@app.command()
def demo(out: Out = Path("report")) -> None:
    """Train a small CNN on handwritten digits and take it through the whole line."""
    run_demo(out, console=console)


claims.register(app)
machines.register(app)
mix.register(app)


def _rules(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise BitwrightError(f"--set takes PATTERN=SPEC, got {text!r}; e.g. --set 'stem.weight=int8/channel'")
    return dict(text.split("=", 1) for text in texts)


def main() -> None:
    """Entry point: errors made on purpose become one line on stderr and exit code 2."""
    try:
        app()
    except BitwrightError as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
