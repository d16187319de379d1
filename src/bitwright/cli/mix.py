"""Subcommand ``mix``: bits that differ by layer, from the float model to the shipped one, each stage a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import nn

from bitwright.bench.measure import model_bytes
from bitwright.cli.bars import Progress, bars
from bitwright.cli.machines import specs_of
from bitwright.costs.choices import Specs
from bitwright.costs.latencies import measure_machine
from bitwright.costs.prices import Pricing
from bitwright.costs.roofline import get_machine
from bitwright.errors import BitwrightError
from bitwright.flow.checkpoint import save
from bitwright.joint import mix_model
from bitwright.plan.plan import Plan
from bitwright.search.budget import RESOURCES, Budget
from bitwright.search.mixed import choices_of, one_item
from bitwright.train.schedule import Schedule
from bitwright.train.training import Training
from bitwright.userspec import batches_of, first_of, load_object, model_of

console = Console()

Choices = Annotated[
    list[str] | None, typer.Option("--set", help="PATTERN=SPEC,SPEC,..., repeatable [default: weights at 2 to 8 bits]")
]
Minimize = Annotated[str | None, typer.Option(help=f"harm, {', '.join(RESOURCES)} [default: harm; bytes with --drop]")]


def mix(
    model: Annotated[str, typer.Argument(help="float model as package.module:factory")],
    data: Annotated[str, typer.Option(help="batches of model inputs, as package.module:function")],
    work: Annotated[Path, typer.Option(help="folder of all stages; the same call goes on there")],
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the shipped model")],
    weights: Annotated[Path | None, typer.Option(help="float weights: .safetensors or a state dict")] = None,
    plan: Annotated[Path | None, typer.Option(help="plan.toml whose weights are to get other bits")] = None,
    preset: Annotated[str | None, typer.Option(help="a preset in its place [default: w4a8]")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="with it, step of calibration, e.g. gptq, repeatable")
    ] = None,
    target: Annotated[str, typer.Option(help="with it, where the model will run")] = "cpu",
    choices: Choices = None,
    drop: Annotated[float | None, typer.Option(help="largest drop: of the score, or harm in nats")] = None,
    bytes: Annotated[float | None, typer.Option(help="most stored bytes")] = None,
    latency: Annotated[float | None, typer.Option(help="most seconds for one item")] = None,
    energy: Annotated[float | None, typer.Option(help="most modelled joules for one item, needs --machine")] = None,
    bops: Annotated[float | None, typer.Option(help="most bit operations for one item")] = None,
    peak_memory: Annotated[float | None, typer.Option(help="most bytes, stored and live, at the peak")] = None,
    minimize: Minimize = None,
    judge: Annotated[
        str | None, typer.Option(help="batches that judge plans [default: the last third of data]")
    ] = None,
    score: Annotated[str | None, typer.Option(help="score(model, batch) -> [n] in 0 to 1 on --judge")] = None,
    machine: Annotated[str | None, typer.Option(help="machine of the latency, modelled [default: this, timed]")] = None,
    training: Annotated[str | None, typer.Option(help="training batches; without them nothing is trained")] = None,
    loss: Annotated[str | None, typer.Option(help="loss(model, batch) -> scalar")] = None,
    validation: Annotated[str | None, typer.Option(help="batches that choose the best trained state")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 300,
    lr: Annotated[float, typer.Option(help="initial rate of the original training")] = 0.1,
) -> None:
    """Harm of each layer's bits, the best plan within the budget, calibration, training, the shipped model."""
    budget = _budget(drop=drop, bytes=bytes, latency=latency, energy=energy, bops=bops, peak_memory=peak_memory)
    net, start = model_of(model, weights), _plan(model, data, plan, preset, method, target)
    specs = choices_of(start) if choices is None else specs_of(choices)
    timed = "latency" in (*budget.limits(), minimize)
    try:
        with bars(console) as progress:
            found = mix_model(
                net, start, list(batches_of(data)), budget, work=work, minimize=minimize, specs=specs, say=_say,
                judge=None if judge is None else list(batches_of(judge)),
                score=None if score is None else load_object(score),
                latency=_pricing(net, start, data, specs, machine, progress, timed=timed),
                training=_training(training, loss, validation, Schedule(steps=steps, lr=lr)),
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print(f"\ninterrupted; the same command goes on in {work}")
        raise
    save(found.model, out)
    if found.trials is not None:
        console.print(found.trials.table())
    if found.history is not None:
        _say(f"training kept step {found.history.best_step}, score {found.history.best_score:.4f}")
    _say(f"wrote {out}: {model_bytes(found.model):,} bytes, float has {model_bytes(net):,}")


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _budget(**limits: float | None) -> Budget:
    budget = Budget(**{name: limit for name, limit in limits.items() if limit is not None})
    if not budget.limits():
        raise BitwrightError("mix needs a limit: --bytes, --drop, --latency, --energy, --bops or --peak-memory")
    return budget


def _plan(model: str, data: str, plan: Path | None, preset: str | None, method: list[str] | None, target: str) -> Plan:
    if plan is None:
        return Plan.preset(preset or "w4a8", model_of(model), first_of(data), target=target, steps=method or [])
    if preset is not None or method:
        raise BitwrightError("--plan holds its own specs and steps; leave out --preset and --method, or the plan")
    return Plan.load(plan)


def _pricing(
    net: nn.Module, plan: Plan, data: str, specs: Specs, machine: str | None, progress: Progress, *, timed: bool
) -> Pricing | None:
    if machine is not None:
        return get_machine(machine)
    if not timed:
        return None
    item = one_item(first_of(data))
    return measure_machine(
        net, plan, item, specs, on_row=lambda key, row, done, total: progress("latency", done, total)
    )


def _training(batches: str | None, loss: str | None, validation: str | None, schedule: Schedule) -> Training | None:
    if (batches is None) != (loss is None) or (validation is not None and batches is None):
        raise BitwrightError("training needs both --training and --loss; leave out both, and --validation, without it")
    if batches is None or loss is None:
        return None
    held = [] if validation is None else list(batches_of(validation))
    return Training(load_object(loss), list(batches_of(batches)), schedule, held)


def register(app: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    app.command()(mix)
