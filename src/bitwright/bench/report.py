"""`Report`: one table that says what each version of a model scores, weighs and takes, and its bits per layer.

The same report goes to the terminal, to Markdown and (see `html`) to a page that a person wants to open.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table
from torch import nn

from bitwright.bench.measure import Ratio
from bitwright.flow.evaluate import Drop
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.layer import LowbitLayer


@dataclass(frozen=True, slots=True)
class Row:
    """One version of the model. None and empty text mean: not measured, not applicable."""

    name: str
    score: float
    drop: Drop | None = None
    bytes: int | None = None
    speed: Ratio | None = None
    parity: str = ""
    onnx: str = ""


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Stored bits of a layer's weight and of its input (32 = float)."""

    path: str
    weight: int
    input: int
    elements: int


@dataclass
class Report:
    """A title, sentences of context, one row per version, and the bits per layer of some of them.

    ``percent`` says that scores are fractions, shown in percent, and drops in percentage points.
    """

    title: str
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    bits: dict[str, list[LayerBits]] = field(default_factory=dict)
    percent: bool = False

    def __str__(self) -> str:
        return to_markdown(self)


COLUMNS = ("model", "score", "drop [95 %]", "bytes", "speed", "trained = shipped", "same in ONNX Runtime")
_SPEED = COLUMNS.index("speed")


def cells(row: Row, *, percent: bool) -> tuple[str, ...]:
    """The row as text, one entry per column of `COLUMNS`."""
    factor, form = (100, ".2f") if percent else (1, ".4g")
    drop = (
        ""
        if row.drop is None
        else "{:+{f}} [{:+{f}}, {:+{f}}]".format(
            *(factor * value for value in (row.drop.drop, row.drop.low, row.drop.high)), f=form
        )
    )
    score = f"{factor * row.score:{form}}{' %' if percent else ''}"
    size = "" if row.bytes is None else f"{row.bytes:,}"
    return (row.name, score, drop, size, str(row.speed or ""), row.parity, row.onnx)


def to_table(report: Report) -> Table:
    """The report's rows for the terminal, speeds without their spread; columns that no row fills are left out."""
    table = Table(title=report.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    kept = filled(report)
    for index in kept:
        table.add_column(COLUMNS[index].replace(" ", "\n"), justify="left" if index == 0 else "right", no_wrap=True)
    for row in report.rows:
        texts = cells(row, percent=report.percent)
        table.add_row(*(texts[index].partition(" (")[0] if index == _SPEED else texts[index] for index in kept))
    return table


def to_markdown(report: Report) -> str:
    """The report as Markdown: notes, table, and the bits per layer."""
    kept = filled(report)
    lines = [f"# {report.title}", "", *(f"{note}  " for note in report.notes), ""]
    lines.append("| " + " | ".join(COLUMNS[i] for i in kept) + " |")
    lines.append("|" + "---|" * len(kept))
    lines += ["| " + " | ".join(cells(row, percent=report.percent)[i] for i in kept) + " |" for row in report.rows]
    if report.bits:
        names = list(report.bits)
        paths = list(dict.fromkeys(layer.path for layers in report.bits.values() for layer in layers))
        lines += ["", "Bits per layer (weight / input):", "", "| layer | " + " | ".join(names) + " |"]
        lines.append("|" + "---|" * (len(names) + 1))
        for path in paths:
            found = [next((x for x in report.bits[name] if x.path == path), None) for name in names]
            lines.append(
                f"| {path} | " + " | ".join("" if x is None else f"{x.weight} / {x.input}" for x in found) + " |"
            )
    return "\n".join(lines) + "\n"


def bits_per_layer(model: nn.Module) -> list[LayerBits]:
    """Bits of every weighted layer of a converted model, float layers included, in the order of the model."""
    rows = []
    for path, module in model.named_modules():
        if isinstance(module, LowbitLayer):
            bits = 32 if module.input_spec is None else module.input_spec.format.bits
            elements = module.weight.codes.numel()
            rows.append(LayerBits(path, module.weight_spec.format.bits, bits, elements))
        elif isinstance(module, LowbitAdd):
            rows.append(LayerBits(path, 0, module.input_specs[0].format.bits, 0))
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)):
            rows.append(LayerBits(path, 32, 32, module.weight.numel()))
    return rows


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(temporary).chmod(0o644)
    os.replace(temporary, path)


def filled(report: Report) -> list[int]:
    """Indices of the columns that at least one row fills."""
    return [i for i in range(len(COLUMNS)) if any(cells(row, percent=report.percent)[i] for row in report.rows)]
