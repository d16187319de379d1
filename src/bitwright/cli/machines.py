"""Subcommands about machines: ``measure-machine`` times layers on this one, ``list`` names machines and kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bitwright.cli.bars import bars
from bitwright.costs.latencies import measure_machine as time_machine
from bitwright.costs.latencies import table_path
from bitwright.costs.roofline import get_machine, machine_names
from bitwright.costs.stopwatch import Timing
from bitwright.errors import BitwrightError
from bitwright.kernels.device import device_features
from bitwright.kernels.operators import implementation
from bitwright.kernels.table import KERNELS
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from bitwright.search.budget import Layer
from bitwright.search.dominance import slower
from bitwright.search.speeds import speeds
from bitwright.userspec import first_of, model_of

console = Console()


def measure_machine(
    model: Annotated[str, typer.Argument(help="float model as package.module:factory")],
    data: Annotated[str, typer.Option(help="batches of model inputs as package.module:function; the first is timed")],
    plan: Annotated[Path, typer.Option(help="plan.toml: how the model ships")],
    choices: Annotated[list[str], typer.Option("--set", help="PATTERN=SPEC,SPEC,..., repeatable: what to time where")],
    cache: Annotated[Path | None, typer.Option(help="folder of the tables [default: ~/.cache/bitwright]")] = None,
    seconds: Annotated[float, typer.Option(help="longest time for one choice of one layer")] = 1.0,
) -> None:
    """Time the choices of each layer on this machine, for budgets of latency; the same call goes on after a kill."""
    specs = specs_of(choices)
    net, loaded, example = model_of(model, None), Plan.load(plan), first_of(data)

    with bars(console) as progress:

        def told(key: str, row: Timing, done: int, total: int) -> None:
            console.print(f"{1e6 * row.seconds:,.1f} us +- {1e6 * row.error:.1f}: {key}", highlight=False, markup=False)
            progress("latency", done, total)

        timed = time_machine(net, loaded, example, specs, cache=cache, seconds=seconds, on_row=told)
    layers = speeds(timed, net, loaded, example, specs)
    console.print(_table(layers, f"{timed.machine['processor']}, {timed.machine['threads']} threads"))
    for line in slower(layers):
        console.print(str(line), highlight=False, markup=False)
    console.print(f"the table is {table_path(cache)}", highlight=False, markup=False, soft_wrap=True)


def _table(layers: Sequence[Layer], title: str) -> Table:
    table = Table("layer", "choice", "us", title=title)
    for layer in layers:
        for choice in layer.choices:
            path, specs = Site.parse(layer.sites[0]).path, ", ".join(choice.specs)
            table.add_row(path, specs, f"{1e6 * choice.cost.latency:,.1f}")
    return table


def specs_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """Specs by pattern, from texts like PATTERN=SPEC,SPEC; raises `BitwrightError` for others."""
    for text in texts:
        if "=" not in text:
            raise BitwrightError(f"--set takes PATTERN=SPEC,SPEC,..., got {text!r}; e.g. --set '*.weight=int4/channel'")
    return {pattern: specs.split(",") for pattern, specs in (text.split("=", 1) for text in texts)}


def list_things(what: Annotated[str, typer.Argument(help="machines or kernels")]) -> None:
    """List described machines (peak rates in 10^12 operations a second by format), or kernels and which run here."""
    tables = {"machines": _machines, "kernels": _kernels}
    if what not in tables:
        raise BitwrightError(f"bitwright list knows {' and '.join(tables)}, got {what!r}")
    console.print(tables[what]())


def _machines() -> Table:
    table = Table("machine", "what", "GB/s", "10^12 operations/s")
    for machine in map(get_machine, machine_names()):
        rates = ", ".join(f"{row.runs_as} {row.peak / 1e12:,.4g}" for row in machine.rates)
        table.add_row(machine.name, machine.description, f"{machine.bandwidth / 1e9:,.4g}", rates)
    return table


def _kernels() -> Table:
    """The rows in the order in which a layer takes the first that serves its specs and its shape."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    table = Table("kernel", "weights in memory", "here", caption=f"operators in {implementation()}")
    for row in KERNELS:
        missing = [sorted(row.requires - device_features(device)) for device in devices]
        table.add_row(row.name, row.layout, "yes" if [] in missing else f"needs {', '.join(min(missing, key=len))}")
    return table


def register(app: typer.Typer) -> None:
    """Add the subcommands to an application."""
    app.command()(measure_machine)
    app.command("list")(list_things)
